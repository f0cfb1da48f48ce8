"""What every test may ask for. Each xdist worker is a process of its own, so each has its own servers."""

from __future__ import annotations

import gc
import signal
import socketserver
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import redis as redis_py
from hypothesis import settings
from support.redis_server import RedisServer
from support.rig import Rig

# The same examples every time, none of them too slow for a busy machine; `--hypothesis-profile=explore` looks further.
settings.register_profile("steady", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("steady")

# A shell that runs the tests in the background lets them, and whatever they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Let garbage collection look only at what tests make: some tests collect, and all modules are loaded by now."""
    gc.collect()
    gc.freeze()


_left_out: Counter[str] = Counter()  # tests that `-m` has deselected, by file


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Count what is left out; in a process of xdist, for the one that prints."""
    if items and items[0].config.option.markexpr:
        _left_out.update(item.nodeid.partition("::")[0] for item in items)
        if hasattr(items[0].config, "workeroutput"):
            items[0].config.workeroutput["left_out"] = dict(_left_out)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every process of xdist collects the same tests."""
    _left_out.update(getattr(node, "workeroutput", {}).get("left_out", {}) if not _left_out else {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what is left out."""
    if _left_out:
        why = terminalreporter.config.option.markexpr
        terminalreporter.section(f"left out of `{why}`; `make test-all` runs tools, `pytest -m slow` slow")
    for name, count in sorted(_left_out.items()):
        terminalreporter.line(f"{name}: {count}")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """The server that all tests of this process share: never kill, pause or reconfigure it."""
    with RedisServer() as server:
        yield server


@pytest.fixture
def redis(redis_server: RedisServer) -> Iterator[redis_py.Redis]:
    """A client of the shared server's database 0; all databases are empty."""
    with redis_server.client() as client:
        client.flushall()
        yield client


@pytest.fixture
def new_redis_server() -> Iterator[Callable[..., RedisServer]]:
    """Starts a server of the test's own, which it may kill, pause and restart; takes what `RedisServer` takes."""
    with ExitStack() as stack:

        def start(**options: object) -> RedisServer:
            return stack.enter_context(RedisServer(**options))  # type: ignore[arg-type]  # passed on as given

        yield start


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """Redis, relay, worker and caller for a whole module: each test takes addresses of its own, and breaks nothing."""
    with Rig() as rig:
        rig.add_worker()
        yield rig
        assert rig.worker.alive


@pytest.fixture
def new_rig() -> Iterator[Callable[..., Rig]]:
    """Makes rigs of the test's own, which it may break; takes what `Rig` takes, and starts no worker."""
    with ExitStack() as stack:

        def make(**options: object) -> Rig:
            return stack.enter_context(Rig(**options))  # type: ignore[arg-type]  # passed on as given

        yield make


@pytest.fixture
def old_redis() -> Iterator[str]:
    """Something that says it is Redis 6.0."""

    info = b"# Server\r\nredis_version:6.0.16\r\n"

    class Old(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            # A command is `*<words>`, then `$<length>` and so many bytes for each word.
            while head := self.rfile.readline():
                words = [self._word() for _ in range(int(head[1:]))]
                self.wfile.write(b"$%d\r\n%s\r\n" % (len(info), info) if words[0] == b"INFO" else b"+OK\r\n")

        def _word(self) -> bytes:
            return self.rfile.read(int(self.rfile.readline()[1:]) + 2)[:-2]

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Old) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"redis://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
