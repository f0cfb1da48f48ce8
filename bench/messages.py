"""Messages of the queue, each for an address of its own."""

from __future__ import annotations

import os
import time
import uuid
from binascii import b2a_base64
from typing import Final

from producer.contract import TASK, VerifyRequest, stamp

# The smallest message that the contract allows.
_FOREIGN: Final = (
    b'{"body": "%b", "content-type": "application/json", "content-encoding": "utf-8",'
    b' "headers": {"task": "' + TASK.encode() + b'", "id": "%b"},'
    b' "properties": {"delivery_tag": "%b", "body_encoding": "base64",'
    b' "delivery_info": {"exchange": "", "routing_key": "%b"}}}'
)


def address(number: int) -> str:
    """The address of the request with this number."""
    return f"user{number:07}@example.com"


def foreign(start: int, stop: int, queue: str) -> list[bytes]:
    """Requests `start` to `stop`, as a program in any language pushes them."""
    ids, tags = _uuids(stop - start), _uuids(stop - start)
    key = queue.encode()
    bodies = (b'[[], {"email": "%b"}, {}]' % address(number).encode() for number in range(start, stop))
    return [
        _FOREIGN % (b2a_base64(body, newline=False), request_id, tag, key)
        for body, request_id, tag in zip(bodies, ids, tags, strict=True)
    ]


def ours(start: int, stop: int, queue: str) -> list[bytes]:
    """The same, as our producers write them."""
    requests = map(VerifyRequest, map(address, range(start, stop)))
    return stamp((request.message(str(uuid.uuid4()), queue=queue) for request in requests), time.time())


def _uuids(count: int) -> list[bytes]:
    """So many of version 4; a million at once should not take longer than pushing them."""
    digits = os.urandom(16 * count).hex()
    return [
        b"%b-%b-4%b-8%b-%b" % (each[:8], each[8:12], each[13:16], each[17:20], each[20:])
        for each in (digits[at : at + 32].encode() for at in range(0, len(digits), 32))
    ]
