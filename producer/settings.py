"""The environment, `.env`, `*_FILE` secrets and the old server's `config.json`, read once into one frozen object."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, NoReturn
from urllib.parse import quote, urlsplit, urlunsplit

from dotenv import dotenv_values
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from producer.contract import DEAD_LETTERS
from producer.errors import BadSetting
from producer.setting_types import (
    MASK,
    RELAY_PORTS,
    Bind,
    BindTo,
    Flag,
    From,
    Keys,
    RedisURL,
    RelayURL,
    RelayURLs,
    Sender,
    SentinelURL,
    WebURL,
    is_sentinel,
    mask_url,
)

# As a share of matching letters: RELAY is as near to RELAYS as 0.91, and HTTP_DOOR to HTTP_BIND as 0.67.
NEAR: Final = 0.85


def misspelt(names: Iterable[str], known: Iterable[str], prefix: str) -> Iterator[tuple[str, str]]:
    """Each of `names` that has the prefix and is not `known`, with the known one that it is near to."""
    allowed = {name.removeprefix(prefix) for name in known}
    for name in sorted(set(names)):
        rest = name.removeprefix(prefix)
        if rest != name and rest not in allowed and (near := get_close_matches(rest, allowed, 1, NEAR)):
            yield name, prefix + near[0]


PREFIX: Final = "VERIFY_"
# Keys that stand beside the queue in its database: dead letters, and kombu's own.
_NO_QUEUES: Final = frozenset({DEAD_LETTERS, "unacked", "unacked_index", "unacked_mutex"})
_DATABASES: Final = {"codes_url": 0, "broker_url": 1, "results_url": 2}


_TEXT: Final = "utf-8-sig"  # some editors begin a file with a mark that says UTF-8
_REDIS = (
    "redis://host:port or rediss://host:port, with user:password@ before the host if needed,"
    " or redis+sentinel://host:port,host:port/service"
)
_FLAG = "0 or 1"
_DOTENV: Final = Path(".env")
_told: set[str] = set()  # misspelt names of which this process has spoken
_WEB = "http://host:port or https://host:port, with a path if needed, without user or password"


def _setting(default: Any, allowed: str, *, secret: bool = False, **limits: Any) -> Any:
    """A field whose description says what is allowed; `secret`: its value is never shown as it is."""
    return Field(default, description=allowed, repr=not secret, json_schema_extra={"secret": secret}, **limits)


class Settings(BaseModel):
    """What is in force. Each field is `VERIFY_<NAME>`; times are seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    redis_url: RedisURL = _setting("redis://127.0.0.1:6379", f"{_REDIS}, no database but 0", secret=True)
    codes_url: RedisURL = _setting("", f"{_REDIS}, and /database", secret=True)
    broker_url: RedisURL = _setting("", f"{_REDIS}, and /database", secret=True)
    results_url: RedisURL = _setting("", f"{_REDIS}, and /database", secret=True)
    queue: str = _setting(
        "verification",
        f"1 to 64 of A-Z a-z 0-9 . _ -, not {DEAD_LETTERS} or unacked",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
    )
    visibility_timeout: float = _setting(15, "seconds, 1 to 3600", ge=1, le=3600)
    reply_timeout: float = _setting(5, "seconds, above 0 to 300", gt=0, le=300)
    relays: RelayURLs = _setting(
        (RelayURL("smtp", "127.0.0.1", 1025, None, None),),
        "comma-separated URLs: smtp://, smtp+starttls:// or smtps://, then user:password@ (percent-encoded) if needed,"
        " then host:port (1 to 65535)",
        secret=True,
    )
    relay_connections: int = _setting(32, "a whole number, 1 to 10000", ge=1, le=10000)
    connect_timeout: float = _setting(2, "seconds, above 0 to 300", gt=0, le=300)
    send_timeout: float = _setting(10, "seconds, above 0 to 300", gt=0, le=300)
    mail_from: From = _setting(
        Sender("", "no-reply@example.com"), 'an address, or "Name <address>"; the address in ASCII'
    )
    code_ttl: int = _setting(600, "whole seconds, 1 to 86400", ge=1, le=86400)
    code_length: int = _setting(6, "a whole number, 4 to 12", ge=4, le=12)
    code_min_life: float = _setting(60, "seconds, 0 to 86400", ge=0, le=86400)
    resend_cooldown: float = _setting(10, "seconds, 0 (off) to 86400", ge=0, le=86400)
    max_sends_per_hour: int = _setting(20, "a whole number, 0 (off) to 100000", ge=0, le=100000)
    max_attempts: int = _setting(5, "a whole number, 1 to 1000", ge=1, le=1000)
    give_up_after: float = _setting(300, "seconds, 1 to 3600", ge=1, le=3600)
    locale: str = _setting("zh-CN", "zh-CN or en", pattern=r"^(zh-CN|en)$")
    http_bind: BindTo = _setting(Bind("127.0.0.1", 8081), "host:port")
    grpc_bind: BindTo = _setting(Bind("127.0.0.1", 50051), "host:port")
    max_queue: int = _setting(100000, "a whole number, 1 or more", ge=1)
    api_keys: Keys = _setting((), "keys, comma-separated", secret=True)
    allow_plaintext: Flag = _setting(False, _FLAG)
    metrics_bind: BindTo = _setting(Bind("127.0.0.1", 9464), "host:port; port 0 picks a free one")
    demo: Flag = _setting(False, _FLAG)
    demo_inbox: WebURL = _setting("", _WEB)
    demo_flower: WebURL = _setting("", _WEB)

    @field_validator("redis_url")
    @classmethod
    def _no_database(cls, value: str) -> str:
        if is_sentinel(value):
            if SentinelURL.parse(value).database:
                raise ValueError
            return value
        parts = urlsplit(value)
        if parts.path not in {"", "/", "/0"}:
            raise ValueError
        return value

    @field_validator("queue")
    @classmethod
    def _not_taken(cls, value: str) -> str:
        if value in _NO_QUEUES:
            raise ValueError
        return value

    def model_post_init(self, _context: object) -> None:
        """Derive what was not given: the three databases from the base URL."""
        for name, number in _DATABASES.items():
            if not getattr(self, name):
                object.__setattr__(self, name, _database(self.redis_url, number))

    def shown(self) -> dict[str, str]:
        """Every setting by its environment name, as it may be shown: passwords and keys masked."""
        return {f"{PREFIX}{name.upper()}": self._show(name) for name in type(self).model_fields}

    def _show(self, name: str) -> str:
        value = getattr(self, name)
        match name:
            case "redis_url" | "codes_url" | "broker_url" | "results_url":
                return mask_url(value)
            case "relays":
                return ",".join(relay.masked() for relay in value)
            case "mail_from":
                return f"{value.name} <{value.mailbox}>" if value.name else str(value.mailbox)
            case "api_keys":
                return ",".join(MASK for _ in value)
        if isinstance(value, bool):
            return str(int(value))
        return f"{value:g}" if isinstance(value, float) else str(value)


