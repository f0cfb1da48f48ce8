"""What the code store holds, on a real server. Times are short or put back by hand; the server's clock is real."""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from redis.exceptions import OutOfMemoryError
from support.redis_server import RedisServer
from support.store_driver import (
    EMAIL,
    POLICY,
    Driver,
    _read_issue,
    _read_settle,
    announce_data,
    claim_of,
    is_error,
    run,
    store_of,
)

from producer.contract import ErrorCode, code_key
from producer.settings import load
from producer.store import redis_codes as codes
from producer.store.codes import (
    BUCKET_HIT,
    COOLDOWN_HIT,
    FAILED,
    UNKNOWN,
    Answered,
    Claim,
    CodePolicy,
    Conflict,
    IssueRequest,
    Outcome,
    Send,
    Wait,
)

KEY = f"code_{EMAIL}"
LUA = Path(codes.__file__).parent


@pytest.fixture
def driver(redis: redis_py.Redis) -> Driver:
    """A store with the contract's defaults."""
    return Driver(redis)


def with_policy(client: redis_py.Redis, **changes: int) -> Driver:
    return Driver(client, dataclasses.replace(POLICY, **changes))


def now(client: redis_py.Redis) -> float:
    seconds, micros = client.time()
    return float(seconds + micros / 1e6)


def at_once(server: RedisServer, commands: list[Any]) -> list[Any]:
    """Run all commands at the same time, each on a connection of its own."""

    def one(command: Any) -> Any:
        with server.client() as client:
            client.ping()
            return run(client, command)

    with ThreadPoolExecutor(50) as pool:
        return list(pool.map(one, commands))


# --- the policy ---


def test_the_contracts_defaults_are_the_default_policy() -> None:
    assert CodePolicy.of(load({}, dotenv=None)) == POLICY


def test_the_minimum_life_is_never_more_than_a_tenth_of_the_ttl() -> None:
    assert CodePolicy.of(load({"VERIFY_CODE_TTL": "100"}, dotenv=None)).min_life == 10_000


def test_no_sends_per_hour_means_no_bucket() -> None:
    assert CodePolicy.of(load({"VERIFY_MAX_SENDS_PER_HOUR": "0"}, dotenv=None)).interval == 0


# --- get or create ---


def test_the_first_request_creates_the_code_where_gate_server_reads_it(driver: Driver) -> None:
    found = driver.send(claim_of("one"), "123456")
    assert found.code == "123456"
    assert driver.client.get(KEY) == b"123456"
    assert 599 < found.life <= 600
    assert 599_000 < driver.client.pttl(KEY) <= 600_000


def test_the_next_request_gets_the_same_code(driver: Driver) -> None:
    code = driver.send(claim_of("one")).code
    driver.failed(claim_of("one"))
    assert driver.send(claim_of("two")).code == code


def test_a_resend_never_moves_the_expiry(driver: Driver) -> None:
    driver.send(claim_of("one"))
    driver.failed(claim_of("one"))
    driver.client.pexpire(KEY, 300_000)
    assert 299 < driver.send(claim_of("two")).life <= 300
    assert driver.client.pttl(KEY) <= 300_000


def test_a_hundred_requests_at_once_get_one_value(redis: redis_py.Redis, redis_server: RedisServer) -> None:
    store = store_of(dataclasses.replace(POLICY, cooldown=0, burst=1000))
    commands = [store.issue([IssueRequest(claim_of(f"id-{i}"), f"{i:06}")]) for i in range(100)]
    found = [_read_issue(entry) for [entry] in at_once(redis_server, commands)]
    assert {issue.code for issue in found if isinstance(issue, Send)} == {redis.get(KEY).decode()}  # type: ignore[union-attr]
    assert len([issue for issue in found if isinstance(issue, Send)]) == 100


def test_of_a_hundred_requests_at_once_one_sends_while_a_cooldown_is_set(
    redis: redis_py.Redis, redis_server: RedisServer
) -> None:
    store = store_of(POLICY)
    commands = [store.issue([IssueRequest(claim_of(f"id-{i}"), f"{i:06}")]) for i in range(100)]
    found = Counter(type(_read_issue(entry)) for [entry] in at_once(redis_server, commands))
    assert found == {Send: 1, Wait: 99}
    assert redis.scard(codes.JOINED + KEY) == 99


def test_a_code_with_less_than_the_minimum_life_is_replaced(driver: Driver) -> None:
    driver.client.set(KEY, "111111", px=59_000)
    assert driver.send(claim_of("one"), "222222").code == "222222"
    assert driver.client.pttl(KEY) > 599_000


def test_a_code_with_the_minimum_life_is_reused(driver: Driver) -> None:
    driver.client.set(KEY, "111111", px=61_000)
    assert driver.send(claim_of("one"), "222222").code == "111111"


def test_a_code_without_a_ttl_is_replaced(driver: Driver) -> None:
    driver.client.set(KEY, "a1b2")
    assert driver.send(claim_of("one"), "222222").code == "222222"
    assert driver.client.pttl(KEY) > 0


def test_a_live_code_of_the_old_server_is_reused(driver: Driver) -> None:
    driver.client.set(KEY, "a1b2", px=300_000)
    found = driver.send(claim_of("one"), "222222")
    assert found.code == "a1b2"
    assert 299 < found.life <= 300


def test_each_purpose_has_a_code_of_its_own(driver: Driver) -> None:
    driver.deliver(claim_of("one"), "111111")
    assert driver.deliver(claim_of("two", purpose="reset"), "222222") == "222222"
    assert driver.client.get(KEY) == b"111111"
    assert driver.client.get(f"code:reset:{EMAIL}") == b"222222"
    assert driver.check("222222") is ErrorCode.VARIFY_CODE_ERR
    assert driver.check("222222", purpose="reset") is ErrorCode.SUCCESS


def test_the_code_key_is_the_address_byte_for_byte(driver: Driver) -> None:
    driver.send(claim_of("one", " Anna@Example.com "))
    assert driver.client.exists("code_ Anna@Example.com ")


# --- cooldown ---


def test_within_the_cooldown_a_request_is_answered_success_without_a_mail(driver: Driver) -> None:
    driver.deliver(claim_of("one"))
    assert driver.issue(claim_of("two")) == Answered(ErrorCode.SUCCESS, COOLDOWN_HIT)
    assert driver.issue(claim_of("two")) == Answered(ErrorCode.SUCCESS)  # known by now: no second hit


def test_after_the_cooldown_the_same_code_is_sent_again(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, cooldown=50)
    code = driver.deliver(claim_of("one"))
    time.sleep(0.06)
    assert driver.send(claim_of("two")).code == code


