"""The code store as a port: what the service, the settler and the clients ask of it, and the words they use.

`producer.store.redis_codes` implements it. Another store implements `CodeStore` and takes its place in
`worker.bootstrap` (and in `producer.aio`, for the check).
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Literal, NamedTuple, Protocol

from producer.contract import REPLY_TTL, ErrorCode, code_key, is_purpose
from producer.settings import Settings

# Why a request was answered without a mail: it met a cooldown, its mailbox was refused lately, or a bucket was empty.
COOLDOWN_HIT, SUPPRESSED_HIT = "cooldown", "suppressed"
ADDRESS_BUCKET, CLIENT_ADDRESS_BUCKET = "address_bucket", "client_address_bucket"
CLIENT_BUCKET, TOTAL_BUCKET = "client_bucket", "total_bucket"
# The buckets, each with its name in metrics and audit events.
BUCKETS: Final = {
    ADDRESS_BUCKET: "address",
    CLIENT_ADDRESS_BUCKET: "client_address",
    CLIENT_BUCKET: "client",
    TOTAL_BUCKET: "total",
}

# Raise it when a request record changes its fields or what they mean, `who` included, and read the one before for one
# release: docs/upgrading.md. Workers of two releases share the records.
RECORD_VERSION: Final = 1

HOUR: Final = 3_600_000  # ms
DAY: Final = 24 * HOUR


class Bucket(NamedTuple):
    """A token bucket: `burst` sends at once, and one comes back every `interval` ms; 0: no bucket."""

    interval: float = 0
    burst: int = 0

    @classmethod
    def of(cls, per_hour: int) -> Bucket:
        """A bucket of `per_hour` sends, which refills within an hour; 0: no bucket."""
        return cls(_ms(HOUR / per_hour), per_hour) if per_hour else NO_BUCKET

    def share(self, part: int) -> Bucket:
        """The share of one among many: 1/`part` of the sends, at least one."""
        burst = max(1, self.burst // part)
        return Bucket(_ms(self.interval * self.burst / burst), burst) if self.interval else self


NO_BUCKET: Final = Bucket()


def _ms(value: float) -> float:
    """`value` as an `int` if it is whole: Redis stores integers in less space."""
    return int(value) if value.is_integer() else value


@dataclass(frozen=True, slots=True)
class CodePolicy:
    """How long codes live and how often they are sent. Times in milliseconds."""

    ttl: int
    min_life: int  # a code with less life left is replaced
    cooldown: int  # 0: off
    address: Bucket  # the mails to one address
    max_attempts: int  # of a code of `code_length`
    code_length: int
    code_max_length: int
    lease: int
    give_up_after: int
    remember: int = REPLY_TTL * 1000
    suppression: int = 600_000  # of an address after its mailbox was refused; doubles with each refusal after its end
    longest_suppression: int = DAY
    client: Bucket = NO_BUCKET  # the mails that one client asked for
    total: Bucket = NO_BUCKET  # all mails
    fold_aliases: bool = False  # the aliases of a mailbox share its bucket

    @property
    def client_address(self) -> Bucket:
        """The mails to one address that one client asked for. So a stranger cannot use up an address' own bucket."""
        return self.address.share(4)

    @property
    def buckets(self) -> tuple[Bucket, Bucket, Bucket, Bucket]:
        """In the order of BUCKETS."""
        return self.address, self.client_address, self.client, self.total

    @classmethod
    def of(cls, settings: Settings) -> CodePolicy:
        """The policy that the settings describe."""
        ttl = settings.code_ttl * 1000
        return cls(
            ttl=ttl,
            min_life=min(int(settings.code_min_life * 1000), ttl // 10),
            cooldown=int(settings.resend_cooldown * 1000),
            address=Bucket.of(settings.max_sends_per_hour),
            max_attempts=settings.max_attempts,
            code_length=settings.code_length,
            code_max_length=settings.code_max_length,
            lease=int(settings.visibility_timeout * 1000),
            give_up_after=int(settings.give_up_after * 1000),
            client=Bucket.of(settings.max_sends_per_client),
            total=Bucket.of(settings.max_sends_total),
            fold_aliases=settings.fold_aliases,
        )


class Claim(NamedTuple):
    """A request as the store knows it, and the token under which this worker holds its lease."""

    request_id: str
    token: str
    code_key: str
    canonical: str
    who: str  # RECORD_VERSION and a hash of address and purpose: the same request id must come with the same
    purpose: str
    client: str = ""  # hash of the caller's word for its end user, if it gave one

    @classmethod
    def of(
        cls, request_id: str, token: str, email: object, purpose: object, canonical: str, client: str | None = None
    ) -> Claim:
        """`canonical`: the canonical address, or '' if `email` is not an address.

        A malformed purpose becomes ''.
        """
        # An invalid address or purpose has no code; its text, perhaps not even Unicode, stays out of the keys.
        known_purpose = str(purpose) if is_purpose(purpose) else ""
        key = code_key(str(email), known_purpose) if canonical and known_purpose else ""
        # Encoded so that no two pairs give the same bytes.
        if isinstance(email, str) and isinstance(purpose, str):
            pair = f"{len(purpose)} {purpose}{email}".encode("utf-8", "surrogatepass")
        else:
            pair = json.dumps([email, purpose], sort_keys=True).encode()  # never begins with a digit
        who = f"{RECORD_VERSION}:{blake2b(pair, digest_size=16).hexdigest()}"
        # 12 bytes keep the fields of a record short enough for Redis' compact encoding.
        word = blake2b(client.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest() if client else ""
        return cls(request_id, token, key, canonical, who, known_purpose, word)


class IssueRequest(NamedTuple):
    """One request that wants a code. Times are Unix seconds."""

    claim: Claim
    candidate: str  # random digits, as many as the longest code has; a new code is the first few of them, or all
    error: ErrorCode | None = None  # the final answer, if it is certain already; the store remembers it
    enqueued_at: float | None = None
    expires_at: float | None = None


class Send(NamedTuple):
    """The lease is ours: send this code."""

    code: str
    life: float  # seconds the code still lives
    remaining: float  # seconds until the request's deadline
    tries: int  # sends of this request that failed before


class Answered(NamedTuple):
    """The request has its final answer."""

    error: ErrorCode
    why: str = ""  # COOLDOWN_HIT, SUPPRESSED_HIT or one of BUCKETS, if this request was the one that met it


class Wait(NamedTuple):
    """Another holder sends; come back when woken, or after `seconds`."""

    seconds: float
    joined: bool = False  # the other holder sends for another request to the same code key


@dataclass(frozen=True, slots=True)
class Conflict:
    """The request id belongs to another address or purpose."""


class UnknownVersion(NamedTuple):
    """Another release wrote what the store knows of the request: leave it to others, and ask again after `seconds`."""

    seconds: float


Issue = Send | Answered | Wait | Conflict | UnknownVersion

FAILED: Final = "failed"  # no relay accepted the mail: the buckets are refunded, the request may try again
UNKNOWN: Final = "unknown"  # a relay may have accepted the mail: the request may try once more
Result = ErrorCode | Literal["failed", "unknown"]

# How a relay refused the mailbox for good; "": it did not, or its word does not count.
Refusal = Literal["", "refused", "respelled"]
REFUSED: Final = "refused"  # the address gets no mail for a while
# The request had another spelling than the canonical one, and to the relay that may be another mailbox. A stranger must
# not get the address suppressed by it, nor have the relay asked without end: the buckets keep the charge.
RESPELLED: Final = "respelled"


class Outcome(NamedTuple):
    """How a send ended: with the request's final answer, FAILED or UNKNOWN. Each frees the lease."""

    claim: Claim
    result: Result
    refusal: Refusal = ""


class Settled(NamedTuple):
    """What came of an outcome."""

    held: bool  # the lease was still ours; if not, nothing was changed
    wake: list[str]  # ids of joined requests that need not wait any longer


class Checked(NamedTuple):
    """What a check found."""

    error: ErrorCode  # SUCCESS, VARIFY_EXPIRED or VARIFY_CODE_ERR
    burnt: bool = False  # it dropped a live code, because too many checks were wrong


class StoreError(NamedTuple):
    """The store refused this one request of a batch."""

    kind: str


class CodeStore(Protocol):
    """Issues codes, settles what became of their mails, checks guesses: each one atomic step per request.

    Batches are served in order, as if each request came alone, and answered in that order. A method that returns an
    awaitable does nothing before it is awaited; awaiting raises `StoreUnavailable` if the store cannot be reached, and
    then the step may have been taken or not.
    """

    @property
    def lease(self) -> float:
        """Seconds that a lease lasts from `issue` or `renew` on."""

    @property
    def connection(self) -> object:
        """The `RedisConnection` of a store that returns `Step`s, so that they can share a write; else None."""

    def issue(self, requests: Sequence[IssueRequest]) -> Awaitable[Sequence[Issue | StoreError]]:
        """Get or create the codes and take the leases."""

    def settle(self, outcomes: Sequence[Outcome]) -> Awaitable[Sequence[Settled | StoreError]]:
        """Record how sends ended and free their leases."""

    def announce_data(self, claims: Sequence[Claim]) -> Awaitable[Sequence[bool | StoreError]]:
        """Record that mails are about to be sent; whether each lease was still held. Only where it was may one leave.

        From then on acceptance is unknown until the outcome is settled.
        """

    def renew(self, claims: Sequence[Claim]) -> Awaitable[Sequence[bool]]:
        """Extend leases; whether each was still held."""

    def check(self, email: str, code: str, purpose: str) -> Awaitable[Checked]:
        """Compare, and consume the code if it is right; otherwise count the attempt.

        Wrong checks are also counted across codes, by canonical address and purpose, until a right one or for a day.
        The more there are, the longer the next code is, and shorter codes are no longer accepted.
        """
