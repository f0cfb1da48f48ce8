"""The scripts that measure still run, and count what they say they count."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.tools,  # a C compiler, for their relay
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads CPU times from /proc"),
]


def run(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_capacity_prints_a_row_for_each_run() -> None:
    printed = run("bench.capacity", "--runs", "1", "--latency", "0", "20", "--count", "300")
    assert [row.split()[:3] for row in printed.splitlines()[1:]] == [["0", "32", "1"], ["20", "32", "1"]]


def test_footprint_counts_connections_and_bytes() -> None:
    printed = run("bench.footprint", "--count", "1000")
    for what in ("a worker, busy", "the API", "a Python client", "queued", "delayed", "answered", "request:*"):
        assert what in printed
