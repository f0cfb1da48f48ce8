"""Pipelined connections to Redis servers, and to services behind sentinels."""
