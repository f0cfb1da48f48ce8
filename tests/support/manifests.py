"""`deploy/kubernetes` as kustomize renders it, and validation against Kubernetes' schemas."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import kubernetes_validate
import yaml

from support import containers

FOLDER: Final = containers.ROOT / "deploy" / "kubernetes"
OVERLAYS: Final = ("try", "production")
NAMESPACE: Final = "verifyserver"
SECRETS: Final = "/run/secrets/verifyserver"  # where they are in a container
VERSIONS: Final = ("1.29", "1.31", "1.33", "1.35", "1.37")  # Kubernetes'; each is held to its own schemas
# Custom resources: models made of their definitions, by package.
_MODELS: Final = {
    "keda.sh/v1alpha1": "cloudcoil.models.keda.v1alpha1",
    "monitoring.coreos.com/v1": "cloudcoil.models.prometheus_operator.v1",
}

Object = dict[str, Any]


class NotRendered(Exception):
    """kustomize refuses the folder."""


def kustomize(folder: Path) -> str:
    """The objects of `kubectl apply -k folder`, as YAML. Raises `NotRendered` with kustomize's message."""
    command = [str(Path(sys.executable).parent / "kubectl"), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise NotRendered(done.stderr)
    return done.stdout


@cache
def rendered(overlay: str) -> tuple[Object, ...]:
    """An overlay's objects; do not change them."""
    return tuple(yaml.safe_load_all(kustomize(FOLDER / "overlays" / overlay)))


def of(overlay: str, kind: str) -> dict[str, Object]:
    """An overlay's objects of one kind, by name."""
    return {each["metadata"]["name"]: each for each in rendered(overlay) if each["kind"] == kind}


def validate(thing: Mapping[str, Any], version: str = VERSIONS[-1]) -> None:
    """Raises if the object does not fit its schema, or has a field that the schema lacks."""
    if package := _MODELS.get(thing["apiVersion"]):
        # Imported by name: a type checker would read a megabyte of models for it.
        model = getattr(importlib.import_module(package), thing["kind"])
        model.model_validate(thing, strict=True, extra="forbid", by_alias=True, by_name=False)
    else:
        kubernetes_validate.validate(dict(thing), version, strict=True)


class Workload(NamedTuple):
    """An object that creates pods, with its one container."""

    name: str
    labels: dict[str, str]
    pod: Object  # the template's spec
    container: Object

    @property
    def ports(self) -> dict[str, int]:
        """Its ports by name."""
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    def probes(self) -> Iterator[tuple[str, Object]]:
        """Its probes by kind."""
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if kind in self.container:
                yield kind, self.container[kind]

    def secret_files(self) -> dict[str, str]:
        """The keys of the Secret that are mounted and not optional, with their file names."""
        sources = [
            source["secret"]
            for volume in self.pod.get("volumes", ())
            for source in volume.get("projected", {}).get("sources", ())
        ]
        return {item["key"]: item["path"] for each in sources if not each.get("optional") for item in each["items"]}


def workloads(overlay: str) -> dict[str, Workload]:
    """All workloads, by name."""
    found = {}
    for kind in ("Deployment", "StatefulSet"):
        for name, each in of(overlay, kind).items():
            template = each["spec"]["template"]
            [container] = template["spec"]["containers"]
            found[name] = Workload(name, template["metadata"]["labels"], template["spec"], container)
    return found


def selected(overlay: str, selector: Mapping[str, str]) -> list[Workload]:
    """Workloads whose pods have all these labels."""
    return [each for each in workloads(overlay).values() if selector.items() <= each.labels.items()]


def environment(overlay: str, name: str, secret: Mapping[str, str]) -> dict[str, str]:
    """The environment of one of our containers, with the image's own variables."""
    container = workloads(overlay)[name].container
    found = containers.environment()
    for source in container.get("envFrom", ()):
        found |= of(overlay, "ConfigMap")[source["configMapRef"]["name"]].get("data", {})
    for each in container.get("env", ()):
        found[each["name"]] = each["value"] if "value" in each else secret[each["valueFrom"]["secretKeyRef"]["key"]]
    return found


def write_secrets(to: Path, workload: Workload, secret: Mapping[str, str]) -> None:
    """Write the files that its pod mounts from the Secret."""
    to.mkdir(parents=True, exist_ok=True)
    for key, path in workload.secret_files().items():
        (to / path).write_text(secret[key], encoding="utf-8")


def new_secret() -> Object:
    """A Secret made by the overlay `try`."""
    script = FOLDER / "overlays" / "try" / "secret.sh"
    done = subprocess.run(["sh", script], capture_output=True, text=True, timeout=120, check=True)
    made: Object = yaml.safe_load(done.stdout)
    return made
