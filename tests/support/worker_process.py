"""A worker as an operator starts it: `celery -A worker.app worker`, a process of its own with its own log."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

ROOT: Final = Path(__file__).parents[2]
START_TIMEOUT: Final = 30.0  # seconds; Celery's imports alone take more than one on a busy core
STOP_TIMEOUT: Final = 15.0  # the contract's bound for SIGTERM

# Asks the kernel to end this process with the tests' (Linux only), then becomes the program that is named after it.
LAUNCH: Final = """
import os, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
os.execvp(sys.argv[1], sys.argv[1:])
"""


def eventually(holds: Callable[[], object], within: float = 10.0) -> None:
    """Wait until `holds()` is true; fail if it is not within so many seconds."""
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline, f"did not come true within {within} s"
        time.sleep(0.01)


class WorkerProcess:
    """One worker. `with WorkerProcess(settings) as worker:` starts it, waits until it is ready, and ends it."""

    def __init__(self, settings: Mapping[str, str], *, log_level: str = "DEBUG") -> None:
        """`settings`: the environment's `VERIFY_*`; none of ours and no `.env` is handed down."""
        self.name = f"w{uuid.uuid4().hex[:8]}@test"
        self._directory = tempfile.TemporaryDirectory(prefix="worker-")
        self.log_path = Path(self._directory.name) / "worker.log"
        self._level = log_level
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("VERIFY_")}
        self.environment = {**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **settings}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        """Start it; unless told otherwise, return when it says that it is ready."""
        celery = [sys.executable, "-m", "celery", "-A", "worker.app", "worker", "-l", self._level, "-n", self.name]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, *celery],
                cwd=self._directory.name,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the tests', not the worker's
            )
        if wait:
            self.wait_for_log(" ready.", START_TIMEOUT)

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process; there must be one."""
        assert self._process is not None, "the worker was not started"
        return self._process

    @property
    def log(self) -> str:
        """All that it has said."""
        return self.log_path.read_text(errors="replace")

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def metrics_url(self) -> str:
        """Where it says that its metrics are."""
        self.wait_for_log("metrics are at ")
        return str(re.findall(r"metrics are at (http://\S+/metrics)", self.log)[-1])

    def wait_for_log(self, text: str, within: float = 10.0) -> None:
        """Wait until the log has `text`; fail if the worker ends before."""

        def said() -> bool:
            if text in self.log:
                return True
            assert self.alive, f"the worker ended ({self.process.returncode}):\n{self.log[-3000:]}"
            return False

        eventually(said, within)

    def terminate(self) -> None:
        """Ask for the warm shutdown (SIGTERM)."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, within: float = STOP_TIMEOUT) -> int:
        """Its exit code."""
        return self.process.wait(within)

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        self.terminate()
        return self.wait()

    def kill(self) -> None:
        """End it wherever it is (SIGKILL)."""
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """Freeze it (SIGSTOP)."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on (SIGCONT)."""
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it, and remove its log."""
        if self.alive:
            self.resume()
            self.kill()
        self._directory.cleanup()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.close()
