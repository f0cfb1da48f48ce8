"""Rules, dashboard and docs/operations.md agree with each other and the settings; see also test_prometheus.py."""

from __future__ import annotations

import re
from typing import Any, Final

import pytest
import yaml
from support import doc_pages as pages
from support.monitoring import OPERATORS, PROMETHEUS, ROOT, Rule, alerts, asked, dashboard, panels, rules

from producer.contract import ErrorCode
from producer.settings import Settings

DEFAULTS: Final = Settings()
PAGE: Final = OPERATORS.read_text("utf-8")
ALERTS: Final = alerts()
UNITS: Final = {"short", "s", "percentunit", "reqps", "ops", "bytes"}
KINDS: Final = {"stat", "timeseries", "heatmap", "state-timeline"}  # Grafana deprecates none of these


def of_alerts(name: str) -> Rule:
    [found] = [rule for rule in ALERTS if rule.name == name]
    return found


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule.name)
def test_an_alert_has_severity_summary_description_and_runbook(rule: Rule) -> None:
    assert rule.labels in ({"severity": "critical"}, {"severity": "warning"})
    assert rule.annotations.keys() == {"summary", "description", "runbook_url"}
    path, _, anchor = rule.annotations["runbook_url"].partition("#")
    assert ROOT / path == OPERATORS
    assert anchor == rule.name.lower()
    said = rule.annotations["summary"] + rule.annotations["description"]
    for label in re.findall(r"\$labels\.(\w+)", said):
        assert label in {name for names in asked(rule.expr).values() for name in names} | {"job", "instance"}


def test_the_page_has_one_section_for_each_alert() -> None:
    sections = re.findall(r"^### (VerifyServer\w+)\n\n\*(\w+)\.\*", PAGE, re.MULTILINE)
    assert dict(sections) == {rule.name: rule.labels["severity"] for rule in ALERTS}
    assert len(sections) == len(ALERTS)


def test_the_page_has_a_row_on_every_reason_of_a_dead_letter() -> None:
    from worker.queue.message import DeadLetterCode  # noqa: PLC0415 - for this test alone

    codes = {row[0].strip("`") for row in pages.rows("docs/operations.md", "Dead letters")}
    assert codes == set(DeadLetterCode)


def test_links_on_the_page_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        path, _, anchor = target.partition("#")
        file = OPERATORS.parent / path if path else OPERATORS
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text("utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, target


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule.name)
def test_rule_tests_see_each_alert_fire_and_be_silent(rule: Rule) -> None:
    fires = silent = 0
    for path in (PROMETHEUS / "tests").glob("*.yml"):
        for case in yaml.safe_load(path.read_text("utf-8"))["tests"]:
            for each in case.get("promql_expr_test", ()):
                if f'"{rule.name}"' in each["expr"]:
                    fires += bool(each["exp_samples"])
                    silent += not each["exp_samples"]
    assert fires
    assert silent


def test_thresholds_follow_the_default_settings() -> None:
    assert of_alerts("VerifyServerRequestsLate").expr.endswith(f"> {DEFAULTS.reply_timeout:g}")
    assert of_alerts("VerifyServerRequestsExpiring").expr.endswith(f"> {DEFAULTS.give_up_after / 2:g}")
    assert f"> {DEFAULTS.max_queue} " in of_alerts("VerifyServerQueueGrowing").expr + " "
    assert of_alerts("VerifyServerQueueNearlyFull").expr.endswith(f"> {DEFAULTS.max_queue * 8 // 10}")
    assert f"> {DEFAULTS.reply_timeout / 2:g}\n" in of_alerts("VerifyServerApiSlow").expr.replace(" and", "\nand")


def test_the_rules_count_as_failures_what_the_table_of_error_codes_calls_one() -> None:
    failures = sorted(int(error) for error in ErrorCode if error.failure)
    workers = sorted([*failures, int(ErrorCode.MAIL_REJECTED)])  # a relay that refuses everything answers 5
    for rule in rules():
        for metric, errors in re.findall(r'(\w+)\{[^}]*error=~"([^"]+)"', rule.expr):
            expected = workers if metric.startswith("verify_worker") else failures
            assert errors == "|".join(map(str, expected)), rule.name


def test_recording_rules_are_used_and_used_ones_exist() -> None:
    recorded = {rule.name for rule in rules() if not rule.alert}
    used = {name for rule in ALERTS for name in asked(rule.expr)}
    used |= {name for panel in panels() for target in panel["targets"] for name in asked(target["expr"])}
    assert {name for name in used if ":" in name} == recorded


def test_figures_of_the_whole_queue_are_never_summed() -> None:
    whole = r"verify_(?:queue_\w+|workers|dead_letters|broker_up)\b"
    for expr in [rule.expr for rule in rules()] + [t["expr"] for panel in panels() for t in panel["targets"]]:
        assert not re.search(rf"\b(?:sum|avg|count)\b[^()]*(?:\([^()]*\))? ?\([^()]*{whole}", expr), expr


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_is_complete(panel: dict[str, Any]) -> None:
    assert panel["type"] in KINDS
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    letters = [target["refId"] for target in panel["targets"]]
    assert letters == sorted(set(letters))
    assert letters
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"]
        known = {label for names in asked(target["expr"]).values() for label in names} | {"job", "instance", "le"}
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= known
        assert set(re.findall(r"\$(\w+)", target["expr"])) <= {"instance", "relay", "__rate_interval"}
    if panel["type"] == "stat":
        assert len(panel["fieldConfig"]["defaults"]["thresholds"]["steps"]) >= 2


def test_panels_have_unique_ids_and_titles_and_do_not_overlap() -> None:
    whole = dashboard()["panels"]
    for key in ("id", "title"):
        found = [panel[key] for panel in whole]
        assert len(found) == len(set(found))
    taken: set[tuple[int, int]] = set()
    for panel in whole:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_dashboard_depends_on_no_installation() -> None:
    found = dashboard()
    assert [each["name"] for each in found["templating"]["list"]] == ["datasource", "instance", "relay"]
    assert found["schemaVersion"] >= 41
    assert "__inputs" not in found
    assert found["refresh"]
    provided = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text("utf-8"))
    scrape = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text("utf-8"))["global"]["scrape_interval"]
    assert provided["datasources"][0]["jsonData"]["timeInterval"] == scrape


def test_rules_refer_to_scraped_jobs() -> None:
    configuration = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text("utf-8"))
    jobs = {job["job_name"] for job in configuration["scrape_configs"]}
    assert jobs == {"verify-worker", "verify-api"}
    exprs = [rule.expr for rule in rules()] + [t["expr"] for panel in panels() for t in panel["targets"]]
    for found in re.findall(r'job=~?"([^"]+)"', " ".join(exprs)):
        assert [job for job in jobs if re.fullmatch(found, job)]
