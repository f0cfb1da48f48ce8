"""What every code store must do. The suite runs over each implementation: the one in Redis and the one in memory."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
from support.redis_server import RedisServer
from support.store_driver import EMAIL, POLICY, Driver, MemoryDriver, RedisDriver, claim_of

from producer.contract import ErrorCode
from producer.settings import load
from producer.store.codes import (
    ADDRESS_BUCKET,
    CLIENT_ADDRESS_BUCKET,
    CLIENT_BUCKET,
    COOLDOWN_HIT,
    FAILED,
    NO_BUCKET,
    REFUSED,
    RESPELLED,
    SUPPRESSED_HIT,
    TOTAL_BUCKET,
    UNKNOWN,
    Answered,
    Bucket,
    Checked,
    Claim,
    CodePolicy,
    Conflict,
    IssueRequest,
    Outcome,
    Result,
    Send,
    Settled,
    UnknownVersion,
    Wait,
)
from producer.store.guessing import Attacker, chance_a_day

OTHER = "b@example.com"
HIT = Answered(ErrorCode.SUCCESS, COOLDOWN_HIT)
SUPPRESSED = Answered(ErrorCode.MAIL_REJECTED, SUPPRESSED_HIT)


@pytest.fixture(params=["redis", "memory"])
def driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    """An empty store with the contract's defaults."""
    driver: Driver
    if request.param == "memory":
        driver = MemoryDriver()
    else:
        request.getfixturevalue("redis")
        server: RedisServer = request.getfixturevalue("redis_server")
        driver = RedisDriver(server)
    yield driver
    driver.close()


# --- the policy ---


def test_the_contracts_defaults_are_the_default_policy() -> None:
    assert CodePolicy.of(load({}, dotenv=None)) == POLICY


def test_the_minimum_life_has_a_bound_and_no_sends_per_hour_mean_no_bucket() -> None:
    policy = CodePolicy.of(load({"VERIFY_CODE_TTL": "100", "VERIFY_MAX_SENDS_PER_HOUR": "0"}, dotenv=None))
    assert (policy.min_life, policy.address) == (10_000, NO_BUCKET)


# --- get or create ---


def test_the_first_request_creates_the_code(driver: Driver) -> None:
    sent = driver.send(claim_of("one"), "123456")
    assert sent.code == "123456"
    assert 599 < sent.life <= 600
    found = driver.code()
    assert found is not None
    assert found[0] == "123456"
    assert 599_000 < found[1] <= 600_000


def test_the_next_request_gets_the_same_code_and_the_expiry_stays(driver: Driver) -> None:
    code = driver.deliver(claim_of("one"))
    driver.pass_time(10_001)  # the cooldown
    again = driver.send(claim_of("two"))
    assert again.code == code
    assert 589 < again.life <= 590


@pytest.mark.parametrize(("life", "code"), [(59_000, "222222"), (61_000, "a1b2")])
def test_a_code_with_less_than_the_minimum_life_is_replaced(life: int, code: str, driver: Driver) -> None:
    driver.put_code("a1b2", life)  # any characters, as the old server wrote them
    assert driver.send(claim_of("one"), "222222").code == code


def test_each_code_key_has_its_own_code_cooldown_and_joins(driver: Driver) -> None:
    driver.deliver(claim_of("one"), "111111")
    assert driver.send(claim_of("two", purpose="reset"), "222222").code == "222222"
    assert driver.send(claim_of("three", "Anna@example.com"), "333333").code == "333333"
    assert driver.check("222222") is ErrorCode.VARIFY_CODE_ERR
    assert driver.check("222222", purpose="reset") is ErrorCode.SUCCESS
    assert driver.check("111111") is ErrorCode.SUCCESS


# --- cooldown ---


def test_within_the_cooldown_a_request_is_answered_success_without_a_mail(driver: Driver) -> None:
    driver.deliver(claim_of("one"))
    driver.pass_time(9_000)
    assert driver.issue(claim_of("two")) == HIT
    assert driver.issue(claim_of("two")) == Answered(ErrorCode.SUCCESS)  # now remembered: not another hit


@pytest.mark.parametrize("result", [FAILED, UNKNOWN, ErrorCode.MAIL_REJECTED, ErrorCode.TIMEOUT])
def test_only_an_accepted_mail_starts_a_cooldown(result: Result, driver: Driver) -> None:
    driver.send(claim_of("one"))
    driver.settle(claim_of("one"), result)
    driver.send(claim_of("two"))


@pytest.mark.parametrize("fate", ["consumed", "replaced"])
@pytest.mark.parametrize("accepted", [True, False], ids=["accepted", "being sent"])
def test_there_is_no_cooldown_without_the_mailed_code(fate: str, accepted: bool, driver: Driver) -> None:
    code = driver.send(claim_of("one")).code
    if accepted:
        driver.settle(claim_of("one"))
    end_code(driver, code, fate)
    if not accepted:
        driver.settle(claim_of("one"))
    assert driver.send(claim_of("two")).code != code


def end_code(driver: Driver, code: str, fate: str) -> None:
    if fate == "consumed":
        assert driver.check(code) is ErrorCode.SUCCESS
    else:
        driver.put_code("a1b2", 300_000)


def test_the_cooldown_ends_with_the_code(driver: Driver) -> None:
    driver.put_code("111111", 65_000)
    driver.set_policy(cooldown=100_000)
    driver.deliver(claim_of("one"))
    driver.pass_time(64_000)
    assert driver.issue(claim_of("two")) == HIT
    driver.pass_time(1_001)
    driver.send(claim_of("three"))


def test_without_a_cooldown_every_request_sends(driver: Driver) -> None:
    code = driver.deliver(claim_of("one"))
    other = driver.send(claim_of("two", OTHER)).code
    driver.set_policy(cooldown=0)  # which also ends the cooldown and the joins that there are
    assert driver.deliver(claim_of("three")) == code
    assert driver.send(claim_of("four")).code == code
    assert driver.send(claim_of("five", OTHER)).code == other


# --- the bucket ---


def test_the_bucket_gives_all_it_holds_at_once(driver: Driver) -> None:
    driver.set_policy(cooldown=0)
    assert Counter(type(driver.issue(claim_of(f"id-{i}"))) for i in range(25)) == {Send: 20, Answered: 5}


def test_one_send_comes_back_each_interval(driver: Driver) -> None:
    driver.set_policy(address=Bucket(180_000, 2), cooldown=0)
    driver.deliver(claim_of("one"))
    driver.deliver(claim_of("two"))
    driver.pass_time(179_000)
    assert driver.issue(claim_of("three")) == Answered(ErrorCode.TOO_MANY_REQUESTS, ADDRESS_BUCKET)
    assert driver.issue(claim_of("three")) == Answered(ErrorCode.TOO_MANY_REQUESTS)  # now remembered: not another hit
    driver.pass_time(1_001)
    driver.deliver(claim_of("four"))
    assert driver.answer_of(claim_of("five")) is ErrorCode.TOO_MANY_REQUESTS


