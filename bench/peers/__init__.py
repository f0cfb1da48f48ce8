"""The peers: other programs that do the same job, each at its best setting, for the runner to start and to count.

Every peer is a process that has its settings from the environment (PEER_REDIS_URL, PEER_SMTP_PORT, PEER_CONNECTIONS,
PEER_PROCESSES, PEER_PORT), says "ready" or "ready PORT" when it serves, and ends on SIGTERM and with its parent.
"""

from bench.peers.catalogue import PEERS, Peer
from bench.peers.counting import Counts, counts
from bench.peers.grpc_load import LoadFailed, load
from bench.peers.installing import CannotInstall, install, versions
from bench.peers.running import Running, fill, running

__all__ = [
    "PEERS",
    "CannotInstall",
    "Counts",
    "LoadFailed",
    "Peer",
    "Running",
    "counts",
    "fill",
    "install",
    "load",
    "running",
    "versions",
]
