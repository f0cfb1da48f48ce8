"""`python -m bench.report RAW`: the report on a raw file, written beside it."""

import argparse
import sys
from pathlib import Path

from bench.report.drawn import NotDrawn, draw


def main() -> int:
    """All of it; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Write report.md and its pictures.")
    parser.add_argument("raw", type=Path, help="a file that `make bench` wrote")
    try:
        sys.stdout.write(f"{draw(parser.parse_args().raw.resolve())}\n")
    except NotDrawn as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