def test_all_spellings_and_purposes_of_an_address_share_a_bucket(driver: Driver) -> None:
    driver.set_policy(address=Bucket(180_000, 3), cooldown=0)
    driver.deliver(claim_of("one", "anna@example.com"))
    driver.deliver(claim_of("two", " Anna@EXAMPLE.com "))
    driver.deliver(claim_of("three", "ANNA@example.com", purpose="reset"))
    assert driver.answer_of(claim_of("four")) is ErrorCode.TOO_MANY_REQUESTS
    driver.send(claim_of("five", "anna+tag@example.com"))


def test_a_mail_that_no_relay_accepted_is_refunded(driver: Driver) -> None:
    driver.set_policy(address=Bucket(180_000, 1))
    for result in (ErrorCode.MAIL_REJECTED, ErrorCode.TIMEOUT, ErrorCode.INVALID_ADDRESS, FAILED):
        driver.send(claim_of(str(result)))
        driver.settle(claim_of(str(result)), result)
    driver.send(claim_of("last"))


def test_a_request_is_refunded_once_and_by_one_send(driver: Driver) -> None:
    driver.set_policy(address=Bucket(180_000, 2), cooldown=0)
    driver.deliver(claim_of("one"))
    driver.send(claim_of("two"))
    driver.settle(claim_of("two"), FAILED)
    driver.settle_late(claim_of("two"), FAILED)
    driver.settle_late(claim_of("two"), ErrorCode.TIMEOUT)
    driver.deliver(claim_of("three"))
    assert driver.answer_of(claim_of("four")) is ErrorCode.TOO_MANY_REQUESTS


def test_each_try_after_a_refund_is_charged_again(driver: Driver) -> None:
    driver.set_policy(address=Bucket(180_000, 1), cooldown=0)
    for _ in range(3):
        driver.send(claim_of("one"))
        driver.settle(claim_of("one"), FAILED)
    driver.deliver(claim_of("one"))
    assert driver.answer_of(claim_of("two")) is ErrorCode.TOO_MANY_REQUESTS


def test_a_mail_that_may_have_been_accepted_is_neither_refunded_nor_charged_twice(driver: Driver) -> None:
    driver.set_policy(address=Bucket(180_000, 1), cooldown=0)
    driver.send(claim_of("one"))
    driver.settle(claim_of("one"), UNKNOWN)
    driver.send(claim_of("one"))
    driver.settle(claim_of("one"), FAILED)
    assert driver.answer_of(claim_of("two")) is ErrorCode.TOO_MANY_REQUESTS


@pytest.mark.parametrize(
    ("error", "refunded"),
    [
        (ErrorCode.TIMEOUT, False),
        (ErrorCode.EXCEPTION, False),  # nobody knows how far the send had come
        (ErrorCode.MAIL_REJECTED, True),
        (ErrorCode.INVALID_ADDRESS, True),
    ],
)
def test_an_announced_mail_is_refunded_only_if_it_was_refused(error: ErrorCode, refunded: bool, driver: Driver) -> None:
    driver.set_policy(address=Bucket(180_000, 1), cooldown=0)
    driver.send(claim_of("one"))
    assert driver.announce_data(claim_of("one")) is True
    driver.settle(claim_of("one"), error)
    if refunded:
        driver.send(claim_of("two"))
    else:
        assert driver.answer_of(claim_of("two")) is ErrorCode.TOO_MANY_REQUESTS


def test_a_request_whose_worker_died_before_its_mail_left_is_refunded(driver: Driver) -> None:
    driver.set_policy(address=Bucket(180_000, 1), cooldown=0)
    driver.send(claim_of("one"))
    driver.lapse()
    assert driver.issue(claim_of("one"), expires_at=1.0) == Answered(ErrorCode.TIMEOUT)
    driver.send(claim_of("two"))


def test_a_refund_after_the_bucket_was_full_again_leaves_it_full(driver: Driver) -> None:
    driver.set_policy(address=Bucket(180_000, 1), cooldown=0, give_up_after=1_000_000)
    driver.send(claim_of("one"))
    driver.pass_time(180_001)
    driver.settle(claim_of("one"), FAILED)
    driver.send(claim_of("two"))
    assert driver.answer_of(claim_of("three")) is ErrorCode.TOO_MANY_REQUESTS


def test_without_a_bucket_nothing_is_counted(driver: Driver) -> None:
    driver.set_policy(address=NO_BUCKET, cooldown=0)
    for i in range(30):
        driver.deliver(claim_of(f"id-{i}"))
    driver.send(claim_of("last"))
    driver.settle(claim_of("last"), FAILED)


# --- refused mailboxes ---

MINUTE = 60_000  # ms


def test_a_refused_mailbox_gets_no_mail_for_ten_minutes_whoever_asks(driver: Driver) -> None:
    driver.refuse(claim_of("one"))
    driver.pass_time(10 * MINUTE - 1_000)
    assert driver.issue(claim_of("two")) == SUPPRESSED
    assert driver.issue(claim_of("two")) == Answered(ErrorCode.MAIL_REJECTED)  # now remembered: not another hit
    assert driver.issue(claim_of("three", " Anna@Example.com ", purpose="reset")) == SUPPRESSED
    driver.send(claim_of("four", OTHER))
    driver.pass_time(1_001)
    driver.send(claim_of("five"))


def test_an_answer_without_a_mail_to_a_refused_mailbox_is_not_charged(driver: Driver) -> None:
    driver.set_policy(address=Bucket(3_600_000, 1))
    driver.refuse(claim_of("one"))
    for i in range(5):
        assert driver.issue(claim_of(f"id-{i}")) == SUPPRESSED
    driver.pass_time(10 * MINUTE + 1)
    driver.send(claim_of("two"))


def refused_for(driver: Driver, name: str, minutes: int) -> None:
    """A request sends, its mailbox is refused, and for so long there is no further mail."""
    driver.refuse(claim_of(name))
    driver.pass_time(minutes * MINUTE - 1_000)
    assert driver.issue(claim_of(f"{name}, within")) == SUPPRESSED
    driver.pass_time(1_001)


def test_each_refusal_after_the_end_doubles_the_period_up_to_a_day(driver: Driver) -> None:
    for number, minutes in enumerate([10, 20, 40, 80, 160, 320, 640, 1280, 1440, 1440]):
        refused_for(driver, f"refusal {number}", minutes)


def test_a_refused_mailbox_is_forgotten_an_hour_or_its_period_after_the_end(driver: Driver) -> None:
    pauses = [(0, 10), (59, 20), (59, 40), (61, 10), (0, 20), (0, 40), (0, 80), (79, 160), (161, 10)]
    for number, (pause, minutes) in enumerate(pauses):
        driver.pass_time(pause * MINUTE)
        refused_for(driver, f"refusal {number}", minutes)


def test_refusals_of_sends_that_overlapped_count_once(driver: Driver) -> None:
    claims = [claim_of(purpose, purpose=purpose) for purpose in ("default", "reset", "login")]
    for claim in claims:
        driver.send(claim)
    driver.settle_all(*(Outcome(claim, ErrorCode.MAIL_REJECTED, REFUSED) for claim in claims))
    driver.pass_time(10 * MINUTE + 1)
    driver.send(claim_of("later"))


