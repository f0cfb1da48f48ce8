"""Settings: the environment, `.env`, `*_FILE` secrets and the original server's config.json in one frozen object."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import quote

from dotenv import dotenv_values
from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from producer.contract import DEAD_LETTERS
from producer.errors import BadSetting
from producer.setting_types import (
    RELAY_PORTS,
    ApiKeys,
    BaseRedisURL,
    Bind,
    BindTo,
    FilePath,
    Flag,
    From,
    Password,
    RedisURL,
    RelayURL,
    RelayURLs,
    Seconds,
    Sender,
    WebURL,
    with_database,
    with_password,
)

PREFIX: Final = "VERIFY_"
# As a share of equal letters: RELAY is as near to RELAYS as 0.91, HTTP_PORT to HTTP_BIND as 0.56.
NEAR: Final = 0.85

_DOTENV: Final = Path(".env")
_TEXT: Final = "utf-8-sig"  # some editors begin a file with a byte order mark
_DATABASES: Final = {"codes_url": 0, "broker_url": 1, "results_url": 2}
# Keys beside the queue in its database: dead letters, and kombu's own.
_NO_QUEUES: Final = frozenset({DEAD_LETTERS, "unacked", "unacked_index", "unacked_mutex"})

_REDIS = (
    "redis://host:port or rediss://host:port, with user:password@ before the host if needed,"
    " or redis+sentinel://host:port,host:port/service"
)
_WEB = "http://host:port or https://host:port, with a path if needed, without user or password"
_FLAG = "0 or 1"


def _setting(default: Any, allowed: str, **limits: Any) -> Any:
    return Field(default, description=allowed, **limits)


def _free_name(queue: str) -> str:
    if queue in _NO_QUEUES:
        raise ValueError
    return queue


def _not_below_code_length(length: int, info: ValidationInfo) -> int:
    if length < info.data.get("code_length", 0):  # absent if that is not allowed itself
        raise ValueError
    return length


class Settings(BaseSettings):
    """The settings in force. Each field is `VERIFY_<NAME>`; times are in seconds.

    `Settings(...)` takes only what it is given, and `load` reads the environment and files.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        enable_decoding=False,  # lists are comma-separated, not JSON
        frozen=True,
        extra="forbid",
        validate_default=False,
        hide_input_in_errors=True,
    )

    redis_url: BaseRedisURL = _setting("redis://127.0.0.1:6379", f"{_REDIS}, no database but 0")
    redis_password: Password = _setting("", "any text in UTF-8; it takes the place of the password in the URLs")
    codes_url: RedisURL = _setting("", f"{_REDIS}, and /database")
    broker_url: RedisURL = _setting("", f"{_REDIS}, and /database")
    results_url: RedisURL = _setting("", f"{_REDIS}, and /database")
    queue: Annotated[str, AfterValidator(_free_name)] = _setting(
        "verification",
        f"1 to 64 of A-Z a-z 0-9 . _ -, not {DEAD_LETTERS} or unacked",
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
    )
    visibility_timeout: Seconds = _setting(15, "seconds, 1 to 3600", ge=1, le=3600)
    reply_timeout: Seconds = _setting(5, "seconds, above 0 to 300", gt=0, le=300)
    relays: RelayURLs = _setting(
        (RelayURL("smtp", "127.0.0.1", 1025, None, None),),
        f"comma-separated URLs: {'://, '.join(RELAY_PORTS)}://, then user:password@ (percent-encoded) if needed,"
        " then host:port (1 to 65535)",
    )
    relay_connections: int = _setting(256, "a whole number, 1 to 10000", ge=1, le=10000)
    connect_timeout: Seconds = _setting(2, "seconds, above 0 to 300", gt=0, le=300)
    send_timeout: Seconds = _setting(10, "seconds, above 0 to 300", gt=0, le=300)
    mail_from: From = _setting(
        Sender("", "no-reply@example.com"), 'an address, or "Name <address>"; the address in ASCII'
    )
    code_ttl: int = _setting(600, "whole seconds, 1 to 86400", ge=1, le=86400)
    code_length: int = _setting(6, "a whole number, 4 to 12", ge=4, le=12)
    code_max_length: Annotated[int, AfterValidator(_not_below_code_length)] = _setting(
        12, "a whole number, VERIFY_CODE_LENGTH to 12", le=12
    )
    code_min_life: Seconds = _setting(60, "seconds, 0 to 86400", ge=0, le=86400)
    resend_cooldown: Seconds = _setting(10, "seconds, 0 (off) to 86400", ge=0, le=86400)
    max_sends_per_hour: int = _setting(20, "a whole number, 0 (off) to 100000", ge=0, le=100000)
    max_sends_per_client: int = _setting(60, "a whole number, 0 (off) to 100000", ge=0, le=100000)
    max_sends_total: int = _setting(0, "a whole number, 0 (off) to 10000000", ge=0, le=10000000)
    fold_aliases: Flag = _setting(False, _FLAG)
    max_attempts: int = _setting(5, "a whole number, 1 to 1000", ge=1, le=1000)
    give_up_after: Seconds = _setting(300, "seconds, 1 to 3600", ge=1, le=3600)
    # The worker checks that it has templates for it.
    locale: str = _setting("zh-CN", "a language tag, such as en", pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{1,8})*$")
    http_bind: BindTo = _setting(Bind("127.0.0.1", 8081), "host:port")
    grpc_bind: BindTo = _setting(Bind("127.0.0.1", 50051), "host:port")
    max_queue: int = _setting(100000, "a whole number, 1 or more", ge=1)
    api_keys: ApiKeys = _setting(
        (),
        "comma-separated name:key; the name has 1 to 32 of A-Z a-z 0-9 . _ -, the key 16 to 256 visible ASCII"
        " characters without a comma, and no key stands there twice",
    )
    tls_cert: FilePath = _setting("", "path of a PEM file with the server's certificate and its chain")
    tls_key: FilePath = _setting("", "path of a PEM file with that certificate's key, unencrypted")
    tls_client_ca: FilePath = _setting("", "path of a PEM file with the certificates that vouch for clients")
    allow_plaintext: Flag = _setting(False, _FLAG)
    metrics_bind: BindTo = _setting(Bind("127.0.0.1", 9464), "host:port; port 0 picks a free one")
    demo: Flag = _setting(False, _FLAG)
    demo_inbox: WebURL = _setting("", _WEB)
    demo_flower: WebURL = _setting("", _WEB)

    @classmethod
    def settings_customise_sources(  # type: ignore[override]
        cls, *_: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **__: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_not_given(cls, values: dict[str, Any]) -> dict[str, Any]:
        # Compose and shells turn an unset variable into an empty one.
        return {name: value for name, value in values.items() if value != ""}

    def model_post_init(self, _context: object) -> None:
        """Derive the database URLs that are not given from the base URL, and put the password into all of them."""
        urls = {"redis_url": self.redis_url}
        for name, number in _DATABASES.items():
            urls[name] = getattr(self, name) or with_database(self.redis_url, number)
        for name, url in urls.items():
            object.__setattr__(self, name, with_password(url, self.redis_password) if self.redis_password else url)

    def shown(self) -> dict[str, str]:
        """Every setting by its environment name, as it may be shown: secrets are masked."""
        return {f"{PREFIX}{name.upper()}": str(value) for name, value in self.model_dump().items()}


NAMES: Final = tuple(f"{PREFIX}{name.upper()}" for name in (*Settings.model_fields, "config"))


def load(environ: Mapping[str, str] | None = None, *, dotenv: Path | None = _DOTENV) -> Settings:
    """The settings in force: the environment over `.env` over `VERIFY_CONFIG` over the defaults.

    Raises `BadSetting` with one line that names the setting, its value unless that is a secret, and what is allowed.
    """
    given = _given(os.environ if environ is None else environ)
    given = _given(from_dotenv(dotenv) if dotenv else {}) | given
    config = given.get(f"{PREFIX}CONFIG")
    source = EnvSettingsSource(Settings)
    source.env_vars = {name.lower(): value for name, value in given.items()}  # the names that it looks for
    try:
        return Settings(**(_from_config(config) if config else {}) | source())
    except ValidationError as exc:
        error = exc.errors()[0]
        name = f"{PREFIX}{str(error['loc'][0]).upper()}"
        origin = "" if name in given else f" (from {PREFIX}CONFIG)"
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, BadSetting):
            raise BadSetting(f"{name}{origin}: {cause}") from None
        raise _not_allowed(name, str(error["input"]), origin) from None


