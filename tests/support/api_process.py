"""The doors as an operator starts them: `python -m producer serve`, a process of its own with its own log."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc
import httpx

from producer.api.proto import METHOD, SERVICE, GetVarifyReq, GetVarifyRsp
from support.worker_process import LAUNCH, ROOT, eventually

START_TIMEOUT: Final = 30.0  # seconds
STOP_TIMEOUT: Final = 10.0  # the bound for SIGTERM
LOUD: Final = ("Traceback", "unforeseen", "never retrieved", "never awaited", "destroyed but it is pending")


class Doors:
    """Both doors on ports of their own. `with Doors(settings) as doors:` starts them, and ends them."""

    def __init__(self, settings: Mapping[str, str], *options: str) -> None:
        """`settings`: the environment's `VERIFY_*`; none of ours and no `.env` is handed down."""
        self._directory = tempfile.TemporaryDirectory(prefix="doors-")
        self._log = Path(self._directory.name) / "doors.log"
        self._options = options
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("VERIFY_")}
        own = {"VERIFY_HTTP_BIND": "127.0.0.1:0", "VERIFY_GRPC_BIND": "127.0.0.1:0"}
        self.environment = {**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **own, **settings}
        self.http_port = self.grpc_port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.http: httpx.Client
        self.channel: grpc.Channel

    def start(self, *, wait: bool = True) -> None:
        """Start them; unless told otherwise, return when they are open."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, sys.executable, "-m", "producer", "serve", *self._options],
                cwd=self._directory.name,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the tests', not theirs
            )
        if not wait:
            return
        eventually(lambda: "gRPC door is open" in self.log or not self.alive, START_TIMEOUT)
        assert self.alive, self.log
        self.http_port, self.grpc_port = (
            int(re.findall(rf"{door} door is open on \S+:(\d+)", self.log)[-1]) for door in ("HTTP", "gRPC")
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.http_port}", timeout=15, trust_env=False)
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}")

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process; there must be one."""
        assert self._process is not None, "the doors were not started"
        return self._process

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """All that it has said."""
        return self._log.read_text(errors="replace")

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

    def call(self, email: str, *, timeout: float | None = None) -> Any:
        """`GetVarifyCode`."""
        return self.stub(GetVarifyReq(email=email), timeout=timeout)

    def call_raw(self, message: bytes, *, method: str = METHOD, timeout: float | None = 15) -> bytes:
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
        """A bare connection to the HTTP door, on which so much was said."""
        connection = socket.create_connection(("127.0.0.1", port or self.http_port), 20)
        connection.sendall(data)
        return connection

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def wait(self, within: float = STOP_TIMEOUT) -> int:
        """Its exit code."""
        return self.process.wait(within)

    def assert_quiet(self) -> None:
        """Nothing unforeseen happened, and no address is in the log."""
        assert [line for line in self.log.splitlines() if any(each in line for each in LOUD)] == []
        assert re.findall(r"[\w.]{2,}@\w", self.log) == []

    def close(self) -> None:
        """End them."""
        if hasattr(self, "http"):
            self.http.close()
            self.channel.close()
        if self.alive:
            self.process.kill()
            self.process.wait()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None) -> None:
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
    lines = [f"POST {path} HTTP/1.1", "Host: door", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
