"""Mutated HTTP/1.1: request lines, headers, framing and JSON bodies."""

from __future__ import annotations

import json
import random
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from support.api_process import ApiProcess

from bench.fuzz.mutate import JSON_TOKENS, Mutator
from bench.fuzz.target import SocketTarget

CODE: Final = "918273645546"  # what the checks guess
_VERBS: Final = ("/get_varifycode", "/get_verifycode", "/check_varifycode", "/check_verifycode")
_PROBES: Final = ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/")
_BODY: Final[Mapping[str, Any]] = {
    "email": "mutant@example.com",
    "varifycode": CODE,
    "purpose": "login",
    "locale": "en",
    "client": "c",
}
_AGENT: Final = b"Host: 127.0.0.1\r\nUser-Agent: fuzz\r\nAccept: */*\r\n"
_HEADERS: Final = (
    *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Transfer-Encoding : chunked\r\n"),
    *(b"Content-Length: 0\r\n", b"Content-Length: +5\r\n", b"Content-Length: 18446744073709551616\r\n"),
    *(b"Host: \r\n", b"Host: example.com\r\n", b"Expect: 100-continue\r\n", b"Expect: 200-ok\r\n"),
    *(b"Connection: close\r\n", b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"),
    *(b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n", b"Origin: null\r\n"),
    *(b"Sec-Fetch-Site: cross-site\r\n", b"Authorization: Bearer \xff\r\n", b"Content-Encoding: gzip\r\n"),
    *(b"Content-Type: application/json; charset=utf-16\r\n", b"X: " + b"a" * 9000 + b"\r\n", b"a:\r\n" * 120),
    *(
        b"traceparent: 00-" + b"f" * 32 + b"-" + b"f" * 16 + b"-01\r\n",
        b" folded\r\n",
        b": no name\r\n",
        b"no colon\r\n",
    ),
)
_TOKENS: Final = (
    *_HEADERS,
    *(b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"\x00", b"%00", b"/../", b"?", b"#", b"//", b" ", b"\t", b"0\r\n\r\n"),
    *(b"ffffffffffffffff\r\n", b"5;a=b\r\n", b"HTTP/1.0", b"HTTP/2.0", b"HEAD ", b"OPTIONS * ", b"CONNECT a:1 "),
    *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"http://example.com/"),
)
_TIMEOUT: Final = 60.0  # seconds
_NO_ERRORS: Final = frozenset({501, 505})  # the client's fault, though they begin with a 5
_READY: Final = 503  # /readyz where no worker runs


def _post(path: str, body: bytes, more: bytes = b"") -> bytes:
    return b"POST %s HTTP/1.1\r\n%s%sContent-Length: %d\r\n\r\n%s" % (path.encode(), _AGENT, more, len(body), body)


def _chunked(path: str, body: bytes) -> bytes:
    head = b"POST %s HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\n" % (path.encode(), _AGENT)
    return head + b"%x\r\n%s\r\n%x;a=b\r\n%s\r\n0\r\nX: y\r\n\r\n" % (9, body[:9], len(body) - 9, body[9:])


def _seeds() -> list[bytes]:
    body = json.dumps(_BODY).encode()
    seeds = [_post(path, body) for path in _VERBS]
    seeds += [_chunked(path, body) for path in _VERBS]
    seeds += [b"GET %s HTTP/1.1\r\n%s\r\n" % (path.encode(), _AGENT) for path in _PROBES]
    seeds += [b"%s /healthz HTTP/1.1\r\n%s\r\n" % (method, _AGENT) for method in (b"HEAD", b"OPTIONS", b"PUT")]
    return [*seeds, seeds[0] + seeds[2], seeds[8] * 20, _post(_VERBS[0], body, b"Expect: 100-continue\r\n")]


class HttpTarget(SocketTarget):
    """The HTTP API. Its process needs an answering worker."""

    kind = "http"

    def __init__(self, api: ApiProcess, seed: int) -> None:
        super().__init__(api, seed)
        self._api = api
        self._seeds = _seeds()

    def mutated(self, chance: random.Random) -> bytes:
        """A request broken anywhere; or one in correct frames whose body, path or header is broken."""
        mutator = Mutator(chance)
        if chance.random() < 0.5:
            return mutator.garbled(chance.choice(self._seeds), _TOKENS, self._seeds)
        if chance.random() < 0.5:
            body = json.dumps(mutator.restructured(_BODY, [*_BODY, "x"])).encode()
        else:
            body = mutator.garbled(json.dumps(_BODY).encode(), JSON_TOKENS)
        return _post(chance.choice(_VERBS), body, chance.choice(_HEADERS) if chance.random() < 0.2 else b"")

    def honest(self) -> bool:
        """A request by HTTP is answered with success."""
        return bool(self._api.get_code("honest@example.com") == {"error": 0, "email": "honest@example.com"})

    def secrets(self) -> Iterable[str]:
        """What was guessed may be a code."""
        return [CODE]

    def _try(self, data: bytes) -> str | None:
        try:
            answers = list(parsed(data, exchange(self._api.http_port, data)))
        except TimeoutError:
            return f"no end of the answer within {_TIMEOUT:.0f} s"
        except ValueError as exc:
            return str(exc)
        for status, headers, body in answers:
            if status >= 500 and status not in _NO_ERRORS and not (status == _READY and b"/readyz" in data):
                return f"answered {status}"
            if body and headers.get("content-type", "").startswith("application/json"):
                try:
                    said = json.loads(body)
                except ValueError:
                    return f"answered {status} with what is no JSON"
                if (
                    status == 200
                    and _is_one_verb(data)
                    and not (isinstance(said, dict) and type(said.get("error")) is int)
                ):
                    return "the answer's `error` is no number"
        return None


def _is_one_verb(data: bytes) -> bool:
    return data.count(b" HTTP/1.") == 1 and data.startswith(tuple(b"POST %s " % verb.encode() for verb in _VERBS))


def exchange(port: int, data: bytes) -> bytes:
    """All that comes back on a connection on which `data` was sent, and nothing after it."""
    answer = b""
    try:
        with socket.create_connection(("127.0.0.1", port), _TIMEOUT) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while more := connection.recv(65_536):
                answer += more
    except (ConnectionError, OSError) as exc:
        if isinstance(exc, TimeoutError):
            raise
        return b""  # a reset discards what was on its way
    return answer


def parsed(data: bytes, answer: bytes) -> Iterator[tuple[int, dict[str, str], bytes]]:
    """Status, headers and body of each answer to `data`. Raises `ValueError` if they are malformed."""
    while answer:
        head, end, rest = answer.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        status = re.fullmatch(r"HTTP/1\.[01] (\d{3})(?: .*)?", lines[0])
        if not end or not status:
            raise ValueError(f"malformed answer: {answer[:60]!r}")
        headers = {}
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if not colon:
                raise ValueError(f"malformed header in the answer: {line!r}")
            headers[name.lower()] = value.strip()
        length = int(headers.get("content-length", "0" if status[1].startswith("1") else str(len(rest))))
        if b"HEAD" in data and (not rest or rest.startswith(b"HTTP/1.")):
            length = 0
        if len(rest) < length:
            raise ValueError(f"the answer ends after {len(rest)} of {length} bytes")
        yield int(status[1]), headers, rest[:length]
        answer = rest[length:]
