"""`.env.example` and the README list every setting, with the default that is in force."""

from __future__ import annotations

import re
from pathlib import Path

from dotenv import dotenv_values

from producer.settings import PREFIX, Settings, load

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / ".env.example"
NAMES = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {f"{PREFIX}CONFIG"}


def test_it_lists_exactly_the_settings() -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    names = [line.partition("=")[0] for line in lines if line and not line.startswith("#")]
    assert len(names) == len(set(names))
    assert set(names) == NAMES


def test_it_holds_the_defaults() -> None:
    assert load({}, dotenv=EXAMPLE) == load({}, dotenv=None)


def test_each_value_is_said_and_not_left_to_the_default() -> None:
    derived = {f"{PREFIX}{name}" for name in ("CODES_URL", "BROKER_URL", "RESULTS_URL", "API_KEYS", "CONFIG")}
    assert {name for name, value in dotenv_values(EXAMPLE).items() if not value} == derived


def test_the_readme_lists_them_with_the_same_defaults() -> None:
    rows = re.findall(
        r"^\| `(VERIFY_\w+)` \| (?:`(.*?)`|.*?) \|", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE
    )
    assert {name for name, _ in rows} == NAMES
    example = dotenv_values(EXAMPLE)
    assert {name: default for name, default in rows if default} == {k: v for k, v in example.items() if v}
