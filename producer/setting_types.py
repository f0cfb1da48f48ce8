"""The types of settings: how each is read from text and how it may be shown. Secrets are shown masked."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from email.utils import getaddresses
from typing import Annotated, Final, NamedTuple, Self
from urllib.parse import SplitResult, parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer
from redis.connection import parse_url

from producer import address
from producer.errors import BadSetting, InvalidAddress

MASK: Final = "***"
RELAY_PORTS: Final = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}  # by URL scheme
SENTINEL_PORT: Final = 26379

_SENTINEL_SCHEMES: Final = {"redis+sentinel": False, "rediss+sentinel": True}  # whether it means TLS
_SENTINEL_URL: Final = re.compile(r"([a-z+]+)://(?:([^/?#]*)@)?([^/?#@]*)/([^/?#]+)(?:/([0-9]*))?(?:\?([^#]*))?")
_USER, _PASSWORD = "sentinel_username", "sentinel_password"
# How a Redis server's certificate is checked: redis-py's names, and Celery's for the same.
_CERTIFICATE_CHECKS: Final = frozenset({"none", "optional", "required"})
# A header carries a key, so it is visible ASCII; the comma ends it here.
_API_KEY: Final = re.compile(r"([A-Za-z0-9._-]{1,32}):([!-+\--~]{16,256})")
_CELERY_CHECKS: Final = re.compile(r"(?<=[?&]ssl_cert_reqs=)CERT_(?:NONE|OPTIONAL|REQUIRED)\b")


def mask_url(url: str) -> str:
    """`url` with user, password and the values of its query masked. It may name several hosts."""
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("#")[0].partition("?")
    netloc, slash, path = rest.partition("/")
    host = netloc.rpartition("@")[2]
    netloc = f"{MASK}@{host}" if "@" in netloc else host
    query = "&".join(f"{pair.partition('=')[0]}={MASK}" for pair in query.split("&") if pair)
    return f"{scheme}://{netloc}{slash}{path}" + (f"?{query}" if query else "")


def is_sentinel(url: str) -> bool:
    """Whether this is the URL of a service that Sentinel watches."""
    return url.partition("://")[0] in _SENTINEL_SCHEMES


def with_database(url: str, number: int) -> str:
    if is_sentinel(url):
        return str(SentinelURL.parse(url).with_database(number))
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, f"/{number}", parts.query, ""))


def with_password(url: str, password: str) -> str:
    """`url` with this password for the Redis server, in place of the one it may have; sentinels keep theirs."""
    if is_sentinel(url):
        return str(replace(SentinelURL.parse(url), password=password))
    parts = urlsplit(url)
    userinfo, _, host = parts.netloc.rpartition("@")
    user = userinfo.partition(":")[0]
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))


@dataclass(frozen=True, slots=True)
class SentinelURL:
    """`redis+sentinel://user:password@host:port,host:port/service/database`."""

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
        """Raises `ValueError`, without the URL, if it is invalid."""
        found = _SENTINEL_URL.fullmatch(url)
        if found is None or found[1] not in _SENTINEL_SCHEMES or not _is_plain(url):
            raise ValueError("invalid Sentinel URL")
        scheme, userinfo, hosts, service, database, query = found.groups()
        user, colon, password = (userinfo or "").partition(":")
        pairs = parse_qsl(query or "", keep_blank_values=True)
        known = dict(pairs)
        if "db" in known or len(known) < len(pairs):
            raise ValueError("invalid Sentinel URL")
        return cls(
            _SENTINEL_SCHEMES[scheme],
            tuple(_sentinel(host) for host in hosts.split(",")),
            unquote(service),
            unquote(user) or None,
            unquote(password) if colon else None,
            int(database) if database else None,
            known.pop(_USER, None) or None,
            known.pop(_PASSWORD, None) or None,
            tuple(known.items()),
        )

    def with_database(self, number: int) -> Self:
        return replace(self, database=number)

    def server_url(self, host: str = "sentinel", port: int = 6379) -> str:
        """The redis-py URL of the same database on one server of the service."""
        query = f"?{urlencode(self.query)}" if self.query else ""
        scheme = "rediss" if self.tls else "redis"
        return f"{scheme}://{self.userinfo()}{_in_url(host)}:{port}/{self.database or 0}{query}"

    def __str__(self) -> str:
        hosts = ",".join(self.addresses())
        own = [(_USER, self.sentinel_user), (_PASSWORD, self.sentinel_password)]
        pairs = [*((name, value) for name, value in own if value is not None), *self.query]
        query = f"?{urlencode(pairs)}" if pairs else ""
        database = "" if self.database is None else f"/{self.database}"
        scheme = "rediss+sentinel" if self.tls else "redis+sentinel"
        return f"{scheme}://{self.userinfo()}{hosts}/{quote(self.service, safe='')}{database}{query}"

    def addresses(self) -> list[str]:
        """Each sentinel as host:port."""
        return [f"{_in_url(host)}:{port}" for host, port in self.sentinels]

    def userinfo(self) -> str:
        """`user:password@` for a server's URL; empty without them."""
        if self.user is None and self.password is None:
            return ""
        password = "" if self.password is None else f":{quote(self.password, safe='')}"
        return f"{quote(self.user or '', safe='')}{password}@"


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
        userinfo = f"{MASK}@" if self.user is not None else ""
        return f"{self.scheme}://{userinfo}{_in_url(self.host)}:{self.port}"


