"""Who is measured against us, and how each is set up: as well as we know how, and `setting` says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# Of all Node peers but `old`: a wide young generation, which costs less collecting.
_NODE: Final = ("node", "--max-semi-space-size=32")


@dataclass(frozen=True)
class Peer:
    """A program that does the same job: get or create the code, mail it, mark it as sent, reply."""

    name: str
    title: str  # for the report
    setting: str  # its best setting, in one sentence
    answers_grpc: bool  # requests come by gRPC and are answered so; else it drains a queue
    command: tuple[str, ...]  # `node` or `python`, and the program's path here
    warm_after: int  # requests of each process after which its rate is steady

    @property
    def filling(self) -> tuple[str, ...]:
        """The command that fills its queue, but for the numbers."""
        program = next(i for i, word in enumerate(self.command) if "/" in word)
        return (*self.command[: program + 1], "fill")


PEERS: Final = (
    Peer(
        "old",
        "the old server",
        "The public Node server's packages in its versions and its way: one process; GET, SET and EXPIRE one after the "
        "other; a connection, a login and with TLS a handshake for each mail; no mark; it logs each step.",
        answers_grpc=True,
        command=("node", "old/server.js"),
        warm_after=2000,
    ),
    Peer(
        "old_best",
        "Node server at its best",
        "SET NX GET, Redis commands of one tick in one write; nodemailer's pool, which keeps its connections, sets "
        "TCP_NODELAY and pipelines; a process for each core (node:cluster); 32 MB semi-spaces.",
        answers_grpc=True,
        command=(*_NODE, "node/old_best.js"),
        warm_after=4000,
    ),
    Peer(
        "bullmq",
        "BullMQ + nodemailer",
        "Four jobs in hand for each SMTP connection, Redis commands of one tick in one write, the reply in the event "
        "of completion, no completed jobs kept; nodemailer's pool; a process for each core; 32 MB semi-spaces.",
        answers_grpc=False,
        command=(*_NODE, "node/bullmq.js", "nodemailer"),
        warm_after=8000,
    ),
    Peer(
        "bullmq_pipelined",
        "BullMQ + pipelining SMTP client",
        "As BullMQ + nodemailer, with an SMTP client that writes twice a mail: MAIL, RCPT and DATA; content and dot.",
        answers_grpc=False,
        command=(*_NODE, "node/bullmq.js", "pipelined"),
        warm_after=5000,
    ),
    Peer(
        "dramatiq",
        "dramatiq",
        "A process for each core with eight threads, each with its own SMTP and Redis connection; "
        "mark and reply in one pipeline; no middleware but Retries and CurrentMessage.",
        answers_grpc=False,
        command=("python", "python/dramatiq_peer.py"),
        warm_after=500,
    ),
    Peer(
        "celery",
        "stock Celery",
        "One task a request, prefork with a process for each core and its own SMTP connection, prefetch 64, early "
        "acks; no events, gossip, mingle and heartbeat.",
        answers_grpc=False,
        command=("python", "python/celery_peer.py"),
        warm_after=500,
    ),
)
