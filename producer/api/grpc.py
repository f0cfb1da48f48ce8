"""The gRPC API: the old server's service, and the standard health and reflection services."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, NoReturn

import grpc
from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from producer.api.binding import CONNECTIONS_LIMIT, LISTEN_BACKLOG
from producer.api.http2 import Call, Connection, Http2Server, Refused, Status
from producer.api.keys import KeyCheck, key_name, refusal_of_key
from producer.api.models import client_in
from producer.api.proto import METHOD, SERVICE, GetVarifyReq, GetVarifyRsp, file_descriptor
from producer.api.state import Api
from producer.api.tls import Certificates
from producer.contract import CLIENT_HEADER

# Calls that stay open, to watch our health or for reflection: over all connections, and on one.
STREAMS: Final = 1000
STREAMS_EACH: Final = 4
REFLECTION_V1: Final = "grpc.reflection.v1.ServerReflection"  # which newer clients ask first
LONGEST_SERVICE: Final = 256  # characters of a service's name that somebody watches
REFLECTION_TIMEOUT: Final = 30.0  # seconds

_HEADERS: Final = frozenset({"authorization", CLIENT_HEADER, "traceparent", "tracestate"})
# Probes have no key, and learn nothing from health.
_OPEN: Final = frozenset({f"/{health.SERVICE_NAME}/Check", f"/{health.SERVICE_NAME}/Watch"})


class GrpcServer:
    """One gRPC server on the running loop."""

    def __init__(self, api: Api, connections: int = CONNECTIONS_LIMIT) -> None:
        """`connections`: at most so many."""
        self._api = api
        self._keys = KeyCheck(api.settings.api_keys) if api.settings.api_keys else None
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stub is older
        services = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME, REFLECTION_V1)
        self._reflection: Any = reflection.aio.ReflectionServicer(services, pool=_reflected())  # type: ignore[attr-defined]
        self._streams: Counter[Connection] = Counter()
        self._total = 0  # of them
        self._methods = {
            f"/{SERVICE}/{METHOD}": self._get_varify_code if api.traces is None else self._traced,
            f"/{health.SERVICE_NAME}/Check": self._check,
            f"/{health.SERVICE_NAME}/Watch": self._watch,
            f"/{reflection.SERVICE_NAME}/ServerReflectionInfo": self._reflect,
            f"/{REFLECTION_V1}/ServerReflectionInfo": self._reflect,  # the same, but for its name
        }
        evicted = partial(api.metrics.evicted, "grpc")
        self._server = Http2Server(self._methods, self._admit, _HEADERS, limit=connections, on_evicted=evicted)

    async def start(self, sockets: list[socket.socket], tls: Certificates | None = None) -> None:
        """Serve on these listening sockets."""
        await self._server.start(sockets, tls.grpc_context() if tls else None, LISTEN_BACKLOG)
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)

    async def announce_shutdown(self) -> None:
        """Tell clients that watch our health that this server is about to shut down."""
        await self._health.enter_graceful_shutdown()

    def stop_listening(self) -> None:
        """Accept no new connection."""
        self._server.stop_listening()

    async def stop(self, grace: float) -> None:
        """Accept nothing new, and give calls under way `grace` seconds. A second call can shorten that."""
        await self._server.stop(grace)

    def _admit(self, call: Call) -> None:
        """Ask for the key before anything else is looked at."""
        if self._keys is not None and call.path not in _OPEN:
            self._require_key(call, self._keys)
        if call.path not in self._methods:
            raise Refused(Status.UNIMPLEMENTED, "there is no such method")

    def _require_key(self, call: Call, keys: KeyCheck) -> None:
        given = [value.encode() for value in call.values("authorization")]
        name = keys.name_of(given)
        if name is None:
            if given:
                self._api.audit.wrong_key("grpc", call.connection.peer)
            raise Refused(Status.UNAUTHENTICATED, refusal_of_key(given))
        call.key = name

    async def _traced(self, call: Call) -> bytes:
        assert self._api.traces is not None  # noqa: S101 - tells the type checker
        name = f"{SERVICE}/{METHOD}"
        attributes = {"rpc.system.name": "grpc", "rpc.method": name}
        with self._api.traces.serving(name, call.headers, attributes) as span:
            answer = await self._get_varify_code(call)
            span.set_attribute("rpc.response.status_code", "OK")
            return answer

    async def _get_varify_code(self, call: Call) -> bytes:
        email = _parsed(GetVarifyReq, await call.message()).email
        key_name.set(call.key)
        wait = self._api.relays.wait()
        client = _client(call)
        reply = self._api.client.request(email, client=client, observer=wait)
        error = await self._api.answer("grpc", "request", wait.reply(reply))
        # `code` stays empty: only the owner of the mailbox may read it.
        answer: bytes = GetVarifyRsp(error=int(error), email=email).SerializeToString()
        return answer

    async def _check(self, call: Call) -> bytes:
        request = _parsed(health_pb2.HealthCheckRequest, await call.message())
        answer: bytes = (await self._health.Check(request, _Context(call))).SerializeToString()
        return answer

    async def _watch(self, call: Call) -> None:
        request = _parsed(health_pb2.HealthCheckRequest, await call.message())
        if len(request.service) > LONGEST_SERVICE:
            raise Refused(Status.INVALID_ARGUMENT, "no service has so long a name")
        with self._open_stream(call):
            await self._health.Watch(request, _Context(call))

    async def _reflect(self, call: Call) -> None:
        async def requests() -> AsyncIterator[Any]:
            while (raw := await call.message()) is not None:
                yield _parsed(reflection_pb2.ServerReflectionRequest, raw)

        try:
            with self._open_stream(call):
                async with asyncio.timeout(REFLECTION_TIMEOUT):
                    async for answer in self._reflection.ServerReflectionInfo(requests(), None):
                        call.send(answer.SerializeToString())
        except TimeoutError:
            why = f"reflection takes at most {REFLECTION_TIMEOUT:g} s"
            raise Refused(Status.DEADLINE_EXCEEDED, why) from None

    @contextmanager
    def _open_stream(self, call: Call) -> Iterator[None]:
        """A call that stays open: everyone may have one, and nobody more than their share."""
        connection = call.connection
        share = min(STREAMS_EACH, max(1, STREAMS // (len(self._streams) + 1)))
        if self._streams[connection] >= share or self._total >= 2 * STREAMS:
            raise Refused(Status.RESOURCE_EXHAUSTED, "too many streams are open")
        self._streams[connection] += 1
        self._total += 1
        call.stays_open()
        try:
            yield
        finally:
            self._total -= 1
            self._streams[connection] -= 1
            if not self._streams[connection]:
                del self._streams[connection]


class _Context:
    """What the standard health service needs of gRPC's own context."""

    def __init__(self, call: Call) -> None:
        self._call = call

    async def write(self, message: Any) -> None:
        self._call.send(message.SerializeToString())

    async def abort(self, code: grpc.StatusCode) -> NoReturn:
        raise Refused(Status(code.value[0]), code.value[1])


def _client(call: Call) -> str | None:
    if not call.headers:
        return None
    try:
        return client_in(call.values(CLIENT_HEADER))
    except ValueError as exc:
        raise Refused(Status.INVALID_ARGUMENT, f"{CLIENT_HEADER} {exc}") from None


def _parsed(kind: Any, raw: bytes | None) -> Any:
    try:
        return kind.FromString(raw)
    except DecodeError:
        why = f"not a {kind.DESCRIPTOR.full_name}"
        raise Refused(Status.INVALID_ARGUMENT, why) from None


def _reflected() -> DescriptorPool:
    """A pool with all our services: ours is not in protobuf's default pool, the standard ones are only there."""
    pool = DescriptorPool()
    modules = (health_pb2, reflection_pb2)
    standard = [FileDescriptorProto.FromString(each.DESCRIPTOR.serialized_pb) for each in modules]
    v1 = text_format.Parse(str(standard[1]).replace("v1alpha", "v1"), FileDescriptorProto())
    for file in (file_descriptor(), *standard, v1):
        pool.Add(file)
    return pool
