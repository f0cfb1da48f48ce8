"""Sending through a relay in tests, and that nothing is left of it."""

from __future__ import annotations

import asyncio
import functools
import gc
import math
from collections.abc import Callable, Coroutine
from typing import Final, ParamSpec

from support.smtp_server import ScriptedServer
from worker.mail.channel import MailChannel
from worker.mail.errors import MailError
from worker.mail.message import Envelope, Mail
from worker.mail.pool import SmtpPool

P = ParamSpec("P")

CONTENT: Final = b"Subject: code\r\n\r\nhello\r\n"


def asyncio_test(test: Callable[P, Coroutine[None, None, None]]) -> Callable[P, None]:
    """Run an async test in a loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def make(server: ScriptedServer, connections: int = 4, **options: float) -> SmtpPool:
    """A relay for `server`; `options` are timeouts in seconds."""
    timeouts = {"connect_timeout": 2.0, "send_timeout": 5.0, **options}
    return SmtpPool(server.url(), connections=connections, **timeouts)  # type: ignore[arg-type]  # floats only


ENVELOPE: Final = Envelope("no-reply@example.com", "alice@example.com", False, CONTENT)
UTF8_ENVELOPE: Final = ENVELOPE._replace(recipient="用户@example.com", needs_smtputf8=True)


async def send(relay: SmtpPool, name: str = "alice") -> MailError | None:
    """Send once; the outcome."""
    return await outcome(relay, ENVELOPE._replace(recipient=f"{name}@example.com"))


async def outcome(
    through: MailChannel,
    envelope: Envelope,
    *,
    deadline: float = math.inf,
    wanted: Callable[[], bool] = lambda: True,
) -> MailError | None:
    """Send `envelope`, to be done by `deadline` (loop time); the outcome. Raises what is no `MailError`."""
    done: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    through.send(Mail(envelope, deadline, lambda go: go(wanted()), done.set_result))
    error = await done
    if error is None or isinstance(error, MailError):
        return error
    raise error


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what will come true soon."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 what is waited for is the server's, or the kernel's
            await asyncio.sleep(0.01)


async def assert_nothing_left(relay: SmtpPool, server: ScriptedServer) -> None:
    """Close `relay`: no connection and no task remains."""
    await relay.close()
    assert relay.open_connections == 0
    await until(lambda: server.open == 0)
    gc.collect()
    server_tasks = {task for task in asyncio.all_tasks() if "ScriptedServer" in repr(task)}
    assert asyncio.all_tasks() - server_tasks == {asyncio.current_task()}