def test_the_cooldown_lasts_as_long_as_it_is_set_to(driver: Driver) -> None:
    driver.deliver(claim_of("one"))
    assert 9_000 < driver.client.pttl(codes.COOLDOWN + KEY) <= 10_000


@pytest.mark.parametrize("outcome", ["failed", "unknown", "rejected", "given up"])
def test_only_an_accepted_mail_starts_a_cooldown(outcome: str, driver: Driver) -> None:
    claim = claim_of("one")
    driver.send(claim)
    match outcome:
        case "failed":
            driver.failed(claim)
        case "unknown":
            driver.unknown(claim)
        case "rejected":
            driver.answered(claim, ErrorCode.MAIL_REJECTED)
        case _:
            driver.answered(claim, ErrorCode.TIMEOUT)
    assert isinstance(driver.issue(claim_of("two")), Send)


def test_a_consumed_code_ends_the_cooldown(driver: Driver) -> None:
    code = driver.deliver(claim_of("one"))
    assert driver.check(code) is ErrorCode.SUCCESS
    assert driver.send(claim_of("two")).code != code


def test_a_code_replaced_from_outside_ends_the_cooldown(driver: Driver) -> None:
    driver.deliver(claim_of("one"))
    driver.client.set(KEY, "a1b2", px=300_000)
    assert driver.send(claim_of("two")).code == "a1b2"


def test_no_cooldown_starts_if_the_code_was_consumed_before_the_mail_was_accepted(driver: Driver) -> None:
    code = driver.send(claim_of("one")).code
    driver.check(code)
    driver.accepted(claim_of("one"))
    assert isinstance(driver.issue(claim_of("two")), Send)


def test_no_cooldown_starts_if_the_code_was_replaced_before_the_mail_was_accepted(driver: Driver) -> None:
    driver.send(claim_of("one"))
    driver.client.set(KEY, "a1b2", px=300_000)
    driver.accepted(claim_of("one"))
    assert driver.send(claim_of("two")).code == "a1b2"


def test_no_cooldown_starts_if_the_code_in_the_mail_is_without_ttl(driver: Driver) -> None:
    code = driver.send(claim_of("one")).code
    driver.client.persist(KEY)
    driver.outside.add(KEY.encode())
    driver.accepted(claim_of("one"))
    assert driver.send(claim_of("two")).code != code


def test_the_cooldown_ends_with_the_code(driver: Driver) -> None:
    driver.send(claim_of("one"))
    driver.client.pexpire(KEY, 5_000)
    driver.accepted(claim_of("one"))
    assert 4_000 < driver.client.pttl(codes.COOLDOWN + KEY) <= 5_000


def test_the_cooldown_goes_by_the_code_key(driver: Driver) -> None:
    driver.deliver(claim_of("one"))
    assert isinstance(driver.issue(claim_of("two", purpose="reset")), Send)
    assert isinstance(driver.issue(claim_of("three", "Anna@example.com")), Send)


def test_without_a_cooldown_every_request_sends(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, cooldown=0)
    code = driver.send(claim_of("one")).code
    assert driver.send(claim_of("two")).code == code
    driver.accepted(claim_of("one"))
    assert driver.send(claim_of("three")).code == code
    assert not [key for key in driver.everything() if key.startswith((b"cooldown:", b"sending:", b"joined:"))]


def test_a_cooldown_that_was_turned_off_holds_nothing_back(driver: Driver) -> None:
    driver.deliver(claim_of("one"))
    driver.send(claim_of("two", "b@example.com"))
    without = with_policy(driver.client, cooldown=0)
    without.send(claim_of("three"))
    without.send(claim_of("four", "b@example.com"))


# --- the bucket ---


def test_an_empty_bucket_answers_too_many_requests(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, burst=2, cooldown=0)
    driver.deliver(claim_of("one"))
    driver.deliver(claim_of("two"))
    assert driver.issue(claim_of("three")) == Answered(ErrorCode.TOO_MANY_REQUESTS, BUCKET_HIT)
    assert driver.issue(claim_of("three")) == Answered(ErrorCode.TOO_MANY_REQUESTS)  # known by now: no second hit


def test_the_bucket_takes_all_it_holds_at_once(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, cooldown=0)
    found = Counter(type(driver.issue(claim_of(f"id-{i}"))) for i in range(25))
    assert found == {Send: 20, Answered: 5}


def test_one_send_comes_back_each_interval(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, burst=2, cooldown=0, interval=400)
    driver.deliver(claim_of("one"))
    driver.deliver(claim_of("two"))
    assert driver.answer_of(claim_of("three")) is ErrorCode.TOO_MANY_REQUESTS
    time.sleep(0.42)
    driver.deliver(claim_of("four"))
    assert driver.answer_of(claim_of("five")) is ErrorCode.TOO_MANY_REQUESTS


def test_a_full_bucket_is_no_key(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, cooldown=0, interval=30)
    driver.deliver(claim_of("one"))
    assert redis.pttl(codes.BUCKET + EMAIL) <= 30
    time.sleep(0.04)
    assert not redis.exists(codes.BUCKET + EMAIL)


def test_all_spellings_and_purposes_of_an_address_share_a_bucket(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, burst=3, cooldown=0)
    driver.deliver(claim_of("one", "anna@example.com"))
    driver.deliver(claim_of("two", " Anna@EXAMPLE.com "))
    driver.deliver(claim_of("three", "ANNA@example.com", purpose="reset"))
    assert driver.answer_of(claim_of("four")) is ErrorCode.TOO_MANY_REQUESTS
    assert isinstance(driver.issue(claim_of("five", "anna+tag@example.com")), Send)


def test_a_mail_that_no_relay_accepted_is_refunded(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, burst=1)
    for error in (ErrorCode.MAIL_REJECTED, ErrorCode.TIMEOUT, ErrorCode.INVALID_ADDRESS):
        driver.send(claim_of(error.name))
        driver.answered(claim_of(error.name), error)
    driver.send(claim_of("failed"))
    driver.failed(claim_of("failed"))
    assert isinstance(driver.issue(claim_of("last")), Send)


def test_a_refund_gives_back_one_send_of_several(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, burst=2, cooldown=0)
    driver.deliver(claim_of("one"))
    driver.send(claim_of("two"))
    driver.failed(claim_of("two"))
    assert 179_000 < redis.pttl(codes.BUCKET + EMAIL) <= 180_000
    driver.deliver(claim_of("three"))
    assert driver.answer_of(claim_of("four")) is ErrorCode.TOO_MANY_REQUESTS


