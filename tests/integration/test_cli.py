"""`python -m producer`, run as a process, or in the test's own where that shows the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from support.api_process import KEY, KEYS
from support.fake_worker import FakeWorker
from support.process import eventually
from support.redis_server import RedisServer
from typer.testing import CliRunner, Result

from producer.cli import app
from producer.contract import ErrorCode
from producer.store.backlog import UNHEALTHY_WORKERS, WORKERS

pytestmark = pytest.mark.usefixtures("redis")  # the shared server is empty at first

A = "a@example.com"
NOBODY = "redis://127.0.0.1:1"
_ROOT = Path(__file__).parents[2]
Done = subprocess.CompletedProcess[str]
Here = Callable[..., Result]


def environment(**settings: str) -> dict[str, str]:
    bare = {name: value for name, value in os.environ.items() if not name.startswith("VERIFY_")}
    return {**bare, "PYTHONPATH": str(_ROOT), "COLUMNS": "200", "NO_COLOR": "1", **settings}


def run(*words: str, directory: Path, program: tuple[str, ...] = ("-m", "producer"), **settings: str) -> Done:
    """`python -m producer ...` in an empty directory, so that no `.env` is read."""
    return subprocess.run(
        [sys.executable, *program, *words],
        cwd=directory,
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    """Runs a command in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("VERIFY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words, **settings: CliRunner().invoke(app, words, env=settings, prog_name="python -m producer")


def test_send_prints_success(redis_server: RedisServer, tmp_path: Path) -> None:
    with FakeWorker(redis_server) as worker:
        words = ("send", A, "--purpose", "login", "--locale", "en", "--client", "me")
        done = run(*words, directory=tmp_path, VERIFY_REDIS_URL=redis_server.url())
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"Success (0)  {A}\n{ErrorCode.SUCCESS.meaning}\n"
    assert worker.taken[0].kwargs == {"email": A, "purpose": "login", "locale": "en", "client": "me"}


def test_send_prints_what_went_wrong(redis_server: RedisServer, here: Here) -> None:
    with FakeWorker(redis_server, error=lambda _: 5):
        done = here("send", A, "--json", VERIFY_REDIS_URL=redis_server.url())
    said = json.loads(done.stdout)
    assert (done.exit_code, done.stderr) == (1, "")
    assert {name: said[name] for name in ("email", "error", "name")} == {"email": A, "error": 5, "name": "MailRejected"}
    assert "refused for good" in said["meaning"]


@pytest.mark.parametrize(
    ("workers", "unhealthy", "why"),
    [
        (0, 0, "No worker is alive on queue 'verification': start one with `celery -A worker.app worker`."),
        (2, 2, "No worker has a healthy relay: check VERIFY_RELAYS and the worker's log."),
        (2, 1, "Waited 0.3 s (VERIFY_REPLY_TIMEOUT) for the reply."),
    ],
)
def test_send_without_a_reply_says_why(
    redis_server: RedisServer, here: Here, workers: int, unhealthy: int, why: str
) -> None:
    with redis_server.client(1) as broker:
        alive_until = time.time() + 600
        for key, count in ((WORKERS, workers), (UNHEALTHY_WORKERS, unhealthy)):
            for name in range(count):
                broker.zadd(f"verification{key}", {str(name): alive_until})
    done = here("send", A, VERIFY_REDIS_URL=redis_server.url(), VERIFY_REPLY_TIMEOUT="0.3")
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0] == f"Timeout (6)  {A}"
    assert [line for line in lines if line.startswith(("No worker", "Waited"))] == [why]


def test_a_refused_redis_login_is_told_apart_from_a_server_that_is_down(
    new_redis_server: Callable[..., RedisServer], here: Here
) -> None:
    url = new_redis_server(password="right").url().replace(":right@", ":wrong@")
    for words in (("send", A), ("check", A, "123456")):
        refused = here(*words, VERIFY_REDIS_URL=url)
        assert "RedisErr (1)" in refused.stdout
        assert "refused the login" in refused.stdout
        assert "wrong" not in refused.stdout + refused.stderr


