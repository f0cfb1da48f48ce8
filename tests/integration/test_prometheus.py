"""promtool on the shipped files, and a Prometheus that runs them against a real worker and a real API."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx
import pytest
import yaml
from support import containers
from support.api_process import KEY, KEYS, WITH_KEY, ApiProcess
from support.caller import address, message
from support.monitoring import PROMETHEUS, RULES, names_in, queries, rules
from support.process import eventually, free_port
from support.prometheus_process import PrometheusProcess
from support.rig import Rig
from support.smtp_server import ScriptedServer, running

pytestmark = pytest.mark.tools

# These have no data on a healthy system: ratios of nothing, and what takes a fault or many minutes.
MAY_BE_EMPTY: Final = re.compile(r"ALERTS|\) > 0$|offset|predict_linear")


def promtool(*words: str) -> str:
    """Run it in `deploy/prometheus`; its output, if it found no error."""
    assert shutil.which("promtool"), "Debian's package prometheus is not installed"
    done = subprocess.run(["promtool", *words], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    said = promtool("check", "config", "prometheus.yml") + promtool("check", "rules", *RULES)
    assert f"{len([rule for rule in rules() if rule.alert])} rules found" in said


@pytest.mark.parametrize("path", sorted((PROMETHEUS / "tests").glob("*.yml")), ids=lambda path: path.stem)
def test_the_rule_tests_pass(path: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", f"tests/{path.name}")


def test_promtool_accepts_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    made = [{"record": f"panel:{i}", "expr": expr} for i, expr in enumerate(queries().values())]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": made}]}))
    assert f"{len(made)} rules found" in promtool("check", "rules", str(tmp_path / "panels.yml"))


def targets(rig: Rig, api: ApiProcess) -> dict[str, list[str]]:
    """What Prometheus scrapes."""
    return {
        "verify-worker": [urlsplit(rig.worker.metrics_url).netloc],
        "verify-api": [f"127.0.0.1:{api.http_port}"],
    }


def scraped_again(prometheus: PrometheusProcess) -> Callable[[], bool]:
    """A condition: all targets have been scraped again."""
    expr = "min(timestamp(verify_broker_up))"
    before = prometheus.instant(expr)
    return lambda: prometheus.instant(expr) > before


def _get_code(api: ApiProcess) -> int:
    answer = api.post("/get_varifycode", {"email": address()}, headers=WITH_KEY)
    return int(answer["error"])


@pytest.fixture(scope="module")
def watched() -> Iterator[tuple[Rig, ApiProcess, PrometheusProcess]]:
    """A worker, an API with keys, and a Prometheus that has one; after some requests and scrapes."""
    with ExitStack() as stack:
        rig = stack.enter_context(Rig(api_keys=f"other:123456789abcdefg,{KEYS}"))
        rig.add_worker()
        api = stack.enter_context(ApiProcess(rig.settings))
        prometheus = stack.enter_context(PrometheusProcess(targets(rig, api), key=KEY))
        eventually(lambda: len(prometheus.instant("verify_broker_up")) == 2)
        for _ in range(4):  # spread over scrapes, so that counters are seen to rise
            assert api.call(address(), key=KEY).error == 0
            assert _get_code(api) == 0
            assert api.http.post("/get_varifycode", json={}).status_code == 401
            eventually(scraped_again(prometheus))
        rig.broker.lpush("verification", "not JSON")
        eventually(lambda: [value for _, value in prometheus.instant("verify:dead_letters:max")] == [1])
        yield rig, api, prometheus


@pytest.mark.parametrize(("where", "expr"), queries().items(), ids=list(queries()))
def test_an_expression_is_evaluated_and_has_data(
    where: str, expr: str, watched: tuple[Rig, ApiProcess, PrometheusProcess]
) -> None:
    _, _, prometheus = watched
    found = prometheus.instant(expr)
    # An alert has data only while it fires; the metrics in its expression must exist.
    if where.startswith("rule ") and {rule.name: rule.alert for rule in rules()}[where.removeprefix("rule ")]:
        for name in names_in(expr) - {"ALERTS"}:
            assert prometheus.instant(name), f"{where}: no {name}"
    elif not MAY_BE_EMPTY.search(expr):
        assert found, where


def test_rules_are_evaluated_without_errors(watched: tuple[Rig, ApiProcess, PrometheusProcess]) -> None:
    _, _, prometheus = watched
    found = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert len(found) == len(rules())
    assert [rule for rule in found if rule["health"] != "ok"] == []


def test_an_api_with_keys_is_scraped_with_one(watched: tuple[Rig, ApiProcess, PrometheusProcess]) -> None:
    _, api, prometheus = watched
    assert api.http.get("/metrics").status_code == 401
    assert {labels["job"] for labels, value in prometheus.instant("up") if value} == {"verify-worker", "verify-api"}


def test_prometheus_stores_no_mail_address(watched: tuple[Rig, ApiProcess, PrometheusProcess]) -> None:
    rig, _, prometheus = watched
    kept = str(prometheus.instant('{__name__=~".+"}'))
    assert f"smtp://127.0.0.1:{rig.relay.port}" in kept
    assert "@" not in kept


def test_alerts_fire_without_a_relay_and_without_a_worker(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    port = free_port()
    rig.settings["VERIFY_RELAYS"] = f"smtp://127.0.0.1:{port}"
    rig.add_worker()
    unhealthy = {"VerifyServerAllRelaysUnhealthy", "VerifyServerRelayUnhealthy"}
    with ApiProcess(rig.settings) as api, PrometheusProcess(targets(rig, api), at_once=True) as prometheus:
        # This API has no keys, and ignores the empty one that Prometheus sends.
        with running(ScriptedServer(), port):
            assert api.get_code(address())["error"] == 0
            eventually(lambda: len(prometheus.instant("verify_broker_up")) == 2)
            eventually(scraped_again(prometheus))
            # The first scrapes come one by one, and until the last the rules see only a part.
            eventually(lambda: prometheus.firing() == set())
        rig.caller.push(message({"email": address()}))
        eventually(lambda: unhealthy <= prometheus.firing())
        with running(ScriptedServer(), port):
            eventually(lambda: not unhealthy & prometheus.firing())
            rig.worker.kill()
            eventually(lambda: {"VerifyServerNoWorker", "VerifyServerTargetDown"} <= prometheus.firing())
            assert not unhealthy & prometheus.firing()


def test_the_containers_command_starts_it(tmp_path: Path) -> None:
    service = containers.services({**containers.example(), **containers.PASSWORDS, "METRICS_KEY": KEY})["prometheus"]
    assert service["entrypoint"] == ["/bin/sh", "-c"]
    [script] = service["command"]
    port, data = free_port(), tmp_path / "data"
    program = shutil.which("prometheus")
    assert program
    for old, new in (
        ("/etc/verifyserver", str(PROMETHEUS)),
        ("/tmp/config", str(tmp_path / "config")),  # noqa: S108 - it is replaced
        ("path=/prometheus", f"path={data} --web.listen-address=127.0.0.1:{port}"),
        ("/bin/prometheus", program),
    ):
        assert old in script
        script = script.replace(old, new)
    with (tmp_path / "log").open("wb") as log, ExitStack() as stack:
        process = subprocess.Popen(["/bin/sh", "-c", script], env=service["environment"], stdout=log, stderr=log)
        stack.callback(process.wait)
        stack.callback(process.kill)

        def answers() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                return httpx.get(f"http://127.0.0.1:{port}/-/ready", trust_env=False).status_code == 200
            except httpx.TransportError:
                return False

        eventually(answers)
        assert (tmp_path / "config" / "api.key").read_text() == KEY
        assert (tmp_path / "config" / "api.key").stat().st_mode & 0o077 == 0
        found = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules", trust_env=False).json()["data"]["groups"]
        assert sum(len(group["rules"]) for group in found) == len(rules())