def test_a_request_is_refunded_once(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, burst=2, cooldown=0)
    driver.deliver(claim_of("one"))
    driver.send(claim_of("two"))
    driver.failed(claim_of("two"))
    driver.settle_late(Outcome(claim_of("two"), FAILED))
    driver.settle_late(Outcome(claim_of("two"), ErrorCode.TIMEOUT))
    driver.deliver(claim_of("three"))
    assert driver.answer_of(claim_of("four")) is ErrorCode.TOO_MANY_REQUESTS


def test_each_try_after_a_refund_is_charged_again(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, burst=1, cooldown=0)
    for _ in range(3):
        driver.send(claim_of("one"))
        driver.failed(claim_of("one"))
    driver.deliver(claim_of("one"))
    assert driver.answer_of(claim_of("two")) is ErrorCode.TOO_MANY_REQUESTS


def test_a_mail_that_may_have_been_accepted_is_not_refunded_and_its_second_try_not_charged(
    redis: redis_py.Redis,
) -> None:
    driver = with_policy(redis, burst=1, cooldown=0)
    driver.send(claim_of("one"))
    driver.unknown(claim_of("one"))
    driver.send(claim_of("one"))
    driver.failed(claim_of("one"))
    assert driver.answer_of(claim_of("two")) is ErrorCode.TOO_MANY_REQUESTS


def test_a_request_given_up_after_its_final_dot_is_not_refunded(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, burst=1, cooldown=0)
    driver.send(claim_of("one"))
    driver.announce_data(claim_of("one"))
    driver.answered(claim_of("one"), ErrorCode.TIMEOUT)
    assert driver.answer_of(claim_of("two")) is ErrorCode.TOO_MANY_REQUESTS


def test_a_request_whose_worker_died_before_its_mail_left_is_refunded_at_its_deadline(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, burst=1, cooldown=0, lease=1)
    driver.send(claim_of("one"))
    time.sleep(0.01)
    assert driver.issue(claim_of("one"), expires_at=1.0) == Answered(ErrorCode.TIMEOUT)
    assert isinstance(driver.issue(claim_of("two")), Send)


def test_a_takeover_is_not_charged_again(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, burst=1)
    driver.send(claim_of("one", token="a"))
    driver.lapse(claim_of("one"))
    assert isinstance(driver.issue(claim_of("one", token="b")), Send)


def test_a_refund_after_the_bucket_was_full_again_leaves_it_full(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, burst=1, interval=20)
    driver.send(claim_of("one"))
    time.sleep(0.03)
    driver.failed(claim_of("one"))
    assert not redis.exists(codes.BUCKET + EMAIL)


def test_without_a_bucket_nothing_is_counted(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, interval=0, burst=0, cooldown=0)
    for i in range(30):
        driver.deliver(claim_of(f"id-{i}"))
    driver.send(claim_of("last"))
    driver.failed(claim_of("last"))
    assert not redis.exists(codes.BUCKET + EMAIL)


# --- joins ---


def test_a_request_that_meets_anothers_send_waits_at_most_for_its_lease(driver: Driver) -> None:
    driver.send(claim_of("one"))
    found = driver.issue(claim_of("two"))
    assert isinstance(found, Wait)
    assert 14 < found.seconds <= 15


def test_a_joined_request_is_not_charged(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, burst=1)
    driver.send(claim_of("one"))
    assert isinstance(driver.issue(claim_of("two")), Wait)


@pytest.mark.parametrize("error", [ErrorCode.SUCCESS, ErrorCode.MAIL_REJECTED, ErrorCode.INVALID_ADDRESS])
def test_a_final_outcome_wakes_and_answers_all_that_joined(error: ErrorCode, driver: Driver) -> None:
    driver.send(claim_of("one"))
    joined = [f"joined-{i}" for i in range(5)]
    for request_id in joined:
        driver.issue(claim_of(request_id))
    assert sorted(driver.answered(claim_of("one"), error)) == joined
    assert {driver.answer_of(claim_of(request_id)) for request_id in joined} == {error}
    assert not driver.client.exists(codes.JOINED + KEY)


@pytest.mark.parametrize("outcome", ["failed", "unknown", "timeout", "exception"])
def test_another_outcome_wakes_exactly_one_which_may_send(outcome: str, driver: Driver) -> None:
    claim = claim_of("one")
    driver.send(claim)
    for i in range(5):
        driver.issue(claim_of(f"joined-{i}"))
    match outcome:
        case "failed":
            woken = driver.failed(claim)
        case "unknown":
            woken = driver.unknown(claim)
        case "timeout":
            woken = driver.answered(claim, ErrorCode.TIMEOUT)
        case _:
            woken = driver.answered(claim, ErrorCode.EXCEPTION)
    assert len(woken) == 1
    driver.send(claim_of(woken[0]))
    assert len(driver.accepted(claim_of(woken[0]))) == 4


def test_an_accepted_mail_whose_code_is_gone_wakes_one_and_answers_none(driver: Driver) -> None:
    code = driver.send(claim_of("one")).code
    for i in range(3):
        driver.issue(claim_of(f"joined-{i}"))
    driver.check(code)
    (woken,) = driver.accepted(claim_of("one"))
    assert driver.send(claim_of(woken)).code != code


def test_a_failed_send_that_nobody_joined_wakes_nobody(driver: Driver) -> None:
    driver.send(claim_of("one"))
    assert driver.failed(claim_of("one")) == []


def test_a_joined_request_that_was_answered_meanwhile_is_not_woken_to_send(driver: Driver) -> None:
    driver.send(claim_of("one"))
    for i in range(10):
        driver.issue(claim_of(f"joined-{i}"))
    for i in range(9):
        assert driver.issue(claim_of(f"joined-{i}"), error=ErrorCode.TIMEOUT) == Answered(ErrorCode.TIMEOUT)
    assert driver.failed(claim_of("one")) == ["joined-9"]


def test_a_joined_request_keeps_the_answer_that_it_got_meanwhile(driver: Driver) -> None:
    driver.send(claim_of("one"))
    driver.issue(claim_of("two"))
    driver.issue(claim_of("two"), error=ErrorCode.TIMEOUT)
    assert driver.accepted(claim_of("one")) == ["two"]
    assert driver.answer_of(claim_of("two")) is ErrorCode.TIMEOUT


def test_a_joined_request_sends_once_the_senders_lease_lapsed(redis: redis_py.Redis) -> None:
    driver = Driver(redis)
    driver.send(claim_of("one"))
    assert isinstance(driver.issue(claim_of("two")), Wait)
    driver.lapse(claim_of("one"))
    assert isinstance(driver.issue(claim_of("two")), Send)


