"""Where a command ends and where its reply does, in what travels over a connection: Redis, SMTP and HTTP.

A grammar belongs to one connection. `sent` gets what the process under test has written and `received` what the other
side has; both return the whole frames so far, each with a name, and keep the rest. Commands that only make sense
together with the next one (SELECT, SCRIPT LOAD, CLIENT REPLY) are one frame with it, and so are their replies.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections import deque
from typing import Final, NamedTuple, Protocol

from producer.redis.scripts import Script
from producer.store import backlog, redis_codes
from worker import settler
from worker.queue import commands

# Without a meaning of their own: a process that dies between one of these and the next command has done nothing.
_PREPARATIONS: Final = {"SELECT", "SCRIPT", "CLIENT", "AUTH"}
_TAIL: Final = 120  # bytes at the end of a script that tell it from others
_AGGREGATES: Final = {ord("*"): 1, ord("~"): 1, ord(">"): 1, ord("%"): 2}
_STRINGS: Final = b"$!="
WAIT: Final = "wait"  # a reservation that waits behind a command that blocks until the queue has a message
# What a reservation is called by the command that it waits behind; the second waits for its turn to wait on the queue.
_WAITS: Final = {"BLMOVE": WAIT, "BLPOP": "turn"}
_TAKEN: Final = re.compile(rb"(?:\+OK\r\n)*\*(\d+)\r\n")


class Part(NamedTuple):
    """One whole frame. An empty name: it belongs to no request."""

    name: str
    data: bytes
    detail: str = ""  # the code of an SMTP or HTTP reply; how many words a Redis command has


class Grammar(Protocol):
    """The frames of one connection."""

    def sent(self, data: bytes) -> list[Part]:
        """The frames that are whole by now, of those that the process writes."""

    def received(self, data: bytes) -> list[Part]:
        """The same of those that it reads."""


class RedisGrammar:
    """One connection to Redis."""

    def __init__(self, names: dict[bytes, str]) -> None:
        """`names`: of scripts, by SHA1; shared by all connections, and learnt from what they load."""
        self._names = names
        self._out = self._in = b""
        self._ours: bool | None = None  # None: nothing was sent yet. Celery's own connections have no steps.
        self._awaited: deque[tuple[str, int]] = deque()  # for each frame sent: its name, and how many replies it gets
        self._muted = False
        self._blocks = ""  # the command that blocks and that was sent last; the next one waits behind it
        self._loading: deque[str] = deque()  # the names of scripts that are being loaded

    def sent(self, data: bytes) -> list[Part]:
        self._out += data
        found: list[Part] = []
        began = at = replies = 0
        name = ""
        while (end := resp_end(self._out, at)) > 0:
            words = resp_words(self._out[at:end])
            if self._ours is None:
                self._ours = words[0].upper() == b"SELECT"
            name, counts = self._read(words)
            replies += counts
            at = end
            if name not in _PREPARATIONS:
                found.append(self._frame(name, self._out[began:at], replies, len(words)))
                began, replies = at, 0
        if began < at:
            alone = self._out[began:at]
            found.append(self._frame("open" if b"SCRIPT" in alone else name, alone, replies))
        self._out = self._out[at:]
        return found

    def _frame(self, name: str, data: bytes, replies: int, words: int = 0) -> Part:
        if not self._ours:
            return Part("", data)
        if replies:
            self._awaited.append(("reserve" if name in _WAITS.values() else name, replies))
        return Part(name, data, str(words))

    def _read(self, words: list[bytes]) -> tuple[str, int]:
        """The name of a command, and how many replies it gets."""
        command = words[0].decode().upper()
        if command == "CLIENT" and words[1].upper() == b"REPLY":
            self._muted = words[2].upper() == b"OFF"
        elif command == "SCRIPT" and words[1].upper() == b"LOAD":
            self._loading.append(script_name(words[2]))
            self._names.setdefault(sha1(words[2]), self._loading[-1])
        name = command
        if command == "EVALSHA":
            name = self._names.get(words[1], "script")
        elif command == "EVAL":
            name = script_name(words[1])
        elif command in {"LPUSH", "PUBLISH"}:
            name = {"LPUSH": "push", "PUBLISH": "events"}[command]
        elif command in _WAITS:
            self._blocks = command
        if name == "reserve" and self._blocks:
            name, self._blocks = _WAITS[self._blocks], ""
        return name, 0 if self._muted else 1

    def received(self, data: bytes) -> list[Part]:
        self._in += data
        if not self._ours:
            data, self._in = self._in, b""
            return [Part("", data)]
        found: list[Part] = []
        at = 0
        while (end := self._reply_end(at)) > 0:
            if self._in[at : at + 1] in b"*>" and re.match(rb"[*>]\d\r\n\$\d+\r\np?message\r\n", self._in[at:]):
                found.append(Part("message", self._in[at:end]))
            else:
                name, data = self._awaited.popleft()[0] if self._awaited else "", self._in[at:end]
                found.append(Part("" if name == "reserve" and _took_nothing(data) else name, data))
            at = end
        self._in = self._in[at:]
        return found

    def _reply_end(self, at: int) -> int:
        """Where all replies to the oldest unanswered frame end, or a published message does."""
        end = resp_end(self._in, at)
        if end > 0 and re.match(rb"[*>]\d\r\n\$\d+\r\np?message\r\n", self._in[at:]):
            return end
        for _ in range((self._awaited[0][1] if self._awaited else 1) - 1):
            end = resp_end(self._in, end) if end > 0 else -1
        return end


def _took_nothing(reply: bytes) -> bool:
    """Whether a reservation was answered that there is nothing to take."""
    found = _TAKEN.match(reply)
    return found is not None and int(found[1]) <= commands.NOTHING_TAKEN


@functools.cache
def _script_names() -> dict[bytes, str]:
    """The names of our scripts, by how they end."""
    ours = [vars(module) for module in (redis_codes, backlog, commands, settler)]
    scripts = {name: value for each in ours for name, value in each.items() if isinstance(value, Script)}
    return {script.text.encode()[-_TAIL:]: name.strip("_").lower() for name, script in scripts.items()}


def script_name(text: bytes) -> str:
    """What we call a script, also if it was broken on purpose before its end."""
    return _script_names().get(text[-_TAIL:], "script")


def sha1(text: bytes) -> bytes:
    """As Redis names a script."""
    return hashlib.sha1(text, usedforsecurity=False).hexdigest().encode()


def resp_end(data: bytes, at: int) -> int:
    """Where the value that begins at `at` ends; -1 if it is not whole yet."""
    line = data.find(b"\r\n", at)
    if line < 0:
        return -1
    kind, end = data[at], line + 2
    if kind in _AGGREGATES:
        for _ in range(max(int(data[at + 1 : line]), 0) * _AGGREGATES[kind]):
            end = resp_end(data, end)
            if end < 0:
                return -1
    elif kind in _STRINGS:
        length = int(data[at + 1 : line])
        end += length + 2 if length >= 0 else 0
    return end if end <= len(data) else -1


def resp_words(command: bytes) -> list[bytes]:
    """The words of a whole command."""
    words = []
    at = command.index(b"\r\n") + 2
    for _ in range(int(command[1 : at - 2])):
        line = command.index(b"\r\n", at)
        end = line + 2 + int(command[at + 1 : line])
        words.append(command[line + 2 : end])
        at = end + 2
    return words


class SmtpGrammar:
    """One connection to a relay."""

    def __init__(self) -> None:
        self._out = self._in = b""
        self._awaited = deque(["banner"])
        self._content = False  # DATA was accepted, so what follows is the content

    def sent(self, data: bytes) -> list[Part]:
        self._out += data
        found: list[Part] = []
        while True:
            end = self._out.find(b"\r\n.\r\n" if self._content else b"\r\n")
            if end < 0:
                return found
            end += 5 if self._content else 2
            frame, self._out = self._out[:end], self._out[end:]
            name = "content" if self._content else frame.split(maxsplit=1)[0].decode("ascii", "replace").upper()
            self._content = False
            self._awaited.append(name)
            found.append(Part(name, frame))

    def received(self, data: bytes) -> list[Part]:
        self._in += data
        found: list[Part] = []
        while reply := re.match(rb"(?:\d{3}-[^\n]*\n)*(\d{3})(?: [^\n]*)?\n", self._in):
            self._in = self._in[reply.end() :]
            name = self._awaited.popleft() if self._awaited else "unasked"
            self._content = self._content or (name == "DATA" and reply[1] == b"354")
            found.append(Part(name, reply[0], reply[1].decode()))
        return found


class HttpGrammar:
    """One connection to the HTTP API, the process under test; bodies have a length."""

    def __init__(self) -> None:
        self._out = self._in = b""

    def sent(self, data: bytes) -> list[Part]:
        self._out += data
        end = _message_end(self._out)
        if end < 0:
            return []
        frame, self._out = self._out[:end], self._out[end:]
        return [Part("POST", frame, frame.split(maxsplit=2)[1].decode())]

    def received(self, data: bytes) -> list[Part]:
        self._in += data
        end = _message_end(self._in)
        if end < 0:
            return []
        frame, self._in = self._in[:end], self._in[end:]
        return [Part("POST", frame)]


def _message_end(data: bytes) -> int:
    head = data.find(b"\r\n\r\n")
    if head < 0:
        return -1
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", data[:head])
    end = head + 4 + (int(length[1]) if length else 0)
    return end if end <= len(data) else -1
