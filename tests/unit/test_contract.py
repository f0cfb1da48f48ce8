"""Messages, replies, keys and error codes are those of the contract."""

from __future__ import annotations

import base64
import json
import multiprocessing
import uuid
from typing import Any

import celery
import orjson
import pytest
from celery.worker.request import Request
from hypothesis import example, given
from hypothesis import strategies as st
from kombu.connection import Connection
from kombu.transport.virtual import Message
from support.caller import message

from producer import contract
from producer.contract import ErrorCode, Reply, VerifyRequest


def test_each_error_code_has_its_number_and_name() -> None:
    assert {int(error): error.title for error in ErrorCode} == {
        0: "Success",
        1: "RedisErr",
        2: "Exception",
        3: "InvalidAddress",
        4: "TooManyRequests",
        5: "MailRejected",
        6: "Timeout",
        1001: "Error_Json",
        1003: "VarifyExpired",
        1004: "VarifyCodeErr",
    }


def test_each_error_code_says_what_it_means_and_what_to_do() -> None:
    for error in ErrorCode:
        assert error.meaning.endswith(".")
        assert error.advice.endswith(".")
    assert {error for error in ErrorCode if error.failure} == {
        ErrorCode.REDIS_ERR,
        ErrorCode.EXCEPTION,
        ErrorCode.TIMEOUT,
    }


def test_an_error_is_a_number_in_json() -> None:
    assert json.dumps({"error": ErrorCode.TIMEOUT}) == '{"error": 6}'


def _as_celery_reads_it(envelope: bytes, app: celery.Celery) -> Any:
    with Connection("memory://").channel() as channel:
        received = Message(json.loads(envelope), channel=channel)
        return Request(received, app=app, task=app.tasks[contract.TASK], decoded=False)


@pytest.fixture(scope="module")
def app() -> celery.Celery:
    """A plain Celery app with a task of that name."""
    app = celery.Celery("plain", broker="memory://", set_as_current=False)

    @app.task(name=contract.TASK)  # type: ignore[untyped-decorator]  # Celery has no types
    def send_code(**_: object) -> None:
        pass

    app.finalize()
    return app


def test_celery_reads_task_and_arguments_from_our_message(app: celery.Celery) -> None:
    request = VerifyRequest("a@example.com", purpose="reset", locale="en")
    received = _as_celery_reads_it(request.message("an-id"), app)
    assert (received.id, received.name, received.args) == ("an-id", contract.TASK, [])
    assert received.kwargs == {"email": "a@example.com", "purpose": "reset", "locale": "en"}
    assert received.correlation_id == "an-id"


def test_celery_reads_the_minimal_message_of_the_contract(app: celery.Celery) -> None:
    envelope = message({"email": "a@example.com"})
    assert _as_celery_reads_it(json.dumps(envelope).encode(), app).kwargs == {"email": "a@example.com"}


