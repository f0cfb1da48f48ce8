"""The worker's `/metrics` for Prometheus. No address, no purpose and no request id is ever a label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Final

from prometheus_client.metrics_core import Metric

from producer.audit import Audit
from producer.contract import ErrorCode
from producer.errors import RedisUnavailable
from producer.metrics import Histogram, ProcessMetrics, counter, gauge, histogram, labelled_counter, labelled_gauge
from producer.redis.clock import RedisClock
from producer.redis.connection import ServerError
from producer.store.backlog import backlog, read_backlog
from producer.store.codes import BUCKETS, COOLDOWN_HIT, SUPPRESSED_HIT
from worker.databases import Database
from worker.mail.failover import RelayStatus
from worker.queue.message import DeadLetterCode, DeadLetterReason

# Seconds: from an immediate 250 to the longest VERIFY_GIVE_UP_AFTER.
BOUNDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3600.0)


class Counters:
    """What one worker has counted since its start."""

    def __init__(self) -> None:
        self.mails = 0  # accepted by a relay
        self.taken = 0  # requests taken from the queue; one that is retried counts each time
        self.through_celery = 0  # of these, those that Celery ran
        self.replies = dict.fromkeys((error for error in ErrorCode if error < 1000), 0)
        self.clock = RedisClock()  # the broker's
        self.until_reply = Histogram(BOUNDS)  # from `enqueued_at`
        self.until_accepted = Histogram(BOUNDS)
        self.retries = 0
        self.joins = 0
        self.hits = dict.fromkeys((COOLDOWN_HIT, SUPPRESSED_HIT, *BUCKETS), 0)
        self.restored = 0  # messages of dead workers
        self.dead: Counter[str] = Counter(dict.fromkeys(DeadLetterCode, 0))
        self.audit = Audit()
        self.last_dead_letter = ""  # its reason
        self.dead_removed = dict.fromkeys(("age", "number"), 0)  # dead letters, by the bound that they were beyond

    def replied(self, error: ErrorCode, enqueued_at: float | None) -> None:
        self.replies[error] += 1
        self._observe_age(self.until_reply, enqueued_at)

    def accepted(self, enqueued_at: float | None) -> None:
        """A relay accepted the mail of a request."""
        self.mails += 1
        self._observe_age(self.until_accepted, enqueued_at)

    def dead_lettered(self, reason: DeadLetterReason) -> None:
        self.dead[reason.code] += 1
        self.last_dead_letter = reason.text

    def _observe_age(self, ages: Histogram, enqueued_at: float | None) -> None:
        """Count the seconds since `enqueued_at`, if the message had one, by the clock that our clients go by."""
        if enqueued_at is not None and (now := self.clock.now()) is not None:
            # A caller may have a clock of its own, and a message may contain any number.
            ages.observe(min(max(0.0, now - enqueued_at), BOUNDS[-1]))


class WorkerMetrics(ProcessMetrics):
    def __init__(
        self,
        counters: Counters,
        relays: Callable[[], Iterable[RelayStatus]],
        held: Callable[[], int],
        broker: Database,
        queue: str,
    ) -> None:
        super().__init__(counters.audit)
        self._counters = counters
        self._relays = relays
        self._held = held
        self._broker = broker
        self._queue = queue

    async def page(self) -> bytes:
        """The whole page in Prometheus' text format."""
        found = None  # if the broker does not answer: old figures would mislead
        with suppress(RedisUnavailable):
            [answer] = await self._broker.run([backlog(self._queue)])
            if not isinstance(answer, ServerError):
                found = read_backlog(answer)
        return self.render(found)

    def own_metrics(self) -> Iterator[Metric]:
        counters = self._counters
        taken = {("fast",): counters.taken - counters.through_celery, ("celery",): counters.through_celery}
        replies = {(str(int(error)),): count for error, count in counters.replies.items()}
        reasons = {(reason,): count for reason, count in counters.dead.items()}
        to_reply, to_accepted = {(): counters.until_reply}, {(): counters.until_accepted}
        hits = counters.hits
        empty = {(name,): hits[why] for why, name in BUCKETS.items()}
        sends: Counter[tuple[str, str]] = Counter()
        connections: Counter[tuple[str]] = Counter()
        unhealthy: dict[tuple[str], bool] = {}
        for each in self._relays():
            # Relays that differ only in what is masked, such as the user, have one name.
            name = (each.relay,)
            for outcome, count in each.sends.items():
                sends[each.relay, outcome] += count
            connections[name] += each.connections
            unhealthy[name] = unhealthy.get(name, False) or each.unhealthy
        yield labelled_counter("worker_requests_taken", "Requests taken from the queue, with retries.", ["path"], taken)
        yield labelled_counter("worker_replies", "Replies by error code.", ["error"], replies)
        yield histogram("worker_reply_seconds", "From a request's enqueued_at to its reply.", (), to_reply)
        yield histogram("worker_accepted_seconds", "From a request's enqueued_at to the relay's 250.", (), to_accepted)
        yield counter("worker_retries", "Failed sends whose request was scheduled for a retry.", counters.retries)
        yield counter("worker_joins", "Requests that wait for another request's send.", counters.joins)
        yield counter("worker_cooldown_hits", "Requests answered Success without another mail.", hits[COOLDOWN_HIT])
        yield labelled_counter("worker_rate_limited", "Requests that met an empty bucket.", ["bucket"], empty)
        yield counter(
            "worker_suppressed",
            "Requests answered MailRejected because a mailbox was refused lately.",
            hits[SUPPRESSED_HIT],
        )
        yield counter("worker_redeliveries", "Requests of dead workers that this one restored.", counters.restored)
        yield labelled_counter("worker_dead_letters", "Messages that this worker dead-lettered.", ["reason"], reasons)
        removed = {(bound,): count for bound, count in counters.dead_removed.items()}
        yield labelled_counter(
            "worker_dead_letters_removed", "Dead letters removed: too old, or too many.", ["bound"], removed
        )
        yield labelled_counter("worker_sends", "Attempts to send a mail.", ["relay", "outcome"], sends)
        yield labelled_gauge("worker_relay_connections", "Connections to a relay.", ["relay"], connections)
        yield labelled_gauge("worker_relay_unhealthy", "1: the relay is skipped for a while.", ["relay"], unhealthy)
        yield gauge("worker_requests_held", "Requests that this worker has taken and not settled.", self._held())
