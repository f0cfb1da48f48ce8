"""The demo page in a real browser. Needs Chromium, Node and npm.

`SHOTS=folder` keeps a screenshot of each state; look at them after a change.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis as redis_py
from support.api_process import KEY, KEYS, ApiProcess
from support.redis_server import RedisServer
from support.rig import Rig

from demo.catcher import Catcher
from demo.mailpit_api import Inbox
from producer.store.redis_codes import WRONG

pytestmark = [pytest.mark.tools, pytest.mark.timeout(180)]

BROWSER = Path(__file__).parents[1] / "browser"
BUILD = BROWSER / ".build"
STAGES = ["api", "queue", "worker", "relay", "reply"]
LIGHT, DARK = "rgb(244, 245, 249)", "rgb(12, 14, 20)"  # the page's ground


@pytest.fixture(scope="session")
def driver() -> Path:
    """The script, beside the packages that it needs; one installation for all processes of the tests."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        wanted = (BROWSER / "package.json").read_bytes()
        made = BUILD / "made"  # written last
        if not made.exists() or made.read_bytes() != wanted:
            shutil.copy(BROWSER / "package.json", BUILD)
            command = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
            done = subprocess.run(command, cwd=BUILD, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            made.write_bytes(wanted)
        shutil.copy(BROWSER / "drive.mjs", BUILD)
    return BUILD / "drive.mjs"


@pytest.fixture(scope="module")
def inbox() -> Iterator[Inbox]:
    """The inbox of the catcher that is the relay."""
    with Catcher() as catcher, Inbox(catcher) as inbox:
        yield inbox


@pytest.fixture(scope="module")
def settings(inbox: Inbox) -> dict[str, str]:
    """The settings that turn the demo page on."""
    return {"VERIFY_DEMO": "1", "VERIFY_DEMO_INBOX": inbox.url}


@pytest.fixture(scope="module")
def api(inbox: Inbox, settings: dict[str, str]) -> Iterator[ApiProcess]:
    """An API with a worker."""
    with Rig(relays=inbox.catcher.url, code_length=6) as rig:
        rig.add_worker()
        with ApiProcess({**rig.settings, **settings}) as api:
            yield api
        rig.worker.stop()


def drive(driver: Path, api: ApiProcess, scenario: str, **options: object) -> dict[str, Any]:
    """What the scenario found; the page must not log an error."""
    given = json.dumps({"chromium": shutil.which("chromium"), "shots": os.environ.get("SHOTS", ""), **options})
    done = subprocess.run(
        ["node", driver, f"http://127.0.0.1:{api.http_port}/", scenario, given],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found.pop("troubles") == []
    return found


def states(seen: dict[str, Any]) -> list[str]:
    assert [each["name"] for each in seen["stages"]] == STAGES
    return [each["state"] for each in seen["stages"]]


@pytest.mark.parametrize(("width", "scheme", "lang"), [
    (1280, "light", "en-US"),
    (768, "dark", "zh-CN"),
    (360, "light", "zh-CN"),
    (360, "dark", "en-US"),
])  # fmt: skip
def test_ask_read_the_mail_type_the_code(driver: Path, api: ApiProcess, width: int, scheme: str, lang: str) -> None:
    email = f"a{width}{scheme}{lang[:2]}@example.com"
    found = drive(driver, api, "signup", email=email, width=width, scheme=scheme, lang=lang)
    english = lang == "en-US"
    for state in ("start", "sent", "wrong", "end"):
        assert found[state]["wide"] <= width
        assert found[state]["lang"] == ("en" if english else "zh-CN")
        assert found[state]["ground"] == (LIGHT if scheme == "light" else DARK)
    assert states(found["start"]) == ["ahead"] * 5
    assert states(found["sent"]) == [*["done"] * 4, "good"]
    assert all(each["time"].endswith(" ms" if english else " 毫秒") for each in found["sent"]["stages"])
    assert email in found["sent"]["ask"]
    assert found["sent"]["language"] == ("Your verification code" if english else "验证码")
    assert ("Again in" if english else "秒后重发") in found["cooling"]
    assert ("valid for 9:5" if english else "还剩 9:5") in found["life"] or "10:00" in found["life"]
    assert ("not the code" if english else "不正确") in found["wrong"]["check"]
    assert found["wrong"]["focus"] == "code"
    assert email in found["confirmed"]
    assert found["end"]["focus"] == "confirmed-title"


def test_a_keyboard_is_enough_and_the_focus_is_visible(driver: Path, api: ApiProcess) -> None:
    found = drive(driver, api, "keyboard", email="keys@example.com")
    assert (found["waiting"], found["confirmed"], found["again"]) == ("code", "confirmed-title", "email")
    assert found["row"]
    assert [each for each in found["path"] if not each["outline"]] == []


def test_a_dropped_code_is_not_called_valid_and_full_width_digits_are_digits(driver: Path, api: ApiProcess) -> None:
    found = drive(driver, api, "attempts", email="tries@example.com")
    assert found["tries"] == [1004] * 5 + [1003]
    assert found["dropped"]["life"] == ""
    assert found["dropped"]["ask"] == ""
    assert "no valid code" in found["dropped"]["check"]
    assert not found["wide"].isascii()


def test_a_code_of_twelve_digits_fits_any_width_and_is_accepted(driver: Path, api: ApiProcess) -> None:
    email = "grown@example.com"
    codes = redis_py.Redis.from_url(f"{api.environment['VERIFY_REDIS_URL']}/0")
    codes.set(f"{WRONG}default:{email}", 50_505, ex=60)
    codes.close()
    found = drive(driver, api, "grown", email=email)
    assert len(found["code"]) == 12
    assert max(found["hidden"].values()) <= 0, found["hidden"]


def test_an_invalid_address_is_explained(driver: Path, api: ApiProcess) -> None:
    found = drive(driver, api, "refused", email="not an address")["refused"]
    assert states(found) == ["done", *["skipped"] * 3, "bad"]
    assert "not an email address" in found["ask"]
    assert found["focus"] == "email"


def test_both_languages_have_every_text(driver: Path, api: ApiProcess) -> None:
    found = drive(driver, api, "words")
    assert found["en"] == found["zh"]
    assert {f"{name}:string" for name in found["wanted"]} <= set(found["en"])
    assert found["chinese"] != found["english"]


def test_a_relay_that_is_down(driver: Path, settings: dict[str, str], new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(reply_timeout=3, give_up_after=4, relays="smtp://127.0.0.1:9")
    rig.add_worker()
    with ApiProcess({**rig.settings, **settings}) as api:
        found = drive(driver, api, "late", email="down@example.com")
    assert states(found["late"]) == [*["done"] * 3, "stuck", "stuck"]
    assert "No relay has taken the mail yet" in found["late"]["ask"]
    assert "may still arrive" in found["late"]["ask"]


def test_no_worker(driver: Path, settings: dict[str, str], new_redis_server: Callable[..., RedisServer]) -> None:
    own = {"VERIFY_REDIS_URL": new_redis_server().url(), "VERIFY_REPLY_TIMEOUT": "3"}
    with ApiProcess({**settings, **own}) as api:
        found = drive(driver, api, "stuck", email="alone@example.com")
    assert states(found["stuck"]) == ["done", "stuck", *["ahead"] * 3]
    assert "No worker is running" in found["stuck"]["ask"]
    assert states(found["late"]) == ["done", "stuck", "ahead", "ahead", "stuck"]
    assert "may still arrive" in found["late"]["ask"]


def test_with_keys_the_page_asks_for_one(driver: Path, api: ApiProcess) -> None:
    with ApiProcess({**api.environment, "VERIFY_API_KEYS": KEYS}) as guarded:
        found = drive(driver, guarded, "key", email="key@example.com", key=KEY)
    assert "missing or wrong" in found["wrong"]["key"]
    assert found["wrong"]["focus"] == "key"
    assert "opens with a key" in found["wrong"]["inbox"]
    assert found["code"].isdecimal()
    assert found["metrics"] is False
