"""The use case: issue a code, render the mail, send it, settle. Also the retry schedule.

Knows neither Celery nor Redis nor SMTP: it speaks to a code store, a mail channel and the settler. Runs on one asyncio
loop and takes requests in batches.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable, Sequence

from producer.contract import ErrorCode
from producer.errors import StoreUnavailable
from producer.store.codes import (
    BUCKETS,
    REFUSED,
    RESPELLED,
    SUPPRESSED_HIT,
    Answered,
    CodeStore,
    Conflict,
    Issue,
    IssueRequest,
    Refusal,
    Send,
    StoreError,
    UnknownVersion,
    Wait,
)
from worker.gathering import Gathering
from worker.job import Job
from worker.mail.channel import MailChannel
from worker.mail.errors import (
    AcceptanceUnknown,
    MailError,
    MessageDeferred,
    MessageRejected,
    RecipientRejected,
    SendAborted,
    Smtputf8Unsupported,
)
from worker.mail.message import Envelope, Mail
from worker.mail.render import Renderer
from worker.metrics import Counters
from worker.queue.message import ID_CONFLICT
from worker.settler import Settler

logger = logging.getLogger(__name__)

RETRY_BASE = 1.0  # seconds before the first retry, at most; doubles with each further one
RETRY_CAP = 60.0  # seconds
LEASE_MARGIN = 0.2  # seconds by which a lease counts as expired early, as a command takes time to reach the store


def retry_delay(tries: int, remaining: float) -> float:
    """Seconds until the next try after `tries` earlier failures: exponential backoff with full jitter.

    Never beyond `remaining`, the seconds until the request's deadline.
    """
    longest = min(RETRY_CAP, RETRY_BASE * 2 ** min(tries, 10))
    return min(random.uniform(0, longest), remaining)


def new_code(length: int) -> str:
    """A code of `length` decimal digits, each equally likely, from the operating system's random source."""
    return f"{secrets.randbelow(10**length):0{length}d}"


