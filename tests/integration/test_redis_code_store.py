"""What only the code store in Redis has: keys, values of other programs, errors of single requests, many clients."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis as redis_py
from support.redis_server import RedisServer
from support.store_driver import EMAIL, KEY, POLICY, RedisDriver, claim_of

from producer.contract import ErrorCode
from producer.errors import RedisUnavailable
from producer.redis.connection import RedisConnections
from producer.store import redis_codes
from producer.store.codes import (
    COOLDOWN_HIT,
    DAY,
    FAILED,
    REFUSED,
    SUPPRESSED_HIT,
    UNKNOWN,
    Answered,
    Bucket,
    CodeStore,
    Conflict,
    IssueRequest,
    Outcome,
    Send,
    Settled,
    StoreError,
    Wait,
)
from producer.store.redis_codes import (
    ATTEMPTS,
    BUCKET,
    COOLDOWN,
    JOINED,
    SENDING,
    SUPPRESSED,
    WRONG,
    RedisCodeStore,
)

CASES = ["anna", "Anna", "aNna", "anNa", "annA", "ANna", "AnNa", "AnnA", "aNNa", "ANNA"]
WRONG_KEY = f"{WRONG}default:{EMAIL}"
LUA = Path(redis_codes.__file__).parent
T = TypeVar("T")


@pytest.fixture
def driver(redis: redis_py.Redis, redis_server: RedisServer) -> Iterator[RedisDriver]:
    """A store with the contract's defaults; `redis` has emptied the server."""
    del redis
    driver = RedisDriver(redis_server)
    yield driver
    driver.close()


@pytest.fixture
def own_driver(new_redis_server: Callable[..., RedisServer]) -> Iterator[RedisDriver]:
    """Likewise, on a server that the test may reconfigure."""
    driver = RedisDriver(new_redis_server())
    yield driver
    driver.close()


def at_once(server: RedisServer, step: Callable[[CodeStore, int], Awaitable[T]]) -> list[T]:
    """Take a hundred steps at the same time, over as many connections."""

    async def main() -> list[T]:
        async with RedisConnections() as connections:
            stores = [RedisCodeStore(connections.connection(server.url(0)), POLICY) for _ in range(100)]
            return await asyncio.gather(*(step(store, number) for number, store in enumerate(stores)))

    return asyncio.run(main())


# --- many clients at once ---


def test_of_a_hundred_requests_at_once_one_sends(driver: RedisDriver, redis_server: RedisServer) -> None:
    found = at_once(redis_server, lambda store, i: store.issue([IssueRequest(claim_of(f"id-{i}"), f"{i:06}")]))
    assert Counter(type(issue) for [issue] in found) == {Send: 1, Wait: 99}
    assert driver.client.scard(JOINED + KEY) == 99


@pytest.mark.parametrize(
    ("given", "results"),
    [
        ("123456", {ErrorCode.SUCCESS: 1, ErrorCode.VARIFY_EXPIRED: 99}),
        ("000000", {ErrorCode.VARIFY_CODE_ERR: 5, ErrorCode.VARIFY_EXPIRED: 95}),
    ],
    ids=["right", "wrong"],
)
def test_of_a_hundred_checks_at_once_each_is_counted(
    given: str, results: dict[ErrorCode, int], driver: RedisDriver, redis_server: RedisServer
) -> None:
    driver.put_code("123456", 600_000)
    found = at_once(redis_server, lambda store, _: store.check(EMAIL, given, "default"))
    assert Counter(result.error for result in found) == results


def test_twenty_spellings_at_once_are_not_twenty_codes(driver: RedisDriver, redis_server: RedisServer) -> None:
    spellings = [f"{name}@{domain}" for name, domain in itertools.product(CASES, ["example.com", "EXAMPLE.com"])]
    for email in spellings:
        driver.put_code("123456", 600_000, email)
    found = at_once(redis_server, lambda store, i: store.check(spellings[i % 20], "000000", "default"))
    assert Counter(checked.error for checked in found) == {ErrorCode.VARIFY_CODE_ERR: 5, ErrorCode.VARIFY_EXPIRED: 95}
    assert not driver.client.keys("code*")


