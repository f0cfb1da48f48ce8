"""Child processes that end with the demo, however it ends."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from producer.errors import VerifyError

CHECKOUT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
START_TIMEOUT = 60.0  # seconds until a program is ready; long, as the machine may be busy
STOP_TIMEOUT = 15.0  # seconds for an orderly end: a worker finishes the sends that it has begun
HTTP_PORT, GRPC_PORT, FLOWER_PORT = 8081, 50051, 5555  # the usual ports, used if they are free
TAIL = 15  # lines of a log that a failure shows

# The shell starts a watcher and becomes the program. The watcher reads a line; if its input ends without one, the demo
# was killed or crashed, and the watcher kills the program and removes the demo's files. Unlike PR_SET_PDEATHSIG, this
# works on every Unix. The program has its own session: Ctrl-C reaches only the demo, which stops everything in order.
_GUARD = """
directory=$1; log=$2; shift 2
exec 3<&0 </dev/null >>"$log" 2>&1
{ read -r _ <&3 || { kill -KILL $$; rm -rf "$directory"; }; } >/dev/null 2>&1 &
exec 3<&- "$@"
"""


_T = TypeVar("_T")


class PartMissing(VerifyError):
    """A part of the demo cannot be used, did not start or has ended."""


class Child:
    """A program that runs beside the demo, with its output in a log file."""

    def __init__(self, name: str, command: list[str], directory: Path, env: Mapping[str, str] | None = None) -> None:
        """`directory` holds the log. It is removed if the demo dies without cleaning up."""
        self.name = name
        self.log = directory / f"{name}.log"
        self._process = subprocess.Popen(  # noqa: S603 - the demo's own commands
            ["/bin/sh", "-c", _GUARD, "guard", str(directory), str(self.log), *command],
            cwd=CHECKOUT,
            env=None if env is None else dict(env),
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def written(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def tail(self) -> str:
        return "\n".join(self.written().splitlines()[-TAIL:])

    def require_running(self) -> None:
        """Raises `PartMissing` if it has ended."""
        if not self.running:
            status = self._process.returncode
            how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
            raise PartMissing(f"the {self.name} process has ended ({how}):\n{self.tail()}")

    def until(self, ready: Callable[[], _T | None]) -> _T:
        """Wait until `ready` returns something true, and return it. Raises `PartMissing`."""
        end = time.monotonic() + START_TIMEOUT
        while not (answer := ready()):
            self.require_running()
            if time.monotonic() > end:
                raise PartMissing(f"the {self.name} process was not ready within {START_TIMEOUT:.0f} s:\n{self.tail()}")
            time.sleep(0.1)
        return answer

    def says(self, pattern: str) -> list[str]:
        """Wait until `pattern` is in its log, and return the matches. Raises `PartMissing`."""
        return self.until(lambda: re.findall(pattern, self.written()))

    def stop(self) -> None:
        """Terminate it, kill it if that takes too long, and release the watcher. May be called twice."""
        if self.running:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT)
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None  # noqa: S101 - it was asked for
        with contextlib.suppress(BrokenPipeError):
            if not self._process.stdin.closed:
                self._process.stdin.write(b"stopped\n")
                self._process.stdin.close()


def worker(directory: Path, env: Mapping[str, str]) -> Child:
    """A real worker, as an operator starts it: `celery -A worker.app worker`."""
    return Child("worker", [sys.executable, "-m", "celery", "-A", "worker.app", "worker"], directory, env)


def api(directory: Path, env: Mapping[str, str], *, usual: bool = True) -> Child:
    """The API, `python -m producer serve`; `usual`: on its usual ports, where these are free."""
    ports = [
        f"--{protocol}-bind={HOST}:{_port(port) if usual else 0}"
        for protocol, port in (("http", HTTP_PORT), ("grpc", GRPC_PORT))
    ]
    return Child("api", [sys.executable, "-m", "producer", "serve", *ports], directory, env)


def flower(directory: Path, env: Mapping[str, str], *, usual: bool = True) -> Child:
    """Flower, `celery -A worker.app flower`; `usual`: on its usual port, if that is free."""
    options = [f"--address={HOST}", f"--port={_port(FLOWER_PORT) if usual else 0}"]
    env = {name: value for name, value in env.items() if not name.startswith("FLOWER_")}  # settings of another Flower
    return Child("flower", [sys.executable, "-m", "celery", "-A", "worker.app", "flower", *options], directory, env)


def _port(usual: int) -> int:
    """The usual port, or 0 (the program takes a free one) if it is busy."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have just ended do not count
        try:
            probe.bind((HOST, usual))
        except OSError:
            return 0
    return usual
