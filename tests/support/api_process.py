"""The API servers as an operator starts them: `python -m producer serve`."""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Mapping
from typing import Any, Final

import grpc
import httpx

from producer.api.proto import METHOD, SERVICE, GetVarifyReq, GetVarifyRsp
from support.process import START_TIMEOUT, Process, own_environment

STOP_WITHIN: Final = 10.0  # seconds after SIGTERM: what the docs promise
TIMEOUT: Final = 60.0  # seconds for an answer
KEY: Final = "Tq8_0123-aBc=xyz"  # a key of the API, as short as one may be
KEYS: Final = f"app:{KEY}"
WITH_KEY: Final = {"Authorization": f"Bearer {KEY}"}
LOUD: Final = ("Traceback", "unexpected error", "never retrieved", "never awaited", "destroyed but it is pending")


class ApiProcess(Process):
    """HTTP and gRPC on ports of their own."""

    def __init__(self, settings: Mapping[str, str], *options: str) -> None:
        """`settings`: the environment's `VERIFY_*`; `options` are further words for `serve`."""
        binds = {"VERIFY_HTTP_BIND": "127.0.0.1:0", "VERIFY_GRPC_BIND": "127.0.0.1:0"}
        command = [sys.executable, "-m", "producer", "serve", *options]
        super().__init__("api", command, own_environment(binds | dict(settings)))
        self.http_port = self.grpc_port = 0
        self.http: httpx.Client
        self.channel: grpc.Channel

    def wait_until_ready(self) -> None:
        opened = r"gRPC API listens on \S+:(\d+)", r"HTTP API listens on \S+:(\d+)"
        self.wait_for(lambda: re.search(opened[0], self.log), START_TIMEOUT)
        self.grpc_port, self.http_port = (int(re.findall(each, self.log)[-1]) for each in opened)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.http_port}", timeout=TIMEOUT, trust_env=False)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}")

    def post(self, path: str, content: object, **options: Any) -> Any:
        """The JSON answer to a POST that must be answered with 200."""
        answer = self.http.post(path, content=json.dumps(content).encode(), **options)
        assert answer.status_code == 200
        return answer.json()

    def get_code(self, email: object, **more: object) -> Any:
        """`POST /get_varifycode`."""
        return self.post("/get_varifycode", {"email": email, **more})

    def check(self, email: object, code: object, **more: object) -> Any:
        """`POST /check_varifycode`."""
        return self.post("/check_varifycode", {"email": email, "varifycode": code, **more})

    def call(self, email: str, *, timeout: float | None = None, key: str | None = None) -> Any:
        """`GetVarifyCode`."""
        metadata = None if key is None else (("authorization", f"Bearer {key}"),)
        return self.stub(GetVarifyReq(email=email), timeout=timeout, metadata=metadata)

    def call_raw(self, message: bytes, *, method: str = METHOD, timeout: float | None = TIMEOUT) -> bytes:
        """A call whose message nobody checks before it leaves."""
        call = self.channel.unary_unary(f"/{SERVICE}/{method}", _as_it_is, _as_it_is)
        answer: bytes = call(message, timeout=timeout)
        return answer

    @property
    def stub(self) -> Any:
        """The method, to be called as one likes."""
        return self.channel.unary_unary(
            f"/{SERVICE}/{METHOD}",
            request_serializer=GetVarifyReq.SerializeToString,
            response_deserializer=GetVarifyRsp.FromString,
        )

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series, 0 if there is none."""
        text = self.http.get("/metrics").text
        said = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        found = re.search(rf"^{name}{re.escape('{' + said + '}') if said else ''} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def knock(self, data: bytes = b"", *, port: int | None = None) -> socket.socket:
        """A bare connection to the HTTP API, on which `data` was sent."""
        connection = socket.create_connection(("127.0.0.1", port or self.http_port), TIMEOUT)
        connection.sendall(data)
        return connection

    def assert_quiet(self) -> None:
        """Nothing unexpected happened, and no address is in the log."""
        log = self.log
        assert [line for line in log.splitlines() if any(each in line for each in LOUD)] == []
        assert re.findall(r"[\w.]{2,}@\w", self.log) == []

    def close(self) -> None:
        """Hang up, kill it, and remove its files."""
        if hasattr(self, "http"):
            self.http.close()
            self.channel.close()
        super().close()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.assert_quiet()
        finally:
            self.close()


def _as_it_is(message: bytes) -> bytes:
    return message


def answer_of(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """The status, headers and body that a bare connection gets; 0 if it is closed without."""
    data = b""
    try:
        while b"\r\n\r\n" not in data:
            more = connection.recv(65536)
            if not more:
                return 0, {}, data
            data += more
            if data.startswith(b"HTTP/1.1 100 "):
                data = data.partition(b"\r\n\r\n")[2]
        head, _, body = data.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
        while len(body) < int(headers.get("content-length", "0")):
            more = connection.recv(65536)
            if not more:  # the answer to a HEAD has a length and no body
                break
            body += more
    except ConnectionResetError:
        return 0, {}, data
    return int(lines[0].split()[1]), headers, body


def request_bytes(path: str, body: bytes, *headers: str) -> bytes:
    """A POST as it travels."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
