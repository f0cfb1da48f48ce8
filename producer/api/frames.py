"""What HTTP/2 looks like on the wire: frames (RFC 9113), header fields (RFC 7541), the head of a gRPC call."""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable
from enum import IntEnum
from struct import Struct
from typing import Final, NamedTuple
from urllib.parse import quote

from hpack import Decoder
from hpack.exceptions import HPACKError, OversizedHeaderListError

logging.getLogger("hpack").setLevel(logging.WARNING)  # its DEBUG shows headers, and keys are among them

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # 3.4: what a client sends first
FRAME_HEADER: Final = 9  # bytes before a frame's payload
HEAD_OF_FRAME: Final = Struct(">IBI")  # those bytes: three of the payload's length and the type, flags, stream
MAX_FRAME: Final = 16_384  # bytes of payload that everybody takes (4.2); we ask for no more
DEFAULT_WINDOW: Final = 65_535  # bytes, of a stream and of a connection (6.9.2)
MAX_WINDOW: Final = 2**31 - 1
MAX_STREAM: Final = 2**31 - 1


class FrameType(IntEnum):
    """RFC 9113, 6."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Flag(IntEnum):
    """The flags of all frame types. An IntEnum, because the operators of an IntFlag take a microsecond each."""

    ACK = 0x1  # of SETTINGS and PING
    END_STREAM = 0x1  # of DATA and HEADERS
    END_HEADERS = 0x4
    PADDED = 0x8
    PRIORITY = 0x20


class ErrorCode(IntEnum):
    """RFC 9113, 7."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


class Setting(IntEnum):
    """RFC 9113, 6.5.2."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class ConnectionFailed(Exception):
    """A connection error (5.4.1): the client broke a rule or went beyond a bound, and the connection ends."""

    def __init__(self, error: ErrorCode) -> None:
        super().__init__(error.name)
        self.error = error


class StreamFailed(Exception):
    """A stream error (5.4.2): this call ends, the connection goes on."""

    def __init__(self, error: ErrorCode) -> None:
        super().__init__(error.name)
        self.error = error


def frame(kind: int, stream: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """4.1."""
    return HEAD_OF_FRAME.pack(len(payload) << 8 | kind, flags, stream) + payload


def settings_frame(values: dict[Setting, int]) -> bytes:
    """6.5.1."""
    pairs = (number.to_bytes(2, "big") + value.to_bytes(4, "big") for number, value in values.items())
    return frame(FrameType.SETTINGS, 0, b"".join(pairs))


def reset_frame(stream: int, error: ErrorCode) -> bytes:
    """6.4."""
    return frame(FrameType.RST_STREAM, stream, error.to_bytes(4, "big"))


def goaway_frame(last_stream: int, error: ErrorCode) -> bytes:
    """6.8."""
    return frame(FrameType.GOAWAY, 0, last_stream.to_bytes(4, "big") + error.to_bytes(4, "big"))


def window_frame(stream: int, more: int) -> bytes:
    """6.9."""
    return frame(FrameType.WINDOW_UPDATE, stream, more.to_bytes(4, "big"))


def unpadded(payload: bytes) -> bytes:
    """The content of a padded frame (6.1). Raises `ConnectionFailed`."""
    if not payload:
        raise ConnectionFailed(ErrorCode.FRAME_SIZE_ERROR)
    if payload[0] >= len(payload):
        raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR)
    return payload[1 : len(payload) - payload[0]]


def parsed_settings(payload: bytes) -> dict[int, int]:
    """The client's settings by number (6.5.2); the last counts. Raises `ConnectionFailed`."""
    if len(payload) % 6:
        raise ConnectionFailed(ErrorCode.FRAME_SIZE_ERROR)
    values = {}
    for at in range(0, len(payload), 6):
        number, value = int.from_bytes(payload[at : at + 2], "big"), int.from_bytes(payload[at + 2 : at + 6], "big")
        values[number] = value
        if number == Setting.INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
            raise ConnectionFailed(ErrorCode.FLOW_CONTROL_ERROR)
        wrong_push = number == Setting.ENABLE_PUSH and value > 1
        wrong_size = number == Setting.MAX_FRAME_SIZE and not MAX_FRAME <= value < 2**24
        if wrong_push or wrong_size:
            raise ConnectionFailed(ErrorCode.PROTOCOL_ERROR)
    return values


# Header fields that we send. They use no table, so that no state is kept for a client.

EMPTY_TABLE: Final = b"\x20"  # RFC 7541, 6.3: the encoder's table has no bytes from here on


def field(name: bytes, value: bytes) -> bytes:
    """A literal field without indexing (RFC 7541, 6.2.2)."""
    return b"\x00" + _string(name) + _string(value)


def message_text(text: str) -> bytes:
    """The value of `grpc-message`: percent-encoded, but for printable ASCII (gRPC's PROTOCOL-HTTP2)."""
    return quote(text, safe=" !\"#$&'()*+,/:;<=>?@[\\]^`{|}").encode()


