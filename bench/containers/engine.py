"""A container engine: the host's own, or Debian's, installed into a folder and run from there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Final, Self

from support.process import eventually

ROOT: Final = Path(__file__).parents[2]
START_TIMEOUT: Final = 120.0  # seconds
DEBIAN: Final = "trixie"  # the first with a Compose that reads our file; the image's base is of it, too
PACKAGES: Final = ("docker.io", "docker-cli", "docker-compose", "docker-buildx", "iptables")
# Runs in a mount namespace of its own. The engine remounts its root, so that must be a mount point.
_START: Final = """
set -eu
mount --make-rprivate /
mount --bind "$1" "$1"
for each in proc sys dev; do mount --rbind "/$each" "$1/$each"; done
mount -t tmpfs none "$1/run"
mkdir -p "$1$2" "$1$3" "$1/data"
mount --bind "$2" "$1$2"
mount --bind "$3" "$1$3"
cd "$1"
pivot_root . mnt
umount -l /mnt
exec dockerd --data-root /data --exec-root /run/docker --pidfile /run/docker.pid
"""
_EMPTY: Final = {
    "filter": "*filter\n:INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT\nCOMMIT\n",
    "nat": "*nat\n:PREROUTING ACCEPT\n:INPUT ACCEPT\n:OUTPUT ACCEPT\n:POSTROUTING ACCEPT\nCOMMIT\n",
}


class NoEngine(Exception):
    """There is no engine, and none can be installed."""


class Engine:
    """The host's own engine."""

    network = "default"  # of builds

    def __init__(self, folder: Path) -> None:
        """`folder`: for files that its client reads."""
        self.folder = folder

    @staticmethod
    def usable() -> bool:
        """Whether an engine answers, and Compose is installed."""
        if shutil.which("docker") is None:
            return False
        asked = (["docker", "info"], ["docker", "compose", "version"])
        return all(subprocess.run(each, capture_output=True, timeout=60, check=False).returncode == 0 for each in asked)

    def command(self, *words: str) -> list[str]:
        """The command line that runs these words where the engine's client is, in the checkout."""
        return list(words)

    def run(self, *words: str, given: bytes = b"", check: bool = True) -> str:
        """Run to its end; standard output. `given` is its standard input. Raises `CalledProcessError`."""
        done = subprocess.run(
            self.command(*words),
            cwd=ROOT,
            input=given,
            capture_output=True,
            check=False,
        )
        if check and done.returncode:
            raise subprocess.CalledProcessError(
                done.returncode, words, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
            )
        return done.stdout.decode(errors="replace")

    def describe(self) -> str:
        """Its versions."""
        asked = self.run("docker", "version", "--format", "{{.Server.Version}}").strip()
        return f"Docker {asked}, Compose {self.run('docker', 'compose', 'version', '--short').strip()}"


class DebianEngine(Engine):
    """Debian's, in a folder. Needs root. `with DebianEngine(folder) as engine:` starts it, and ends all of it."""

    network = "host"  # packages come the way that this host gets them

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "files")
        self.folder.mkdir(exist_ok=True)
        self.base, self.root, self._log = folder / "base", folder / "engine", folder / "dockerd.log"
        self._process: subprocess.Popen[bytes] | None = None
        # The host's network as it was.
        self._rules, self._forwarding, self._bridged = b"", "", True

    def command(self, *words: str) -> list[str]:
        assert self._process is not None
        inside = ["nsenter", "--target", str(self._process.pid), "--mount", "--root", "--"]
        return [*inside, "/usr/bin/env", "-C", str(ROOT), *words]

    def __enter__(self) -> Self:
        if os.geteuid():
            raise NoEngine("No container engine with Compose answers, and only root can start one.")
        self._install()
        log = self._log.open("wb")
        self._rules = self._chroot("iptables-save")
        self._bridged = Path("/sys/class/net/docker0").exists()
        self._forwarding = Path("/proc/sys/net/ipv4/ip_forward").read_text()
        command = ["unshare", "--mount", "sh", "-c", _START, "sh", str(self.root), str(ROOT), str(self.folder)]
        self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        log.close()
        try:
            eventually(self._answers, START_TIMEOUT)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            tail = self._log.read_text(errors="replace")[-2000:]
            raise NoEngine(f"Debian's engine does not run here:\n{tail}")
        return subprocess.run(self.command("docker", "info"), capture_output=True, check=False).returncode == 0

    def _install(self) -> None:
        """Debian's base system, and beside it one with the engine."""
        if not (self.root / "usr/sbin/dockerd").exists():
            print(f"Installing Debian's engine into {self.root} ...", flush=True)
            for folder in (self.base, self.root):
                shutil.rmtree(folder, ignore_errors=True)
            if shutil.which("debootstrap") is None:
                self._sh("apt-get", "update", "-q")
                self._sh("apt-get", "install", "-q", "-y", "--no-install-recommends", "debootstrap")
            self._sh("debootstrap", "--variant=minbase", "--include=ca-certificates", DEBIAN, str(self.base))
            self._sh("cp", "-a", str(self.base), str(self.root))
            shutil.copy("/etc/resolv.conf", self.root / "etc/resolv.conf")
            self._chroot("apt-get", "update", "-q")
            self._chroot("apt-get", "install", "-q", "-y", "--no-install-recommends", *PACKAGES)

    def _chroot(self, *words: str) -> bytes:
        return self._sh("chroot", str(self.root), *words)

    @staticmethod
    def _sh(*words: str) -> bytes:
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        try:
            return subprocess.run(words, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=True).stdout
        except (subprocess.CalledProcessError, FileNotFoundError) as exc:
            said = getattr(exc, "stderr", b"").decode(errors="replace")[-1000:]
            raise NoEngine(f"Debian's engine cannot be installed: {' '.join(words)}: {exc}\n{said}") from None

    def __exit__(self, *_: object) -> None:
        """End the engine and its containers, and put the host's network back as it was."""
        assert self._process is not None
        if self._process.poll() is None:
            if running := self.run("docker", "ps", "-q", check=False).split():
                self.run("docker", "kill", *running, check=False)
            self.run("docker", "network", "prune", "-f", check=False)
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(START_TIMEOUT)
        # Restoring flushes only the tables that are named.
        empty = [text for table, text in _EMPTY.items() if f"*{table}\n".encode() not in self._rules]
        rules = self._rules + "".join(empty).encode()
        subprocess.run(["chroot", str(self.root), "iptables-restore"], input=rules, check=False)
        Path("/proc/sys/net/ipv4/ip_forward").write_text(self._forwarding)
        if shutil.which("ip") and not self._bridged:
            subprocess.run(["ip", "link", "delete", "docker0"], check=False)
