"""A code store in plain Python: what the contract says, as simply as possible. Its clock is an attribute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from producer.address import fold_aliases, parse
from producer.contract import ErrorCode, code_key
from producer.errors import InvalidAddress
from producer.store.codes import (
    ADDRESS_BUCKET,
    CLIENT_ADDRESS_BUCKET,
    CLIENT_BUCKET,
    COOLDOWN_HIT,
    DAY,
    FAILED,
    REFUSED,
    RESPELLED,
    SUPPRESSED_HIT,
    TOTAL_BUCKET,
    UNKNOWN,
    Answered,
    Bucket,
    Checked,
    Claim,
    CodePolicy,
    Conflict,
    Issue,
    IssueRequest,
    Outcome,
    Send,
    Settled,
    UnknownVersion,
    Wait,
)

BucketKey = tuple[str, str, str]  # of which kind, address and client

FINAL_FOR_MAILBOX = {ErrorCode.INVALID_ADDRESS, ErrorCode.MAIL_REJECTED}


@dataclass
class Code:
    value: str
    end: float
    wrong: int = 0


@dataclass
class Record:
    who: str
    first: float
    end: float = 0
    token: str = ""
    until: float = 0
    charged: dict[BucketKey, float] = field(default_factory=dict)  # by which interval
    doubts: int = 0
    dot: bool = False
    sent: str = ""
    tries: int = 0
    error: ErrorCode | None = None


@dataclass
class State:
    """What the store remembers. Times are ms; what has ended is forgotten when the clock moves."""

    codes: dict[str, Code] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    cooldowns: dict[str, tuple[str, float]] = field(default_factory=dict)  # the code in the mail, and the end
    sending: dict[str, tuple[str, float]] = field(default_factory=dict)  # the request, and the end
    joined: dict[str, tuple[set[str], float]] = field(default_factory=dict)
    full: dict[BucketKey, float] = field(default_factory=dict)  # when a bucket is full again
    suppressed: dict[str, tuple[str, float, float]] = field(default_factory=dict)  # reason, end, period
    wrong: dict[str, tuple[int, float]] = field(default_factory=dict)  # by purpose and address: count, and the end


class MemoryCodeStore:
    """A `CodeStore`."""

    connection = None

    def __init__(self, policy: CodePolicy) -> None:
        self.policy = policy
        self.state = State()
        self._now = 0.0

    @property
    def lease(self) -> float:
        return self.policy.lease / 1000

    @property
    def now(self) -> float:
        """The clock, in ms."""
        return self._now

    @now.setter
    def now(self, now: float) -> None:
        self._now, state = now, self.state
        state.codes = {key: code for key, code in state.codes.items() if code.end > now}
        state.records = {key: record for key, record in state.records.items() if record.end > now}
        state.cooldowns = {key: pair for key, pair in state.cooldowns.items() if pair[1] > now}
        state.sending = {key: pair for key, pair in state.sending.items() if pair[1] > now}
        state.joined = {key: pair for key, pair in state.joined.items() if pair[1] > now}
        least = self.policy.remember
        state.suppressed = {key: each for key, each in state.suppressed.items() if each[1] + max(each[2], least) > now}
        state.wrong = {key: pair for key, pair in state.wrong.items() if pair[1] > now}

    # The port.

    async def issue(self, requests: Sequence[IssueRequest]) -> list[Issue]:
        return [self.issue_one(request) for request in requests]

    async def settle(self, outcomes: Sequence[Outcome]) -> list[Settled]:
        return [self.settle_one(outcome) for outcome in outcomes]

    async def announce_data(self, claims: Sequence[Claim]) -> list[bool]:
        return [self.announce_one(claim) for claim in claims]

    async def renew(self, claims: Sequence[Claim]) -> list[bool]:
        return [self.renew_one(claim) for claim in claims]

    async def check(self, email: str, code: str, purpose: str) -> Checked:
        return self.check_one(email, purpose, code)

    # One request at a time.

    def issue_one(self, request: IssueRequest) -> Issue:
        claim, now = request.claim, self._now
        record = self.state.records.get(claim.request_id) or Record(claim.who, now)
        born = min(now if request.enqueued_at is None else request.enqueued_at * 1000, record.first)
        deadline = born + self.policy.give_up_after
        if request.expires_at is not None:
            deadline = min(deadline, request.expires_at * 1000)
        return (
            self._known(claim, record, request.error, deadline)
            or self._hindered(claim, record, deadline)
            or self._send(claim, record, request.candidate, deadline)
        )

    def _known(self, claim: Claim, record: Record, error: ErrorCode | None, deadline: float) -> Issue | None:
        if _version(record.who) != _version(claim.who):
            left = deadline - self._now
            return UnknownVersion(min(1000.0, left) / 1000) if left > 0 else Answered(ErrorCode.TIMEOUT)
        if record.who != claim.who:
            return Conflict()
        if record.error is not None:
            return Answered(record.error)
        if error is not None:
            return self._answer(claim, record, error)
        if record.token not in {"", claim.token} and record.until > self._now:
            return Wait((record.until - self._now) / 1000)
        return None

    def _hindered(self, claim: Claim, record: Record, deadline: float) -> Issue | None:
        state, policy, key = self.state, self.policy, claim.code_key
        code = self._usable(claim)
        if deadline <= self._now:
            return self._answer(claim, record, ErrorCode.TIMEOUT)
        if policy.cooldown:
            if code and state.cooldowns.get(key, ("", 0))[0] == code.value:
                return self._answer(claim, record, ErrorCode.SUCCESS, COOLDOWN_HIT)
            holder, end = state.sending.get(key, (claim.request_id, 0.0))
            if holder != claim.request_id:
                record.token = ""
                self._remember(claim, record)
                waiting = state.joined.get(key, (set(), 0))[0]
                state.joined[key] = (waiting | {claim.request_id}, self._now + policy.remember)
                return Wait((min(end, deadline) - self._now) / 1000, joined=True)
        doubts = record.doubts + record.dot
        if doubts > 1 or (doubts == 1 and (code is None or code.value != record.sent)):
            return self._answer(claim, record, ErrorCode.TIMEOUT)
        if state.suppressed.get(claim.canonical, ("", 0.0, 0.0))[1] > self._now:
            return self._answer(claim, record, ErrorCode.MAIL_REJECTED, SUPPRESSED_HIT)
        for bucket_key, bucket in {} if record.charged else self._buckets(claim).items():
            if self._full(bucket_key) - self._now > (bucket.burst - 1) * bucket.interval:
                return self._answer(claim, record, ErrorCode.TOO_MANY_REQUESTS, bucket_key[0])
        return None

    def _buckets(self, claim: Claim) -> dict[BucketKey, Bucket]:
        """Those that a send of this request is charged to."""
        policy, client = self.policy, claim.client
        mailbox = fold_aliases(claim.canonical) if policy.fold_aliases else claim.canonical
        buckets: dict[BucketKey, Bucket] = {(ADDRESS_BUCKET, mailbox, ""): policy.address}
        if client:
            buckets[CLIENT_ADDRESS_BUCKET, mailbox, client] = policy.client_address
            buckets[CLIENT_BUCKET, "", client] = policy.client
        buckets[TOTAL_BUCKET, "", ""] = policy.total
        return {key: bucket for key, bucket in buckets.items() if bucket.interval}

    def _full(self, key: BucketKey) -> float:
        return max(self.state.full.get(key, 0), self._now)

    def _send(self, claim: Claim, record: Record, candidate: str, deadline: float) -> Send:
        state, policy, key = self.state, self.policy, claim.code_key
        code = self._usable(claim)
        if not record.charged:
            record.charged = {each: bucket.interval for each, bucket in self._buckets(claim).items()}
            for bucket_key, interval in record.charged.items():
                state.full[bucket_key] = self._full(bucket_key) + interval
        record.doubts, record.dot = record.doubts + record.dot, False
        if code is None or (record.doubts == 0 and code.end - self._now < policy.min_life):
            code = state.codes[key] = Code(
                candidate[: self._length(claim.purpose, claim.canonical)], self._now + policy.ttl
            )
        record.token, record.until = claim.token, self._now + policy.lease
        record.sent = code.value
        self._remember(claim, record)
        if policy.cooldown:
            state.sending[key] = (claim.request_id, record.until)
        return Send(code.value, (code.end - self._now) / 1000, (deadline - self._now) / 1000, record.tries)

    def settle_one(self, outcome: Outcome, wake: str | None = None) -> Settled:
        """`wake`: which of several joined requests may send, if one may."""
        claim, result, refusal = outcome
        record, state, key = self._held(claim), self.state, claim.code_key
        if record is None:
            return Settled(held=False, wake=[])
        error = result if isinstance(result, ErrorCode) else None
        accepted = error is ErrorCode.SUCCESS
        refused = result == FAILED or error in FINAL_FOR_MAILBOX
        perhaps = result == UNKNOWN or record.doubts > 0 or (record.dot and not refused)
        if not accepted and not perhaps and refusal != RESPELLED:
            self._refund(record)
        record.token, record.dot, record.error = "", False, error
        if error is None:
            record.tries += 1
            record.doubts += result == UNKNOWN
        self._remember(claim, record)
        self._suppress(claim.canonical, refusal, accepted=accepted)
        code = state.codes.get(key)
        live = accepted and self.policy.cooldown > 0 and code is not None and code.value == record.sent
        if live and code:
            state.cooldowns[key] = (code.value, min(self._now + self.policy.cooldown, code.end))
        if state.sending.get(key, ("", 0))[0] != claim.request_id:
            return Settled(held=True, wake=[])
        del state.sending[key]
        waiting = state.joined.get(key, (set(), 0))[0]
        if live or error in FINAL_FOR_MAILBOX:
            state.joined.pop(key, None)
            for request_id in waiting:
                joined = state.records.setdefault(request_id, Record(claim.who, self._now))
                if _version(joined.who) != _version(claim.who):
                    continue
                joined.error = error if joined.error is None else joined.error
                joined.token = ""
                joined.end = self._now + self.policy.remember
            return Settled(held=True, wake=sorted(waiting))
        unanswered = {each for each in waiting if each not in state.records or state.records[each].error is None}
        if not unanswered:
            return Settled(held=True, wake=[])
        woken = wake if wake in unanswered else min(unanswered)
        waiting.discard(woken)
        return Settled(held=True, wake=[woken])

    def _suppress(self, canonical: str, reason: str, *, accepted: bool) -> None:
        known, end, last = self.state.suppressed.get(canonical, ("", 0.0, 0.0))
        if accepted and known == REFUSED:
            del self.state.suppressed[canonical]
        elif reason == REFUSED and end <= self._now:
            doubled = min(2 * last, self.policy.longest_suppression)
            period = doubled if known == reason else self.policy.suppression
            self.state.suppressed[canonical] = (reason, self._now + period, period)

    def announce_one(self, claim: Claim) -> bool:
        record = self._held(claim)
        if record is not None:
            record.dot = True
        return record is not None

    def renew_one(self, claim: Claim) -> bool:
        record = self._held(claim)
        if record is None:
            return False
        record.until = self._now + self.policy.lease
        if self.state.sending.get(claim.code_key, ("", 0))[0] == claim.request_id:
            self.state.sending[claim.code_key] = (claim.request_id, record.until)
        return True

    def check_one(self, email: str, purpose: str, given: str) -> Checked:
        state, policy, key = self.state, self.policy, code_key(email, purpose)
        code, canonical = state.codes.get(key), _canonical(email)
        if code is None:
            return Checked(ErrorCode.VARIFY_EXPIRED)
        if self._too_short(code, purpose, canonical):
            del state.codes[key]
            return Checked(ErrorCode.VARIFY_EXPIRED, burnt=True)
        wrong = f"{purpose}:{canonical}"
        if given == code.value:
            del state.codes[key]
            state.wrong.pop(wrong, None)
            return Checked(ErrorCode.SUCCESS)
        code.wrong += 1
        count, end = state.wrong.get(wrong, (0, self._now + DAY))
        state.wrong[wrong] = (count + 1, end)
        digits = min(max(len(code.value), policy.code_length), policy.code_max_length)
        allowed = policy.max_attempts * 10 ** (digits - policy.code_length)
        burnt = code.wrong >= allowed or self._too_short(code, purpose, canonical)
        if burnt:
            del state.codes[key]
        return Checked(ErrorCode.VARIFY_CODE_ERR, burnt)

    def _length(self, purpose: str, canonical: str) -> int:
        """Digits that a code needs now."""
        policy = self.policy
        count = self.state.wrong.get(f"{purpose}:{canonical}", (0, 0))[0]
        length, allowed = policy.code_length, policy.max_attempts
        while count >= allowed and length < policy.code_max_length:
            count -= allowed
            digits = min(2, policy.code_max_length - length)
            length, allowed = length + digits, allowed * 10**digits
        return length

    def _too_short(self, code: Code, purpose: str, canonical: str) -> bool:
        length = self._length(purpose, canonical)
        return self.policy.code_length < length > len(code.value)

    def _usable(self, claim: Claim) -> Code | None:
        code = self.state.codes.get(claim.code_key)
        return None if code is None or self._too_short(code, claim.purpose, claim.canonical) else code

    def _held(self, claim: Claim) -> Record | None:
        record = self.state.records.get(claim.request_id)
        return record if record and record.token == claim.token and record.error is None else None

    def _answer(self, claim: Claim, record: Record, error: ErrorCode, why: str = "") -> Answered:
        if record.doubts + record.dot == 0:
            self._refund(record)
        record.error, record.token = error, ""
        self._remember(claim, record)
        return Answered(error, why)

    def _refund(self, record: Record) -> None:
        for key, interval in record.charged.items():
            self.state.full[key] = self.state.full.get(key, 0) - interval
        record.charged = {}

    def _remember(self, claim: Claim, record: Record) -> None:
        record.end = self._now + self.policy.remember
        self.state.records[claim.request_id] = record


def _version(who: str) -> str:
    return who.partition(":")[0]


def _canonical(email: str) -> str:
    try:
        return parse(email).canonical
    except InvalidAddress:
        return email
