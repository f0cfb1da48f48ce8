"""The base of every process that a test starts: it ends with the tests, keeps its log, and can be killed or frozen."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Self, TypeVar

T = TypeVar("T")
ROOT: Final = Path(__file__).parents[2]
HOST: Final = "127.0.0.1"
# Seconds. No test is about these: they are long enough for two cores with a load of 30.
WAIT_TIMEOUT: Final = 60.0
START_TIMEOUT: Final = 120.0
STOP_TIMEOUT: Final = 60.0
ROOM: Final = 30.0  # that a loaded machine may add to a promised deadline
# Below the ports that the kernel gives to outgoing connections: one of those might take ours during a restart.
PORTS: Final = range(10_000, 32_000)

# Has the kernel end this process when the tests end (Linux only), then becomes the given program.
LAUNCH: Final = """
import os, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
os.execvp(sys.argv[1], sys.argv[1:])
"""


def eventually(condition: Callable[[], object], within: float = WAIT_TIMEOUT) -> None:
    """Wait until `condition()` is true; fail if it is not within so many seconds."""
    deadline = time.monotonic() + within
    pause = 0.005
    while not condition():
        assert time.monotonic() < deadline, f"not true within {within} s"
        time.sleep(pause)
        pause = min(1.2 * pause, 0.1)  # what takes long is asked less often: asking costs the process time, too


def in_time(attempt: Callable[[float], T | None]) -> T:
    """What `attempt(seconds)` returns: one that must be done within so many seconds, and returns None if it was not.

    The seconds are few at first, for a quick machine, and then more.
    """
    for seconds in (2.0, 6.0, 20.0, 60.0):
        if (found := attempt(seconds)) is not None:
            return found
    raise AssertionError("nothing was done in time")


def free_port() -> int:
    """A port that nothing listens on now, and that no outgoing connection will take."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port


class Process:
    """A program with a directory of its own. `with Process(...) as process:` starts it, and removes all it left.

    A subclass says in `wait_until_ready` when the program is ready. It can be started again after it ended. It must
    be started from a thread that lives as long as it should: the kernel ends it together with that thread.
    """

    def __init__(self, name: str, command: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        """`environment` is the whole of it; by default that of the tests."""
        self._directory = tempfile.TemporaryDirectory(prefix=f"{name}-", ignore_cleanup_errors=True)
        self.directory = Path(self._directory.name)
        self.log_path = self.directory / f"{name}.log"
        self.log_path.touch()
        self.command = list(command)
        self.environment = dict(os.environ if environment is None else environment)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        """Start it; with `wait`, return when it is ready."""
        assert not self.alive, "it runs already"
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LAUNCH, *self.command],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the tests, not for it
            )
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Return when the program can be used; fail if it ends first."""

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process, which must have been started."""
        assert self._process is not None, "it was not started"
        return self._process

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id, 0 if it does not run."""
        return self.process.pid if self.alive else 0

    @property
    def log(self) -> str:
        """All that it has printed."""
        return self.log_path.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], object], within: float = WAIT_TIMEOUT) -> None:
        """Wait until `condition()` is true; fail if the process ends first."""

        def true() -> bool:
            if condition():
                return True
            assert self.alive, f"the process ended ({self.process.returncode}):\n{self.log[-3000:]}"
            return False

        eventually(true, within)

    def wait_for_log(self, text: str, within: float = WAIT_TIMEOUT) -> None:
        """Wait until the log contains `text`; fail if the process ends first."""
        self.wait_for(lambda: text in self.log, within)

    @property
    def connections(self) -> set[tuple[int, int]]:
        """Its own port and the other side's, of each established IPv4 connection (Linux only)."""
        ports = {}
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, state, *_, inode = line.split()[:10]
            if state == "01":
                ports[f"socket:[{inode}]"] = (int(local[-4:], 16), int(remote[-4:], 16))
        found = set()
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # it was closed meanwhile
                found.add(ports.get(str(link.readlink()), (0, 0)))
        return found - {(0, 0)}

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        self.signal(signal.SIGTERM)

    def wait(self, within: float = STOP_TIMEOUT) -> int:
        """Its exit code, once it has ended."""
        return self.process.wait(within)

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        self.terminate()
        return self.wait()

    def kill(self) -> None:
        """End it at once (SIGKILL), frozen or not."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """Freeze it (SIGSTOP): its connections stay open, and it answers nothing."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on (SIGCONT)."""
        if self._process is not None:
            self.signal(signal.SIGCONT)

    def close(self) -> None:
        """Kill it, and remove its files."""
        self.kill()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()


def own_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """The environment of one of our programs: that of the tests, with these `VERIFY_*` and no others."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VERIFY_")}
    return {**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **settings}
