"""The code store in Redis: each method is one command that runs one Lua script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from producer.address import fold_aliases, parse
from producer.contract import ErrorCode, code_key, known_error
from producer.errors import InvalidAddress
from producer.redis.connection import RedisConnection, ServerError, Step, entries, raise_errors
from producer.redis.protocol import kind_of
from producer.redis.scripts import EACH, Arg, Command, Script
from producer.store.codes import (
    DAY,
    Answered,
    Checked,
    Claim,
    CodePolicy,
    Conflict,
    Issue,
    IssueRequest,
    Outcome,
    Send,
    Settled,
    StoreError,
    UnknownVersion,
    Wait,
)

_LUA = Path(__file__).parent
_BUCKETS, _LENGTHS, _RECORD = (_LUA / f"{name}.lua" for name in ("buckets", "lengths", "record"))
_ISSUE = Script(EACH, _BUCKETS, _LENGTHS, _RECORD, _LUA / "issue.lua")
_SETTLE = Script(EACH, _BUCKETS, _RECORD, _LUA / "settle.lua")
ANNOUNCE_DATA = Script(EACH, _LUA / "announce_data.lua")
_RENEW, _CHECK = Script(EACH, _LUA / "renew.lua"), Script(_LENGTHS, _LUA / "check.lua")

# Side keys; none begins with `code_`, which GateServer builds from user text. All have a TTL.
ATTEMPTS, COOLDOWN, SENDING, JOINED = "attempts:", "cooldown:", "sending:", "joined:"  # + code key
BUCKET = "bucket:"  # + canonical address; buckets.lua builds the keys of the other buckets
SUPPRESSED = "suppressed:"  # + canonical address
WRONG = "wrong:"  # + purpose:canonical address
REQUEST = "request:"  # + request id

T = TypeVar("T")


class RedisCodeStore:
    """A `CodeStore` on a connection that may serve other databases too. What can be awaited is a `Step`."""

    def __init__(self, connection: RedisConnection, policy: CodePolicy, *, database: int | None = None) -> None:
        """`database`: its number; None: the connection's own."""
        self.connection = connection
        self.lease = policy.lease / 1000
        self._policy = policy
        self._database = connection.database if database is None else database
        self._issue_args: tuple[Arg, ...] = (
            *(policy.lease, policy.give_up_after, policy.ttl, policy.min_life),
            *(policy.cooldown, policy.remember),
            *(REQUEST, ATTEMPTS, COOLDOWN, SENDING, JOINED),
            *(int(ErrorCode.SUCCESS), int(ErrorCode.TOO_MANY_REQUESTS), int(ErrorCode.TIMEOUT)),
            int(ErrorCode.MAIL_REJECTED),
            *(policy.max_attempts, policy.code_length, policy.code_max_length),
            *(f"{each.interval} {each.burst}" if each.interval else "" for each in policy.buckets),
        )
        self._settle_args: tuple[Arg, ...] = (
            *(policy.cooldown, policy.remember),
            *(REQUEST, COOLDOWN, SENDING, JOINED),
            *(int(ErrorCode.SUCCESS), int(ErrorCode.INVALID_ADDRESS), int(ErrorCode.MAIL_REJECTED)),
            *(policy.suppression, policy.longest_suppression),
        )

    def issue(self, requests: Sequence[IssueRequest]) -> Step[list[Issue | StoreError]]:
        keys: list[str] = []
        args = [*self._issue_args]
        for claim, candidate, error, enqueued_at, expires_at in requests:
            keys += self._keys(claim)
            keys.append(f"{WRONG}{claim.purpose}:{claim.canonical}")
            args += (
                claim.who,
                claim.token,
                "" if error is None else int(error),
                "" if enqueued_at is None else round(enqueued_at * 1000),
                "" if expires_at is None else round(expires_at * 1000),
                candidate,
                claim.client,
            )
        return self._step(_ISSUE(keys, args), lambda answer: _each(_read_issue, answer, len(requests)))

    def settle(self, outcomes: Sequence[Outcome]) -> Step[list[Settled | StoreError]]:
        keys: list[str] = []
        args = [*self._settle_args]
        for claim, result, refusal in outcomes:
            keys += self._keys(claim)
            args += (claim.token, result if isinstance(result, str) else int(result), refusal)
        return self._step(_SETTLE(keys, args), lambda answer: _each(_read_settle, answer, len(outcomes)))

    def announce_data(self, claims: Sequence[Claim]) -> Step[list[bool | StoreError]]:
        keys = [REQUEST + claim.request_id for claim in claims]
        command = ANNOUNCE_DATA(keys, [claim.token for claim in claims])
        return self._step(command, lambda answer: _each(_is_held, answer, len(claims)))

    def renew(self, claims: Sequence[Claim]) -> Step[list[bool]]:
        keys = [key for claim in claims for key in (REQUEST + claim.request_id, SENDING + claim.code_key)]
        args = [arg for claim in claims for arg in (claim.request_id, claim.token)]
        return self._step(
            _RENEW(keys, [self._policy.lease, *args]),
            lambda answer: [entry == 1 for entry in entries(answer, len(claims))],
        )

    def check(self, email: str, code: str, purpose: str) -> Step[Checked]:
        try:
            canonical = parse(email).canonical
        except InvalidAddress:
            canonical = _encodable(email)  # an older server may have stored a code even so
        key, policy = _encodable(code_key(email, purpose)), self._policy
        command = _CHECK(
            [key, ATTEMPTS + key, f"{WRONG}{purpose}:{canonical}"],
            [
                *(_encodable(code), policy.max_attempts, policy.code_length, policy.code_max_length, DAY),
                *(int(ErrorCode.SUCCESS), int(ErrorCode.VARIFY_EXPIRED), int(ErrorCode.VARIFY_CODE_ERR)),
            ],
        )
        return self._step(command, _read_checked)

    def _keys(self, claim: Claim) -> tuple[str, str, str, str]:
        canonical = claim.canonical
        mailbox = fold_aliases(canonical) if self._policy.fold_aliases else canonical
        return REQUEST + claim.request_id, claim.code_key, BUCKET + mailbox, SUPPRESSED + canonical

    def _step(self, command: Command, read: Callable[[Any], T]) -> Step[T]:
        return Step(self.connection, self._database, [command], lambda answers: read(answers[0]))


