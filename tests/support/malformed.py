"""Messages that are known to do harm."""

from __future__ import annotations

import base64
import json
from typing import Any

from support.caller import message


def malformed_messages() -> dict[str, bytes]:
    """By what is wrong with them. Each stops a stock Celery worker or makes it lose the message."""

    def dumped(**changes: Any) -> bytes:
        return json.dumps(message({"email": "poison@example.com"}, **changes)).encode()

    whole = message({"email": "poison@example.com"})
    return {
        "not JSON": b"hello",
        "list": b"[]",
        "null": b"null",
        "bad base64": dumped(body="***"),
        "dict body": dumped(body={"email": "poison@example.com"}),
        "no content-type": json.dumps({k: v for k, v in whole.items() if k != "content-type"}).encode(),
        "no id": json.dumps(whole | {"headers": {"task": "verification.send_code"}}).encode(),
        "undecodable body": dumped(body=base64.b64encode(b"\xff\xfe").decode()),
        "bad expires": dumped(headers={"expires": "tomorrow"}),
        "foreign content-type": dumped(content_type="application/x-python-serialize"),
        "unknown task": dumped(headers={"task": "other.task"}),
        "empty": b"",
    }