def load_or_exit() -> Settings:
    """`load()` for the start of a process, which a bad setting ends with one line; unknown names are reported."""
    with exit_on_bad_setting():
        settings = load()
        given = {*os.environ, *from_dotenv()}
    _report_unknown(given)
    return settings


@contextmanager
def exit_on_bad_setting() -> Iterator[None]:
    """End the process with status 2 and the one line of a `BadSetting`."""
    try:
        yield
    except BadSetting as exc:
        sys.stderr.write(f"{exc}\n")
        raise SystemExit(2) from None


def _report_unknown(given: set[str]) -> None:
    """Write a line about each of `given` that looks like a setting and is not."""
    known = {*NAMES, *(f"{name}_FILE" for name in NAMES)}
    for name in sorted(given - known):
        if name.startswith(PREFIX):
            words = {each.removeprefix(PREFIX) for each in known}
            near = get_close_matches(name.removeprefix(PREFIX), words, 1, NEAR)
            hint = f"; did you mean {PREFIX}{near[0]}?" if near else ""
            sys.stderr.write(f"{name} is not a setting and does nothing{hint}\n")


def from_dotenv(path: Path = _DOTENV) -> dict[str, str]:
    """The variables of the file; none if it does not exist. Raises `BadSetting`."""
    if not path.is_file():
        return {}
    try:
        return {name: value for name, value in dotenv_values(path).items() if value is not None}
    except (OSError, UnicodeDecodeError) as exc:  # such as UTF-16, from a Windows shell
        raise BadSetting(f"{path} cannot be read ({_reason(exc)}); allowed: a readable text file in UTF-8") from None


