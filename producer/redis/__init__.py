"""One pipelined connection to a Redis server."""
