"""The pods of `deploy/kubernetes/overlays/try`, run as written in a folder with what the Dockerfile copies.

No cluster is at work: commands, probes, preStop and the Secret's files are the manifests'; names, ports and paths are
this host's in place of the cluster's. Redis and mail catcher are the tests' own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import httpx
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families
from support import containers, manifests
from support.manifests import SECRETS, Workload, of, workloads
from support.process import eventually, free_port
from support.redis_server import RedisServer

from demo.catcher import Catcher
from producer.contract import ErrorCode

OURS: Final = ("workers", "api", "flower")
START_TIMEOUT: Final = 60.0  # seconds until a probe passes, on a busy machine
A: Final = "a@example.com"


class Node:
    """This host in place of a cluster's node: a folder for the image, a process for each pod."""

    def __init__(self, folder: Path, server: RedisServer, relay: str, secret: dict[str, str]) -> None:
        """`secret`: the Secret's content by key; `relay`: the URL of what stands in for Mailpit."""
        self.secret = secret
        self.pods = workloads("try")
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._folder = folder
        self._image = folder / "image"
        for name in containers.copied():
            containers.copy(name, self._image)
        (self._image / "venv").symlink_to(sys.prefix)
        self.ports = {port: free_port() for name in OURS for port in self.pods[name].ports.values()}
        self._here = [
            (containers.HOME, str(self._image)),
            ("redis:6379", f"127.0.0.1:{server.port}"),
            (secret["relays"], relay),
            ("0.0.0.0", "127.0.0.1"),  # noqa: S104 - it is replaced
            *((str(port), str(here)) for port, here in self.ports.items()),
        ]

    def _localize(self, text: str, name: str) -> str:
        for old, new in (*self._here, (SECRETS, str(self._secrets(name)))):
            text = re.sub(rf"(?<!\d){re.escape(old)}(?!\d)", new, text)
        return text

    def _secrets(self, name: str) -> Path:
        return self._folder / "secrets" / name

    def environment(self, name: str) -> dict[str, str]:
        """What its container is told, and nothing of what the tests are."""
        told = manifests.environment("try", name, self.secret)
        found = {key: self._localize(value, name) for key, value in told.items()}
        return found | {"LANG": "C.UTF-8"}

    def start(self, name: str, *, wait: bool = True) -> None:
        """Its process, and wait until its startup probe passes."""
        pod = self.pods[name]
        secret = {key: self._localize(value, name) for key, value in self.secret.items()}
        manifests.write_secrets(self._secrets(name), pod, secret)
        command = [self._localize(word, name) for word in pod.container["args"]]
        if shutil.which("tini"):
            command = ["tini", "-s", "--", *command]  # the image's entry point; -s: elsewhere it is the first process
        env = self.environment(name)
        with (self._folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [shutil.which(command[0], path=f"{env['PATH']}:{os.environ['PATH']}") or command[0], *command[1:]],
                cwd=self._image,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        if wait:
            eventually(lambda: self.probe(name, "startupProbe") or self.ended(name), START_TIMEOUT)
            assert not self.ended(name), self.log(name)

    def ended(self, name: str) -> bool:
        """Whether its process is gone."""
        return self.running[name].poll() is not None

    def probe(self, name: str, kind: str) -> bool:
        """One of its probes, once, as the kubelet asks."""
        probe = self.pods[name].container[kind]
        ask = probe["httpGet"]
        url = f"http://127.0.0.1:{self.port(name, ask['port'])}{ask['path']}"
        try:
            return httpx.get(url, timeout=probe["timeoutSeconds"], trust_env=False).status_code in range(200, 400)
        except httpx.HTTPError:
            return False

    def port(self, name: str, port: str) -> int:
        """A port of its container, here."""
        return self.ports[self.pods[name].ports[port]]

    def door(self, key: str | None = None) -> httpx.Client:
        """A caller of the HTTP door, with a key or without."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        base = f"http://127.0.0.1:{self.port('doors', 'http')}"
        return httpx.Client(base_url=base, headers=headers, timeout=60, trust_env=False)

    def stop(self, name: str) -> tuple[int, float]:
        """As the kubelet does: preStop, SIGTERM, and so many seconds for both; its exit code, and what was left."""
        pod, process = self.pods[name], self.running[name]
        deadline = time.monotonic() + pod.pod["terminationGracePeriodSeconds"]
        self._before(pod)
        process.send_signal(signal.SIGTERM)
        code = process.wait(deadline - time.monotonic())
        del self.running[name]
        return code, deadline - time.monotonic()

    def _before(self, pod: Workload) -> None:
        hook = pod.container.get("lifecycle", {}).get("preStop")
        if hook is not None:
            subprocess.run(hook["exec"]["command"], check=True, timeout=30)

    def log(self, name: str) -> str:
        """All that it said."""
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def files(self) -> set[Path]:
        """What is in the image, its environment aside."""
        return {path for path in self._image.rglob("*") if not path.is_relative_to(self._image / "venv")}

    def close(self) -> None:
        """End what still runs."""
        for process in self.running.values():
            containers.kill(process)


@pytest.fixture(scope="module")
def catcher() -> Iterator[Catcher]:
    """Mailpit's stand-in."""
    with Catcher() as catcher:
        yield catcher


@pytest.fixture(scope="module")
def secret() -> dict[str, str]:
    """A new Secret's content."""
    content: dict[str, str] = manifests.new_secret()["stringData"]
    return content


@pytest.fixture(scope="module")
def server(secret: dict[str, str]) -> Iterator[RedisServer]:
    """Redis, with the Secret's password."""
    with RedisServer(aof=True, password=secret["redis-password"]) as server:
        yield server


@pytest.fixture(scope="module")
def node(
    server: RedisServer, catcher: Catcher, secret: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Node]:
    """A pod of each of ours, started."""
    with ExitStack() as stack:
        node = Node(tmp_path_factory.mktemp("node"), server, catcher.url, secret)
        stack.callback(node.close)
        before = node.files()
        for name in OURS:
            node.start(name)
        yield node
        assert node.files() == before  # the root is read-only


def test_a_code_goes_from_the_door_to_the_mailbox_and_is_checked(node: Node, catcher: Catcher) -> None:
    key = node.secret["api-keys"].split(",")[0]
    with node.door(key) as door, node.door() as stranger:
        assert door.get("/readyz").status_code == 200
        assert stranger.post("/get_varifycode", json={"email": A}).status_code == 401
        assert door.post("/get_varifycode", json={"email": A}).json() == {"error": 0, "email": A}
        mail = catcher.wait(10)
        assert mail is not None
        [code] = mail.codes(6)
        answer = door.post("/check_varifycode", json={"email": A, "varifycode": code})
        assert answer.json() == {"error": 0, "email": A}


def test_every_probe_passes(node: Node) -> None:
    for name in OURS:
        for kind, _ in node.pods[name].probes():
            assert node.probe(name, kind), (name, kind)


def test_flower_asks_for_the_secrets_password(node: Node) -> None:
    url = f"http://127.0.0.1:{node.port('flower', 'http')}/workers"
    user, _, password = node.secret["flower"].partition(":")
    assert httpx.get(url, trust_env=False).status_code == 401
    assert httpx.get(url, auth=(user, password), trust_env=False).status_code == 200


@pytest.mark.slow
def test_a_change_of_the_queue_shows_where_the_scaler_looks(node: Node, server: RedisServer) -> None:
    length, age = (trigger["metadata"] for trigger in of("production", "ScaledObject")["workers"]["spec"]["triggers"])
    broker = redis.Redis(
        "127.0.0.1", server.port, db=int(length["databaseIndex"]), password=node.secret["redis-password"]
    )
    node.stop("workers")
    try:
        with broker, node.door(node.secret["metrics-key"]) as door, node.door() as stranger:
            eventually(lambda: door.get("/readyz").status_code == 503)
            assert broker.llen(length["listName"]) == 0
            assert _oldest(door, age["valueLocation"]) == 0
            late = door.post("/get_varifycode", json={"email": "b@example.com"}).json()
            assert late["error"] == ErrorCode.TIMEOUT
            assert broker.llen(length["listName"]) == 1
            assert _oldest(door, age["valueLocation"]) > float(age["targetValue"])  # its caller waited for 5 s
            assert stranger.get("/metrics").status_code == 401
            assert node.probe("api", "readinessProbe")  # a door without workers still answers
    finally:
        node.start("workers")
    with broker:
        eventually(lambda: broker.llen(length["listName"]) == 0)


def test_without_redis_no_probe_that_ends_a_pod_fails(node: Node, server: RedisServer) -> None:
    server.kill()
    try:
        with node.door(node.secret["metrics-key"]) as door:
            eventually(lambda: "verify_broker_up 0.0" in door.get("/metrics").text)
            answer = door.post("/get_varifycode", json={"email": "c@example.com"}).json()
            assert answer["error"] == ErrorCode.REDIS_ERR
        for name in ("workers", "api"):
            for kind, _ in node.pods[name].probes():
                assert node.probe(name, kind), (name, kind)
    finally:
        server.start()
    with node.door() as door:
        eventually(lambda: door.get("/readyz").status_code == 200, START_TIMEOUT)


def test_a_worker_that_starts_before_redis_waits_for_it(node: Node, server: RedisServer) -> None:
    node.stop("workers")
    server.kill()
    try:
        node.start("workers", wait=False)
        eventually(lambda: "waiting for Redis" in node.log("workers"), START_TIMEOUT)
        assert not node.probe("workers", "startupProbe")  # which is why this one is patient
    finally:
        server.start()
    eventually(lambda: node.probe("workers", "startupProbe"), START_TIMEOUT)
    assert not node.ended("workers")


@pytest.mark.slow
def test_a_door_that_goes_answers_what_it_took_and_is_open_until_then(node: Node) -> None:
    assert node.stop("workers")[1] > 0
    answers: list[httpx.Response] = []

    def ask(email: str) -> None:
        with node.door(node.secret["metrics-key"]) as door:
            answers.append(door.post("/get_varifycode", json={"email": email}))

    def ask_in_prestop() -> None:
        time.sleep(2)
        ask("e@example.com")

    asking = [threading.Thread(target=ask, args=("d@example.com",)), threading.Thread(target=ask_in_prestop)]
    for each in asking:
        each.start()
    code, left = node.stop("api")
    for each in asking:
        each.join(20)
    assert [answer.json()["error"] for answer in answers] == [ErrorCode.TIMEOUT] * 2
    assert (code, left > 0) == (0, True)
    assert not node.probe("api", "readinessProbe")


def test_flower_ends_in_its_time(node: Node) -> None:
    code, left = node.stop("flower")
    assert code in {0, 128 + signal.SIGTERM, -signal.SIGTERM}
    assert left > 0


def test_nothing_loud_was_said(node: Node) -> None:
    for name in OURS:
        assert "Traceback" not in node.log(name)
        for value in (node.secret["redis-password"], *node.secret["api-keys"].split(",")):
            assert value not in node.log(name)


def _oldest(door: httpx.Client, name: str) -> float:
    """The gauge as a scaler finds it: by its name, in the text format, one sample without labels."""
    answer = door.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    [family] = [each for each in text_string_to_metric_families(answer.text) if each.name == name]
    [sample] = family.samples
    assert (family.type, sample.name, sample.labels) == ("gauge", name, {})
    return float(sample.value)
