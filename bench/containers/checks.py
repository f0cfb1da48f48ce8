"""What must hold of the Compose stack and the image, tried on an engine."""

from __future__ import annotations

import hashlib
import io
import re
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import httpx
from support import containers
from support.api_process import KEYS
from support.passwords import ALL
from support.process import eventually

from bench.containers.engine import ROOT, Engine

PROJECT: Final = "verifyserver-check"  # with networks and volumes of its own
PORTS: Final = (6379, 8081, 50051, 5555, 8025, 9090, 3000)
TIMEOUT: Final = 180.0  # seconds for what a busy machine does slowly
# As it stands in .env without quotes: none of it means anything to Compose.
UNQUOTED: Final = 'a%41b"c\\d/e?f#g@h:i'
EMAIL: Final = "a@example.com"


class Stack:
    """The checkout's Compose file as a project of its own, with an `.env` in the folder."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine = engine
        self._env = folder / "env"
        self._override = folder / "override.yml"
        self._override.write_text(f"services: {{worker: {{build: {{network: {engine.network}}}}}}}\n")
        self.set_password("'" + ALL.replace("'", "\\'") + "'")

    def set_password(self, written: str) -> None:
        """Write the `.env`, with the password as it stands there."""
        lines = [f"VERIFY_REDIS_PASSWORD={written}", "FLOWER_PASSWORD=pa55", "GRAFANA_PASSWORD=pa55"]
        self._env.write_text("\n".join([*lines, "VERIFY_RESEND_COOLDOWN=0", ""]))

    def compose(self, *words: str, check: bool = True) -> str:
        """`docker compose …` with the project's name and files."""
        files = ["-f", str(ROOT / "docker-compose.yml"), "-f", str(self._override)]
        own = ["docker", "compose", "-p", PROJECT, "--env-file", str(self._env), *files]
        return self.engine.run(*own, *words, check=check)

    def up(self, *words: str, profile: tuple[str, ...] = ()) -> None:
        """Start it, and wait until all are healthy."""
        self.compose(*profile, "up", "-d", "--wait", *words)

    def ids(self, *services: str) -> set[str]:
        """The running containers, of all services or these."""
        return set(self.compose("ps", "-q", *services).split())

    def left(self) -> set[str]:
        """The project's containers, running or not."""
        return set(
            self.engine.run("docker", "ps", "-aq", "--filter", f"label=com.docker.compose.project={PROJECT}").split()
        )

    def redis(self, *words: str) -> str:
        """A Redis command, with the password in that container."""
        return self.compose("exec", "-T", "redis", "redis-cli", *words).strip()

    def ask(self, path: str, **fields: str) -> Any:
        """The HTTP API's answer."""
        answer = httpx.post(f"http://127.0.0.1:8081{path}", json=fields, timeout=60, trust_env=False)
        return answer.json()

    def code(self) -> str:
        """The newest mail's code."""
        inbox = httpx.Client(base_url="http://127.0.0.1:8025/api/v1", timeout=60, trust_env=False)
        with inbox:
            [newest, *_] = inbox.get("/messages").json()["messages"]
            text = inbox.get(f"/message/{newest['ID']}").json()["Text"]
        found = re.search(r"(?<!\d)\d{6}(?!\d)", text)
        assert found, text
        return found[0]


def run(engine: Engine) -> int:
    """Try everything in order, and say how each went. 0 if all holds."""
    if busy := [port for port in PORTS if not _free(port)]:
        print(f"Not tried: ports {', '.join(map(str, busy))} of 127.0.0.1 are in use.")
        return 1
    stack = Stack(engine, engine.folder)
    failed = 0
    try:
        for check in CHECKS:
            name = (check.__doc__ or "").rstrip(".")
            begun = time.monotonic()
            try:
                check(stack)
            except (AssertionError, subprocess.CalledProcessError, httpx.HTTPError, ValueError) as exc:
                failed += 1
                said = f"{exc.stdout}{exc.stderr}" if isinstance(exc, subprocess.CalledProcessError) else repr(exc)
                print(f"FAILED  {name}\n{said[-3000:]}", flush=True)
            else:
                print(f"ok      {name} ({time.monotonic() - begun:.0f} s)", flush=True)
    finally:
        stack.compose("--profile", "observe", "down", "-v", "--remove-orphans", check=False)
    print(f"{len(CHECKS)} checks, {failed} failed.")
    return 1 if failed else 0


def _starts(stack: Stack) -> None:
    """From nothing, `up --build --wait` makes all healthy, with two workers, and builds one image."""
    stack.up("--build")
    assert len(stack.ids("worker")) == 2
    images = {stack.engine.run("docker", "inspect", "-f", "{{.Image}}", each).strip() for each in _ours(stack)}
    assert len(images) == 1, images


def _sends(stack: Stack) -> None:
    """A code is requested, mailed and checked; Redis' password has every special character."""
    assert stack.ask("/get_varifycode", email=EMAIL) == {"error": 0, "email": EMAIL}
    assert stack.ask("/check_varifycode", email=EMAIL, varifycode=stack.code()) == {"error": 0, "email": EMAIL}
    stack.compose("exec", "-T", "worker", "python", "-m", "worker", "dead", "list")
    assert "密码" not in stack.compose("logs") + stack.compose(
        "exec", "-T", "worker", "python", "-m", "producer", "settings"
    )


