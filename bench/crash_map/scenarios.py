"""What is tried: which requests, on how many servers, which process is under the fault, and how it breaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

from bench.crash_map.network import Step

LEASE: Final = 1.0  # seconds: VERIFY_VISIBILITY_TIMEOUT
SHORT, LONG = 0.4, 2.5  # seconds of a cut: the lease outlives the one, and not the other, which Redis' clients notice
GIVE_UP_AFTER: Final = 20.0  # seconds: VERIFY_GIVE_UP_AFTER
REPLY_TIMEOUT: Final = 8.0  # seconds: VERIFY_REPLY_TIMEOUT

# Steps about which Redis may not know that a relay may accept the mail.
_IN_DOUBT: Final = {"announce_data", "DATA", "content", "settle"}
# Of all processes. The other timeouts are the defaults.
SETTINGS: Final = {
    "VERIFY_VISIBILITY_TIMEOUT": f"{LEASE:g}",
    "VERIFY_GIVE_UP_AFTER": f"{GIVE_UP_AFTER:g}",
    "VERIFY_REPLY_TIMEOUT": f"{REPLY_TIMEOUT:g}",
    "VERIFY_LOCALE": "en",
    "VERIFY_CODE_LENGTH": "12",  # six digits are also in any timestamp of a log
    "VERIFY_METRICS_BIND": "127.0.0.1:0",
    "VERIFY_GRPC_BIND": "127.0.0.1:0",
}


class Actor(Enum):
    """The process under the fault."""

    WORKER = "worker"
    CLIENT = "client"
    API = "API"


class Servers(Enum):
    """Where the three databases are."""

    ONE = "one server"
    THREE = "three servers"


@dataclass(frozen=True, slots=True)
class Scenario:
    """Requests for one address."""

    name: str
    title: str
    requests: int = 1  # made at once
    before: int = 0  # made, and answered, before the steps are counted
    pause: float = 0.0  # seconds between those and the others
    relay: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # step: its first replies
    consumed: bool = False  # the user enters the code as soon as the mail has arrived
    settings: Mapping[str, str] = field(default_factory=dict)


SCENARIOS: Final = {
    scenario.name: scenario
    for scenario in (
        Scenario("alone", "one request"),
        Scenario("two", "two requests at once for one address", requests=2),
        Scenario("retry", "one request that the relay first answers 451", relay={"dot": ("451 4.3.0 later",)}),
        Scenario(
            "resend",
            "an address asked for again after the cooldown",
            before=1,
            pause=1.1,
            settings={"VERIFY_RESEND_COOLDOWN": "1"},
        ),
        Scenario("used", "one request whose code is used as soon as it arrives", consumed=True),
    )
}


class Fault(Enum):
    """What happens to the process at a step."""

    KILLED_BEFORE = "killed just before"
    KILLED_AFTER = "killed just after"
    CUT_SHORT = f"cut off from Redis for {SHORT:g} s"
    CUT_LONG = f"cut off from Redis for {LONG:g} s"
    FROZEN = f"frozen for {LONG:g} s"
    LOST = "this connection reset"
    TWICE = f"cut off for {LONG:g} s, and the next holder killed"

    @property
    def kills(self) -> bool:
        return self in {Fault.KILLED_BEFORE, Fault.KILLED_AFTER}


class Place(NamedTuple):
    """One band of the map: everything but the step and the fault."""

    servers: Servers
    actor: Actor
    scenario: str


class Cell(NamedTuple):
    """One fault at one step; without either, the requests as they are."""

    place: Place
    step: Step | None = None
    fault: Fault | None = None


def places() -> list[Place]:
    """All of them. That a relay refuses first, or that a code is used, only the worker gets to see."""
    return [
        Place(servers, actor, scenario.name)
        for servers in Servers
        for actor in Actor
        for scenario in SCENARIOS.values()
        if actor is Actor.WORKER or not (scenario.relay or scenario.consumed)
    ]


def faults_at(place: Place, step: Step) -> list[Fault]:
    """The ways that are tried at this step."""
    faults: list[Fault] = [each for each in Fault if each is not Fault.TWICE]
    if place.actor is Actor.WORKER and step.name in _IN_DOUBT:
        faults.append(Fault.TWICE)
    return faults
