"""The wheel is the callers' library: it has the clients and the API, not the worker or Celery's settings."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "producer", "worker", "celeryconfig.py")
TIMEOUT = 280  # seconds


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout, as a build machine does."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, checkout)
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "dist"],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    [wheel] = (checkout / "dist").glob("*.whl")
    return wheel


def test_the_wheel_holds_the_producer_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"producer"}
    in_checkout = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "producer").rglob("*")
        if path.suffix in {".py", ".lua", ".typed"} or path.name == "py.typed"
    }
    page = ROOT / "producer" / "api" / "demo" / "page"
    in_checkout |= {path.relative_to(ROOT).as_posix() for path in page.iterdir()}
    assert "producer/api/demo/page/index.html" in in_checkout
    assert in_checkout <= names
    assert [name for name in names if name.endswith("/licenses/LICENSE")]


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_a_caller_installs_neither_worker_nor_web_stack(wheel: Path) -> None:
    required = metadata(wheel).get_all("Requires-Dist") or []
    base = {re.match(r"[\w-]+", line)[0].lower() for line in required if "extra ==" not in line}  # type: ignore[index]
    assert base == {"redis", "hiredis", "pydantic", "pydantic-settings", "email-validator", "structlog"}
    assert {"cli", "worker"} <= set(metadata(wheel).get_all("Provides-Extra") or [])


def test_the_client_in_the_wheel_imports_and_answers(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = """
import sys
from producer.aio import AsyncVerificationClient
from producer.client import VerificationClient
import producer
assert producer.__file__.startswith(sys.argv[1]), producer.__file__
for name in ("celery", "kombu", "celeryconfig", "worker", "typer", "rich", "aiosmtpd", "jinja2"):
    assert name not in sys.modules, name
with VerificationClient() as client:
    print(int(client.request("not an address").error), int(client.request("a@example.com").error))
"""
    # Outside the checkout, and without PYTHON* variables.
    done = subprocess.run(
        [sys.executable, "-E", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{script}", str(tmp_path)],
        cwd=tmp_path,
        env={"VERIFY_REDIS_URL": "redis://127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "1"]
