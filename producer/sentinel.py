"""A Redis server that is found through Sentinel: the URL that says so, read. Standard library only.

`redis+sentinel://[user:password@]host:port,host:port,host:port/SERVICE[/database][?query]`. The hosts are sentinels,
26379 being their port unless told otherwise. User and password are for the servers. `sentinel_username` and
`sentinel_password` in the query are for the sentinels; whatever else stands there is redis-py's, for the servers.
`rediss+sentinel://` means TLS, to servers and sentinels alike, with the same trust.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Final, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

PORT: Final = 26379
_SCHEMES: Final = {"redis+sentinel": False, "rediss+sentinel": True}  # whether it means TLS
_SHAPE: Final = re.compile(r"([a-z+]+)://(?:([^/?#]*)@)?([^/?#@]*)/([^/?#]+)(?:/([0-9]*))?(?:\?([^#]*))?")
_USER, _PASSWORD = "sentinel_username", "sentinel_password"


def is_sentinel(url: str) -> bool:
    """Whether the URL is of this kind."""
    return url.partition("://")[0] in _SCHEMES


@dataclass(frozen=True, slots=True)
class SentinelURL:
    """One such URL."""

    tls: bool
    sentinels: tuple[tuple[str, int], ...]
    service: str  # the name under which the sentinels watch the primary
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    database: int | None = None
    sentinel_user: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    query: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @classmethod
    def parse(cls, url: str) -> Self:
        """Read it. Raises `ValueError`, without the URL, for what is none."""
        found = _SHAPE.fullmatch(url)
        if found is None or found[1] not in _SCHEMES or any(c.isspace() or not c.isprintable() for c in url):
            raise ValueError("no sentinel URL")
        scheme, who, hosts, service, database, query = found.groups()
        user, colon, password = (who or "").partition(":")
        pairs = parse_qsl(query or "", keep_blank_values=True)
        known = dict(pairs)
        if "db" in known or len(known) < len(pairs):
            raise ValueError("no sentinel URL")
        return cls(
            _SCHEMES[scheme],
            tuple(_host(host) for host in hosts.split(",")),
            unquote(service),
            unquote(user) or None,
            unquote(password) if colon else None,
            int(database) if database else None,
            known.pop(_USER, None) or None,
            known.pop(_PASSWORD, None) or None,
            tuple(known.items()),
        )

    def with_database(self, number: int) -> Self:
        """The same with this database."""
        return replace(self, database=number)

    def server_url(self, host: str = "sentinel", port: int = 6379) -> str:
        """A plain URL, redis-py's, of the same database on a server of the service."""
        query = f"?{urlencode(self.query)}" if self.query else ""
        scheme = "rediss" if self.tls else "redis"
        return f"{scheme}://{self.who()}{_in_url(host)}:{port}/{self.database or 0}{query}"

    def __str__(self) -> str:
        """The URL."""
        hosts = ",".join(self.addresses())
        own = [(_USER, self.sentinel_user), (_PASSWORD, self.sentinel_password)]
        pairs = [*((name, value) for name, value in own if value is not None), *self.query]
        query = f"?{urlencode(pairs)}" if pairs else ""
        database = "" if self.database is None else f"/{self.database}"
        scheme = "rediss+sentinel" if self.tls else "redis+sentinel"
        return f"{scheme}://{self.who()}{hosts}/{quote(self.service, safe='')}{database}{query}"

    def addresses(self) -> list[str]:
        """Each sentinel, as host:port."""
        return [f"{_in_url(host)}:{port}" for host, port in self.sentinels]

    def who(self) -> str:
        """User and password before a server's host, with their @; empty if there are none."""
        if self.user is None and self.password is None:
            return ""
        password = "" if self.password is None else f":{quote(self.password, safe='')}"
        return f"{quote(self.user or '', safe='')}{password}@"


def _host(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.port == 0 or "@" in text:
        raise ValueError("no sentinel URL")
    return parts.hostname, parts.port or PORT


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
