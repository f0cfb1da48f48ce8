"""The crash map: what becomes of a request when a process dies, freezes or is cut off, at each step and in each way.

`python -m bench.crash_map run` breaks one process at one step of one request, looks at what is left, and goes on with
the next step and the next way until it has tried all; `draw` makes the picture. It uses the servers and helpers in
`tests/support`.
"""

import bench.soak  # noqa: F401 - makes `support` importable
