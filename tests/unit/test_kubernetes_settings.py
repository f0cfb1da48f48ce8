"""`deploy/kubernetes`: containers get valid settings, and secrets come from the operator's Secret."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import manifests
from support.manifests import FOLDER, OVERLAYS, SECRETS, of, rendered, workloads

from producer.settings import PREFIX, Settings, load

OURS = ("workers", "api", "flower")
SECRET = manifests.new_secret()["stringData"]
SETTINGS_ENV = FOLDER / "base" / "settings.env"
# What each of ours is given of the Secret, as files.
GIVEN = {"workers": {"redis-url", "relays"}, "api": {"redis-url", "api-keys"}, "flower": {"redis-url"}}

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@every_overlay
@pytest.mark.parametrize("name", sorted(OURS))
def test_what_a_container_is_told_are_settings_that_are_taken(overlay: str, name: str, tmp_path: Path) -> None:
    manifests.write_secrets(tmp_path, workloads(overlay)[name], SECRET)
    given = {
        key: value.replace(SECRETS, str(tmp_path))
        for key, value in manifests.environment(overlay, name, SECRET).items()
    }
    known = {f"{PREFIX}{setting.upper()}" for setting in Settings.model_fields}
    assert {key.removesuffix("_FILE") for key in given if key.startswith(PREFIX)} <= known
    in_force = load(given, dotenv=None)
    assert in_force.redis_url == SECRET["redis-url"]
    if name == "workers":
        assert [relay.masked() for relay in in_force.relays] == ["smtp://mailpit:1025"]
    if name == "api":
        assert ("metrics", SECRET["metrics-key"]) in in_force.api_keys
        assert in_force.allow_plaintext


def test_the_example_names_a_sender() -> None:
    [settings] = of("production", "ConfigMap").values()
    assert load(settings["data"], dotenv=None).mail_from.name == "Chat"


def test_other_databases_can_be_named() -> None:
    wanted = dict(
        re.findall(rf"^# ({PREFIX}\w+_URL_FILE)={SECRETS}/(\S+)$", SETTINGS_ENV.read_text("utf-8"), re.MULTILINE)
    )
    assert len(wanted) == 3
    for name in OURS:
        [_, optional] = workloads("try")[name].pod["volumes"][0]["projected"]["sources"]
        assert optional["secret"]["optional"] is True
        assert {item["path"] for item in optional["secret"]["items"]} == set(wanted.values())


@every_overlay
def test_a_changed_setting_replaces_the_pods(overlay: str) -> None:
    [settings] = of(overlay, "ConfigMap")
    assert re.fullmatch(r"verifyserver-settings-\w{10}", settings)
    for name in OURS:
        assert workloads(overlay)[name].container["envFrom"] == [{"configMapRef": {"name": settings}}]


@every_overlay
def test_no_secret_is_in_the_tree(overlay: str) -> None:
    assert of(overlay, "Secret") == {}
    for path in (path for path in FOLDER.rglob("*") if path.is_file()):
        text = path.read_text("utf-8")
        assert "secretGenerator" not in text
        assert re.findall(r"://[^\s/$]*@", text) == [], path


@every_overlay
def test_each_container_gets_its_part_of_the_secret(overlay: str) -> None:
    for name, given in GIVEN.items():
        workload = workloads(overlay)[name]
        files = workload.secret_files()
        assert files.keys() == given
        assert all(key == path for key, path in files.items())
        [mount] = [each for each in workload.container["volumeMounts"] if each["name"] == "secrets"]
        assert mount == {"name": "secrets", "mountPath": SECRETS, "readOnly": True}


@every_overlay
def test_each_key_that_is_asked_for_is_made(overlay: str) -> None:
    asked = {
        reference["key"]
        for reference in _dicts(rendered(overlay))
        if reference.get("name") == "verifyserver" and "key" in reference
    }
    asked |= {key for workload in workloads(overlay).values() for key in workload.secret_files()}
    assert asked <= SECRET.keys()
    assert "redis-url" in asked
    assert {"flower", "redis-password"} <= asked


def test_a_new_secret_is_new() -> None:
    other = manifests.new_secret()["stringData"]
    assert other.keys() == SECRET.keys()
    for key in ("redis-url", "redis-password", "api-keys", "metrics-key", "flower"):
        assert other[key] != SECRET[key]


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from _dicts(each)
