"""The chance that a stranger guesses a code: by formula, by hand and by trying; and what the worker warns of."""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from support import doc_pages as pages
from support.memory_store import MemoryCodeStore
from support.store_driver import EMAIL, POLICY, claim_of

from producer.contract import ErrorCode
from producer.settings import load
from producer.store.codes import NO_BUCKET, Bucket, CodePolicy, IssueRequest, Outcome, Send
from producer.store.guessing import ACCEPTABLE, Attacker, chance_a_day, code_lengths, odds, warning

SIX_BOXES = replace(POLICY, code_max_length=6)
UNLIMITED: dict[str, Any] = {"address": NO_BUCKET}


@pytest.mark.parametrize(
    ("policy", "lengths"),
    [
        ({}, [(6, 5), (8, 500), (10, 50_000), (12, 5_000_000)]),
        ({"code_max_length": 9}, [(6, 5), (8, 500), (9, 5000)]),
        ({"code_max_length": 6}, [(6, 5)]),
        ({"code_length": 4, "max_attempts": 3, "code_max_length": 5}, [(4, 3), (5, 30)]),
    ],
)
def test_attempts_grow_like_the_number_of_codes(policy: dict[str, Any], lengths: list[tuple[int, int]]) -> None:
    assert code_lengths(replace(POLICY, **policy)) == lengths


# Worked out by hand: 500 codes a day (20 at once, one more each 180 s), 5 guesses at each; and so on.
@pytest.mark.parametrize(
    ("policy", "attacker", "chance"),
    [
        (SIX_BOXES, Attacker(), 1 - (1 - 5e-6) ** 500),
        (SIX_BOXES, Attacker(burns_codes=False), 1 - (1 - 4e-6) ** 160),  # a code is replaced every 540 s
        (SIX_BOXES, Attacker(guesses_per_second=1 / 3600), 1 - (1 - 1e-6) ** 24),
        (replace(SIX_BOXES, **UNLIMITED), Attacker(1), 1 - (1 - 5e-6) ** 17_280),
        (POLICY, Attacker(guesses_a_day=5), 5e-6),
        (POLICY, Attacker(guesses_a_day=505), 1 - (1 - 5e-6) ** 2),
        (POLICY, Attacker(guesses_a_day=2500), 1 - (1 - 5e-6) ** 2 * (1 - 1995e-10)),
        (POLICY, Attacker(), 1 - (1 - 5e-6) ** 3 * (1 - 6e5 / 1e12) ** 144),  # a code of 12 digits outlives 600,000
        (replace(POLICY, **UNLIMITED), Attacker(), 1 - (1 - 5e-6) ** 3 * (1 - 6e5 / 1e12) ** 144),
        (POLICY, Attacker(1e9), 1 - (1 - 5e-6) ** 500),
        (POLICY, Attacker(1, purposes=10**6), 1 - (1 - 5e-6) ** 500),  # each code under another purpose
        (POLICY, Attacker(guesses_a_day=10, purposes=2), 1 - (1 - 5e-6) ** 2),
        (replace(POLICY, code_length=1, code_max_length=1, max_attempts=10), Attacker(), 1.0),
    ],
)
def test_the_chance_a_day_is_what_one_works_out_by_hand(policy: CodePolicy, attacker: Attacker, chance: float) -> None:
    assert chance_a_day(policy, attacker) == pytest.approx(chance, rel=1e-3)


@pytest.mark.parametrize(
    "policy",
    [
        {"code_length": 1, "code_max_length": 1, "max_attempts": 2, "address": Bucket(10**9, 3)},
        {"code_length": 1, "code_max_length": 2, "max_attempts": 1, "address": Bucket(10**9, 3)},
    ],
    ids=["one length", "two lengths"],
)
async def test_in_a_small_code_space_the_chance_is_what_trying_it_finds(policy: dict[str, Any]) -> None:
    small = replace(POLICY, cooldown=0, **policy)
    random_source, tries = random.Random(1), 500
    found = [await _found_by_guessing(small, random_source) for _ in range(tries)]
    chance = chance_a_day(small)
    assert sum(found) / tries == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / tries))


async def _found_by_guessing(policy: CodePolicy, random_source: random.Random) -> bool:
    """Whether an attacker who burns code after code finds one before the bucket is empty."""
    store = MemoryCodeStore(policy)
    for number in itertools.count():
        claim = claim_of(f"id-{number}")
        digits = policy.code_max_length
        candidate = f"{random_source.randrange(10**digits):0{digits}}"
        [issued] = await store.issue([IssueRequest(claim, candidate)])
        if not isinstance(issued, Send):
            return False
        await store.settle([Outcome(claim, ErrorCode.SUCCESS)])
        length = len(issued.code)
        for guess in random_source.sample(range(10**length), 10**length):
            checked = await store.check(EMAIL, f"{guess:0{length}}", "default")
            if checked.error is ErrorCode.SUCCESS:
                return True
            if checked.burnt:
                break
    raise AssertionError


