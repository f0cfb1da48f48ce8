"""The code store in Redis against the one in memory, step by step: any order of steps by any requests and holders.

The memory store's clock is the server's, read in the same write as each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import pytest
import redis as redis_py
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from support.memory_store import Code, MemoryCodeStore
from support.redis_server import RedisServer
from support.store_driver import RedisDriver, claim_of

from producer.address import parse
from producer.contract import ErrorCode, code_key
from producer.redis.connection import Step
from producer.store.codes import (
    DAY,
    FAILED,
    REFUSED,
    RESPELLED,
    UNKNOWN,
    Bucket,
    Claim,
    CodePolicy,
    Conflict,
    IssueRequest,
    Outcome,
    Refusal,
    Result,
    Settled,
)
from producer.store.redis_codes import WRONG

T = TypeVar("T")

SLACK = 100  # ms
# Odd on purpose: with steps of whole 10 s, no two times that are compared come near each other.
POLICY = CodePolicy(
    ttl=605_000,
    min_life=42_500,
    cooldown=17_500,
    address=Bucket(33_700, 3),
    max_attempts=3,
    code_length=6,
    code_max_length=11,
    lease=23_600,
    give_up_after=142_400,
    remember=3_605_000,
    suppression=151_300,
    longest_suppression=451_100,
    client=Bucket(41_300, 2),
    total=Bucket(7_300, 4),
)
STEPS = [10_000, 20_000, 30_000, 100_000, 300_000, 560_000, 50_000_000]  # ms

EMAILS = st.sampled_from(["anna@example.com", "Anna@example.com"])  # one bucket, two code keys
CLIENTS = st.sampled_from([None, None, "one client", "another"])
PURPOSES = st.sampled_from(["default", "default", "reset"])
IDS = st.sampled_from(["id-1", "id-2", "id-3", "id-4", "id-5", "id-6"])
TOKENS = st.sampled_from(["a", "b"])
RESULTS: st.SearchStrategy[Result] = st.sampled_from(
    [ErrorCode.SUCCESS, ErrorCode.SUCCESS, ErrorCode.MAIL_REJECTED, ErrorCode.TIMEOUT, FAILED, UNKNOWN]
)
REFUSALS: st.SearchStrategy[Refusal] = st.sampled_from(["", REFUSED, RESPELLED])
AGES = st.none() | st.sampled_from([-50_000, 0, 61_000, 135_000, 150_000])  # ms
ERRORS = st.sampled_from([None] * 9 + [ErrorCode.EXCEPTION])


class CodeStoreMachine(RuleBasedStateMachine):
    """Takes each step in both stores and compares."""

    driver: ClassVar[RedisDriver]

    @initialize(requests=st.fixed_dictionaries({f"id-{i}": st.tuples(EMAILS, PURPOSES, CLIENTS) for i in range(1, 7)}))
    def begin(self, requests: dict[str, tuple[str, str, str | None]]) -> None:
        self.driver.client.flushall()
        self.driver.set_policy(**{name: getattr(POLICY, name) for name in POLICY.__slots__})
        self.memory = MemoryCodeStore(POLICY)
        self.requests = requests
        self.candidates: Iterator[int] = iter(range(1_000_000))

    def take(self, step: Step[T]) -> T:
        """One step in Redis; the memory store's clock at that very moment."""
        self.memory.now, result = self.driver.timed(step)
        return result

    def claim(self, request_id: str, token: str) -> Claim:
        """An id comes with its own address and purpose, as a rule."""
        email, purpose, client = self.requests[request_id]
        return claim_of(request_id, email, purpose=purpose, token=token, client=client)

    @rule(batch=st.lists(st.tuples(IDS, TOKENS, AGES, ERRORS), min_size=1, max_size=3))
    def issue(self, batch: list[tuple[str, str, int | None, ErrorCode | None]]) -> None:
        now = self.driver.now()
        requests = [
            IssueRequest(
                self.claim(request_id, token),
                f"{next(self.candidates):06}12345",
                error,
                None if age is None else now - age / 1000,
            )
            for request_id, token, age, error in batch
        ]
        issues = self.take(self.driver.store.issue([self.driver.shifted(request) for request in requests]))
        for found, request in zip(issues, requests, strict=True):
            expected = self.memory.issue_one(request)
            assert type(found) is type(expected), (found, expected)
            assert found == pytest.approx(expected, abs=SLACK / 1000)  # codes and errors exactly

    @rule(request_id=IDS, email=EMAILS, purpose=PURPOSES)
    def issue_with_another_address_or_purpose(self, request_id: str, email: str, purpose: str) -> None:
        if request_id in self.memory.state.records and (email, purpose) != self.requests[request_id][:2]:
            claim = claim_of(request_id, email, purpose=purpose)
            found = self.take(self.driver.store.issue([IssueRequest(claim, "none")]))
            if request_id in self.memory.state.records:
                assert found == [Conflict()]

    @rule(batch=st.lists(st.tuples(IDS, TOKENS, RESULTS, REFUSALS), min_size=1, max_size=3))
    def settle(self, batch: list[tuple[str, str, Result, Refusal]]) -> None:
        outcomes = [
            Outcome(
                self.claim(request_id, token),
                result,
                refusal if result is ErrorCode.MAIL_REJECTED else "",
            )
            for request_id, token, result, refusal in batch
        ]
        settled = self.take(self.driver.store.settle(outcomes))
        for found, outcome in zip(settled, outcomes, strict=True):
            assert isinstance(found, Settled)
            answered = {each for each, record in self.memory.state.records.items() if record.error is not None}
            expected = self.memory.settle_one(outcome, wake=found.wake[0] if len(found.wake) == 1 else None)
            assert found.held == expected.held
            # Redis may have forgotten that a request joined which was answered long ago: it need not be woken.
            assert set(found.wake) - answered == set(expected.wake) - answered

    @rule(request_id=IDS, token=TOKENS)
    def announce_data(self, request_id: str, token: str) -> None:
        claim = self.claim(request_id, token)
        assert self.take(self.driver.store.announce_data([claim])) == [self.memory.announce_one(claim)]

    @rule(request_id=IDS, token=TOKENS)
    def renew(self, request_id: str, token: str) -> None:
        claim = self.claim(request_id, token)
        assert self.take(self.driver.store.renew([claim])) == [self.memory.renew_one(claim)]

    @rule(email=EMAILS, purpose=PURPOSES, right=st.booleans())
    def check(self, email: str, purpose: str, right: bool) -> None:
        key = code_key(email, purpose)
        codes = self.memory.state.codes
        given = codes[key].value if right and key in codes else "wrong"
        found = self.take(self.driver.store.check(email, given, purpose))
        assert found == self.memory.check_one(email, purpose, given)

    @rule(email=EMAILS, purpose=PURPOSES, count=st.sampled_from([2, 300, 302, 30_302, 330_303, 9_000_000]))
    def strangers_have_checked(self, email: str, purpose: str, count: int) -> None:
        wrong = f"{purpose}:{parse(email).canonical}"
        self.driver.client.set(WRONG + wrong, count, px=DAY)
        self.take(self.driver.store.renew([]))
        self.memory.state.wrong[wrong] = (count, self.memory.now + DAY)

    @rule(email=EMAILS, life=st.sampled_from([35_000, 55_000, 305_000]))
    def write_a_code_from_outside(self, email: str, life: int) -> None:
        value = f"old{next(self.candidates)}"
        self.driver.put_code(value, life, email)
        self.take(self.driver.store.renew([]))
        self.memory.state.codes[code_key(email)] = Code(value, self.memory.now + life)

    @rule(dt=st.sampled_from(STEPS))
    def time_passes(self, dt: int) -> None:
        self.driver.pass_time(dt)

    @invariant()
    def every_key_has_a_ttl_and_every_code_its_value(self) -> None:
        if not hasattr(self, "memory"):
            return
        client = self.driver.client
        keys: list[Any] = client.keys()
        codes = [key for key in keys if key.startswith(b"code")]
        with client.pipeline(transaction=True) as pipe:
            pipe.time()
            for key in keys:
                pipe.pttl(key)
            for key in codes:
                pipe.get(key)
            time, *found = pipe.execute()
        self.memory.now = self.driver.clock(time)
        lives = dict(zip(keys, found, strict=False))
        assert -1 not in lives.values()
        ends = {key.decode().removeprefix(WRONG): life for key, life in lives.items() if key.startswith(WRONG.encode())}
        wrong = {key: end - self.memory.now for key, (_, end) in self.memory.state.wrong.items()}
        assert ends == pytest.approx(wrong, abs=SLACK)
        expected = self.memory.state.codes
        assert {key.decode(): value.decode() for key, value in zip(codes, found[len(keys) :], strict=True)} == {
            key: code.value for key, code in expected.items()
        }
        for key in codes:
            assert lives[key] == pytest.approx(expected[key.decode()].end - self.memory.now, abs=SLACK)


@pytest.mark.parametrize("examples", [30, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_the_store_in_redis_does_what_the_store_in_memory_does(
    redis: redis_py.Redis, redis_server: RedisServer, examples: int
) -> None:
    del redis  # it has emptied the server
    CodeStoreMachine.driver = RedisDriver(redis_server)
    try:
        run_state_machine_as_test(
            CodeStoreMachine,
            settings=settings(
                max_examples=examples,
                phases=[Phase.reuse, Phase.generate],  # shrinking takes minutes
                stateful_step_count=40,
                suppress_health_check=[HealthCheck.too_slow],
            ),
        )
    finally:
        CodeStoreMachine.driver.close()
