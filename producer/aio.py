"""The asyncio client. Each verb is declared here, once; `producer.client` offers the same verbs to threads."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Self

from producer.audit import Audit
from producer.contract import DEFAULT_PURPOSE, CheckResult, ErrorCode, Reply, is_purpose
from producer.core.deadlines import Deadlines
from producer.core.publisher import Publisher
from producer.core.replies import Replies
from producer.core.requests import RequestObserver, build_request, certain_error, encode, require_request_id
from producer.errors import QueueFull, RedisUnavailable
from producer.redis.connection import REDIS_TIMEOUT, RedisConnections, check_version
from producer.redis.protocol import TOO_LATE
from producer.settings import Settings, load
from producer.store.codes import CodePolicy
from producer.store.redis_codes import RedisCodeStore
from producer.tracing.setup import of_application

if TYPE_CHECKING:
    from producer.tracing.spans import Sending, Traces

logger = logging.getLogger(__name__)


class AsyncVerificationClient:
    """Asks for verification codes and checks them: thousands of tasks at once over one connection each way.

    Connects at the first use, on the loop that runs then; on another loop, or in a forked process, it connects anew.
    Use it with `async with`, or `close()` it. Not thread-safe: threads use `producer.client`. A task may be cancelled
    at any time. Every verb may raise `ServerTooOld`, and `RuntimeError` once the client is closed.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        max_queue: int | None = None,
        traces: Traces | None = None,
        redis: RedisConnections | None = None,
        audit: Audit | None = None,
    ) -> None:
        """`settings`: by default read from the environment, which may raise `BadSetting`.

        `max_queue`: while more requests than this wait in the queue, `request` answers `TOO_MANY_REQUESTS` and
        `enqueue` raises `QueueFull`; by default the queue may grow without limit. `traces`: by default those of the
        application, if it has set up OpenTelemetry before the first use. `redis`: makes the connections, for a client
        that stays on one loop; whoever made it closes it. `audit`: records the audit events, likewise for one loop. By
        default the client makes its own of both.
        """
        self._settings = settings or load()
        self._max_queue = max_queue
        self._traces = traces
        self._redis = redis
        self._audit = audit
        self._on_loop: _OnLoop | None = None
        self._closed = False

    async def request(
        self,
        email: Any,
        *,
        purpose: str = DEFAULT_PURPOSE,
        locale: str | None = None,
        client: str | None = None,
        observer: RequestObserver | None = None,
    ) -> Reply:
        """Ask for a code. Waits until a relay has accepted the mail, or it is certain that none will.

        Answers within `VERIFY_REPLY_TIMEOUT` seconds (`TIMEOUT`: the outcome is unknown, ask again), and within 3 s
        with `REDIS_ERR` if Redis cannot be reached; it raises for neither. An invalid address or purpose is answered
        at once. With an unknown locale, or one that is not a string, the worker uses its own. `client`: your word for
        the end user who asks, such as a hash of the IP address or the account; each end user then has limits of its
        own. `email` comes back as given. `observer` is called while the request is being put on the queue. Raises
        `ValueError` unless `client` is a string of at most 64 characters.
        """
        here = self._here()
        request = build_request(email, purpose, locale, client)
        if (error := certain_error(request)) is not None:
            return Reply(email, error)
        request_id = here.replies.new_id()
        span = here.start_span(request_id)
        message = encode(request, request_id, here.queue, span.headers)

        def on_confirmed() -> None:
            span.end()
            if observer is not None:
                observer.on_confirmed()

        if observer is not None:
            observer.on_publish(request_id)
        reply = here.replies.expect(request_id)
        here.deadlines.watch(reply)
        here.publisher.expect(reply)
        try:
            # One future for the whole way: whatever goes wrong before the reply arrives is set on it.
            if not here.replies.listening:
                await here.replies.listen(reply)
            here.publisher.post(message, reply, on_confirmed)
            return Reply(email, await reply)
        except QueueFull as exc:
            span.end(exc)
            return Reply(email, ErrorCode.TOO_MANY_REQUESTS)
        except OSError as exc:  # RedisUnavailable is one
            logger.warning("request %s was not put on the queue: %s", request_id, exc)
            span.end(exc)
            return Reply(email, ErrorCode.REDIS_ERR)
        finally:
            here.replies.forget(request_id)
            here.publisher.forget(reply)
            here.deadlines.forget(reply)
            span.end()

    async def enqueue(
        self,
        email: Any,
        *,
        purpose: str = DEFAULT_PURPOSE,
        locale: str | None = None,
        client: str | None = None,
        request_id: str | None = None,
    ) -> str:
        """Ask for a code without waiting for the reply. Returns the request id once Redis has the request.

        The same `request_id` sent again is the same request: there is no second mail. Raises `RedisUnavailable` within
        3 s: the request may be on the queue or not, and can be sent again with the same id. Raises `ValueError` unless
        `request_id` is a printable string of 1 to 255 bytes and `client`, as in `request`, one of at most 64
        characters, if the email has more than 320, or if the message would be longer than 64 kB; `TypeError` for an
        email that JSON cannot hold.
        """
        here = self._here()
        if request_id is None:
            request_id = here.replies.new_id()
        else:
            require_request_id(request_id)
        request = build_request(email, purpose, locale, client)
        span = here.start_span(request_id)
        try:
            message = encode(request, request_id, here.queue, span.headers)
            await here.publisher.publish(message)
        except Exception as exc:
            span.end(exc)
            raise
        finally:
            span.end()
        return request_id

    async def check(self, email: str, code: str, *, purpose: str = DEFAULT_PURPOSE) -> CheckResult:
        """Check a code: `SUCCESS` (it is consumed now), `VARIFY_CODE_ERR` or `VARIFY_EXPIRED`.

        `REDIS_ERR` within 3 s if Redis cannot be reached: the code may be consumed or not. Each check counts as an
        attempt, so the client never repeats one by itself.
        """
        here = self._here()
        # Callers without a type checker pass anything.
        if not is_purpose(purpose) or not isinstance(email, str):  # no code is ever stored for such a pair
            return CheckResult(email, ErrorCode.VARIFY_EXPIRED)
        if not isinstance(code, str):
            return CheckResult(email, ErrorCode.VARIFY_CODE_ERR)
        try:
            async with asyncio.timeout(REDIS_TIMEOUT):
                checked = await here.store.check(email, code, purpose)
        except OSError as exc:
            logger.warning("a code could not be checked: %s", str(exc) or TOO_LATE)
            return CheckResult(email, ErrorCode.REDIS_ERR)
        if checked.burnt:
            here.audit.code_burnt(email)
        return CheckResult(email, checked.error)

    async def close(self) -> None:
        """Close the connections. Requests that still wait are answered `TIMEOUT`."""
        self._closed = True
        here, self._on_loop = self._on_loop, None
        if here is not None and here.loop is asyncio.get_running_loop():
            await here.close()

    def _here(self) -> _OnLoop:
        if self._closed:
            raise RuntimeError("the client is closed")
        here = self._on_loop
        if here is None or here.loop is not asyncio.get_running_loop():  # the other loop's connections died with it
            traces = self._traces or of_application()
            here = self._on_loop = _OnLoop(self._settings, self._max_queue, traces, self._redis, self._audit)
        return here

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()


