"""Asks for several codes at once with the asyncio client: needs the package `verifyserver`.

python ask_asyncio.py a@example.com b@example.com
"""

from __future__ import annotations

import asyncio
import json
import sys

from producer.aio import AsyncVerificationClient
from producer.contract import Reply


async def ask(emails: list[str]) -> list[Reply]:
    """Return the replies, in the order of the addresses."""
    async with AsyncVerificationClient() as client:  # one for the whole loop; tasks share it
        return await asyncio.gather(*(client.request(email) for email in emails))


if __name__ == "__main__":
    replies = asyncio.run(ask(sys.argv[1:]))
    for reply in replies:
        print(json.dumps({"email": reply.email, "error": reply.error}))
    sys.exit(0 if all(reply.error == 0 for reply in replies) else 1)