def test_an_accepted_mail_ends_the_suppression_of_a_refused_mailbox(driver: Driver) -> None:
    refused, accepted = claim_of("one"), claim_of("two", purpose="reset")
    driver.issue_all(refused, accepted)
    driver.settle_all(Outcome(refused, ErrorCode.MAIL_REJECTED, REFUSED))
    assert driver.issue(claim_of("three")) == SUPPRESSED
    driver.settle(accepted)
    driver.refuse(claim_of("four"))
    driver.pass_time(10 * MINUTE + 1)  # the period did not double
    driver.deliver(claim_of("five"))
    driver.pass_time(10_001)  # the cooldown
    driver.refuse(claim_of("six"))
    driver.pass_time(10 * MINUTE + 1)
    driver.send(claim_of("seven"))


@pytest.mark.parametrize("result", [FAILED, UNKNOWN, ErrorCode.MAIL_REJECTED, ErrorCode.TIMEOUT])
def test_only_a_refusal_of_the_mailbox_suppresses_it(result: Result, driver: Driver) -> None:
    driver.send(claim_of("one"))
    driver.settle(claim_of("one"), result)
    driver.send(claim_of("two"))


def test_a_refusal_of_another_spelling_suppresses_nothing_and_is_charged(driver: Driver) -> None:
    """To a relay that tells A from a it is another mailbox, which a stranger may name at will."""
    policy = driver.policy
    for i in range(policy.address.burst):
        claim = claim_of(f"id-{i}", EMAIL.upper())
        driver.send(claim)
        driver.settle_all(Outcome(claim, ErrorCode.MAIL_REJECTED, RESPELLED))
        assert driver.answer_of(claim) is ErrorCode.MAIL_REJECTED
    assert driver.answer_of(claim_of("next", EMAIL.upper())) is ErrorCode.TOO_MANY_REQUESTS
    driver.pass_time(int(policy.address.interval) + 1)
    driver.send(claim_of("owner"))


def test_a_refusal_that_a_lost_lease_reports_suppresses_nothing(driver: Driver) -> None:
    driver.send(claim_of("one", token="a"))
    driver.lapse()
    driver.send(claim_of("one", token="b"))
    late = Outcome(claim_of("one", token="a"), ErrorCode.MAIL_REJECTED, REFUSED)
    assert driver.settle_all(late) == [Settled(held=False, wake=[])]
    driver.deliver(claim_of("one", token="b"))
    driver.pass_time(10_001)
    driver.send(claim_of("two"))


def test_all_that_joined_a_send_to_a_refused_mailbox_are_answered_so(driver: Driver) -> None:
    ids = joined(driver, 3)
    [settled] = driver.settle_all(Outcome(claim_of("one"), ErrorCode.MAIL_REJECTED, REFUSED))
    assert isinstance(settled, Settled)
    assert sorted(settled.wake) == ids
    assert {driver.answer_of(claim_of(request_id)) for request_id in ids} == {ErrorCode.MAIL_REJECTED}


# --- the buckets of a client, and of everything ---

CLIENT, STRANGER = "the owner", "a stranger"


def empty(bucket: str) -> Answered:
    return Answered(ErrorCode.TOO_MANY_REQUESTS, bucket)


def test_one_client_takes_at_most_a_quarter_of_the_bucket_of_an_address(driver: Driver) -> None:
    driver.set_policy(cooldown=0)
    spellings = [EMAIL[:i].upper() + EMAIL[i:] for i in range(20)]
    claims = [claim_of(f"id-{i}", spelling, client=STRANGER) for i, spelling in enumerate(spellings)]
    found = driver.issue_all(*claims)
    assert [type(issue) for issue in found[:5]] == [Send] * 5
    assert found[5:] == [empty(CLIENT_ADDRESS_BUCKET)] * 15
    driver.send(claim_of("owner", client=CLIENT))
    driver.send(claim_of("old caller"))


def test_a_clients_share_comes_back_over_the_hour(driver: Driver) -> None:
    driver.set_policy(cooldown=0)
    for i in range(5):
        driver.deliver(claim_of(f"id-{i}", client=STRANGER))
    driver.pass_time(719_000)
    assert driver.issue(claim_of("early", client=STRANGER)) == empty(CLIENT_ADDRESS_BUCKET)
    driver.pass_time(1_001)
    driver.send(claim_of("late", client=STRANGER))


def test_a_client_gets_at_least_one_mail_to_an_address(driver: Driver) -> None:
    driver.set_policy(address=Bucket(1_200_000, 3), cooldown=0)
    driver.deliver(claim_of("one", client=STRANGER))
    assert driver.issue(claim_of("two", client=STRANGER)) == empty(CLIENT_ADDRESS_BUCKET)
    driver.send(claim_of("three", client=CLIENT))


def test_one_client_gets_so_many_mails_over_all_addresses(driver: Driver) -> None:
    driver.set_policy(client=Bucket(600_000, 6))
    found = driver.issue_all(*(claim_of(f"id-{i}", f"{i}@example.com", client=STRANGER) for i in range(10)))
    assert [type(issue) for issue in found[:6]] == [Send] * 6
    assert found[6:] == [empty(CLIENT_BUCKET)] * 4
    driver.send(claim_of("other client", "6@example.com", client=CLIENT))
    driver.send(claim_of("no client", "7@example.com"))
    driver.pass_time(600_001)
    driver.send(claim_of("later", "8@example.com", client=STRANGER))


def test_all_requests_share_the_total(driver: Driver) -> None:
    driver.set_policy(total=Bucket(360_000.5, 10))
    clients = [None, CLIENT, STRANGER]
    found = driver.issue_all(*(claim_of(f"id-{i}", f"{i}@example.com", client=clients[i % 3]) for i in range(13)))
    assert [type(issue) for issue in found[:10]] == [Send] * 10
    assert found[10:] == [empty(TOTAL_BUCKET)] * 3
    driver.settle(claim_of("id-3", "3@example.com"), FAILED)
    driver.send(claim_of("last", "last@example.com"))


def test_a_client_without_buckets_of_its_own_is_served(driver: Driver) -> None:
    driver.set_policy(address=NO_BUCKET, client=NO_BUCKET, cooldown=0)
    for i in range(30):
        driver.deliver(claim_of(f"id-{i}", client=STRANGER))
    driver.send(claim_of("last", client=STRANGER))
    driver.settle(claim_of("last", client=STRANGER), FAILED)


def test_one_request_id_with_another_client_is_the_same_request(driver: Driver) -> None:
    driver.deliver(claim_of("one", client=CLIENT))
    assert driver.answer_of(claim_of("one", client=STRANGER)) is ErrorCode.SUCCESS


def test_one_empty_bucket_leaves_the_others_uncharged(driver: Driver) -> None:
    driver.set_policy(address=Bucket(1_200_000, 3), client=Bucket(1_800_000, 2), total=Bucket(900_000, 4), cooldown=0)
    driver.deliver(claim_of("one", client=STRANGER))
    for i in range(9):
        assert driver.issue(claim_of(f"id-{i}", client=STRANGER)) == empty(CLIENT_ADDRESS_BUCKET)
    driver.deliver(claim_of("two", "b@example.com", client=STRANGER))
    for i in range(9, 18):
        found = driver.issue(claim_of(f"id-{i}", "c@example.com", client=STRANGER))
        assert found == empty(CLIENT_BUCKET)
    driver.deliver(claim_of("three"))
    driver.deliver(claim_of("four"))
    assert driver.issue(claim_of("five", "d@example.com")) == empty(TOTAL_BUCKET)


