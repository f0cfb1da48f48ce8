"""What both clients are made of: the three verbs on one event loop, over one connection out and one back."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from producer import address
from producer.contract import LONGEST_ID, CheckResult, ErrorCode, Reply, VerifyRequest, is_purpose
from producer.core.deadlines import Deadlines
from producer.core.publisher import Publisher
from producer.core.replies import Inbox
from producer.errors import QueueFull, RedisUnavailable
from producer.redis.connection import REDIS_TIMEOUT, TOO_LATE, RedisConnection, check_version, raise_errors
from producer.settings import Settings
from producer.store.codes import CodePolicy, CodeStore
from producer.tracing.setup import of_application

if TYPE_CHECKING:
    from producer.tracing.spans import Sending, Traces

logger = logging.getLogger(__name__)


def build_request(email: object, purpose: object, locale: object) -> VerifyRequest:
    """The request as it travels. What is no locale is none: the worker falls back to its own anyway."""
    return VerifyRequest(email, purpose, locale if isinstance(locale, str) and locale else None)


def refusal(request: VerifyRequest) -> ErrorCode | None:
    """The error that a worker would certainly answer, so that nobody need ask one."""
    if not is_purpose(request.purpose):
        return ErrorCode.EXCEPTION
    return None if address.is_address(request.email) else ErrorCode.INVALID_ADDRESS


class RequestObserver(Protocol):
    """Goes along with one request on its way out. Called on the event loop; raises nothing."""

    def asked(self, request_id: str) -> None:
        """It is about to be pushed, under this id."""

    def queued(self) -> None:
        """Redis has it. Not called if the reply is known before."""


class ClientCore:
    """The three verbs on the event loop that runs when it is made. Not safe for threads, nor for a second loop.

    A task that is cancelled leaves nothing behind. Every verb may raise `ServerTooOld`.
    """

    def __init__(self, settings: Settings, *, max_queue: int | None = None, traces: Traces | None = None) -> None:
        """`max_queue`: with more requests waiting than this, nothing is enqueued. `traces`: None: the application's."""
        self._settings = settings
        self._store = CodeStore(CodePolicy.of(settings))
        self._publisher = Publisher(settings.broker_url, settings.queue, limit=max_queue)
        self._inbox = Inbox(settings.results_url)
        self._codes = RedisConnection(settings.codes_url, on_open=check_version)
        self._deadlines = Deadlines(settings.reply_timeout, self._give_up)
        self._traces = traces or of_application()

    @property
    def waiting(self) -> int:
        """How much is on its way now: messages out, replies back."""
        return len(self._publisher) + len(self._inbox)

    async def request(self, request: VerifyRequest, observer: RequestObserver | None = None) -> Reply:
        """Ask for a code and wait for the reply, at most the reply timeout. Redis' troubles are a reply too."""
        if (refused := refusal(request)) is not None:
            return Reply(request.email, refused)
        request_id = self._inbox.ids.new()
        sending = self._sending(request_id)
        message = self._message(request, request_id, sending)
        if observer is not None:
            observer.asked(request_id)
        reply = self._inbox.expect(request_id)
        self._deadlines.watch(reply)
        self._publisher.expect(reply)
        try:
            # One future for the whole way: what goes wrong before the reply comes is its failure.
            if not self._inbox.listening:
                await self._inbox.listen(reply)
            self._publisher.post(message, reply, _on_confirmed_both(sending, observer))
            return Reply(request.email, await reply)
        except QueueFull as exc:
            if sending is not None:
                sending.end(exc)
            return Reply(request.email, ErrorCode.TOO_MANY_REQUESTS)
        except OSError as exc:  # RedisUnavailable is of its kind
            logger.warning("request %s was not put on the queue: %s", request_id, exc)
            if sending is not None:
                sending.end(exc)
            return Reply(request.email, ErrorCode.REDIS_ERR)
        finally:
            self._inbox.forget(request_id)
            self._publisher.forget(reply)
            self._deadlines.forget(reply)
            if sending is not None:
                sending.end()

    async def enqueue(self, request: VerifyRequest, request_id: str | None) -> str:
        """Put a request on the queue. Returns its id as soon as Redis has it.

        Raises `RedisUnavailable` within 3 s if Redis does not confirm; it may have the message even so, and the same
        id can be sent again. Raises `QueueFull`; `ValueError` for an id that is none; `TypeError` for an email that
        JSON cannot say.
        """
        if request_id is None:
            request_id = self._inbox.ids.new()
        elif not _is_id(request_id):
            raise ValueError(f"request_id is a string of printable characters, 1 to {LONGEST_ID} bytes, or None")
        sending = self._sending(request_id)
        try:
            await self._publisher.push(self._message(request, request_id, sending))
        except Exception as exc:
            if sending is not None:
                sending.end(exc)
            raise
        finally:
            if sending is not None:
                sending.end()
        return request_id

    async def check(self, email: str, code: str, purpose: str) -> CheckResult:
        """Check a code, which consumes it if it is right. Never repeated by itself: each check is an attempt."""
        # Under what cannot be an address or a purpose no code was ever stored.
        if not _is_text(email) or not is_purpose(purpose):
            return CheckResult(email, ErrorCode.VARIFY_EXPIRED)
        if not _is_text(code):
            return CheckResult(email, ErrorCode.VARIFY_CODE_ERR)
        try:
            async with asyncio.timeout(REDIS_TIMEOUT):
                [answer] = raise_errors(await self._codes.run([self._store.check(email, code, purpose)]))
        except OSError as exc:
            logger.warning("a code could not be checked: %s", str(exc) or TOO_LATE)
            return CheckResult(email, ErrorCode.REDIS_ERR)
        return self._store.read_check(email, answer)

    async def close(self) -> None:
        """Drop the connections. Who still waits is told: pushes fail, replies are unknown."""
        await self._publisher.close()
        await self._inbox.close()
        await self._codes.close()
        self._deadlines.close()

    def _give_up(self, reply: asyncio.Future[ErrorCode]) -> None:
        if self._publisher.owes(reply):
            reply.set_exception(RedisUnavailable(TOO_LATE))
        else:
            reply.set_result(ErrorCode.TIMEOUT)

    def _sending(self, request_id: str) -> Sending | None:
        return None if self._traces is None else self._traces.sending(self._settings.queue, request_id)

    def _message(self, request: VerifyRequest, request_id: str, sending: Sending | None) -> bytes:
        if not _is_text(request.email) or not _is_text(request.purpose):
            _require_json([request.email, request.purpose])
        headers = None if sending is None else sending.headers
        return request.message(request_id, queue=self._settings.queue, enqueued_at=time.time(), trace=headers)


def _on_confirmed_both(sending: Sending | None, observer: RequestObserver | None) -> Callable[[], None] | None:
    """What is to be called once Redis has the message."""
    if sending is None:
        return None if observer is None else observer.queued
    if observer is None:
        return sending.end

    def both() -> None:
        sending.end()
        observer.queued()

    return both


def _is_text(value: object) -> bool:
    # Callers without a type checker pass what they have.
    return isinstance(value, str)


def _is_id(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value.encode()) <= LONGEST_ID


def _require_json(value: object) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise TypeError("email and purpose are values that JSON can say; an email is a string") from None
