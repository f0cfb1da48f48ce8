"""The images that Dockerfile and docker-compose.yml name: from their registry, or stand-ins of Debian's packages."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path
from typing import Final

from support import containers

from bench.containers.engine import ROOT, DebianEngine, Engine, NoEngine

STANDINS: Final = Path(__file__).parent / "standins"
BASE: Final = "verifyserver-standin-base"
CERTIFICATES: Final = Path("/etc/ssl/certs/ca-certificates.crt")
# By the beginning of an image's name; Python's comes first, as others are made of it.
_BY_NAME: Final = {
    "python": "python",
    "redis": "redis",
    "axllent/mailpit": "mailpit",
    "prom/prometheus": "observe",
    "grafana/grafana": "observe",
}


def named() -> list[str]:
    """Every image that is not ours, Python's first."""
    python = containers.stages()[-1][0].words[0]
    others = {each["image"] for each in containers.services().values()} - {containers.services()["worker"]["image"]}
    return [python, *sorted(others)]


def standin(image: str) -> str:
    """The Dockerfile in `standins` for this image."""
    return next(name for beginning, name in _BY_NAME.items() if image.startswith(f"{beginning}:"))


def provide(engine: Engine) -> str:
    """Pull every image, or build a stand-in for each if the registry does not answer; which it was."""
    images = named()
    try:
        for image in images:
            engine.run("docker", "pull", "-q", image)
    except subprocess.CalledProcessError as exc:
        if not isinstance(engine, DebianEngine):
            raise NoEngine(f"An image cannot be pulled: {exc.stderr}") from None
    else:
        return "the real ones"
    packed = subprocess.run(["tar", "-C", str(engine.base), "-cf", "-", "."], capture_output=True, check=True).stdout
    engine.run("docker", "import", "-", BASE, given=packed)
    for image in images:
        build = ("docker", "build", "--network", engine.network, "-q", "-t", image)
        engine.run(*build, "--build-arg", f"PYTHON={images[0]}", "-", given=_context(standin(image)))
    return "stand-ins of Debian's packages, as no registry answers; Mailpit, Prometheus and Grafana are imitated"


def _context(name: str) -> bytes:
    """A stand-in's build context: what they are made of, and this host's certificates for its package mirrors."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(STANDINS / f"{name}.Dockerfile", "Dockerfile")
        tar.add(STANDINS / "mailpit.py", "mailpit.py")
        for module in ("__init__", "catcher", "mailpit_api"):
            tar.add(ROOT / "demo" / f"{module}.py", f"demo/{module}.py")
        if CERTIFICATES.exists():
            tar.add(CERTIFICATES.resolve(), "ca-certificates.crt")
    return packed.getvalue()
