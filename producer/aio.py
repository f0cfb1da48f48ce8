"""The asyncio client."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from producer.contract import DEFAULT_PURPOSE, CheckResult, Reply
from producer.core.requests import ClientCore, RequestObserver, build_request
from producer.settings import Settings, load

if TYPE_CHECKING:
    from producer.tracing.spans import Traces


class AsyncVerificationClient:
    """Asks for verification codes and checks them, for thousands of tasks at once over one connection each way.

    Opens its connections at the first use, on the loop that runs then; on another loop, or in a forked process, it
    opens its own. Use it as `async with`, or `close()` it. Not safe for threads: see `producer.client` for those.
    Every verb may raise `ServerTooOld`, and `RuntimeError` once the client is closed.
    """

    def __init__(
        self, settings: Settings | None = None, *, max_queue: int | None = None, traces: Traces | None = None
    ) -> None:
        """`settings`: what is in force; read from the environment if not given, which may raise `BadSetting`.

        `max_queue`: with more requests waiting in the queue, `request` answers `TOO_MANY_REQUESTS` and `enqueue` raises
        `QueueFull`; None: the queue may grow. `traces`: None: those of the application, if it has set up OpenTelemetry
        before the first use.
        """
        self._settings = settings or load()
        self._max_queue = max_queue
        self._traces = traces
        self._asker: ClientCore | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def request(
        self,
        email: Any,
        *,
        purpose: str = DEFAULT_PURPOSE,
        locale: str | None = None,
        observer: RequestObserver | None = None,
    ) -> Reply:
        """Ask for a code and wait until a relay accepted the mail or it is certain that none will.

        Answers within `VERIFY_REPLY_TIMEOUT` seconds (`TIMEOUT`: unknown, ask again), and within 3 s with `REDIS_ERR`
        if Redis cannot be reached; for neither does it raise. What is no address or no purpose is answered at once.
        A locale that is unknown, or not a string, means the worker's own. `email` comes back as it was given.
        A `follower` is told of the request on its way out.
        """
        return await self._here().request(build_request(email, purpose, locale), observer)

    async def enqueue(
        self, email: Any, *, purpose: str = DEFAULT_PURPOSE, locale: str | None = None, request_id: str | None = None
    ) -> str:
        """Ask for a code without waiting for the reply. Returns the request id once Redis has the request.

        The same `request_id` sent again is the same request: it brings no second mail. Raises `RedisUnavailable`
        within 3 s; the request may then be on the queue or not, and can be sent again with the same id. Raises
        `ValueError` for a `request_id` that is no printable string of 1 to 255 bytes, `TypeError` for an email that
        JSON cannot say.
        """
        return await self._here().enqueue(build_request(email, purpose, locale), request_id)

    async def check(self, email: str, code: str, *, purpose: str = DEFAULT_PURPOSE) -> CheckResult:
        """Whether `code` is the live one: `SUCCESS` (and it is consumed), `VARIFY_CODE_ERR` or `VARIFY_EXPIRED`.

        `REDIS_ERR` within 3 s if Redis cannot be reached; the code may then be consumed or not.
        """
        return await self._here().check(email, code, purpose)

    async def close(self) -> None:
        """Close the connections. Requests that still wait are answered `TIMEOUT`."""
        self._closed = True
        asker, self._asker = self._asker, None
        if asker is not None and self._loop is asyncio.get_running_loop():
            await asker.close()

    def _here(self) -> ClientCore:
        if self._closed:
            raise RuntimeError("the client is closed")
        loop = asyncio.get_running_loop()
        if self._asker is None or self._loop is not loop:
            # The former loop's connections died with it.
            self._asker = ClientCore(self._settings, max_queue=self._max_queue, traces=self._traces)
            self._loop = loop
        return self._asker

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        await self.close()
