"""The inbox of a mail catcher, by Mailpit's API (https://mailpit.axllent.org/docs/api-v1/).

The API fetches it, so that the page needs no second origin. A mail may be hostile: its HTML is served under names that
nobody can guess, for a frame in which nothing runs.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, BeforeValidator, StringConstraints, ValidationError

from producer.api.demo.fetch import CannotFetch, fetch_json

NEWEST: Final = 20  # mails in the list
KEPT: Final = 40  # mails whose HTML is kept; older ones are fetched again
_LINE: Final = 300  # characters of a subject or a name that are shown

_Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
# Cut before validation: an answer has room for half a million elements, whose errors pydantic would collect for seconds
# in which the API serves nobody.
_FEW: Final = BeforeValidator(lambda value: value[:NEWEST] if isinstance(value, list) else value)
_M = TypeVar("_M", bound=BaseModel)


class _Mailbox(BaseModel):
    Name: str = ""
    Address: str = ""


_Mailboxes = Annotated[list[_Mailbox] | None, _FEW]


class _Summary(BaseModel):
    ID: _Id
    From: _Mailbox | None = None
    To: _Mailboxes = None
    Subject: str = ""
    Created: str = ""


class _List(BaseModel):
    messages: Annotated[list[_Summary] | None, _FEW]


class _Message(BaseModel):
    From: _Mailbox | None = None
    To: _Mailboxes = None
    Subject: str = ""
    Date: str = ""
    Text: str = ""
    HTML: str = ""


class Inbox:
    """Reads one catcher."""

    def __init__(self, url: str) -> None:
        """`url`: the catcher's base, as in `VERIFY_DEMO_INBOX`."""
        self._url = url
        self._views: dict[str, str] = {}  # HTML by its name; the oldest first
        self._names: dict[str, str] = {}  # that name by the mail's id

    async def mails(self) -> list[dict[str, Any]]:
        """The newest mails, the newest first: `id`, `from`, `to`, `subject`, `at` (RFC 3339). Raises `CannotFetch`."""
        found = _checked(_List, await fetch_json(f"{self._url}/api/v1/messages?limit={NEWEST}"))
        return [{"id": each.ID, **_head(each), "at": each.Created} for each in found.messages or []]

    async def mail(self, mail_id: str) -> dict[str, Any]:
        """One mail: its head, `text`, and the name of its HTML for `view`, if it has any. Raises `CannotFetch`."""
        found = _checked(_Message, await fetch_json(f"{self._url}/api/v1/message/{quote(mail_id, safe='')}"))
        view = self._keep(mail_id, found.HTML) if found.HTML else None
        return {"id": mail_id, **_head(found), "at": found.Date, "text": found.Text, "view": view}

    def view(self, name: str) -> str | None:
        return self._views.get(name)

    def _keep(self, mail_id: str, html: str) -> str:
        name = self._names.get(mail_id) or secrets.token_urlsafe(16)
        self._names[mail_id], self._views[name] = name, html
        while len(self._views) > KEPT:
            oldest = next(iter(self._views))
            del self._views[oldest]
            self._names = {key: value for key, value in self._names.items() if value != oldest}
        return name


def _checked(model: type[_M], answer: Any) -> _M:
    try:
        return model.model_validate(answer)
    except ValidationError:
        raise CannotFetch("it answered something else") from None


def _head(mail: _Summary | _Message) -> dict[str, Any]:
    sender = mail.From or _Mailbox()
    return {
        "from": {"name": sender.Name[:_LINE], "address": sender.Address[:_LINE]},
        "to": [each.Address[:_LINE] for each in mail.To or []],
        "subject": mail.Subject[:_LINE],
    }
