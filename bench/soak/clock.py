"""A caller whose clock is wrong: asks for each address that it reads from standard input, and writes JSON lines.

`python -m bench.soak.clock SECONDS`, with the settings in the environment. Its clock is so many seconds fast; slow, if
they are negative. It is a process of its own, as a clock belongs to a whole process.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time


async def _answer(client: object, email: str) -> None:
    reply = await client.request(email)  # type: ignore[attr-defined]  # its class is not imported yet
    print(json.dumps({"email": email, "error": int(reply.error)}), flush=True)


async def _serve() -> None:
    from producer.aio import AsyncVerificationClient  # noqa: PLC0415 - it may take the clock at its import

    async with AsyncVerificationClient() as client, asyncio.TaskGroup() as group:
        while email := (await asyncio.to_thread(sys.stdin.readline)).strip():
            group.create_task(_answer(client, email))


def main() -> None:
    """Ask until standard input ends."""
    seconds, right = float(sys.argv[1]), time.time
    time.time = lambda: right() + seconds
    asyncio.run(_serve())


if __name__ == "__main__":
    main()
