"""Sending through an SMTP pool, to a scripted server, in tests."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

from producer.setting_types import RelayURL
from producer.settings import Settings
from support.smtp_server import PLAIN_OFFERS, Act, ScriptedServer
from worker.mail.channel import MailChannel
from worker.mail.errors import MailError
from worker.mail.message import Envelope, Mail
from worker.mail.pool import SmtpPool

ENVELOPE: Final = Envelope(
    "no-reply@example.com", "alice@example.com", False, b"Subject: code\r\n\r\n..stuffed\r\nhello\r\n"
)
UTF8_ENVELOPE: Final = ENVELOPE._replace(recipient="用户@example.com", needs_smtputf8=True)
FOREVER: Final = 300.0  # seconds, the most that settings allow; longer than any test on a busy machine


def pool_of(
    relay: ScriptedServer | RelayURL,
    scheme: str = "smtp",
    *,
    login: tuple[str, str] | None = None,
    connections: int = 4,
    connect_timeout: float = FOREVER,
    send_timeout: float = FOREVER,
    **options: Any,
) -> SmtpPool:
    """A pool for one relay."""
    url = relay.url(scheme, *(login or ())) if isinstance(relay, ScriptedServer) else relay
    settings = Settings(relay_connections=connections, connect_timeout=connect_timeout, send_timeout=send_timeout)
    return SmtpPool(url, settings, **options)


def free(pool: SmtpPool) -> int:
    """How many sends could start now without waiting for a connection."""
    return len(pool._idle) + pool._limit - pool._size


@asynccontextmanager
async def rig(
    script: Mapping[str, Act | list[Act]] | None = None,
    *,
    offers: Sequence[str] = PLAIN_OFFERS,
    most: int | None = None,
    **options: Any,
) -> AsyncIterator[tuple[ScriptedServer, SmtpPool]]:
    """A scripted server and a pool; `options` are the pool's. In the end, no connection and no task may be left."""
    before = asyncio.all_tasks()
    async with ScriptedServer(script, offers=offers, most=most) as server:
        pool = pool_of(server, **options)
        yield server, pool
        await pool.close()
        assert pool.open_connections == 0
        await until(lambda: server.open == 0)
        gc.collect()
        server_tasks = {task for task in asyncio.all_tasks() if "ScriptedServer" in repr(task)}
        assert asyncio.all_tasks() - server_tasks == before


async def send(through: MailChannel, name: str = "alice", **how: Any) -> MailError | None:
    """Send one mail to `name`; the outcome."""
    return await outcome(through, ENVELOPE._replace(recipient=f"{name}@example.com"), **how)


async def send_many(through: MailChannel, count: int) -> list[MailError | None]:
    """Send so many mails at once; their outcomes."""
    return await asyncio.gather(*(send(through, f"user{number}") for number in range(count)))


async def outcome(
    through: MailChannel,
    envelope: Envelope = ENVELOPE,
    *,
    deadline: float = math.inf,
    wanted: Callable[[], bool] = lambda: True,
    before_data: Callable[[Callable[[bool], None]], None] | None = None,
    still: Callable[[], bool] = lambda: True,
) -> MailError | None:
    """Send `envelope` by `deadline` (loop time); the outcome. Raises any error that is no `MailError`.

    `wanted`: answers `before_data` at once, unless that is given; `still`: the mail's `still_permitted`.
    """
    done: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    ask = before_data or (lambda go: go(wanted()))
    through.send(Mail(envelope, deadline, ask, still, done.set_result))
    error = await done
    if error is None or isinstance(error, MailError):
        return error
    raise error


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that soon becomes true."""
    async with asyncio.timeout(FOREVER / 2):
        while not condition():  # noqa: ASYNC110 the server or the kernel makes it true
            await asyncio.sleep(0.01)
