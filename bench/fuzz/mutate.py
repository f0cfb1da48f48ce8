"""Breaks what is well-formed. The same random numbers break it the same way."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Sequence
from typing import Any, Final

_NUMBERS: Final = (
    *("0", "-1", "1", "127", "128", "255", "256", "65535", "65536", "65537", "2147483647", "2147483648", "4294967296"),
    *("9223372036854775807", "9223372036854775808", "18446744073709551616", "1e308", "1e999", "-0.0", "00", "NaN"),
)
_LONGEST_RUN: Final = 64  # bytes that are removed or repeated at once
# fmt: off
VALUES: Final[Sequence[Any]] = (
    None, True, False, 0, -1, 42, 1.5, 1e308, 2**63, 10**30, "", " ", "x", "\x00", "\xe9", "\U0001f600", "\ud800",
    "a" * 5000, "a" * 70_000, "***", [], [[]], [None], {}, {"a": 1}, {"": ""}, "application/x-python-serialize",
    "utf-16", "2020-01-01T00:00:00", "NaN", "verification.send_code", "celery.backend_cleanup", "../../etc", "'; DROP",
    "%s%n", "a@example.com", "a@b@example.com", '"a b"@example.com', "\u202e@example.com", "a\r\nBcc: b@example.com",
    "login", "zh-CN", "x" * 64, "x" * 65,
)
# fmt: on
JSON_TOKENS: Final = (
    *(b'"', b"{", b"}", b"[", b"]", b"\\", b",", b":", b"\x00", b"\\ud800", b"\\u0000", b"NaN", b"e999", b"null"),
    *(b"\xff\xfe", b"\xed\xa0\x80", b'{"a":' * 300, b"[" * 2000, b'"email":"b@example.com",', b"=", b"===="),
)


class Mutator:
    """Takes its random numbers from `chance`."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def garbled(self, data: bytes, tokens: Sequence[bytes], others: Sequence[bytes] = ()) -> bytes:
        """`data` with one to five changes. `tokens` may get in anywhere; a part of one of `others` replaces the end."""
        for _ in range(self._chance.choice((1, 1, 1, 2, 3, 5))):
            data = self._changed(data, tokens, others)
        return data

    def _changed(self, data: bytes, tokens: Sequence[bytes], others: Sequence[bytes]) -> bytes:
        chance = self._chance
        at = chance.randrange(len(data)) if data else 0
        end = min(len(data), at + chance.randint(1, _LONGEST_RUN))
        match chance.randrange(9):
            case 0 if data:
                return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
            case 1:
                return data[:at] + chance.randbytes(1) + data[at + 1 :]
            case 2:
                return data[:at] + chance.randbytes(chance.randint(1, 8)) + data[at:]
            case 3:
                return data[:at] + data[end:]
            case 4:
                return data[:at]
            case 5:
                return data[:at] + data[at:end] * chance.choice((2, 2, 3, 100)) + data[end:]
            case 6 if others:
                other = chance.choice(others)
                return data[:at] + other[chance.randrange(len(other)) :]
            case 7 if numbers := list(re.finditer(rb"\d+", data)):
                found = chance.choice(numbers)
                return data[: found.start()] + chance.choice(_NUMBERS).encode() + data[found.end() :]
            case _:
                return data[:at] + chance.choice(tokens) + data[at:]

    def restructured(self, value: Any, keys: Sequence[str] = ()) -> Any:
        """A copy of decoded JSON with one place removed, replaced, or added under one of `keys`."""
        value = copy.deepcopy(value)
        place = value
        while True:
            inner = [key for key in _keys(place) if isinstance(place[key], dict | list) and place[key]]
            if not inner or self._chance.random() < 0.3:
                break
            place = place[self._chance.choice(inner)]
        other = copy.deepcopy(self._chance.choice(VALUES))
        if not _keys(place) or self._chance.random() < 0.05:
            return other
        key = self._chance.choice(_keys(place))
        if isinstance(place, dict) and keys and self._chance.random() < 0.3:
            place[self._chance.choice(keys)] = other
        elif self._chance.random() < 0.3:
            del place[key]
        else:
            place[key] = other
        return value


def _keys(place: Any) -> list[Any]:
    if isinstance(place, dict):
        return list(place)
    return list(range(len(place))) if isinstance(place, list) else []
