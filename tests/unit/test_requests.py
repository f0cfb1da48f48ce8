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


@pytest.mark.parametrize("locale", [None, "", 7, b"en", ["en"], object(), "e" * 36])
def test_an_invalid_locale_is_left_out(locale: object) -> None:
    assert build_request("a@example.com", "default", locale).locale is None


def test_an_unknown_locale_is_sent() -> None:
    assert build_request("a@example.com", "default", "xx").locale == "xx"
    assert build_request("a@example.com", "default", "e" * 35).locale == "e" * 35


@pytest.mark.parametrize("client", ["c", "c" * 64, "\n\ud800 ä"])
def test_a_client_of_any_64_characters_is_sent(client: str) -> None:
    assert build_request("a@example.com", "default", None, client).client == client


@pytest.mark.parametrize("client", [None, ""])
def test_an_empty_client_is_none(client: str | None) -> None:
    assert build_request("a@example.com", "default", None, client).client is None


@pytest.mark.parametrize("client", ["c" * 65, 7, b"c", ["c"], False])
def test_what_cannot_be_a_client_is_refused_without_quoting_it(client: object) -> None:
    with pytest.raises(ValueError, match=r"^client must be a string of at most 64 characters, or None$"):
        build_request("a@example.com", "default", None, client)


def test_a_request_does_not_show_its_client() -> None:
    assert "somebody" not in repr(build_request("a@example.com", "default", None, "somebody"))
