"""The stage on which the pages' commands run: a checkout of its own, and what a reader has running beside it.

Redis, an SMTP server, a worker and the doors are real. Commands run as they stand; what must differ is in `Stage.words`
(ports, addresses of servers, the code that a reader finds in the mail) and `Stage.environment` (where services bind).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

import httpx

from producer.client import VerificationClient
from producer.settings import load
from support.api_process import ApiProcess
from support.doc_pages import ROOT
from support.process import HOST, eventually, free_port
from support.redis_server import RedisServer
from support.smtp_server import ScriptedServer, running
from support.worker_process import WorkerProcess

A: Final = "a@example.com"  # to whom the pages' codes go
START_TIMEOUT: Final = 60.0  # seconds until a service says that it is ready
END_TIMEOUT: Final = 30.0  # seconds until it ended after SIGTERM
# Our variables, which no command may find by chance.
_OURS: Final = ("VERIFY_", "REDIS_", "FLOWER_", "PYTEST_")
_LEFT_OUT: Final = (".git", ".venv", ".env", "__pycache__", ".*_cache", ".hypothesis", ".build", "node_modules")
# Runs a line in a shell that remembers what earlier lines exported, and where they went.
_LINE: Final = """. "$SHELL_STATE"
{line}
status=$?
{{ export -p; echo "cd '$PWD'"; }} >"$SHELL_STATE"
exit $status"""
# The same for a line that stays. If the tests are killed its input ends, and then the whole group is.
_SERVICE: Final = """. "$SHELL_STATE"
exec 3<&0
(read -r _ <&3; kill -s KILL 0) &
trap : INT TERM
{line} </dev/null 3<&-
exit $?"""


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.HTTPError:
        return False


class Service:
    """A line that stays until it is told to end."""

    def __init__(self, line: str, directory: Path, environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", _SERVICE.format(line=line)],
                cwd=directory,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """All that it printed."""
        return self._log.read_text(errors="replace")

    def wait_for(self, says: str, url: str = "") -> None:
        """Wait until it printed this pattern, and answers here; fail if it ends before."""

        def ready() -> bool:
            return re.search(says, self.said) is not None and (not url or _answers(url))

        eventually(lambda: ready() or self.process.poll() is not None, START_TIMEOUT)
        assert ready(), self.said[-3000:]

    def end(self) -> int:
        """SIGTERM, and its exit status."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            return self.process.wait(END_TIMEOUT)
        finally:
            self.kill()

    def kill(self) -> None:
        """End whatever is left of it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Stage:
    """`with Stage(folder) as stage:` sets it; `stage.run(line)` plays a line of a page."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._folder = folder
        self.checkout = folder / "checkout"
        self.server = self._stack.enter_context(RedisServer())
        self.relay = self._stack.enter_context(running(ScriptedServer()))
        self.ports = {name: free_port() for name in ("http", "grpc", "metrics", "flower")}
        self._helpers: dict[str, WorkerProcess | ApiProcess] = {}
        self._services: dict[str, Service] = {}
        self._count = 0
        shutil.copytree(ROOT, self.checkout, ignore=shutil.ignore_patterns(*_LEFT_OUT), symlinks=True)
        self._link_environment()
        self.config = folder / "config.json"
        told = {"host": HOST, "port": self.server.port, "passwd": ""}
        self.config.write_text(json.dumps({"email": {"user": "chat@example.com", "pass": "x"}, "redis": told}))

    def _link_environment(self) -> None:
        """`.venv` as `make setup` leaves it, with the tests' own packages."""
        venv = self.checkout / ".venv"
        venv.mkdir()
        for each in Path(sys.prefix).iterdir():
            if each.name != "requirements.lock":
                (venv / each.name).symlink_to(each)
        shutil.copy(ROOT / "requirements.lock", venv)

    @property
    def words(self) -> dict[str, str]:
        """What stands in the pages, and what stands here in its place."""
        return {
            "127.0.0.1:8081": f"127.0.0.1:{self.ports['http']}",
            "127.0.0.1:50051": f"127.0.0.1:{self.ports['grpc']}",
            "127.0.0.1:9464": f"127.0.0.1:{self.ports['metrics']}",
            "127.0.0.1:5555": f"127.0.0.1:{self.ports['flower']}",
            "redis://127.0.0.1:6379": self.server.url(),
            "smtp+starttls://user:password@smtp.example.com:587": f"smtp://127.0.0.1:{self.relay.port}",
            "/path/to/config.json": str(self.config),
            "path/to/config.json": str(self.config),
            "report RAW": f"report bench/results/{self._raw()}",
            "123456": self._code(),
        }

    @property
    def environment(self) -> dict[str, str]:
        """Where servers are, and where services bind: the ports of the pages are not ours."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        return {
            **inherited,
            "PATH": f"{self.checkout}/.venv/bin{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "LC_ALL": "C.UTF-8",
            "SHELL_STATE": str(self._folder / "state"),
            "REDIS_PORT": str(self.server.port),
            "FLOWER_PORT": str(self.ports["flower"]),
            "VERIFY_REDIS_URL": self.server.url(),
            "VERIFY_RELAYS": f"smtp://127.0.0.1:{self.relay.port}",
            "VERIFY_HTTP_BIND": f"127.0.0.1:{self.ports['http']}",
            "VERIFY_GRPC_BIND": f"127.0.0.1:{self.ports['grpc']}",
            "VERIFY_METRICS_BIND": f"127.0.0.1:{self.ports['metrics']}",
            "VERIFY_HTTP_DOOR": f"http://127.0.0.1:{self.ports['http']}",
            "VERIFY_GRPC_DOOR": f"127.0.0.1:{self.ports['grpc']}",
        }

    def _code(self) -> str:
        with self.server.client() as client:
            found = client.get(f"code_{A}")
        return found.decode() if found else "123456"

    def _raw(self) -> str:
        latest = json.loads((self.checkout / "bench/results/latest.json").read_text("utf-8"))
        return str(latest["raw"])

    def localized(self, line: str) -> str:
        """A line as it runs here."""
        for there, here in self.words.items():
            line = re.sub(rf"(?<!\w){re.escape(there)}(?!\d)", lambda _, here=here: here, line)  # type: ignore[misc]
        return line

    @contextlib.contextmanager
    def scene(self) -> Iterator[None]:
        """One block: a new shell, nobody asked before. What it started has ended when it is left."""
        with self.server.client() as client:
            client.flushdb()
        (self._folder / "state").write_text("")
        try:
            yield
        finally:
            for service in self._services.values():
                service.kill()
            self._services.clear()
            (self.checkout / ".env").unlink(missing_ok=True)

    def needs(self, *names: str) -> None:
        """See that they run: `worker`, `doors`; a `code` for `A` that was mailed, or for one who `asked` at a door."""
        settings = {name: value for name, value in self.environment.items() if name.startswith("VERIFY_")}
        for name in names:
            if name == "code":
                self.needs("worker")
                with VerificationClient(load(settings, dotenv=None)) as client:
                    # Some workers of the pages say nothing when they are ready.
                    eventually(lambda client=client: client.request(A).error == 0, START_TIMEOUT)  # type: ignore[misc]
            elif name == "asked":
                self.needs("worker", "doors")
                self.run(f"{sys.executable} examples/ask_grpc.py {A}")
            elif name not in self._helpers and name not in self._services:
                helper = WorkerProcess(settings, log_level="INFO") if name == "worker" else ApiProcess(settings)
                self._helpers[name] = helper
                helper.start()

    def _dismiss(self, role: str) -> None:
        helper = self._helpers.pop(role, None)
        if helper is not None:
            helper.close()

    def run(
        self, line: str, directory: str = ".", *, without: tuple[str, ...] = (), timeout: float = 120.0, **more: str
    ) -> tuple[int, str]:
        """Exit status and output of a line, in an environment `without` these variables and with `more`."""
        done = subprocess.run(
            ["/bin/sh", "-c", _LINE.format(line=self.localized(line))],
            cwd=self.checkout / directory,
            env={**self._told(without), **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.returncode, done.stdout

    def serve(self, line: str, role: str, directory: str = ".", *, without: tuple[str, ...] = ()) -> Service:
        """Start a line that stays, in the place of the one of ours that plays this role."""
        self._dismiss(role)
        self._count += 1
        log = self._folder / f"service-{self._count}.log"
        service = Service(self.localized(line), self.checkout / directory, self._told(without), log)
        self._services[role] = service
        return service

    def _told(self, without: tuple[str, ...]) -> dict[str, str]:
        return {name: value for name, value in self.environment.items() if not name.startswith(without or ("=",))}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for role in list(self._helpers):
            self._dismiss(role)
        self._stack.close()
