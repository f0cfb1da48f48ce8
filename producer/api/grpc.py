"""The gRPC API: the old server's service, and the standard health and reflection services."""

from __future__ import annotations

from typing import Any, Final

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from producer.api.body import BODY_LIMIT
from producer.api.proto import METHOD, SERVICE, GetVarifyReq, GetVarifyRsp, file_descriptor
from producer.api.state import Api

_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),  # a busy port is an error
    ("grpc.max_receive_message_length", BODY_LIMIT),
    ("grpc.max_metadata_size", BODY_LIMIT),
    ("grpc.server_handshake_timeout_ms", 10_000),  # for connections that send nothing
    # Half-open connections are closed. Old ones are not: GateServer keeps its own open for ever.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


class GrpcServer:
    """One gRPC server on the running loop."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stub is older
        self._server = grpc.aio.server(options=_OPTIONS)
        # Requests are parsed by us: gRPC would answer a malformed one with an error of its own.
        handler = grpc.unary_unary_rpc_method_handler(
            self._get_varify_code if api.traces is None else self._traced,
            response_serializer=GetVarifyRsp.SerializeToString,
        )
        services = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(services, self._server, pool=_reflected())

    async def start(self, address: str) -> int:
        """Listen on `host:port` and return the port. Raises `RuntimeError` if that is not possible."""
        port: int = self._server.add_insecure_port(address)
        await self._server.start()
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        return port

    async def announce_shutdown(self) -> None:
        """Tell clients that watch our health that this server is about to shut down."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Accept nothing new, and give calls under way `grace` seconds. A second call can shorten that."""
        await self._server.stop(grace)

    async def _traced(self, raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        assert self._api.traces is not None  # noqa: S101 - tells the type checker
        name = f"{SERVICE}/{METHOD}"
        attributes = {"rpc.system.name": "grpc", "rpc.method": name}
        with self._api.traces.serving(name, context.invocation_metadata() or (), attributes) as span:
            answer = await self._get_varify_code(raw, context)
            span.set_attribute("rpc.response.status_code", "OK")
            return answer

    async def _get_varify_code(self, raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            email = GetVarifyReq.FromString(raw).email
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a message.GetVarifyReq")
        wait = self._api.relays.wait()
        error = await self._api.answer("grpc", "request", wait.reply(self._api.client.request(email, observer=wait)))
        # `code` stays empty: only the owner of the mailbox may read it.
        return GetVarifyRsp(error=int(error), email=email)


def _reflected() -> DescriptorPool:
    """A pool with all our services: ours is not in protobuf's default pool, the standard ones are only there."""
    pool = DescriptorPool()
    files = (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    for file in (file_descriptor(), *(FileDescriptorProto.FromString(each.serialized_pb) for each in files)):
        pool.Add(file)
    return pool
