"""Commands of the pages for a container engine or a cluster, which the tests have not: they name what is there."""

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
# The options of each verb that the pages use, by Compose's reference; True: a value follows.
COMPOSE: Final = {
    "up": {"--build": False, "--wait": False, "--no-recreate": False, "--force-recreate": False, "--no-deps": False}
    | {"--scale": True},
    "logs": {"--since": True},
    "ps": {},
    "stop": {},
    "build": {},
}


def told(program: str) -> list[str]:
    """What the pages have to type that begins so, each once."""
    typed = [line for page in pages.PAGES for block in pages.blocks(page) for line in block.commands]
    typed += [line for page in pages.PAGES for line in pages.typed_in_sentences(page)]
    return sorted({line for line in typed if line.startswith(f"{program} ")})


@pytest.mark.parametrize("command", told("docker compose"))
def test_what_is_told_to_compose_is_there(command: str) -> None:
    there = containers.services()
    words = iter(shlex.split(command.removesuffix("&"))[2:])
    verb = next(words)
    if verb == "--profile":
        assert next(words) in {profile for each in there.values() for profile in each.get("profiles", ())}
        verb = next(words)
    if verb == "exec":
        assert next(words) in there
        return
    for word in words:
        if not word.startswith("-"):
            assert word in there
        elif COMPOSE[verb][word]:
            value = next(words)
            assert word != "--scale" or value.partition("=")[0] in there


@pytest.mark.parametrize("command", told("kubectl"))
def test_what_is_told_to_kubectl_is_there(command: str) -> None:
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
            asked = {int(word) for word in words if word.isdecimal()}
            assert asked
            assert asked <= open_ports


def test_a_namespace_is_made() -> None:
    assert kubectl("kubectl create namespace verifyserver", "name") == f"namespace/{NAMESPACE}"


def test_a_secret_is_made_of_a_folder_and_read_again(tmp_path: Path) -> None:
    """The page's table has each key; a file for each makes the Secret; `get` on the page asks for one's value."""
    secret = manifests.new_secret()["stringData"]
    keys = {key for row in pages.rows(KUBERNETES, "Use it") for key in re.findall(r"`([^`]+)`", row[0])}
    assert keys == secret.keys()
    for key in keys:
        (tmp_path / key).write_text(secret[key])
    [command] = told(f"kubectl -n {NAMESPACE} create secret")
    command = command.replace("--from-file=secrets/", f"--from-file={tmp_path}")
    assert kubectl(command, "name") == f"secret/{manifests.new_secret()['metadata']['name']}"
    [path] = {path for page in pages.PAGES for path in re.findall(r'-o "(jsonpath=.+?)"', pages.read(page))}
    got = {key: kubectl(command, path.replace("$1", key)) for key in keys}
    assert {key: base64.b64decode(value).decode() for key, value in got.items()} == secret


def test_all_goes_with_the_namespace() -> None:
    assert {each["metadata"].get("namespace") for each in rendered("try")} == {NAMESPACE}


def kubectl(command: str, output: str) -> str:
    """What it would send to a cluster, in this form."""
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
