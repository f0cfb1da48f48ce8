"""A release of this repository that can be run: its files, and a Python that has what it needs."""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from support.process import ROOT, Process, own_environment

from bench.compiling import BUILD

LOCK: Final = "requirements.lock"


class CannotRun(Exception):
    """A release cannot be found or installed. The text says why."""


class Release(NamedTuple):
    """What processes of it are started with."""

    name: str  # for people: a tag, or an abbreviated commit
    root: Path
    python: Path

    def environment(self, settings: Mapping[str, str]) -> dict[str, str]:
        """The environment of one of its programs, with these `VERIFY_*` and no others."""
        return {**own_environment(settings), "PYTHONPATH": str(self.root)}

    def run_by(self, process: Process) -> None:
        """Have a process, which is not started yet, run this release."""
        process.command[0] = str(self.python)
        process.environment["PYTHONPATH"] = str(self.root)


def working_tree() -> Release:
    """This checkout, as it is."""
    changed = "" if not _git("status", "--porcelain") else " with changes"
    return Release(_git("describe", "--tags", "--always").decode().strip() + changed, ROOT, Path(sys.executable))


def unpack(commit: str, into: Path) -> Release:
    """Any commit, by a name that git knows, unpacked into an empty directory. Raises `CannotRun`."""
    try:
        found = _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}").decode().strip()
    except subprocess.CalledProcessError:
        raise CannotRun(f"{commit}: no commit or tag of this repository") from None
    with tarfile.open(fileobj=io.BytesIO(_git("archive", "--format=tar", found))) as archive:
        archive.extractall(into, filter="data")
    return Release(_git("describe", "--tags", "--always", found).decode().strip(), into, _python_for(into / LOCK))


def _python_for(lock: Path) -> Path:
    """Our own Python if it has the same packages; else one of its own, installed once for each lock file."""
    text = lock.read_bytes()
    if text == (ROOT / LOCK).read_bytes():
        return Path(sys.executable)
    directory = BUILD / f"release-{hashlib.sha256(text).hexdigest()[:12]}"
    python, made = directory / "bin" / "python", directory / "made"
    if not made.exists():
        sys.stderr.write(f"Installing the old release's {LOCK} into {directory} ...\n")
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(exist_ok=True)
        options = ("-qq", "--disable-pip-version-check", "--require-hashes", "-r")
        for words in (
            (sys.executable, "-m", "venv", directory),
            (python, "-m", "pip", "install", *options, lock),
        ):
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                raise CannotRun(f"the old release cannot be installed:\n{done.stderr[-2000:]}")
        made.touch()
    return python


def _git(*words: str) -> bytes:
    return subprocess.run(("git", "-C", str(ROOT), *words), capture_output=True, check=True).stdout
