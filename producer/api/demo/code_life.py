"""How long codes live still: a resend does not move a code's expiry, so the page cannot count from the reply."""

from __future__ import annotations

from producer.contract import code_key
from producer.errors import VerifyError
from producer.redis.connection import RedisConnections, ServerError
from producer.settings import Settings


class CodeLife:
    """Asks Redis, over a connection of its own; of a code it learns nothing else."""

    def __init__(self, settings: Settings, redis: RedisConnections) -> None:
        self._link = redis.connection(settings.codes_url)

    async def left(self, email: str, purpose: str) -> float | None:
        """The seconds that the live code has left; None if there is none, or Redis does not say."""
        try:
            [left] = await self._link.run([("PTTL", code_key(email, purpose))])
        except VerifyError:
            return None
        return None if isinstance(left, ServerError) or left < 0 else left / 1000

    async def close(self) -> None:
        """Drop the connection."""
        await self._link.close()