@pytest.mark.parametrize("how", ["settled", "given up"])
@pytest.mark.parametrize(
    "then",
    [
        {},
        {"address": Bucket(60_000, 60), "client": Bucket(30_000, 120), "total": Bucket(10_000, 360)},
        {"address": NO_BUCKET, "client": NO_BUCKET, "total": NO_BUCKET},
    ],
    ids=["same settings", "other settings", "no limits"],
)
def test_a_refund_gives_back_what_was_charged_whatever_the_settings_are_now(
    then: dict[str, Bucket], how: str, driver: Driver
) -> None:
    """The store afterwards is as if the request had never been."""
    before = {"address": Bucket(1_200_000, 3), "client": Bucket(1_800_000, 2), "total": Bucket(900_000, 4)}
    driver.set_policy(cooldown=0, **before)
    one = claim_of("one", client=STRANGER)
    driver.send(one)
    driver.lapse()
    driver.set_policy(**then)
    if how == "settled":
        driver.settle(one, ErrorCode.MAIL_REJECTED)
    else:
        driver.issue(one, expires_at=1.0)
    driver.set_policy(**before)
    for i in range(2):
        driver.deliver(claim_of(f"mine-{i}", f"{i}@example.com", client=STRANGER))
    assert driver.issue(claim_of("third", "3@example.com", client=STRANGER)) == empty(CLIENT_BUCKET)
    for i in range(2):
        driver.deliver(claim_of(f"all-{i}"))
    assert driver.issue(claim_of("fifth", "5@example.com")) == empty(TOTAL_BUCKET)


def test_aliases_count_as_one_address_only_where_the_settings_say_so(driver: Driver) -> None:
    aliases = ["anna.b@gmail.com", "a.nnab+1@gmail.com", "annab@googlemail.com", "annab+2@gmail.com"]
    two = Bucket(1_800_000, 2)
    driver.set_policy(address=two, fold_aliases=True)
    found = driver.issue_all(*(claim_of(alias, alias) for alias in aliases))
    assert [type(issue) for issue in found[:2]] == [Send] * 2
    assert found[2:] == [empty(ADDRESS_BUCKET)] * 2
    driver.settle(claim_of(aliases[1], aliases[1]), FAILED)
    driver.send(claim_of("refunded", "annab+3@gmail.com"))
    driver.set_policy(fold_aliases=False)
    found = driver.issue_all(*(claim_of(f"again {alias}", alias) for alias in aliases[2:]))
    assert [type(issue) for issue in found] == [Send] * 2


# --- joins ---


def joined(driver: Driver, count: int) -> list[str]:
    """The ids of requests that wait for the send of request `one`."""
    driver.send(claim_of("one"))
    ids = [f"joined-{i}" for i in range(count)]
    for found in driver.issue_all(*map(claim_of, ids)):
        assert isinstance(found, Wait)
        assert found.joined
    return ids


def test_a_request_that_meets_anothers_send_waits_uncharged_for_at_most_its_lease(driver: Driver) -> None:
    driver.set_policy(address=Bucket(180_000, 1))
    driver.send(claim_of("one"))
    found = driver.issue(claim_of("two"))
    assert isinstance(found, Wait)
    assert 14 < found.seconds <= 15


@pytest.mark.parametrize("error", [ErrorCode.SUCCESS, ErrorCode.MAIL_REJECTED, ErrorCode.INVALID_ADDRESS])
def test_a_final_outcome_wakes_and_answers_all_that_joined(error: ErrorCode, driver: Driver) -> None:
    ids = joined(driver, 5)
    assert sorted(driver.settle(claim_of("one"), error)) == ids
    assert {driver.answer_of(claim_of(request_id)) for request_id in ids} == {error}


@pytest.mark.parametrize("result", [FAILED, UNKNOWN, ErrorCode.TIMEOUT, ErrorCode.EXCEPTION])
def test_another_outcome_wakes_exactly_one_which_may_send(result: Result, driver: Driver) -> None:
    joined(driver, 5)
    [woken] = driver.settle(claim_of("one"), result)
    driver.send(claim_of(woken))
    assert len(driver.settle(claim_of(woken))) == 4


def test_an_accepted_mail_whose_code_is_gone_wakes_one_and_answers_none(driver: Driver) -> None:
    joined(driver, 3)
    code = driver.code()
    assert code is not None
    driver.check(code[0])
    [woken] = driver.settle(claim_of("one"))
    assert driver.send(claim_of(woken)).code != code[0]


def test_a_joined_request_that_was_answered_meanwhile_is_not_woken_to_send(driver: Driver) -> None:
    *answered, last = joined(driver, 10)
    for request_id in answered:
        assert driver.issue(claim_of(request_id), error=ErrorCode.TIMEOUT) == Answered(ErrorCode.TIMEOUT)
    assert driver.settle(claim_of("one"), FAILED) == [last]


def test_a_joined_request_keeps_the_answer_that_it_got_meanwhile(driver: Driver) -> None:
    [two] = joined(driver, 1)
    driver.issue(claim_of(two), error=ErrorCode.TIMEOUT)
    assert driver.settle(claim_of("one")) == [two]
    assert driver.answer_of(claim_of(two)) is ErrorCode.TIMEOUT


def test_a_sender_that_was_overtaken_by_another_request_wakes_nobody(driver: Driver) -> None:
    driver.send(claim_of("one"))
    driver.lapse()
    driver.send(claim_of("two"))
    driver.issue(claim_of("three"))
    assert driver.settle(claim_of("one"), FAILED) == []
    assert driver.settle(claim_of("two")) == ["three"]


def test_a_frozen_holder_may_not_send_once_its_request_joined_anothers_send(driver: Driver) -> None:
    frozen = claim_of("one", token="a")
    driver.send(frozen)
    driver.lapse()
    driver.send(claim_of("two"))
    assert isinstance(driver.issue(claim_of("one", token="b")), Wait)
    assert driver.renew(frozen) == [False]
    driver.settle_late(frozen, ErrorCode.SUCCESS)


def test_the_answer_that_a_joined_request_shares_takes_the_lease_from_its_holder(driver: Driver) -> None:
    [two] = joined(driver, 1)
    driver.lapse()
    driver.send(claim_of(two))
    driver.lapse()
    driver.send(claim_of("one"))
    assert driver.settle(claim_of("one")) == [two]
    driver.settle_late(claim_of(two), ErrorCode.TIMEOUT)


# --- batches ---


