"""The use case, free of Celery: issue -> render -> send -> settle, for a batch of requests on one asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from producer import address
from producer.contract import ErrorCode, is_purpose
from producer.errors import InvalidAddress, RedisUnavailable
from producer.redis.connection import ServerError, entries
from producer.store.codes import Answered, Asked, Claim, CodeStore, Conflict, Send, Wait
from worker.databases import Database
from worker.job import Job
from worker.mail.errors import (
    AcceptanceUnknown,
    MailError,
    MessageRejected,
    RecipientRejected,
    SendWithheld,
    Smtputf8Unsupported,
)
from worker.mail.message import Envelope, Mail
from worker.mail.render import Renderer
from worker.metrics import Counters
from worker.queue.message import ID_CONFLICT
from worker.settler import Settler


def new_code(length: int) -> str:
    """So many decimal digits, each equally likely, from the operating system's random source."""
    return f"{secrets.randbelow(10**length):0{length}d}"


if TYPE_CHECKING:
    from worker.fetcher import Prefetch

logger = logging.getLogger(__name__)

RETRY_BASE = 1.0  # seconds; doubles with each try
RETRY_CAP = 60.0  # seconds
LEASE_MARGIN = 0.2  # seconds by which a lease counts as lapsed early: the way of a command to Redis


class Mailer(Protocol):
    """Sends one mail through some relay."""

    def send(self, mail: Mail) -> None:
        """Send through some relay; `mail.done` is called with the outcome."""

    async def close(self) -> None:
        """Call off what is under way."""


