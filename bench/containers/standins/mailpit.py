#!/usr/local/bin/python
"""The demo's mail catcher as the program `mailpit`: SMTP on port 1025, the inbox on 8025; `readyz` asks it."""

from __future__ import annotations

import asyncio
import socket
import sys

from aiosmtpd.smtp import SMTP

from demo.catcher import Catcher
from demo.mailpit_api import Inbox

EVERYWHERE = "0.0.0.0"  # noqa: S104 - it is in a container


async def main() -> None:
    catcher = Catcher()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SMTP(catcher, enable_SMTPUTF8=True), EVERYWHERE, 1025)
    with Inbox(catcher, (EVERYWHERE, 8025)):
        await server.serve_forever()


if sys.argv[1:] == ["readyz"]:
    socket.create_connection(("127.0.0.1", 8025), 5).close()
else:
    asyncio.run(main())
