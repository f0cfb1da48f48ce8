"""Ask the API steadily, replace it meanwhile, and print what became of the requests.

together  serve --share-port: the new process starts beside the old one, which is stopped once the new one listens
late      the same, and the new process is frozen for two seconds while it starts
failing   the same, and before each replacement a new process fails to start
apart     without --share-port: the old process is stopped, and the new one started after it
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from contextlib import ExitStack, closing
from typing import Final

from support.api_process import ApiProcess
from support.process import START_TIMEOUT, Process, free_port, own_environment
from support.rig import Rig

from bench.restart.load import SLOW, Outcomes
from bench.soak import installed

WAYS: Final = ("together", "late", "failing", "apart")
SHARE: Final = "--share-port"
_LATE: Final = 2.0  # seconds
_PAUSE: Final = 0.5  # seconds between two replacements
_CANNOT_LISTEN: Final = 2  # exit status


class ReplaceableApi:
    """The API on one HTTP and one gRPC port, in one process after another."""

    def __init__(self, settings: dict[str, str], way: str) -> None:
        self.http_port, self.grpc_port = free_port(), free_port()
        self._settings = settings | {
            "VERIFY_HTTP_BIND": f"127.0.0.1:{self.http_port}",
            "VERIFY_GRPC_BIND": f"127.0.0.1:{self.grpc_port}",
        }
        self._way = way
        self._processes = ExitStack()
        self._now = self._new()
        self._now.start()

    def _new(self) -> ApiProcess:
        options = () if self._way == "apart" else (SHARE,)
        process = ApiProcess(self._settings, *options)
        self._processes.callback(process.close)
        return process

    def replace(self) -> None:
        """Have another process serve. Raises `AssertionError` if one does not start or end as it should."""
        old, new = self._now, self._new()
        if self._way == "apart":
            assert old.stop() == 0
            new.start()
        else:
            if self._way == "failing":
                self._fail()
            new.start(wait=False)
            if self._way == "late":
                new.pause()
                time.sleep(_LATE)
                new.resume()
            new.wait_for_log("gRPC API listens", START_TIMEOUT)
            assert old.stop() == 0
        self._now = new

    def _fail(self) -> None:
        """A new process shares the HTTP port, and then finds the other one taken."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            process = ApiProcess(self._settings | {"VERIFY_GRPC_BIND": f"127.0.0.1:{taken.getsockname()[1]}"}, SHARE)
            self._processes.callback(process.close)
            process.start(wait=False)
            assert process.wait() == _CANNOT_LISTEN, process.log

    def close(self) -> None:
        """End what runs."""
        self._processes.close()


def measure(
    settings: dict[str, str], way: str, *, requests: int, seconds: float, most: int
) -> tuple[dict[str, Outcomes], int]:
    """What became of the requests, and how often the API was replaced meanwhile: at most `most` times."""
    replacements = 0
    with closing(ReplaceableApi(settings, way)) as api:
        words = (str(each) for each in (api.http_port, api.grpc_port, requests, seconds))
        load = Process("load", [sys.executable, "-m", "bench.restart.load", *words], own_environment({}))
        with load:
            while load.alive:
                time.sleep(_PAUSE)
                if replacements < most:
                    api.replace()
                    replacements += 1
            found = [line for line in load.log.splitlines() if line.startswith("{")]  # gRPC may print others
            assert found, load.log[-3000:]
            outcomes = json.loads(found[-1])
    return {name: Outcomes(**each) for name, each in outcomes.items()}, replacements


def main() -> int:
    """Measure, and print a table for each way."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.restart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ways", nargs="*", metavar="WAY", help="default: all")
    parser.add_argument("--requests", type=int, default=5000, help="of all callers (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="over which they are sent (default: %(default)s)")
    parser.add_argument("--replacements", type=int, default=5, help="at most so many (default: %(default)s)")
    options = parser.parse_args()
    if unknown := sorted({*options.ways} - {*WAYS}):
        parser.error(f"no way: {', '.join(unknown)} (choose from {', '.join(WAYS)})")
    say(f"{options.requests:,} requests over {options.seconds:g} s; {installed()}")
    with Rig(reply_timeout=5, log_level="INFO") as rig:
        rig.add_worker()
        for way in options.ways or WAYS:
            outcomes, replacements = measure(
                rig.settings,
                way,
                requests=options.requests,
                seconds=options.seconds,
                most=options.replacements,
            )
            report(way, outcomes, replacements)
    return 0


def report(way: str, outcomes: dict[str, Outcomes], replacements: int) -> None:
    """One table."""
    sent = sum(each.sent for each in outcomes.values())
    failed = sum(sum(each.failed.values()) for each in outcomes.values())
    say(f"\n{way}: {replacements} replacements, {failed} of {sent:,} requests failed")
    for name, each in outcomes.items():
        failures = ", ".join(f"{times} x {told}" for told, times in each.failed.items()) or "none"
        slow = f"slower than {SLOW:g} s: {each.slow}, the longest {each.longest:.2f} s"
        say(f"  {name:26} {each.sent:6,} sent; failed: {failures}; {slow}")


def say(line: str) -> None:
    """Print it now."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)