def test_redis_down_is_reported_with_its_url_without_the_password(tmp_path: Path) -> None:
    done = run("send", A, directory=tmp_path, VERIFY_REDIS_URL="redis://:s3cret@127.0.0.1:1")
    assert (done.returncode, done.stderr) == (1, "")
    assert "RedisErr (1)" in done.stdout
    assert "redis://***@127.0.0.1:1" in done.stdout
    assert "VERIFY_REDIS_URL" in done.stdout
    assert "s3cret" not in done.stdout
    assert "refused the login" not in done.stdout


@pytest.mark.parametrize("email", ["", os.fsdecode(b"[bold]\xff@example.com")])
def test_an_invalid_address_is_reported_without_redis(here: Here, email: str) -> None:
    done = here("send", email, VERIFY_REDIS_URL=NOBODY)
    assert done.exit_code == 1
    assert done.stdout.startswith("InvalidAddress (3)")


def test_check_consumes_the_right_code_and_never_prints_it(
    redis: redis_py.Redis, redis_server: RedisServer, here: Here
) -> None:
    redis.set("code_" + A, "864209", ex=60)
    expected = [("000000", 1, "VarifyCodeErr", 1004), ("864209", 0, "Success", 0), ("864209", 1, "VarifyExpired", 1003)]
    for code, status, name, error in expected:
        done = here("check", A, code, VERIFY_REDIS_URL=redis_server.url())
        assert done.exit_code == status
        assert f"{name} ({error})" in done.stdout
        assert "864209" not in done.stdout + done.stderr


def test_settings_shows_what_is_in_force_without_secrets(here: Here) -> None:
    given: dict[str, Any] = {"VERIFY_REDIS_URL": "redis://u:s3cret@h", "VERIFY_QUEUE": "q2", "VERIFY_API_KEYS": KEYS}
    plain = here("settings", **given)
    as_json = here("settings", "--json", **given)
    assert plain.exit_code == as_json.exit_code == 0
    assert "VERIFY_QUEUE=q2\n" in plain.stdout
    shown = json.loads(as_json.stdout)
    assert dict(line.split("=", 1) for line in plain.stdout.splitlines()) == shown
    assert shown["VERIFY_CODES_URL"] == "redis://***@h/0"
    assert not any(secret in plain.stdout + as_json.stdout for secret in ("s3cret", KEY))


@pytest.mark.parametrize(
    "words", [("send", A), pytest.param(("settings",), marks=pytest.mark.slow)], ids=lambda words: words[0]
)
def test_a_bad_setting_is_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run(*words, directory=tmp_path, VERIFY_CODE_TTL="soon")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "VERIFY_CODE_TTL: 'soon' is not allowed; allowed: whole seconds, 1 to 86400\n"


@pytest.mark.parametrize(
    "words", [("send",), ("send", A, "--purpose", "Not One"), ("send", A, "--client", "c" * 65), ("dance",)]
)
def test_wrong_usage_is_status_2(here: Here, words: tuple[str, ...]) -> None:
    done = here(*words, VERIFY_REDIS_URL=NOBODY)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Usage: python -m producer" in done.stderr


@pytest.mark.parametrize("words", [("--help",), ("send", "--help")])
def test_help_names_settings_codes_and_exit_status(here: Here, words: tuple[str, ...]) -> None:
    done = here(*words, VERIFY_CODE_TTL="soon")
    assert done.exit_code == 0
    for word in ("VERIFY_REDIS_URL", "Exit status", "MailRejected", "VarifyExpired", "settings"):
        assert word in done.stdout


def test_ctrl_c_is_quiet(redis_server: RedisServer, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "producer", "send", A],
        cwd=tmp_path,
        env=environment(VERIFY_REDIS_URL=redis_server.url(), VERIFY_REPLY_TIMEOUT="60"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with redis_server.client(1) as broker:
        eventually(lambda: broker.llen("verification"))
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130


@pytest.mark.parametrize("missing", ["typer", pytest.param("rich", marks=pytest.mark.slow)])
def test_a_missing_extra_is_named(tmp_path: Path, missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; from producer.__main__ import main; main()"
    done = run(directory=tmp_path, program=("-c", program))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"The command line needs {missing}: pip install 'verifyserver[cli]'\n"
