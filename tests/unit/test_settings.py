"""Settings: where they come from, what is allowed, what is shown, and the errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydantic import ValidationError
from redis.connection import parse_url
from support.passwords import PASSWORDS

from producer import settings
from producer.errors import BadSetting
from producer.setting_types import SentinelURL
from producer.settings import Settings

SECRET = "pa55:w@rd/"
QUOTED = "pa55%3Aw%40rd%2F"

# As `shown` shows them: the default, of the contract's table, and another value.
VALUES = {
    "VERIFY_REDIS_URL": ("redis://127.0.0.1:6379", "rediss://***@redis.internal:6380"),
    "VERIFY_REDIS_PASSWORD": ("", "***"),
    "VERIFY_CODES_URL": ("redis://127.0.0.1:6379/0", "redis://***@codes:1/7"),
    "VERIFY_BROKER_URL": ("redis://127.0.0.1:6379/1", "redis://***@broker:2/8"),
    "VERIFY_RESULTS_URL": ("redis://127.0.0.1:6379/2", "redis://***@results:3/9"),
    "VERIFY_QUEUE": ("verification", "other.queue"),
    "VERIFY_VISIBILITY_TIMEOUT": ("15", "30"),
    "VERIFY_REPLY_TIMEOUT": ("5", "2.5"),
    "VERIFY_RELAYS": ("smtp://127.0.0.1:1025", "smtps://one:465,smtp+starttls://two:587"),
    "VERIFY_RELAY_CONNECTIONS": ("256", "4"),
    "VERIFY_CONNECT_TIMEOUT": ("2", "0.5"),
    "VERIFY_SEND_TIMEOUT": ("10", "3"),
    "VERIFY_MAIL_FROM": ("no-reply@example.com", "Verify <verify@example.org>"),
    "VERIFY_CODE_TTL": ("600", "300"),
    "VERIFY_CODE_LENGTH": ("6", "8"),
    "VERIFY_CODE_MAX_LENGTH": ("12", "10"),
    "VERIFY_CODE_MIN_LIFE": ("60", "30"),
    "VERIFY_RESEND_COOLDOWN": ("10", "0"),
    "VERIFY_MAX_SENDS_PER_HOUR": ("20", "0"),
    "VERIFY_MAX_SENDS_PER_CLIENT": ("60", "0"),
    "VERIFY_MAX_SENDS_TOTAL": ("0", "100000"),
    "VERIFY_FOLD_ALIASES": ("0", "1"),
    "VERIFY_MAX_ATTEMPTS": ("5", "3"),
    "VERIFY_GIVE_UP_AFTER": ("300", "60"),
    "VERIFY_LOCALE": ("zh-CN", "en"),
    "VERIFY_HTTP_BIND": ("127.0.0.1:8081", "0.0.0.0:80"),
    "VERIFY_GRPC_BIND": ("127.0.0.1:50051", "[::1]:50052"),
    "VERIFY_MAX_QUEUE": ("100000", "10"),
    "VERIFY_API_KEYS": ("", "app:***,shop:***"),
    "VERIFY_TLS_CERT": ("", "/etc/verify/cert.pem"),
    "VERIFY_TLS_KEY": ("", "/etc/verify/key.pem"),
    "VERIFY_TLS_CLIENT_CA": ("", "/etc/verify/clients.pem"),
    "VERIFY_ALLOW_PLAINTEXT": ("0", "1"),
    "VERIFY_METRICS_BIND": ("127.0.0.1:9464", "127.0.0.1:0"),
    "VERIFY_DEMO": ("0", "1"),
    "VERIFY_DEMO_INBOX": ("", "http://mailpit:8025"),
    "VERIFY_DEMO_FLOWER": ("", "https://flower.internal/watch"),
}
KEYS = "app:0123456789abcdef,shop:123456789abcdefg"
DEFAULTS = {name: default for name, (default, _) in VALUES.items()}
OTHERS = {name: other for name, (_, other) in VALUES.items()}


def load(**environ: str) -> Settings:
    return settings.load({f"VERIFY_{name}": value for name, value in environ.items()}, dotenv=None)


def problem_of(**environ: str) -> str:
    with pytest.raises(BadSetting) as caught:
        load(**environ)
    return str(caught.value)


def test_with_nothing_set_the_defaults_of_the_contract_are_in_force() -> None:
    assert load().shown() == DEFAULTS


def test_each_setting_is_taken_from_the_environment() -> None:
    assert settings.load(OTHERS | {"VERIFY_API_KEYS": KEYS}, dotenv=None).shown() == OTHERS


def test_other_variables_are_ignored() -> None:
    assert settings.load({"VERIFY_UNKNOWN": "x", "PATH": "/bin"}, dotenv=None) == load()


def test_an_empty_value_counts_as_not_given() -> None:
    assert settings.load(dict.fromkeys(DEFAULTS, ""), dotenv=None).shown() == DEFAULTS


BAD_VALUES = {
    "REDIS_URL": [
        *("http://host", "redis://", "redis://[::1", "redis://host:port", "redis://host:0", "REDIS://host"),
        *("rediss://host?ssl_cert_reqs=perhaps", "rediss://host?ssl_cert_reqs="),
        *("rediss+sentinel://host/service?ssl_cert_reqs=perhaps", "redis://host?socket_timeout=never"),
        *("redis+sentinel://host/service?socket_timeout=never", "redis://host/1", "redis://host?db=1"),
        *("redis://host\n", "redis://ho st", "redis+sentinel://one,two", "redis+sentinel://one,two/"),
        *("redis+sentinel:///service", "redis+sentinel://one,/service", "redis+sentinel://one:0/service"),
        *("redis+sentinel://one:port/service", "redis+sentinel://one/service/1", "redis+sentinel://one/service?db=1"),
        "redis+sentinel://one/service#fragment",
    ],
    "REDIS_PASSWORD": ["not UTF-8: \udcff"],
    "CODES_URL": ["redis+sentinel://one/service/first", "redis://host/first", "redis://host/1?db=3"],
    "BROKER_URL": ["sentinel://one/service", "amqp://host"],
    "RESULTS_URL": ["host"],
    "QUEUE": [
        *("two words", "q" * 65, "queue\n"),
        "verification.dead",
    ],
    "VISIBILITY_TIMEOUT": ["0", "3601", "nan"],
    "REPLY_TIMEOUT": ["0", "inf", "5 s"],
    "RELAYS": [
        *("host:25", "http://host", "smtp://", "smtp://host:0", "smtp://host:99999", "smtp://host/path"),
        *("smtp://host?query", "smtp://host#fragment", "smtp://ho st", "smtp://host\r\n.example.com", "smtp://host,"),
        *("smtp://user@host", "smtp://user:a%0d%0ab@host"),
    ],
    "RELAY_CONNECTIONS": ["0", "1.5"],
    "CONNECT_TIMEOUT": ["-1"],
    "SEND_TIMEOUT": ["0"],
    "MAIL_FROM": [
        *("nobody", "Name <a@example.com", "a@example.com, b@example.com"),
        *("Name\r\nBcc: b@example.com <a@example.com>", "用户@example.com"),
    ],
    "CODE_TTL": ["0", "0.5", "ten"],
    "CODE_LENGTH": ["3", "13"],
    "CODE_MAX_LENGTH": ["5", "13", "six"],
    "CODE_MIN_LIFE": ["-1"],
    "RESEND_COOLDOWN": ["-1"],
    "MAX_SENDS_PER_HOUR": ["-1", "many"],
    "MAX_SENDS_PER_CLIENT": ["-1"],
    "MAX_SENDS_TOTAL": ["-1", "10000001"],
    "FOLD_ALIASES": ["yes"],
    "MAX_ATTEMPTS": ["0"],
    "GIVE_UP_AFTER": ["0"],
    "LOCALE": ["no tag", "en\n"],
    "HTTP_BIND": ["127.0.0.1", ":80", "::1:80", "127.0.0.1:80/path", "127.0.0.1:80#x"],
    "GRPC_BIND": ["127.0.0.1:70000"],
    "METRICS_BIND": ["port"],
    "MAX_QUEUE": ["0"],
    "API_KEYS": [
        " , ",
        "0123456789abcdef",
        "app:0123456789abcde",
        "app:0123456789\nabcdef",
        "app:0123456789 abcdef",
        "app:pässword-pässword",
        "the app:0123456789abcdef",
        ":0123456789abcdef",
        f"app:0123456789abcdef,{'s' * 33}:0123456789abcdeg",
        "app:0123456789abcdef,shop:0123456789abcdef",
    ],
    "TLS_CERT": ["one\ntwo"],
    "TLS_KEY": ["\x7f"],
    "TLS_CLIENT_CA": ["one\ntwo"],
    "ALLOW_PLAINTEXT": ["yes"],
    "DEMO": ["2"],
    "DEMO_INBOX": ["mailpit:8025", "http://user:pass@mailpit:8025", "http://mailpit:8025/?q"],
    "DEMO_FLOWER": ["javascript:alert(1)", "http://"],
}
BAD = [(name, value) for name, values in BAD_VALUES.items() for value in values]
SECRET_SETTINGS = {"REDIS_URL", "REDIS_PASSWORD", "CODES_URL", "BROKER_URL", "RESULTS_URL", "RELAYS", "API_KEYS"}


@pytest.mark.parametrize(("name", "value"), BAD)
def test_the_error_for_a_bad_value_names_setting_value_and_what_is_allowed(name: str, value: str) -> None:
    line = problem_of(**{name: value})
    shown = "the value" if name in SECRET_SETTINGS else re.escape(repr(value))
    assert re.fullmatch(rf"VERIFY_{name}: {shown} is not allowed; allowed: .+", line)


def test_a_bad_value_of_every_setting_is_tested() -> None:
    assert {f"VERIFY_{name}" for name in BAD_VALUES} == set(DEFAULTS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("REDIS_URL", f"redis://:{QUOTED}@host/1"),
        ("CODES_URL", f"http://:{QUOTED}@host"),
        ("CODES_URL", f"redis+sentinel://:{QUOTED}@one:x/service?sentinel_password=pa55"),
        ("RELAYS", f"http://user:{QUOTED}@host"),
        ("RELAYS", f"smtp://user:{SECRET}@host:x"),
        ("API_KEYS", "app:pa55"),
        ("API_KEYS", "pa55pa55pa55pa55"),
        ("API_KEYS", "app:pa55pa55pa55pa55,shop:pa55pa55pa55pa55"),
    ],
)
def test_the_error_for_a_bad_value_shows_no_secret(name: str, value: str) -> None:
    assert "pa55" not in problem_of(**{name: value})


PLAIN = "smtp://anna:pa55@"


@pytest.mark.parametrize("host", ["relay.example.com", "10.0.0.1", "[2001:db8::1]:25", "localhost.example.com"])
@pytest.mark.parametrize("source", ["environment", "file", "dotenv"])
def test_a_password_goes_unencrypted_to_no_other_host(host: str, source: str, tmp_path: Path) -> None:
    value = f"smtps://relay.example.org,{PLAIN}{host}"
    path = tmp_path / "given"
    path.write_text(f"VERIFY_RELAYS={value}" if source == "dotenv" else value)
    name = "VERIFY_RELAYS_FILE" if source == "file" else "VERIFY_RELAYS"
    environ = {} if source == "dotenv" else {name: str(path) if source == "file" else value}
    with pytest.raises(BadSetting, match=r"VERIFY_RELAYS: smtp:// .+ smtp\+starttls://") as caught:
        settings.load(environ, dotenv=path if source == "dotenv" else None)
    assert "pa55" not in str(caught.value)
    assert "anna" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:25", "127.0.0.1", "127.1.2.3:2525", "[::1]:25"])
def test_a_password_may_go_unencrypted_to_this_host(host: str) -> None:
    [relay] = load(RELAYS=f"{PLAIN}{host}").relays
    assert (relay.user, relay.password) == ("anna", "pa55")


@pytest.mark.parametrize("url", ["smtp://relay.example.com", f"smtp+starttls{PLAIN[4:]}host", f"smtps{PLAIN[4:]}host"])
def test_without_a_password_or_with_tls_a_relay_may_be_anywhere(url: str) -> None:
    assert len(load(RELAYS=url).relays) == 1


@pytest.mark.parametrize("port", [25, 465, 587, 2525])
def test_the_original_config_never_sends_its_password_unencrypted(port: int, tmp_path: Path) -> None:
    email = {"user": "anna@example.com", "pass": "pa55", "host": "relay.example.com", "port": port}
    [relay] = load(CONFIG=write_config(tmp_path, email=email)).relays
    assert relay.scheme in {"smtps", "smtp+starttls"}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_each_setting_can_come_from_a_file(name: str, tmp_path: Path) -> None:
    value = KEYS if name == "VERIFY_API_KEYS" else OTHERS[name]
    (tmp_path / "secret").write_text(f"{value}\n")
    found = settings.load({f"{name}_FILE": str(tmp_path / "secret")}, dotenv=None)
    assert found.shown()[name] == OTHERS[name]


def test_the_path_of_the_original_config_can_come_from_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "path").write_text(write_config(tmp_path, **ORIGINAL) + "\n")
    assert load(CONFIG_FILE=str(tmp_path / "path")) == load(CONFIG=str(tmp_path / "config.json"))


@pytest.mark.parametrize("name", sorted(DEFAULTS))
def test_an_empty_file_is_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("\n")
    with pytest.raises(BadSetting, match=f"^{name}: .+ is not allowed; allowed: "):
        settings.load({f"{name}_FILE": str(tmp_path / "secret")}, dotenv=None)


def test_a_setting_and_its_file_cannot_both_be_given(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("one")
    line = problem_of(API_KEYS="two", API_KEYS_FILE=str(tmp_path / "secret"))
    assert "VERIFY_API_KEYS and VERIFY_API_KEYS_FILE" in line
    assert "\n" not in line


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_an_unreadable_file_is_an_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    line = problem_of(API_KEYS_FILE=str(path))
    assert line.startswith(f"VERIFY_API_KEYS_FILE: {str(path)!r} cannot be read")
    assert "\n" not in line


def test_the_three_databases_follow_the_base_url_with_its_user_and_password() -> None:
    found = load(REDIS_URL=f"rediss://user:{QUOTED}@host:6380?ssl_cert_reqs=none")
    base = f"rediss://user:{QUOTED}@host:6380"
    assert found.codes_url == f"{base}/0?ssl_cert_reqs=none"
    assert found.broker_url == f"{base}/1?ssl_cert_reqs=none"
    assert found.results_url == f"{base}/2?ssl_cert_reqs=none"


@pytest.mark.parametrize("word", ["none", "optional", "required"])
def test_celerys_names_for_certificate_checks_are_understood(word: str) -> None:
    given = f"rediss://:CERT_NONE@host?ssl_cert_reqs=CERT_{word.upper()}&ssl_ca_certs=/CERT_NONE"
    assert load(REDIS_URL=given).codes_url == f"rediss://:CERT_NONE@host/0?ssl_cert_reqs={word}&ssl_ca_certs=/CERT_NONE"


def test_the_three_databases_follow_a_sentinel_url_with_all_its_parts() -> None:
    found = load(
        REDIS_URL=f"rediss+sentinel://user:{QUOTED}@one,two:1,[::1]/s%20x?sentinel_password=p%26&ssl_cert_reqs=none"
    )
    read = [SentinelURL.parse(url) for url in (found.codes_url, found.broker_url, found.results_url)]
    assert [url.database for url in read] == [0, 1, 2]
    for url in read:
        assert url.sentinels == (("one", 26379), ("two", 1), ("::1", 26379))
        assert (url.service, url.tls, url.sentinel_user, url.sentinel_password) == ("s x", True, None, "p&")
        assert url.server_url("10.0.0.1", 6380).startswith(f"rediss://user:{QUOTED}@10.0.0.1:6380/{url.database}?ssl")


def test_a_sentinel_url_is_shown_with_all_hosts_and_no_secret() -> None:
    found = load(REDIS_URL=f"redis+sentinel://:{QUOTED}@one:1,[::1]:2/service?sentinel_password=pa55").shown()
    shown = "redis+sentinel://***@one:1,[::1]:2/service"
    assert found["VERIFY_REDIS_URL"] == f"{shown}?sentinel_password=***"
    assert found["VERIFY_RESULTS_URL"] == f"{shown}/2?sentinel_password=***"


@pytest.mark.parametrize("password", PASSWORDS)
def test_the_password_replaces_those_of_all_urls(password: str) -> None:
    sentinel = "redis+sentinel://anna:old@one,two/service/4?sentinel_password=own"
    found = load(REDIS_PASSWORD=password, REDIS_URL="redis://h", CODES_URL="rediss://anna:old@h/3", BROKER_URL=sentinel)
    for url, user in ((found.redis_url, None), (found.codes_url, "anna"), (found.results_url, None)):
        read = parse_url(url)  # type: ignore[no-untyped-call]  # redis-py's
        assert (read["password"], read["host"]) == (password, "h")
        assert (read.get("username") or None) == user
    broker = SentinelURL.parse(found.broker_url)
    assert (broker.user, broker.password, broker.sentinel_password) == ("anna", password, "own")
    shown = found.shown()
    assert shown["VERIFY_REDIS_PASSWORD"] == "***"
    assert shown["VERIFY_CODES_URL"] == "rediss://***@h/3"
    assert password not in repr(found)


def test_a_password_file_keeps_its_spaces_and_loses_its_line_break(tmp_path: Path) -> None:
    (tmp_path / "password").write_text(" pa55 \r\n")
    found = load(REDIS_PASSWORD_FILE=str(tmp_path / "password"))
    assert found.broker_url == "redis://:%20pa55%20@127.0.0.1:6379/1"


def test_the_password_replaces_the_old_configs(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"redis": {"host": "h", "passwd": "old"}}))
    found = load(CONFIG=str(tmp_path / "config.json"), REDIS_PASSWORD="new")
    assert found.codes_url == "redis://:new@h:6379/0"


def test_one_of_the_three_can_be_elsewhere() -> None:
    found = load(REDIS_URL="redis://host", RESULTS_URL="redis://other/5")
    assert (found.broker_url, found.results_url) == ("redis://host/1", "redis://other/5")


def test_relays_are_read_in_order_with_percent_encoded_users_and_passwords() -> None:
    one, two, three = load(RELAYS=f"smtps://u%40x:{QUOTED}@one, smtp+starttls://two ,smtp://[::1]:2525").relays
    assert one == ("smtps", "one", 465, "u@x", SECRET)
    assert two == ("smtp+starttls", "two", 587, None, None)
    assert three == ("smtp", "::1", 2525, None, None)


def test_the_sender_may_have_a_display_name() -> None:
    assert load(MAIL_FROM='"Chat, Inc." <verify@example.org>').mail_from == ("Chat, Inc.", "verify@example.org")
    assert load(MAIL_FROM="验证码 <verify@example.org>").mail_from == ("验证码", "verify@example.org")
    assert load(MAIL_FROM="verify@example.org").mail_from == ("", "verify@example.org")


def test_api_keys_are_separated_by_commas() -> None:
    found = load(API_KEYS=" app:0123456789abcdef, a.b-c_D:#0:=/+~!0123456789 ,").api_keys
    assert found == (("app", "0123456789abcdef"), ("a.b-c_D", "#0:=/+~!0123456789"))


def test_a_name_may_have_two_keys_while_one_replaces_the_other() -> None:
    found = load(API_KEYS="app:0123456789abcdef,app:123456789abcdefg").api_keys
    assert [(each.name, each.key[0]) for each in found] == [("app", "0"), ("app", "1")]


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load().queue = "other"


@pytest.mark.parametrize(
    "environ",
    [
        {"REDIS_URL": f"redis://user:{QUOTED}@host"},
        {"CODES_URL": f"redis://:{QUOTED}@host/0?password=pa55"},
        {"REDIS_URL": f"redis+sentinel://user:{QUOTED}@one,two:1,[::1]:2/service?sentinel_password=pa55"},
        {"RELAYS": f"smtps://pa55user:{QUOTED}@host"},
        {"API_KEYS": "app:pa55pa55pa55pa55,shop:pa55pa55pa55pa56"},
    ],
)
def test_no_secret_is_shown(environ: dict[str, str]) -> None:
    found = load(**environ)
    assert "pa55" not in repr(found) + str(found) + repr(found.relays) + str(found.relays) + json.dumps(found.shown())


def write_config(directory: Path, **content: Any) -> str:
    path = directory / "config.json"
    path.write_text(json.dumps(content))
    return str(path)


ORIGINAL: dict[str, Any] = {
    "email": {"user": "chat@163.com", "pass": SECRET},
    "mysql": {"host": "db", "port": 3306, "passwd": "x"},
    "redis": {"host": "redis.internal", "port": 6380, "passwd": SECRET},
}


def test_the_original_servers_config_json_is_understood(tmp_path: Path) -> None:
    found = load(CONFIG=write_config(tmp_path, **ORIGINAL))
    assert found.codes_url == f"redis://:{QUOTED}@redis.internal:6380/0"
    assert found.relays == (("smtps", "smtp.163.com", 465, "chat@163.com", SECRET),)
    assert found.mail_from == ("", "chat@163.com")


def test_the_config_may_name_another_mail_server(tmp_path: Path) -> None:
    email = ORIGINAL["email"] | {"host": "mail.example.com", "port": 4650}
    assert load(CONFIG=write_config(tmp_path, email=email)).relays[0][:3] == ("smtps", "mail.example.com", 4650)


def test_the_config_may_have_a_redis_without_password(tmp_path: Path) -> None:
    assert load(CONFIG=write_config(tmp_path, redis={"host": "h", "port": 1})).redis_url == "redis://h:1"


def test_the_environment_wins_over_the_config(tmp_path: Path) -> None:
    path = write_config(tmp_path, **ORIGINAL)
    found = load(CONFIG=path, REDIS_URL="redis://other", MAIL_FROM="verify@example.org")
    assert found.codes_url == "redis://other/0"
    assert found.mail_from.mailbox == "verify@example.org"
    assert found.relays[0].host == "smtp.163.com"


def test_the_config_may_name_hosts_by_their_addresses(tmp_path: Path) -> None:
    email, redis = ORIGINAL["email"] | {"host": "::1"}, ORIGINAL["redis"] | {"host": "::1"}
    found = load(CONFIG=write_config(tmp_path, email=email, redis=redis))
    assert urlsplit(found.codes_url).hostname == found.relays[0].host == "::1"


def test_a_config_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(ORIGINAL), encoding="utf-8-sig")
    assert load(CONFIG=str(path)).mail_from.mailbox == "chat@163.com"


@pytest.mark.parametrize(
    ("part", "name", "value", "setting"),
    [
        ("email", "user", "chat", "VERIFY_MAIL_FROM"),
        ("email", "port", 99999, "VERIFY_RELAYS"),
        ("email", "host", "mail host", "VERIFY_RELAYS"),
        ("email", "pass", "pa55\r\nQUIT", "VERIFY_RELAYS"),
        ("redis", "port", 0, "VERIFY_REDIS_URL"),
        ("redis", "host", "", "VERIFY_REDIS_URL"),
    ],
)
def test_the_error_for_a_bad_value_in_the_config_names_the_config(
    part: str, name: str, value: object, setting: str, tmp_path: Path
) -> None:
    content = ORIGINAL | {part: ORIGINAL[part] | {name: value}}
    line = problem_of(CONFIG=write_config(tmp_path, **content))
    assert re.fullmatch(rf"{setting} \(from VERIFY_CONFIG\): .+ is not allowed; allowed: .+", line)
    assert "pa55" not in line


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no json",
        "[]",
        "null",
        '{"email": {"user": "pa55"}}',
        '{"email": [1]}',
        '{"redis": {"host": "pa55@host"}}',
        '{"redis": {"port": "pa55"}}',
        '{"redis": {"port": 1e999}}',
        "[" * 100_000,
        "\xff",
    ],
)
def test_the_error_for_an_unusable_config_shows_nothing_of_it(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(content, encoding="latin-1")
    line = problem_of(CONFIG=str(path))
    assert line.startswith("VERIFY_CONFIG: ")
    assert "\n" not in line
    assert "pa55" not in line


def test_a_missing_config_is_an_error() -> None:
    assert problem_of(CONFIG="/nowhere/config.json").startswith("VERIFY_CONFIG: '/nowhere/config.json' cannot be used")


@pytest.mark.parametrize(
    "content", ["VERIFY_API_KEYS=pa55\n".encode("utf-16"), b"VERIFY_API_KEYS=pa55\xff\n"], ids=["UTF-16", "none"]
)
def test_the_error_for_an_unreadable_dotenv_file_shows_nothing_of_it(content: bytes, tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_bytes(content)
    with pytest.raises(BadSetting) as caught:
        settings.load({}, dotenv=dotenv)
    assert str(caught.value).startswith(f"{dotenv} cannot be read (")
    assert "pa55" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_environment_wins_over_the_dotenv_file(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("VERIFY_QUEUE=from-file\nVERIFY_CODE_TTL=120 # seconds\n")
    found = settings.load({"VERIFY_QUEUE": "from-environment"}, dotenv=dotenv)
    assert (found.queue, found.code_ttl) == ("from-environment", 120)


def test_the_environment_wins_over_the_dotenv_file_whether_by_value_or_by_file(tmp_path: Path) -> None:
    dotenv, file = tmp_path / ".env", tmp_path / "queue"
    file.write_text("from-file")
    dotenv.write_text(f"VERIFY_QUEUE_FILE={file}\n")
    assert settings.load({"VERIFY_QUEUE": "from-environment"}, dotenv=dotenv).queue == "from-environment"
    dotenv.write_text("VERIFY_QUEUE=from-dotenv\n")
    assert settings.load({"VERIFY_QUEUE_FILE": str(file)}, dotenv=dotenv).queue == "from-file"
    assert settings.load({"VERIFY_QUEUE": ""}, dotenv=dotenv).queue == "verification"


def test_a_missing_dotenv_file_is_no_error(tmp_path: Path) -> None:
    assert settings.load({}, dotenv=tmp_path / ".env").shown() == DEFAULTS


def start(directory: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Load the settings in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from producer.settings import load_or_exit; load_or_exit()"],
        env={**environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_bad_setting_ends_a_process_at_start_with_one_line(tmp_path: Path) -> None:
    done = start(tmp_path, VERIFY_CODE_TTL="ten")
    assert done.returncode == 2
    assert done.stderr == "VERIFY_CODE_TTL: 'ten' is not allowed; allowed: whole seconds, 1 to 86400\n"
    assert done.stdout == ""


def test_unknown_names_are_reported_with_a_near_setting_if_there_is_one(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("VERIFY_MAILFROM=a@example.com\n")
    done = start(
        tmp_path,
        VERIFY_RELAY="smtp://user:pa55@host",
        VERIFY_REDIS_URL_FILES="x",
        VERIFY_CONFIG_FILE="",
        VERIFY_SOMETHING="x",
    )
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "VERIFY_MAILFROM is not a setting and does nothing; did you mean VERIFY_MAIL_FROM?",
        "VERIFY_REDIS_URL_FILES is not a setting and does nothing; did you mean VERIFY_REDIS_URL_FILE?",
        "VERIFY_RELAY is not a setting and does nothing; did you mean VERIFY_RELAYS?",
        "VERIFY_SOMETHING is not a setting and does nothing",
    ]
