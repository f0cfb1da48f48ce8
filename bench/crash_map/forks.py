"""Starts real workers, API servers and clients in a fraction of their usual time.

Most of a start is imports. So one process imports everything and then only forks; each child gets its environment,
reads its settings and runs as if it had been started from the shell.

As a program: reads orders from its standard input, writes on its standard output what it has started and what has
ended, each a line of JSON, and ends with its input; its children end with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import selectors
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, Final, Self

from bench.crash_map import programs

_LINE: Final = 2**20  # bytes of one order, at most
_SAY: Final = 3  # the descriptor that tells what happened; children write theirs to files


class Forks:
    """The side that gives orders. `async with Forks() as forks:`; every child has ended after it."""

    def __init__(self) -> None:
        self._orders = itertools.count()
        self._started: dict[int, asyncio.Future[int]] = {}
        self._ended: dict[int, asyncio.Future[int]] = {}  # by process id
        self._process: asyncio.subprocess.Process
        self._reading: asyncio.Task[None]

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.crash_map.forks"),
            cwd=Path(__file__).parents[2],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the map, which then ends this
            limit=_LINE,
        )
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                await self._process.wait()
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        self._reading.cancel()

    async def start(self, program: str, environment: dict[str, str], folder: Path) -> Child:
        """Run one of `programs.PROGRAMS` in a folder of its own, where its log is."""
        assert self._process.stdin is not None
        order = next(self._orders)
        started = self._started[order] = asyncio.get_running_loop().create_future()
        line = {"order": order, "program": program, "environment": environment, "folder": str(folder)}
        self._process.stdin.write(json.dumps(line).encode() + b"\n")
        pid = await started
        return Child(pid, self._ended[pid], folder / "log")

    async def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            while line := await self._process.stdout.readline():
                said = json.loads(line)
                if "order" in said:
                    self._ended[said["pid"]] = asyncio.get_running_loop().create_future()
                    self._started.pop(said["order"]).set_result(said["pid"])
                elif (ended := self._ended.pop(said["ended"], None)) is not None:
                    ended.set_result(said["status"])
        finally:  # an interrupt cancels this before those who wait for a child's end
            for started in self._started.values():
                if not started.done():
                    started.set_exception(RuntimeError("the process that starts all others has ended"))
            for ended in self._ended.values():
                ended.cancel()


class Child:
    """A process that runs."""

    def __init__(self, pid: int, ended: asyncio.Future[int], log: Path) -> None:
        self.pid = pid
        self._ended = ended
        self._log = log

    @property
    def alive(self) -> bool:
        """Whether it runs, or is frozen."""
        return not self._ended.done()

    @property
    def log(self) -> str:
        """All that it has printed."""
        return self._log.read_text(errors="replace")

    async def freeze(self) -> None:
        """SIGSTOP; returns when it stands still, which a thread on another core does a little later."""
        self._signal(signal.SIGSTOP)
        while self.alive and not _stands_still(self.pid):  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.001)

    def wake(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    async def kill(self) -> None:
        """SIGKILL, frozen or not; returns when it is gone."""
        self._signal(signal.SIGKILL)
        await self.ended()

    async def ended(self) -> None:
        """Return when it is gone."""
        await asyncio.wait([self._ended])

    def _signal(self, number: signal.Signals) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _stands_still(pid: int) -> bool:
    """Whether all threads of a process are stopped (Linux only)."""
    stats: list[str] = []
    with contextlib.suppress(OSError):  # it ended
        stats = [(thread / "stat").read_text() for thread in Path(f"/proc/{pid}/task").iterdir()]
    return all(stat.rpartition(") ")[2].startswith("T") for stat in stats)


def _say(message: dict[str, Any]) -> None:
    os.write(_SAY, json.dumps(message).encode() + b"\n")


def _die_with_parent() -> None:
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415 - Linux only

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _become(order: dict[str, Any]) -> None:
    """In the child: be this program, as if it had just been started."""
    try:
        os.close(_SAY)
        _die_with_parent()
        os.chdir(order["folder"])
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, source in ((0, nothing), (1, log), (2, log)):
            os.dup2(source, number)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.environ.update(order["environment"])
        status = programs.PROGRAMS[order["program"]]()
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else 1
    except BaseException:  # noqa: BLE001 - it is told in the log
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def main() -> None:
    """Serve orders until there are no more."""
    _die_with_parent()
    os.dup2(1, _SAY)
    os.dup2(2, 1)
    programs.load()
    gc.collect()
    gc.freeze()  # children share what is never looked at
    wake_reader, wake_writer = os.pipe()
    for number in (wake_reader, wake_writer, _SAY):
        os.set_blocking(number, number == _SAY)
    signal.set_wakeup_fd(wake_writer)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: set[int] = set()
    waiting = selectors.DefaultSelector()
    waiting.register(0, selectors.EVENT_READ)
    waiting.register(wake_reader, selectors.EVENT_READ)
    rest = b""
    orders_left = True
    while orders_left:
        for key, _ in waiting.select():
            if key.fd == wake_reader:
                os.read(wake_reader, 4096)
                continue
            data = os.read(0, 65536)
            orders_left = bool(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                order = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    waiting.close()
                    _become(order)
                children.add(pid)
                _say({"order": order["order"], "pid": pid})
        for pid in list(children):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                children.discard(pid)
                _say({"ended": pid, "status": os.waitstatus_to_exitcode(status)})
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
