"""The examples as a reader runs them: copied, built with the lines in their comments, started in a shell."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from support.process import ROOT

EXAMPLES: Final = ROOT / "examples"
BUILD_TIMEOUT: Final = 240.0  # seconds; gRPC's and Beast's headers on a busy core take one minute


def copied(directory: Path) -> Path:
    """A copy of the examples, with the proto file where they look for it."""
    shutil.copytree(EXAMPLES, directory / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "producer/api").mkdir(parents=True)
    shutil.copy(ROOT / "producer/api/message.proto", directory / "producer/api")
    return directory / "examples"


def lines_at_top(source: Path) -> list[str]:
    """The command lines in the comment at the top of a source file."""
    return re.findall(r"(?m)^//   (.+)$", source.read_text("utf-8"))


def fenced(readme: Path, language: str) -> list[str]:
    """The fenced blocks of a language in a README."""
    return re.findall(rf"(?s)```{language}\n(.*?)```", readme.read_text("utf-8"))


def shell(
    command: str, directory: Path, environment: Mapping[str, str] | None = None, *, timeout: float = 120.0
) -> tuple[int, str, str]:
    """The exit status, stdout and stderr of a line; `python` is the tests'."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("VERIFY_", "REDIS_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", command],
        cwd=directory,
        env={**inherited, "PATH": path, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def build(command: str, directory: Path) -> None:
    """Run a line that compiles something."""
    status, _, errors = shell(command, directory, timeout=BUILD_TIMEOUT)
    assert status == 0, errors