class Bind(NamedTuple):
    """A `host:port` to listen on."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{_in_url(self.host)}:{self.port}"


class ApiKey(NamedTuple):
    """A key of the API, and the name by which metrics and log know who asks with it."""

    name: str
    key: str

    def __repr__(self) -> str:
        return f"{self.name}:{MASK}"


class Sender(NamedTuple):
    """The header From: a display name, possibly empty, and an address."""

    name: str
    mailbox: str

    def __str__(self) -> str:
        return f"{self.name} <{self.mailbox}>" if self.name else self.mailbox


def _sentinel(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname or parts.port == 0 or "@" in text:
        raise ValueError("invalid Sentinel URL")
    return parts.hostname, parts.port or SENTINEL_PORT


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _is_plain(url: str) -> bool:
    return url.isprintable() and " " not in url


def _split(url: str) -> SplitResult:
    parts = urlsplit(url)
    if parts.query or parts.fragment or not _is_plain(url):
        raise ValueError
    return parts


def _redis_url(value: str) -> str:
    value = _CELERY_CHECKS.sub(lambda found: found[0].removeprefix("CERT_").lower(), value)
    plain = SentinelURL.parse(value).server_url() if is_sentinel(value) else value
    parts = urlsplit(plain)
    query = parse_qs(parts.query, keep_blank_values=True)
    path = parts.path.removeprefix("/")
    database = not path or (path.isascii() and path.isdecimal())
    known = plain.startswith(("redis://", "rediss://"))  # redis-py accepts lower case only
    if not known or not parts.hostname or parts.port == 0 or not database or not _is_plain(value):
        raise ValueError
    parse_url(plain)  # type: ignore[no-untyped-call]  # raises for the value of an unfit option
    # redis-py and kombu disagree on which database counts if both path and query name one.
    if "db" in query or not _CERTIFICATE_CHECKS.issuperset(query.get("ssl_cert_reqs", ())):
        raise ValueError
    return value


def _password(value: str) -> str:
    value.encode()  # what is not UTF-8 in the environment is a surrogate here: a ValueError
    return value


def _base_redis_url(value: str) -> str:
    value = _redis_url(value)
    database = SentinelURL.parse(value).database if is_sentinel(value) else urlsplit(value).path not in {"", "/", "/0"}
    if database:
        raise ValueError
    return value


def _relays(value: str) -> tuple[RelayURL, ...]:
    return tuple(_relay(url.strip()) for url in value.split(","))


def _relay(url: str) -> RelayURL:
    parts = _split(url)
    if parts.scheme not in RELAY_PORTS or not parts.hostname or parts.path.strip("/") or parts.port == 0:
        raise ValueError
    user = None if parts.username is None else unquote(parts.username)
    password = None if parts.password is None else unquote(parts.password)
    if (user is None) != (password is None) or any(c in f"{user}{password}" for c in "\r\n\0"):
        raise ValueError
    if password is not None and parts.scheme == "smtp" and not _is_this_host(parts.hostname):
        raise BadSetting(
            f"smtp:// would send the password to {parts.hostname} unencrypted; allowed: smtp+starttls:// or smtps://,"
            " and smtp:// with a password to localhost or a loopback address only"
        )
    return RelayURL(parts.scheme, parts.hostname, parts.port or RELAY_PORTS[parts.scheme], user, password)


def _is_this_host(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def parse_bind(value: str) -> Bind:
    """Read `host:port`. Raises `ValueError`."""
    parts = _split(f"//{value}")
    if not parts.hostname or parts.port is None or parts.path or "@" in value:
        raise ValueError
    return Bind(parts.hostname, parts.port)


def _sender(value: str) -> Sender:
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


def _keys(value: str) -> tuple[ApiKey, ...]:
    found = [_API_KEY.fullmatch(entry.strip()) for entry in value.split(",") if entry.strip()]
    keys = tuple(ApiKey(*entry.groups()) for entry in found if entry is not None)
    # "," must not mean that no key is needed. A name may have several keys, of which one is on its way out.
    if not keys or len(keys) < len(found) or len({each.key for each in keys}) < len(keys):
        raise ValueError
    return keys


def _web_url(value: str) -> str:
    parts = _split(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc or parts.port == 0:
        raise ValueError
    return value.rstrip("/")


def _file_path(value: str) -> str:
    if not value.isprintable():
        raise ValueError
    return value


def _flag(value: str) -> bool:
    if value not in {"0", "1"}:
        raise ValueError
    return value == "1"


def _read_by(read: Callable[[str], object]) -> BeforeValidator:
    """Parse text with `read`; leave other values unchanged."""
    return BeforeValidator(lambda value: read(value) if isinstance(value, str) else value)


# A type that is not in `repr` is secret. Validators raise `ValueError` without a text, as the setting says what is
# allowed, or `BadSetting` with a text of its own.
_Secret: Final = Field(repr=False)
RedisURL = Annotated[str, AfterValidator(_redis_url), PlainSerializer(mask_url), _Secret]
BaseRedisURL = Annotated[str, AfterValidator(_base_redis_url), PlainSerializer(mask_url), _Secret]
Password = Annotated[str, AfterValidator(_password), PlainSerializer(lambda secret: MASK if secret else ""), _Secret]
RelayURLs = Annotated[
    tuple[RelayURL, ...],
    _read_by(_relays),
    PlainSerializer(lambda relays: ",".join(relay.masked() for relay in relays)),
    _Secret,
]
ApiKeys = Annotated[
    tuple[ApiKey, ...], _read_by(_keys), PlainSerializer(lambda keys: ",".join(map(str, keys))), _Secret
]
BindTo = Annotated[Bind, _read_by(parse_bind), PlainSerializer(str)]
From = Annotated[Sender, _read_by(_sender), PlainSerializer(str)]
WebURL = Annotated[str, AfterValidator(_web_url)]
FilePath = Annotated[str, AfterValidator(_file_path)]
Flag = Annotated[bool, _read_by(_flag), PlainSerializer(lambda flag: str(int(flag)))]
Seconds = Annotated[float, PlainSerializer(lambda seconds: f"{seconds:g}")]