def test_checks_that_race_requests_leave_no_code_that_is_too_short(
    driver: RedisDriver, redis_server: RedisServer
) -> None:
    driver.put_code("123456", 600_000)

    async def step(store: CodeStore, i: int) -> object:
        if i % 2:
            return await store.check(EMAIL, "000000", "default")
        return await store.issue([IssueRequest(claim_of(f"id-{i}"), f"{i:012}")])

    at_once(redis_server, step)
    count, code = driver.client.get(WRONG_KEY), driver.client.get(KEY)
    assert int(count or 0) >= 5
    assert code is None or len(code) == 8


# --- keys ---


def test_gate_server_finds_the_code_under_the_address_byte_for_byte(driver: RedisDriver) -> None:
    email = " Anna@Example.com "
    code = driver.deliver(claim_of("one", email))
    assert driver.client.get(f"code_{email}") == code.encode()
    code = driver.deliver(claim_of("two", email, purpose="reset"))
    assert driver.client.get(f"code:reset:{email}") == code.encode()


def test_no_side_key_begins_like_a_key_that_gate_server_builds(driver: RedisDriver) -> None:
    driver.send(claim_of("one"))
    driver.issue(claim_of("two"))
    driver.check("wrong")
    assert {key.partition(EMAIL.encode())[0] for key in driver.snapshot()} == {
        b"code_",
        b"attempts:code_",
        b"bucket:",
        b"joined:code_",
        b"request:one",
        b"request:two",
        b"sending:code_",
        b"wrong:default:",
    }
    driver.settle(claim_of("one"))
    assert driver.client.exists(COOLDOWN + KEY)


def test_without_a_client_and_a_total_there_is_one_bucket(driver: RedisDriver) -> None:
    driver.send(claim_of("one"))
    assert driver.client.keys("bucket:*") == [BUCKET.encode() + EMAIL.encode()]
    assert driver.client.hget("request:one", "charged") == b"180000"


def test_keys_and_values_hold_a_hash_of_the_client_and_never_its_word(driver: RedisDriver) -> None:
    driver.set_policy(total=Bucket(1_000, 3600))
    driver.send(claim_of("one", client="198.51.100.7"))
    assert len(driver.client.keys("bucket:*")) == 4
    assert b"198.51.100.7" not in repr(driver.snapshot()).encode()
    assert driver.client.object("encoding", "request:one") != b"hashtable"


def test_no_code_and_no_address_is_in_a_request_record(driver: RedisDriver) -> None:
    driver.deliver(claim_of("one"), "123456")
    record = str(driver.client.hgetall("request:one"))
    assert "123456" not in record
    assert "anna" not in record


def test_a_request_that_is_answered_unsent_leaves_only_its_record(driver: RedisDriver) -> None:
    driver.issue(claim_of("one"), error=ErrorCode.EXCEPTION)
    driver.issue(claim_of("two"), enqueued_at=1.0)
    assert set(driver.snapshot()) == {b"request:one", b"request:two"}


def test_attempts_live_no_longer_than_the_code(driver: RedisDriver) -> None:
    code = driver.deliver(claim_of("one"))
    driver.pass_time(300_000)
    driver.check("wrong")
    assert 0 < driver.client.pttl(ATTEMPTS + KEY) <= 300_000
    driver.check(code)
    assert not driver.client.exists(KEY, ATTEMPTS + KEY)


def test_the_usual_request_reads_the_count_in_a_read_that_happens_anyway(driver: RedisDriver) -> None:
    driver.deliver(claim_of("before"))  # loads the scripts
    driver.client.config_resetstat()
    with driver.client.monitor() as monitor:  # type: ignore[no-untyped-call]
        driver.send(claim_of("one", "b@example.com"))
        driver.client.ping()
        lines = itertools.takewhile(lambda line: line["command"] != "PING", monitor.listen())
        commands = [line["command"] for line in lines if line["client_type"] == "lua"]
    reads = [each for each in commands if f"{WRONG}default:b@example.com" in each]
    assert [each.split()[0] for each in commands] == ["TIME", "HGETALL", "MGET", *["SET"] * 2, "HSET", "PEXPIRE", "SET"]
    assert reads == [commands[2]]


