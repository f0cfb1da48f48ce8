"""What a forked process becomes: a worker, an API server, or a program that uses the client."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Final

BROKEN, ASKED_AT = "CRASH_MAP_BROKEN", "CRASH_MAP_ASKED_AT"  # variables: how a worker is broken; the client's socket
_MODULES: Final = (
    *("celery.__main__", "celery.bin.celery", "celery.bin.worker", "celery.apps.worker", "celery.worker.worker"),
    *("celery.app.log", "celery.app.control", "celery.app.trace", "celery.app.amqp", "celery.backends.redis"),
    *("celery.concurrency.thread", "celery.fixups.django", "celery.worker.autoscale", "celery.worker.components"),
    *("celery.worker.pidbox", "celery.worker.consumer.delayed_delivery", "celery.events", "kombu.transport.redis"),
    *("billiard.pool", "billiard.dummy", "celery.worker.strategy"),
    *("worker.bootstrap", "worker.tasks", "worker.celery_side.backend", "worker.celery_side.bridge"),
    *("worker.celery_side.consumer", "worker.celery_side.control", "worker.celery_side.events"),
    *("worker.celery_side.flower", "worker.celery_side.transport"),
    *("producer.aio", "producer.cli", "producer.api.server", "bench.crash_map.broken"),
    *("jinja2.ext", "uvloop", "uvicorn.lifespan.off", "email.policy"),
)


def load() -> None:
    """Import what the programs need, but nothing that reads settings: those are each child's own."""
    for name in _MODULES:
        importlib.import_module(name)
    importlib.import_module("celery.utils.imports").load_extension_class_names("celery.result_backends")  # it is cached
    if early := {"celeryconfig", "worker.app"} & set(sys.modules):
        raise RuntimeError(f"imported before there are settings: {early}")


def worker() -> int:
    """`celery -A worker.app worker`; broken on purpose if the environment says so."""
    from celery.__main__ import main  # noqa: PLC0415 - not for the side that gives orders

    from bench.crash_map import broken  # noqa: PLC0415

    if way := os.environ.get(BROKEN):
        broken.WAYS[way]()
    sys.argv = ["celery", "-A", "worker.app", "worker", "-l", "INFO"]
    return int(main() or 0)


def api() -> int:
    """`python -m producer serve`."""
    from producer.cli import app  # noqa: PLC0415

    sys.argv = ["verifyserver", "serve"]
    app(prog_name="python -m producer")
    return 0


def client() -> int:
    """Asks for a code for each address that it reads from its socket, all at once, and writes what it is answered."""
    return asyncio.run(_client())


async def _client() -> int:
    from producer.aio import AsyncVerificationClient  # noqa: PLC0415

    reader, writer = await asyncio.open_unix_connection(os.environ[ASKED_AT])
    async with AsyncVerificationClient() as asking, asyncio.TaskGroup() as group:

        async def ask(number: int, email: str) -> None:
            reply = await asking.request(email)
            writer.write(json.dumps([number, int(reply.error)]).encode() + b"\n")

        while line := await reader.readline():
            group.create_task(ask(*json.loads(line)))
    return 0


PROGRAMS: Final[dict[str, Callable[[], int]]] = {"worker": worker, "api": api, "client": client}
