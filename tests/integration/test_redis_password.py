"""`VERIFY_REDIS_PASSWORD` on a real server: any password works as it is, wherever Redis is used, and shows nowhere."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from celery import Celery
from support.api_process import ApiProcess
from support.caller import address
from support.flower_process import FlowerProcess
from support.passwords import ALL, PASSWORDS
from support.process import ROOT, own_environment
from support.redis_server import RedisServer
from support.rig import Rig, code_in

from producer.client import VerificationClient
from producer.settings import load
from worker.celery_side.redis_urls import celery_form, connect


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """Its default user has each of the passwords."""
    with RedisServer(password=PASSWORDS[0]) as server, server.client() as client:
        client.acl_setuser(
            "default", enabled=True, passwords=[f"+{each}" for each in PASSWORDS], keys=["*"], commands=["+@all"]
        )
        yield server


@pytest.mark.parametrize("password", PASSWORDS)
def test_clients_celery_and_the_command_line_connect(password: str, server: RedisServer) -> None:
    settings = load({"VERIFY_REDIS_URL": server.address(), "VERIFY_REDIS_PASSWORD": password}, dotenv=None)
    with VerificationClient(settings) as client:
        assert client.check(address(), "000000").error == 1003
    with connect(settings.codes_url, timeout=60) as redis:
        assert redis.ping()
    broker, results = celery_form(settings.broker_url, login=True), celery_form(settings.results_url, login=False)
    with Celery(broker=broker.url, backend=results.url, set_as_current=False) as app:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=0)
        assert app.backend.client.ping()


def test_every_process_works_with_it_and_shows_it_nowhere(new_redis_server: Callable[..., RedisServer]) -> None:
    rig = Rig(server=new_redis_server(password=ALL))
    rig.settings |= {"VERIFY_REDIS_URL": rig.server.address(), "VERIFY_REDIS_PASSWORD": ALL}
    with rig, ApiProcess(rig.settings) as api:
        rig.add_worker()
        email = address()
        assert api.get_code(email)["error"] == 0
        [mail] = rig.mails_to(email)
        assert api.check(email, code_in(mail))["error"] == 0
        settings = _run(rig, "producer", "settings")
        assert "VERIFY_REDIS_PASSWORD=***" in settings
        shown = [settings, _run(rig, "worker", "erase", email), rig.worker.log, api.log]
        assert _hidden(shown)


@pytest.mark.slow
def test_flower_and_inspect_show_it_nowhere(new_redis_server: Callable[..., RedisServer]) -> None:
    rig = Rig(server=new_redis_server(password=ALL))
    rig.settings |= {"VERIFY_REDIS_URL": rig.server.address(), "VERIFY_REDIS_PASSWORD": ALL}
    with rig:
        rig.add_worker()
        with FlowerProcess(rig.worker.environment) as flower:
            flower.wait_for(lambda: "worker" in flower.get("/workers?json=1"))
            pages = [flower.get(path) for path in ("/workers", "/broker", "/api/workers?refresh=1")]
            assert _hidden([*pages, flower.log, _run(rig, "celery", "-A", "worker.app", "inspect", "stats", "conf")])


def _hidden(texts: list[str]) -> bool:
    """Whether neither the password, nor a part of it, nor its encoded form is in any of these."""
    return not any(part in text for text in texts for part in ("密码", "%E5%AF%86", "\\u5bc6", "%41", "%2541"))


def _run(rig: Rig, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env=own_environment(rig.settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
