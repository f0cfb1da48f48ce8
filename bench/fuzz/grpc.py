"""Mutated gRPC: messages and metadata through a channel, and HTTP/2 frames on bare connections."""

from __future__ import annotations

import random
from typing import Final

import grpc
from support.api_process import ApiProcess
from support.http2 import OPENING, call, header

from bench.fuzz.http import exchange
from bench.fuzz.mutate import VALUES, Mutator
from bench.fuzz.target import SocketTarget
from producer.api.frames import (
    PREFACE,
    ErrorCode,
    Flag,
    FrameType,
    Setting,
    frame,
    goaway_frame,
    reset_frame,
    settings_frame,
    window_frame,
)
from producer.api.proto import METHOD, SERVICE, GetVarifyReq, GetVarifyRsp

_TIMEOUT: Final = 60.0  # seconds
_PATHS: Final = (
    f"/{SERVICE}/{METHOD}",
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
_METADATA: Final = ("x-verify-client", "authorization", "traceparent", "grpc-timeout", "user-agent", "te", "x-bin")
# What a client does wrong; anything else is the server's fault.
_REFUSALS: Final = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
_CALL, _FRAMES = b"call ", b"raw "  # how an input begins: through a channel, or as it is on a connection
_PROTO_TOKENS: Final = (
    *(b"\x0a", b"\x0a\xff\xff\xff\xff\x0f", b"\x08\x01", b"\x0a\x00", b"\x12\x01x", b"\x0b\x0c", b"\xff" * 10),
    *(b"\x80" * 11, b"\x0a\x03\xed\xa0\x80", b"\x0a\x01\x00", b"\x0a\x80\x08" + b"a" * 1024, b"\x00"),
)


def connection_with(path: bytes, message: bytes) -> bytes:
    """What a client sends on a connection for one call."""
    return OPENING + call(1, path, message, header("grpc-timeout", "5S"), header("x-verify-client", "c"))


def _conversations(message: bytes) -> list[bytes]:
    calls = [connection_with(path.encode(), message) for path in _PATHS]
    settings = settings_frame({Setting.MAX_CONCURRENT_STREAMS: 100, Setting.INITIAL_WINDOW_SIZE: 65_535})
    others = (
        window_frame(0, 1000),
        frame(FrameType.PING, 0, b"12345678"),
        reset_frame(1, ErrorCode.CANCEL),
        frame(FrameType.PRIORITY, 3, b"\0\0\0\0\x10"),
        goaway_frame(1, ErrorCode.NO_ERROR),
        frame(FrameType.CONTINUATION, 1, header("a", "b"), Flag.END_HEADERS),
        frame(FrameType.PUSH_PROMISE, 1, b"\0\0\0\2", Flag.END_HEADERS),
    )
    return [*calls, PREFACE + settings + calls[0][len(OPENING) :], *(calls[0] + each for each in others)]


class GrpcTarget(SocketTarget):
    """The gRPC API. Its process needs an answering worker."""

    kind = "grpc"

    def __init__(self, api: ApiProcess, seed: int) -> None:
        super().__init__(api, seed)
        self._api = api
        self._message = GetVarifyReq(email="mutant@example.com").SerializeToString()
        self._conversations = _conversations(self._message)

    def mutated(self, chance: random.Random) -> bytes:
        """A message for a call, or what a whole connection sends."""
        mutator = Mutator(chance)
        if chance.random() < 0.6:
            if chance.random() < 0.3:
                email = str(chance.choice(VALUES)).encode("utf-8", "ignore").decode()
                return b"".join((_CALL, GetVarifyReq(email=email).SerializeToString()))
            return _CALL + mutator.garbled(self._message, _PROTO_TOKENS)
        frames = [frame(chance.randrange(12), chance.randrange(8), chance.randbytes(9), chance.randrange(256))]
        whole = chance.choice(self._conversations)
        if chance.random() < 0.2:  # the preface stays, what follows is anything
            return _FRAMES + whole[: len(OPENING)] + chance.randbytes(chance.randrange(200))
        return _FRAMES + mutator.garbled(whole, [*frames, *_PROTO_TOKENS], self._conversations)

    def honest(self) -> bool:
        """A call is answered with success."""
        return bool(self._api.call("honest@example.com").error == 0)

    def _try(self, data: bytes) -> str | None:
        if data.startswith(_FRAMES):
            return self._try_frames(data.removeprefix(_FRAMES))
        chance = random.Random(data)
        value = chance.choice([str(each)[:200] for each in VALUES]).encode("ascii", "ignore").decode()
        name, text = chance.choice(_METADATA), "".join(each for each in value if each.isprintable())
        metadata = ((name, text.encode() if name.endswith("-bin") else text),)
        method = self._api.channel.unary_unary(_PATHS[0], _as_it_is, _as_it_is)
        try:
            answer = method(data.removeprefix(_CALL), timeout=_TIMEOUT, metadata=metadata)
            GetVarifyRsp.FromString(answer)
        except grpc.RpcError as exc:
            code = exc.code()
            return None if code in _REFUSALS else f"answered {code.name}"
        return None

    def _try_frames(self, data: bytes) -> str | None:
        try:
            answer = exchange(self._api.grpc_port, data)
        except TimeoutError:
            return f"the connection was not closed within {_TIMEOUT:.0f} s"
        while len(answer) >= 9:
            length, kind = int.from_bytes(answer[:3]), answer[3]
            if length > 16_384 or kind > 9:
                return f"malformed frame in the answer: {answer[:20]!r}"
            answer = answer[9 + length :]
        return None


def _as_it_is(message: bytes) -> bytes:
    return message