class Service:
    """Serves batches of jobs; each job ends in exactly one call of the settler."""

    def __init__(
        self,
        store: CodeStore,
        channel: MailChannel,
        renderer: Renderer,
        settler: Settler,
        counters: Counters,
        gathering: Gathering,
        *,
        sender: str,
        code_digits: int,
    ) -> None:
        """`sender`: the envelope sender of every mail. `code_digits`: as many as a code can have."""
        self._store = store
        self._channel = channel
        self._renderer = renderer
        self._settler = settler
        self._counters = counters
        self._gathering = gathering
        self._sender = sender
        self._code_digits = code_digits
        self._leased: dict[str, Job] = {}  # by tag
        self._asked: list[tuple[Job, Callable[[bool], None]]] = []  # since the last announcement left
        self._announcing: asyncio.Task[None] | None = None
        self._left_to_others = False  # whether it was logged that a request of another release was left
        self._store_lost = ""  # why, since the store could be used last
        self._store_refuses: set[str] = set()  # kinds of errors, since a batch without one
        self._stopping = False
        self._drained: asyncio.Future[None] | None = None

    async def serve(self, jobs: list[Job]) -> None:
        """Issue for all jobs in one step of the store and start their sends. Returns before these end."""
        began = asyncio.get_running_loop().time()
        requests = []
        for job in jobs:
            error = job.validate()
            code = new_code(self._code_digits)
            requests.append(IssueRequest(job.claim, code, error, job.enqueued_at, job.expires_at))
        issues: Sequence[Issue | StoreError | None] = [None] * len(jobs)
        try:
            issues = await self._store.issue(requests)
            self._store_lost = ""
            self._report_refusals(issues)
        except StoreUnavailable as exc:
            self._report_lost(exc)
        ended = asyncio.get_running_loop().time()
        for job, issue in zip(jobs, issues, strict=True):
            try:
                if job.trace is not None:
                    job.trace.issued(began, ended, None if isinstance(issue, StoreError) else issue)
                self._proceed(job, issue, began)
            except Exception as exc:  # noqa: BLE001 - whatever it is, it concerns this request alone
                logger.error("unexpected error in the service", extra={"kind": type(exc).__name__})
                self._settler.answer(job, ErrorCode.EXCEPTION, mark=True)

    def _proceed(self, job: Job, issue: Issue | StoreError | None, began: float) -> None:
        match issue:
            case None:
                self._settler.store_unavailable(job)
            case StoreError():
                self._settler.answer(job, ErrorCode.REDIS_ERR, mark=False)
            case Send():
                job.lease_until = began + self._store.lease - LEASE_MARGIN
                self._leased[job.tag] = job
                self._send(job, issue)
            case Answered(error, why):
                if why:
                    self._counters.hits[why] += 1
                if why == SUPPRESSED_HIT:
                    self._counters.audit.mailbox_suppressed(job.request.email)
                elif why in BUCKETS:
                    self._counters.audit.bucket_empty(BUCKETS[why], job.request.email)
                self._settler.answer(job, error, mark=False)
            case Wait() | UnknownVersion():
                self._wait(job, issue)
            case Conflict():
                self._settler.dead_letter(job, ID_CONFLICT)

    def _report_lost(self, exc: StoreUnavailable) -> None:
        if str(exc) != self._store_lost:  # not for each batch
            self._store_lost = str(exc)
            logger.warning("the code store cannot be used: %s", exc)

    def _report_refusals(self, issues: Sequence[Issue | StoreError]) -> None:
        kinds = {issue.kind for issue in issues if isinstance(issue, StoreError)}
        for kind in sorted(kinds - self._store_refuses):
            logger.error("the code store refuses requests", extra={"kind": kind})
        self._store_refuses = self._store_refuses | kinds if kinds else set()

    def _wait(self, job: Job, wait: Wait | UnknownVersion) -> None:
        """Another holder decides about the request."""
        if isinstance(wait, Wait):
            self._counters.joins += wait.joined
        elif not self._left_to_others:
            self._left_to_others = True
            logger.warning("another release has begun a request; such requests are left to its workers")
        self._settler.wait(job, wait.seconds)

    def _send(self, job: Job, send: Send) -> None:
        assert job.mailbox is not None  # noqa: S101 - the store issues nothing for an invalid address
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
        loop = asyncio.get_running_loop()
        self._channel.send(
            Mail(
                Envelope(self._sender, mailbox, job.mailbox.needs_smtputf8, content),
                loop.time() + send.remaining,  # nothing is sent past the request's deadline
                lambda go: self._before_data(job, go),
                lambda: loop.time() < job.lease_until,
                lambda error: self._sent(job, send, error),
                job.trace,
            )
        )

    def _sent(self, job: Job, send: Send, error: Exception | None) -> None:
        """A send has ended."""
        self._leased.pop(job.tag, None)
        if error is None:
            self._counters.accepted(job.enqueued_at)
            self._settler.answer(job, ErrorCode.SUCCESS, mark=True)
        elif isinstance(error, RecipientRejected | MessageRejected):
            _log_rejection(job, error)
            refusal: Refusal = ""
            if error.credible_refusal:
                refusal = REFUSED if job.mailbox is None or job.mailbox.is_canonical else RESPELLED
            self._settler.answer(job, ErrorCode.MAIL_REJECTED, mark=True, refusal=refusal)
        elif isinstance(error, Smtputf8Unsupported):
            self._settler.answer(job, ErrorCode.INVALID_ADDRESS, mark=True)
        elif isinstance(error, MailError):
            delay = 0.0 if self._stopping else retry_delay(send.tries, send.remaining)
            if not self._stopping and not isinstance(error, SendAborted):
                extra = {"request_id": job.request_id, "next_try_in": round(delay, 1), **_why_deferred(error)}
                logger.warning("mail deferred", extra=extra)
            self._settler.retry(job, delay, unknown=isinstance(error, AcceptanceUnknown))
        else:
            # Its text and its traceback may carry the address or the code, so only the kind is logged.
            logger.error("unexpected error in a send", extra={"kind": type(error).__name__})
            self._settler.answer(job, ErrorCode.EXCEPTION, mark=True)
        if self._drained is not None and not self._leased and not self._drained.done():
            self._drained.set_result(None)

    def _before_data(self, job: Job, go: Callable[[bool], None]) -> None:
        """Ask whether a mail's content may be written. What asks while one announcement is under way makes the next."""
        self._asked.append((job, go))
        if self._announcing is None:
            self._announcing = asyncio.create_task(self._announce_all())

    async def _announce_all(self) -> None:
        try:
            while self._asked:
                await self._gathering.pause()
                await self._announce_data()
        finally:
            self._announcing = None

    async def _announce_data(self) -> None:
        """Announce mails, and let the contents of those follow whose leases the store confirms.

        Once it has, whoever takes over such a request knows that its mail may have been accepted. Without its word
        nothing leaves: another worker may be sending.
        """
        asked, self._asked = self._asked, []
        answers: Sequence[bool | StoreError] = [False] * len(asked)
        try:
            answers = await self._store.announce_data([job.claim for job, _ in asked])
        except StoreUnavailable as exc:
            self._report_lost(exc)
        except Exception as exc:  # noqa: BLE001 - whatever it is, these mails must not wait for their deadlines
            logger.error("unexpected error in the service", extra={"kind": type(exc).__name__})
        for kind in sorted({answer.kind for answer in answers if isinstance(answer, StoreError)}):
            logger.error("the code store refuses to note that mails are sent", extra={"kind": kind})
        for (_, go), answer in zip(asked, answers, strict=True):
            go(answer is True)

    async def renew_leases(self) -> None:
        """Extend the leases of all sends under way. One that the store does not confirm expires by itself."""
        began = asyncio.get_running_loop().time()
        jobs = list(self._leased.values())
        if not jobs:
            return
        try:
            kept = await self._store.renew([job.claim for job in jobs])
        except StoreUnavailable:
            return
        for job, still_held in zip(jobs, kept, strict=True):
            if still_held:
                job.lease_until = began + self._store.lease - LEASE_MARGIN

    async def drain(self, seconds: float) -> None:
        """Let the sends under way finish for at most `seconds`; cancel the rest and put their requests back."""
        if self._leased:
            self._drained = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._drained], timeout=seconds)
        self._stopping = True
        await self._channel.close()


def _why_deferred(error: MailError) -> dict[str, str | None]:
    """The fields of a log line that say why a mail was deferred."""
    if error.reply:
        return {"relay": error.relay, "reply": error.reply}
    if not isinstance(error, MessageDeferred):
        return {"relay": error.relay, "why": str(error)}
    if error.relay is not None and error.step is None:
        return {"relay": error.relay, "why": "no free connection in time"}
    return {"why": "no healthy relay"}


def _log_rejection(job: Job, error: MailError) -> None:
    extra = {"request_id": job.request_id, "relay": error.relay, "reply": error.reply}
    if error.sender_refused:
        # The caller gets MailRejected, but it is the sender that is wrong, not the mailbox.
        logger.warning("the relay refused the sender: check VERIFY_MAIL_FROM", extra=extra)
    else:
        logger.info("mail rejected", extra=extra)
