"""Send mutated input to a real process, look at it after each batch, and print how many inputs and what was found.

The input that made something happen is written to a file; `--seed`, `--first` and `--count 1` make it again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from support.api_process import ApiProcess
from support.fake_worker import FakeWorker
from support.redis_server import RedisServer
from support.rig import Rig

from bench.fuzz.envelope import SETTINGS, EnvelopeTarget
from bench.fuzz.grpc import GrpcTarget
from bench.fuzz.http import HttpTarget
from bench.fuzz.target import Target, fuzz
from bench.soak import installed


@contextmanager
def target_of(kind: str, seed: int) -> Iterator[Target]:
    """The target of this kind, with processes of its own."""
    if kind == "envelope":
        with Rig(**SETTINGS) as rig:
            rig.add_worker()
            yield EnvelopeTarget(rig, seed)
        return
    with RedisServer() as server, FakeWorker(server), closing(ApiProcess({"VERIFY_REDIS_URL": server.url()})) as api:
        api.start()
        yield (HttpTarget if kind == "http" else GrpcTarget)(api, seed)


def main() -> int:
    """Run; 1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("kind", choices=("http", "grpc", "envelope"))
    parser.add_argument("--seconds", type=float, default=60, help="how long (default: 60)")
    parser.add_argument("--count", type=int, help="how many inputs, in place of --seconds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="the number of the first input")
    parser.add_argument("--out", type=Path, default=Path(), help="where to write inputs with a finding")
    options = parser.parse_args()
    began = time.monotonic()
    with target_of(options.kind, options.seed) as target:
        tried, findings = fuzz(target, count=options.count, seconds=options.seconds, first=options.first)
        took = time.monotonic() - began
        for finding in findings:
            sys.stdout.write(f"{finding}\n")
            if finding.data:
                options.out.joinpath(f"{finding.kind}-{finding.seed}-{finding.number}.bin").write_bytes(finding.data)
        found = f"{tried:,} inputs in {took:.0f} s, {len(findings)} findings, at most {target.most:.0f} MB"
        sys.stdout.write(f"{options.kind}, seed {options.seed}: {found}; {installed()}\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
