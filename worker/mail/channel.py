"""The ports of mail: `MailChannel` is what the service sends through, `RelayChannel` what failover chooses from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from producer.setting_types import RelayURL
    from worker.mail.message import Mail


class MailChannel(Protocol):
    """Sends mails. Belongs to the loop of its first `send`."""

    def send(self, mail: Mail) -> None:
        """Send the mail and report the outcome by `mail.deadline`.

        The content leaves only once `mail.before_data` was answered with yes, and while `mail.still_permitted` says so.

        The outcome is None only if the mail was accepted; otherwise it is a `MailError` of the right kind, or what
        `before_data` raised. An envelope that cannot be sent is a `ValueError`.
        """

    async def close(self) -> None:
        """Cancel what is on its way and close all connections, within a second or so."""


class RelayChannel(MailChannel, Protocol):
    """Sends through one relay, such as an SMTP server, and reports each outcome by one call of `mail.finish`."""

    @property
    def url(self) -> RelayURL:
        """The relay; logs, metrics and traces name it by the masked URL."""

    @property
    def capacity(self) -> int:
        """How many mails can be on their way at once."""

    @property
    def open_connections(self) -> int:
        """Connections open or being opened."""

    async def check(self) -> None:
        """Connect and log in without sending. Raises `MailError`."""
