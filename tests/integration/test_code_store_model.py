"""The code store against a model in plain Python, step by step, on a real server.

Time passes by moving everything that the server holds into the past, in one atomic step. The model's clock is the
server's, read in the same transaction as each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
import redis as redis_py
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from support.store_driver import _read_issue, _read_settle, announce_data, claim_of, store_of

from producer.contract import ErrorCode, code_key
from producer.redis.scripts import Command, load_all
from producer.redis.steps import Step
from producer.store.codes import (
    BUCKET_HIT,
    COOLDOWN_HIT,
    FAILED,
    UNKNOWN,
    Answered,
    Claim,
    CodePolicy,
    Conflict,
    Issue,
    IssueRequest,
    Outcome,
    Send,
    Wait,
)

SLACK = 100  # ms
# Odd on purpose: with steps of whole 10 s, no two times that are compared come near each other.
POLICY = CodePolicy(
    ttl=605_000,
    min_life=42_500,
    cooldown=17_500,
    interval=33_700,
    burst=3,
    max_attempts=3,
    lease=23_600,
    give_up_after=142_400,
    remember=3_605_000,
)
STEPS = [10_000, 20_000, 30_000, 100_000, 300_000, 560_000]  # ms

PASS_TIME = """
local dt = tonumber(ARGV[1])
for _, key in ipairs(redis.call('KEYS', '*')) do
    if redis.call('TYPE', key).ok == 'hash' then
        for _, name in ipairs({ 'until', 'first' }) do
            local value = redis.call('HGET', key, name)
            if value then
                redis.call('HSET', key, name, string.format('%.0f', value - dt))
            end
        end
    elseif string.sub(key, 1, 7) == 'bucket:' then
        redis.call('SET', key, string.format('%.0f', redis.call('GET', key) - dt), 'KEEPTTL')
    end
    local life = redis.call('PTTL', key)
    if life >= 0 then
        redis.call('PEXPIRE', key, life - dt)
    end
