"""`python -m bench.containers`, which `make containers` runs: build the image, start the Compose stack, try it."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.containers.checks import run
from bench.containers.engine import DebianEngine, Engine, NoEngine
from bench.containers.images import provide


def main() -> int:
    """Run all checks; 0 if each holds."""
    parser = argparse.ArgumentParser(prog="python -m bench.containers", description=__doc__)
    parser.add_argument("--folder", type=Path, help="where Debian's engine and its images stay for the next run")
    given = parser.parse_args()
    folder = given.folder.resolve() if given.folder else Path(tempfile.mkdtemp(prefix="verify-containers-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if Engine.usable():
            return _try(Engine(folder))
        with DebianEngine(folder) as engine:
            return _try(engine)
    except NoEngine as exc:
        sys.stderr.write(f"{exc}\n")
        return 1
    except subprocess.CalledProcessError as exc:
        sys.stderr.write(f"{' '.join(exc.cmd)}: status {exc.returncode}\n{exc.stdout or ''}{exc.stderr or ''}\n")
        return 1
    finally:
        if not given.folder:
            shutil.rmtree(folder)


def _try(engine: Engine) -> int:
    print(f"Engine: {engine.describe()}")
    print(f"Images: {provide(engine)}")
    return run(engine)


if __name__ == "__main__":
    sys.exit(main())
