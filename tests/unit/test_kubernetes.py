"""`deploy/kubernetes`, rendered by kustomize, fits the schemas of Kubernetes and KEDA, and its parts fit each other."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support import api_process, containers, manifests, worker_process
from support.manifests import FOLDER, NAMESPACE, OVERLAYS, VERSIONS, Workload, of, rendered, selected, workloads

from producer.api.http import OPEN
from producer.setting_types import RELAY_PORTS
from producer.settings import load

OURS = {"workers": "worker", "api": "api", "flower": "flower"}  # and their names in docker-compose.yml
SECRET = manifests.new_secret()["stringData"]

every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@every_overlay
@pytest.mark.parametrize(
    "version", [VERSIONS[0], VERSIONS[-1], *(pytest.param(each, marks=pytest.mark.slow) for each in VERSIONS[1:-1])]
)
def test_each_object_fits_its_schema(overlay: str, version: str) -> None:
    for each in rendered(overlay):
        manifests.validate(each, version)


def test_the_secret_fits_its_schema() -> None:
    manifests.validate(manifests.new_secret())


@pytest.mark.parametrize(
    ("kind", "name", "path"),
    [
        ("Deployment", "workers", "spec template spec containers 0"),
        ("Deployment", "api", "spec template spec containers 0 readinessProbe httpGet"),
        ("Service", "api", "spec ports 0"),
        ("PodDisruptionBudget", "api", "spec"),
        ("NetworkPolicy", "api", "spec ingress 0"),
        ("ScaledObject", "workers", "spec"),
        ("ScaledObject", "workers", "spec triggers 1"),
        ("ScaledObject", "workers", "spec advanced horizontalPodAutoscalerConfig behavior scaleDown"),
        ("TriggerAuthentication", "verifyserver-redis", "spec secretTargetRef 0"),
        ("PodMonitor", "api", "spec podMetricsEndpoints 0"),
    ],
)
def test_validation_refuses_an_unknown_field(kind: str, name: str, path: str) -> None:
    wrong = copy.deepcopy(of("production", kind)[name])
    place: Any = wrong
    for step in path.split():
        place = place[int(step) if step.isdigit() else step]
    place["minReplicas"] = 1
    with pytest.raises(Exception, match="minReplicas"):
        manifests.validate(wrong)


def test_validation_refuses_a_value_of_another_type() -> None:
    wrong = copy.deepcopy(of("production", "ScaledObject")["workers"])
    wrong["spec"]["triggers"][0]["metadata"]["listLength"] = 500
    with pytest.raises(ValueError, match="listLength"):
        manifests.validate(wrong)


def test_kustomize_refuses_an_unknown_field(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "k")
    with (tmp_path / "k/overlays/try/kustomization.yaml").open("a") as file:
        file.write("nosuch: 1\n")
    with pytest.raises(manifests.NotRendered, match="nosuch"):
        manifests.kustomize(tmp_path / "k/overlays/try")


def test_each_file_is_used() -> None:
    named = "".join(path.read_text("utf-8") for path in FOLDER.rglob("kustomization.yaml"))
    for path in FOLDER.rglob("*.yaml"):
        name = path.parent.name if path.name == "kustomization.yaml" else path.name
        assert name in named or path.parent.parent.name == "overlays", path


@every_overlay
def test_selectors_find_pods_and_ports_exist(overlay: str) -> None:
    for name, each in {**of(overlay, "Deployment"), **of(overlay, "StatefulSet")}.items():
        assert [found.name for found in selected(overlay, each["spec"]["selector"]["matchLabels"])] == [name]
    for service in of(overlay, "Service").values():
        [behind] = selected(overlay, service["spec"]["selector"])
        for port in service["spec"]["ports"]:
            assert port["port"] == behind.ports[port["targetPort"]]
    for name, budget in of(overlay, "PodDisruptionBudget").items():
        assert [found.name for found in selected(overlay, budget["spec"]["selector"]["matchLabels"])] == [name]
    for name, monitor in of(overlay, "PodMonitor").items():
        [watched] = selected(overlay, monitor["spec"]["selector"]["matchLabels"])
        assert watched.name == name
        assert {end["port"] for end in monitor["spec"]["podMetricsEndpoints"]} <= watched.ports.keys()


@every_overlay
def test_policies_cover_every_pod_and_name_existing_ports(overlay: str) -> None:
    policies = [each["spec"] for each in of(overlay, "NetworkPolicy").values()]
    guarded = {
        (workload.name, direction)
        for policy in policies
        for workload in selected(overlay, policy["podSelector"]["matchLabels"])
        for direction in policy["policyTypes"]
    }
    assert guarded == {(name, direction) for name in workloads(overlay) for direction in ("Ingress", "Egress")}
    for policy in policies:
        for rule in policy.get("ingress", ()):
            for workload in selected(overlay, policy["podSelector"]["matchLabels"]):
                _named_ports_exist(rule, workload)
        for rule in policy.get("egress", ()):
            for peer in rule.get("to", ()):
                [workload] = selected(overlay, peer["podSelector"]["matchLabels"])
                _named_ports_exist(rule, workload)


@every_overlay
def test_egress_to_any_address(overlay: str) -> None:
    open_to_all: dict[str, set[int]] = {}
    for policy in of(overlay, "NetworkPolicy").values():
        for workload in selected(overlay, policy["spec"]["podSelector"]["matchLabels"]):
            for rule in policy["spec"].get("egress", ()):
                if "to" not in rule:
                    open_to_all.setdefault(workload.name, set()).update(port["port"] for port in rule["ports"])
    assert open_to_all == {
        "workers": {53, 6379, *RELAY_PORTS.values()},
        "api": {53, 6379},
        "flower": {53, 6379},
    }


@every_overlay
@pytest.mark.parametrize("name", ["workers", "api"])
def test_the_grace_period_suffices(overlay: str, name: str) -> None:
    workload = workloads(overlay)[name]
    before = workload.container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    assert before[0] == "sleep"
    own = {"workers": worker_process.STOP_WITHIN, "api": api_process.STOP_WITHIN}[name]
    assert workload.pod["terminationGracePeriodSeconds"] > int(before[1]) + own


@every_overlay
def test_probes_need_no_key_and_use_existing_ports(overlay: str) -> None:
    for name in OURS:
        workload = workloads(overlay)[name]
        kinds = [kind for kind, _ in workload.probes()]
        assert {"startupProbe", "livenessProbe"} <= set(kinds)
        for _, probe in workload.probes():
            assert probe["httpGet"]["port"] in workload.ports
    assert {probe["httpGet"]["path"] for _, probe in workloads(overlay)["api"].probes()} == {"/healthz"}
    assert "/healthz" in OPEN


def test_a_worker_may_wait_for_redis_for_half_an_hour() -> None:
    startup = dict(workloads("production")["workers"].probes())["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 1800


@every_overlay
def test_pods_meet_the_restricted_standard(overlay: str) -> None:
    for workload in workloads(overlay).values():
        pod, container = workload.pod, workload.container
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {key for volume in pod.get("volumes", ()) for key in volume} <= {"name", "projected", "emptyDir"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert "hostPort" not in {key for port in container["ports"] for key in port}
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        if workload.name in OURS:
            assert [step.words for step in containers.stages()[-1] if step.word == "USER"] == [
                [f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"]
            ]


def test_commands_images_and_limits_are_those_of_compose() -> None:
    composed, found = containers.services(), workloads("try")
    for name, there in OURS.items():
        assert found[name].container["args"] == composed[there]["command"]
        assert found[name].container["image"] == composed[there]["image"]
        memory = found[name].container["resources"]["limits"]["memory"]
        assert memory == composed[there]["mem_limit"].replace("m", "Mi")
    assert found["redis"].container["command"] == composed["redis"]["command"]
    for name in ("redis", "mailpit"):
        assert found[name].container["image"] == composed[name]["image"]


def test_the_scaler_watches_the_queue_of_the_settings() -> None:
    scaled = of("production", "ScaledObject")["workers"]["spec"]
    assert scaled["scaleTargetRef"]["name"] in of("production", "Deployment")
    assert "replicas" not in of("production", "Deployment")["workers"]["spec"]  # the scaler's to say
    assert 1 <= scaled["minReplicaCount"] < scaled["maxReplicaCount"]
    length, age = (trigger["metadata"] for trigger in scaled["triggers"])
    defaults = load({}, dotenv=None)
    assert length["listName"] == defaults.queue
    assert f"/{length['databaseIndex']}" == urlsplit(defaults.broker_url).path
    assert float(age["targetValue"]) < defaults.reply_timeout
    url = urlsplit(age["url"])
    service, _, namespace = (url.hostname or "").partition(".")
    found = of("production", "Service")[service]
    assert namespace == found["metadata"]["namespace"] == NAMESPACE
    assert {"name": "http", "port": url.port}.items() <= found["spec"]["ports"][0].items()


def test_the_scaler_has_credentials() -> None:
    scaled = of("production", "ScaledObject")["workers"]["spec"]
    asks = {trigger["type"]: trigger["authenticationRef"]["name"] for trigger in scaled["triggers"]}
    known = of("production", "TriggerAuthentication")
    given = {
        kind: {each["parameter"]: each["key"] for each in known[name]["spec"]["secretTargetRef"]}
        for kind, name in asks.items()
    }
    assert given == {
        "redis": {"address": "redis-address", "password": "redis-password"},
        "metrics-api": {"token": "metrics-key"},
    }
    assert known.keys() == set(asks.values())
    assert SECRET["metrics-key"] in [entry.partition(":")[2] for entry in SECRET["api-keys"].split(",")]


def _named_ports_exist(rule: dict[str, Any], workload: Workload) -> None:
    named = {port["port"] for port in rule["ports"] if isinstance(port["port"], str)}
    assert named <= workload.ports.keys(), workload.name
