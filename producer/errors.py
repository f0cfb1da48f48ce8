"""What can go wrong on our side: one root, few kinds. A kind's docstring is its message."""

from __future__ import annotations


class VerifyError(Exception):
    """VerifyServer met an error."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class BadSetting(VerifyError, ValueError):
    """A setting has a value that is not allowed."""


class InvalidAddress(VerifyError, ValueError):
    """The address is not an email address."""


class RedisUnavailable(VerifyError, ConnectionError):
    """Redis could not be reached or answered an error."""


class ServerTooOld(VerifyError):
    """The Redis server is older than 6.2."""


class QueueFull(VerifyError):
    """More requests wait in the queue than is allowed."""
