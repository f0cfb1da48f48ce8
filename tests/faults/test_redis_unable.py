"""Redis answers but cannot work, or locks the worker out: the worker waits, says so once, and goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import pytest
import redis
from support.caller import Load, address
from support.flower_process import FlowerProcess
from support.process import ROOM, START_TIMEOUT, WAIT_TIMEOUT, eventually
from support.redis_refusals import (
    cut_connections,
    endless_script,
    failed_save,
    full,
    replica,
    replica_without_primary,
    too_few_replicas,
)
from support.rig import NewRig, Rig, operator_app
from support.sentinel_servers import SentinelServers
from support.tcp_proxy import ERROR_REPLY, PASS
from support.worker_process import STOP_WITHIN

from producer.client import VerificationClient
from producer.settings import Settings

AWHILE: Final = 3.0  # seconds: some tries
LONG_ENOUGH: Final = 8.0  # seconds: Celery's periodic checks of a connection come every 5 s
GOES_ON: Final = "can be used again, going on"


@contextmanager
def no_rights(admin: redis.Redis) -> Iterator[None]:
    _command(admin, "ACL", "SETUSER", "worker", "-@all")
    yield
    _command(admin, "ACL", "SETUSER", "worker", "+@all")


@contextmanager
def another_password(admin: redis.Redis) -> Iterator[None]:
    _command(admin, "ACL", "SETUSER", "worker", "<secret", ">other")
    yield
    _command(admin, "ACL", "SETUSER", "worker", ">secret")


@contextmanager
def key_of_another_type(admin: redis.Redis) -> Iterator[None]:
    """Where Celery notes who listens to control commands."""
    admin.delete("_kombu.binding.celery.pidbox")
    admin.set("_kombu.binding.celery.pidbox", "not what it should be")
    yield
    admin.delete("_kombu.binding.celery.pidbox")


Trouble = Callable[[redis.Redis], AbstractContextManager[None]]
TROUBLES: Final[dict[str, Trouble]] = {
    "OOM": full,
    "MISCONF": failed_save,
    "READONLY": replica,
    "MASTERDOWN": replica_without_primary,
    "NOREPLICAS": too_few_replicas,
    "BUSY": endless_script,
    "NOPERM": no_rights,
    "WRONGPASS": another_password,
    "WRONGTYPE": key_of_another_type,
}
NEED_A_CUT: Final = {"WRONGPASS", "WRONGTYPE"}  # nothing happens to the connections that are open


def _command(client: redis.Redis, *words: Any) -> Any:
    return client.execute_command(*words)  # type: ignore[no-untyped-call]


@pytest.fixture
def rig(new_rig: NewRig) -> Rig:
    """Without a worker yet. Workers are a Redis user of their own and connect through a proxy."""
    rig = new_rig(workers=0, redis_proxy=True, log_level="INFO")
    rig.command("ACL", "SETUSER", "worker", "on", ">secret", "~*", "&*", "+@all")
    rig.settings["VERIFY_REDIS_URL"] = rig.redis_proxy.url().replace("://", "://worker:secret@")
    return rig


def _start_worker(rig: Rig) -> None:
    rig.add_worker()
    rig.worker.wait_for_log("connected to Redis at ")


def assert_serves(rig: Rig, ids: list[str], *, kind: str) -> None:
    """Everything works again, and the log has said so in one line each, without a traceback."""
    worker = rig.worker
    assert set(rig.caller.replies(ids)) <= {0, 1}
    with operator_app(rig) as app:
        inspect = app.control.inspect([worker.name], timeout=WAIT_TIMEOUT, limit=1)
        assert inspect.ping() == {worker.name: {"ok": "pong"}}
        assert worker.name in inspect.active()
    before = len(rig.events())
    rig.caller.ask(address())
    eventually(lambda: len(rig.events()) > before)
    assert_said_once(rig, kind)
    rig.audit(twice=ids, heard=False)


def assert_said_once(rig: Rig, kind: str) -> None:
    """One line names what Redis answered."""
    lines = rig.worker.log.splitlines()
    assert len([line for line in lines if "Redis at " in line and f"({kind})" in line]) == 1, rig.worker.log
    assert "Traceback" not in rig.worker.log
    assert len([line for line in lines if '"level": "error"' in line or '"level": "warning"' in line]) <= 8, (
        rig.worker.log
    )


def running(*kinds: str) -> list[Any]:
    """Which trouble, and whether connections are cut; all but `kinds` are slow."""
    pairs = [(kind, cut) for kind in TROUBLES for cut in (False, True) if cut or kind not in NEED_A_CUT]
    return [
        pytest.param(
            *(kind, cut),
            id=f"{kind}-cut" if cut else kind,
            marks=() if cut and kind in kinds else pytest.mark.slow,
        )
        for kind, cut in pairs
    ]


@pytest.mark.parametrize(("kind", "cut"), running("NOREPLICAS"))
def test_a_worker_waits_while_redis_refuses_and_then_goes_on(rig: Rig, kind: str, cut: bool) -> None:
    _start_worker(rig)
    pid = rig.worker.pid
    with Load(rig.caller, a_second=50) as load, rig.server.client(1) as admin:
        eventually(lambda: len(rig.relay.mails) > 20)
        with TROUBLES[kind](admin), client_of(rig) as client:
            if cut:
                rig.redis_proxy.reset()
            rig.worker.wait_for_log(f"({kind})")
            time.sleep(AWHILE if cut else LONG_ENOUGH)
            if kind == "WRONGTYPE":  # nothing of ours is refused: only Celery writes there
                assert rig.caller.ask(address())["error"] == 0
            else:
                assert client.request(address()).error == 1
        rig.worker.wait_for_log(GOES_ON)
    assert_serves(rig, load.ids, kind=kind)
    assert rig.worker.pid == pid


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "OOM" else pytest.mark.slow) for kind in TROUBLES]
)
def test_a_worker_that_starts_while_redis_refuses_serves_later(rig: Rig, kind: str) -> None:
    ids = rig.caller.request_all(*(address() for _ in range(10)))
    with rig.server.client(1) as admin, TROUBLES[kind](admin):
        rig.add_worker(wait=False)
        rig.worker.wait_for_log(f"({kind})", START_TIMEOUT)
        pid = rig.worker.pid
        time.sleep(AWHILE)
    rig.worker.wait_for_log("connected to Redis at ")
    assert_serves(rig, ids, kind=kind)
    assert rig.worker.pid == pid


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "cut"), running())
def test_a_worker_can_be_stopped_while_redis_refuses(rig: Rig, kind: str, cut: bool) -> None:
    _start_worker(rig)
    ids = rig.caller.request_all(*(address() for _ in range(10)))
    rig.caller.replies(ids)
    with rig.server.client(1) as admin, TROUBLES[kind](admin):
        if cut:
            rig.redis_proxy.reset()
        rig.worker.wait_for_log(f"({kind})")
        rig.worker.terminate()
        assert rig.worker.wait(STOP_WITHIN + ROOM) == 0
    assert_said_once(rig, kind)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True], ids=["open", "cut"])
def test_an_error_reply_that_nobody_knows_is_waited_out(rig: Rig, cut: bool) -> None:
    _start_worker(rig)
    with Load(rig.caller, a_second=50) as load:
        eventually(lambda: len(rig.relay.mails) > 20)
        rig.redis_proxy.mode = ERROR_REPLY
        if cut:
            rig.redis_proxy.reset()
        rig.worker.wait_for_log("(XYZ)")
        time.sleep(LONG_ENOUGH)
        rig.redis_proxy.mode = PASS
        rig.worker.wait_for_log(GOES_ON)
    assert_serves(rig, load.ids, kind="XYZ")


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True], ids=["open", "cut"])
@pytest.mark.parametrize("kind", ["OOM", "NOREPLICAS"])  # at MISCONF or READONLY, sentinels name another primary
def test_a_worker_waits_while_the_primary_of_sentinels_refuses(new_rig: NewRig, kind: str, cut: bool) -> None:
    servers = SentinelServers()
    rig = new_rig(sentinels=servers, log_level="INFO", workers=0)
    _start_worker(rig)
    with Load(rig.caller, a_second=50) as load, servers.primary.client(1) as admin:
        eventually(lambda: len(rig.relay.mails) > 20)
        with TROUBLES[kind](admin):
            if cut:
                cut_connections(admin)
            rig.worker.wait_for_log(f"({kind})")
            time.sleep(LONG_ENOUGH)
        rig.worker.wait_for_log(GOES_ON)
    assert_serves(rig, load.ids, kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["OOM", "MISCONF", "READONLY", "NOREPLICAS", "NOPERM"])
def test_flower_stays_up_while_redis_refuses_and_goes_on(rig: Rig, kind: str) -> None:
    _start_worker(rig)
    with FlowerProcess(rig.worker.environment) as flower:
        flower.wait_for(lambda: rig.worker.name in flower.api("/api/workers?refresh=1"))
        with rig.server.client(1) as admin, TROUBLES[kind](admin):
            rig.redis_proxy.reset()
            time.sleep(LONG_ENOUGH)
            assert rig.worker.name in flower.get("/workers")
            flower.get("/broker")
        rig.worker.wait_for_log(GOES_ON)
        request_id = rig.caller.request(address())
        rig.caller.reply(request_id)
        flower.wait_for(lambda: request_id in flower.get("/api/tasks"))
        flower.wait_for(lambda: flower.api("/api/workers?refresh=1").get(rig.worker.name, {}).get("stats"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["OOM", "MISCONF", "READONLY", "NOREPLICAS", "BUSY"])
def test_callers_are_told_while_only_the_codes_database_refuses(new_rig: NewRig, kind: str) -> None:
    rig = new_rig(own=["codes"], log_level="INFO")
    with client_of(rig) as client, rig.servers["codes"].client() as admin:
        assert client.request(address()).error == 0
        with TROUBLES[kind](admin):
            assert client.request(address()).error == 1
            time.sleep(AWHILE)
        eventually(lambda: client.request(address()).error == 0)
    assert rig.worker.alive
    assert "Traceback" not in rig.worker.log


@contextmanager
def client_of(rig: Rig) -> Iterator[VerificationClient]:
    """A caller with the workers' settings."""
    with VerificationClient(Settings(redis_url=rig.settings["VERIFY_REDIS_URL"], reply_timeout=60)) as client:
        yield client