end
"""

EMAILS = st.sampled_from(["anna@example.com", "Anna@example.com"])  # one bucket, two code keys
PURPOSES = st.sampled_from(["default", "default", "reset"])
IDS = st.sampled_from(["id-1", "id-2", "id-3", "id-4", "id-5", "id-6"])
TOKENS = st.sampled_from(["a", "b"])
OUTCOMES: st.SearchStrategy[ErrorCode | Literal["failed", "unknown"]] = st.sampled_from(
    [ErrorCode.SUCCESS, ErrorCode.SUCCESS, ErrorCode.MAIL_REJECTED, ErrorCode.TIMEOUT, FAILED, UNKNOWN]
)


@dataclass
class Code:
    value: str
    end: float
    wrong: int = 0


@dataclass
class Record:
    who: str
    first: float
    end: float
    token: str = ""
    until: float = 0
    charged: bool = False
    doubts: int = 0
    dot: bool = False
    sent: str = ""
    tries: int = 0
    error: ErrorCode | None = None


@dataclass
class Model:
    """What the contract says, as simply as Python can say it. Times are ms."""

    now: float = 0
    codes: dict[str, Code] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    cooldowns: dict[str, tuple[str, float]] = field(default_factory=dict)  # the code in the mail, and the end
    sending: dict[str, tuple[str, float]] = field(default_factory=dict)  # the request, and the end
    joined: dict[str, tuple[set[str], float]] = field(default_factory=dict)
    full: dict[str, float] = field(default_factory=dict)  # when a bucket is full again

    def at(self, now: float) -> None:
        """The clock moved: forget what ended."""
        self.now = now
        self.codes = {key: code for key, code in self.codes.items() if code.end > now}
        self.records = {key: record for key, record in self.records.items() if record.end > now}
        self.cooldowns = {key: pair for key, pair in self.cooldowns.items() if pair[1] > now}
        self.sending = {key: pair for key, pair in self.sending.items() if pair[1] > now}
        self.joined = {key: pair for key, pair in self.joined.items() if pair[1] > now}

    def issue(self, claim: Claim, candidate: str, enqueued_at: float | None, verdict: ErrorCode | None) -> Issue:
        record = self.records.get(claim.request_id) or Record(claim.who, self.now, 0)
        born = min(self.now if enqueued_at is None else enqueued_at, record.first)
        deadline = born + POLICY.give_up_after
        return (
            self._known(claim, record, verdict)
            or self._hindered(claim, record, deadline)
            or self._send(claim, record, candidate, deadline)
        )

    def _known(self, claim: Claim, record: Record, verdict: ErrorCode | None) -> Issue | None:
        if record.who != claim.who:
            return Conflict()
        if record.error is not None:
            return Answered(record.error)
        if verdict is not None:
            return self._answer(claim, record, verdict)
        if record.token not in {"", claim.token} and record.until > self.now:
            return Wait((record.until - self.now) / 1000)
        return None

    def _hindered(self, claim: Claim, record: Record, deadline: float) -> Issue | None:
        key, code = claim.code_key, self.codes.get(claim.code_key)
        if deadline <= self.now:
            return self._answer(claim, record, ErrorCode.TIMEOUT)
        if code and self.cooldowns.get(key, ("", 0))[0] == code.value:
            return self._answer(claim, record, ErrorCode.SUCCESS, COOLDOWN_HIT)
        holder, end = self.sending.get(key, (claim.request_id, 0.0))
        if holder != claim.request_id:
            record.token = ""
            self._remember(claim, record)
            self.joined[key] = (self.joined.get(key, (set(), 0))[0] | {claim.request_id}, self.now + POLICY.remember)
            return Wait((min(end, deadline) - self.now) / 1000, joined=True)
        doubts = record.doubts + record.dot
        if doubts > 1 or (doubts == 1 and (code is None or code.value != record.sent)):
            return self._answer(claim, record, ErrorCode.TIMEOUT)
        full = max(self.full.get(claim.canonical, 0), self.now)
        if not record.charged and full - self.now > (POLICY.burst - 1) * POLICY.interval:
            return self._answer(claim, record, ErrorCode.TOO_MANY_REQUESTS, BUCKET_HIT)
        return None

    def _send(self, claim: Claim, record: Record, candidate: str, deadline: float) -> Send:
        key, code = claim.code_key, self.codes.get(claim.code_key)
        if not record.charged:
            self.full[claim.canonical] = max(self.full.get(claim.canonical, 0), self.now) + POLICY.interval
        record.doubts, record.dot = record.doubts + record.dot, False
        if code is None or (record.doubts == 0 and code.end - self.now < POLICY.min_life):
            code = self.codes[key] = Code(candidate, self.now + POLICY.ttl)
        record.token, record.until, record.charged = claim.token, self.now + POLICY.lease, True
        record.sent = code.value
        self._remember(claim, record)
        self.sending[key] = (claim.request_id, record.until)
        return Send(code.value, (code.end - self.now) / 1000, (deadline - self.now) / 1000, record.tries)

    def dot(self, claim: Claim) -> bool:
        record = self._held(claim)
        if record:
            record.dot = True
        return record is not None

    def renew(self, claim: Claim) -> bool:
        record = self._held(claim)
        if record:
            record.until = self.now + POLICY.lease
            if self.sending.get(claim.code_key, ("", 0))[0] == claim.request_id:
                self.sending[claim.code_key] = (claim.request_id, record.until)
        return record is not None

    def settle(self, claim: Claim, became: ErrorCode | str) -> tuple[bool, set[str], int]:
        """Whether the lease was ours; the requests of which so many are woken; how many."""
        record = self._held(claim)
        if record is None:
            return False, set(), 0
        error = became if isinstance(became, ErrorCode) else None
        key, accepted = claim.code_key, error is ErrorCode.SUCCESS
        perhaps = became == UNKNOWN or record.doubts > 0 or (error is ErrorCode.TIMEOUT and record.dot)
        if record.charged and not accepted and not perhaps:
            self.full[claim.canonical] = self.full.get(claim.canonical, 0) - POLICY.interval
            record.charged = False
        record.token, record.dot, record.error = "", False, error
        if error is None:
            record.tries += 1
            record.doubts += became == UNKNOWN
        self._remember(claim, record)
        code = self.codes.get(key)
        live = accepted and code is not None and code.value == record.sent
        if live and code:
            self.cooldowns[key] = (code.value, min(self.now + POLICY.cooldown, code.end))
        if self.sending.get(key, ("", 0))[0] != claim.request_id:
            return True, set(), 0
        del self.sending[key]
        waiting = self.joined.get(key, (set(), 0))[0]
        if live or error in {ErrorCode.MAIL_REJECTED, ErrorCode.INVALID_ADDRESS}:
            self.joined.pop(key, None)
            for request_id in waiting:
                joined = self.records.setdefault(request_id, Record(claim.who, self.now, 0))
                joined.error = error if joined.error is None else joined.error
                joined.token = ""
                joined.end = self.now + POLICY.remember
            return True, waiting, len(waiting)
        unanswered = {i for i in waiting if i not in self.records or self.records[i].error is None}
        return True, unanswered, min(1, len(unanswered))

    def woken(self, key: str, request_id: str | None) -> None:
        """The store chose whom to wake; those whom it passed over were answered long ago, and may be forgotten."""
        if request_id is not None:
            self.joined[key][0].discard(request_id)

    def check(self, key: str, given: str) -> ErrorCode:
        code = self.codes.get(key)
        if code is None:
            return ErrorCode.VARIFY_EXPIRED
        if given == code.value:
            del self.codes[key]
            return ErrorCode.SUCCESS
        code.wrong += 1
        if code.wrong == POLICY.max_attempts:
            del self.codes[key]
        return ErrorCode.VARIFY_CODE_ERR

    def _held(self, claim: Claim) -> Record | None:
        record = self.records.get(claim.request_id)
        return record if record and record.token == claim.token else None

    def _answer(self, claim: Claim, record: Record, error: ErrorCode, why: str = "") -> Answered:
        if record.charged and record.doubts + record.dot == 0:
            self.full[claim.canonical] = self.full.get(claim.canonical, 0) - POLICY.interval
            record.charged = False
        record.error, record.token = error, ""
        self._remember(claim, record)
        return Answered(error, why)

    def _remember(self, claim: Claim, record: Record) -> None:
        record.end = self.now + POLICY.remember
        self.records[claim.request_id] = record


class CodeStoreMachine(RuleBasedStateMachine):
    """Any order of steps by any requests and holders."""

    client: ClassVar[redis_py.Redis]

    @initialize()
    def begin(self) -> None:
        self.client.flushall()
        self.store = store_of(POLICY)
        self.model = Model()
        self.passed = 0
        self.candidates: Iterator[int] = iter(range(1_000_000))

    def run(self, command: Command | Step[Any]) -> Any:
        """One step, and the model's clock at that very moment."""
        if isinstance(command, Step):
            [command] = command.commands
        with self.client.pipeline(transaction=True) as pipe:
            pipe.time()
            pipe.execute_command(*command)  # type: ignore[no-untyped-call]
            (seconds, micros), answer = pipe.execute()
        self.model.at(self.passed + seconds * 1000 + micros // 1000)
        return answer

    def claim(self, request_id: str, token: str) -> Claim:
        """A known id comes with its own address and purpose, as a rule."""
        email, purpose = self.requests[request_id]
        return claim_of(request_id, email, purpose=purpose, token=token)

    @initialize(requests=st.fixed_dictionaries({f"id-{i}": st.tuples(EMAILS, PURPOSES) for i in range(1, 7)}))
    def assign(self, requests: dict[str, tuple[str, str]]) -> None:
        self.requests = requests

    @rule(
        batch=st.lists(
            st.tuples(
                IDS,
                TOKENS,
                st.none() | st.sampled_from([-50_000, 0, 61_000, 135_000, 150_000]),
                st.sampled_from([None] * 9 + [ErrorCode.EXCEPTION]),
            ),
            min_size=1,
            max_size=3,
        )
    )
    def issue(self, batch: list[tuple[str, str, int | None, ErrorCode | None]]) -> None:
        """Some requests at once; each as if it came alone, after those before it."""
        now = self.model.now or self._server_now()
        asked, times = [], []
        for request_id, token, age, verdict in batch:
            enqueued_at = None if age is None else now - age
            server_time = None if enqueued_at is None else (enqueued_at - self.passed) / 1000
            candidate = f"{next(self.candidates):06}"
            asked.append(IssueRequest(self.claim(request_id, token), candidate, verdict, server_time))
            times.append(enqueued_at)
        for entry, each, enqueued_at in zip(self.run(self.store.issue(asked)), asked, times, strict=True):
            found = _read_issue(entry)
            self._compare(found, self.model.issue(each.claim, each.candidate, enqueued_at, each.error))

    @staticmethod
    def _compare(found: Issue, expected: Issue) -> None:
        assert type(found) is type(expected), (found, expected)
        if isinstance(found, Send) and isinstance(expected, Send):
            assert (found.code, found.tries) == (expected.code, expected.tries)
            assert found.life == pytest.approx(expected.life, abs=SLACK / 1000)
            assert found.remaining == pytest.approx(expected.remaining, abs=SLACK / 1000)
        elif isinstance(found, Wait) and isinstance(expected, Wait):
            assert found.seconds == pytest.approx(expected.seconds, abs=SLACK / 1000)
            assert found.joined == expected.joined
        else:
            assert found == expected

    @rule(request_id=IDS, email=EMAILS, purpose=PURPOSES)
    def issue_with_another_address_or_purpose(self, request_id: str, email: str, purpose: str) -> None:
        if request_id in self.model.records and (email, purpose) != self.requests[request_id]:
            claim = claim_of(request_id, email, purpose=purpose)
            found = _read_issue(self.run(self.store.issue([IssueRequest(claim, "none")]))[0])
            if request_id in self.model.records:
                assert found == Conflict()

    @rule(batch=st.lists(st.tuples(IDS, TOKENS, OUTCOMES), min_size=1, max_size=3))
    def settle(self, batch: list[tuple[str, str, ErrorCode | Literal["failed", "unknown"]]]) -> None:
        outcomes = [Outcome(self.claim(request_id, token), became) for request_id, token, became in batch]
        for entry, (claim, became) in zip(self.run(self.store.settle(outcomes)), outcomes, strict=True):
            ours, woken = _read_settle(entry)
            expected_ours, candidates, count = self.model.settle(claim, became)
            assert ours == expected_ours
            assert set(woken) <= candidates
            assert len(woken) == count
            if became not in {ErrorCode.SUCCESS, ErrorCode.MAIL_REJECTED} or claim.code_key in self.model.joined:
                self.model.woken(claim.code_key, woken[0] if woken else None)

    @rule(request_id=IDS, token=TOKENS)
    def dot(self, request_id: str, token: str) -> None:
        claim = self.claim(request_id, token)
        answer = self.run(announce_data(self.store, [claim]))
        assert answer == [int(self.model.dot(claim))]

    @rule(request_id=IDS, token=TOKENS)
    def renew(self, request_id: str, token: str) -> None:
        claim = self.claim(request_id, token)
        answer = self.run(self.store.renew([claim]))
        assert answer == [int(self.model.renew(claim))]

    @rule(email=EMAILS, purpose=PURPOSES, right=st.booleans())
    def check(self, email: str, purpose: str, right: bool) -> None:
        key = code_key(email, purpose)
        given = self.model.codes[key].value if right and key in self.model.codes else "wrong"
        found = ErrorCode(self.run(self.store.check(email, given, purpose)))
        assert found is self.model.check(key, given)

    @rule(email=EMAILS, life=st.sampled_from([35_000, 55_000, 305_000]))
    def write_a_code_from_outside(self, email: str, life: int) -> None:
        key, value = code_key(email), f"old{next(self.candidates)}"
        self.run(("SET", key, value, "PX", life))
        self.model.codes[key] = Code(value, self.model.now + life)

    @rule(dt=st.sampled_from(STEPS))
    def time_passes(self, dt: int) -> None:
        self.client.eval(PASS_TIME, 0, dt)
        self.passed += dt

    @invariant()
    def every_key_has_a_ttl_and_every_code_its_value(self) -> None:
        if not hasattr(self, "model"):
            return
        keys: list[bytes] = self.client.keys()  # type: ignore[assignment]  # this client does not decode
        with self.client.pipeline(transaction=True) as pipe:
            pipe.time()
            for key in keys:
                pipe.pttl(key)
            for key in keys:
                if key.startswith(b"code"):
                    pipe.get(key)
            (seconds, micros), *found = pipe.execute()
        self.model.at(self.passed + seconds * 1000 + micros // 1000)
        assert -1 not in found[: len(keys)]
        stored = {key.decode() for key in keys if key.startswith(b"code")}
        assert stored == set(self.model.codes)
        assert {value.decode() for value in found[len(keys) :]} == {code.value for code in self.model.codes.values()}
        for key, life in zip(keys, found, strict=False):
            if key.startswith(b"code"):
                assert life == pytest.approx(self.model.codes[key.decode()].end - self.model.now, abs=SLACK)

    def _server_now(self) -> float:
        seconds, micros = self.client.time()
        return float(self.passed + seconds * 1000 + micros // 1000)


def test_the_store_does_what_the_model_does(redis: redis_py.Redis) -> None:
    CodeStoreMachine.client = redis
    for command in load_all():
        redis.execute_command(*command)  # type: ignore[no-untyped-call]
    run_state_machine_as_test(
        CodeStoreMachine,
        settings=settings(
            max_examples=150,
            phases=[Phase.reuse, Phase.generate],  # shrinking takes minutes
            stateful_step_count=40,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
