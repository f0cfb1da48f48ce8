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
START_PATIENCE = 60.0  # seconds until a program is ready; a very busy machine is no failure
STOP_PATIENCE = 15.0  # seconds for an orderly end; a worker finishes the sends in its hands
HTTP_PORT, GRPC_PORT, FLOWER_PORT = 8081, 50051, 5555  # each taken if it is free
TAIL = 15  # lines of a log that a failure shows

# The shell leaves a watcher behind and becomes the program. The watcher waits for a line; the end of its input means
# that the demo is gone without a word (SIGKILL, a crash): then the program goes too, and the demo's files. Works on
# every Unix, unlike PR_SET_PDEATHSIG. In a session of its own, so that Ctrl-C reaches the demo only, which knows the
# order in which to stop.
_GUARD = """
directory=$1; log=$2; shift 2
exec 3<&0 </dev/null >>"$log" 2>&1
{ read -r _ <&3 || { kill -KILL $$; rm -rf "$directory"; }; } >/dev/null 2>&1 &
exec 3<&- "$@"
"""


_T = TypeVar("_T")


class PartMissing(VerifyError):
    """A part of the demo did not start, or has ended."""


class Child:
    """A program that runs beside the demo, with its output in a log file."""

    def __init__(self, name: str, command: list[str], directory: Path, env: Mapping[str, str] | None = None) -> None:
        """`directory` is the demo's own: the log lies there, and it is removed if the demo dies without cleaning up."""
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
        """The program's process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def written(self) -> str:
        """What it logged so far."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def tail(self) -> str:
        """The end of its log."""
        return "\n".join(self.written().splitlines()[-TAIL:])

    def require_running(self) -> None:
        """Raises `PartMissing` if it has ended."""
        if not self.running:
            status = self._process.returncode
            how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
            raise PartMissing(f"the {self.name} process has ended ({how}):\n{self.tail()}")

    def until(self, ready: Callable[[], _T | None]) -> _T:
        """The first answer of `ready` that is true. Raises `PartMissing`."""
        end = time.monotonic() + START_PATIENCE
        while not (answer := ready()):
            self.require_running()
            if time.monotonic() > end:
                raise PartMissing(
                    f"the {self.name} process was not ready within {START_PATIENCE:.0f} s:\n{self.tail()}"
                )
            time.sleep(0.1)
        return answer

    def says(self, pattern: str) -> list[str]:
        """What its log says of `pattern`, once it does. Raises `PartMissing`."""
        return self.until(lambda: re.findall(pattern, self.written()))

    def stop(self) -> None:
        """Ask it to end, and end it if it does not; then let the watcher go. Once more is no harm."""
        if self.running:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_PATIENCE)
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


def doors(directory: Path, env: Mapping[str, str], *, usual: bool = True) -> Child:
    """Both doors, `python -m producer serve`; `usual`: at their usual ports, where these are free."""
    ports = [
        f"--{door}-bind={HOST}:{_port(port) if usual else 0}"
        for door, port in (("http", HTTP_PORT), ("grpc", GRPC_PORT))
    ]
    return Child("doors", [sys.executable, "-m", "producer", "serve", *ports], directory, env)


def flower(directory: Path, env: Mapping[str, str], *, usual: bool = True) -> Child:
    """Flower, `celery -A worker.app flower`; `usual`: at its usual port, if that is free."""
    options = [f"--address={HOST}", f"--port={_port(FLOWER_PORT) if usual else 0}"]
    env = {name: value for name, value in env.items() if not name.startswith("FLOWER_")}  # settings of another Flower
    return Child("flower", [sys.executable, "-m", "celery", "-A", "worker.app", "flower", *options], directory, env)


def _port(usual: int) -> int:
    """The usual port, or 0 (the program takes a free one) if it is busy."""
    with socket.socket() as readiness:
        readiness.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have just ended do not count
        try:
            readiness.bind((HOST, usual))
        except OSError:
            return 0
    return usual
