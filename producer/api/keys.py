"""Who may ask: one check of API keys for HTTP and gRPC."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Final

from producer.setting_types import ApiKey

# The name of the key with which the request that is being served was made; empty where no key is asked for.
key_name: ContextVar[str] = ContextVar("key_name", default="")
_NEEDED: Final = "a key is needed: Authorization: Bearer KEY"
_WRONG: Final = "the key is not one of VERIFY_API_KEYS: send one, without its name"


def refusal_of_key(given: Sequence[bytes]) -> str:
    """What to tell a caller without a valid key. `given`: its values of `authorization`."""
    return _WRONG if given else _NEEDED


class KeyCheck:
    """Finds out with which of the keys a request was made."""

    def __init__(self, keys: Sequence[ApiKey]) -> None:
        self._digests = [(_digest(each.key.encode()), each.name) for each in keys]

    def name_of(self, given: Sequence[bytes]) -> str | None:
        """The name of the key in these values of `authorization`; None unless they are one valid key."""
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        # Digests have one length, and all are compared: the time taken tells nothing about any key.
        digest = _digest(key.strip())
        names = [name for each, name in self._digests if hmac.compare_digest(digest, each)]
        return names[0] if scheme.lower() == b"bearer" and names else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
