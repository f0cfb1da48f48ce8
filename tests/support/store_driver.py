"""Drives a CodeStore on a real server, one blocking step at a time, and holds what must be true after each."""

from __future__ import annotations

from typing import Any

import redis
from redis.exceptions import NoScriptError

from producer.address import parse
from producer.contract import ErrorCode
from producer.redis.scripts import Command, in_full
from producer.redis.steps import Step
from producer.store import redis_codes
from producer.store.codes import FAILED, UNKNOWN, Answered, Claim, CodePolicy, Issue, IssueRequest, Outcome, Send
from producer.store.redis_codes import REQUEST, SENDING, RedisCodeStore

EMAIL = "anna@example.com"
HOLDER = "this holder"
POLICY = CodePolicy(
    ttl=600_000,
    min_life=60_000,
    cooldown=10_000,
    interval=180_000,
    burst=20,
    max_attempts=5,
    lease=15_000,
    give_up_after=300_000,
)


def claim_of(request_id: str, email: str = EMAIL, *, purpose: str = "default", token: str = HOLDER) -> Claim:
    """A claim as a worker makes it for a request with a good address."""
    return Claim.of(request_id, token, email, purpose, parse(email).canonical)


_read_issue: Any = redis_codes._read_issue
_read_settle: Any = redis_codes._read_settle


class Posted:
    """Stands for a connection: keeps what is posted."""

    database = 0

    def post(self, batch: Any, *, database: int) -> None:
        """As `RedisConnection.post`."""
        del database
        [self.command] = batch


def store_of(policy: CodePolicy) -> RedisCodeStore:
    """A store whose steps a test sends itself."""
    return RedisCodeStore(Posted(), policy)  # type: ignore[arg-type]


def announce_data(store: RedisCodeStore, claims: list[Claim]) -> Command:
    """The command that is posted."""
    store.announce_data(claims)
    command: Command = store.connection.command  # type: ignore[attr-defined]
    return command


def run(client: redis.Redis, command: Command | Step[Any]) -> Any:
    """Send one command of the store's."""
    if isinstance(command, Step):
        [command] = command.commands
    try:
        return client.execute_command(*command)  # type: ignore[no-untyped-call]
    except NoScriptError:
        return client.execute_command(*in_full(command))  # type: ignore[no-untyped-call]


def is_error(entry: object) -> bool:
    """Whether Redis refused this one of a batch."""
    return isinstance(entry, redis.ResponseError)


class Driver:
    """A store, a client, and the invariants. `outside`: keys that a test itself left without a TTL."""

    def __init__(self, client: redis.Redis, policy: CodePolicy = POLICY) -> None:
        self.client = client
        self.store = store_of(policy)
        self.outside: set[bytes] = set()
        self._candidates = iter(f"{number:06}" for number in range(1_000_000))

    def issue(self, claim: Claim, candidate: str | None = None, **options: Any) -> Issue:
        """Issue with `candidate`, or with a code never used before."""
        issue: Issue = _read_issue(self.one(self.store.issue([self.asked(claim, candidate, **options)])))
        return issue

    def asked(self, claim: Claim, candidate: str | None = None, **options: Any) -> IssueRequest:
        """What is asked for one request."""
        return IssueRequest(claim, candidate or next(self._candidates), **options)

    def issue_all(self, asked: list[IssueRequest]) -> list[Issue | redis.ResponseError]:
        """Issue for a batch: what each got, or the error in its place."""
        return [entry if is_error(entry) else _read_issue(entry) for entry in self.run(self.store.issue(asked))]

    def send(self, claim: Claim, candidate: str | None = None, **options: Any) -> Send:
        """Issue, where the lease must be had."""
        found = self.issue(claim, candidate, **options)
        assert isinstance(found, Send), found
        return found

    def deliver(self, claim: Claim, candidate: str | None = None) -> str:
        """Send and be accepted; the code in the mail."""
        code = self.send(claim, candidate).code
        self.accepted(claim)
        return code

    def accepted(self, claim: Claim) -> list[str]:
        """A relay accepted the mail. The ids to wake."""
        return self.settle(Outcome(claim, ErrorCode.SUCCESS))

    def answered(self, claim: Claim, error: ErrorCode) -> list[str]:
        """The request has another final answer. The ids to wake."""
        return self.settle(Outcome(claim, error))

    def failed(self, claim: Claim) -> list[str]:
        """No relay accepted the mail. The ids to wake."""
        return self.settle(Outcome(claim, FAILED))

    def unknown(self, claim: Claim) -> list[str]:
        """A relay may have accepted the mail. The ids to wake."""
        return self.settle(Outcome(claim, UNKNOWN))

    def settle(self, outcome: Outcome) -> list[str]:
        """Settle, where the lease must be ours."""
        ours, wake = _read_settle(self.one(self.store.settle([outcome])))
        assert ours
        return list(wake)

    def settle_late(self, outcome: Outcome) -> None:
        """Settle, where the lease must be lost; nothing changes."""
        before = self.everything()
        assert _read_settle(self.one(self.store.settle([outcome]))) == (False, [])
        assert self.everything() == before

    def announce_data(self, claim: Claim) -> bool:
        """Announce the final dot."""
        return bool(self.one(announce_data(self.store, [claim])) == 1)

    def renew(self, *claims: Claim) -> list[int]:
        """Renew leases."""
        kept: list[int] = self.run(self.store.renew(list(claims)))
        return kept

    def lapse(self, claim: Claim) -> None:
        """As if the lease had stood still for its whole length."""
        self.client.hset(REQUEST + claim.request_id, "until", 1)
        self.client.delete(SENDING + claim.code_key)

    def check(self, code: str, email: str = EMAIL, purpose: str = "default") -> ErrorCode:
        """Check a code."""
        return ErrorCode(self.run(self.store.check(email, code, purpose)))

    def answer_of(self, claim: Claim) -> ErrorCode:
        """The final answer that is remembered."""
        found = self.issue(claim)
        assert isinstance(found, Answered), found
        return found.error

    def everything(self) -> dict[bytes, Any]:
        """All keys and values."""
        found: dict[bytes, Any] = {}
        for key in self.client.scan_iter(count=1000):
            kind = self.client.type(key)
            if kind == b"hash":
                found[key] = self.client.hgetall(key)
            elif kind == b"set":
                found[key] = self.client.smembers(key)
            else:
                found[key] = self.client.get(key)
        return found

    def one(self, command: Command | Step[Any]) -> Any:
        """Run a command for one request; its entry. Raises what stands there if that is an error."""
        [entry] = self.run(command)
        if is_error(entry):
            raise entry
        return entry

    def run(self, command: Command | Step[Any]) -> Any:
        """Run a command; then every key must have a time to live."""
        answer = run(self.client, command)
        keys = list(self.client.scan_iter(count=1000))
        with self.client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.pttl(key)
            for key, life in zip(keys, pipe.execute(), strict=True):
                assert life != -1 or key in self.outside, f"{key!r} lives for ever"
                assert not key.startswith(b"code_") or self.client.type(key) == b"string"
        return answer
