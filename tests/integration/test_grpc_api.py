"""The gRPC API in a process of its own, with a real Redis server and a fake worker."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from support.api_process import ApiProcess
from support.fake_worker import FakeWorker
from support.process import ROOT, eventually
from support.redis_server import RedisServer

from bench.fuzz.grpc import connection_with
from bench.fuzz.http import exchange
from producer.api.proto import METHOD, SERVICE, GetVarifyReq, GetVarifyRsp, file_descriptor

pytestmark = pytest.mark.usefixtures("redis")  # the shared server is empty at first

A = "a@example.com"
REPLY_TIMEOUT = 8  # seconds: a test waits for it, and on a loaded machine it must not run out in the others


@pytest.fixture(scope="module")
def api(redis_server: RedisServer) -> Iterator[ApiProcess]:
    settings = {"VERIFY_REDIS_URL": redis_server.url(), "VERIFY_REPLY_TIMEOUT": str(REPLY_TIMEOUT)}
    with ApiProcess(settings) as api:
        yield api


def in_flight(api: ApiProcess) -> float:
    return api.metric("verify_api_requests_in_flight", protocol="grpc")


def test_the_proto_file_compiles_to_our_descriptor(tmp_path: Path) -> None:
    words = f"-m grpc_tools.protoc -I. --descriptor_set_out={tmp_path}/message.pb message.proto"
    subprocess.run([sys.executable, *words.split()], cwd=ROOT / "producer/api", check=True, timeout=60)
    [file] = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "message.pb").read_bytes()).file
    assert file == file_descriptor()


def test_the_names_and_numbers_are_the_old_servers() -> None:
    file = file_descriptor()
    names = (file.package, file.service[0].name, file.service[0].method[0].name)
    assert names == ("message", "VarifyService", "GetVarifyCode")
    string, int32 = descriptor_pb2.FieldDescriptorProto.TYPE_STRING, descriptor_pb2.FieldDescriptorProto.TYPE_INT32
    assert {
        each.name: [(field.name, field.number, field.type) for field in each.field] for each in file.message_type
    } == {
        "GetVarifyReq": [("email", 1, string)],
        "GetVarifyRsp": [("error", 1, int32), ("email", 2, string), ("code", 3, string)],
    }


class TestRequest:
    @pytest.mark.parametrize("error", range(7))
    def test_every_answer_of_the_worker_comes_through_and_never_a_code(
        self, api: ApiProcess, redis_server: RedisServer, error: int
    ) -> None:
        with FakeWorker(redis_server, error=lambda _: error):
            said = api.call(A)
        assert (said.error, said.email, said.code) == (error, A, "")

    @pytest.mark.parametrize("email", [" A@b.example ", "ü@例子.example", "a\u0000@b", "nobody", "x" * 10_000])
    def test_the_address_comes_back_as_given(self, api: ApiProcess, redis_server: RedisServer, email: str) -> None:
        with FakeWorker(redis_server):
            assert api.call(email).email == email

    def test_an_empty_message_is_an_invalid_address(self, api: ApiProcess) -> None:
        assert api.call_raw(b"") == GetVarifyRsp(error=3).SerializeToString()

    def test_unknown_fields_are_ignored(self, api: ApiProcess, redis_server: RedisServer) -> None:
        unknown = b"\x12\x03abc\x98\x06\x07"  # field 2, a string; field 99, a number
        with FakeWorker(redis_server):
            answer = api.call_raw(unknown + GetVarifyReq(email=A).SerializeToString())
        assert GetVarifyRsp.FromString(answer).error == 0

    def test_the_metadata_names_the_end_user(self, api: ApiProcess, redis_server: RedisServer) -> None:
        with FakeWorker(redis_server) as worker:
            for word in ("c" * 64, ""):
                api.stub(GetVarifyReq(email=A), metadata=(("x-verify-client", word),))
        assert [each.kwargs for each in worker.taken] == [{"email": A, "client": "c" * 64}, {"email": A}]

    def test_without_deadline_and_worker_there_is_an_answer(self, api: ApiProcess) -> None:
        began = time.monotonic()
        assert api.call(A).error == 6
        assert time.monotonic() - began >= REPLY_TIMEOUT

    def test_500_callers_at_once_each_get_their_own_reply(self, api: ApiProcess, redis_server: RedisServer) -> None:
        emails = [f"u{i}@example.com" for i in range(500)]
        with (
            FakeWorker(redis_server, error=lambda kwargs: int(kwargs["email"][1:-12]) % 6) as worker,
            ThreadPoolExecutor(64) as pool,
        ):
            said = list(pool.map(api.call, emails))
        assert [(each.email, each.error) for each in said] == [(email, i % 6) for i, email in enumerate(emails)]
        assert len(worker.taken) == 500


class TestBadInput:
    @pytest.mark.parametrize("message", [b"\xff", b"\x0a\x05a", b"\x0a\x02\xff\xfe", b"\x0b"])
    def test_a_malformed_message(self, api: ApiProcess, message: bytes) -> None:
        with pytest.raises(grpc.RpcError) as raised:
            api.call_raw(message)
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    @pytest.mark.parametrize("words", [["c" * 65], ["a", "b"]], ids=["too long", "twice"])
    def test_malformed_words_for_the_end_user(self, api: ApiProcess, words: list[str]) -> None:
        with pytest.raises(grpc.RpcError) as raised:
            api.stub(GetVarifyReq(email=A), metadata=[("x-verify-client", word) for word in words])
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert raised.value.details() == "x-verify-client must come once, with at most 64 characters"

    def test_5_megabytes(self, api: ApiProcess) -> None:
        with pytest.raises(grpc.RpcError) as raised:
            api.call("x" * 5_000_000)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert api.call("nobody").error == 3

    def test_other_methods(self, api: ApiProcess) -> None:
        with pytest.raises(grpc.RpcError) as raised:
            api.call_raw(b"", method="GetCode")
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED

    def test_a_method_whose_name_is_no_text_ends_nothing(self, api: ApiProcess) -> None:
        exchange(api.grpc_port, connection_with(b"/message.VarifyS\xe5rvice/GetVarifyCode", b""))
        assert api.call("nobody").error == 3
        assert "UnicodeDecodeError" not in api.log

    def test_a_cancelled_call_and_one_with_a_short_deadline_leave_nothing(
        self, api: ApiProcess, redis_server: RedisServer
    ) -> None:
        calls = [api.stub.future(GetVarifyReq(email=A)) for _ in range(50)]
        eventually(lambda: in_flight(api) == 50)
        for call in calls:
            call.cancel()
        with pytest.raises(grpc.RpcError) as raised:
            api.call(A, timeout=0.1)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: in_flight(api) == 0)
        with FakeWorker(redis_server):
            assert api.call(A).error == 0

    def test_a_client_that_goes_away(self, api: ApiProcess) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{api.grpc_port}") as channel:
            call = channel.unary_unary(
                f"/{SERVICE}/{METHOD}", GetVarifyReq.SerializeToString, GetVarifyRsp.FromString
            ).future(GetVarifyReq(email=A))
            eventually(lambda: in_flight(api) == 1)
        assert call.done()
        eventually(lambda: in_flight(api) == 0)


class TestStandardServices:
    def test_health(self, api: ApiProcess) -> None:
        stub = health_pb2_grpc.HealthStub(api.channel)
        for service in ("", SERVICE):
            said = stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert said.status == health_pb2.HealthCheckResponse.SERVING

    @pytest.mark.parametrize("version", ["v1", "v1alpha"])
    def test_reflection_describes_all(self, api: ApiProcess, version: str) -> None:
        reflections = [f"grpc.reflection.{each}.ServerReflection" for each in ("v1", "v1alpha")]
        ask = api.channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
        [listed] = ask(iter(requests))
        names = [service.name for service in listed.list_services_response.service]
        assert names == sorted([SERVICE, "grpc.health.v1.Health", *reflections])
        requests = [reflection_pb2.ServerReflectionRequest(file_containing_symbol=name) for name in names]
        pool = descriptor_pool.DescriptorPool()
        for answer in ask(iter(requests)):
            [file] = answer.file_descriptor_response.file_descriptor_proto
            pool.AddSerializedFile(file)
        method = pool.FindServiceByName(SERVICE).methods_by_name[METHOD]
        assert [field.name for field in method.output_type.fields] == ["error", "email", "code"]