def test_a_full_bucket_is_no_key(driver: RedisDriver) -> None:
    driver.deliver(claim_of("one"))
    assert 179_000 < driver.client.pttl(BUCKET + EMAIL) <= 180_000
    driver.send(claim_of("two", purpose="reset"))
    driver.pass_time(300_000)
    driver.settle(claim_of("two", purpose="reset"), FAILED)
    assert not driver.client.exists(BUCKET + EMAIL)


def test_the_record_of_a_joined_request_is_written_anew_if_it_was_forgotten(driver: RedisDriver) -> None:
    driver.send(claim_of("one"))
    driver.issue(claim_of("two"))
    driver.client.delete("request:two")
    assert driver.settle(claim_of("one")) == ["two"]
    assert driver.issue(claim_of("two", "b@example.com")) == Conflict()
    assert driver.answer_of(claim_of("two")) is ErrorCode.SUCCESS
    assert driver.client.pttl("request:two") > 3_599_000


def test_an_answer_that_only_a_newer_worker_knows_is_read_as_an_exception(driver: RedisDriver) -> None:
    driver.deliver(claim_of("one"))
    driver.client.hset("request:one", "error", 8)
    assert driver.issue(claim_of("one")) == Answered(ErrorCode.EXCEPTION)


# --- values that other programs wrote ---


def test_a_code_that_is_not_unicode_is_reused_byte_for_byte(driver: RedisDriver) -> None:
    driver.client.set(KEY, b"\xff\x00\xfe", px=300_000)
    assert driver.send(claim_of("one")).code.encode("utf-8", "surrogateescape") == b"\xff\x00\xfe"


def test_a_code_without_a_ttl_is_replaced_and_never_right(driver: RedisDriver) -> None:
    driver.client.set(KEY, "123456")
    driver.without_ttl.add(KEY)
    assert driver.check("123456") is ErrorCode.VARIFY_EXPIRED
    assert list(driver.snapshot()) == [KEY.encode()]
    driver.without_ttl.clear()
    assert driver.send(claim_of("one"), "222222").code == "222222"


def test_a_code_that_lost_its_ttl_starts_no_cooldown_and_is_not_sent_again(driver: RedisDriver) -> None:
    code = driver.send(claim_of("one")).code
    driver.send(claim_of("two", purpose="reset"))
    driver.settle(claim_of("two", purpose="reset"), UNKNOWN)
    for key in (KEY, f"code:reset:{EMAIL}"):
        driver.client.persist(key)
        driver.without_ttl.add(key)
    driver.settle(claim_of("one"))
    assert driver.send(claim_of("three")).code != code
    assert driver.issue(claim_of("two", purpose="reset")) == Answered(ErrorCode.TIMEOUT)


@pytest.mark.parametrize("write", [("SET", ""), ("RPUSH", "123456"), ("SADD", "123456"), ("HSET", "123456", "1")])
def test_an_empty_or_mistyped_code_is_not_live(write: tuple[str, ...], driver: RedisDriver) -> None:
    key = f"code:reset:{EMAIL}"
    name, *values = write
    driver.client.execute_command(name, key, *values)  # type: ignore[no-untyped-call]
    driver.client.pexpire(key, 600_000)
    for given in ("", "123456"):
        assert driver.check(given, purpose="reset") is ErrorCode.VARIFY_EXPIRED
    assert driver.client.keys() == [key.encode()]


@pytest.mark.parametrize("key", [KEY, COOLDOWN + KEY, SENDING + KEY, BUCKET + EMAIL, WRONG_KEY])
def test_a_mistyped_value_is_overwritten(key: str, driver: RedisDriver) -> None:
    driver.client.lpush(key, "no string")
    driver.client.pexpire(key, 60_000)
    if key == KEY:
        driver.client.delete(key)
        driver.client.set(key, "", px=60_000)
    driver.deliver(claim_of("one"))
    driver.check("wrong")
    assert driver.issue(claim_of("two")) == Answered(ErrorCode.SUCCESS, COOLDOWN_HIT)
    assert driver.client.type(key) in {b"string", b"none"}


