"""Starting the peers, and filling their queues."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.peers import installing
from bench.peers.catalogue import Peer
from demo.processes import Child, PartMissing

_READY: Final = r"(?m)^ready ?(\d*)$"


@dataclass(frozen=True)
class Running:
    """A peer that serves."""

    pids: tuple[int, ...]  # all its processes
    port: int  # gRPC; 0 for a peer that has none


@contextmanager
def running(
    peer: Peer,
    *,
    redis_url: str,
    relay_port: int,
    connections: int,
    processes: int,
    port: int = 0,
    trusted: Path | None = None,
) -> Iterator[Running]:
    """A peer, from the moment it serves to its end. Raises `PartMissing` if it does not start, or ended meanwhile.

    `connections`: to the relay, of each of its `processes`. `port`: for gRPC, 0 takes a free one.
    `trusted`: the relay speaks implicit TLS, and a certificate in this PEM file vouches for it; for `old` only.
    """
    given: dict[str, object] = {
        "REDIS_URL": redis_url,
        "SMTP_PORT": relay_port,
        "CONNECTIONS": connections,
        "PROCESSES": processes,
    }
    given |= {"PORT": port, "TLS": int(trusted is not None)}
    with tempfile.TemporaryDirectory(prefix="verify-peer-") as directory:
        env = installing.environment(peer, {f"PEER_{name}": value for name, value in given.items()})
        if trusted is not None:
            env["NODE_EXTRA_CA_CERTS"] = str(trusted)
        child = Child(peer.name, installing.command(peer.command), Path(directory), env)
        try:
            [bound] = child.says(_READY)
            yield Running(tuple(_session(child.pid)), int(bound or 0))
            child.require_running()
        finally:
            child.stop()


def fill(peer: Peer, *, redis_url: str, count: int, first: int = 0) -> None:
    """Put so many jobs on a peer's queue, each for an address of its own, numbered from `first`.

    Raises `PartMissing`.
    """
    if peer.answers_grpc:
        raise ValueError(f"{peer.name} has no queue")
    words = [*installing.command(peer.filling), str(first), str(count)]
    env = installing.environment(peer, {"PEER_REDIS_URL": redis_url})
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    if done.returncode:
        raise PartMissing(f"the queue of {peer.name} was not filled:\n{done.stderr}")


def _session(leader: int) -> Iterator[int]:
    """The processes of a session, but for the `sh` that watches over it."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = stat.read_text().rpartition(")")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        pid, _, name = head.partition(" (")
        if int(tail.split()[3]) == leader and name != "sh":
            yield int(pid)
