"""Asks with the clients of whichever release is on the path: the program of an `Asker`.

Reads one request a line from standard input, as JSON: `number`, `how`, `email` and, to enqueue, `id`. Writes what came
of it: `number`, and `answer` (an error code), `acknowledged` or `failed` (the kind of an exception). Ends with its
input.

It uses only what the contract promises about clients.
"""

from __future__ import annotations

import asyncio
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from producer.aio import AsyncVerificationClient
from producer.client import VerificationClient

WAITING: Final = 64  # threads that wait for a reply at one time


async def serve() -> None:
    """Serve standard input until its end."""
    reader = asyncio.StreamReader()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(WAITING))
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    with VerificationClient() as blocking:
        async with AsyncVerificationClient() as client, asyncio.TaskGroup() as tasks:
            say(ready=True)
            while line := await reader.readline():
                tasks.create_task(ask(client, blocking, json.loads(line)))


async def ask(client: AsyncVerificationClient, blocking: VerificationClient, wanted: dict[str, Any]) -> None:
    """Make one request, and say what came of it."""
    email, number = wanted["email"], wanted["number"]
    try:
        match wanted["how"]:
            case "enqueue":
                await client.enqueue(email, request_id=wanted["id"])
                say(number=number, acknowledged=True)
            case "request":
                say(number=number, answer=int((await client.request(email)).error))
            case "blocking":
                say(number=number, answer=int((await asyncio.to_thread(blocking.request, email)).error))
    except Exception as exc:  # noqa: BLE001 - the caller judges it
        say(number=number, failed=type(exc).__name__)


def say(**what: object) -> None:
    """Write one line."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(serve())
