"""Sending through a relay in tests, and that nothing is left of it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Final

from smtp_server import ScriptedServer

from worker.mail.errors import MailError
from worker.mail.relay import Envelope, Relay

CONTENT: Final = b"Subject: code\r\n\r\nhello\r\n"


def make(server: ScriptedServer, connections: int = 4, **options: float) -> Relay:
    """A relay for `server`; `options` are timeouts in seconds."""
    timeouts = {"connect_timeout": 2.0, "send_timeout": 5.0, **options}
    return Relay(server.url(), connections=connections, **timeouts)  # type: ignore[arg-type]  # floats only


async def send(relay: Relay, name: str = "alice") -> MailError | None:
    """Send once; the outcome."""
    try:
        await relay.send(Envelope("no-reply@example.com", f"{name}@example.com", False, CONTENT), lambda: True)
    except MailError as exc:
        return exc
    return None


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what will come true soon."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 what is waited for is the server's, or the kernel's
            await asyncio.sleep(0.01)


async def assert_nothing_left(relay: Relay, server: ScriptedServer) -> None:
    """Close `relay`: no connection and no task remains."""
    await relay.close()
    assert relay.open_connections == 0
    await until(lambda: server.open == 0)
    gc.collect()
    server_tasks = {task for task in asyncio.all_tasks() if "ScriptedServer" in repr(task)}
    assert asyncio.all_tasks() - server_tasks == {asyncio.current_task()}
