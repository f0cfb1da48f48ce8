"""Two releases side by side under load: `python -m bench.upgrade OLD`, or `make upgrade OLD=v0.1.0`.

It uses the servers and processes in `tests/support`, and the ledger of `bench.soak`.
"""

import bench.soak  # noqa: F401 - puts tests/support on the path
