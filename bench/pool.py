"""The bare SMTP pool, alone: `python -m bench.pool URL CONNECTIONS COUNT` sends so many mails and ends.

One process with the worker's own relay and renderer and nothing else: no queue, no codes, no replies. What a worker
carries is held against it.
"""

from __future__ import annotations

import asyncio
import math
import sys
import uuid
from itertools import count

from bench.messages import address
from producer.settings import Settings
from worker.mail.message import Envelope, Mail
from worker.mail.pool import SmtpPool
from worker.mail.render import Renderer
from worker.service import new_code


async def send(settings: Settings, mails: int) -> None:
    """Send so many mails, over as many connections at once as are set."""
    [url] = settings.relays
    relay = SmtpPool(url, settings)
    renderer = Renderer(settings.mail_from, default_locale=settings.locale)
    sender = settings.mail_from.mailbox
    numbers = count()
    under_way = 0
    finished = asyncio.get_running_loop().create_future()

    def send_next() -> None:
        nonlocal under_way
        number = next(numbers)
        if number >= mails:
            if not under_way:
                finished.set_result(None)
            return
        under_way += 1
        recipient = address(number)
        content = renderer.render(
            recipient=recipient,
            code=new_code(settings.code_length),
            life=settings.code_ttl,
            request_id=str(uuid.uuid4()),
            locale=None,
        )
        envelope = Envelope(sender, recipient, needs_smtputf8=False, content=content)
        relay.send(Mail(envelope, math.inf, lambda go: go(True), lambda: True, sent))

    def sent(error: Exception | None) -> None:
        nonlocal under_way
        if error is not None:
            if not finished.done():
                finished.set_exception(error)
            return
        under_way -= 1
        send_next()

    for _ in range(settings.relay_connections):
        send_next()
    await finished
    await relay.close()


def main() -> None:
    """Measure the bare SMTP pool and print it."""
    url, connections, mails = sys.argv[1:]
    settings = Settings.model_validate({"relays": url, "relay_connections": connections})
    asyncio.run(send(settings, int(mails)))


if __name__ == "__main__":
    main()