def _given(variables: Mapping[str, str]) -> dict[str, str]:
    """The settings among `variables`, by name, read from the file that `VERIFY_<NAME>_FILE` names if there is one.

    One that is not mentioned is left out. An empty one counts as not given, and hides the value of a lower source.
    """
    given = {}
    for name in NAMES:
        value, path = variables.get(name), variables.get(f"{name}_FILE")
        if value and path:
            raise BadSetting(f"{name} and {name}_FILE are both set; set one of them")
        if path:
            given[name] = _read(path, name)
        elif value is not None or path is not None:
            given[name] = value or ""
    return given


def _read(path: str, name: str) -> str:
    try:
        text = Path(path).read_text(encoding=_TEXT)
    except (OSError, UnicodeDecodeError) as exc:
        raise BadSetting(
            f"{name}_FILE: {path!r} cannot be read ({_reason(exc)}); allowed: a readable text file"
        ) from None
    # Spaces may be part of a password; the line break at the end, which editors add, is not.
    text = text.rstrip("\r\n") if name == f"{PREFIX}REDIS_PASSWORD" else text.strip()
    if not text and name != f"{PREFIX}CONFIG":
        raise _not_allowed(name, text)
    return text


def _from_config(path: str) -> dict[str, str]:
    """Settings from `email` and `redis` of the original server's config.json."""
    try:
        config = json.loads(Path(path).read_text(encoding=_TEXT))
        email, redis = config.get("email", {}), config.get("redis", {})
        values: dict[str, str] = {}
        if redis:
            secret = redis.get("passwd")
            who = f":{quote(str(secret), safe='')}@" if secret else ""
            values["redis_url"] = f"redis://{who}{_host(redis.get('host', '127.0.0.1'))}:{int(redis.get('port', 6379))}"
        if email:
            host, port = email.get("host", "smtp.163.com"), int(email.get("port", 465))
            # The original server uses implicit TLS at every port; RFC 8314, 3.3 has STARTTLS at 587.
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
    """A text; the original server takes numbers, too."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise TypeError
    return str(value)


def _host(value: object) -> str:
    host = _text(value)
    if any(c in host for c in "@/?#[]"):
        raise ValueError
    return f"[{host}]" if ":" in host else host


def _reason(exc: Exception) -> str:
    """The reason, without the content of the file."""
    if isinstance(exc, OSError):
        return exc.strerror or type(exc).__name__
    return f"{exc.args[0]} is missing" if isinstance(exc, KeyError) else "not in that shape"


def _not_allowed(name: str, value: str, origin: str = "") -> BadSetting:
    field = Settings.model_fields[name.removeprefix(PREFIX).lower()]
    shown = repr(value) if field.repr else "the value"
    return BadSetting(f"{name}{origin}: {shown} is not allowed; allowed: {field.description}")
