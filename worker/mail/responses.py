"""Parses SMTP replies (RFC 5321, 4.2) from a byte stream, with bounds on the size of lines and replies."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

# RFC 5321, 4.5.3.1.5 allows 512 octets; some relays write a little more.
MAX_LINE: Final = 2048
MAX_REPLY: Final = 65536  # octets, all lines of one reply

_SEPARATORS: Final = (b" ", b"-", b"")
_CODES: Final = {b"%d" % code: code for code in range(200, 600)}
_ENHANCED: Final = re.compile(rb"([245]\.[0-9]{1,3}\.[0-9]{1,3})(?![0-9.])")


class Response(NamedTuple):
    """One reply with all of its lines."""

    code: int
    lines: list[bytes]

    def __repr__(self) -> str:
        # Without the text, in which relays echo addresses.
        return f"Response({self.code})"

    @property
    def enhanced(self) -> str | None:
        """The enhanced status code (RFC 2034), such as "5.1.1", if the reply has one."""
        found = _ENHANCED.match(self.lines[0])
        return found[1].decode() if found else None


class ResponseReader:
    """Collects replies from what arrives. `broken`: something that is no reply has arrived."""

    __slots__ = ("_code", "_lines", "_rest", "_size", "broken")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Discard the incomplete reply."""
        self.broken = False
        self._rest = b""
        self._code = 0
        self._lines: list[bytes] = []
        self._size = 0

    @property
    def pending(self) -> bool:
        """Whether an incomplete reply has arrived."""
        return bool(self._rest or self._lines)

    def feed(self, data: bytes) -> list[Response]:
        """The responses that `data` completes, up to the first malformed one, which sets `broken`."""
        responses: list[Response] = []
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            self._size += len(line)
            if line.endswith(b"\r"):
                line = line[:-1]  # noqa: PLW2901 - without its line end
            code, separator = _CODES.get(line[:3]), line[3:4]
            if (
                code is None
                or separator not in _SEPARATORS
                or len(line) > MAX_LINE
                or self._size > MAX_REPLY
                or (self._lines and self._code != code)
            ):
                self.broken = True
                return responses
            self._code = code
            self._lines.append(line[4:])
            if separator != b"-":
                responses.append(Response(code, self._lines))
                self._lines, self._size = [], 0
        if len(self._rest) > MAX_LINE:
            self.broken = True
        return responses
