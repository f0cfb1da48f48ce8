"""How likely a stranger is to guess a code: docs/security.md has a table, and a starting worker warns of a high chance.

A guess at a code of n digits is right with a chance of 1 in 10^n. A longer code allows more attempts, by the same
factor. So the attempts at one code together succeed with the same chance at every length: `max_attempts /
10^code_length`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

from producer.settings import Settings
from producer.store.codes import DAY, Bucket, CodePolicy

ACCEPTABLE: Final = 1 / 1000  # chance a day for one address
SPEED: Final = 1000.0  # guesses a second, for one address all day long: far more than anybody needs to type a code
MORE_DIGITS: Final = 2  # from one length to the next, as in lengths.lua
USUAL: Final = CodePolicy.of(Settings())  # that of the defaults


@dataclass(frozen=True, slots=True)
class Attacker:
    """A stranger who asks for codes of one address, and guesses at them, for a day."""

    guesses_per_second: float = SPEED
    guesses_a_day: float = math.inf  # at most, if that is fewer
    purposes: int = 1  # how many of them he guesses at; each has its own codes, and all have one bucket
    burns_codes: bool = True  # False: stops one guess short of that, and waits until the code is replaced


def code_lengths(policy: CodePolicy) -> list[tuple[int, int]]:
    """Each length that a code can have, the shortest first, with the attempts that a code of that length allows."""
    lengths = [(policy.code_length, policy.max_attempts)]
    while (length := lengths[-1][0]) < policy.code_max_length:
        longer = min(length + MORE_DIGITS, policy.code_max_length)
        lengths.append((longer, lengths[-1][1] * 10 ** (longer - length)))
    return lengths


def chance_a_day(policy: CodePolicy, attacker: Attacker = Attacker()) -> float:
    """The chance that the attacker guesses a code, if he makes the best of his day and the owner never checks one.

    Assumes that relays accept the mails, so that each is charged. He misses with a chance of `1 - guesses /
    10^digits` at each code, and the fewer codes he spreads his guesses over, the likelier he is right.
    """
    guesses = min(attacker.guesses_per_second * DAY / 1000, attacker.guesses_a_day)
    codes = min(_codes_a_day(policy.address), _codes_a_day(policy.total))
    if not attacker.burns_codes:
        codes = min(codes, attacker.purposes * math.ceil(DAY / (policy.ttl - policy.min_life)))
    in_a_life = max(1.0, attacker.guesses_per_second * policy.ttl / 1000)
    spared = 0.0  # logarithm of the chance that he guesses none
    lengths = code_lengths(policy)
    for digits, attempts in lengths:
        space = 10**digits
        at_one = min(attempts if attacker.burns_codes else max(attempts - 1, 1), in_a_life, space)
        budget = guesses if digits == lengths[-1][0] else min(guesses, attempts * attacker.purposes)
        whole = min(budget // at_one, codes)
        rest = budget - whole * at_one if codes > whole else 0.0
        if at_one >= space and whole:
            return 1.0
        spared += whole * math.log1p(-at_one / space) + math.log1p(-rest / space)
        guesses -= whole * at_one + rest
        codes -= whole + (rest > 0)
    return -math.expm1(spared)


def warning(policy: CodePolicy) -> str | None:
    """A line for the log if a stranger's chance is above ACCEPTABLE or unbounded. It names the settings to change."""
    chance = chance_a_day(policy)
    if chance <= ACCEPTABLE and policy.address.interval:
        return None
    line = (
        f"at {SPEED:,.0f} guesses a second, a stranger finds a code of an address with a chance of {odds(chance)} a day"
    )
    if chance <= ACCEPTABLE:
        return (
            f"{line}, and without VERIFY_MAX_SENDS_PER_HOUR only that speed bounds it: set it to {USUAL.address.burst}"
        )
    remedies = _remedies(policy)
    enough = [names for names, better in remedies if chance_a_day(better) <= ACCEPTABLE]
    advice = " or ".join(enough) or " and ".join(names for names, _ in remedies)
    return f"{line}: set {advice} (docs/security.md)"


def odds(chance: float) -> str:
    """`chance` as `1 in 1,230`, to three significant digits."""
    number = 1 / chance
    return f"1 in {float(f'{number:.3g}'):,.0f}" if number >= 10 else f"1 in {number:.2g}"


def _remedies(policy: CodePolicy) -> list[tuple[str, CodePolicy]]:
    """Settings to change, each with the resulting policy."""
    found = []
    if policy.code_max_length < USUAL.code_max_length:
        longest = USUAL.code_max_length
        found.append((f"VERIFY_CODE_MAX_LENGTH={longest}", replace(policy, code_max_length=longest)))
    if policy.code_length < USUAL.code_length:
        length = USUAL.code_length
        longer = replace(policy, code_length=length, code_max_length=max(length, policy.code_max_length))
        found.append((f"VERIFY_CODE_LENGTH={length}", longer))
    if policy.max_attempts > USUAL.max_attempts:
        attempts = USUAL.max_attempts
        found.append((f"VERIFY_MAX_ATTEMPTS={attempts}", replace(policy, max_attempts=attempts)))
    usual_sends = USUAL.address.burst
    for sends in range(usual_sends, 0, -1):
        fewer = replace(policy, address=Bucket.of(sends))
        if (not policy.address.interval or sends < policy.address.burst) and chance_a_day(fewer) <= ACCEPTABLE:
            found.append((f"VERIFY_MAX_SENDS_PER_HOUR={sends}", fewer))
            break
    else:
        if not policy.address.interval:
            found.append((f"VERIFY_MAX_SENDS_PER_HOUR={usual_sends}", replace(policy, address=USUAL.address)))
    return found


def _codes_a_day(bucket: Bucket) -> float:
    return bucket.burst + DAY // bucket.interval if bucket.interval else math.inf