class _OnLoop:
    """The part of a client that belongs to one event loop."""

    def __init__(
        self,
        settings: Settings,
        max_queue: int | None,
        traces: Traces | None,
        redis: RedisConnections | None,
        audit: Audit | None,
    ) -> None:
        self._owns_redis = redis is None
        self._redis = redis = redis or RedisConnections()
        self.loop = asyncio.get_running_loop()
        self.audit = audit or Audit()
        self.queue = settings.queue
        self.publisher = Publisher(redis, settings.broker_url, settings.queue, limit=max_queue)
        self.replies = Replies(redis, settings.results_url)
        self._codes = redis.connection(settings.codes_url, on_open=check_version)
        self.store = RedisCodeStore(self._codes, CodePolicy.of(settings))
        self.deadlines = Deadlines(settings.reply_timeout, self._expire)
        self._traces = traces

    def start_span(self, request_id: str) -> Sending | _NoSpan:
        return _NoSpan() if self._traces is None else self._traces.sending(self.queue, request_id)

    async def close(self) -> None:
        await self.publisher.close()
        await self.replies.close()
        await self._codes.close()
        self.audit.flush()
        if self._owns_redis:
            await self._redis.close()
        self.deadlines.close()

    def _expire(self, reply: asyncio.Future[ErrorCode]) -> None:
        if self.publisher.unconfirmed(reply):
            reply.set_exception(RedisUnavailable(TOO_LATE))
        else:
            reply.set_result(ErrorCode.TIMEOUT)


class _NoSpan:
    """In place of a span where nothing is traced."""

    headers = None

    def end(self, error: Exception | None = None) -> None:
        pass
