"""What it takes until a program is there, and to be there: import, start, memory."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from typing import Final

from bench.hold import memory
from bench.record import Run
from bench.rig import Rig, cpu_seconds
from bench.sink import Sink
from demo.processes import CHECKOUT, HOST, Child

TIMEOUT: Final = 60.0  # seconds
_LOOK: Final = 0.005  # seconds between two looks
_IDLE: Final = 1.0  # seconds from the first answer to the weighing


async def start(rig: Rig, sink: Sink, *, number: int) -> list[Run]:
    """One start of each program."""
    load = os.getloadavg()[0]
    bare = await asyncio.to_thread(_run, "pass")
    client = await asyncio.to_thread(_run, "import producer.client")
    imported = {"seconds": client["seconds"] - bare["seconds"], "cpu": client["cpu"] - bare["cpu"]}
    weight = {"rss_mb": client["rss_mb"], "bare_rss_mb": bare["rss_mb"]}
    runs = [Run("start", "client", number, figures=imported | weight, load=load)]
    await rig.clear()
    await rig.fill(rig.settings().queue, 1, foreign=True)
    began = time.monotonic()
    worker = rig.start_worker(RELAYS=sink.url)
    try:
        await _first_reply(rig)
        figures = {"seconds": time.monotonic() - began, "cpu": cpu_seconds(worker.pid)}
        await asyncio.sleep(_IDLE)
        runs.append(Run("start", "worker", number, figures=figures | memory(worker.pid), load=load))
        runs.append(Run("start", "api", number, figures=await asyncio.to_thread(_api, rig, number), load=load))
    finally:
        await asyncio.to_thread(worker.stop)
    return runs


async def _first_reply(rig: Rig) -> None:
    """The request that lay on the queue is answered."""
    async with asyncio.timeout(TIMEOUT):
        while not (await rig.ask(("DBSIZE",), database=2))[0]:  # noqa: ASYNC110 - Redis tells, no event
            await asyncio.sleep(_LOOK)


def _api(rig: Rig, number: int) -> dict[str, float]:
    """From their start to the first Success through them; a worker is there."""
    port = free_port()
    environment = rig.environment(HTTP_BIND=f"{HOST}:{port}", GRPC_BIND=f"{HOST}:0")
    began = time.monotonic()
    api = Child("api", [sys.executable, "-m", "producer", "serve"], rig.directory, environment)
    try:
        content = json.dumps({"email": f"api{number}@example.com"}).encode()
        asked = urllib.request.Request(f"http://{HOST}:{port}/get_varifycode", content)
        while True:
            try:
                with urllib.request.urlopen(asked, timeout=TIMEOUT) as response:  # noqa: S310 - see above
                    assert json.load(response)["error"] == 0  # noqa: S101 - else nothing was ready
                break
            except OSError:
                api.require_running()
                if time.monotonic() - began > TIMEOUT:
                    raise
                time.sleep(_LOOK)
        figures = {"seconds": time.monotonic() - began, "cpu": cpu_seconds(api.pid)}
        time.sleep(_IDLE)
        return figures | memory(api.pid)
    finally:
        api.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _run(code: str) -> dict[str, float]:
    """A fresh interpreter that runs this: how long, with how much CPU, in how much memory."""
    weigh = "import os, resource; used, pages = sum(os.times()[:2]), int(open('/proc/self/statm').read().split()[1])"
    say = "print(used, pages * resource.getpagesize() / 2**20)"
    began = time.monotonic()
    done = subprocess.run(  # noqa: S603 - our own
        [sys.executable, "-c", f"{code}\n{weigh}\n{say}"], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    cpu, rss = map(float, done.stdout.split())
    return {"seconds": time.monotonic() - began, "cpu": cpu, "rss_mb": rss}