def _string(text: bytes) -> bytes:
    """RFC 7541, 5.2, without Huffman coding."""
    length = len(text)
    if length < 127:
        return bytes((length,)) + text
    coded = b"\x7f"
    length -= 127
    while length >= 128:
        coded += bytes((length % 128 | 128,))
        length //= 128
    return coded + bytes((length,)) + text


# Header fields that come in.

Fields = Iterable[tuple[bytes, bytes]]

# What a connection's reader remembers: so many blocks, of so many bytes, and of so many in what is of interest in them.
KNOWN_HEADS: Final = 4
KNOWN_BLOCK: Final = 256
KNOWN_HEAD: Final = 1024

_PSEUDO: Final = frozenset({b":method", b":scheme", b":authority", b":path"})
_FORBIDDEN: Final = frozenset({b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"})
_NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9a-z-]+")  # 8.2.1: a token, and no capital in it
_NO_VALUE: Final = re.compile(rb"[\0\r\n]")


class HeaderReader:
    """Decodes the header blocks of one connection, whose table it keeps."""

    __slots__ = ("_decoder", "_heads", "_table_changed")

    def __init__(self, limit: int) -> None:
        """`limit`: bytes of a block's fields, as RFC 9113, 6.5.2 counts them: 32 more for each."""
        self._decoder = Decoder(limit)
        self._table_changed = False  # by the last block
        # What blocks mean while the table stays as it is. Most clients send the same few bytes with each call, and
        # decoding them takes longer than the rest of reading a call.
        self._heads: dict[bytes, CallHead] = {}

    def fields(self, block: bytes) -> Fields:
        """Raises `ConnectionFailed`: after an error the table is not what the client thinks it is."""
        table = self._decoder.header_table
        before = table.maxsize, list(table.dynamic_entries)
        try:
            fields = self._decoder.decode(block, raw=True)
        except OversizedHeaderListError:
            raise ConnectionFailed(ErrorCode.ENHANCE_YOUR_CALM) from None
        except HPACKError:
            raise ConnectionFailed(ErrorCode.COMPRESSION_ERROR) from None
        self._table_changed = before != (table.maxsize, list(table.dynamic_entries))
        if self._table_changed:
            self._heads.clear()
        return fields

    def known_head(self, block: bytes) -> CallHead | None:
        """The head of a call that came with this same block before. None: decode it."""
        return self._heads.get(block)

    def head(self, block: bytes, fields: Fields, wanted: Container[bytes]) -> CallHead:
        """The head of a call (`call_head`) with these `fields`, to which `block` was decoded last."""
        head = call_head(fields, wanted)
        if not self._table_changed and len(block) <= KNOWN_BLOCK:
            size = len(head.path) + sum(len(value) for _, value in head.headers)
            if size + len(head.content_type) <= KNOWN_HEAD:
                if len(self._heads) >= KNOWN_HEADS:
                    self._heads.clear()
                self._heads[block] = head
        return head


class CallHead(NamedTuple):
    """What is of interest in the header fields of a call."""

    method: bytes
    path: str
    content_type: bytes
    content_length: int | None
    headers: list[tuple[str, str]]  # those that were asked for


def call_head(fields: Fields, wanted: Container[bytes]) -> CallHead:
    """The head of a request (8.3.1). Raises `StreamFailed` if it is malformed (8.1.1)."""
    pseudo: dict[bytes, bytes] = {}
    content_type, length = b"", None
    headers = []
    in_regular = False
    for name, value in fields:
        if name[:1] == b":":
            if in_regular or name in pseudo or name not in _PSEUDO:
                raise StreamFailed(ErrorCode.PROTOCOL_ERROR)
            pseudo[name] = value
            continue
        in_regular = True
        _require_regular(name, value)
        if name == b"content-type":
            content_type = value
        elif name == b"content-length":
            if not value.isdigit():
                raise StreamFailed(ErrorCode.PROTOCOL_ERROR)
            length = int(value[:20])
        elif name in wanted:
            headers.append((name.decode("ascii"), _text(value)))
    if not (pseudo.get(b":scheme") and pseudo.get(b":path") and b":method" in pseudo):
        raise StreamFailed(ErrorCode.PROTOCOL_ERROR)
    path = pseudo[b":path"].decode("utf-8", "replace")  # then there is no such method
    return CallHead(pseudo[b":method"], path, content_type, length, headers)


def require_trailers(fields: Fields) -> None:
    """Raises `StreamFailed` if these are no trailers (8.1)."""
    for name, value in fields:
        _require_regular(name, value)


def _require_regular(name: bytes, value: bytes) -> None:
    """8.2.1 and 8.2.2."""
    if not _NAME.fullmatch(name) or name in _FORBIDDEN or (name == b"te" and value != b"trailers"):
        raise StreamFailed(ErrorCode.PROTOCOL_ERROR)


def _text(value: bytes) -> str:
    try:
        if not _NO_VALUE.search(value):
            return value.decode()
    except UnicodeDecodeError:
        pass
    raise StreamFailed(ErrorCode.PROTOCOL_ERROR)
