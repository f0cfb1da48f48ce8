"""Has the report drawn, in an environment of its own: what draws is needed by nothing else here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from bench.compiling import BUILD
from demo.processes import CHECKOUT
from producer.errors import VerifyError

REQUIREMENTS: Final = Path(__file__).parent / "requirements.txt"
_PLACE: Final = BUILD / "report"


class NotDrawn(VerifyError):
    """The report could not be drawn."""


def draw(raw: Path) -> Path:
    """The report on a raw file, beside it. Raises `NotDrawn`."""
    return Path(run(str(environment()), "-m", "bench.report.page", str(raw)).strip())


def environment() -> Path:
    """A Python that has matplotlib, made when it is first needed. Raises `NotDrawn`."""
    python, stamp = _PLACE / "bin" / "python", _PLACE / REQUIREMENTS.name
    if not stamp.exists() or stamp.read_bytes() != REQUIREMENTS.read_bytes():
        sys.stderr.write(f"Installing what bench/report/{REQUIREMENTS.name} names into {_PLACE} ...\n")
        run(sys.executable, "-m", "venv", "--clear", str(_PLACE))
        quiet = ("-qq", "--disable-pip-version-check", "--only-binary", ":all:", "--require-hashes")
        run(str(python), "-m", "pip", "install", *quiet, "-r", str(REQUIREMENTS))
        shutil.copy(REQUIREMENTS, stamp)
    return python


def run(*words: str) -> str:
    """What a program says. Raises `NotDrawn` if it fails."""
    done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    if done.returncode:
        raise NotDrawn(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout
