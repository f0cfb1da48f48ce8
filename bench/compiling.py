"""The C programs here, compiled when they are first needed."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from producer.errors import VerifyError

HERE: Final = Path(__file__).parent
BUILD: Final = HERE / ".build"  # what is made here and not committed


class CannotCompile(VerifyError):
    """A C program cannot be compiled."""


def compiled(source: Path, *options: str) -> Path:
    """The program of `source`, compiled if this text of it has not been before. Raises `CannotCompile`.

    `options`: of the compiler, after the source.
    """
    text = source.read_bytes() + " ".join(options).encode()
    program = BUILD / f"{source.stem}-{hashlib.sha256(text).hexdigest()[:16]}"
    if program.exists():
        return program
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise CannotCompile(f"{source.name} needs a C compiler, and there is no `cc` (Debian: gcc and libc6-dev)")
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as directory:
        made = Path(directory) / source.stem
        done = subprocess.run(  # noqa: S603 - our own source
            [compiler, "-O2", "-o", str(made), str(source), *options], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CannotCompile(f"{source.name} does not compile:\n{done.stderr}")
        made.replace(program)  # at once, as another run may start it
    return program