@pytest.mark.parametrize("text", ["", "refused", "refused soon 600000", "refused 9999999999999", "9999999999999 1 1 1"])
def test_a_suppression_that_cannot_be_read_suppresses_nothing(text: str, driver: RedisDriver) -> None:
    driver.client.set(SUPPRESSED + EMAIL, text, px=60_000)
    driver.send(claim_of("zero", purpose="reset"))
    driver.client.delete(SUPPRESSED + EMAIL)
    driver.client.lpush(SUPPRESSED + EMAIL, text)
    driver.client.pexpire(SUPPRESSED + EMAIL, 60_000)
    driver.refuse(claim_of("one"))
    assert driver.issue(claim_of("two")) == Answered(ErrorCode.MAIL_REJECTED, SUPPRESSED_HIT)


def test_a_suppression_for_another_reason_is_kept_until_its_end(driver: RedisDriver) -> None:
    accepted, refused = claim_of("one"), claim_of("two", purpose="reset")
    driver.issue_all(accepted, refused)
    record = f"manual {driver.now() * 1000 + 60_000:.0f} 60000".encode()
    driver.client.set(SUPPRESSED + EMAIL, record, px=60_000)
    driver.settle(accepted)
    driver.settle_all(Outcome(refused, ErrorCode.MAIL_REJECTED, REFUSED))
    assert driver.client.get(SUPPRESSED + EMAIL) == record
    assert driver.issue(claim_of("three", purpose="login")) == Answered(ErrorCode.MAIL_REJECTED, SUPPRESSED_HIT)


@pytest.mark.parametrize("value", ["many", "", "5"], ids=["no number", "empty", "no ttl"])
def test_a_count_that_no_check_can_have_written_begins_anew(value: str, driver: RedisDriver) -> None:
    driver.client.set(WRONG_KEY, value, px=None if value == "5" else 60_000)
    driver.without_ttl.add(WRONG_KEY)
    driver.put_code("12345678", 600_000)
    driver.check("wrong")
    assert driver.client.get(WRONG_KEY) == b"1"
    assert DAY - 1000 < driver.client.pttl(WRONG_KEY) <= DAY


# --- errors of single requests ---


def claims(count: int) -> list[Any]:
    return [claim_of(f"id-{i}", f"{i}@example.com") for i in range(count)]


def test_a_mistyped_record_affects_only_its_own_request(driver: RedisDriver) -> None:
    three = claims(3)
    driver.client.set("request:id-1", "not a record", px=60_000)
    before, broken, after = driver.issue_all(*three)
    assert [type(before), broken, type(after)] == [Send, StoreError("WRONGTYPE"), Send]
    assert not driver.client.exists("code_1@example.com")
    assert driver.wait(driver.store.announce_data(three)) == [True, StoreError("WRONGTYPE"), True]
    settled = driver.settle_all(*(Outcome(claim, ErrorCode.TIMEOUT) for claim in three))
    held = Settled(held=True, wake=[])
    assert settled == [held, StoreError("WRONGTYPE"), held]
    # Their final dots were announced, so neither was refunded.
    assert driver.client.exists(BUCKET + "0@example.com", BUCKET + "2@example.com") == 2


def test_a_mistyped_record_does_not_cost_the_others_their_leases(driver: RedisDriver) -> None:
    three = claims(3)
    for claim in three:
        driver.send(claim)
    driver.client.delete("request:id-1")
    driver.client.set("request:id-1", "not a record", px=60_000)
    assert driver.renew(*three) == [True, False, True]


def test_a_full_server_lets_what_was_issued_be_sent(own_driver: RedisDriver) -> None:
    own_driver.set_policy(cooldown=0)
    two = claims(2)
    for claim in two:
        own_driver.send(claim)
    own_driver.client.config_set("maxmemory", 1)
    assert own_driver.renew(*two) == [True, True]
    assert own_driver.wait(own_driver.store.announce_data(two)) == [True, True]