def test_a_sender_that_was_overtaken_by_another_request_wakes_nobody(redis: redis_py.Redis) -> None:
    driver = Driver(redis)
    driver.send(claim_of("one"))
    driver.lapse(claim_of("one"))
    driver.send(claim_of("two"))
    driver.issue(claim_of("three"))
    assert driver.failed(claim_of("one")) == []
    assert driver.accepted(claim_of("two")) == ["three"]


def test_a_holder_that_stood_still_may_not_send_once_its_request_joined_anothers_send(driver: Driver) -> None:
    driver.send(claim_of("one", token="a"))
    driver.lapse(claim_of("one"))
    driver.send(claim_of("two"))
    assert isinstance(driver.issue(claim_of("one", token="b")), Wait)
    assert not driver.announce_data(claim_of("one", token="a"))
    assert driver.renew(claim_of("one", token="a")) == [0]


def test_an_answer_that_a_joined_request_shares_is_remembered_even_if_the_request_was_forgotten(driver: Driver) -> None:
    driver.send(claim_of("one"))
    driver.issue(claim_of("two"))
    driver.client.delete("request:two")
    assert driver.accepted(claim_of("one")) == ["two"]
    assert driver.issue(claim_of("two", "b@example.com")) == Conflict()
    assert driver.answer_of(claim_of("two")) is ErrorCode.SUCCESS
    assert driver.client.pttl("request:two") > 3_599_000


def test_the_answer_that_a_joined_request_shares_takes_the_lease_from_its_holder(driver: Driver) -> None:
    driver.send(claim_of("one"))
    driver.issue(claim_of("two"))
    driver.lapse(claim_of("one"))
    driver.send(claim_of("two"))
    driver.lapse(claim_of("two"))
    driver.send(claim_of("one"))
    assert driver.accepted(claim_of("one")) == ["two"]
    assert not driver.announce_data(claim_of("two"))


def test_joins_are_per_purpose(driver: Driver) -> None:
    driver.send(claim_of("one"))
    assert isinstance(driver.issue(claim_of("two", purpose="reset")), Send)


# --- batches ---


def batch_of(driver: Driver, *claims: Claim) -> list[Any]:
    """Issue for all of them in one call."""
    return driver.issue_all([driver.asked(claim) for claim in claims])


def test_each_request_of_a_batch_gets_its_own_answer_in_its_place(driver: Driver) -> None:
    driver.deliver(claim_of("known", "known@example.com"))
    asked = [
        IssueRequest(claim_of("one", "a@example.com"), "111111"),
        IssueRequest(claim_of("two", "known@example.com"), "222222"),
        IssueRequest(claim_of("known", "b@example.com"), "333333"),
        IssueRequest(Claim.of("three", "token", "no address", "default", ""), "444444", ErrorCode.INVALID_ADDRESS),
        IssueRequest(claim_of("four", "c@example.com"), "555555", expires_at=1.0),
        IssueRequest(claim_of("five", "d@example.com"), "666666"),
    ]
    one, *others, five = driver.issue_all(asked)
    assert [one.code, five.code] == ["111111", "666666"]  # type: ignore[union-attr]  # they may send, as they say
    assert others == [
        Answered(ErrorCode.SUCCESS, COOLDOWN_HIT),
        Conflict(),
        Answered(ErrorCode.INVALID_ADDRESS),
        Answered(ErrorCode.TIMEOUT),
    ]


def test_of_two_requests_of_a_batch_for_one_address_the_second_joins_the_first(driver: Driver) -> None:
    one, two, other = batch_of(driver, claim_of("one"), claim_of("two"), claim_of("three", "b@example.com"))
    assert isinstance(one, Send)
    assert isinstance(other, Send)
    assert two.joined
    assert driver.accepted(claim_of("one")) == ["two"]


def test_without_a_cooldown_a_batch_for_one_address_sends_one_code(redis: redis_py.Redis) -> None:
    found = batch_of(with_policy(redis, cooldown=0), *(claim_of(f"id-{i}") for i in range(5)))
    assert len({send.code for send in found}) == 1


def test_a_request_that_comes_twice_in_a_batch_is_sent_once(driver: Driver) -> None:
    one, again = batch_of(driver, claim_of("one", token="a"), claim_of("one", token="b"))
    assert isinstance(one, Send)
    assert isinstance(again, Wait)
    assert not again.joined


def test_outcomes_of_a_batch_are_settled_each_in_its_place(driver: Driver) -> None:
    accepted, failed, lost, unknown = (claim_of(f"id-{i}", f"{i}@example.com") for i in range(4))
    batch_of(driver, accepted, failed, unknown)
    batch_of(driver, claim_of("joined", "0@example.com"))
    entries = driver.run(
        driver.store.settle(
            [
                Outcome(accepted, ErrorCode.SUCCESS),
                Outcome(failed, FAILED),
                Outcome(lost, ErrorCode.SUCCESS),
                Outcome(unknown, UNKNOWN),
                Outcome(accepted, ErrorCode.TIMEOUT),
            ]
        )
    )
    assert [_read_settle(entry) for entry in entries] == [
        (True, ["joined"]),
        (True, []),
        (False, []),
        (True, []),
        (False, []),
    ]
    assert driver.answer_of(accepted) is ErrorCode.SUCCESS
    assert [driver.send(claim).tries for claim in (failed, unknown)] == [1, 1]


def test_final_dots_of_a_batch_are_noted_for_whom_has_the_lease(driver: Driver) -> None:
    claims = [claim_of(f"id-{i}", f"{i}@example.com") for i in range(3)]
    batch_of(driver, claims[0], claims[2])
    assert driver.run(announce_data(driver.store, claims)) == [1, 0, 1]


def test_an_empty_batch_is_no_error(driver: Driver) -> None:
    assert [driver.run(command) for command in (driver.store.issue([]), driver.store.settle([]))] == [[], []]
    assert driver.run(announce_data(driver.store, [])) == []


def test_a_record_that_is_none_hits_only_its_own_request(driver: Driver) -> None:
    claims = [claim_of(f"id-{i}", f"{i}@example.com") for i in range(3)]
    driver.client.set("request:id-1", "not a record", px=60_000)
    before, broken, after = batch_of(driver, *claims)
    assert isinstance(before, Send)
    assert isinstance(after, Send)
    assert kind_of(broken) == "WRONGTYPE"
    assert not driver.client.exists("code_1@example.com")
    assert [kind_of(entry) for entry in driver.run(announce_data(driver.store, claims))] == [1, "WRONGTYPE", 1]
    settled = driver.run(driver.store.settle([Outcome(claim, ErrorCode.SUCCESS) for claim in claims]))
    assert [kind_of(entry) for entry in settled] == [[1], "WRONGTYPE", [1]]