def test_each_request_of_a_batch_gets_its_own_answer_in_its_place(driver: Driver) -> None:
    driver.deliver(claim_of("known", "known@example.com"))
    no_address = Claim.of("three", "token", "no address", "default", "")
    one, *others, five = driver.issue_all(
        IssueRequest(claim_of("one", "a@example.com"), "111111"),
        IssueRequest(claim_of("two", "known@example.com"), "222222"),
        IssueRequest(claim_of("known", "b@example.com"), "333333"),
        IssueRequest(no_address, "444444", ErrorCode.INVALID_ADDRESS),
        IssueRequest(claim_of("four", "c@example.com"), "555555", expires_at=1.0),
        IssueRequest(claim_of("five", "d@example.com"), "666666"),
    )
    assert isinstance(one, Send)
    assert isinstance(five, Send)
    assert [one.code, five.code] == ["111111", "666666"]
    assert others == [HIT, Conflict(), Answered(ErrorCode.INVALID_ADDRESS), Answered(ErrorCode.TIMEOUT)]


def test_outcomes_of_a_batch_are_settled_each_in_its_place(driver: Driver) -> None:
    accepted, failed, lost, unknown = (claim_of(f"id-{i}", f"{i}@example.com") for i in range(4))
    driver.issue_all(accepted, failed, unknown, claim_of("joined", "0@example.com"))
    settled = driver.settle_all(
        Outcome(accepted, ErrorCode.SUCCESS),
        Outcome(failed, FAILED),
        Outcome(lost, ErrorCode.SUCCESS),
        Outcome(unknown, UNKNOWN),
        Outcome(accepted, ErrorCode.TIMEOUT),
    )
    late = Settled(held=False, wake=[])
    assert settled == [Settled(held=True, wake=["joined"]), Settled(True, []), late, Settled(True, []), late]
    assert driver.answer_of(accepted) is ErrorCode.SUCCESS
    assert [driver.send(claim).tries for claim in (failed, unknown)] == [1, 1]


def test_an_empty_batch_is_no_error(driver: Driver) -> None:
    assert (driver.issue_all(), driver.settle_all(), driver.renew()) == ([], [], [])


# --- leases ---


def test_a_lease_is_its_holders_until_it_expires(driver: Driver) -> None:
    driver.set_policy(address=Bucket(180_000, 1))  # neither holder is charged again
    code = driver.send(claim_of("one", token="a")).code
    assert driver.send(claim_of("one", token="a")).code == code
    found = driver.issue(claim_of("one", token="b"))
    assert isinstance(found, Wait)
    assert not found.joined
    assert 14 < found.seconds <= 15
    driver.lapse()
    assert driver.send(claim_of("one", token="b")).code == code


def test_a_renewed_lease_lasts_its_whole_length_again(driver: Driver) -> None:
    one, two = claim_of("one"), claim_of("two", OTHER)
    driver.issue_all(one, two)
    driver.pass_time(13_000)
    assert driver.renew(one, two) == [True, True]
    for waiting in (claim_of("one", token="other"), claim_of("joining"), claim_of("joining too", OTHER)):
        found = driver.issue(waiting)
        assert isinstance(found, Wait)
        assert found.seconds > 14


def test_a_lost_lease_is_not_renewed(driver: Driver) -> None:
    kept = claim_of("kept", OTHER)
    driver.send(claim_of("one", token="a"))
    driver.lapse()
    driver.send(claim_of("one", token="b"))
    driver.send(kept)
    assert driver.renew(claim_of("one", token="a"), kept, claim_of("never")) == [False, True, False]


def test_renewing_does_not_prolong_the_send_of_another_request(driver: Driver) -> None:
    driver.send(claim_of("one"))
    driver.lapse()
    driver.send(claim_of("two"))
    driver.pass_time(10_000)
    driver.renew(claim_of("one"))
    found = driver.issue(claim_of("three"))
    assert isinstance(found, Wait)
    assert found.seconds <= 5


@pytest.mark.parametrize("result", [ErrorCode.SUCCESS, FAILED, UNKNOWN])
def test_a_holder_that_lost_its_lease_changes_nothing(result: Result, driver: Driver) -> None:
    stale = claim_of("one", token="a")
    driver.send(stale)
    driver.lapse()
    driver.send(claim_of("one", token="b"))
    before = driver.snapshot()
    assert driver.announce_data(stale) is False
    assert driver.snapshot() == before
    driver.settle_late(stale, result)
    assert driver.announce_data(claim_of("never")) is False
    driver.settle_late(claim_of("never"), result)


def test_the_tries_that_failed_are_counted(driver: Driver) -> None:
    results: list[Result] = [FAILED, UNKNOWN, FAILED]
    for tries, result in enumerate(results):
        claim = claim_of("one", token=f"holder {tries}")  # any holder may try again at once
        assert driver.send(claim).tries == tries
        driver.settle(claim, result)


# --- the final dot ---


@pytest.mark.parametrize("dies", [False, True], ids=["connection lost", "worker died"])
def test_an_unknown_acceptance_is_tried_once_more_with_the_same_code(dies: bool, driver: Driver) -> None:
    def send_ambiguously(claim: Claim) -> str:
        code = driver.send(claim).code
        driver.announce_data(claim)
        if dies:
            driver.lapse()
        else:
            driver.settle(claim, UNKNOWN)
        return code

    driver.put_code("111111", 65_000)
    assert send_ambiguously(claim_of("one", token="a")) == "111111"
    driver.pass_time(10_000)  # below the minimum life, where any other request gets a fresh code
    assert send_ambiguously(claim_of("one", token="b")) == "111111"
    assert driver.issue(claim_of("one", token="c")) == Answered(ErrorCode.TIMEOUT)
    assert driver.answer_of(claim_of("one")) is ErrorCode.TIMEOUT


@pytest.mark.parametrize("fate", ["consumed", "replaced"])
def test_an_unknown_acceptance_is_given_up_if_its_code_is_gone(fate: str, driver: Driver) -> None:
    code = driver.send(claim_of("one")).code
    driver.announce_data(claim_of("one"))
    driver.settle(claim_of("one"), UNKNOWN)
    end_code(driver, code, fate)
    assert driver.issue(claim_of("one")) == Answered(ErrorCode.TIMEOUT)


def test_a_send_that_certainly_failed_after_its_final_dot_leaves_no_doubt(driver: Driver) -> None:
    for _ in range(4):
        driver.send(claim_of("one"))
        driver.announce_data(claim_of("one"))
        driver.settle(claim_of("one"), FAILED)
    driver.send(claim_of("one"))


def test_several_relays_asked_in_one_send_leave_one_doubt(driver: Driver) -> None:
    driver.send(claim_of("one"))
    for _ in range(3):
        driver.announce_data(claim_of("one"))
    driver.settle(claim_of("one"), UNKNOWN)
    driver.send(claim_of("one"))


def test_a_later_send_that_failed_does_not_remove_an_earlier_doubt(driver: Driver) -> None:
    code = driver.send(claim_of("one")).code
    driver.settle(claim_of("one"), UNKNOWN)
    driver.send(claim_of("one"))
    driver.settle(claim_of("one"), FAILED)
    assert driver.send(claim_of("one")).code == code
    driver.settle(claim_of("one"), UNKNOWN)
    assert driver.issue(claim_of("one")) == Answered(ErrorCode.TIMEOUT)


# --- request ids ---


