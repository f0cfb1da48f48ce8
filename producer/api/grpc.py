"""The gRPC API: the old server's service, and the standard health and reflection services."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final
from urllib.parse import unquote

import grpc
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from producer.api.http_connection import BODY_LIMIT
from producer.api.keys import NEEDED, KeyCheck
from producer.api.proto import METHOD, SERVICE, GetVarifyReq, GetVarifyRsp, file_descriptor
from producer.api.state import Api
from producer.api.tls import Certificates
from producer.audit import Audit
from producer.contract import CLIENT_HEADER, LONGEST_CLIENT, is_client

MESSAGE_TIMEOUT: Final = 5.0  # seconds for a call's message, of which a caller sends the head alone

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


_Context = grpc.aio.ServicerContext[Any, Any]
# Probes have no key, and learn nothing from health.
_OPEN: Final = frozenset({f"/{health.SERVICE_NAME}/Check", f"/{health.SERVICE_NAME}/Watch"})


class _CallersMistakes(logging.Filter):
    """Drops what grpc.aio logs of a call whose path or metadata is no UTF-8: three tracebacks, for anybody who asks."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it."""
        return not (record.exc_info and isinstance(record.exc_info[1], UnicodeDecodeError))


_CALLERS_MISTAKES: Final = _CallersMistakes()


class GrpcServer:
    """One gRPC server on the running loop."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stub is older
        logging.getLogger("grpc._cython.cygrpc").addFilter(_CALLERS_MISTAKES)
        self._server = grpc.aio.server(options=_OPTIONS)
        services = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflecting: Any = reflection.aio.ReflectionServicer(services, pool=_reflected())  # type: ignore[attr-defined]
        methods = {
            f"/{SERVICE}/{METHOD}": _unary(
                self._get_varify_code if api.traces is None else self._traced, GetVarifyRsp.SerializeToString
            ),
            f"/{health.SERVICE_NAME}/Check": _unary(self._check, health_pb2.HealthCheckResponse.SerializeToString),
            f"/{health.SERVICE_NAME}/Watch": grpc.stream_stream_rpc_method_handler(
                self._watch, response_serializer=health_pb2.HealthCheckResponse.SerializeToString
            ),
            f"/{reflection.SERVICE_NAME}/ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
                reflecting.ServerReflectionInfo,
                reflection_pb2.ServerReflectionRequest.FromString,
                reflection_pb2.ServerReflectionResponse.SerializeToString,
            ),
        }
        keys = KeyCheck(api.settings.api_keys) if api.settings.api_keys else None
        self._server.add_generic_rpc_handlers((_Methods(methods, keys, api.audit),))

    async def start(self, address: str, tls: Certificates | None = None) -> int:
        """Listen on `host:port` and return the port. Raises `RuntimeError` if that is not possible."""
        port: int
        if tls is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, tls.grpc_credentials())
        await self._server.start()
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        return port

    async def announce_shutdown(self) -> None:
        """Tell clients that watch our health that this server is about to shut down."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Accept nothing new, and give calls under way `grace` seconds. A second call can shorten that."""
        await self._server.stop(grace)

    async def _traced(self, raw: bytes, context: _Context) -> Any:
        assert self._api.traces is not None  # noqa: S101 - tells the type checker
        name = f"{SERVICE}/{METHOD}"
        attributes = {"rpc.system.name": "grpc", "rpc.method": name}
        with self._api.traces.serving(name, context.invocation_metadata() or (), attributes) as span:
            answer = await self._get_varify_code(raw, context)
            span.set_attribute("rpc.response.status_code", "OK")
            return answer

    async def _get_varify_code(self, raw: bytes, context: _Context) -> Any:
        email = (await _parsed(GetVarifyReq, raw, context)).email
        client = await _client(context)
        wait = self._api.relays.wait()
        reply = self._api.client.request(email, client=client, observer=wait)
        error = await self._api.answer("grpc", "request", wait.reply(reply))
        # `code` stays empty: only the owner of the mailbox may read it.
        return GetVarifyRsp(error=int(error), email=email)

    async def _check(self, raw: bytes, context: _Context) -> Any:
        return await self._health.Check(await _parsed(health_pb2.HealthCheckRequest, raw, context), context)

    async def _watch(self, _messages: object, context: _Context) -> None:
        raw = await _message(context)
        await self._health.Watch(await _parsed(health_pb2.HealthCheckRequest, raw, context), context)


class _Methods(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in its stub alone
    """Finds a call's method once the call has shown its key."""

    def __init__(
        self, methods: Mapping[str, grpc.RpcMethodHandler[Any, Any]], keys: KeyCheck | None, audit: Audit
    ) -> None:
        self._methods = methods
        self._keys = keys
        self._audit = audit
        self._no_key = grpc.stream_unary_rpc_method_handler(self._refuse)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The method's handler; None if there is none."""
        if (
            self._keys is not None
            and details.method not in _OPEN
            and not self._keys.is_let_in(_authorization(details.invocation_metadata))
        ):
            return self._no_key
        return self._methods.get(details.method)

    async def _refuse(self, _messages: object, context: _Context) -> None:
        if _authorization(context.invocation_metadata() or ()):
            self._audit.wrong_key("grpc", _address(context.peer()))
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, NEEDED)


async def _client(context: _Context) -> str | None:
    """The caller's word for its end user. Refuses the call if it is too long, or if there are two."""
    given = [value for name, value in context.invocation_metadata() or () if name == CLIENT_HEADER]
    if len(given) > 1 or not all(map(is_client, given)):
        what = f"{CLIENT_HEADER} must come once, with at most {LONGEST_CLIENT} characters"
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, what)
    return str(given[0]) if given else None


def _authorization(metadata: Iterable[tuple[str, str | bytes]]) -> list[bytes]:
    given = (value for name, value in metadata if name == "authorization")
    return [value if isinstance(value, bytes) else value.encode() for value in given]


def _address(peer: str) -> str:
    """The IP address in gRPC's name for the other end: `ipv4:127.0.0.1:40000`, `ipv6:%5B::1%5D:40000`."""
    return unquote(peer.partition(":")[2].rpartition(":")[0]).strip("[]")


def _unary(
    handle: Callable[[bytes, _Context], Awaitable[Any]], serialize: Callable[[Any], bytes]
) -> grpc.RpcMethodHandler[Any, Any]:
    """A method that takes one message, which it parses: gRPC would answer a malformed one with an error of its own.

    For gRPC it takes a stream, because a unary method waits for its message as long as the caller likes.
    """

    async def serve(_messages: object, context: _Context) -> Any:
        return await handle(await _message(context), context)

    return grpc.stream_unary_rpc_method_handler(serve, response_serializer=serialize)


async def _message(context: _Context) -> bytes:
    """The call's first message. The call is aborted if it does not come in time, or not at all."""
    try:
        async with asyncio.timeout(MESSAGE_TIMEOUT):
            raw = await context.read()
    except TimeoutError:
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no message within {MESSAGE_TIMEOUT:g} s")
    if not isinstance(raw, bytes):
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no message")
    return raw


async def _parsed(kind: Any, raw: bytes, context: _Context) -> Any:
    try:
        return kind.FromString(raw)
    except DecodeError:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"not a {kind.DESCRIPTOR.full_name}")


def _reflected() -> DescriptorPool:
    """A pool with all our services: ours is not in protobuf's default pool, the standard ones are only there."""
    pool = DescriptorPool()
    files = (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
    for file in (file_descriptor(), *(FileDescriptorProto.FromString(each.serialized_pb) for each in files)):
        pool.Add(file)
    return pool