def test_mistyped_joins_leave_what_was_written_before(driver: RedisDriver) -> None:
    driver.client.set(JOINED + KEY, "no set", px=60_000)
    other = claim_of("three", "b@example.com")
    one, two, three = driver.issue_all(claim_of("one"), claim_of("two"), other)
    assert [type(one), two, type(three)] == [Send, StoreError("WRONGTYPE"), Send]
    settled = driver.settle_all(Outcome(claim_of("one"), ErrorCode.SUCCESS), Outcome(other, FAILED))
    assert settled == [StoreError("WRONGTYPE"), Settled(held=True, wake=[])]
    assert driver.answer_of(claim_of("one")) is ErrorCode.SUCCESS
    assert driver.issue(claim_of("four")) == Answered(ErrorCode.SUCCESS, COOLDOWN_HIT)


def test_a_full_server_refuses_each_new_request_and_writes_half_of_none(own_driver: RedisDriver) -> None:
    known = claim_of("known", "known@example.com")
    own_driver.deliver(known)
    own_driver.client.config_set("maxmemory", 1)
    before = own_driver.snapshot()
    oom = StoreError("OOM")
    assert own_driver.issue_all(*claims(1), known, claim_of("two")) == [oom, Answered(ErrorCode.SUCCESS), oom]
    assert own_driver.snapshot() == before


def test_a_full_server_records_outcomes_all_the_same(own_driver: RedisDriver) -> None:
    accepted, failed = claim_of("accepted"), claim_of("failed", "b@example.com")
    own_driver.issue_all(accepted, failed, claim_of("joined"))
    own_driver.client.config_set("maxmemory", 1)
    settled = own_driver.settle_all(Outcome(accepted, ErrorCode.SUCCESS), Outcome(failed, FAILED))
    assert settled == [Settled(held=True, wake=["joined"]), Settled(held=True, wake=[])]
    assert [own_driver.answer_of(claim) for claim in (accepted, claim_of("joined"))] == [ErrorCode.SUCCESS] * 2


@pytest.mark.parametrize("command", ["set", "hset", "pexpire"])
def test_a_command_that_the_user_lacks_is_an_error_of_each_request(command: str, own_driver: RedisDriver) -> None:
    client = own_driver.client
    own_driver.without_ttl |= {f"request:id-{i}" for i in range(3)}  # until they are issued again
    client.acl_setuser("default", enabled=True, nopass=True, commands=[f"-{command}"])
    found = own_driver.issue_all(*claims(3))
    assert [type(entry) for entry in found] == [StoreError] * 3
    client.acl_setuser("default", enabled=True, nopass=True, categories=["+@all"])
    assert [type(entry) for entry in own_driver.issue_all(*claims(3))] == [Send] * 3


def test_a_replica_is_an_unavailable_store(own_driver: RedisDriver) -> None:
    own_driver.deliver(claim_of("known"))
    own_driver.client.replicaof("127.0.0.1", 1)
    with pytest.raises(RedisUnavailable):
        own_driver.issue_all(claim_of("known"), *claims(1))


# --- the scripts ---


def flat(answer: Any) -> dict[bytes, Any]:
    """A map as the server sent it, whichever way the client shows it."""
    return answer if isinstance(answer, dict) else dict(zip(answer[::2], answer[1::2], strict=True))


def test_only_commands_of_redis_6_2_are_used(redis: redis_py.Redis) -> None:
    names = set()
    for path in LUA.glob("*.lua"):
        names |= {name.lower() for name in re.findall(r"\bp?call\('(\w+)'", path.read_text())}
        assert not re.findall(r"\b(redis\.p|redis\.|[^.p])call\((?!')", path.read_text()), (
            "a command whose name cannot be read here"
        )
    assert len(names) > 10
    if redis.info("server")["redis_version"] < "7":
        pytest.skip("this server does not tell since when it has its commands")
    redis.set_response_callback("COMMAND", lambda answer, **_: answer)  # its own expects the bare COMMAND's
    docs = flat(redis.execute_command("COMMAND", "DOCS", *names))  # type: ignore[no-untyped-call]
    assert {name.decode() for name in docs} == names
    for name, told in docs.items():
        since = flat(told)[b"since"].decode()
        assert tuple(map(int, since.split("."))) <= (6, 2, 0), f"{name!r} came with {since}"
