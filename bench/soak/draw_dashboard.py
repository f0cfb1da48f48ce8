"""`make picture`: films a soak, and draws what the dashboard shows of it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from bench.report.drawn import NotDrawn, environment, run
from bench.soak.scenario import SECONDS

_PICTURE = Path(__file__).parent / "dashboard.py"


def main(target: Path, seconds: float = SECONDS) -> int:
    """Both, of the tour's first `seconds`; 1 if the soak broke a promise, or the picture cannot be drawn."""
    with tempfile.TemporaryDirectory(prefix="film-") as folder:
        film = Path(folder) / "film.json"
        words = ["-m", "bench.soak.soak", "--minutes", f"{seconds / 60}", "--seed", "1", "--film", str(film)]
        kept = subprocess.run([sys.executable, *words], check=False).returncode == 0
        try:
            run(str(environment()), str(_PICTURE), str(film), str(target))
        except NotDrawn as exc:
            sys.stderr.write(f"{exc}\n")
            return 1
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), *map(float, sys.argv[2:])))