def test_celery_shows_no_argument_of_the_message(app: celery.Celery) -> None:
    received = _as_celery_reads_it(VerifyRequest("anna@example.com").message("an-id"), app)
    assert "anna" not in repr(received) + str(received) + json.dumps(received.info(safe=True), default=str)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    email=st.sampled_from(["用户@例子.中国", "a\r\nb", "\ud800", "x" * 10_000]) | st.text() | JSON,
    purpose=st.sampled_from(["default", "login"]) | JSON,
    locale=st.none() | st.text(),
    request_id=st.text(),
    queue=st.text(),
)
def test_the_message_equals_json_dumps_of_the_envelope(
    email: Any, purpose: Any, locale: str | None, request_id: str, queue: str
) -> None:
    """Whatever the address is, it arrives unchanged. Defaults are left out, so that an old worker understands."""
    raw = VerifyRequest(email, purpose, locale).message(request_id, queue=queue)
    kwargs = {"email": email}
    if purpose != "default":
        kwargs["purpose"] = purpose
    if locale is not None:
        kwargs["locale"] = locale
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    headers = {"lang": "py", "task": contract.TASK, "id": request_id, "root_id": request_id}
    headers |= {"argsrepr": "()", "kwargsrepr": "{}"}
    tag = json.loads(raw)["properties"]["delivery_tag"]
    envelope = {
        "headers": headers,
        "body": base64.b64encode(json.dumps([[], kwargs, embed]).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "properties": {
            "correlation_id": request_id,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": tag,
        },
    }
    assert raw == json.dumps(envelope).encode()


@given(
    email=st.text() | st.just('"headers": {'),
    request_id=st.text() | st.just('"headers": {'),
    trace=st.none() | st.just({"traceparent": '"headers": {'}),
    seconds=st.floats(0, 9_999_999_999),
)
def test_a_stamp_adds_the_time_and_nothing_else(
    email: str, request_id: str, trace: dict[str, str] | None, seconds: float
) -> None:
    raw = VerifyRequest(email).message(request_id, trace=trace)
    [stamped] = contract.stamp([raw], seconds)
    envelope = json.loads(raw)
    envelope["headers"]["enqueued_at"] = round(seconds, 6)
    assert json.loads(stamped) == envelope
    assert len(raw) < len(stamped) <= len(raw) + contract.LONGEST_STAMP


def test_new_uuid_makes_version_4_uuids_of_every_variant() -> None:
    made = [contract.new_uuid() for _ in range(1000)]
    assert len(set(made)) == 1000
    for each in made:
        assert str(uuid.UUID(each)) == each
        assert (uuid.UUID(each).version, uuid.UUID(each).variant) == (4, uuid.RFC_4122)
    assert {each[19] for each in made} == set("89ab")


def test_a_forked_process_makes_uuids_of_its_own() -> None:
    contract.new_uuid()
    forked = multiprocessing.get_context("fork").Pool(2)
    with forked:
        made = forked.map(_new_uuids, [10] * 8, chunksize=1)
    every = [each for several in (*made, _new_uuids(200)) for each in several]
    assert len(set(every)) == len(every)


def _new_uuids(count: int) -> list[str]:
    return [contract.new_uuid() for _ in range(count)]


def test_each_message_has_its_own_delivery_tag() -> None:
    request = VerifyRequest("a@example.com")
    tags = {json.loads(request.message("an-id"))["properties"]["delivery_tag"] for _ in range(100)}
    assert len(tags) == 100


def test_the_default_purpose_uses_the_key_that_gateserver_reads() -> None:
    assert contract.code_key(" A@example.com") == "code_ A@example.com"


def test_no_address_can_reach_the_key_of_another_purpose() -> None:
    assert contract.code_key("a@example.com", "reset") == "code:reset:a@example.com"
    assert contract.code_key("reset:a@example.com", "default") != contract.code_key("a@example.com", "reset")


@pytest.mark.parametrize("purpose", ["default", "reset", "a", "0", "_-", "a" * 32])
def test_valid_purposes(purpose: str) -> None:
    assert contract.is_purpose(purpose)


@pytest.mark.parametrize("purpose", ["", "a" * 33, "Reset", "a b", "a:b", "reset\n", "\u0661", "é", None, 1, ["reset"]])
def test_invalid_purposes(purpose: object) -> None:
    assert not contract.is_purpose(purpose)


def test_a_reply_is_stored_where_celery_stores_results() -> None:
    backend = celery.Celery("plain", backend="cache+memory://", set_as_current=False).backend
    assert contract.reply_key("an-id") == backend.get_key_for_task("an-id").decode()


@pytest.mark.parametrize("error", list(ErrorCode))
def test_a_stored_reply_is_read(error: ErrorCode) -> None:
    stored = json.dumps({"status": "SUCCESS", "result": {"email": "a@example.com", "error": int(error)}})
    assert contract.read_reply(stored.encode()) == Reply("a@example.com", error)


def written(**changed: Any) -> bytes:
    """A reply as our workers write it; `changed`: values that are others."""
    reply: dict[str, Any] = {
        "status": "SUCCESS",
        "result": {"email": "a@example.com", "error": 3},
        "traceback": None,
        "children": [],
    }
    reply |= {"date_done": "2026-12-01T02:00:00.000000+00:00", "task_id": "an-id"} | changed
    return orjson.dumps(reply)


_BYTES = [b'"', b"\\", b"{", b"}", b"\n", b"\xff", b"01", b"-", b".5", b"e9", b"7", b" ", b"\0", b",", b"null", b""]


@given(st.integers(0, 160), st.integers(0, 2), st.sampled_from(_BYTES))
@example(0, 0, b"")
def test_the_error_of_a_reply_is_read_as_json_says(at: int, cut: int, put: bytes) -> None:
    """Also of a reply whose bytes were changed, or that holds other values."""
    raw = written()
    addresses = ('a"\\@b.c', "\u7528\u6237@example.com", "", "\x7f\x00", None, {"error": 4})
    others = [written(result={"email": email, "error": 10 ** (at % 19)}) for email in addresses]
    for payload in (raw[:at] + put + raw[at + cut :], *others):
        try:
            expected = contract.read_reply(payload).error
        except ValueError:
            with pytest.raises(ValueError, match=r".+"):
                contract.read_error(payload)
        else:
            assert contract.read_error(payload) is expected


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"\xff",
        b"null",
        b"[]",
        b"7",
        b"{}",
        b'{"result": null}',
        b'{"result": []}',
        b'{"result": "x"}',
        b'{"result": {"error": 0}}',
        b'{"result": {"email": "a@example.com"}}',
        b'{"result": {"email": "a@example.com", "error": "0"}}',
        b'{"result": {"email": "a@example.com", "error": true}}',
        b'{"result": {"email": "a@example.com", "error": null}}',
        b'{"result": {"email": "a@example.com", "error": []}}',
        b'{"result": {"email": "a@example.com", "error": {}}}',
    ],
)
def test_anything_but_a_reply_is_refused(stored: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        contract.read_reply(stored)


def test_an_unknown_error_number_reads_as_exception() -> None:
    reply = contract.read_reply(b'{"result": {"email": "a@example.com", "error": 7}}')
    assert reply == contract.Reply("a@example.com", contract.ErrorCode.EXCEPTION)


def test_a_trace_context_adds_two_headers_and_nothing_else() -> None:
    trace = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": 'k="%(id)s",other=%s'}

    def made(trace: dict[str, str] | None) -> dict[str, Any]:
        envelope: dict[str, Any] = json.loads(VerifyRequest("a@example.com").message("id", trace=trace))
        envelope["properties"].pop("delivery_tag")
        return envelope

    plain, traced = made(None), made(trace)
    assert traced["headers"] == {**plain["headers"], **trace}
    assert {**traced, "headers": 0} == {**plain, "headers": 0}
    assert made({}) == plain
