"""API keys at HTTP and gRPC, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Final

import grpc
import pytest
import redis as redis_py
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.api_process import KEY, KEYS, WITH_KEY, ApiProcess
from support.fake_worker import FakeWorker
from support.process import eventually
from support.redis_server import RedisServer

from producer.api.proto import SERVICE, GetVarifyReq

A: Final = "a@example.com"
ASK, CHECK = "/get_varifycode", "/check_varifycode"
OTHER_KEY: Final = "#the-shop's-own-key"
RIGHT: Final = (f"Bearer {KEY}", f"bearer {OTHER_KEY}", f"BEARER  {KEY}")
WRONG: Final = (
    *(None, "", "Bearer", "Bearer wrong", KEY, f"Basic {KEY}", f"Bearer {KEY},{OTHER_KEY}", f"Bearer {KEY}e"),
    *(f"Bearer {KEYS}", f"Bearer {KEY[:-1]}", "Bearer app"),
)


@pytest.fixture(scope="module")
def api(redis_server: RedisServer) -> Iterator[ApiProcess]:
    keys = f"{KEYS}, shop:{OTHER_KEY}"
    with ApiProcess({"VERIFY_REDIS_URL": redis_server.url(), "VERIFY_API_KEYS": keys}) as api:
        yield api
        assert not any(key in api.log for key in (KEY, OTHER_KEY))


@pytest.fixture(autouse=True)
def _empty(redis: redis_py.Redis) -> None:
    """The shared server is empty at first."""


def count(api: ApiProcess, series: str) -> float:
    lines = api.http.get("/metrics", headers=WITH_KEY).text.splitlines()
    return sum(float(line.removeprefix(series)) for line in lines if line.startswith(series))


def answers(api: ApiProcess, protocol: str, key: str) -> float:
    return count(api, f'verify_api_requests_total{{error="0",key="{key}",protocol="{protocol}",verb="request"}} ')


def refusal(call: Callable[[], object]) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    code: grpc.StatusCode = raised.value.code()
    return code


class TestHttp:
    @pytest.mark.parametrize("header", WRONG)
    def test_missing_or_wrong(self, api: ApiProcess, redis: redis_py.Redis, header: str | None) -> None:
        redis.set("code_" + A, "1", ex=60)
        headers = {} if header is None else {"Authorization": header}
        for path in (ASK, CHECK, "/metrics", "/nothing"):
            answer = api.http.post(path, content=json.dumps({"email": A, "varifycode": "1"}), headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.json()["error"] == 1001
            assert answer.json()["detail"].startswith("a key is needed" if header is None else "the key is not one of")
        assert redis.get("code_" + A) == b"1"

    @pytest.mark.parametrize("header", RIGHT)
    def test_right(self, api: ApiProcess, redis_server: RedisServer, header: str) -> None:
        with FakeWorker(redis_server):
            assert api.post(ASK, {"email": A}, headers={"Authorization": header})["error"] == 0
        assert api.http.get("/metrics", headers={"Authorization": header}).status_code == 200

    def test_probes_need_none(self, api: ApiProcess) -> None:
        assert api.http.get("/healthz").status_code == 200
        assert api.http.get("/readyz").status_code == 503
        operations = api.http.get("/openapi.json").json()["paths"]
        assert "security" in operations[ASK]["post"]
        assert "security" not in operations["/healthz"]["get"]


class TestGrpc:
    @pytest.mark.parametrize("header", WRONG)
    def test_missing_or_wrong(self, api: ApiProcess, redis_server: RedisServer, header: str | None) -> None:
        metadata = () if header is None else (("authorization", header),)
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        reflect = reflection_pb2_grpc.ServerReflectionStub(api.channel).ServerReflectionInfo
        nothing = api.channel.unary_unary(f"/{SERVICE}/Nothing", bytes, bytes)
        calls: list[Callable[[], object]] = [
            lambda: api.stub(GetVarifyReq(email=A), metadata=metadata),
            lambda: list(reflect(requests, metadata=metadata)),
            lambda: nothing(b"", metadata=metadata),
        ]
        assert [refusal(call) for call in calls] == [grpc.StatusCode.UNAUTHENTICATED] * 3
        with redis_server.client(1) as broker:
            assert broker.llen("verification") == 0

    def test_two_keys_are_none(self, api: ApiProcess) -> None:
        metadata = (("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}"))
        assert refusal(lambda: api.stub(GetVarifyReq(email=A), metadata=metadata)) is grpc.StatusCode.UNAUTHENTICATED

    @pytest.mark.parametrize("header", RIGHT)
    def test_right(self, api: ApiProcess, redis_server: RedisServer, header: str) -> None:
        metadata = (("authorization", header),)
        with FakeWorker(redis_server):
            assert api.stub(GetVarifyReq(email=A), metadata=metadata).error == 0
        reflect = reflection_pb2_grpc.ServerReflectionStub(api.channel).ServerReflectionInfo
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        assert len(list(reflect(requests, metadata=metadata))) == 1
        nothing = api.channel.unary_unary(f"/{SERVICE}/Nothing", bytes, bytes)
        assert refusal(lambda: nothing(b"", metadata=metadata)) is grpc.StatusCode.UNIMPLEMENTED

    def test_health_needs_none(self, api: ApiProcess) -> None:
        stub, request = health_pb2_grpc.HealthStub(api.channel), health_pb2.HealthCheckRequest(service=SERVICE)
        assert stub.Check(request).status == next(stub.Watch(request)).status == health_pb2.HealthCheckResponse.SERVING


def test_requests_are_counted_by_the_name_of_their_key(api: ApiProcess, redis_server: RedisServer) -> None:
    before = {(protocol, key): answers(api, protocol, key) for protocol in ("http", "grpc") for key in ("app", "shop")}
    with FakeWorker(redis_server):
        assert api.call(A, key=KEY).error == 0
        for _ in range(2):
            assert api.call(A, key=OTHER_KEY).error == 0
        for _ in range(3):
            assert api.post(ASK, {"email": A}, headers=WITH_KEY)["error"] == 0
    rise = {series: answers(api, *series) - count for series, count in before.items()}
    assert rise == {("grpc", "app"): 1, ("grpc", "shop"): 2, ("http", "app"): 3, ("http", "shop"): 0}


def test_wrong_keys_are_audited_and_missing_ones_are_not(old_redis: str) -> None:
    series = 'verify_audit_events_total{event="wrong_key"} '
    # Of its own: each event has only a few lines in the log in ten seconds, and other tests use them up.
    with ApiProcess({"VERIFY_REDIS_URL": old_redis, "VERIFY_API_KEYS": KEYS}) as api:
        for header in ({}, {"Authorization": f"Bearer {OTHER_KEY}e"}):
            assert api.http.post(ASK, content=b"{}", headers=header).status_code == 401
        for key in (None, f"{OTHER_KEY}e"):
            assert refusal(lambda: api.call(A, key=key)) is grpc.StatusCode.UNAUTHENTICATED  # noqa: B023 - called at once
        assert count(api, series) == 2

        def audited() -> set[tuple[str, str]]:
            lines = [json.loads(line) for line in api.log.splitlines() if '"wrong_key"' in line]
            return {(line["protocol"], line["peer"]) for line in lines}

        eventually(lambda: audited() == {("http", "127.0.0.1"), ("grpc", "127.0.0.1")})


def test_the_log_names_the_key(old_redis: str) -> None:
    with ApiProcess({"VERIFY_REDIS_URL": old_redis, "VERIFY_API_KEYS": KEYS}) as api:
        assert api.call(A, key=KEY).error == api.post(ASK, {"email": A}, headers=WITH_KEY)["error"] == 1
        lines = [json.loads(line) for line in api.log.splitlines() if "6.2" in line]
        assert [line["key"] for line in lines if "key" in line] == ["app", "app"]
        assert KEY not in api.log
