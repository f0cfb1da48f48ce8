"""Our Redis URLs for what connects through redis-py: Celery, and our command line. Sentinel URLs too."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from redis import Redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel

from producer.setting_types import SentinelURL, is_sentinel

SENTINEL_TIMEOUT: Final = 0.5  # seconds to connect to one sentinel, and for its answer


class CeleryForm(NamedTuple):
    """A database URL in the form of Celery's settings."""

    url: str
    options: dict[str, Any]  # for the transport options
    tls: dict[str, Any]  # for the setting use_ssl
    user: str | None  # of results; a broker's are in the URL
    password: str | None


def celery_form(url: str, *, login: bool) -> CeleryForm:
    """`login`: whether the URLs of sentinels have user and password.

    A broker's need them: kombu reads them from each, and masks every password it shows. A result backend's have none:
    Celery masks the password of the first URL only.
    """
    if not is_sentinel(url):
        if url.startswith("rediss:") and "ssl_cert_reqs=" not in url:
            # As on our own connections: kombu would not check certificates.
            url += f"{'&' if '?' in url else '?'}ssl_cert_reqs=required"
        return CeleryForm(url, {}, {}, None, None)
    service = SentinelURL.parse(url)
    userinfo = service.userinfo() if login else ""
    joined = ";".join(f"sentinel://{userinfo}{address}/{service.database or 0}" for address in service.addresses())
    options = {"master_name": service.service}  # `inspect stats` shows these; see `sentinel_options`
    # Celery takes an empty dictionary for no TLS.
    tls = {"ssl_cert_reqs": "required", **_tls(service)} if service.tls else {}
    return CeleryForm(joined, options, tls, service.user, service.password)


def connect(url: str, *, timeout: float) -> Redis:
    """A client that does not retry. `timeout`: seconds to connect, and for each answer."""
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
    }
    if not is_sentinel(url):
        return Redis.from_url(url, **options)
    service = SentinelURL.parse(url)
    server = {name: value for name, value in _server_options(service).items() if name not in _NOT_SENTINELS}
    finder = Sentinel(service.sentinels, sentinel_kwargs=sentinel_options(url), **{**server, **options})  # type: ignore[no-untyped-call]
    client: Redis = finder.master_for(service.service, ssl=service.tls)  # type: ignore[no-untyped-call]
    return client


_NOT_SENTINELS: Final = {"host", "port", "connection_class"}  # redis-py finds or chooses these at each connection


def _tls(service: SentinelURL) -> dict[str, Any]:
    return {name: value for name, value in _server_options(service).items() if name.startswith("ssl_")}


def _server_options(service: SentinelURL) -> dict[str, Any]:
    return dict(parse_url(service.server_url()))  # type: ignore[no-untyped-call]


def sentinel_options(url: str) -> dict[str, Any]:
    """How to ask the sentinels. Not part of Celery's settings, where `inspect stats` would show the password."""
    service = SentinelURL.parse(url)
    return {
        "username": service.sentinel_user,
        "password": service.sentinel_password,
        "socket_timeout": SENTINEL_TIMEOUT,
        "socket_connect_timeout": SENTINEL_TIMEOUT,
        "retry": Retry(NoBackoff(), 0),  # ask the next sentinel instead
        "ssl": service.tls,
        **_tls(service),
    }
