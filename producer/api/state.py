"""What one API process holds, and how an outcome becomes the error code that every caller gets."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import TYPE_CHECKING

from producer.aio import AsyncVerificationClient
from producer.api.counts import ApiMetrics, Protocol, Verb
from producer.api.keys import key_name
from producer.api.readiness import Readiness
from producer.api.relay_watch import RelayWatch
from producer.audit import Audit
from producer.contract import CheckResult, ErrorCode, Reply
from producer.errors import VerifyError
from producer.redis.connection import RedisConnections
from producer.settings import Settings

if TYPE_CHECKING:
    from producer.tracing.spans import Traces

logger = logging.getLogger(__name__)


class Api:
    """Client, readiness, metrics and traces of one process, on the event loop that runs at the first use."""

    def __init__(self, settings: Settings, traces: Traces | None = None) -> None:
        self.settings = settings
        self.traces = traces
        self.redis = RedisConnections()
        self.audit = Audit()
        self.client = AsyncVerificationClient(
            settings, max_queue=settings.max_queue, traces=traces, redis=self.redis, audit=self.audit
        )
        self.readiness = Readiness(settings, self.redis)
        self.relays = RelayWatch(self.readiness)
        self.metrics = ApiMetrics(self.audit, {each.name for each in settings.api_keys})
        self.leaving = False  # set once the process drains: it still serves, but is not ready
        # Closed in this order; the demo page adds what it opens.
        self.on_close: list[Callable[[], Awaitable[None]]] = []
        self.on_close += [self.relays.close, self.client.close, self.readiness.close]

    async def answer(self, protocol: Protocol, verb: Verb, outcome: Awaitable[Reply | CheckResult]) -> ErrorCode:
        """The error code of `outcome`, whatever happens; counted, and noted in the current span."""
        key = key_name.get()
        counts = self.metrics.counts[protocol, verb, key]
        counts.in_flight += 1
        began = perf_counter()
        try:
            error = (await outcome).error
        except VerifyError as exc:  # for example, the Redis server is too old
            logger.error("%s", exc, extra={"key": key} if key else None)
            error = ErrorCode.REDIS_ERR
        except Exception as exc:  # noqa: BLE001 - whatever it is, the caller gets an answer
            # Without its text, which may quote what the caller sent.
            extra = {"kind": type(exc).__name__, **({"key": key} if key else {})}
            logger.error("unexpected error in a %s %s", protocol, verb, extra=extra)
            error = ErrorCode.EXCEPTION
        finally:
            counts.in_flight -= 1
        counts.answered(error, perf_counter() - began)  # a cancelled request has no answer
        if self.traces is not None:
            self.traces.answered(error)
        return error

    async def close(self) -> None:
        """Close everything. Requests that still wait are answered `TIMEOUT`."""
        self.audit.flush()
        for close in self.on_close:
            await close()
        await self.redis.close()
