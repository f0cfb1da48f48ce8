"""`verification.send_code` for messages that need Celery's own machinery. No logic of its own: a batch of one."""

from __future__ import annotations

from typing import Any

from celery import Task
from celery.exceptions import Ignore
from celery.worker.request import Request

from producer.contract import DEFAULT_PURPOSE, TASK, Reply
from producer.masking import mask_text
from worker.celery_side.events import shown


class StoredReply:
    """A reply on its way into Celery's backend and logs: stored whole, shown masked."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    def __json__(self) -> dict[str, Any]:
        return {"email": self._reply.email, "error": int(self._reply.error)}

    def __repr__(self) -> str:
        return shown(self._reply.email, self._reply.error)


class QuietRequest(Request):  # type: ignore[misc]  # Celery ships no types
    """Celery's request, except that it shows no argument, and that a revoked one is answered 6, unsent."""

    def info(self, safe: bool = False) -> dict[str, Any]:
        """As Celery's, for `inspect`, with masked arguments, and a masked id: a caller may use an address as one."""
        shown = {"id": mask_text(self.id), "args": self.argsrepr, "kwargs": self.kwargsrepr}
        return {**super().info(safe=safe), **shown}

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        self.app.bridge.revoke(self._message.delivery_tag)
        super()._announce_revoked(reason, terminated, signum, expired)


class SendCode(Task):  # type: ignore[misc]  # Celery ships no types
    """The task class; its requests are `QuietRequest`s."""

    name = TASK
    Request = QuietRequest

    def run(
        self,
        email: object = None,
        purpose: object = DEFAULT_PURPOSE,
        locale: object = None,
        client: object = None,
        **_: object,
    ) -> Any:
        """Serve the request of this message; the fetcher has read its arguments from the message already.

        Raises `Ignore` if a retry is scheduled: the request will come back as a message.
        """
        del email, purpose, locale, client
        reply = self.app.bridge.serve(str((self.request.properties or {}).get("delivery_tag")))
        if reply is None:
            raise Ignore
        return StoredReply(reply)
