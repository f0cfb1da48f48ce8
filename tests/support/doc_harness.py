"""Runs the commands of the docs in a checkout of their own, with the services that a reader has running.

Redis, the SMTP server, the worker and the API are real. A command runs as it stands in the docs, except for what must
differ here: ports and addresses of servers, and the code that a reader finds in the mail.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
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
from support.process import HOST, START_TIMEOUT, Process, eventually, free_port
from support.redis_server import RedisServer
from support.smtp_server import ScriptedServer, running
from support.worker_process import WorkerProcess

EMAIL: Final = "a@example.com"  # the docs' recipient
RUN_TIMEOUT: Final = 300.0  # seconds
_OURS: Final = ("VERIFY_", "REDIS_", "FLOWER_", "PYTEST_")  # variables that a command must not inherit
_NOT_COPIED: Final = (".git", ".venv", ".env", "__pycache__", ".*_cache", ".hypothesis", ".build", "node_modules")
# Runs a line in a shell that continues where the lines before it stopped: their exports and their directory.
_LINE: Final = """. "$SHELL_STATE"
{line}
status=$?
{{ export -p; echo "cd '$PWD'"; }} >"$SHELL_STATE"
exit $status"""


def _is_up(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).is_success
    except httpx.HTTPError:
        return False


class Service(Process):
    """A command that runs until it is stopped."""

    def __init__(self, line: str, directory: Path, environment: Mapping[str, str]) -> None:
        script = f'cd {shlex.quote(str(directory))}\n. "$SHELL_STATE"\nexec env {line}'
        super().__init__("service", ["/bin/sh", "-c", script], environment)

    def wait_until(self, prints: str, url: str) -> None:
        """Wait until it has printed this pattern and, if a `url` is given, answers there."""
        self.wait_for(lambda: re.search(prints, self.log) and (not url or _is_up(url)), START_TIMEOUT)


class DocHarness:
    """`with DocHarness(folder) as docs, docs.fresh(): docs.run(line)`."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._folder = folder
        self.checkout = folder / "checkout"
        self.server = self._stack.enter_context(RedisServer())
        self.relay = self._stack.enter_context(running(ScriptedServer()))
        self.ports = {name: free_port() for name in ("http", "grpc", "metrics", "second_metrics", "flower")}
        self._helpers: dict[str, WorkerProcess | ApiProcess] = {}
        self._services: dict[str, Service] = {}
        shutil.copytree(ROOT, self.checkout, ignore=shutil.ignore_patterns(*_NOT_COPIED), symlinks=True)
        self._link_environment()
        self.config = folder / "config.json"
        redis = {"host": HOST, "port": self.server.port, "passwd": ""}
        self.config.write_text(json.dumps({"email": {"user": "chat@example.com", "pass": "x"}, "redis": redis}))

    def _link_environment(self) -> None:
        """Give the checkout a `.venv` as `make setup` leaves it, with the packages of the tests."""
        venv = self.checkout / ".venv"
        venv.mkdir()
        for each in Path(sys.prefix).iterdir():
            if each.name != "requirements.lock":
                (venv / each.name).symlink_to(each)
        shutil.copy(ROOT / "requirements.lock", venv)

    def localized(self, text: str) -> str:
        """The text with the docs' addresses, paths and code replaced by those that are right here."""
        latest = json.loads((self.checkout / "bench/results/latest.json").read_text("utf-8"))
        replacements = {
            "127.0.0.1:8081": f"127.0.0.1:{self.ports['http']}",
            "127.0.0.1:50051": f"127.0.0.1:{self.ports['grpc']}",
            "127.0.0.1:9464": f"127.0.0.1:{self.ports['metrics']}",
            "127.0.0.1:9465": f"127.0.0.1:{self.ports['second_metrics']}",
            "127.0.0.1:5555": f"127.0.0.1:{self.ports['flower']}",
            "redis://127.0.0.1:6379": self.server.url(),
            "smtp+starttls://user:password@smtp.example.com:587": f"smtp://127.0.0.1:{self.relay.port}",
            "/path/to/config.json": str(self.config),
            "path/to/config.json": str(self.config),
            "report RAW": f"report bench/results/{latest['raw']}",
            "123456": self._code(),
        }
        for there, here in replacements.items():
            text = re.sub(rf"(?<!\w){re.escape(there)}(?!\d)", lambda _, here=here: here, text)  # type: ignore[misc]
        return text

    def _code(self) -> str:
        with self.server.client() as client:
            found = client.get(f"code_{EMAIL}")
        return found.decode() if found else "123456"

    def _environment(self, unset: tuple[str, ...]) -> dict[str, str]:
        """The environment of a command, less the variables that begin with one of `unset`."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        environment = {
            **inherited,
            "PATH": f"{self.checkout}/.venv/bin{os.pathsep}{os.environ['PATH']}",
            "PYTHONUNBUFFERED": "1",
            "LC_ALL": "C.UTF-8",
            "SHELL_STATE": str(self._folder / "state"),
            "FLOWER_PORT": str(self.ports["flower"]),
            "VERIFY_REDIS_URL": self.server.url(),
            "VERIFY_RELAYS": f"smtp://127.0.0.1:{self.relay.port}",
            "VERIFY_HTTP_BIND": f"127.0.0.1:{self.ports['http']}",
            "VERIFY_GRPC_BIND": f"127.0.0.1:{self.ports['grpc']}",
            "VERIFY_METRICS_BIND": f"127.0.0.1:{self.ports['metrics']}",
            "HTTP_API": f"http://127.0.0.1:{self.ports['http']}",
            "GRPC_API": f"127.0.0.1:{self.ports['grpc']}",
        }
        return {name: value for name, value in environment.items() if not unset or not name.startswith(unset)}

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """A new shell, and a Redis without codes; at the end, what was started has ended."""
        with self.server.client() as client:
            client.flushdb()
        (self._folder / "state").write_text("")
        try:
            yield
        finally:
            for service in self._services.values():
                service.close()
            self._services.clear()
            (self.checkout / ".env").unlink(missing_ok=True)

    def require(self, *names: str) -> None:
        """See that these are there: a `worker`, an `api`, a `code` mailed to `EMAIL`, one `asked` for over gRPC."""
        settings = {name: value for name, value in self._environment(()).items() if name.startswith("VERIFY_")}
        for name in names:
            if name == "code":
                self.require("worker")
                with VerificationClient(load(settings, dotenv=None)) as client:
                    # Not every worker of the docs says when it is ready.
                    eventually(lambda client=client: client.request(EMAIL).error == 0, START_TIMEOUT)  # type: ignore[misc]
            elif name == "asked":
                self.require("worker", "api")
                self.run(f"{sys.executable} examples/ask_grpc.py {EMAIL}")
            elif name not in self._helpers and name not in self._services:
                helper = WorkerProcess(settings, log_level="INFO") if name == "worker" else ApiProcess(settings)
                self._helpers[name] = helper
                helper.start()

    def run(
        self, line: str, directory: str = ".", *, unset: tuple[str, ...] = (), timeout: float = RUN_TIMEOUT, **more: str
    ) -> tuple[int, str]:
        """The exit status and output of a line, without the variables `unset` and with `more`."""
        done = subprocess.run(
            ["/bin/sh", "-c", _LINE.format(line=self.localized(line))],
            cwd=self.checkout / directory,
            env={**self._environment(unset), **more},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        return done.returncode, done.stdout

    def serve(self, line: str, role: str, directory: str = ".", *, unset: tuple[str, ...] = ()) -> Service:
        """Start a command that runs until it is stopped, in place of our own process for this role."""
        self._dismiss(role)
        service = Service(self.localized(line), self.checkout / directory, self._environment(unset))
        self._services[role] = service
        service.start()
        return service

    def _dismiss(self, role: str) -> None:
        helper = self._helpers.pop(role, None)
        if helper is not None:
            helper.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for role in list(self._helpers):
            self._dismiss(role)
        self._stack.close()