@pytest.mark.parametrize("other", [(OTHER, "default"), (EMAIL, "reset"), ("Anna@example.com", "default")])
def test_an_id_with_another_address_or_purpose_is_a_conflict(other: tuple[str, str], driver: Driver) -> None:
    driver.send(claim_of("one"))
    before = driver.snapshot()
    claim = claim_of("one", other[0], purpose=other[1])
    assert driver.issue(claim) == driver.issue(claim, error=ErrorCode.EXCEPTION) == Conflict()
    assert driver.snapshot() == before


def newer(claim: Claim) -> Claim:
    """The claim as a release with another version of the record makes it."""
    return claim._replace(who=claim.who.replace("1:", "2:", 1))


@pytest.mark.parametrize("answered", [False, True])
def test_a_record_of_another_version_is_left_to_the_release_that_knows_it(answered: bool, driver: Driver) -> None:
    driver.send(newer(claim_of("one")))
    if answered:
        driver.settle(newer(claim_of("one")))
    before = driver.snapshot()
    assert driver.issue(claim_of("one")) == UnknownVersion(1.0)
    assert driver.issue(claim_of("one"), error=ErrorCode.EXCEPTION) == UnknownVersion(1.0)
    assert driver.snapshot() == before
    if not answered:
        driver.settle(newer(claim_of("one")))
    assert driver.answer_of(newer(claim_of("one"))) is ErrorCode.SUCCESS


def test_a_request_of_an_unknown_version_is_timed_out_at_its_deadline(driver: Driver) -> None:
    driver.send(newer(claim_of("one")))
    driver.pass_time(POLICY.give_up_after - 300)
    left = driver.issue(claim_of("one"))
    assert isinstance(left, UnknownVersion)
    assert 0 < left.seconds <= 0.3
    driver.pass_time(300)
    before = driver.snapshot()
    assert driver.issue(claim_of("one")) == Answered(ErrorCode.TIMEOUT)
    assert driver.snapshot() == before


@pytest.mark.parametrize("result", [ErrorCode.SUCCESS, ErrorCode.MAIL_REJECTED, FAILED])
def test_a_joined_record_of_another_version_is_woken_and_not_written(result: Result, driver: Driver) -> None:
    driver.send(claim_of("one"))
    assert isinstance(driver.issue(newer(claim_of("two"))), Wait)
    assert driver.settle(claim_of("one"), result) == ["two"]
    assert driver.issue(claim_of("two")) == UnknownVersion(1.0)
    if result is ErrorCode.SUCCESS:
        assert driver.issue(newer(claim_of("two"))) == HIT
    else:
        assert isinstance(driver.issue(newer(claim_of("two"))), Send)


@pytest.mark.parametrize("error", list(ErrorCode)[:7])
def test_a_known_error_is_remembered_and_sends_nothing(error: ErrorCode, driver: Driver) -> None:
    assert driver.issue(claim_of("one"), error=error) == Answered(error)
    assert driver.answer_of(claim_of("one")) is error
    assert driver.code() is None


def test_a_known_error_takes_the_lease_from_its_holder(driver: Driver) -> None:
    driver.send(claim_of("one"))
    driver.issue(claim_of("one"), error=ErrorCode.EXCEPTION)
    assert driver.renew(claim_of("one")) == [False]


def test_an_answer_is_remembered_for_an_hour(driver: Driver) -> None:
    driver.deliver(claim_of("one"))
    driver.pass_time(3_599_000)
    assert driver.answer_of(claim_of("one")) is ErrorCode.SUCCESS
    driver.pass_time(1_001)
    driver.send(claim_of("one"))


NO_ADDRESSES: list[object] = ["", "no address", "a@\ud800", "a\r\nb", "x" * 10_000, None, 7, [], {"a": 1}]
NO_PURPOSES: list[object] = ["", "two words", "\ud800", None, 7, ["reset"]]


@pytest.mark.parametrize(
    ("email", "purpose"),
    [*((email, "default") for email in NO_ADDRESSES), *((EMAIL, purpose) for purpose in NO_PURPOSES)],
)
def test_a_known_error_is_remembered_of_any_address_and_purpose(email: object, purpose: object, driver: Driver) -> None:
    claim = Claim.of("one", "token", email, purpose, EMAIL if email == EMAIL else "")
    assert driver.issue(claim, error=ErrorCode.EXCEPTION) == Answered(ErrorCode.EXCEPTION)
    assert driver.answer_of(claim) is ErrorCode.EXCEPTION


# --- deadlines ---


def test_a_request_older_than_the_deadline_is_answered_unsent(driver: Driver) -> None:
    assert driver.issue(claim_of("one"), enqueued_at=driver.now() - 301) == Answered(ErrorCode.TIMEOUT)
    assert driver.code() is None
    assert driver.answer_of(claim_of("one")) is ErrorCode.TIMEOUT


@pytest.mark.parametrize("ahead", [None, 10, 1_000_000, 1e15])
def test_without_a_time_or_with_a_future_one_the_age_counts_from_the_first_issue(
    ahead: float | None, driver: Driver
) -> None:
    enqueued_at = None if ahead is None else driver.now() + ahead
    assert 299 < driver.send(claim_of("one"), enqueued_at=enqueued_at).remaining <= 300
    driver.settle(claim_of("one"), FAILED)
    driver.pass_time(299_000)
    assert driver.send(claim_of("one"), enqueued_at=enqueued_at).remaining <= 1
    driver.settle(claim_of("one"), FAILED)
    driver.pass_time(1_001)
    assert driver.issue(claim_of("one"), enqueued_at=enqueued_at) == Answered(ErrorCode.TIMEOUT)


def test_the_age_of_a_joined_request_counts_from_when_it_joined(driver: Driver) -> None:
    [two] = joined(driver, 1)
    driver.pass_time(300_001)
    assert driver.issue(claim_of(two)) == Answered(ErrorCode.TIMEOUT)


def test_age_and_expiry_can_only_shorten_the_time(driver: Driver) -> None:
    now = driver.now()
    assert 198 < driver.send(claim_of("one"), enqueued_at=now - 100).remaining <= 200.1
    assert 48 < driver.send(claim_of("two", OTHER), expires_at=now + 50).remaining <= 50.1
    assert 298 < driver.send(claim_of("three", "c@example.com"), expires_at=now + 5_000).remaining <= 300


def test_a_request_past_its_deadline_is_left_to_the_holder_of_a_live_lease(driver: Driver) -> None:
    driver.set_policy(give_up_after=5_000)
    driver.send(claim_of("one", token="a"))
    driver.pass_time(6_000)
    assert isinstance(driver.issue(claim_of("one", token="b")), Wait)


# --- checks ---


def test_the_right_code_works_once(driver: Driver) -> None:
    code = driver.deliver(claim_of("one"))
    assert [driver.check(code), driver.check(code)] == [ErrorCode.SUCCESS, ErrorCode.VARIFY_EXPIRED]


def test_a_code_expires(driver: Driver) -> None:
    code = driver.deliver(claim_of("one"))
    driver.pass_time(600_001)
    assert driver.check(code) is ErrorCode.VARIFY_EXPIRED


