"""`docker-compose.yml`, `Dockerfile`, `.dockerignore` and the lock files agree with each other and the settings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from support import containers
from support.containers import ROOT, VariableMissing, compose, example, services, stages

from bench.containers import images
from producer.settings import PREFIX, Settings, load

OURS = {"worker", "api", "flower"}
MONITORING = {"prometheus", "grafana"}
SECRETS = {"VERIFY_RELAYS": "worker", "VERIFY_API_KEYS": "api"}
# Set by compose and the image: the Redis in it, and where things listen.
FIXED = {"REDIS_URL", "CODES_URL", "BROKER_URL", "RESULTS_URL", "HTTP_BIND", "GRPC_BIND", "METRICS_BIND"}
MARKS = {f"VERIFY_{name.upper()}": f"mark-{name}" for name in Settings.model_fields}


def test_it_is_valid_by_the_compose_specification() -> None:
    schema = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    assert json.loads(schema.read_text("utf-8"))["properties"]["services"]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "--no-cache"]
    done = subprocess.run([*command, containers.COMPOSE], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("missing", ["VERIFY_REDIS_PASSWORD", "FLOWER_PASSWORD"])
def test_without_a_password_nothing_starts(missing: str) -> None:
    with pytest.raises(VariableMissing, match=missing):
        compose({**example(), **containers.PASSWORDS, missing: ""})


def test_every_setting_reaches_the_services_that_use_it() -> None:
    found = services({**containers.PASSWORDS, **MARKS})
    given = {name: found[name]["environment"] for name in OURS}
    for setting, mark in MARKS.items():
        who = {name for name in OURS if given[name].get(setting) == mark}
        if setting.removeprefix(PREFIX) in FIXED or setting == "VERIFY_ALLOW_PLAINTEXT":
            assert who == set(), setting
        elif setting in SECRETS:
            assert who == {SECRETS[setting]}, setting
        else:
            assert who, setting


def test_worker_and_api_get_the_tracing_variables() -> None:
    tracing = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}
    for name, service in services({**tracing, **containers.PASSWORDS}).items():
        given = service.get("environment", {}).items()
        assert tracing.items() <= given if name in {"worker", "api"} else not tracing.items() & given, name


def test_every_variable_is_in_the_example() -> None:
    asked = set(re.findall(r"(?<!\$)\$\{(\w+)", containers.COMPOSE.read_text("utf-8")))
    listed = set(re.findall(r"^(?:# )?([A-Z_]+)=", containers.EXAMPLE.read_text("utf-8"), re.MULTILINE))
    assert asked <= listed
    assert {name for name in listed if not name.startswith(PREFIX)} <= asked


@pytest.mark.parametrize("name", sorted(OURS))
def test_the_example_makes_valid_settings(name: str) -> None:
    given = {**containers.environment(), **services()[name]["environment"]}
    in_force = load(given, dotenv=None)
    assert in_force.redis_password == containers.PASSWORDS["VERIFY_REDIS_PASSWORD"]
    assert in_force.broker_url == f"redis://:{quote(in_force.redis_password, safe='')}@redis:6379/1"
    assert {bind.host for bind in (in_force.http_bind, in_force.grpc_bind, in_force.metrics_bind)} == {"0.0.0.0"}  # noqa: S104
    if name == "worker":
        assert [relay.masked() for relay in in_force.relays] == ["smtp://mailpit:1025"]
    assert in_force.allow_plaintext == (name == "api")


def test_our_services_wait_for_redis_only() -> None:
    found = services()
    for name, service in found.items():
        expected = {"redis": {"condition": "service_healthy"}} if name in OURS else {}
        assert service.get("depends_on", {}) == expected


@pytest.mark.parametrize("name", sorted(services()))
def test_each_service(name: str) -> None:
    service = services()[name]
    assert "container_name" not in service
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}
    assert _seconds(service["healthcheck"]["timeout"]) <= _seconds(service["healthcheck"]["interval"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "mem_limit" in service
    assert re.fullmatch(r"[\w/]+:v?\d+\.\d+[\w.-]*", service["image"])
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_one_service_builds_the_image_and_no_service_pulls_it() -> None:
    found = services()
    assert {name for name in OURS if "build" in found[name]} == {"worker"}
    assert {found[name]["image"] for name in OURS} == {found["worker"]["image"]}
    assert {name for name in OURS if found[name]["pull_policy"] == "never"} == OURS - {"worker"}


def test_there_are_two_workers_unless_the_environment_says_otherwise() -> None:
    given = {**example(), **containers.PASSWORDS}
    assert services({**given, "WORKERS": ""})["worker"]["scale"] == "2"
    assert services({**given, "WORKERS": "5"})["worker"]["scale"] == "5"


def test_the_worker_can_be_scaled() -> None:
    worker = services()["worker"]
    assert "ports" not in worker
    assert "hostname" not in worker
    assert _seconds(worker["stop_grace_period"]) == 20


def test_published_ports() -> None:
    published = {name: service.get("ports") for name, service in services().items()}
    assert published == {
        "redis": ["127.0.0.1:6379:6379"],
        "worker": None,
        "api": ["127.0.0.1:8081:8081", "127.0.0.1:50051:50051"],
        "flower": ["127.0.0.1:5555:5555"],
        "mailpit": ["127.0.0.1:8025:8025"],
        "prometheus": ["127.0.0.1:9090:9090"],
        "grafana": ["127.0.0.1:3000:3000"],
    }


def test_only_our_services_reach_redis() -> None:
    networks = {name: set(service.get("networks", ["default"])) for name, service in services().items()}
    assert {name for name, joined in networks.items() if "redis" in joined} == OURS | {"redis"}
    assert networks["redis"] == {"redis"}
    assert {name for name, joined in networks.items() if "default" in joined} == networks.keys() - {"redis"}
    assert compose({**example(), **containers.PASSWORDS})["networks"].keys() == {"default", "redis"}


def test_without_the_profile_nothing_of_it_is_needed() -> None:
    found = services({**example(), **containers.PASSWORDS, "GRAFANA_PASSWORD": "", "METRICS_KEY": ""})
    assert {name for name, service in found.items() if service.get("profiles") == ["observe"]} == MONITORING
    for name, service in found.items():
        assert name in MONITORING or not MONITORING & service.get("depends_on", {}).keys()


@pytest.mark.parametrize("password", ["", "gr4fanaPassw0rd"])
def test_grafana_does_not_start_with_its_default_password(password: str, tmp_path: Path) -> None:
    grafana = services({**example(), **containers.PASSWORDS, "GRAFANA_PASSWORD": password})["grafana"]
    assert grafana["entrypoint"] == ["/bin/sh", "-c"]
    [script] = grafana["command"]
    run = tmp_path / "run.sh"
    run.write_text("#!/bin/sh\necho it runs\n")
    run.chmod(0o755)
    said = subprocess.run(
        ["/bin/sh", "-c", script.replace("/run.sh", str(run))],
        env=grafana["environment"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (said.returncode == 0, said.stdout) == ((True, "it runs\n") if password else (False, ""))
    assert password or "set GRAFANA_PASSWORD in .env" in said.stderr


def test_files_mounted_for_monitoring_exist_and_are_read_only() -> None:
    for name in MONITORING:
        for volume in services()[name]["volumes"]:
            source, target, *how = volume.split(":")
            if source.startswith("./"):
                assert (ROOT / source).exists(), source
                assert how == ["ro"]
            else:
                assert source in compose({**example(), **containers.PASSWORDS})["volumes"]
                assert not target.startswith("/etc")


def test_no_password_is_in_a_command_line() -> None:
    for service in services().values():
        for password in containers.PASSWORDS.values():
            assert not any(password in word for word in (*service.get("command", ()), *service["healthcheck"]["test"]))


def test_the_image_is_lean_and_not_root() -> None:
    build, end = stages()
    assert build[0].words[0] == end[0].words[0]  # or the environment would not fit its Python
    assert [step.words for step in end if step.word == "USER"] == [["10001:10001"]]
    assert [step.rest for step in end if step.word == "STOPSIGNAL"] == ["SIGTERM"]
    assert [step.words for step in end if step.word == "ENTRYPOINT"] == [["tini", "--"]]
    assert [step for step in end if step.word == "COPY" and "venv" in step.rest] == []
    installs = [step.rest for step in end if step.word == "RUN"]
    assert len(installs) == 1
    assert "pip install" not in installs[0]
    assert "--require-hashes --only-binary :all:" in next(step.rest for step in build if step.word == "RUN")


def test_the_images_own_command_and_check_are_those_of_the_api() -> None:
    end = stages()[-1]
    api = services()["api"]
    assert [step.words for step in end if step.word == "CMD"] == [api["command"]]
    check = next(step.rest for step in end if step.word == "HEALTHCHECK")
    assert json.loads(check.partition(" CMD ")[2]) == api["healthcheck"]["test"][1:]


def test_what_make_containers_imitates_is_what_compose_names() -> None:
    found = images.named()
    assert found[0] == stages()[0][0].words[0]
    assert {images.standin(image) for image in found} == {"python", "redis", "mailpit", "observe"}
    assert all((images.STANDINS / f"{images.standin(image)}.Dockerfile").exists() for image in found)


def test_the_build_context_is_what_the_dockerfile_copies() -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert sorted(rule[1:] for rule in rules if rule.startswith("!")) == sorted(containers.copied())


def test_production_packages_are_those_of_the_tests() -> None:
    production, whole = _pins("requirements.prod.lock"), _pins("requirements.lock")
    assert production.items() <= whole.items()  # versions and hashes


def test_production_has_no_development_packages() -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wanted = [*project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        wanted += extra
    tools = [each for each in project["dependency-groups"]["dev"] if isinstance(each, str)]
    tools += project["dependency-groups"]["demo"]
    production = _pins("requirements.prod.lock")
    assert {_name(each) for each in wanted} <= production.keys()
    assert {_name(each) for each in tools} & production.keys() == set()


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found
    return found[0].lower().replace("_", "-").replace(".", "-")


def _pins(name: str) -> dict[str, tuple[str, frozenset[str]]]:
    text = Path(ROOT / name).read_text("utf-8")
    assert "://" not in text
    pins = re.findall(r"^([\w.-]+)==([^\s;]+)((?:.*\\\n)(?: +--hash=\S+(?: \\)?\n)+)", text, re.MULTILINE)
    return {pin: (version, frozenset(re.findall(r"--hash=(\S+)", rest))) for pin, version, rest in pins}


def _seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text.removesuffix("s"))
