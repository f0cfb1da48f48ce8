"""dramatiq: a worker, or `dramatiq_peer.py fill FIRST COUNT`, which puts messages on its queue."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

# dramatiq is in the peers' own environment, and `peer` is found beside the program that is started.
import dramatiq  # type: ignore[import-not-found]
from dramatiq import cli
from dramatiq.brokers.redis import RedisBroker  # type: ignore[import-not-found]
from dramatiq.middleware import CurrentMessage, Middleware, Retries  # type: ignore[import-not-found]
from peer import (  # type: ignore[import-not-found]
    CONNECTIONS,
    PROCESSES,
    REDIS_URL,
    addresses,
    codes,
    end_with_parent,
    mark_and_reply,
    send_code,
)

THREADS: Final = 8  # at most: more of them wait for the interpreter, not for the relay


class Announcement(Middleware):  # type: ignore[misc]  # without dramatiq it is Any
    """The last process that has started says that all have."""

    def after_worker_boot(self, *_: object) -> None:
        end_with_parent()
        started = f"started:{os.getppid()}"
        if codes().incr(started) == PROCESSES:
            codes().delete(started)
            os.write(1, b"ready\n")


def send(email: str) -> None:
    """The job."""
    message = CurrentMessage.get_current_message()
    assert message is not None  # noqa: S101 - the middleware is there
    send_code(email, message.message_id)
    mark_and_reply(email, message.message_id, reply=True)


broker = RedisBroker(url=f"{REDIS_URL}/1", middleware=[Retries(), CurrentMessage(), Announcement()])
dramatiq.set_broker(broker)
actor = dramatiq.actor(send, queue_name="verification")


def main(words: list[str]) -> None:
    """Work, or fill."""
    if words[:1] == ["fill"]:
        for email in addresses(*map(int, words[1:])):
            actor.send(email)
        return
    options = [
        "--processes",
        str(PROCESSES),
        "--threads",
        str(min(CONNECTIONS, THREADS)),
        "--path",
        str(Path(__file__).parent),
    ]
    sys.exit(cli.main(cli.make_argument_parser().parse_args([Path(__file__).stem, *options])))


if __name__ == "__main__":
    main(sys.argv[1:])