def _stays(stack: Stack) -> None:
    """A second `up --build` recreates nothing."""
    before = stack.ids()
    stack.up("--build")
    assert stack.ids() == before


def _scales(stack: Stack) -> None:
    """Workers are scaled to three and back; the profile `observe` keeps the second."""
    stack.up("--no-recreate", "--scale", "worker=3")
    assert len(stack.ids("worker")) == 3
    stack.up(profile=("--profile", "observe"))
    assert len(stack.ids("worker")) == 2
    assert len(stack.ids("prometheus", "grafana")) == 2


def _restarts(stack: Stack) -> None:
    """Killed, worker, API and Redis come back by themselves, and requests are served."""
    stack.redis("SET", "kept", "1", "EX", "3600")
    time.sleep(2)  # Redis writes its file every second
    killed = {service: min(stack.ids(service)) for service in ("worker", "api", "redis")}
    before = {name: _restarts_of(stack, name) for name in killed.values()}
    for service, name in killed.items():
        # All but the first process, which in ours is tini, and ends then; in Redis' container it is Redis.
        end = "redis-cli SHUTDOWN NOSAVE" if service == "redis" else "kill -9 -1"
        stack.engine.run("docker", "exec", name, "sh", "-c", end, check=False)
    for name, count in before.items():
        eventually(lambda which=name, was=count: _restarted(stack, which, was), TIMEOUT)  # type: ignore[misc]
    stack.up()
    assert stack.redis("GET", "kept") == "1"
    assert stack.ask("/get_varifycode", email=EMAIL)["error"] == 0


def _keeps(stack: Stack) -> None:
    """After `down` and `up` with another password, in `.env` without quotes, the data is still there."""
    stack.compose("--profile", "observe", "down")
    stack.set_password(UNQUOTED)
    stack.up()
    assert stack.redis("GET", "kept") == "1"
    assert stack.ask("/get_varifycode", email=EMAIL)["error"] == 0
    known = stack.compose("exec", "-T", "redis", "sh", "-c", 'printf %s "$REDISCLI_AUTH"')
    assert known == UNQUOTED


def _leaves(stack: Stack) -> None:
    """`down` leaves the containers of the profile; with `--profile observe` it leaves none."""
    stack.up(profile=("--profile", "observe"))
    stack.compose("--profile", "observe", "stop")
    stack.compose("down", check=False)
    assert len(stack.left()) == 2
    stack.compose("--profile", "observe", "down")
    assert stack.left() == set()


def _keys(stack: Stack) -> None:
    """By itself the image is the API: with keys it starts and warns, without them it does not start."""
    start = ("docker", "run", "-d", "--rm", "--read-only", "--tmpfs", "/tmp")  # noqa: S108 - in a container
    image = containers.services()["worker"]["image"]
    name = stack.engine.run(*start, "-e", f"VERIFY_API_KEYS={KEYS}", image).strip()
    try:
        eventually(lambda: _health(stack, name) == "healthy", TIMEOUT)
        log = subprocess.run(stack.engine.command("docker", "logs", name), capture_output=True, check=True)
        assert (log.stdout + log.stderr).count(b"unencrypted") == 2
    finally:
        stack.engine.run("docker", "kill", name, check=False)
    refused = subprocess.run(
        stack.engine.command("docker", "run", "--rm", image), capture_output=True, cwd=ROOT, check=False
    )
    assert refused.returncode == 2
    assert b"set VERIFY_API_KEYS" in refused.stderr


def _reproducible(stack: Stack) -> None:
    """Built twice without a cache, the image has the same files: names, contents, owners, modes."""
    build = ("docker", "build", "-q", "--no-cache", "--network", stack.engine.network, str(ROOT))
    first, second = (_files(stack, stack.engine.run(*build).strip()) for _ in range(2))
    differing = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    assert not differing, differing[:20]
    assert len(first) > 1000


CHECKS: Final[tuple[Callable[[Stack], None], ...]] = (
    *(_starts, _sends, _stays, _scales, _restarts, _keeps, _leaves),
    *(_keys, _reproducible),
)


def _ours(stack: Stack) -> set[str]:
    return stack.ids("worker", "api", "flower")


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _restarts_of(stack: Stack, container: str) -> int:
    return int(stack.engine.run("docker", "inspect", "-f", "{{.RestartCount}}", container))


def _restarted(stack: Stack, container: str, before: int) -> bool:
    return _restarts_of(stack, container) > before and _health(stack, container) == "healthy"


def _health(stack: Stack, container: str) -> str:
    return stack.engine.run("docker", "inspect", "-f", "{{.State.Health.Status}}", container, check=False).strip()


def _files(stack: Stack, image: str) -> dict[str, tuple[str, int, int, int]]:
    """Each path in an image with its content's hash or its link's target, mode, owner and group."""
    container = stack.engine.run("docker", "create", image).strip()
    try:
        packed = subprocess.run(
            stack.engine.command("docker", "export", container), capture_output=True, cwd=ROOT, check=True
        ).stdout
    finally:
        stack.engine.run("docker", "rm", container)
    found = {}
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        for each in tar:
            content = tar.extractfile(each) if each.isreg() else None
            digest = hashlib.sha256(content.read()).hexdigest() if content else each.linkname
            found[each.name] = (digest, each.mode, each.uid, each.gid)
    return found
