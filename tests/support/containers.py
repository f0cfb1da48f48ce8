"""`Dockerfile` and `docker-compose.yml` read and run without a container engine."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml
from dotenv import dotenv_values

from support.passwords import ALL
from support.process import HOST, START_TIMEOUT, eventually

ROOT: Final = Path(__file__).parents[2]
COMPOSE: Final = ROOT / "docker-compose.yml"
DOCKERFILE: Final = ROOT / "Dockerfile"
EXAMPLE: Final = ROOT / ".env.example"
HOME: Final = "/opt/verifyserver"  # in the image
PASSWORDS: Final = {"VERIFY_REDIS_PASSWORD": ALL, "FLOWER_PASSWORD": "fl0werPassw0rd"}
_VARIABLE: Final = re.compile(r"\$(?:\$|\{(\w+)(?:(:[-?])([^}]*))?\})")


class VariableMissing(Exception):
    """A required variable of the compose file is missing."""


def compose(given: Mapping[str, str]) -> dict[str, Any]:
    """The compose file with its variables replaced: `${A}`, `${A:-default}`, `${A:?reason}`, and `$$` for a dollar."""
    resolved: dict[str, Any] = _resolve(yaml.safe_load(COMPOSE.read_text("utf-8")), given)
    return resolved


def services(given: Mapping[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Its services; by default with the variables of `.env.example` and the two passwords."""
    found: dict[str, dict[str, Any]] = compose({**example(), **PASSWORDS} if given is None else given)["services"]
    return found


def example() -> dict[str, str]:
    """The variables of `.env.example`."""
    return {name: value or "" for name, value in dotenv_values(EXAMPLE).items()}


def _resolve(value: Any, given: Mapping[str, str]) -> Any:
    match value:
        case str():
            return _VARIABLE.sub(lambda found: _replace(found, given), value)
        case list():
            return [_resolve(each, given) for each in value]
        case dict():
            return {key: _resolve(each, given) for key, each in value.items()}
    return value


def _replace(found: re.Match[str], given: Mapping[str, str]) -> str:
    name, kind, otherwise = found.groups()
    if name is None:
        return "$"
    value = given.get(name, "")
    if not value and kind == ":?":
        raise VariableMissing(f"{name}: {otherwise}")
    return value or (otherwise if kind == ":-" else "")


class Step(NamedTuple):
    """One instruction of a Dockerfile."""

    word: str
    rest: str

    @property
    def words(self) -> list[str]:
        """The instruction's arguments, from its JSON or its shell form."""
        listed: list[str] = json.loads(self.rest) if self.rest.startswith("[") else shlex.split(self.rest)
        return listed


def stages() -> list[list[Step]]:
    """The Dockerfile's instructions by stage; each stage begins with its FROM."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text("utf-8"), flags=re.MULTILINE)
    found: list[list[Step]] = []
    for line in text.replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            found.append([])
        if word:
            found[-1].append(Step(word, " ".join(rest.split())))
    return found


def environment() -> dict[str, str]:
    """The variables that ENV sets in the image."""
    return dict(pair.split("=", 1) for step in stages()[-1] if step.word == "ENV" for pair in step.words)


def copied() -> list[str]:
    """What the Dockerfile copies from the checkout."""
    copies = [step.words for stage in stages() for step in stage if step.word == "COPY"]
    return [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]


def copy(name: str, to: Path) -> None:
    """Copy a file or folder from the checkout, as COPY does with what .dockerignore allows."""
    source, target = ROOT / name, to / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        shutil.copy(source, target)


class Host:
    """This host in place of a container engine: a folder for the image, a process for each container."""

    def __init__(self, folder: Path, here: Sequence[tuple[str, str]]) -> None:
        """`here`: what this host has in place of the containers' names, ports and paths."""
        self.folder = folder
        self.image = folder / "image"
        self.image.mkdir()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._here = [(HOME, str(self.image)), ("0.0.0.0", HOST), *here]  # noqa: S104 - it is replaced

    def localize(self, text: str) -> str:
        """A container's word or setting as it is on this host."""
        for old, new in self._here:
            text = re.sub(rf"(?<!\d){re.escape(old)}(?!\d)", new, text)
        return text

    def spawn(self, name: str, command: Sequence[str], env: Mapping[str, str], cwd: Path | None = None) -> None:
        """Start a container's process; by default one of our image, with its entry point."""
        words = [self.localize(word) for word in command]
        if cwd is None and shutil.which("tini"):
            words = ["tini", "-s", "--", *words]  # -s, as it is not the first process here
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [shutil.which(words[0], path=f"{env['PATH']}:{os.environ['PATH']}") or words[0], *words[1:]],
                cwd=cwd or self.image,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until(self, name: str, ready: Callable[[], bool]) -> None:
        """Wait until it is ready; fail with its log if it ends before."""
        eventually(lambda: ready() or self.ended(name), START_TIMEOUT)
        assert not self.ended(name), self.log(name)

    def ended(self, name: str) -> bool:
        """Whether its process is gone."""
        return self.running[name].poll() is not None

    def terminate(self, name: str, within: float) -> int:
        """Send SIGTERM; its exit code, within so many seconds."""
        process = self.running[name]
        process.send_signal(signal.SIGTERM)
        code = process.wait(within)
        del self.running[name]
        return code

    def log(self, name: str) -> str:
        """Its whole output."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def files(self) -> set[Path]:
        """What is in the image, except its virtual environment."""
        return {path for path in self.image.rglob("*") if not path.is_relative_to(self.image / "venv")}

    def close(self) -> None:
        """End what still runs, children included: tini gives its child a process group of its own."""
        for process in self.running.values():
            for each in Path("/proc").glob("[0-9]*"):
                with suppress(ProcessLookupError):
                    if os.getsid(int(each.name)) == process.pid:
                        os.kill(int(each.name), signal.SIGKILL)
            process.kill()
            process.wait()
