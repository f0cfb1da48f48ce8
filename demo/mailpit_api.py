"""Serves the catcher's mails as Mailpit does: the part of its API that the demo page uses."""

from __future__ import annotations

import json
import threading
from email.utils import getaddresses
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

from demo.catcher import HOST, Catcher, Mail

LIMIT = 50  # mails in a list; Mailpit's own default
LIST, MESSAGE = "/api/v1/messages", "/api/v1/message/"


class Inbox:
    """Listens on `bind`, or on a free port. `with Inbox(catcher) as inbox:`, then `inbox.url`."""

    def __init__(self, catcher: Catcher, bind: tuple[str, int] = (HOST, 0)) -> None:
        self.catcher = catcher
        self._server = ThreadingHTTPServer(bind, partial(_Handler, catcher))
        self._thread = threading.Thread(target=self._server.serve_forever, name="inbox", daemon=True)
        self.url = f"http://{HOST}:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    timeout = 5.0  # seconds of silence

    def __init__(self, catcher: Catcher, *given: Any) -> None:
        self._catcher = catcher
        super().__init__(*given)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        mails = list(self._catcher.kept)
        if path == LIST:
            shown = [{**_head(mail), "Created": _time(mail)} for mail in mails[:LIMIT]]
            self._answer({"total": len(mails), "start": 0, "messages": shown})
        elif found := [mail for mail in mails if path == MESSAGE + mail.id]:
            self._answer({**_head(found[0]), "Date": _time(found[0]), "Text": found[0].text, "HTML": found[0].html})
        else:
            self.send_error(404)

    def _answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its own name
        """Log nothing: the demo's screen shows mails."""


def _head(mail: Mail) -> dict[str, Any]:
    [sender] = getaddresses([str(mail.message["From"] or "")])[:1] or [("", "")]
    return {
        "ID": mail.id,
        "MessageID": str(mail.message["Message-ID"] or "").strip("<>"),
        "From": {"Name": sender[0], "Address": sender[1]},
        "To": [{"Name": "", "Address": mail.recipient}],
        "Subject": str(mail.message["Subject"] or ""),
    }


def _time(mail: Mail) -> str:
    return mail.arrived.isoformat().replace("+00:00", "Z")
