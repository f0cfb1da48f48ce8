"""The docs' commands for a container engine or a cluster, which no test has, name services and objects that exist."""

from __future__ import annotations

import base64
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest
from support import containers, manifests
from support import doc_pages as pages
from support.manifests import NAMESPACE, of, rendered

KUBERNETES: Final = "docs/kubernetes.md"
# The options of each verb that the docs use, by Compose's reference; True: a value follows.
COMPOSE: Final = {
    "up": {"--build": False, "--wait": False, "--no-recreate": False, "--force-recreate": False, "--no-deps": False}
    | {"--scale": True},
    "logs": {"--since": True},
    "ps": {},
    "stop": {},
    "build": {},
}


def commands(program: str) -> list[str]:
    """The docs' commands that begin with this program."""
    typed = [line for page in pages.PAGES for block in pages.blocks(page) for line in block.commands]
    typed += [line for page in pages.PAGES for line in pages.typed_in_sentences(page)]
    return sorted({line for line in typed if line.startswith(f"{program} ")})


@pytest.mark.parametrize("command", commands("docker compose"))
def test_a_compose_command_names_what_is_there(command: str) -> None:
    services = containers.services()
    words = iter(shlex.split(command.removesuffix("&"))[2:])
    verb = next(words)
    if verb == "--profile":
        assert next(words) in {profile for each in services.values() for profile in each.get("profiles", ())}
        verb = next(words)
    if verb == "exec":
        assert next(words) in services
        return
    for word in words:
        if not word.startswith("-"):
            assert word in services
        elif COMPOSE[verb][word]:
            value = next(words)
            assert word != "--scale" or value.partition("=")[0] in services


@pytest.mark.parametrize("command", commands("kubectl"))
def test_a_kubectl_command_names_what_is_there(command: str) -> None:
    words = shlex.split(command)
    for option, value in pairwise(words):
        if option == "-k":
            assert (containers.ROOT / value / "kustomization.yaml").is_file()
        if option in {"-n", "namespace"}:
            assert value == NAMESPACE
    for kind, name in re.findall(r"(\w+)/(\w+)(?= |$)", command):
        if kind == "deployment":
            assert name in of("try", "Deployment")
        elif kind == "svc":
            open_ports = {port["port"] for port in of("try", "Service")[name]["spec"]["ports"]}
            forwarded = {int(word) for word in words if word.isdecimal()}
            assert forwarded
            assert forwarded <= open_ports


def test_the_namespace_is_created() -> None:
    assert kubectl("kubectl create namespace verifyserver", "name") == f"namespace/{NAMESPACE}"


def test_a_secret_is_created_from_a_folder_and_read_again(tmp_path: Path) -> None:
    """The page lists every key; a file for each makes the Secret; the page's `get` reads one."""
    secret = manifests.new_secret()["stringData"]
    keys = {key for row in pages.rows(KUBERNETES, "Use it") for key in re.findall(r"`([^`]+)`", row[0])}
    assert keys == secret.keys()
    for key in keys:
        (tmp_path / key).write_text(secret[key])
    [command] = commands(f"kubectl -n {NAMESPACE} create secret")
    command = command.replace("--from-file=secrets/", f"--from-file={tmp_path}")
    assert kubectl(command, "name") == f"secret/{manifests.new_secret()['metadata']['name']}"
    [path] = {path for page in pages.PAGES for path in re.findall(r'-o "(jsonpath=.+?)"', pages.read(page))}
    got = {key: kubectl(command, path.replace("$1", key)) for key in keys}
    assert {key: base64.b64decode(value).decode() for key, value in got.items()} == secret


def test_deleting_the_namespace_deletes_everything() -> None:
    assert {each["metadata"].get("namespace") for each in rendered("try")} == {NAMESPACE}


def kubectl(command: str, output: str) -> str:
    """What the command would send to a cluster."""
    program = str(Path(sys.executable).parent / "kubectl")
    done = subprocess.run(
        [program, *shlex.split(command)[1:], "--dry-run=client", "-o", output],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