NAMES: Final = frozenset(
    f"{PREFIX}{name.upper()}{suffix}" for name in (*Settings.model_fields, "config") for suffix in ("", "_FILE")
)


def load(environ: dict[str, str] | None = None, *, dotenv: Path | None = _DOTENV) -> Settings:
    """The settings in force: the environment over `.env` over `VERIFY_CONFIG` over the defaults.

    Raises `BadSetting` with one line that names the setting, its value unless that is a secret, and what is allowed.
    """
    given = dict(os.environ) if environ is None else environ
    below = from_dotenv(dotenv) if dotenv else {}
    config = _value_of(f"{PREFIX}CONFIG", given, below)
    values = from_config = _from_config(config) if config else {}
    for name in Settings.model_fields:
        value = _value_of(f"{PREFIX}{name.upper()}", given, below)
        if value is not None:
            values = {**values, name: value}
    try:
        return Settings.model_validate(values)
    except ValidationError as exc:
        raise _explain(exc, values, from_config) from None


def _database(base: str, number: int) -> str:
    if is_sentinel(base):
        return str(SentinelURL.parse(base).with_database(number))
    parts = urlsplit(base)
    return urlunsplit((parts.scheme, parts.netloc, f"/{number}", parts.query, ""))


def load_or_exit() -> Settings:
    """`load()` for a process' start: a bad setting ends it with one line on stderr; a misspelt name gets one, once."""
    try:
        found = load()
    except BadSetting as exc:
        _stop(str(exc))
    given = {*os.environ, *from_dotenv()}
    for name, meant in misspelt(given - _told, NAMES, PREFIX):
        _told.add(name)
        sys.stderr.write(f"{name} is not a setting and does nothing; is {meant} meant?\n")
    return found


