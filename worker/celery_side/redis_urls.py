"""The primary of a service that sentinels watch, for whatever speaks through redis-py: Celery, and our command line."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from redis import Redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel

from producer.setting_types import SentinelURL, is_sentinel

SENTINEL_TIMEOUT: Final = 0.5  # seconds for one sentinel to be connected, and for it to answer


class CeleryForm(NamedTuple):
    """How Celery wants to be told where a database is."""

    url: str
    options: dict[str, Any]  # for its transport options
    tls: dict[str, Any]  # for its use_ssl
    user: str | None  # of results; those of a broker are in the URL
    password: str | None
    sentinel: bool


def broker_form(url: str) -> CeleryForm:
    """A broker's. kombu reads user and password from the URL of each sentinel, and shows no password of any."""
    return _form(url, who=True)


def results_form(url: str) -> CeleryForm:
    """A result backend's. Celery hides the password of one URL, and shows those of the others: here none has one."""
    return _form(url, who=False)


def _form(url: str, *, who: bool) -> CeleryForm:
    if not is_sentinel(url):
        return CeleryForm(_checked(url), {}, {}, None, None, sentinel=False)
    service = SentinelURL.parse(url)
    before = service.who() if who else ""
    joined = ";".join(f"sentinel://{before}{address}/{service.database or 0}" for address in service.addresses())
    options = {"master_name": service.service}  # all that may be shown; see `sentinel_options`
    # An empty dictionary would mean no TLS.
    tls = {"ssl_cert_reqs": "required", **_tls(service)} if service.tls else {}
    return CeleryForm(joined, options, tls, service.user, service.password, sentinel=True)


def _checked(url: str) -> str:
    """`url`, with TLS checked as on our own connections: kombu would check nothing, and Celery wants to be told."""
    if not url.startswith("rediss:") or "ssl_cert_reqs=" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}ssl_cert_reqs=required"


def connect(url: str, *, timeout: float) -> Redis:
    """A client that never retries by itself. `timeout`: seconds to connect, and for each answer."""
    options: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
    }
    if not is_sentinel(url):
        return Redis.from_url(url, **options)
    service = SentinelURL.parse(url)
    server = {name: value for name, value in _server_options(service).items() if name not in _PLACE}
    watch = Sentinel(service.sentinels, sentinel_kwargs=sentinel_options(url), **{**server, **options})  # type: ignore[no-untyped-call]
    client: Redis = watch.master_for(service.service, ssl=service.tls)  # type: ignore[no-untyped-call]
    return client


_PLACE: Final = {"host", "port", "connection_class"}  # what is found at each connection, or said otherwise


def _tls(service: SentinelURL) -> dict[str, Any]:
    return {name: value for name, value in _server_options(service).items() if name.startswith("ssl_")}


def _server_options(service: SentinelURL) -> dict[str, Any]:
    return dict(parse_url(service.server_url()))  # type: ignore[no-untyped-call]


def sentinel_options(url: str) -> dict[str, Any]:
    """How its sentinels are asked. Not among Celery's settings: `inspect stats` would show the password in them."""
    service = SentinelURL.parse(url)
    return {
        "username": service.sentinel_user,
        "password": service.sentinel_password,
        "socket_timeout": SENTINEL_TIMEOUT,
        "socket_connect_timeout": SENTINEL_TIMEOUT,
        "retry": Retry(NoBackoff(), 0),  # the next sentinel is the better try
        "ssl": service.tls,
        **_tls(service),
    }
