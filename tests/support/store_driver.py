"""Drives a code store one blocking step at a time. Its clock can be moved, so no test waits."""

from __future__ import annotations

import asyncio
import copy
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from dataclasses import replace
from typing import Any, TypeVar

from producer.address import parse
from producer.contract import ErrorCode, code_key
from producer.redis.connection import RedisConnections, Step, run_steps
from producer.store.codes import (
    REFUSED,
    Answered,
    Bucket,
    Checked,
    Claim,
    CodePolicy,
    CodeStore,
    Issue,
    IssueRequest,
    Outcome,
    Result,
    Send,
    Settled,
    StoreError,
)
from producer.store.redis_codes import RedisCodeStore
from support.memory_store import Code, MemoryCodeStore
from support.redis_server import RedisServer

T = TypeVar("T")

EMAIL = "anna@example.com"
KEY = code_key(EMAIL)
HOLDER = "this holder"
POLICY = CodePolicy(
    ttl=600_000,
    min_life=60_000,
    cooldown=10_000,
    address=Bucket(180_000, 20),
    max_attempts=5,
    code_length=6,
    code_max_length=12,
    lease=15_000,
    give_up_after=300_000,
    client=Bucket(60_000, 60),
)


def claim_of(
    request_id: str, email: str = EMAIL, *, purpose: str = "default", token: str = HOLDER, client: str | None = None
) -> Claim:
    """A claim as a worker makes it for a request with a valid address."""
    return Claim.of(request_id, token, email, purpose, parse(email).canonical, client)


class Driver(ABC):
    """One store with the contract's defaults, until `set_policy`."""

    store: CodeStore

    def __init__(self) -> None:
        self._runner = asyncio.Runner()
        self._candidates = iter(f"{number:06}{number:06}" for number in range(1_000_000))
        self.policy = POLICY
        self.set_policy()

    def set_policy(self, **changes: Any) -> None:
        """Go on with a policy that differs from the present one."""
        self.policy = replace(self.policy, **changes)
        self._open(self.policy)

    @abstractmethod
    def _open(self, policy: CodePolicy) -> None:
        """Set `store`, on the data that is there already."""

    @abstractmethod
    def now(self) -> float:
        """The store's clock, in Unix seconds."""

    @abstractmethod
    def pass_time(self, ms: int) -> None: ...

    @abstractmethod
    def put_code(self, value: str, life: int, email: str = EMAIL) -> None:
        """Write a code that lives `life` ms, as another program does."""

    @abstractmethod
    def code(self, email: str = EMAIL, purpose: str = "default") -> tuple[str, float] | None:
        """The live code and its life in ms."""

    @abstractmethod
    def snapshot(self) -> Any:
        """Everything in the store, to compare."""

    def close(self) -> None:
        self._runner.close()

    def wait(self, step: Awaitable[T]) -> T:
        async def take() -> T:
            return await step

        return self._runner.run(take())

    def request(self, claim: Claim, candidate: str | None = None, **options: Any) -> IssueRequest:
        """A request, with a candidate that was never used before if none is given."""
        return IssueRequest(claim, candidate or next(self._candidates), **options)

    def issue_all(self, *requests: Claim | IssueRequest) -> list[Issue | StoreError]:
        batch = [self.request(each) if isinstance(each, Claim) else each for each in requests]
        return [*self.wait(self.store.issue(batch))]

    def issue(self, claim: Claim, candidate: str | None = None, **options: Any) -> Issue:
        [found] = self.issue_all(self.request(claim, candidate, **options))
        assert not isinstance(found, StoreError), found
        return found

    def send(self, claim: Claim, candidate: str | None = None, **options: Any) -> Send:
        """Issue, where the lease must be granted."""
        found = self.issue(claim, candidate, **options)
        assert isinstance(found, Send), found
        return found

    def answer_of(self, claim: Claim) -> ErrorCode:
        """The final answer that the store remembers."""
        found = self.issue(claim)
        assert isinstance(found, Answered), found
        return found.error

    def settle_all(self, *outcomes: Outcome) -> list[Settled | StoreError]:
        return [*self.wait(self.store.settle(outcomes))]

    def settle(self, claim: Claim, result: Result = ErrorCode.SUCCESS) -> list[str]:
        """Settle, where the lease must be held. The ids to wake."""
        [found] = self.settle_all(Outcome(claim, result))
        assert isinstance(found, Settled)
        assert found.held
        return found.wake

    def refuse(self, claim: Claim) -> None:
        """Send, and a relay refuses the mailbox for good."""
        self.send(claim)
        assert self.settle_all(Outcome(claim, ErrorCode.MAIL_REJECTED, REFUSED)) == [Settled(held=True, wake=[])]

    def settle_late(self, claim: Claim, result: Result) -> None:
        """Settle, where the lease must be lost: nothing changes."""
        before = self.snapshot()
        assert self.settle_all(Outcome(claim, result)) == [Settled(held=False, wake=[])]
        assert self.snapshot() == before

    def deliver(self, claim: Claim, candidate: str | None = None) -> str:
        """Send, and a relay accepts the mail. The code in it."""
        code = self.send(claim, candidate).code
        self.settle(claim)
        return code

    def announce_data(self, claim: Claim) -> bool | StoreError:
        """Whether the mail may leave."""
        [answer] = self.wait(self.store.announce_data([claim]))
        return answer

    def renew(self, *claims: Claim) -> list[bool]:
        return [*self.wait(self.store.renew(claims))]

    def lapse(self) -> None:
        """Let every lease expire."""
        self.pass_time(self.policy.lease)

    def checked(self, code: str, email: str = EMAIL, purpose: str = "default") -> Checked:
        return self.wait(self.store.check(email, code, purpose))

    def guess(self, times: int, email: str = EMAIL, purpose: str = "default") -> list[ErrorCode]:
        """Check a wrong code so often."""

        async def take() -> list[Checked]:
            async def one() -> Checked:
                return await self.store.check(email, "wrong", purpose)

            return await asyncio.gather(*(one() for _ in range(times)))

        return [checked.error for checked in self.wait(take())]

    def check(self, code: str, email: str = EMAIL, purpose: str = "default") -> ErrorCode:
        return self.checked(code, email, purpose).error


