"""Whatever is sent to the API: it is answered, and the process survives."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from support.api_process import ApiProcess, answer_of, request_bytes
from support.fake_worker import FakeWorker
from support.redis_server import RedisServer

from producer.api.proto import GetVarifyReq

EXAMPLES = 60
HTTP_METHODS = ("GET", "POST", "PUT", "HEAD", "OPTIONS", "TRACE", "CONNECT", "BREW")
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def api(redis_server: RedisServer) -> Iterator[ApiProcess]:
    with redis_server.client() as client:
        client.flushall()
    with (
        FakeWorker(redis_server),
        ApiProcess({"VERIFY_REDIS_URL": redis_server.url(), "VERIFY_REPLY_TIMEOUT": "1"}) as api,
    ):
        yield api
        assert api.get_code("a@example.com")["error"] == 0
        assert api.call("a@example.com").error == 0


def test_the_description_holds(api: ApiProcess) -> None:
    # /readyz answers 503, as there is no worker; a malformed body is answered 200 with error 1001, by contract.
    load_all_checks()
    unfit: list[Any] = CHECKS.get_by_names(["not_a_server_error", "negative_data_rejection"])
    description = schemathesis.openapi.from_url(f"http://127.0.0.1:{api.http_port}/openapi.json")
    tried = set()
    for found in description.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        for mode in GenerationMode:

            @FUZZ
            @given(case=operation.as_strategy(generation_mode=mode))
            def hold(case: schemathesis.Case[Any]) -> None:
                case.call_and_validate(excluded_checks=unfit)

            with contextlib.suppress(Unsatisfiable):  # a GET without parameters has no negative cases
                hold()
            tried.add(operation.label)
    assert tried == {"POST /get_varifycode", "POST /check_varifycode", "GET /healthz", "GET /readyz", "GET /metrics"}


@FUZZ
@given(body=st.binary(max_size=300) | st.text().map(lambda text: f'{{"email": "{text}"}}'.encode(errors="replace")))
def test_any_body_is_answered_in_json(api: ApiProcess, body: bytes) -> None:
    for path in ("/get_varifycode", "/check_varifycode"):
        answer = api.http.post(path, content=body)
        assert answer.status_code == 200
        assert type(answer.json()["error"]) is int


def test_broken_http(api: ApiProcess) -> None:
    chance = random.Random(7)
    whole = request_bytes("/get_varifycode", b'{"email": "a@example.com"}', "Connection: close")
    for i in range(300):
        data = bytearray(whole.replace(b"POST", chance.choice(HTTP_METHODS).encode()))
        for _ in range(chance.randrange(6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with api.knock(bytes(data[: chance.randrange(len(data)) if i % 3 == 0 else None])) as connection:
            connection.shutdown(socket.SHUT_WR)
            status, _, _ = answer_of(connection)
            assert status in {0, 200, 400, 401, 404, 405, 408, 413, 431, 501}


def assert_grpc_answers(api: ApiProcess, message: bytes) -> None:
    try:
        api.call_raw(message)
    except grpc.RpcError as exc:
        assert exc.code() in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED}  # noqa: PT017


@FUZZ
@given(message=st.binary(max_size=300))
def test_any_grpc_message_is_answered(api: ApiProcess, message: bytes) -> None:
    assert_grpc_answers(api, message)


def test_mutated_grpc_messages(api: ApiProcess) -> None:
    chance = random.Random(7)
    whole = GetVarifyReq(email="a@example.com").SerializeToString()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        assert_grpc_answers(api, bytes(data))


def test_broken_http2(api: ApiProcess) -> None:
    chance = random.Random(7)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
    for i in range(200):
        with api.knock(port=api.grpc_port) as connection:
            connection.sendall((preface if i % 2 else b"") + chance.randbytes(chance.randrange(200)))
    assert api.call("nobody").error == 3
