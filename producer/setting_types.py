"""What a setting can be, other than a number or a word: how it is read from text, and how it may be shown."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from email.utils import getaddresses
from typing import Annotated, Final, NamedTuple, Self
from urllib.parse import SplitResult, parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit

from pydantic import AfterValidator, BeforeValidator
from redis.connection import parse_url

from producer import address
from producer.errors import InvalidAddress

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


MASK: Final = "***"
RELAY_PORTS: Final = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}
# What TLS checks of a Redis server: redis-py's words, and Celery's names for the same.
_CERTIFICATES: Final = frozenset({"none", "optional", "required"})
_CELERYS: Final = re.compile(r"(?<=[?&]ssl_cert_reqs=)CERT_(?:NONE|OPTIONAL|REQUIRED)\b")


class RelayURL(NamedTuple):
    """Where and how one relay is reached."""

    scheme: str  # smtp (plain), smtp+starttls, smtps (implicit TLS)
    host: str
    port: int
    user: str | None
    password: str | None

    def __repr__(self) -> str:
        return self.masked()

    def masked(self) -> str:
        """The URL as it may be shown: without user and password."""
        who = f"{MASK}@" if self.user is not None else ""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{who}{host}:{self.port}"


class Bind(NamedTuple):
    """A `host:port` to listen on."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Sender(NamedTuple):
    """The header From: a display name, possibly empty, and an address."""

    name: str
    mailbox: str


def mask_url(url: str) -> str:
    """`url` with its user and password, and the values of its query, replaced. It may name several hosts."""
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("#")[0].partition("?")
    netloc, slash, path = rest.partition("/")
    host = netloc.rpartition("@")[2]
    netloc = f"{MASK}@{host}" if "@" in netloc else host
    query = "&".join(f"{pair.partition('=')[0]}={MASK}" for pair in query.split("&") if pair)
    return f"{scheme}://{netloc}{slash}{path}" + (f"?{query}" if query else "")


def _redis_url(value: str) -> str:
    value = _CELERYS.sub(lambda found: found[0].removeprefix("CERT_").lower(), value)
    plain = SentinelURL.parse(value).server_url() if is_sentinel(value) else value
    parts = urlsplit(plain)
    query = parse_qs(parts.query, keep_blank_values=True)
    path = parts.path.removeprefix("/")
    database = not path or (path.isascii() and path.isdecimal())
    known = plain.startswith(("redis://", "rediss://"))  # in small letters, as redis-py wants it
    if not known or not parts.hostname or parts.port == 0 or not database or not _is_plain(value):
        raise ValueError
    parse_url(plain)  # type: ignore[no-untyped-call]  # raises for an option that no connection could have
    # redis-py and kombu do not agree on where to look for the database, if both places have one.
    if "db" in query or not _CERTIFICATES.issuperset(query.get("ssl_cert_reqs", ())):
        raise ValueError
    return value


def _split(url: str) -> SplitResult:
    parts = urlsplit(url)
    if parts.query or parts.fragment or not _is_plain(url):
        raise ValueError
    return parts


def _is_plain(url: str) -> bool:
    return url.isprintable() and not any(c.isspace() for c in url)


def _relays(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(_relay(url.strip()) for url in value.split(","))


def _relay(url: str) -> RelayURL:
    parts = _split(url)
    if parts.scheme not in RELAY_PORTS or not parts.hostname or parts.path.strip("/") or parts.port == 0:
        raise ValueError
    user = None if parts.username is None else unquote(parts.username)
    password = None if parts.password is None else unquote(parts.password)
    if (user is None) != (password is None) or any(c in f"{user}{password}" for c in "\r\n\0"):
        raise ValueError
    return RelayURL(parts.scheme, parts.hostname, parts.port or RELAY_PORTS[parts.scheme], user, password)


def _bind(value: object) -> object:
    if not isinstance(value, str):
        return value
    parts = _split(f"//{value}")
    if not parts.hostname or parts.port is None or parts.path or "@" in value:
        raise ValueError
    return Bind(parts.hostname, parts.port)


def _sender(value: object) -> object:
    if not isinstance(value, str):
        return value
    found = getaddresses([value])
    if len(found) != 1 or value.count("<") != value.count(">") or any(c in value for c in "\r\n\0"):
        raise ValueError
    name, mailbox = found[0]
    try:
        parsed = address.parse(mailbox)
    except InvalidAddress:
        raise ValueError from None
    if parsed.needs_smtputf8:
        raise ValueError
    return Sender(name, parsed.mailbox)


def _keys(value: object) -> object:
    if not isinstance(value, str):
        return value
    keys = tuple(key.strip() for key in value.split(",") if key.strip())
    if not keys:
        raise ValueError  # set, but to nothing: that must not open the door
    if not all(key.isprintable() for key in keys):
        raise ValueError  # several lines: no header can say that
    return keys


def _web_url(value: str) -> str:
    parts = _split(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc or parts.port == 0:
        raise ValueError
    return value.rstrip("/")


def _flag(value: object) -> object:
    if value in {"0", "1"}:
        return value == "1"
    if isinstance(value, bool):
        return value
    raise ValueError


# These raise `ValueError` without a text: the setting's description says what is allowed.
RedisURL = Annotated[str, AfterValidator(_redis_url)]
RelayURLs = Annotated[tuple[RelayURL, ...], BeforeValidator(_relays)]
BindTo = Annotated[Bind, BeforeValidator(_bind)]
From = Annotated[Sender, BeforeValidator(_sender)]
Keys = Annotated[tuple[str, ...], BeforeValidator(_keys)]
WebURL = Annotated[str, AfterValidator(_web_url)]
Flag = Annotated[bool, BeforeValidator(_flag)]