def test_joins_that_are_none_leave_what_was_written_before(driver: Driver) -> None:
    driver.client.set(codes.JOINED + KEY, "no set", px=60_000)
    one, two, other = batch_of(driver, claim_of("one"), claim_of("two"), claim_of("three", "b@example.com"))
    assert isinstance(one, Send)
    assert isinstance(other, Send)
    assert kind_of(two) == "WRONGTYPE"
    outcomes = [Outcome(claim_of("one"), ErrorCode.SUCCESS), Outcome(claim_of("three", "b@example.com"), FAILED)]
    assert [kind_of(entry) for entry in driver.run(driver.store.settle(outcomes))] == ["WRONGTYPE", [1]]
    assert driver.answer_of(claim_of("one")) is ErrorCode.SUCCESS
    assert driver.issue(claim_of("four")) == Answered(ErrorCode.SUCCESS, COOLDOWN_HIT)


@pytest.mark.parametrize("key", [KEY, codes.COOLDOWN + KEY, codes.SENDING + KEY, codes.BUCKET + EMAIL])
def test_what_should_be_a_string_and_is_none_is_overwritten(key: str, driver: Driver) -> None:
    driver.client.lpush(key, "no string")
    driver.client.pexpire(key, 60_000)
    driver.deliver(claim_of("one"))
    assert driver.issue(claim_of("two")) == Answered(ErrorCode.SUCCESS, COOLDOWN_HIT)
    assert driver.client.type(key) in {b"string", b"none"}


def test_a_full_server_refuses_each_request_of_a_batch_and_none_is_half_written(
    new_redis_server: Callable[..., RedisServer],
) -> None:
    with new_redis_server().client() as client:
        driver = Driver(client)
        known = claim_of("known", "known@example.com")
        driver.deliver(known)
        client.config_set("maxmemory", 1)
        before = driver.everything()
        one, answered, two = batch_of(driver, claim_of("one"), known, claim_of("two", "b@example.com"))
        assert [kind_of(one), kind_of(two)] == ["OOM", "OOM"]
        assert answered == Answered(ErrorCode.SUCCESS)
        assert driver.everything() == before


def test_outcomes_are_known_even_to_a_full_server(new_redis_server: Callable[..., RedisServer]) -> None:
    with new_redis_server().client() as client:
        driver = Driver(client)
        accepted, failed = claim_of("accepted"), claim_of("failed", "b@example.com")
        batch_of(driver, accepted, failed, claim_of("joined"))
        client.config_set("maxmemory", 1)
        assert driver.run(driver.store.settle([Outcome(accepted, ErrorCode.SUCCESS), Outcome(failed, FAILED)])) == [
            [1, b"joined"],
            [1],
        ]
        assert [driver.answer_of(claim) for claim in (accepted, claim_of("joined"))] == [ErrorCode.SUCCESS] * 2


@pytest.mark.parametrize("command", ["set", "hset", "pexpire"])
def test_a_command_that_is_refused_is_an_error_of_each_request(
    command: str, new_redis_server: Callable[..., RedisServer]
) -> None:
    server = new_redis_server()
    with server.client() as client:
        client.acl_setuser("default", enabled=True, nopass=True, commands=[f"-{command}"])
        store = store_of(POLICY)
        claims = [claim_of(f"id-{i}", f"{i}@example.com") for i in range(3)]
        found = run(client, store.issue([IssueRequest(claim, "123456") for claim in claims]))
        assert [is_error(entry) for entry in found] == [True] * 3
        client.acl_setuser("default", enabled=True, nopass=True, categories=["+@all"])
        assert all(isinstance(found, Send) for found in batch_of(Driver(client), *claims))


def test_a_replica_refuses_the_batch_as_a_whole(new_redis_server: Callable[..., RedisServer]) -> None:
    with new_redis_server().client() as client:
        driver = Driver(client)
        driver.deliver(claim_of("known"))
        client.replicaof("127.0.0.1", 1)
        with pytest.raises(redis_py.ReadOnlyError):
            batch_of(driver, claim_of("known"), claim_of("one", "b@example.com"))


def kind_of(entry: Any) -> Any:
    """The first word of an error, or the class that this client makes of it; what is no error as it is."""
    if isinstance(entry, OutOfMemoryError):
        return "OOM"
    return str(entry).partition(" ")[0] if is_error(entry) else entry


# --- leases ---


def test_the_same_id_under_another_token_waits_for_the_lease(driver: Driver) -> None:
    driver.send(claim_of("one", token="a"))
    found = driver.issue(claim_of("one", token="b"))
    assert isinstance(found, Wait)
    assert 14 < found.seconds <= 15


def test_the_same_id_under_the_same_token_goes_on(driver: Driver) -> None:
    code = driver.send(claim_of("one")).code
    assert driver.send(claim_of("one")).code == code


def test_a_lapsed_lease_is_taken_over_with_the_same_code(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, lease=20)
    code = driver.send(claim_of("one", token="a")).code
    time.sleep(0.03)
    assert driver.send(claim_of("one", token="b")).code == code


def test_a_renewed_lease_lasts_its_whole_length_again(driver: Driver) -> None:
    one, two = claim_of("one"), claim_of("two", "b@example.com")
    for claim in (one, two):
        driver.send(claim)
        soon = round((now(driver.client) + 2) * 1000)
        driver.client.hset(codes.REQUEST + claim.request_id, "until", soon)
        driver.client.pexpire(codes.SENDING + claim.code_key, 2_000)
    assert driver.renew(one, two) == [1, 1]
    for waiting in (claim_of("one", token="other"), claim_of("joining"), claim_of("joining too", "b@example.com")):
        found = driver.issue(waiting)
        assert isinstance(found, Wait)
        assert found.seconds > 14


def test_a_lost_lease_is_not_renewed(redis: redis_py.Redis) -> None:
    driver = Driver(redis)
    kept = claim_of("kept", "b@example.com")
    driver.send(claim_of("one", token="a"))
    driver.lapse(claim_of("one"))
    driver.send(claim_of("one", token="b"))
    driver.send(kept)
    assert driver.renew(claim_of("one", token="a"), kept, claim_of("never")) == [0, 1, 0]


