"""The API is replaced while it is asked, over HTTP and gRPC: how many requests are refused, reset, failed or slow.

Processes and sockets are real: Redis, a worker, an SMTP server, the API.
"""

import bench.soak  # noqa: F401 - the tests' servers, which this uses too, can be imported after it
