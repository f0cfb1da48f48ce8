"""Mutated input at the HTTP API, the gRPC API and the queue: each is answered, and nothing breaks.

The processes are real, and the input goes over real sockets.
"""

import bench.soak  # noqa: F401 - the tests' servers, which this uses too, can be imported after it