def test_to_spread_guesses_over_more_codes_never_helps() -> None:
    def chance(guesses: tuple[int, ...]) -> Fraction:
        return 1 - math.prod((1 - Fraction(each, 10) for each in guesses), start=Fraction(1))

    for total in range(1, 8):
        spread = [each for each in itertools.product(range(total + 1), repeat=3) if sum(each) == total]
        assert max(map(chance, spread)) == chance((total,))


LESS: dict[str, Any] = {"max_attempts": 2, "ttl": 100_000, "address": Bucket.of(10), "total": Bucket.of(1)}


@pytest.mark.parametrize("change", LESS)
def test_less_of_anything_never_raises_the_chance(change: str) -> None:
    for policy, speed in itertools.product([POLICY, SIX_BOXES, replace(POLICY, code_max_length=9)], [0.01, 1, 5, 1e4]):
        less = replace(policy, **{change: LESS[change]})
        assert chance_a_day(less, Attacker(speed)) <= chance_a_day(policy, Attacker(speed)) * (1 + 1e-9)


# --- the page ---

COLUMNS = [
    *(Attacker(5), Attacker(1000), Attacker(10_000)),
    *(Attacker(guesses_a_day=2500), Attacker(burns_codes=False)),
]


def test_the_page_on_security_has_the_chances_that_are_computed() -> None:
    rows = [row for row in pages.rows("docs/security.md", "Guessing") if row[0] == "none" or "VERIFY_" in row[0]]
    assert len(rows) > 5
    for given, *found in rows:
        policy = settings(**dict(re.findall(r"`VERIFY_(\w+)=(\d+)`", given)))
        assert found == [odds(chance_a_day(policy, attacker)) for attacker in COLUMNS], given


# --- the warning ---


def settings(**environ: Any) -> CodePolicy:
    return CodePolicy.of(load({f"VERIFY_{name}": str(value) for name, value in environ.items()}, dotenv=None))


@pytest.mark.parametrize(
    "environ",
    [{}, {"CODE_LENGTH": 10}, {"CODE_LENGTH": 5}, {"CODE_MAX_LENGTH": 6, "MAX_SENDS_PER_HOUR": 8}],
    ids=str,
)
def test_the_defaults_and_what_is_as_safe_are_not_warned_of(environ: dict[str, int]) -> None:
    policy = settings(**environ)
    assert warning(policy) is None
    assert chance_a_day(policy) <= ACCEPTABLE


@pytest.mark.parametrize(
    ("environ", "says", "names"),
    [
        ({"CODE_MAX_LENGTH": 6}, "1 in 400 a day", ["CODE_MAX_LENGTH=12", "MAX_SENDS_PER_HOUR=8"]),
        ({"CODE_LENGTH": 4}, "1 in 481 a day", ["CODE_LENGTH=6"]),
        ({"CODE_LENGTH": 4, "CODE_MAX_LENGTH": 4}, "1 in 4.5 a day", ["CODE_MAX_LENGTH=12", "CODE_LENGTH=6"]),
        ({"MAX_ATTEMPTS": 1000}, "1 in 325 a day", ["MAX_ATTEMPTS=5"]),
        (
            {"CODE_MAX_LENGTH": 6, "MAX_SENDS_PER_HOUR": 0},
            "1 in 1 a day",
            ["CODE_MAX_LENGTH=12", "MAX_SENDS_PER_HOUR=8"],
        ),
        (
            {"CODE_LENGTH": 4, "CODE_MAX_LENGTH": 4, "MAX_SENDS_PER_HOUR": 0},
            "1 in 1 a day",
            ["CODE_MAX_LENGTH=12", "CODE_LENGTH=6", "MAX_SENDS_PER_HOUR=20"],
        ),
        ({"MAX_SENDS_PER_HOUR": 0}, "only that speed bounds it", ["MAX_SENDS_PER_HOUR"]),
    ],
    ids=str,
)
def test_a_chance_above_1_in_1000_is_warned_of_in_one_line(
    environ: dict[str, int], says: str, names: list[str]
) -> None:
    line = warning(settings(**environ))
    assert line is not None
    assert "\n" not in line
    assert says in line
    for name in names:
        assert f"VERIFY_{name}" in line
    assert line.count("VERIFY_") == len(names)


def test_what_a_warning_tells_to_set_is_not_warned_of() -> None:
    assert warning(settings(CODE_MAX_LENGTH=6, MAX_SENDS_PER_HOUR=8)) is None
    assert warning(settings(CODE_MAX_LENGTH=6, MAX_SENDS_PER_HOUR=9)) is not None


@pytest.mark.parametrize(
    ("chance", "text"), [(1, "1 in 1"), (0.35, "1 in 2.9"), (0.0025, "1 in 400"), (1e-6, "1 in 1,000,000")]
)
def test_odds_have_three_digits_that_count(chance: float, text: str) -> None:
    assert odds(chance) == text