@pytest.mark.parametrize("max_attempts", [1, 5])
def test_the_last_allowed_wrong_check_drops_the_code(max_attempts: int, driver: Driver) -> None:
    driver.set_policy(max_attempts=max_attempts)
    code = driver.deliver(claim_of("other", OTHER))
    for _ in range(max_attempts - 1):
        driver.check("wrong", OTHER)
    assert driver.check(code, OTHER) is ErrorCode.SUCCESS
    code = driver.deliver(claim_of("one"))
    assert {driver.check("wrong") for _ in range(max_attempts)} == {ErrorCode.VARIFY_CODE_ERR}
    assert driver.check(code) is ErrorCode.VARIFY_EXPIRED
    assert driver.code() is None


def test_attempts_survive_a_resend(driver: Driver) -> None:
    driver.set_policy(cooldown=0)
    code = driver.deliver(claim_of("one"))
    for _ in range(4):
        driver.check("wrong")
    assert driver.deliver(claim_of("two")) == code
    assert driver.check("wrong") is ErrorCode.VARIFY_CODE_ERR
    assert driver.check(code) is ErrorCode.VARIFY_EXPIRED


@pytest.mark.parametrize("fate", ["dropped", "too short-lived", "overwritten"])
def test_a_new_code_has_attempts_of_its_own(fate: str, driver: Driver) -> None:
    driver.set_policy(cooldown=0, code_max_length=POLICY.code_length)
    driver.deliver(claim_of("one"))
    for _ in range(5 if fate == "dropped" else 4):
        driver.check("wrong")
    if fate == "overwritten":
        driver.put_code("a1b2", 300_000)
    elif fate == "too short-lived":
        driver.pass_time(560_000)
    code = driver.deliver(claim_of("two"))
    assert {driver.check("wrong") for _ in range(4)} == {ErrorCode.VARIFY_CODE_ERR}
    assert driver.check(code) is ErrorCode.SUCCESS


# --- codes that grow ---

MANY = 99


def grow(driver: Driver, *steps: int) -> list[int]:
    """Make so many wrong checks at one code after the other, each asked for anew. The lengths of the codes."""
    lengths = []
    for number, times in enumerate(steps):
        lengths.append(len(driver.deliver(claim_of(f"step {number}"))))
        assert set(driver.guess(times)) <= {ErrorCode.VARIFY_CODE_ERR}
    return lengths


@pytest.mark.parametrize(
    ("policy", "lengths", "attempts"),
    [
        ({"max_attempts": 1}, [6, 8, 8, 10], [1, 99, 1, 1]),
        ({"max_attempts": 5}, [6, 8, 10], [5, 500, 1]),
        ({"max_attempts": 2, "code_max_length": 8}, [6, 8, 8], [2, 200, 200]),
        ({"max_attempts": 2, "code_length": 5, "code_max_length": 6}, [5, 6, 6], [2, 20, 20]),
        ({"max_attempts": 5, "code_max_length": 6}, [6, 6, 6], [5, 5, 5]),
        ({"code_length": 12}, [12, 12], [5, 5]),
    ],
    ids=["one attempt", "defaults", "two lengths", "odd difference", "off", "longest from the start"],
)
def test_after_wrong_checks_the_next_code_is_longer_and_has_more_attempts(
    policy: dict[str, int], lengths: list[int], attempts: list[int], driver: Driver
) -> None:
    driver.set_policy(cooldown=0, **policy)
    assert grow(driver, *attempts) == lengths


@pytest.mark.parametrize("stops", [0, 1], ids=["burns each code", "stops short of it"])
def test_wrong_checks_are_counted_across_codes(stops: int, driver: Driver) -> None:
    driver.set_policy(cooldown=0, min_life=0, address=Bucket(180_000, 1000))
    lengths = []
    for number in range(5):
        lengths.append(len(driver.deliver(claim_of(f"code {number}"))))
        driver.guess(5 - stops)
        driver.pass_time(600_001)
    assert lengths == ([6, 8, 8, 8, 8] if not stops else [6, 6, 8, 8, 8])


def test_all_spellings_of_an_address_have_one_count(driver: Driver) -> None:
    spellings = [EMAIL, "Anna@example.com", " anna@example.com", "ANNA@EXAMPLE.COM"]
    codes = {email: driver.deliver(claim_of(email, email)) for email in spellings}
    assert driver.guess(3) + driver.guess(2, "Anna@example.com") == [ErrorCode.VARIFY_CODE_ERR] * 5
    for email in spellings:  # a right code comes too late: it could have been found by 5 guesses at each spelling
        assert driver.check(codes[email], email) is ErrorCode.VARIFY_EXPIRED
        assert driver.code(email) is None
    assert len(driver.deliver(claim_of("next", "aNNa@example.com"))) == 8


def test_each_purpose_has_its_own_count(driver: Driver) -> None:
    driver.set_policy(cooldown=0)
    driver.deliver(claim_of("one", purpose="reset"))
    driver.guess(5, purpose="reset")
    assert len(driver.deliver(claim_of("two"))) == 6
    assert len(driver.deliver(claim_of("three", purpose="reset"))) == 8


def test_a_right_check_ends_the_count(driver: Driver) -> None:
    driver.set_policy(cooldown=0)
    grow(driver, 5)
    code = driver.deliver(claim_of("two"))
    assert driver.check(code) is ErrorCode.SUCCESS
    assert len(driver.deliver(claim_of("three"))) == 6


def test_the_count_lives_a_day_from_the_first_wrong_check(driver: Driver) -> None:
    driver.set_policy(cooldown=0)
    driver.deliver(claim_of("one"))
    driver.guess(1)
    driver.pass_time(86_000_000)
    driver.deliver(claim_of("two"))
    driver.guess(4)
    assert len(driver.deliver(claim_of("three"))) == 8
    driver.pass_time(401_000)
    driver.check("wrong")  # at the code of 8 digits, which lives on
    assert len(driver.deliver(claim_of("other", OTHER))) == 6
    driver.pass_time(600_000)
    assert len(driver.deliver(claim_of("four"))) == 6


def test_a_check_without_a_live_code_does_not_count(driver: Driver) -> None:
    assert set(driver.guess(MANY)) == {ErrorCode.VARIFY_EXPIRED}
    assert len(driver.deliver(claim_of("one"))) == 6


@pytest.mark.parametrize(
    "given", ["", "1", "letters", "\ud800", "9" * 10_000, "\0", "\uff11\uff12\uff13\uff14\uff15\uff16"]
)
def test_a_malformed_guess_counts(given: str, driver: Driver) -> None:
    driver.set_policy(cooldown=0)
    driver.deliver(claim_of("one"))
    assert [driver.check(given) for _ in range(5)] == [ErrorCode.VARIFY_CODE_ERR] * 5
    assert len(driver.deliver(claim_of("two"))) == 8


def test_a_code_that_has_become_too_short_starts_no_cooldown(driver: Driver) -> None:
    other = "Anna@example.com"
    driver.deliver(claim_of("one"))
    driver.deliver(claim_of("two", other))
    driver.guess(5, other)
    assert len(driver.send(claim_of("three")).code) == 8


def test_a_longer_code_is_kept_when_it_is_sent_again(driver: Driver) -> None:
    driver.set_policy(cooldown=0)
    grow(driver, 5)
    code = driver.deliver(claim_of("two"))
    driver.guess(400)
    assert driver.deliver(claim_of("three")) == code
    assert driver.check(code) is ErrorCode.SUCCESS


