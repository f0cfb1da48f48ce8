"""Where and with what a run was made: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from bench import server
from demo.processes import CHECKOUT

_OURS: Final = ("celery", "kombu", "redis", "hiredis", "orjson", "uvloop", "grpcio", "protobuf", "uvicorn", "fastapi")


def machine() -> dict[str, Any]:
    """Cores that this process may use, CPU, memory, kernel, where Redis keeps its file, and the load now."""
    cpu = re.search(r"^model name\s*: (.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu[1] if cpu else platform.processor(),
        "memory_gb": round(int(memory[1]) / 2**20, 1) if memory else None,
        "system": f"{platform.system()} {platform.release()}",
        "load_at_start": [round(load, 2) for load in os.getloadavg()],
    }


def versions() -> dict[str, str]:
    """Versions of what VerifyServer runs on; the peers know their own."""
    found = {"python": platform.python_version(), "python build": interpreter()}
    found |= {name: version(name) for name in _OURS}
    # "Redis server v=7.0.15 sha=...": the first words say it.
    store = re.search(r"^(\w+) server v=(\S+)", _said(server.program(), "--version"))
    return found | {"store": f"{store[1]} {store[2]}" if store else "unknown", "cc": _said("cc", "--version")}


def interpreter() -> str:
    """How this interpreter was built: one with PGO and LTO takes a few percent less CPU."""
    words = {name: str(sysconfig.get_config_var(name) or "") for name in ("CONFIG_ARGS", "PY_CORE_CFLAGS", "PY_CFLAGS")}
    options, flags = words.pop("CONFIG_ARGS"), " ".join(words.values())
    just_in_time = getattr(sys, "_jit", None)  # since 3.14
    has = {
        "PGO": "--enable-optimizations" in options or "-fprofile-use" in flags,
        "LTO": bool(re.search(r"--with-lto(?!=no)", options)) or "-flto" in flags,
        "JIT": just_in_time.is_enabled() if just_in_time else "--enable-experimental-jit" in options,
    }
    return ", ".join([platform.python_compiler(), *(name if there else f"no {name}" for name, there in has.items())])


def commit() -> tuple[str, bool]:
    """The short name of what is checked out, and whether files that git knows differ from it."""
    name = _said("git", "rev-parse", "--short", "HEAD")
    return name or "unknown", bool(_said("git", "status", "--porcelain", "--untracked-files=no"))


def _said(*words: str) -> str:
    """The first line that a program prints; empty if it is missing or fails."""
    if shutil.which(words[0]) is None:
        return ""
    done = subprocess.run(words, cwd=CHECKOUT, capture_output=True, text=True, check=False)  # noqa: S603 - named here
    return "" if done.returncode else next(iter(done.stdout.splitlines()), "")


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""
