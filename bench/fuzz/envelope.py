"""Mutated messages on the queue: each is answered or becomes a dead letter."""

from __future__ import annotations

import base64
import json
import random
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from support.caller import META, QUEUE, address, message
from support.golden import Blanks, files, raw
from support.process import eventually
from support.rig import Rig, code_in

from bench.fuzz.mutate import JSON_TOKENS, VALUES, Mutator
from bench.fuzz.target import Target
from producer.contract import DEAD_LETTERS, LARGEST_MESSAGE
from worker.queue.dead_letters import DeadLetter

# What a rig for this needs: what is mutated into the far future is given up.
SETTINGS: Final[dict[str, Any]] = {"give_up_after": 8, "log_level": "INFO"}
_HEADERS: Final = (
    *("eta", "expires", "group", "retries", "timelimit", "root_id", "lang", "enqueued_at", "stamps", "traceparent"),
    *("stamped_headers", "argsrepr", "kwargsrepr", "origin", "ignore_result", "shadow", "compression", "priority"),
)
_ARGUMENTS: Final = ("email", "purpose", "locale", "client", "x")


class EnvelopeTarget(Target):
    """The queue of a rig with one worker, which nobody else uses meanwhile."""

    kind = "envelope"

    def __init__(self, rig: Rig, seed: int) -> None:
        super().__init__(rig.worker, seed)
        self._rig = rig
        self._codes: set[str] = set()
        self._golden = [each for each in files("push").values() if "bytes" not in each]
        self.answered = self.dead = 0

    def mutated(self, chance: random.Random) -> bytes:
        """A message of the golden files, or the minimal one, broken in its structure, its body or its bytes."""
        mutator = Mutator(chance)
        email = f"mutant.{chance.getrandbits(40):010x}@example.com"
        if chance.random() < 0.5:
            blanks = Blanks(email, *(str(uuid.UUID(int=chance.getrandbits(128))) for _ in range(2)))
            whole = raw(chance.choice(self._golden), blanks)
        else:
            envelope = message({"email": email}, request_id=str(uuid.UUID(int=chance.getrandbits(128))))
            envelope["properties"]["delivery_tag"] = str(uuid.UUID(int=chance.getrandbits(128)))
            whole = json.dumps(envelope).encode()
        if chance.random() < 0.3:
            return mutator.garbled(whole, JSON_TOKENS)
        try:
            envelope = json.loads(whole)
            body = base64.b64decode(envelope["body"])
        except (ValueError, TypeError, LookupError):
            return mutator.garbled(whole, JSON_TOKENS)
        match chance.randrange(4):
            case 0:
                envelope["body"] = base64.b64encode(mutator.garbled(body, JSON_TOKENS)).decode()
            case 1:
                arguments = mutator.restructured([[], {"email": email}, {}], _ARGUMENTS)
                envelope["body"] = base64.b64encode(json.dumps(arguments).encode()).decode()
            case 2 if isinstance(envelope.get("headers"), dict):
                envelope["headers"][chance.choice(_HEADERS)] = chance.choice(VALUES)
            case _:
                envelope = mutator.restructured(envelope, _HEADERS)
        return json.dumps(envelope).encode()

    def send(self, inputs: Sequence[bytes]) -> Iterable[tuple[int, str]]:
        """Push them all at once, wait until none is held, and account for each."""
        rig = self._rig
        rig.broker.lpush(QUEUE, *inputs)
        try:
            eventually(lambda: not rig.held())
        except AssertionError:
            yield -1, f"after a minute, the queue still holds {rig.held()}"
            return
        letters = [DeadLetter.of(raw) for raw in rig.dead_letters()]
        left = Counter(_kept(each) for each in inputs)
        left.subtract(Counter((letter.message, letter.size) for letter in letters))
        states = {key: rig.results.get(key) for key in rig.results.scan_iter(META + "*", count=1000)}
        answered = {key.decode("utf-8", "replace").removeprefix(META) for key in states}
        for at, each in enumerate(inputs):
            if left[_kept(each)] > 0 and _id_of(each) not in answered:
                yield at, "neither answered nor dead-lettered"
        for key, count in left.items():
            if count < 0:
                yield -1, f"a dead letter that was not sent: {key!r}"
        yield from ((-1, f"a dead letter without {part}") for letter in letters for part in _missing(letter))
        for state in states.values():
            said: Any = json.loads(state or b"{}")
            if said.get("status") != "SUCCESS" or type(said["result"]["error"]) is not int:
                yield -1, f"malformed reply: {said}"
        self.answered, self.dead = self.answered + len(inputs) - len(letters), self.dead + len(letters)
        self._codes = {code_in(mail) for mail in rig.relay.dotted}
        try:
            rig.assert_ttls()
        except AssertionError:
            yield -1, "a key without a TTL"
        rig.broker.delete(DEAD_LETTERS)
        rig.results.flushdb()
        rig.codes.flushdb()
        rig.relay.mails.clear()
        rig.relay.dotted.clear()
        rig.relay.commands.clear()

    def honest(self) -> bool:
        """A request of the caller is answered with success."""
        served: bool = self._rig.caller.ask(address("honest"))["error"] == 0
        self._rig.caller.pushed.clear()
        self._rig.caller.listener.heard.clear()
        return served

    def secrets(self) -> Iterable[str]:
        """The codes of the batch."""
        return self._codes


def _kept(raw: bytes) -> tuple[bytes, int | None]:
    """What a dead letter keeps of a message: of one that is too large, the beginning."""
    return (raw, None) if len(raw) <= LARGEST_MESSAGE else (raw[:1024], len(raw))


def _id_of(raw: bytes) -> Any:
    try:
        return json.loads(raw)["headers"]["id"]
    except (ValueError, LookupError, TypeError):
        return None


def _missing(letter: DeadLetter) -> list[str]:
    return [name for name, value in (("a reason", letter.reason), ("a time", letter.at.timestamp())) if not value]
