"""Programs that break a whole deployment on purpose: a soak under random faults, and comparisons under the same fault.

They use the servers and processes in `tests/support`.
"""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

if (tests := str(Path(__file__).parents[2] / "tests")) not in sys.path:
    sys.path.append(tests)


def installed() -> str:
    """Versions and machine, as they stand below a report."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("celery", "kombu", "redis", "hiredis"))
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, shared"
    return f"Python {platform.python_version()}, {packages}; {machine}"
