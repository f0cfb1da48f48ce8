"""What a client decides about a request without Redis."""

from __future__ import annotations

import uuid
from fnmatch import fnmatchcase

import pytest

from producer.contract import ErrorCode, reply_key
from producer.core.replies import Replies
from producer.core.requests import build_request, certain_error
from producer.redis.connection import RedisConnections


async def test_request_ids_are_uuids_and_one_pattern_matches_those_of_one_client_only() -> None:
    ours, theirs = (Replies(RedisConnections(), "redis://127.0.0.1:1") for _ in range(2))
    mine = {ours.new_id() for _ in range(1000)}
    assert len(mine) == 1000
    for each in map(uuid.UUID, mine):
        assert (each.version, each.variant) == (4, uuid.RFC_4122)
        assert str(each) in mine
        assert fnmatchcase(reply_key(str(each)), ours.pattern)
    assert not fnmatchcase(reply_key(theirs.new_id()), ours.pattern)


@pytest.mark.parametrize(
    "email",
    ["", "   ", "a", "a@", "@b.com", "a@b@c.com", "a\r\nb@c.com", "a" * 10_000 + "@example.com", None, 7, b"a@b.c"],
)
def test_an_invalid_address_is_a_certain_error(email: object) -> None:
    assert certain_error(build_request(email, "default", None)) is ErrorCode.INVALID_ADDRESS


@pytest.mark.parametrize("purpose", ["", "A", "a b", "ä", "a" * 33, None, 7, ["default"]])
def test_a_malformed_purpose_comes_before_the_address(purpose: object) -> None:
    assert certain_error(build_request("a@example.com", purpose, None)) is ErrorCode.EXCEPTION
    assert certain_error(build_request("not an address", purpose, None)) is ErrorCode.EXCEPTION


@pytest.mark.parametrize("email", ["a@example.com", " a@example.com ", "用户@例子.中国", "a@localhost.test"])
def test_a_valid_request_has_no_certain_error(email: str) -> None:
    assert certain_error(build_request(email, "password-reset", "xx")) is None


@pytest.mark.parametrize("locale", [None, "", 7, b"en", ["en"], object()])
def test_an_invalid_locale_is_left_out(locale: object) -> None:
    assert build_request("a@example.com", "default", locale).locale is None


def test_an_unknown_locale_is_sent() -> None:
    assert build_request("a@example.com", "default", "xx").locale == "xx"
