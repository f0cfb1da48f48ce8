"""`.env.example` lists every setting with its default; docs/settings.md is written from it."""

from __future__ import annotations

import io
import re
from pathlib import Path

from dotenv import dotenv_values

from producer.settings import PREFIX, Settings, load

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / ".env.example"
NAMES = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {f"{PREFIX}CONFIG"}
# What docker-compose.yml asks for besides; tests/unit/test_compose_file.py holds it to that.
COMPOSE = {
    *("WORKERS", "REDIS_PORT", "FLOWER_USER", "FLOWER_PASSWORD"),
    *("GRAFANA_PASSWORD", "METRICS_KEY"),  # of the profile `observe`
}
# OpenTelemetry's, with the defaults of its specification.
TRACES = {"OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT"}
# Another default holds in compose, so a copy of the file must not set it.
COMMENTED = {f"{PREFIX}RELAYS"}
# The file with that one in force too.
WHOLE = re.sub(r"^# (?=[A-Z_]+=)", "", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
VALUES = dotenv_values(stream=io.StringIO(WHOLE))


def test_it_lists_exactly_the_settings() -> None:
    names = [line.partition("=")[0] for line in WHOLE.splitlines() if line and not line.startswith("#")]
    assert len(names) == len(set(names))
    assert set(names) == NAMES | COMPOSE | TRACES
    assert VALUES.keys() - dotenv_values(EXAMPLE).keys() == COMMENTED


def test_it_holds_the_defaults(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(WHOLE, encoding="utf-8")
    assert load({}, dotenv=tmp_path / ".env") == load({}, dotenv=EXAMPLE) == load({}, dotenv=None)


def test_only_derived_and_secret_values_are_empty() -> None:
    urls, tls = ("CODES_URL", "BROKER_URL", "RESULTS_URL"), ("TLS_CERT", "TLS_KEY", "TLS_CLIENT_CA")
    names = (*urls, *tls, "REDIS_PASSWORD", "API_KEYS", "DEMO_INBOX", "DEMO_FLOWER", "CONFIG")
    derived = {f"{PREFIX}{name}" for name in names}
    given = {"FLOWER_PASSWORD", "GRAFANA_PASSWORD", "METRICS_KEY"}
    assert {name for name, value in VALUES.items() if not value} == derived | given