def _each(read: Callable[[Any], T], answer: Any, count: int) -> list[T | StoreError]:
    return [StoreError(kind_of(e)) if isinstance(e, ServerError) else read(e) for e in entries(answer, count)]


def _read_issue(entry: Any) -> Issue:
    match entry[0]:
        case b"send":
            code = entry[1].decode("utf-8", "surrogateescape")
            return Send(code, entry[2] / 1000, entry[3] / 1000, entry[4])
        case b"answered":
            # A newer worker, before a rollback, may have known errors that we do not.
            return Answered(known_error(entry[1]), entry[2].decode() if len(entry) > 2 else "")
        case b"conflict":
            return Conflict()
        case b"unknown":
            return UnknownVersion(entry[1] / 1000)
    return Wait(entry[1] / 1000, joined=entry[0] == b"join")


def _is_held(entry: Any) -> bool:
    return bool(entry == 1)


def _read_settle(entry: Any) -> Settled:
    return Settled(entry[0] == 1, [request_id.decode() for request_id in entry[1:]])


def _read_checked(answer: Any) -> Checked:
    error, burnt = raise_errors([answer])[0]
    return Checked(ErrorCode(error), burnt == 1)


def _encodable(text: str) -> str:
    """`text` with lone surrogates (JSON can carry them, UTF-8 cannot) as escapes, which no address and no code has."""
    return text.encode("utf-8", "backslashreplace").decode()
