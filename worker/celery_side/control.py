"""`celery inspect` tells the truth: what the service holds counts as active, and no argument is shown whole.

Celery's own answers know only requests that went through its pool. Importing this module puts ours in their place.
"""

from __future__ import annotations

import os
import time
from typing import Any

from celery.worker import control, state

from producer.contract import TASK
from producer.errors import VerifyError
from producer.logs import mask_email
from worker.celery_side import bridge


def _held(hostname: str) -> dict[str, dict[str, Any]]:
    try:
        jobs = bridge.current().held()
    except VerifyError:
        return {}
    ahead = time.time() - time.monotonic()  # of the loop's clock
    return {
        job.request_id: {
            "id": job.request_id,
            "name": TASK,
            "type": TASK,
            "args": [],
            "kwargs": {"email": mask_email(job.request.email)},
            "hostname": hostname,
            "time_start": job.began + ahead,
            "worker_pid": os.getpid(),
            "acknowledged": False,
            "delivery_info": {"exchange": "", "routing_key": bridge.current().queue},
        }
        for job in jobs
        if not job.through_celery
    }


@control.inspect_command(alias="dump_active", signature="[safe=False]")  # type: ignore[untyped-decorator]
def active(panel: Any, safe: bool = False, **_: Any) -> list[dict[str, Any]]:
    """Requests that are being served now."""
    through_celery = [request.info(safe=safe) for request in tuple(state.active_requests)]
    return [*_held(panel.hostname).values(), *through_celery]


@control.inspect_command(  # type: ignore[untyped-decorator]
    args=[("task_ids", str)], signature="[id1 [id2 [... [idN]]]]", variadic="ids"
)
def query_task(panel: Any, ids: Any, **_: Any) -> dict[str, Any]:
    """Where these requests are, by id."""
    wanted = [ids] if isinstance(ids, str) else list(ids)
    held = _held(panel.hostname)
    found: dict[str, Any] = control.query_task(panel, wanted)
    return {**found, **{request_id: ("active", held[request_id]) for request_id in wanted if request_id in held}}