class MemoryDriver(Driver):
    """Drives a `MemoryCodeStore`."""

    store: MemoryCodeStore

    def _open(self, policy: CodePolicy) -> None:
        if not hasattr(self, "store"):
            self.store = MemoryCodeStore(policy)
            self.store.now = 1.7e12
        self.store.policy = policy

    def now(self) -> float:
        return self.store.now / 1000

    def pass_time(self, ms: int) -> None:
        self.store.now += ms

    def put_code(self, value: str, life: int, email: str = EMAIL) -> None:
        self.store.state.codes[code_key(email)] = Code(value, self.store.now + life)

    def code(self, email: str = EMAIL, purpose: str = "default") -> tuple[str, float] | None:
        found = self.store.state.codes.get(code_key(email, purpose))
        return None if found is None else (found.value, found.end - self.store.now)

    def snapshot(self) -> Any:
        return copy.deepcopy(self.store.state)


# Moves everything that the server holds into the past, as its own clock cannot be moved.
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
    elseif string.sub(key, 1, 11) == 'suppressed:' then
        local reason, ends, period = string.match(redis.call('GET', key), '^(%S+) (%d+) (%d+)$')
        redis.call('SET', key, string.format('%s %.0f %s', reason, ends - dt, period), 'KEEPTTL')
    end
    local life = redis.call('PTTL', key)
    if life >= 0 then
        redis.call('PEXPIRE', key, life - dt)
    end
end
"""


class RedisDriver(Driver):
    """Drives a `RedisCodeStore` on a real server. After each step every key must have a time to live."""

    store: RedisCodeStore

    def __init__(self, server: RedisServer) -> None:
        self.client = server.client()
        self._connections = RedisConnections()
        self.connection = self._connections.connection(server.url(0))
        self.without_ttl: set[str] = set()  # keys that a test itself wrote so
        self._passed = 0  # ms
        super().__init__()

    def _open(self, policy: CodePolicy) -> None:
        self.store = RedisCodeStore(self.connection, policy)

    def close(self) -> None:
        super().wait(self._connections.close())
        self.client.close()
        super().close()

    def now(self) -> float:
        return self.clock(self.client.time()) / 1000

    def pass_time(self, ms: int) -> None:
        self.client.eval(PASS_TIME, 0, ms)
        self._passed += ms

    def request(self, claim: Claim, candidate: str | None = None, **options: Any) -> IssueRequest:
        return self.shifted(super().request(claim, candidate, **options))

    def shifted(self, request: IssueRequest) -> IssueRequest:
        """The same request by the server's own clock."""
        times = (at and at - self._passed / 1000 for at in (request.enqueued_at, request.expires_at))
        return IssueRequest(*request[:3], *times)

    def put_code(self, value: str, life: int, email: str = EMAIL) -> None:
        self.client.set(code_key(email), value, px=life)

    def code(self, email: str = EMAIL, purpose: str = "default") -> tuple[str, float] | None:
        key = code_key(email, purpose)
        value: Any = self.client.get(key)
        life: Any = self.client.pttl(key)
        return None if value is None else (value.decode(), life)

    def snapshot(self) -> Any:
        read: dict[Any, Any] = {b"hash": self.client.hgetall, b"set": self.client.smembers, b"string": self.client.get}
        return {key: read[self.client.type(key)](key) for key in self.client.scan_iter(count=1000)}

    def wait(self, step: Awaitable[T]) -> T:
        result = super().wait(step)
        keys = list(self.client.scan_iter(count=1000))
        with self.client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.pttl(key)
            for key, life in zip(keys, pipe.execute(), strict=True):
                assert life != -1 or key.decode() in self.without_ttl, f"{key!r} has no time to live"
                assert not key.startswith(b"code_") or self.client.type(key) == b"string"
        return result

    def timed(self, step: Step[T]) -> tuple[float, T]:
        """Take one step. The clock in ms at that moment, and the result."""
        clock = Step(self.connection, 0, [("TIME",)], lambda answers: answers[0])
        time, result = super().wait(run_steps([clock, step]))
        return self.clock(time), result

    def clock(self, time: tuple[Any, Any]) -> float:
        """The store's clock in ms, from an answer to TIME."""
        seconds, micros = map(int, time)
        return self._passed + seconds * 1000 + micros / 1000