class Service:
    """Takes batches of jobs; each ends in exactly one call of the settler."""

    def __init__(
        self,
        store: CodeStore,
        codes: Database,
        mailer: Mailer,
        renderer: Renderer,
        settler: Settler,
        counters: Counters,
        prefetch: Prefetch,
        *,
        sender: str,
        code_length: int,
    ) -> None:
        self._store = store
        self._codes = codes
        self._mailer = mailer
        self._renderer = renderer
        self._settler = settler
        self._counters = counters
        self._prefetch = prefetch
        self._sender = sender
        self._code_length = code_length
        self._leased: dict[str, Job] = {}  # by tag
        self._announcements: list[tuple[Job, Callable[[bool], None]]] = []  # final dots that may be written in a moment
        self._stopping = False
        self._drained: asyncio.Future[None] | None = None

    async def serve(self, jobs: list[Job]) -> None:
        """Issue for all of them in one round trip, and start their sends. Returns before these end."""
        began = asyncio.get_running_loop().time()
        asked = []
        for job in jobs:
            verdict = self.judge(job)
            asked.append(Asked(job.claim, new_code(self._code_length), verdict, job.enqueued_at, job.expires_at))
        try:
            [answer] = await self._codes.run([self._store.issue(asked)])
        except RedisUnavailable:
            logger.warning("the codes database cannot be reached")
            for job in jobs:
                if job.trace is not None:
                    job.trace.issued(began, asyncio.get_running_loop().time(), None)
                if self._settler.one_trip:
                    # Nor can any reply be stored. The request is served once Redis is back; the step may have been
                    # taken all the same, and its lease and its charge are given back.
                    self._settler.retry(job, 0.0, unknown=False)
                else:
                    self._settler.answer(job, ErrorCode.REDIS_ERR, mark=False)
            return
        ended = asyncio.get_running_loop().time()
        for job, entry in zip(jobs, entries(answer, len(jobs)), strict=True):
            try:
                self._proceed(job, entry, began, ended)
            except Exception as exc:  # noqa: BLE001 - whatever it is, it is this request's alone
                logger.error("unforeseen error in the service", extra={"kind": type(exc).__name__})
                self._settler.answer(job, ErrorCode.EXCEPTION, mark=True)

    @staticmethod
    def judge(job: Job) -> ErrorCode | None:
        """Set the job's claim; an error that is certain without asking the store."""
        request = job.request
        verdict = None
        canonical = ""
        try:
            job.mailbox = address.parse(request.email)
            canonical = job.mailbox.canonical
        except InvalidAddress:
            verdict = ErrorCode.INVALID_ADDRESS
        if not is_purpose(request.purpose):
            verdict = ErrorCode.EXCEPTION
        job.claim = Claim.of(job.request_id, job.tag, request.email, request.purpose, canonical)
        return verdict

    def _proceed(self, job: Job, entry: object, began: float, ended: float) -> None:
        issue = None if isinstance(entry, ServerError) else self._store.read_issue(entry)
        if job.trace is not None:
            job.trace.issued(began, ended, issue)
        if isinstance(entry, ServerError):
            logger.error("Redis refused to issue", extra={"kind": str(entry).partition(" ")[0]})
            self._settler.answer(job, ErrorCode.REDIS_ERR, mark=False)
            return
        match issue:
            case Send() as send:
                job.lease_until = began + self._store.policy.lease / 1000 - LEASE_MARGIN
                self._leased[job.tag] = job
                self._send(job, send)
            case Answered(error, why):
                if why:
                    self._counters.hits[why] += 1
                self._settler.answer(job, error, mark=False)
            case Wait(seconds, joined):
                self._counters.joins += joined
                self._settler.wait(job, seconds)
            case Conflict():
                self._settler.dead_letter(job, ID_CONFLICT)

    def _send(self, job: Job, send: Send) -> None:
        assert job.mailbox is not None  # noqa: S101 - `judge` has set it, or the store has not said Send
        mailbox = job.mailbox.mailbox
        try:
            content = self._renderer.render(
                recipient=mailbox,
                code=send.code,
                life=send.life,
                request_id=job.request_id,
                locale=job.request.locale,
            )
        except Exception as exc:  # noqa: BLE001 - whatever it is, the request gets an answer
            self._sent(job, send, exc)
            return
        self._mailer.send(
            Mail(
                Envelope(self._sender, mailbox, job.mailbox.needs_smtputf8, content),
                # A request is never on the wire past its deadline.
                asyncio.get_running_loop().time() + send.remaining,
                lambda go: self._before_data(job, go),
                lambda error: self._sent(job, send, error),
                job.trace,
            )
        )

    def _sent(self, job: Job, send: Send, error: Exception | None) -> None:
        """A send has ended."""
        self._leased.pop(job.tag, None)
        if error is None:
            self._prefetch.sent()
            self._counters.accepted(job.enqueued_at)
            self._settler.answer(job, ErrorCode.SUCCESS, mark=True)
        elif isinstance(error, RecipientRejected | MessageRejected):
            logger.info("mail rejected", extra={"reply": str(error)})
            self._settler.answer(job, ErrorCode.MAIL_REJECTED, mark=True)
        elif isinstance(error, Smtputf8Unsupported):
            self._settler.answer(job, ErrorCode.INVALID_ADDRESS, mark=True)
        elif isinstance(error, MailError):
            delay = 0.0 if self._stopping else self._delay(send)
            if not self._stopping and not isinstance(error, SendWithheld):
                logger.warning("mail deferred", extra={"reply": str(error), "next_try_in": round(delay, 1)})
            self._settler.retry(job, delay, unknown=isinstance(error, AcceptanceUnknown))
        else:
            # Its text and its frames may carry the address or the code: only the kind is logged.
            logger.error("unforeseen error in a send", extra={"kind": type(error).__name__})
            self._settler.answer(job, ErrorCode.EXCEPTION, mark=True)
        if self._drained is not None and not self._leased and not self._drained.done():
            self._drained.set_result(None)

    @staticmethod
    def _delay(send: Send) -> float:
        """Full jitter, doubling to a cap, never past the deadline."""
        jittered = random.uniform(0, min(RETRY_CAP, RETRY_BASE * 2 ** min(send.tries, 10)))
        return min(jittered, send.remaining)

    def _before_data(self, job: Job, go: Callable[[bool], None]) -> None:
        """Let the mail's content go in this turn of the loop, together with all that is ready."""
        self._announcements.append((job, go))
        if len(self._announcements) == 1:
            asyncio.get_running_loop().call_soon(self._announce_all)

    def _announce_all(self) -> None:
        """Record that final dots are on their way, but for lapsed leases: then another may be sending."""
        announcements, self._announcements = self._announcements, []
        now = asyncio.get_running_loop().time()
        ours = [job.claim for job, _ in announcements if now < job.lease_until]
        recorded = False
        if ours:
            with contextlib.suppress(RedisUnavailable):
                self._codes.link.post([self._store.announce_data(ours)], database=self._codes.number)
                recorded = True
        for job, go in announcements:
            go(recorded and now < job.lease_until)

    async def tick(self) -> None:
        """Once a second: all leases anew. Those that Redis does not confirm lapse by themselves."""
        began = asyncio.get_running_loop().time()
        self._prefetch.tick(began)
        jobs = list(self._leased.values())
        if not jobs:
            return
        try:
            [kept] = await self._codes.run([self._store.renew([job.claim for job in jobs])])
        except RedisUnavailable:
            return
        if isinstance(kept, ServerError):
            return
        for job, still in zip(jobs, kept, strict=True):
            if still:
                job.lease_until = began + self._store.policy.lease / 1000 - LEASE_MARGIN

    async def drain(self, seconds: float) -> None:
        """Let the sends in hand finish, for so long at most; the rest is called off and put back."""
        if self._leased:
            self._drained = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._drained], timeout=seconds)
        self._stopping = True
        await self._mailer.close()
