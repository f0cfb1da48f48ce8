"""`make picture`: records a soak of long faults, and draws what the dashboard shows of it."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.report.drawn import NotDrawn, environment, run
from bench.soak.faults import LONG_FAULTS_END

_DRAWING = Path(__file__).parent / "dashboard.py"


def main() -> int:
    """The exit code: 1 if the soak broke a promise, or the picture could not be drawn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("seconds", type=float, nargs="?", default=LONG_FAULTS_END, help="only the first so many")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="recording-") as folder:
        recording = Path(folder) / "recording.json"
        words = ["--minutes", f"{options.seconds / 60}", "--seed", "1", "--record", str(recording)]
        kept = subprocess.run([sys.executable, "-m", "bench.soak", "run", *words], check=False).returncode == 0
        try:
            run(str(environment()), str(_DRAWING), str(recording), str(options.picture.resolve()))
        except NotDrawn as exc:
            sys.stderr.write(f"{exc}\n")
            return 1
    return 0 if kept else 1
