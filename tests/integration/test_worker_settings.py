"""How a worker starts: settings from the environment, from files, from the old server's config.json, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from support.caller import address
from support.redis_server import RedisServer
from support.rig import Rig
from support.worker_process import WorkerProcess

HUSH = "hush-hush"


@contextmanager
def starting(settings: dict[str, str]) -> Iterator[WorkerProcess]:
    """A worker that may never be ready."""
    with closing(WorkerProcess(settings)) as worker:
        worker.start(wait=False)
        yield worker


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("VERIFY_RELAYS", f"http://user:{HUSH}@mail", "VERIFY_RELAYS: the value is not allowed"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("VERIFY_CODE_TTL", "abc", "VERIFY_CODE_TTL: 'abc' is not allowed; allowed: whole seconds, 1 to 86400"),
                ("VERIFY_REDIS_URL", f"redis://:{HUSH}@127.0.0.1/5", "VERIFY_REDIS_URL: the value is not allowed"),
                ("VERIFY_CONFIG", "/nowhere/config.json", "VERIFY_CONFIG: '/nowhere/config.json' cannot be used"),
            )
        ),
    ],
)
def test_a_bad_setting_ends_the_worker_at_start_with_one_line(name: str, value: str, says: str) -> None:
    with starting({name: value}) as worker:
        assert worker.wait() != 0
        [line] = worker.log.splitlines()
        assert line.startswith(says)
        assert HUSH not in line


def test_the_old_servers_config_and_another_queue_serve(new_rig: Callable[..., Rig], tmp_path: Path) -> None:
    rig = new_rig(queue="other.queue")
    rig.caller.queue = "other.queue"
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "email": {"user": "code@163.example", "pass": HUSH},
                "mysql": {"host": "127.0.0.1", "port": 3308, "passwd": HUSH},
                "redis": {"host": "127.0.0.1", "port": rig.server.port, "passwd": ""},
            }
        )
    )
    del rig.settings["VERIFY_REDIS_URL"]
    rig.settings["VERIFY_CONFIG"] = str(config)
    rig.add_worker()
    email = address()
    assert rig.caller.ask(email)["error"] == 0
    # The environment's relay wins; From is the config's user.
    [mail] = rig.mails_to(email)
    assert mail.sender == "code@163.example"
    assert HUSH not in rig.worker.log


def test_settings_are_read_once_so_an_edited_dotenv_stops_no_running_worker(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    rig.add_worker()
    (rig.worker.directory / ".env").write_text("VERIFY_CODE_TTL=nonsense\nVERIFY_QUEUE=elsewhere\n")
    rig.server.kill()
    rig.worker.wait_for_log("waiting for Redis")
    rig.server.start()
    assert rig.caller.ask(address())["error"] == 0


def test_settings_that_make_codes_easy_to_guess_are_warned_of_at_start(redis_server: RedisServer) -> None:
    settings = {"VERIFY_REDIS_URL": redis_server.url(), "VERIFY_METRICS_BIND": "127.0.0.1:0"}
    with WorkerProcess(settings | {"VERIFY_CODE_MAX_LENGTH": "6"}) as worker:
        worker.wait_for_log("1 in 400 a day: set VERIFY_CODE_MAX_LENGTH=12 or VERIFY_MAX_SENDS_PER_HOUR=8")


def test_a_refused_redis_login_is_not_reported_as_an_outage(new_redis_server: Callable[..., RedisServer]) -> None:
    server = new_redis_server(password="right")
    with starting({"VERIFY_REDIS_URL": f"redis://:{HUSH}@127.0.0.1:{server.port}"}) as worker:
        worker.wait_for_log(
            "refused the login (WRONGPASS): check user and password in VERIFY_BROKER_URL or VERIFY_REDIS_URL"
        )
        assert "waiting for Redis" not in worker.log
        assert HUSH not in worker.log


def test_a_refused_login_at_the_codes_alone_is_logged(redis_server: RedisServer) -> None:
    codes = redis_server.url(0).replace("://", f"://nobody:{HUSH}@")
    settings = {"VERIFY_REDIS_URL": redis_server.url(), "VERIFY_CODES_URL": codes, "VERIFY_METRICS_BIND": "127.0.0.1:0"}
    with WorkerProcess(settings) as worker:
        worker.wait_for_log("codes database (VERIFY_CODES_URL): Redis refused the login (WRONGPASS)")
        assert HUSH not in worker.log
