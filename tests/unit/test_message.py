"""A task message is read, or refused with a code and a reason."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from support.caller import message

from producer.contract import TASK, VerifyRequest
from worker.queue.message import MAX_NESTING, Parsed, Reserved, TooLarge, UnfitMessage, for_celery, parse, read_job
from worker.queue.message import DeadLetterCode as Code

ADDRESS = "anna@example.com"
NOTHING = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def read(*arguments: Any, **options: Any) -> Parsed:
    return parse(Reserved("tag", json.dumps(message(*arguments, **options)).encode()))


def nested(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("args", "kwargs", "asked"),
    [
        ((), {"email": ADDRESS}, VerifyRequest(ADDRESS)),
        ((), {"email": ADDRESS, "purpose": "login", "locale": "en"}, VerifyRequest(ADDRESS, "login", "en")),
        ((ADDRESS,), {}, VerifyRequest(ADDRESS)),
        ((ADDRESS, "login"), {"locale": "en"}, VerifyRequest(ADDRESS, "login", "en")),
        ((ADDRESS, "login", "en", "me", "more"), {"more": 1}, VerifyRequest(ADDRESS, "login", "en", "me")),
        ((), {"email": ADDRESS, "client": "me"}, VerifyRequest(ADDRESS, client="me")),
        ((), {"email": ADDRESS, "client": 7}, VerifyRequest(ADDRESS, client=7)),
        ((), {"email": ADDRESS, "locale": "e" * 36}, VerifyRequest(ADDRESS)),
        (("b@example.com",), {"email": ADDRESS}, VerifyRequest(ADDRESS)),
        ((), {}, VerifyRequest(None)),
        ((), {"purpose": None}, VerifyRequest(None, None)),
        (
            (),
            {"email": nested(MAX_NESTING), "locale": nested(500)},
            VerifyRequest(nested(MAX_NESTING)),
        ),
        ((), {"email": "\ud800", "purpose": 2**70}, VerifyRequest("\ud800", 2**70)),
    ],
)
def test_positional_and_keyword_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], asked: VerifyRequest) -> None:
    parsed = read(kwargs, args=args)
    assert parsed.job.request == asked
    assert parsed.job.tag == "tag"
    assert not parsed.needs_celery


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (1700000000.25, 1700000000.25),
        (1700000000, 1700000000.0),
        (-1, 0.0),
        (10**30, 1e11),
        (1e308, 1e11),
        (True, None),
        ("1700000000", None),
        (None, None),
    ],
)
def test_enqueued_at_is_a_number_in_range_or_none(given: Any, seconds: float | None) -> None:
    found = read({"email": ADDRESS}, headers={"enqueued_at": given}).job.enqueued_at
    assert found == seconds
    assert found is None or isinstance(found, float)


@pytest.mark.parametrize(
    ("headers", "embed", "needs"),
    [
        ({}, {}, False),
        ({}, NOTHING, False),
        ({}, None, False),
        ({}, {"unknown": 1, "chain": []}, False),
        ({"eta": None, "expires": None, "group": None, "retries": 0, "timelimit": [None, None]}, NOTHING, False),
        ({"expires": "2030-01-01T00:00:00"}, NOTHING, False),
        ({"eta": "2030-01-01T00:00:00+00:00"}, NOTHING, False),
        ({"group": "g"}, NOTHING, True),
        ({}, NOTHING | {"callbacks": [{"task": "next"}]}, True),
        ({}, NOTHING | {"chord": {"task": "next"}}, True),
    ],
)
def test_which_messages_need_celery(headers: dict[str, Any], embed: Any, needs: bool) -> None:
    parsed = read({"email": ADDRESS}, headers=headers, embed=embed)
    assert parsed.needs_celery is needs
    assert parsed.eta == (1893456000.0 if headers.get("eta") else None)


@pytest.mark.parametrize("zone", ["", "Z", "+00:00"])
def test_times_are_utc_unless_they_name_a_zone(zone: str) -> None:
    headers = {"expires": f"2030-01-01T00:00:00{zone}", "eta": "2030-01-01T01:00:00+01:00"}
    parsed = read({"email": ADDRESS}, headers=headers)
    assert parsed.job.expires_at == parsed.eta == 1893456000.0


NO_ID = Code.ENVELOPE, "no id in the headers"
NO_BODY = Code.ENVELOPE, "no body"
NOT_JSON = Code.ENVELOPE, "not JSON"
BODY = Code.BODY, "the body is not JSON in base64"
PARTS = Code.BODY, "the body is not [args, kwargs, embed]"
DEEP = Code.BODY, "an argument is nested too deeply"
EXPIRES = Code.TIME, "expires is not a time in ISO 8601"
ETA = Code.TIME, "eta is not a time in ISO 8601"


def body(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


REFUSED: list[tuple[dict[str, Any], tuple[Code, str]]] = [
    ({"headers": {"task": ""}}, (Code.ENVELOPE, "no task in the headers")),
    ({"headers": {"task": "other.task", "id": None}}, (Code.UNKNOWN_TASK, "unknown task")),
    ({"headers": {"id": 5}}, NO_ID),
    ({"headers": {"id": None}}, NO_ID),
    ({"request_id": "x" * 256}, NO_ID),
    ({"request_id": "\u00e9" * 128}, NO_ID),
    ({"request_id": "\ud800"}, NOT_JSON),
    ({"headers": {"origin": "\ud800"}}, NOT_JSON),
    ({"headers": {"enqueued_at": float("inf")}}, NOT_JSON),
    ({"content_type": ["application/json"]}, (Code.ENVELOPE, "content-type is not application/json")),
    ({"content_encoding": None}, (Code.ENVELOPE, "content-encoding is not utf-8")),
    ({"body": 5}, NO_BODY),
    ({"body": None}, NO_BODY),
    ({"body": ""}, NO_BODY),
    ({"body": "***"}, BODY),
    ({"body": "é"}, BODY),
    ({"body": body("[[], {}, {}]") + "\n"}, BODY),
    ({"body": "=" + body("[[], {}, {}]")}, BODY),
    ({"body": body("[[], {}, {}]")[:-1]}, BODY),
    ({"body": body("hello")}, BODY),
    ({"body": body('[[], {"email": NaN}, {}]')}, BODY),
    ({"body": body("[" * 100_000 + "]" * 100_000)}, BODY),
    ({"body": body("{}")}, PARTS),
    ({"body": body("[[], {}]")}, PARTS),
    ({"body": body("[[], {}, {}, {}]")}, PARTS),
    ({"body": body("[{}, {}, {}]")}, PARTS),
    ({"body": body("[[], [], {}]")}, PARTS),
    ({"kwargs": {"email": nested(MAX_NESTING + 1)}}, DEEP),
    ({"kwargs": {"email": ADDRESS, "purpose": {"x": nested(MAX_NESTING)}}}, DEEP),
    ({"args": [ADDRESS, nested(MAX_NESTING + 1)]}, DEEP),
    ({"headers": {"expires": "tomorrow"}}, EXPIRES),
    ({"headers": {"expires": False}}, EXPIRES),
    ({"headers": {"expires": "9999-12-31T23:59:59-23:00"}}, EXPIRES),
    ({"headers": {"eta": 5}}, ETA),
    ({"headers": {"eta": ""}}, ETA),
    ({"embed": {"callbacks": [5]}}, (Code.BODY, "callbacks in the body: not a task signature")),
    ({"embed": {"errbacks": [{"task": 5}]}}, (Code.BODY, "errbacks in the body: not a task signature")),
    ({"embed": {"chain": "x"}}, (Code.BODY, "chain in the body: not a task signature")),
    ({"embed": {"chord": [{"task": "x"}]}}, (Code.BODY, "chord in the body: not a task signature")),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED, ids=lambda each: str(each)[:60])
def test_an_unfit_message_is_refused_with_code_and_reason(changes: dict[str, Any], reason: tuple[Code, str]) -> None:
    with pytest.raises(UnfitMessage) as refused:
        read(**{"kwargs": {"email": ADDRESS}, **changes})
    assert refused.value.reason == reason


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "not JSON"),
        (b"hello", "not JSON"),
        (b'{"headers": NaN}', "not JSON"),
        (b'{"headers": {"enqueued_at": 1e999}}', "not JSON"),
        (b'{"headers": "\xff"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[" * 30_000 + b"]" * 30_000, "not JSON"),
        (b"null", "not a JSON object"),
        (b"42", "not a JSON object"),
        (b"[]", "no headers"),
        (b"[" * 1000 + b"]" * 1000, "no headers"),
        (b"{}", "no headers"),
        (b'{"cut": {"size": "5", "message": "x"}}', "no headers"),
        (b'{"cut": 5, "headers": {}}', "no task in the headers"),
    ],
    ids=lambda each: repr(each)[:40],
)
def test_anything_but_an_envelope_is_refused(raw: bytes, text: str) -> None:
    with pytest.raises(UnfitMessage) as refused:
        parse(Reserved("tag", raw))
    assert refused.value.reason == (Code.ENVELOPE, text)


@pytest.mark.parametrize(
    ("headers", "request_id"),
    [({"id": "an-id"}, "an-id"), ({}, ""), ([], ""), (None, ""), ({"id": 5}, ""), ({"id": "x" * 256}, "")],
)
def test_a_message_that_was_cut_keeps_its_size_and_an_id_that_can_be_one(headers: Any, request_id: str) -> None:
    with pytest.raises(TooLarge) as refused:
        parse(Reserved("tag", json.dumps({"headers": headers, "cut": {"size": 70_000, "message": "{"}}).encode()))
    assert refused.value.reason == (Code.TOO_LARGE, "larger than 65536 bytes")
    assert (refused.value.size, refused.value.request_id) == (70_000, request_id)


@pytest.mark.parametrize(
    "changes",
    [
        {"headers": {"task": "other.task"}},
        {"headers": {"origin": "\ud800"}},
        {"content_type": "text/plain"},
        {"request_id": "x" * 256},
    ],
)
def test_the_address_in_a_message_is_read_though_its_envelope_is_not_sound(changes: dict[str, Any]) -> None:
    raw = json.dumps(message({"email": ADDRESS}, **changes)).encode()
    with pytest.raises(UnfitMessage):
        parse(Reserved("tag", raw))
    assert read_job(raw).request.email == ADDRESS


@pytest.mark.parametrize(
    "raw", [b"\xff", b"[]", b"5", b'{"headers": "x"}', b'{"headers": {"id": "x"}}', b"[" * 100_000]
)
def test_what_holds_no_address_is_refused(raw: bytes) -> None:
    with pytest.raises(UnfitMessage):
        read_job(raw)


def test_celery_gets_no_address_and_no_header_that_makes_it_drop_the_message() -> None:
    headers = {"eta": "2030-01-01T00:00:00", "expires": "2020-01-01T00:00:00", "compression": "zlib", "retries": "x"}
    embed = {"chain": [{"task": "next"}]}
    parsed = read({"email": ADDRESS}, request_id="an-id", headers=headers, embed=embed)
    given = for_celery(parsed)
    assert ADDRESS not in json.dumps(given)
    assert json.loads(base64.b64decode(given["body"])) == [[], {}, embed]
    assert given["headers"] == {
        "lang": "py",
        "task": TASK,
        "id": "an-id",
        "eta": None,
        "argsrepr": "()",
        "kwargsrepr": "{'email': 'a***@example.com'}",
    }
    assert given["properties"]["delivery_tag"] == "tag"
