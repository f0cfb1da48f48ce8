"""The code store: issue, settle and check, each one atomic step in Redis.

A step is built here as a command and its answer read here; who sends it (a blocking client, or a pipelined connection
for a whole batch) is the caller's choice, so there is one store for both.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from producer.contract import REPLY_TTL, CheckResult, ErrorCode, code_key, is_purpose
from producer.script import Command, Script
from producer.settings import Settings

_LUA = Path(__file__).parent / "lua"
_ISSUE, _SETTLE, _DOT, _RENEW, _CHECK = (
    Script(_LUA / f"{name}.lua") for name in ("issue", "settle", "dot", "renew", "check")
)

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
        who = hashlib.sha256(json.dumps([email, purpose], sort_keys=True).encode()).hexdigest()
        return cls(request_id, token, key, canonical, who)


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

    def issue(
        self,
        claim: Claim,
        candidate: str,
        *,
        verdict: ErrorCode | None = None,
        enqueued_at: float | None = None,
        expires_at: float | None = None,
    ) -> Command:
        """Get or create the code and take the lease; `candidate` is the code to set if there is none to reuse.

        `verdict`: an error that is already certain; it only needs remembering. Times are Unix seconds.
        """
        policy = self.policy
        key = claim.code_key
        return _ISSUE(
            [
                REQUEST + claim.request_id,
                key,
                ATTEMPTS + key,
                COOLDOWN + key,
                SENDING + key,
                JOINED + key,
                BUCKET + claim.canonical,
            ],
            [
                claim.request_id,
                claim.who,
                claim.token,
                "" if verdict is None else int(verdict),
                "" if enqueued_at is None else round(enqueued_at * 1000),
                "" if expires_at is None else round(expires_at * 1000),
                candidate,
                policy.lease,
                policy.give_up_after,
                policy.ttl,
                policy.min_life,
                policy.cooldown,
                policy.interval,
                policy.burst,
                policy.remember,
            ],
        )

    @staticmethod
    def read_issue(answer: Any) -> Issue:
        """What `issue` answered."""
        match answer[0]:
            case b"send":
                code = answer[1].decode("utf-8", "surrogateescape")
                return Send(code, answer[2] / 1000, answer[3] / 1000, answer[4])
            case b"answered":
                return Answered(ErrorCode(answer[1]), answer[2].decode() if len(answer) > 2 else "")
            case b"conflict":
                return Conflict()
        return Wait(answer[1] / 1000, joined=answer[0] == b"join")

    def answered(self, claim: Claim, error: ErrorCode) -> Command:
        """Remember the final answer; read with `read_settle`."""
        return self._settle(claim, "answered", error)

    def failed(self, claim: Claim) -> Command:
        """No relay accepted the mail: the bucket is refunded, the lease is free, the request may try again."""
        return self._settle(claim, "failed")

    def unknown(self, claim: Claim) -> Command:
        """A relay may have accepted the mail: the lease is free, the request may try once more."""
        return self._settle(claim, "unknown")

    def _settle(self, claim: Claim, outcome: str, error: ErrorCode | None = None) -> Command:
        key = claim.code_key
        return _SETTLE(
            [REQUEST + claim.request_id, key, COOLDOWN + key, SENDING + key, JOINED + key, BUCKET + claim.canonical],
            [
                claim.request_id,
                claim.token,
                outcome,
                "" if error is None else int(error),
                self.policy.cooldown,
                self.policy.interval,
                self.policy.remember,
                REQUEST,
            ],
        )

    @staticmethod
    def read_settle(answer: Any) -> tuple[bool, list[str]]:
        """Whether the lease was still ours, and the ids of joined requests to wake."""
        return answer[0] == 1, [request_id.decode() for request_id in answer[1:]]

    @staticmethod
    def dot(claim: Claim) -> Command:
        """The final dot is about to be written. Answers 1, or 0 if the lease is lost."""
        return _DOT([REQUEST + claim.request_id], [claim.token])

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


def _unicode(text: str) -> str:
    """`text` with lone surrogates (JSON can carry them, UTF-8 cannot) as escapes, which no address and no code has."""
    return text.encode("utf-8", "backslashreplace").decode()
