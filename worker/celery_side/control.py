"""`celery inspect` and `celery control`, where Celery's own commands know only requests that went through its pool.

What the service holds counts as active, no argument and no address is shown whole, and limits that do not apply say so.
Importing this module replaces Celery's commands by ours.
"""

from __future__ import annotations

import os
import time
from typing import Any

from celery.worker import control, state

from producer.contract import TASK
from producer.masking import mask_email, mask_text


def _held(panel: Any) -> dict[str, dict[str, Any]]:
    """By request id: the requests that the service holds and Celery does not know of."""
    bridge = panel.app.running_bridge
    if bridge is None:
        return {}
    to_unix_time = time.time() - time.monotonic()
    return {
        job.request_id: {
            "id": mask_text(job.request_id),  # a caller may use an address as one
            "name": TASK,
            "type": TASK,
            "args": [],
            "kwargs": {"email": mask_email(job.request.email)},
            "hostname": panel.hostname,
            "time_start": job.began + to_unix_time,
            "worker_pid": os.getpid(),
            "acknowledged": False,
            "delivery_info": {"exchange": "", "routing_key": panel.app.settings.queue},
        }
        for job in bridge.held()
    }


@control.inspect_command(alias="dump_active", signature="[safe=False]")  # type: ignore[untyped-decorator]
def active(panel: Any, safe: bool = False, **_: Any) -> list[dict[str, Any]]:
    """Requests that are being served now."""
    through_celery = [request.info(safe=safe) for request in tuple(state.active_requests)]
    return [*_held(panel).values(), *through_celery]


@control.inspect_command(  # type: ignore[untyped-decorator]
    args=[("task_ids", str)], signature="[id1 [id2 [... [idN]]]]", variadic="ids"
)
def query_task(panel: Any, ids: Any, **_: Any) -> dict[str, Any]:
    """Where these requests are, by id."""
    wanted = [ids] if isinstance(ids, str) else list(ids)
    held = _held(panel)
    found: dict[str, Any] = control.query_task(panel, wanted)
    return {**found, **{request_id: ("active", held[request_id]) for request_id in wanted if request_id in held}}


@control.inspect_command(alias="dump_revoked")  # type: ignore[untyped-decorator]
def revoked(_panel: Any, **_: Any) -> list[str]:
    """Ids of requests that an operator revoked."""
    return [mask_text(request_id) for request_id in tuple(state.revoked)]


# Answered as done, as there is nothing to put right. Celery would say that the new limit is in force, or fail.
_POOL = "nothing was changed: mails are sent at once on one loop, by no pool; VERIFY_RELAY_CONNECTIONS bounds them"


@control.control_command(  # type: ignore[untyped-decorator]
    args=[("task_name", str), ("rate_limit", str)], signature="<task_name> <rate_limit (e.g., 5/s | 5/m | 5/h)>"
)
def rate_limit(_panel: Any, **_: Any) -> dict[str, str]:
    """Does not apply: requests have limits of their own."""
    return {"ok": "nothing was changed: rate limits do not apply here; the settings VERIFY_MAX_SENDS_... limit mails"}


@control.control_command(  # type: ignore[untyped-decorator]
    args=[("task_name", str), ("soft", float), ("hard", float)], signature="<task_name> <soft_secs> [hard_secs]"
)
def time_limit(_panel: Any, **_: Any) -> dict[str, str]:
    """Does not apply: each step of a request has a timeout of its own."""
    return {"ok": "nothing was changed: time limits do not apply here; VERIFY_SEND_TIMEOUT bounds a send"}


@control.control_command(args=[("n", int)], signature="[N=1]")  # type: ignore[untyped-decorator]
def pool_grow(_panel: Any, **_: Any) -> dict[str, str]:
    """Does not apply: mails are sent by no pool."""
    return {"ok": _POOL}


@control.control_command(args=[("n", int)], signature="[N=1]")  # type: ignore[untyped-decorator]
def pool_shrink(_panel: Any, **_: Any) -> dict[str, str]:
    """Does not apply: mails are sent by no pool."""
    return {"ok": _POOL}


@control.control_command(args=[("max", int), ("min", int)], signature="[max [min]]")  # type: ignore[untyped-decorator]
def autoscale(_panel: Any, **_: Any) -> dict[str, str]:
    """Does not apply: mails are sent by no pool."""
    return {"ok": _POOL}
