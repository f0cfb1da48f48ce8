"""The code store: issue, settle and check, each one atomic step in Redis.

A step is built here as a command and its answer read here; who sends it is the caller's choice. A worker asks for many
requests in one command, which serves them one after the other, as if each came alone. Its answer is a list with an
entry for each, and an error in the place of one that Redis refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from producer.contract import REPLY_TTL, CheckResult, ErrorCode, code_key, is_purpose, known_error
from producer.redis.scripts import EACH, Arg, Command, Script
from producer.settings import Settings

_LUA = Path(__file__).parent
_ISSUE, _SETTLE, _ANNOUNCE_DATA = (Script(EACH, _LUA / f"{name}.lua") for name in ("issue", "settle", "announce_data"))
_RENEW, _CHECK = (Script(_LUA / f"{name}.lua") for name in ("renew", "check"))

# Side keys; none begins with `code_`, which GateServer builds from user text. All have a TTL.
ATTEMPTS, COOLDOWN, SENDING, JOINED = "attempts:", "cooldown:", "sending:", "joined:"  # + code key
BUCKET = "bucket:"  # + canonical address
REQUEST = "request:"  # + request id
COOLDOWN_HIT, BUCKET_HIT = "cooldown", "bucket"  # why a request was answered without a mail


@dataclass(frozen=True, slots=True)
class CodePolicy:
    """How codes live. Milliseconds, as Redis counts."""

    ttl: int
    min_life: int
    cooldown: int
    interval: int  # one send comes back to an address' bucket; 0: no bucket
    burst: int
    max_attempts: int
    lease: int
    give_up_after: int
    remember: int = REPLY_TTL * 1000

    @classmethod
    def of(cls, settings: Settings) -> CodePolicy:
        """The policy in force."""
        per_hour = settings.max_sends_per_hour
        ttl = settings.code_ttl * 1000
        return cls(
            ttl=ttl,
            min_life=min(int(settings.code_min_life * 1000), ttl // 10),
            cooldown=int(settings.resend_cooldown * 1000),
            interval=3_600_000 // per_hour if per_hour else 0,
            burst=per_hour,
            max_attempts=settings.max_attempts,
            lease=int(settings.visibility_timeout * 1000),
            give_up_after=int(settings.give_up_after * 1000),
        )


class Claim(NamedTuple):
    """A request as the store knows it, and the lease under which this holder works on it."""

    request_id: str
    token: str
    code_key: str
    canonical: str
    who: str

    @classmethod
    def of(cls, request_id: str, token: str, email: object, purpose: object, canonical: str) -> Claim:
        """`canonical`: the canonical address, or '' for what is no address."""
        # What is no address or no purpose has no code; its text, perhaps not even Unicode, stays out of the keys.
        key = code_key(str(email), str(purpose)) if canonical and is_purpose(purpose) else ""
        return cls(request_id, token, key, canonical, blake2b(_told_apart(email, purpose), digest_size=16).hexdigest())


class Asked(NamedTuple):
    """What `issue` is asked for one request. Times are Unix seconds."""

    claim: Claim
    candidate: str  # the code to set if there is none to reuse
    verdict: ErrorCode | None = None  # an error that is already certain; it only needs remembering
    enqueued_at: float | None = None
    expires_at: float | None = None


FAILED: Final = "failed"  # no relay accepted the mail: the bucket is refunded, the request may try again
UNKNOWN: Final = "unknown"  # a relay may have accepted the mail: the request may try once more


class Outcome(NamedTuple):
    """What became of a request: its final answer, FAILED or UNKNOWN. Either way its lease is free."""

    claim: Claim
    became: ErrorCode | Literal["failed", "unknown"]


class Send(NamedTuple):
    """The lease is ours: send this code."""

    code: str
    life: float  # seconds the code still lives
    remaining: float  # seconds until the request's deadline
    tries: int  # sends of this request that failed before


class Answered(NamedTuple):
    """The request has its final answer."""

    error: ErrorCode
    why: str = ""  # COOLDOWN_HIT or BUCKET_HIT, if this request was the one that met it


class Wait(NamedTuple):
    """Another holder is at it; come back when woken, or after so many seconds."""

    seconds: float
    joined: bool = False  # what is at it is another request, whose mail is on the wire


class Conflict(NamedTuple):
    """The request id belongs to another address or purpose."""


Issue = Send | Answered | Wait | Conflict


class CodeStore:
    """Builds the store's commands and reads their answers. No I/O."""

    def __init__(self, policy: CodePolicy) -> None:
        self.policy = policy
        code_life = (policy.lease, policy.give_up_after, policy.ttl, policy.min_life)
        limits = (policy.cooldown, policy.interval, policy.burst)
        self._issue_policy: tuple[Arg, ...] = (
            *(*code_life, *limits, policy.remember),
            *(REQUEST, ATTEMPTS, COOLDOWN, SENDING, JOINED),
        )
        self._settle_policy: tuple[Arg, ...] = (
            *(policy.cooldown, policy.interval, policy.remember),
            *(REQUEST, COOLDOWN, SENDING, JOINED),
        )

    def issue(self, asked: Sequence[Asked]) -> Command:
        """Get or create the codes and take the leases; read each entry that is no error with `read_issue`."""
        keys: list[str] = []
        args = [*self._issue_policy]
        for claim, candidate, verdict, enqueued_at, expires_at in asked:
            keys += (REQUEST + claim.request_id, claim.code_key, BUCKET + claim.canonical)
            args += (
                claim.who,
                claim.token,
                "" if verdict is None else int(verdict),
                "" if enqueued_at is None else round(enqueued_at * 1000),
                "" if expires_at is None else round(expires_at * 1000),
                candidate,
            )
        return _ISSUE(keys, args)

    @staticmethod
    def read_issue(answer: Any) -> Issue:
        """What `issue` answered to one request."""
        match answer[0]:
            case b"send":
                code = answer[1].decode("utf-8", "surrogateescape")
                return Send(code, answer[2] / 1000, answer[3] / 1000, answer[4])
            case b"answered":
                # A newer worker, before a rollback, may have known errors that we do not.
                return Answered(known_error(answer[1]), answer[2].decode() if len(answer) > 2 else "")
            case b"conflict":
                return Conflict()
        return Wait(answer[1] / 1000, joined=answer[0] == b"join")

    def settle(self, outcomes: Sequence[Outcome]) -> Command:
        """Make outcomes known; read each entry that is no error with `read_settle`."""
        keys: list[str] = []
        args = [*self._settle_policy]
        for claim, became in outcomes:
            keys += (REQUEST + claim.request_id, claim.code_key, BUCKET + claim.canonical)
            args += (claim.token, became if isinstance(became, str) else int(became))
        return _SETTLE(keys, args)

    @staticmethod
    def read_settle(answer: Any) -> tuple[bool, list[str]]:
        """Whether the lease was still ours, and the ids of joined requests to wake."""
        return answer[0] == 1, [request_id.decode() for request_id in answer[1:]]

    @staticmethod
    def announce_data(claims: Sequence[Claim]) -> Command:
        """Final dots are about to be written. Answers a list of 1, 0 (the lease is lost) or errors."""
        return _ANNOUNCE_DATA([REQUEST + claim.request_id for claim in claims], [claim.token for claim in claims])

    def renew(self, claims: list[Claim]) -> Command:
        """All these leases anew. Answers a list of 1 (kept) or 0 (lost)."""
        keys = [key for claim in claims for key in (REQUEST + claim.request_id, SENDING + claim.code_key)]
        args = [arg for claim in claims for arg in (claim.request_id, claim.token)]
        return _RENEW(keys, [self.policy.lease, *args])

    def check(self, email: str, code: str, purpose: str) -> Command:
        """Count the attempt, compare, consume; read with `read_check`."""
        key = _unicode(code_key(email, purpose))
        return _CHECK([key, ATTEMPTS + key], [_unicode(code), self.policy.max_attempts])

    @staticmethod
    def read_check(email: str, answer: Any) -> CheckResult:
        """What `check` answered."""
        return CheckResult(email, ErrorCode(answer))


def _told_apart(email: object, purpose: object) -> bytes:
    """Both in one, so that no two pairs look the same."""
    if isinstance(email, str) and isinstance(purpose, str):
        return f"{len(purpose)} {purpose}{email}".encode("utf-8", "surrogatepass")
    return json.dumps([email, purpose], sort_keys=True).encode()  # begins with no digit


def _unicode(text: str) -> str:
    """`text` with lone surrogates (JSON can carry them, UTF-8 cannot) as escapes, which no address and no code has."""
    return text.encode("utf-8", "backslashreplace").decode()