def test_renewing_does_not_prolong_the_send_of_another_request(redis: redis_py.Redis) -> None:
    driver = Driver(redis)
    driver.send(claim_of("one"))
    driver.lapse(claim_of("one"))
    driver.send(claim_of("two"))
    redis.pexpire(codes.SENDING + KEY, 5_000)
    driver.renew(claim_of("one"))
    assert redis.pttl(codes.SENDING + KEY) <= 5_000


def test_renewing_nothing_is_no_error(driver: Driver) -> None:
    assert driver.renew() == []


@pytest.mark.parametrize("outcome", ["accepted", "failed", "unknown"])
def test_a_holder_that_lost_its_lease_changes_nothing(outcome: str, redis: redis_py.Redis) -> None:
    driver = Driver(redis)
    stale = claim_of("one", token="a")
    driver.send(stale)
    driver.lapse(stale)
    driver.send(claim_of("one", token="b"))
    match outcome:
        case "accepted":
            driver.settle_late(Outcome(stale, ErrorCode.SUCCESS))
        case "failed":
            driver.settle_late(Outcome(stale, FAILED))
        case _:
            driver.settle_late(Outcome(stale, UNKNOWN))
    assert not driver.announce_data(stale)


def test_a_request_that_never_had_a_lease_settles_nothing(driver: Driver) -> None:
    driver.settle_late(Outcome(claim_of("never"), FAILED))
    assert not driver.announce_data(claim_of("never"))
    assert driver.everything() == {}


def test_a_settled_request_settles_once(driver: Driver) -> None:
    driver.deliver(claim_of("one"))
    driver.settle_late(Outcome(claim_of("one"), ErrorCode.TIMEOUT))
    assert driver.answer_of(claim_of("one")) is ErrorCode.SUCCESS


def test_a_failed_request_can_be_tried_at_once_by_any_holder(driver: Driver) -> None:
    driver.send(claim_of("one", token="a"))
    driver.failed(claim_of("one", token="a"))
    assert isinstance(driver.issue(claim_of("one", token="b")), Send)


def test_the_tries_that_failed_are_counted(driver: Driver) -> None:
    assert driver.send(claim_of("one")).tries == 0
    driver.failed(claim_of("one"))
    assert driver.send(claim_of("one")).tries == 1
    driver.unknown(claim_of("one"))
    assert driver.send(claim_of("one")).tries == 2


# --- the final dot ---


def test_the_holder_of_the_lease_may_write_the_final_dot(driver: Driver) -> None:
    driver.send(claim_of("one"))
    assert driver.announce_data(claim_of("one"))
    assert driver.announce_data(claim_of("one"))


@pytest.mark.parametrize("dies", [False, True], ids=["connection lost", "worker died"])
def test_what_may_have_been_accepted_is_sent_once_more_with_the_same_code_then_given_up(
    dies: bool, redis: redis_py.Redis
) -> None:
    driver = Driver(redis)

    def ambiguous(claim: Claim) -> str:
        code = driver.send(claim).code
        driver.announce_data(claim)
        if dies:
            driver.lapse(claim)
        else:
            driver.unknown(claim)
        return code

    code = ambiguous(claim_of("one", token="a"))
    redis.pexpire(KEY, 5_000)  # below the minimum life, where any other request would get a fresh code
    assert ambiguous(claim_of("one", token="b")) == code
    assert driver.issue(claim_of("one", token="c")) == Answered(ErrorCode.TIMEOUT)
    assert driver.answer_of(claim_of("one")) is ErrorCode.TIMEOUT


@pytest.mark.parametrize("fate", ["gone", "replaced", "without ttl"])
def test_what_may_have_been_accepted_is_given_up_if_its_code_is_no_more(fate: str, driver: Driver) -> None:
    code = driver.send(claim_of("one")).code
    driver.announce_data(claim_of("one"))
    driver.unknown(claim_of("one"))
    match fate:
        case "gone":
            driver.check(code)
        case "replaced":
            driver.client.set(KEY, "a1b2", px=300_000)
        case _:
            driver.client.persist(KEY)
            driver.outside.add(KEY.encode())
    assert driver.issue(claim_of("one")) == Answered(ErrorCode.TIMEOUT)


def test_a_send_that_certainly_failed_after_its_final_dot_leaves_no_doubt(driver: Driver) -> None:
    for _ in range(4):
        driver.send(claim_of("one"))
        driver.announce_data(claim_of("one"))
        driver.failed(claim_of("one"))
    assert isinstance(driver.issue(claim_of("one")), Send)


def test_several_relays_asked_in_one_send_make_one_doubt(driver: Driver) -> None:
    driver.send(claim_of("one"))
    for _ in range(3):
        driver.announce_data(claim_of("one"))
    driver.unknown(claim_of("one"))
    assert isinstance(driver.issue(claim_of("one")), Send)


def test_a_later_send_that_failed_does_not_remove_an_earlier_doubt(driver: Driver) -> None:
    code = driver.send(claim_of("one")).code
    driver.announce_data(claim_of("one"))
    driver.unknown(claim_of("one"))
    driver.send(claim_of("one"))
    driver.failed(claim_of("one"))
    driver.client.pexpire(KEY, 5_000)
    assert driver.send(claim_of("one")).code == code
    driver.announce_data(claim_of("one"))
    driver.unknown(claim_of("one"))
    assert driver.issue(claim_of("one")) == Answered(ErrorCode.TIMEOUT)


# --- request ids ---


@pytest.mark.parametrize("other", [("b@example.com", "default"), (EMAIL, "reset"), ("Anna@example.com", "default")])
def test_the_same_id_with_another_address_or_purpose_is_a_conflict_and_changes_nothing(
    other: tuple[str, str], driver: Driver
) -> None:
    driver.send(claim_of("one"))
    before = driver.everything()
    assert driver.issue(claim_of("one", other[0], purpose=other[1])) == Conflict()
    assert driver.issue(claim_of("one", other[0], purpose=other[1]), error=ErrorCode.EXCEPTION) == Conflict()
    assert driver.everything() == before


@pytest.mark.parametrize("error", list(ErrorCode)[:7])
def test_a_verdict_is_remembered_and_sends_nothing(error: ErrorCode, driver: Driver) -> None:
    assert driver.issue(claim_of("one"), error=error) == Answered(error)
    assert driver.answer_of(claim_of("one")) is error
    assert list(driver.everything()) == [b"request:one"]


