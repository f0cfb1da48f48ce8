"""Programs that break a whole deployment on purpose: a soak under random faults, and comparisons under the same fault.

They use the servers and processes in `tests/support`.
"""

import sys
from pathlib import Path

MODULES = {"run": "soak", "compare": "compare", "failover": "failover", "picture": "picture"}

if (tests := str(Path(__file__).parents[2] / "tests")) not in sys.path:
    sys.path.append(tests)
