"""What the peers need: installed apart from our own packages, once for each package.json and requirements.txt."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from bench.compiling import BUILD
from bench.peers.catalogue import Peer
from producer.errors import VerifyError
from producer.setting_types import Sender
from worker.mail.render import Renderer

HERE: Final = Path(__file__).parent
NODE_MODULES: Final = BUILD / "node" / "node_modules"
OLD_MODULES: Final = BUILD / "old" / "node_modules"
PYTHON: Final = BUILD / "python" / "bin" / "python"
MAIL: Final = BUILD / "mail.eml"

_PACKAGES: Final = HERE / "package.json"
_OLD_PACKAGES: Final = HERE / "old" / "package.json"
_REQUIREMENTS: Final = HERE / "requirements.txt"
_NAMED: Final = re.compile(r"^([\w-]+)\S*==", re.MULTILINE)
# What peers fill in, as it stands in the mail.
_RECIPIENT: Final = "RECIPIENT@peer.example"
_CODE: Final = "CODE"
_REFERENCE: Final = b"REFERENCE"


class CannotInstall(VerifyError):
    """What the peers need cannot be installed."""


def install() -> None:
    """Install what is missing, and say so on stderr. Raises `CannotInstall`."""
    BUILD.mkdir(exist_ok=True)
    MAIL.write_bytes(_mail())
    _once(NODE_MODULES.parent, _PACKAGES, _install_node)
    _once(OLD_MODULES.parent, _OLD_PACKAGES, _install_node)
    _once(PYTHON.parent.parent, _REQUIREMENTS, _install_python)


def versions() -> dict[str, str]:
    """Of Node, Python, and the packages that peers use by name. They are installed."""
    found = {"node": _run("node", "--version").strip().lstrip("v"), "python": platform.python_version()}
    for packages, modules, whose in ((_PACKAGES, NODE_MODULES, ""), (_OLD_PACKAGES, OLD_MODULES, "the old server's ")):
        for name in json.loads(packages.read_text())["dependencies"]:
            found[f"{whose}{name}"] = json.loads((modules / name / "package.json").read_text())["version"]
    names = _NAMED.findall((HERE / "requirements.in").read_text())
    script = f"import json, importlib.metadata as m; print(json.dumps({{name: m.version(name) for name in {names}}}))"
    found |= json.loads(_run(PYTHON, "-c", script))
    return found


def _mail() -> bytes:
    """One of our mails, with slots: every peer sends the same bytes as we do."""
    renderer = Renderer(Sender("", "no-reply@example.com"), default_locale="zh-CN")
    mail = renderer.render(recipient=_RECIPIENT, code=_CODE, life=600, request_id="", locale=None)
    mail = re.sub(rb"(?<=\nMessage-ID: <)[a-z]+|(?<=\nX-Entity-Ref-ID: )[a-z]+", _REFERENCE, mail)
    # Clients that stuff dots and those that do not then send the same; and each slot is what it seems.
    counts = [mail.count(slot) for slot in (_RECIPIENT.encode(), _CODE.encode(), _REFERENCE)]
    if b"\n." in mail or counts != [1, 2, 2]:
        raise CannotInstall(f"our mail does not serve as the peers' any more: dots or slots, {counts}")
    return mail


def _once(directory: Path, wanted: Path, make: Callable[[Path], None]) -> None:
    """Make `directory` by `make`, unless it was made from the same content of `wanted`."""
    stamp = directory / wanted.name
    made = directory / "made"  # written last
    if made.exists() and stamp.read_bytes() == wanted.read_bytes():
        return
    sys.stderr.write(f"Installing what bench/peers/{wanted.relative_to(HERE)} names into {directory} ...\n")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    shutil.copy(wanted, stamp)
    make(directory)
    made.touch()


def _install_node(directory: Path) -> None:
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise CannotInstall(f"the peers on Node need `{program}`, and there is none (Debian: nodejs, npm)")
    _run("npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts", cwd=directory)


def _install_python(directory: Path) -> None:
    _run(sys.executable, "-m", "venv", directory)
    pip = (PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--require-hashes")
    _run(*pip, "-r", directory / _REQUIREMENTS.name)


def _run(*words: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    if done.returncode:
        raise CannotInstall(f"{' '.join(map(str, words))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def environment(peer: Peer, given: Mapping[str, object]) -> dict[str, str]:
    """For a peer: ours, without VerifyServer's settings, with these."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VERIFY_")}
    proto = HERE.parent.parent / "producer" / "api" / "message.proto"
    own = {
        "NODE_PATH": OLD_MODULES if peer.name == "old" else NODE_MODULES,
        "NODE_ENV": "production",
        "PEER_MAIL": MAIL,
        "PEER_PROTO": proto,
        **given,
    }
    return inherited | {name: str(value) for name, value in own.items()}


def command(words: Sequence[str]) -> list[str]:
    """These words of a peer, ready to start: the Python of the peers, and the program where it lies."""
    place = {"python": str(PYTHON)} | {word: str(HERE / word) for word in words if "/" in word}
    return [place.get(word, word) for word in words]