def test_a_verdict_takes_the_lease_from_its_holder(driver: Driver) -> None:
    driver.send(claim_of("one"))
    driver.issue(claim_of("one"), error=ErrorCode.EXCEPTION)
    assert not driver.announce_data(claim_of("one"))
    assert driver.renew(claim_of("one")) == [0]


def test_an_answer_is_remembered_for_an_hour(driver: Driver) -> None:
    driver.send(claim_of("one"))
    driver.client.pexpire("request:one", 5_000)
    driver.accepted(claim_of("one"))
    assert 3_599_000 < driver.client.pttl("request:one") <= 3_600_000


@pytest.mark.parametrize(
    "email", ["", "no address", "a@\ud800", "\ud800", "a\r\nb", "x" * 10_000, None, 7, [], {"a": 1}]
)
def test_a_verdict_is_remembered_of_whatever_came_for_an_address(email: object, driver: Driver) -> None:
    claim = Claim.of("one", "token", email, "default", "")
    assert driver.issue(claim, error=ErrorCode.INVALID_ADDRESS) == Answered(ErrorCode.INVALID_ADDRESS)
    assert list(driver.everything()) == [b"request:one"]


@pytest.mark.parametrize("purpose", ["", "two words", "\ud800", None, 7, ["reset"]])
def test_a_verdict_is_remembered_of_whatever_came_for_a_purpose(purpose: object, driver: Driver) -> None:
    claim = Claim.of("one", "token", EMAIL, purpose, EMAIL)
    assert driver.issue(claim, error=ErrorCode.EXCEPTION) == Answered(ErrorCode.EXCEPTION)
    assert list(driver.everything()) == [b"request:one"]


def test_no_code_and_no_address_is_in_a_request_record(driver: Driver) -> None:
    driver.deliver(claim_of("one"), "123456")
    record = str(driver.client.hgetall("request:one"))
    assert "123456" not in record
    assert "anna" not in record


# --- deadlines ---


def test_a_request_older_than_the_deadline_is_answered_unsent(driver: Driver) -> None:
    sent = now(driver.client) - 301
    assert driver.issue(claim_of("one"), enqueued_at=sent) == Answered(ErrorCode.TIMEOUT)
    assert list(driver.everything()) == [b"request:one"]
    assert driver.answer_of(claim_of("one")) is ErrorCode.TIMEOUT


def test_a_younger_request_has_the_rest_of_its_time(driver: Driver) -> None:
    found = driver.send(claim_of("one"), enqueued_at=now(driver.client) - 100)
    assert 199 < found.remaining <= 200.1


@pytest.mark.parametrize("ahead", [10, 1_000_000, 1e15])
def test_a_request_from_the_future_counts_as_now(ahead: float, driver: Driver) -> None:
    assert 299 < driver.send(claim_of("one"), enqueued_at=now(driver.client) + ahead).remaining <= 300


@pytest.mark.parametrize("ahead", [None, 1000.0])
def test_without_a_time_or_with_one_in_the_future_the_age_counts_from_the_first_reserve(
    ahead: float | None, redis: redis_py.Redis
) -> None:
    driver = with_policy(redis, give_up_after=80)
    enqueued_at = None if ahead is None else now(redis) + ahead
    assert driver.send(claim_of("one"), enqueued_at=enqueued_at).remaining > 0.07
    driver.failed(claim_of("one"))
    time.sleep(0.09)
    assert driver.issue(claim_of("one"), enqueued_at=enqueued_at) == Answered(ErrorCode.TIMEOUT)


def test_the_time_of_a_joined_request_counts_from_when_it_joined(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, give_up_after=80)
    driver.send(claim_of("one"))
    assert isinstance(driver.issue(claim_of("two")), Wait)
    time.sleep(0.09)
    assert driver.issue(claim_of("two")) == Answered(ErrorCode.TIMEOUT)


def test_a_request_past_its_own_expiry_is_answered_unsent(driver: Driver) -> None:
    assert driver.issue(claim_of("one"), expires_at=now(driver.client) - 1) == Answered(ErrorCode.TIMEOUT)


def test_an_expiry_can_only_shorten_the_time(driver: Driver) -> None:
    soon, late = now(driver.client) + 50, now(driver.client) + 5_000
    assert 49 < driver.send(claim_of("one"), expires_at=soon).remaining <= 50.1
    assert 299 < driver.send(claim_of("two", "b@example.com"), expires_at=late).remaining <= 300


def test_a_request_past_its_deadline_whose_lease_lives_is_left_to_its_holder(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, give_up_after=30)
    driver.send(claim_of("one", token="a"))
    time.sleep(0.04)
    assert isinstance(driver.issue(claim_of("one", token="b")), Wait)


# --- checks ---


def test_the_right_code_works_once(driver: Driver) -> None:
    code = driver.deliver(claim_of("one"))
    assert driver.check(code) is ErrorCode.SUCCESS
    assert driver.check(code) is ErrorCode.VARIFY_EXPIRED
    assert not driver.client.exists(KEY, codes.ATTEMPTS + KEY)


def test_of_a_hundred_right_checks_at_once_exactly_one_succeeds(
    redis: redis_py.Redis, redis_server: RedisServer
) -> None:
    redis.set(KEY, "123456", px=600_000)
    check = store_of(POLICY).check(EMAIL, "123456", "default")
    assert Counter(at_once(redis_server, [check] * 100)) == {0: 1, 1003: 99}


def test_a_hundred_wrong_checks_at_once_are_five_attempts(redis: redis_py.Redis, redis_server: RedisServer) -> None:
    redis.set(KEY, "123456", px=600_000)
    check = store_of(POLICY).check(EMAIL, "000000", "default")
    assert Counter(at_once(redis_server, [check] * 100)) == {1004: 5, 1003: 95}


def test_without_a_live_code_a_check_is_expired_and_leaves_nothing(driver: Driver) -> None:
    assert driver.check("123456") is ErrorCode.VARIFY_EXPIRED
    assert driver.everything() == {}


def test_a_code_without_a_ttl_is_not_live(driver: Driver) -> None:
    driver.client.set(KEY, "123456")
    driver.outside.add(KEY.encode())
    assert driver.check("123456") is ErrorCode.VARIFY_EXPIRED
    assert list(driver.everything()) == [KEY.encode()]


@pytest.mark.parametrize("write", [("SET", ""), ("RPUSH", "123456"), ("SADD", "123456"), ("HSET", "123456", "1")])
def test_what_is_no_code_is_not_live_whatever_is_given(write: tuple[str, ...], redis: redis_py.Redis) -> None:
    name, *values = write
    run(redis, (name, KEY, *values))
    redis.pexpire(KEY, 600_000)
    store = store_of(POLICY)
    for given in ("", "123456"):
        assert run(redis, store.check(EMAIL, given, "default")) == 1003
    assert redis.keys() == [KEY.encode()]


