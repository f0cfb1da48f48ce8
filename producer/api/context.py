"""What both doors share: the client behind them, and the promise that there is always an answer."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import TYPE_CHECKING, Final

from producer.aio import AsyncVerificationClient
from producer.api.metrics import ApiMetrics, Protocol, Verb
from producer.api.readiness import Readiness
from producer.contract import DEFAULT_PURPOSE, CheckResult, ErrorCode, Reply
from producer.core.requests import RequestObserver
from producer.errors import VerifyError
from producer.redis.connection import RedisConnections
from producer.settings import Settings

if TYPE_CHECKING:
    from producer.tracing.spans import Traces

logger = logging.getLogger(__name__)

BODY_LIMIT: Final = 16 * 1024  # bytes of one request; the longest address has 254


class Api:
    """Answers for the doors. Lives on the event loop that runs when it is first used."""

    def __init__(self, settings: Settings, traces: Traces | None = None) -> None:
        self.settings = settings
        self.traces = traces
        self.redis = RedisConnections()
        self.client = AsyncVerificationClient(settings, max_queue=settings.max_queue, traces=traces, redis=self.redis)
        self.readiness = Readiness(settings, self.redis)
        self.metrics = ApiMetrics()
        self.leaving = False  # set once the process drains: it serves, and is not ready
        self.closing: list[Callable[[], Awaitable[None]]] = []  # what else ends with it

    async def request(
        self,
        protocol: Protocol,
        email: str,
        *,
        purpose: str = DEFAULT_PURPOSE,
        locale: str | None = None,
        observer: RequestObserver | None = None,
    ) -> ErrorCode:
        """Ask for a code, within the reply timeout; whatever happens is an error code."""
        asking = self.client.request(email, purpose=purpose, locale=locale, observer=observer)
        return await self._answer(protocol, "request", asking)

    async def check(self, protocol: Protocol, email: str, code: str, *, purpose: str = DEFAULT_PURPOSE) -> ErrorCode:
        """Check a code, within 3 s; whatever happens is an error code."""
        return await self._answer(protocol, "check", self.client.check(email, code, purpose=purpose))

    async def close(self) -> None:
        """Who still waits is answered `TIMEOUT`."""
        await self.client.close()
        await self.readiness.close()
        for close in self.closing:
            await close()
        await self.redis.close()

    async def _answer(self, protocol: Protocol, verb: Verb, work: Awaitable[Reply | CheckResult]) -> ErrorCode:
        counts = self.metrics.counts[protocol, verb]
        counts.in_flight += 1
        began = perf_counter()
        try:
            error = (await work).error
        except VerifyError as exc:  # such as a Redis server that is too old
            logger.error("%s", exc)
            error = ErrorCode.REDIS_ERR
        except Exception as exc:  # noqa: BLE001 - whatever it is, the caller gets an answer
            # Without its text, which may quote what the caller sent.
            logger.error("unexpected error in a %s request", protocol, extra={"kind": type(exc).__name__})
            error = ErrorCode.EXCEPTION
        finally:
            counts.in_flight -= 1
        counts.answered(error, perf_counter() - began)  # who was cancelled got no answer
        if self.traces is not None:
            self.traces.answered(error)
        return error
