"""`python -m bench.soak run | compare | failover | picture`: real processes under faults. `--help` after each."""

from __future__ import annotations

import importlib
import sys

MODULES = {"run": "soak", "compare": "compare", "failover": "failover", "picture": "picture"}


def main() -> int:
    """Run the program that the first word names; its exit code."""
    if len(sys.argv) < 2 or sys.argv[1] not in MODULES:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    program = importlib.import_module(f"bench.soak.{MODULES[sys.argv[1]]}")
    sys.argv[:2] = [f"python -m bench.soak {sys.argv[1]}"]
    return int(program.main() or 0)


if __name__ == "__main__":
    sys.exit(main())