def test_each_wrong_check_says_so_and_the_last_one_drops_the_code(driver: Driver) -> None:
    code = driver.deliver(claim_of("one"))
    for _ in range(5):
        assert driver.check("wrong") is ErrorCode.VARIFY_CODE_ERR
    assert driver.check(code) is ErrorCode.VARIFY_EXPIRED
    assert not driver.client.exists(KEY, codes.ATTEMPTS + KEY)


def test_the_right_code_works_at_the_last_attempt(driver: Driver) -> None:
    code = driver.deliver(claim_of("one"))
    for _ in range(4):
        driver.check("wrong")
    assert driver.check(code) is ErrorCode.SUCCESS


def test_a_single_attempt_is_counted_before_it_is_compared(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, max_attempts=1)
    driver.deliver(claim_of("one"))
    assert driver.check("wrong") is ErrorCode.VARIFY_CODE_ERR
    assert driver.check("wrong") is ErrorCode.VARIFY_EXPIRED


def test_attempts_survive_a_resend(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, cooldown=0)
    code = driver.deliver(claim_of("one"))
    for _ in range(4):
        driver.check("wrong")
    assert driver.deliver(claim_of("two")) == code
    assert driver.check("wrong") is ErrorCode.VARIFY_CODE_ERR
    assert driver.check(code) is ErrorCode.VARIFY_EXPIRED


def test_attempts_end_with_the_code_that_is_replaced(redis: redis_py.Redis) -> None:
    driver = with_policy(redis, cooldown=0)
    driver.deliver(claim_of("one"))
    driver.check("wrong")
    redis.pexpire(KEY, 5_000)
    driver.deliver(claim_of("two"))
    assert not redis.exists(codes.ATTEMPTS + KEY)


def test_attempts_end_with_the_code_that_is_dropped(driver: Driver) -> None:
    driver.deliver(claim_of("one"))
    for _ in range(5):
        driver.check("wrong")
    code = driver.deliver(claim_of("two"))
    for _ in range(4):
        assert driver.check("wrong") is ErrorCode.VARIFY_CODE_ERR
    assert driver.check(code) is ErrorCode.SUCCESS


def test_a_code_overwritten_from_outside_has_its_own_attempts(driver: Driver) -> None:
    driver.deliver(claim_of("one"))
    for _ in range(4):
        driver.check("wrong")
    driver.client.set(KEY, "a1b2", px=300_000)
    for _ in range(4):
        assert driver.check("wrong") is ErrorCode.VARIFY_CODE_ERR
    assert driver.check("a1b2") is ErrorCode.SUCCESS


def test_attempts_live_no_longer_than_the_code(driver: Driver) -> None:
    driver.deliver(claim_of("one"))
    driver.client.pexpire(KEY, 5_000)
    driver.check("wrong")
    life = driver.client.pttl(KEY)
    assert 0 < driver.client.pttl(codes.ATTEMPTS + KEY) <= life <= 5_000


@pytest.mark.parametrize(
    "given",
    [
        "",
        " 123456",
        "123456 ",
        "12345",
        "1234567",
        "\uff11\uff12\uff13\uff14\uff15\uff16",
        "123456\0",
        "\ud800",
        "9" * 10_000,
    ],
)
def test_a_code_is_compared_byte_for_byte(given: str, driver: Driver) -> None:
    driver.deliver(claim_of("one"), "123456")
    assert driver.check(given) is ErrorCode.VARIFY_CODE_ERR
    assert driver.check("123456") is ErrorCode.SUCCESS


def test_a_check_goes_by_the_address_as_it_was_given_in_the_request(driver: Driver) -> None:
    code = driver.deliver(claim_of("one", "Anna@example.com"))
    assert driver.check(code, "anna@example.com") is ErrorCode.VARIFY_EXPIRED
    assert driver.check(code, "Anna@example.com") is ErrorCode.SUCCESS


# --- keys ---

WEIRD = [
    "用户@例子.中国",
    "  anna@example.com ",
    "o'brien@example.com",
    "{a}@example.com",
    "a*b?@example.com",
    "a%s{0}$@example.com",
]
# Nobody issues codes to these, but anybody may ask to check one.
NO_ADDRESSES = [
    "",
    " ",
    "a:b:c",
    'a"b\\c',
    "a\r\nSET x y\r\n",
    "\0",
    "x" * 10_000,
    "\ud800@example.com",
    "code_x",
    "😀" * 50,
]


@pytest.mark.parametrize("email", WEIRD)
def test_strange_addresses_work_like_any_other(email: str, driver: Driver) -> None:
    code = driver.deliver(claim_of("one", email))
    assert driver.client.get(code_key(email)) == code.encode()
    assert driver.check("wrong", email) is ErrorCode.VARIFY_CODE_ERR
    assert driver.check(code, email) is ErrorCode.SUCCESS


@pytest.mark.parametrize("email", NO_ADDRESSES)
@pytest.mark.parametrize("purpose", ["default", "reset"])
def test_a_check_of_what_is_no_address_finds_no_code(email: str, purpose: str, driver: Driver) -> None:
    assert driver.check("123456", email, purpose) is ErrorCode.VARIFY_EXPIRED
    assert driver.everything() == {}


def test_a_code_that_is_not_unicode_is_reused_byte_for_byte(driver: Driver) -> None:
    driver.client.set(KEY, b"\xff\x00\xfe", px=300_000)
    assert driver.send(claim_of("one")).code.encode("utf-8", "surrogateescape") == b"\xff\x00\xfe"


def test_no_side_key_begins_like_a_key_that_gate_server_builds(driver: Driver) -> None:
    driver.send(claim_of("one"))
    driver.issue(claim_of("two"))
    driver.check("wrong")
    assert {key.partition(EMAIL.encode())[0] for key in driver.everything()} == {
        b"code_",
        b"attempts:code_",
        b"bucket:",
        b"joined:code_",
        b"request:one",
        b"request:two",
        b"sending:code_",
    }
    driver.accepted(claim_of("one"))
    assert driver.client.exists(codes.COOLDOWN + KEY)


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


def test_every_lua_file_says_what_it_takes_and_what_it_returns() -> None:
    for path in LUA.glob("*.lua"):
        header = path.read_text().partition("]]")[0]
        assert header.startswith(f"--[[\n{path.stem}: ")
        assert all(word in header for word in ("KEYS ", "ARGV ", "Returns "))