def _stop(line: str) -> NoReturn:
    sys.stderr.write(f"{line}\n")
    raise SystemExit(2)


def _value_of(name: str, *sources: dict[str, str]) -> str | None:
    """What the first source that names the setting says; a source may name a file instead."""
    for given in sources:
        if name not in given and f"{name}_FILE" not in given:
            continue
        # An empty value is what compose and shells make of an unset one; an empty file is a mistake.
        value, path = given.get(name), given.get(f"{name}_FILE")
        if value and path:
            raise BadSetting(f"{name} and {name}_FILE are both set; set one of them")
        return _read(path, name) if path else value or None
    return None


def _read(path: str, name: str) -> str:
    try:
        return Path(path).read_text(encoding=_TEXT).strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise BadSetting(
            f"{name}_FILE: {path!r} cannot be read ({_reason(exc)}); allowed: a readable text file"
        ) from exc


def from_dotenv(path: Path = _DOTENV) -> dict[str, str]:
    """What the file says, if there is one. Raises `BadSetting`."""
    if not path.is_file():
        return {}
    try:
        return {name: value for name, value in dotenv_values(path).items() if value is not None}
    except (OSError, UnicodeDecodeError) as exc:  # such as one that a Windows shell wrote, in UTF-16
        raise BadSetting(f"{path} cannot be read ({_reason(exc)}); allowed: a readable text file in UTF-8") from None


def _from_config(path: str) -> dict[str, Any]:
    """Settings from the original server's config.json: `email` and `redis`; its `mysql` is not needed."""
    try:
        config = json.loads(Path(path).read_text(encoding=_TEXT))
        email, redis = config.get("email", {}), config.get("redis", {})
        values: dict[str, Any] = {}
        if redis:
            secret = redis.get("passwd")
            who = f":{quote(str(secret), safe='')}@" if secret else ""
            values["redis_url"] = f"redis://{who}{_host(redis.get('host', '127.0.0.1'))}:{int(redis.get('port', 6379))}"
        if email:
            host, port = email.get("host", "smtp.163.com"), int(email.get("port", 465))
            # The original always speaks TLS from the first byte; port 587 is STARTTLS by RFC 8314, 3.3.
            scheme = "smtp+starttls" if port == RELAY_PORTS["smtp+starttls"] else "smtps"
            user, password = _text(email["user"]), _text(email["pass"])
            values["relays"] = f"{scheme}://{quote(user, safe='')}:{quote(password, safe='')}@{_host(host)}:{port}"
            values["mail_from"] = user
    except (OSError, ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as exc:
        raise BadSetting(
            f"{PREFIX}CONFIG: {path!r} cannot be used ({_reason(exc)}); allowed: a config.json with"
            " email.user, email.pass, redis.host, redis.port, redis.passwd"
        ) from None
    return values


def _text(value: object) -> str:
    """A value that must be there; the original takes numbers too."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError
    return str(value)


def _host(value: object) -> str:
    """A host as it stands in a URL."""
    host = _text(value)
    if any(c in host for c in "@/?#[]"):
        raise ValueError
    return f"[{host}]" if ":" in host else host


def _reason(exc: Exception) -> str:
    """Why, without what was in the file."""
    if isinstance(exc, OSError):
        return exc.strerror or type(exc).__name__
    return f"{exc.args[0]} is missing" if isinstance(exc, KeyError) else "not in that shape"


def _explain(exc: ValidationError, values: dict[str, Any], from_config: dict[str, Any]) -> BadSetting:
    name = str(exc.errors(include_input=False)[0]["loc"][0])
    field = Settings.model_fields[name]
    extra = field.json_schema_extra
    secret = isinstance(extra, dict) and extra["secret"]
    value = "the value" if secret else repr(values[name])
    origin = f" (from {PREFIX}CONFIG)" if values[name] is from_config.get(name) else ""
    return BadSetting(f"{PREFIX}{name.upper()}{origin}: {value} is not allowed; allowed: {field.description}")
