"""Callers that ask with `AsyncVerificationClient`, in a process of their own.

`python -m bench.load CALLERS SECONDS PREFIX [LEAST]` asks as the environment says and prints one JSON object: the
answers by error code, the Successes that came in time and the seconds of that, latencies in ms, CPU seconds. Each
request is for an address of its own, and each caller asks again as soon as it was answered.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections import Counter
from itertools import count
from typing import Any

import uvloop

from producer.aio import AsyncVerificationClient
from producer.contract import ErrorCode


async def ask(callers: int, seconds: float, prefix: str, least: int) -> dict[str, Any]:
    """Ask for so long, and on until `least` were answered; then the first, which opens the connections, counts too."""
    answers: Counter[int] = Counter()
    latencies: list[float] = []  # of Successes that were asked for in time
    in_time = 0  # Successes that came in time
    numbers = count()
    async with AsyncVerificationClient() as client:

        async def one_after_another() -> None:
            nonlocal in_time
            while (began := time.perf_counter()) < end or answers.total() < least:
                reply = await client.request(f"{prefix}{next(numbers)}@example.com")
                answers[reply.error] += 1
                if reply.error is ErrorCode.SUCCESS:
                    now = time.perf_counter()
                    latencies.append(now - began)
                    in_time += now <= end

        if not least:
            first = await client.request(f"{prefix}first@example.com")  # opens the connections, and is not measured
            answers[first.error] += 1
        used = -_cpu()
        end = time.perf_counter() + seconds
        await asyncio.gather(*(one_after_another() for _ in range(callers)))
        used += _cpu()
    latencies.sort()
    return {
        "count": in_time,
        "seconds": seconds,
        "answers": {str(int(error)): times for error, times in answers.items()},
        **{f"p{share}": 1000 * percentile(latencies, share) for share in (50, 90, 99)},
        "cpu": used,
    }


def percentile(ordered: list[float], share: int) -> float:
    """The percentile: the smallest figure that `share` percent do not exceed; 0 without figures."""
    return ordered[max(0, -(-len(ordered) * share // 100) - 1)] if ordered else 0.0


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Generate the load and print what was measured."""
    callers, seconds, prefix, *least = sys.argv[1:]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(ask(int(callers), float(seconds), prefix, int(least[0]) if least else 0))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
