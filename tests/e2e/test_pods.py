"""The pods of `deploy/kubernetes/overlays/try`, run as written in a folder with what the Dockerfile copies.

There is no cluster: commands, probes, preStop and the Secret's files are from the manifests; names, ports and paths are
replaced by this host's. Redis and the mail catcher are the tests' own.
"""

from __future__ import annotations

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
from support.manifests import SECRETS, of, workloads
from support.process import START_TIMEOUT, eventually, free_port
from support.redis_server import RedisServer

from demo.catcher import Catcher
from producer.contract import ErrorCode

OURS: Final = ("workers", "api", "flower")
A: Final = "a@example.com"


class Node(containers.Host):
    """This host in place of a cluster's node."""

    def __init__(self, folder: Path, server: RedisServer, relay: str, secret: dict[str, str]) -> None:
        """`secret`: the Secret's content by key; `relay`: the URL of what stands in for Mailpit."""
        self.secret = secret
        self.pods = workloads("try")
        self.ports = {port: free_port() for name in OURS for port in self.pods[name].ports.values()}
        here = [
            ("redis:6379", f"127.0.0.1:{server.port}"),
            (secret["relays"], relay),
            *((str(port), str(free)) for port, free in self.ports.items()),
        ]
        super().__init__(folder, here)
        for name in containers.copied():
            containers.copy(name, self.image)
        (self.image / "venv").symlink_to(sys.prefix)

    def start(self, name: str, *, wait: bool = True) -> None:
        """Run its process, and wait until its startup probe passes."""
        secrets = self.folder / "secrets" / name
        secret = {key: self.localize(value) for key, value in self.secret.items()}
        manifests.write_secrets(secrets, self.pods[name], secret)
        given = manifests.environment("try", name, self.secret)
        env = {key: self.localize(value).replace(SECRETS, str(secrets)) for key, value in given.items()}
        self.spawn(name, self.pods[name].container["args"], env | {"LANG": "C.UTF-8"})
        if wait:
            self.wait_until(name, lambda: self.probe(name, "startupProbe"))

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
        """The port of this host in place of a container's."""
        return self.ports[self.pods[name].ports[port]]

    def api(self, key: str | None = None) -> httpx.Client:
        """A caller of the HTTP API, with a key or without."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        base = f"http://127.0.0.1:{self.port('api', 'http')}"
        return httpx.Client(base_url=base, headers=headers, timeout=60, trust_env=False)

    def stop(self, name: str) -> int:
        """As the kubelet does: preStop, SIGTERM, and the grace period for both. Its exit code."""
        pod = self.pods[name]
        deadline = time.monotonic() + pod.pod["terminationGracePeriodSeconds"]
        if hook := pod.container.get("lifecycle", {}).get("preStop"):
            subprocess.run(hook["exec"]["command"], check=True, timeout=30)
        return self.terminate(name, deadline - time.monotonic())


@pytest.fixture(scope="module")
def catcher() -> Iterator[Catcher]:
    """Stands in for Mailpit."""
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
    """One running pod of each workload of ours."""
    with ExitStack() as stack:
        node = Node(tmp_path_factory.mktemp("node"), server, catcher.url, secret)
        stack.callback(node.close)
        before = node.files()
        for name in OURS:
            node.start(name)
        yield node
        assert node.files() == before  # the root is read-only


def test_a_code_is_requested_mailed_and_checked(node: Node, catcher: Catcher) -> None:
    key = node.secret["api-keys"].split(",")[0].partition(":")[2]
    with node.api(key) as api, node.api() as anonymous:
        assert api.get("/readyz").status_code == 200
        assert anonymous.post("/get_varifycode", json={"email": A}).status_code == 401
        assert api.post("/get_varifycode", json={"email": A}).json() == {"error": 0, "email": A}
        mail = catcher.wait(10)
        assert mail is not None
        [code] = mail.codes(6)
        answer = api.post("/check_varifycode", json={"email": A, "varifycode": code})
        assert answer.json() == {"error": 0, "email": A}


def test_every_probe_passes(node: Node) -> None:
    for name in OURS:
        for kind, _ in node.pods[name].probes():
            assert node.probe(name, kind), (name, kind)


def test_flower_demands_the_secrets_password(node: Node) -> None:
    url = f"http://127.0.0.1:{node.port('flower', 'http')}/workers"
    user, _, password = node.secret["flower"].partition(":")
    assert httpx.get(url, trust_env=False).status_code == 401
    assert httpx.get(url, auth=(user, password), trust_env=False).status_code == 200


@pytest.mark.slow
def test_the_scaler_sees_the_queue_and_its_age(node: Node, server: RedisServer) -> None:
    length, age = (trigger["metadata"] for trigger in of("production", "ScaledObject")["workers"]["spec"]["triggers"])
    broker = redis.Redis(
        "127.0.0.1", server.port, db=int(length["databaseIndex"]), password=node.secret["redis-password"]
    )
    node.stop("workers")
    try:
        with broker, node.api(node.secret["metrics-key"]) as api, node.api() as anonymous:
            eventually(lambda: api.get("/readyz").status_code == 503)
            assert broker.llen(length["listName"]) == 0
            assert _oldest(api, age["valueLocation"]) == 0
            late = api.post("/get_varifycode", json={"email": "b@example.com"}).json()
            assert late["error"] == ErrorCode.TIMEOUT
            assert broker.llen(length["listName"]) == 1
            assert _oldest(api, age["valueLocation"]) > float(age["targetValue"])  # its caller waited for 5 s
            assert anonymous.get("/metrics").status_code == 401
            assert node.probe("api", "readinessProbe")  # without workers the API still answers
    finally:
        node.start("workers")
    with broker:
        eventually(lambda: broker.llen(length["listName"]) == 0)


def test_without_redis_no_probe_fails_that_would_restart_a_pod(node: Node, server: RedisServer) -> None:
    server.kill()
    try:
        with node.api(node.secret["metrics-key"]) as api:
            eventually(lambda: "verify_broker_up 0.0" in api.get("/metrics").text)
            answer = api.post("/get_varifycode", json={"email": "c@example.com"}).json()
            assert answer["error"] == ErrorCode.REDIS_ERR
        for name in ("workers", "api"):
            for kind, _ in node.pods[name].probes():
                assert node.probe(name, kind), (name, kind)
    finally:
        server.start()
    with node.api() as api:
        eventually(lambda: api.get("/readyz").status_code == 200, START_TIMEOUT)


def test_a_worker_that_starts_before_redis_waits_for_it(node: Node, server: RedisServer) -> None:
    node.stop("workers")
    server.kill()
    try:
        node.start("workers", wait=False)
        eventually(lambda: "waiting for Redis" in node.log("workers"), START_TIMEOUT)
        assert not node.probe("workers", "startupProbe")
    finally:
        server.start()
    eventually(lambda: node.probe("workers", "startupProbe"), START_TIMEOUT)
    assert not node.ended("workers")


@pytest.mark.slow
def test_the_api_answers_what_it_accepted_before_it_stops(node: Node) -> None:
    node.stop("workers")
    answers: list[httpx.Response] = []

    def ask(email: str) -> None:
        with node.api(node.secret["metrics-key"]) as api:
            answers.append(api.post("/get_varifycode", json={"email": email}))

    def ask_in_prestop() -> None:
        time.sleep(2)
        ask("e@example.com")

    asking = [threading.Thread(target=ask, args=("d@example.com",)), threading.Thread(target=ask_in_prestop)]
    for each in asking:
        each.start()
    code = node.stop("api")
    for each in asking:
        each.join(20)
    assert [answer.json()["error"] for answer in answers] == [ErrorCode.TIMEOUT] * 2
    assert code == 0
    assert not node.probe("api", "readinessProbe")


def test_flower_stops_within_its_grace_period(node: Node) -> None:
    assert node.stop("flower") in {0, 128 + signal.SIGTERM, -signal.SIGTERM}


def test_no_log_has_a_traceback_or_a_secret(node: Node) -> None:
    for name in OURS:
        assert "Traceback" not in node.log(name)
        keys = (entry.partition(":")[2] for entry in node.secret["api-keys"].split(","))
        for value in (node.secret["redis-password"], *keys):
            assert value not in node.log(name)


def _oldest(api: httpx.Client, name: str) -> float:
    """The gauge as a scaler finds it: by its name, in the text format, one sample without labels."""
    answer = api.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    [family] = [each for each in text_string_to_metric_families(answer.text) if each.name == name]
    [sample] = family.samples
    assert (family.type, sample.name, sample.labels) == ("gauge", name, {})
    return float(sample.value)