def test_a_longer_code_is_still_right_after_its_count_has_ended(driver: Driver) -> None:
    driver.set_policy(cooldown=0, ttl=172_800_000, min_life=0)
    driver.deliver(claim_of("one"))
    driver.guess(5)
    code = driver.deliver(claim_of("two"))
    driver.pass_time(86_400_001)
    driver.guess(MANY)
    assert driver.check(code) is ErrorCode.SUCCESS


def test_a_code_that_a_relay_may_have_accepted_is_not_replaced_by_a_longer_one(driver: Driver) -> None:
    other = "Anna@example.com"
    driver.send(claim_of("one"))
    driver.settle(claim_of("one"), UNKNOWN)
    driver.deliver(claim_of("two", other))
    driver.guess(5, other)
    assert driver.issue(claim_of("one")) == Answered(ErrorCode.TIMEOUT)


@pytest.mark.parametrize("wrong", [0, 4])
def test_a_code_of_an_older_server_is_right_until_codes_have_grown(wrong: int, driver: Driver) -> None:
    driver.put_code("a1b2", 300_000)
    assert driver.deliver(claim_of("one")) == "a1b2"
    driver.guess(wrong)
    assert driver.check("a1b2") is ErrorCode.SUCCESS
    driver.put_code("a1b2", 300_000)
    driver.guess(5)
    driver.put_code("c3d4", 300_000)
    assert driver.checked("c3d4") == Checked(ErrorCode.VARIFY_EXPIRED, burnt=True)
    driver.put_code("e5f6", 300_000)
    assert len(driver.send(claim_of("two")).code) == 8


def test_a_check_tells_that_it_dropped_the_code(driver: Driver) -> None:
    driver.deliver(claim_of("one"))
    wrong = Checked(ErrorCode.VARIFY_CODE_ERR)
    assert [driver.checked("wrong") for _ in range(5)] == [*[wrong] * 4, Checked(wrong.error, burnt=True)]
    assert driver.checked("wrong") == Checked(ErrorCode.VARIFY_EXPIRED)


# --- attacks ---


def test_wrong_checks_by_a_stranger_do_not_lock_the_owner_out(driver: Driver) -> None:
    asked = 0
    for login in range(8):
        for again in range(3):
            code = driver.deliver(claim_of(f"login {login} {again}"))
            asked += 1
            driver.pass_time(30_000)  # the owner reads the mail, while the stranger sends 5 wrong checks a second
            driver.guess(150)
            if driver.check(code) is ErrorCode.SUCCESS:
                break
        else:
            pytest.fail("the owner is locked out")
        driver.pass_time(600_000)
    assert asked <= 16


@pytest.mark.parametrize(
    ("guesses", "wait", "emails"),
    [
        (5, 0, [EMAIL]),
        (4, 600_000, [EMAIL]),
        (5, 0, [EMAIL, "Anna@example.com", "ANNA@example.com"]),
        (108, 3_600_000, [EMAIL]),
    ],
    ids=["burns each code", "stops short of it", "three spellings", "guesses all day"],
)
def test_a_day_of_guessing_finds_a_code_as_rarely_as_promised(
    guesses: int, wait: int, emails: list[str], driver: Driver
) -> None:
    driver.set_policy(address=Bucket.of(4), cooldown=0)
    end, spared, tried = driver.now() + 86_400, 1.0, 0
    for number, email in enumerate(itertools.cycle(emails)):
        if driver.now() >= end:
            break
        found = driver.issue(claim_of(f"id-{number}", email))
        if isinstance(found, Send):
            driver.settle(claim_of(f"id-{number}", email))
            wrong = driver.guess(guesses, email).count(ErrorCode.VARIFY_CODE_ERR)
            tried += wrong
            spared *= 1 - wrong / 10 ** len(found.code)
            driver.pass_time(wait)
        else:
            driver.pass_time(900_000)
    assert tried > 300
    assert 1 - spared <= 3 * 5e-6
    assert 1 - spared <= chance_a_day(driver.policy, Attacker(guesses_a_day=tried)) * (1 + 1e-6)


@pytest.mark.parametrize("stops_short", [False, True])
def test_without_growth_a_day_of_guessing_has_the_chance_that_is_computed(stops_short: bool, driver: Driver) -> None:
    driver.set_policy(address=Bucket(3_600_000, 2), cooldown=0, code_max_length=6, min_life=0, ttl=7_200_000)
    tried: list[ErrorCode] = []
    for _ in range(12 if stops_short else 25):  # with the moment at which the day ends
        while isinstance(driver.issue(claim := claim_of(f"id-{len(tried)}")), Send):
            driver.settle(claim)
            tried += driver.guess(4 if stops_short else 5)
            if stops_short:
                break
        driver.pass_time(7_200_000 if stops_short else 3_600_000)
    chance = chance_a_day(driver.policy, Attacker(burns_codes=not stops_short))
    assert set(tried) == {ErrorCode.VARIFY_CODE_ERR}
    assert len(tried) / 1e6 == pytest.approx(chance, rel=1e-3)


@pytest.mark.parametrize(
    "given",
    [
        *("", " 123456", "123456 ", "12345", "1234567", "123456\0", "\ud800", "9" * 10_000),
        "\uff11\uff12\uff13\uff14\uff15\uff16",  # 123456, full width
    ],
)
def test_a_code_is_compared_byte_for_byte(given: str, driver: Driver) -> None:
    driver.deliver(claim_of("one"), "123456")
    assert driver.check(given) is ErrorCode.VARIFY_CODE_ERR
    assert driver.check("123456") is ErrorCode.SUCCESS


def test_a_check_goes_by_the_address_as_the_request_gave_it(driver: Driver) -> None:
    code = driver.deliver(claim_of("one", "Anna@example.com"))
    assert driver.check(code, "anna@example.com") is ErrorCode.VARIFY_EXPIRED
    assert driver.check(code, "Anna@example.com") is ErrorCode.SUCCESS


@pytest.mark.parametrize(
    "email",
    [
        *("用户@例子.中国", "  anna@example.com ", "o'brien@example.com", "{a}@example.com"),
        *("a*b?@example.com", "a%s{0}$@example.com"),
    ],
)
def test_unusual_addresses_work_like_any_other(email: str, driver: Driver) -> None:
    code = driver.deliver(claim_of("one", email))
    assert driver.check("wrong", email) is ErrorCode.VARIFY_CODE_ERR
    assert driver.check(code, email) is ErrorCode.SUCCESS


@pytest.mark.parametrize(
    "email",
    [
        *(EMAIL, "", " ", "a:b:c", 'a"b\\c', "a\r\nSET x y\r\n", "\0", "x" * 10_000, "\ud800@example.com", "code_x"),
        "😀" * 50,
    ],
)
@pytest.mark.parametrize("purpose", ["default", "reset"])
def test_a_check_without_a_live_code_leaves_nothing(email: str, purpose: str, driver: Driver) -> None:
    before = driver.snapshot()
    assert driver.check("123456", email, purpose) is ErrorCode.VARIFY_EXPIRED
    assert driver.snapshot() == before
