"""All three databases behind sentinels: every part of the system works as it does without, and shows no password."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Final
from urllib.parse import quote

import pytest
from celery import Celery
from support.api_process import ApiProcess
from support.caller import QUEUE
from support.flower_process import FlowerProcess
from support.process import ROOT, eventually
from support.rig import code_in
from support.sentinel_servers import SERVICE, SentinelServers, role
from support.smtp_server import ScriptedServer, running
from support.worker_process import WorkerProcess

from producer.aio import AsyncVerificationClient
from producer.client import VerificationClient
from producer.settings import Settings, load

PASSWORD: Final = "hush:hush@1"
SENTINELS_PASSWORD: Final = "hush/hush?2"


class Everything:
    """Servers, sentinels, a relay and a worker."""

    def __init__(self, watched: SentinelServers, relay: ScriptedServer, worker: WorkerProcess) -> None:
        self.watched, self.relay, self.worker = watched, relay, worker
        given = {name: value for name, value in worker.environment.items() if name.startswith("VERIFY_")}
        self.settings: Settings = load(given, dotenv=None)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one of our commands."""
        command = [sys.executable, "-m", *words]
        return subprocess.run(
            command, env=self.worker.environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )


@pytest.fixture(scope="module")
def everything() -> Iterator[Everything]:
    # No server dies here, and a busy machine must not look as if one did.
    watched = SentinelServers(password=PASSWORD, sentinel_password=SENTINELS_PASSWORD, down_after=30)
    with watched, running(ScriptedServer()) as relay:
        settings = {
            "VERIFY_REDIS_URL": watched.url().replace(quote(PASSWORD, safe=""), "the-setting-wins"),
            "VERIFY_REDIS_PASSWORD": PASSWORD,
            "VERIFY_RELAYS": f"smtp://127.0.0.1:{relay.port}",
            "VERIFY_LOCALE": "en",
            "VERIFY_METRICS_BIND": "127.0.0.1:0",
        }
        with WorkerProcess(settings) as worker:
            yield Everything(watched, relay, worker)


def test_both_clients_ask_and_check(everything: Everything) -> None:
    with VerificationClient(everything.settings) as client:
        assert client.request("blocking@example.com").error == 0
        code = code_in(next(mail for mail in everything.relay.mails if mail.recipient == "blocking@example.com"))
        assert client.check("blocking@example.com", code).error == 0

    async def ask() -> int:
        async with AsyncVerificationClient(everything.settings) as client:
            return (await client.request("asyncio@example.com")).error

    assert asyncio.run(ask()) == 0


def test_http_and_grpc_serve(everything: Everything) -> None:
    environment = {k: v for k, v in everything.worker.environment.items() if k.startswith("VERIFY_")}
    with ApiProcess(environment) as api:
        assert api.get_code("http@example.com")["error"] == 0
        assert api.call("grpc@example.com").error == 0
        assert api.http.get("/readyz").status_code == 200
        assert api.metric("verify_broker_up") == 1
        assert "hush" not in api.log


@pytest.mark.slow
def test_the_command_lines_work_and_show_no_password(everything: Everything) -> None:
    sent = everything.run("producer", "send", "cli@example.com")
    assert (sent.returncode, sent.stderr) == (0, "")
    shown = everything.run("producer", "settings", "--json")
    url = json.loads(shown.stdout)["VERIFY_BROKER_URL"]
    hosts = r"(127\.0\.0\.1:\d+,?){3}"
    assert re.fullmatch(rf"redis\+sentinel://\*\*\*@{hosts}/{SERVICE}/1\?sentinel_password=\*\*\*", url)
    with everything.watched.client(1) as broker:
        broker.lpush(QUEUE, "poison")
    with everything.watched.client(1) as broker:
        eventually(lambda: broker.llen("verification.dead"))
    listed = everything.run("worker", "dead", "list", "--json")
    [name] = [json.loads(line)["name"] for line in listed.stdout.splitlines()]
    dropped = everything.run("worker", "dead", "drop", name)
    assert dropped.stdout == f"{name}: dropped\n"
    assert "hush" not in "".join(each.stdout + each.stderr for each in (sent, shown, listed, dropped))


def test_flower_and_celery_see_worker_and_queue_and_show_no_password(everything: Everything) -> None:
    worker = everything.worker
    with FlowerProcess(worker.environment) as flower:
        eventually(lambda: "active_queues" in flower.api("/api/workers").get(worker.name, {}))
        with everything.watched.client(1) as broker:
            broker.lpush("other", "a", "b")
            queues = flower.api("/api/queues/length")["active_queues"]
            broker.delete("other")
        assert queues == [{"name": QUEUE, "messages": 0}]
        pages = [flower.get(path) for path in ("/", "/broker", f"/worker/{worker.name}", "/workers")]
        report = everything.run("celery", "-A", "worker.app", "report")
        assert "sentinel" in report.stdout
        inspected = everything.run("celery", "-A", "worker.app", "inspect", "conf", "-d", worker.name)
        assert inspected.returncode == 0, inspected.stderr
        said = [*pages, flower.log, worker.log, report.stdout, report.stderr, inspected.stdout]
    for secret in ("hush", "aHVzaA"):
        assert not [each for each in said if secret in each]


def test_any_celery_asks_through_the_sentinels_and_reads_its_reply(everything: Everything) -> None:
    """As docs/high-availability.md says for callers with their own Celery."""
    hosts = [f"127.0.0.1:{sentinel.port}" for sentinel in everything.watched.sentinels]
    who = ":hush%3Ahush%401@"
    app = Celery(
        "stock",
        broker=";".join(f"sentinel://{who}{host}/1" for host in hosts),
        backend=";".join(f"sentinel://{who}{host}/2" for host in hosts),
        set_as_current=False,
    )
    options = {"master_name": SERVICE, "sentinel_kwargs": {"password": SENTINELS_PASSWORD}}
    app.conf.update(broker_transport_options=options, result_backend_transport_options=options)
    app.conf.update(task_create_missing_queues=True)
    with app:
        sent = app.send_task("verification.send_code", kwargs={"email": "celery@example.com"}, queue=QUEUE)
        assert sent.get(timeout=60) == {"email": "celery@example.com", "error": 0}


def test_a_planned_failover_interrupts_for_seconds_only(everything: Everything) -> None:
    watched = everything.watched
    old = watched.primary
    with VerificationClient(everything.settings) as client:
        assert client.request("before@example.com").error == 0
        # Valkey's sentinels can coordinate a failover; Redis' only promote the replica.
        with old.client() as server:
            valkey = "valkey_version" in server.info("server")
        watched.fail_over(*(["COORDINATED"] if valkey else []))
        eventually(lambda: role(old) == "slave")
        eventually(lambda: client.request("after@example.com").error == 0)
    answered = everything.run("celery", "-A", "worker.app", "inspect", "ping", "-d", everything.worker.name)
    assert "pong" in answered.stdout, answered.stderr
    assert everything.worker.alive


def test_the_worker_stops_cleanly(everything: Everything) -> None:
    assert everything.worker.stop() == 0
    log = everything.worker.log
    assert not [
        sign for sign in ("AttributeError", "unexpected error", "never retrieved", "Unrecoverable") if sign in log
    ]
