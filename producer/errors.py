"""The exceptions that VerifyServer raises. A class's docstring is its default message."""

from __future__ import annotations


class VerifyError(Exception):
    """VerifyServer failed."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class BadSetting(VerifyError, ValueError):
    """A setting has an invalid value."""


class InvalidAddress(VerifyError, ValueError):
    """The text is not an email address."""


class StoreUnavailable(VerifyError, ConnectionError):
    """The code store cannot be reached."""


class RedisUnavailable(StoreUnavailable):
    """Redis cannot be reached, or it answered with an error."""

    kind = ""  # the first word of that error


class RedisLoginRefused(RedisUnavailable):
    """Redis refused the login: check its user and password."""


class ServerTooOld(VerifyError):
    """The Redis server is older than 6.2."""


class QueueFull(VerifyError):
    """The queue already holds as many requests as VERIFY_MAX_QUEUE allows."""
