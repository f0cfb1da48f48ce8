"""TLS at HTTP and gRPC: one certificate for both, taken up again when its files change."""

from __future__ import annotations

import logging
import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from producer.errors import BadSetting
from producer.settings import Settings

logger = logging.getLogger(__name__)

_CERT, _KEY, _CLIENT_CA = "VERIFY_TLS_CERT", "VERIFY_TLS_KEY", "VERIFY_TLS_CLIENT_CA"
_HTTP, _GRPC = "http/1.1", "h2"  # as ALPN has them
_CERTIFICATES: Final = "allowed: a readable PEM file with certificates"


class _Loaded(NamedTuple):
    """What new connections use."""

    http: ssl.SSLContext
    grpc: ssl.SSLContext


class Certificates:
    """The certificate of this server, its key and who vouches for clients, as the files have them now.

    Every handshake looks at the files, which costs it a few microseconds. While they do not fit each other, as in the
    middle of a renewal, the ones before stay in force.
    """

    def __init__(self, cert: str, key: str, client_ca: str) -> None:
        """Paths of PEM files; `client_ca` may be empty. Raises `BadSetting`."""
        self._files = {name: path for name, path in ((_CERT, cert), (_KEY, key), (_CLIENT_CA, client_ca)) if path}
        self._version = self._look()
        self._loaded = self._load()

    def http_context(self) -> ssl.SSLContext:
        """The context to listen with; it hands each handshake on to the one in force."""

        def choose(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = self._current().http

        return _listening(self._files, _HTTP, choose)

    def grpc_context(self) -> ssl.SSLContext:
        """The same for gRPC."""

        def choose(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = self._current().grpc

        return _listening(self._files, _GRPC, choose)

    def _current(self) -> _Loaded:
        version = self._look()
        if version != self._version:
            self._version = version  # what cannot be used is said once, and tried again when it changes again
            try:
                loaded = self._load()
            except BadSetting as exc:
                logger.warning("%s; the certificate before stays in force", exc)
            else:
                # Unless they changed meanwhile: then what was read may be of two versions.
                if self._look() == version:
                    self._loaded = loaded
                    logger.info("the renewed TLS certificate is in force")
                else:
                    self._version = ()
        return self._loaded

    def _look(self) -> tuple[object, ...]:
        """What changes when a file does, also when it is a link that points elsewhere now."""
        found: list[object] = []
        for path in self._files.values():
            try:
                status = os.stat(path)  # noqa: PTH116 - a third of a Path's cost, at each handshake
            except OSError:
                found.append(None)
            else:
                found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(found)

    def _load(self) -> _Loaded:
        return _Loaded(_server_context(self._files, _HTTP), _server_context(self._files, _GRPC))


def certificates(settings: Settings) -> Certificates | None:
    """What the settings name; None if they name nothing. Raises `BadSetting`."""
    cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if not cert and not key and not client_ca:
        return None
    for name, value in ((_CERT, cert), (_KEY, key)):
        if not value:
            given = ", ".join(name for name, path in ((_CERT, cert), (_KEY, key), (_CLIENT_CA, client_ca)) if path)
            raise BadSetting(f"{name} is not set; {given} needs it")
    return Certificates(cert, key, client_ca)


def _listening(files: dict[str, str], protocol: str, choose: Callable[..., None]) -> ssl.SSLContext:
    context = _server_context(files, protocol)
    context.sni_callback = choose  # called without a name, too
    return context


def _server_context(files: dict[str, str], protocol: str) -> ssl.SSLContext:
    """Raises `BadSetting` with the setting whose file cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([protocol])
    for name, path in files.items():
        text = _read(name, path)
        if name != _KEY:
            _require_certificates(name, path, text)
    cert, key = files[_CERT], files[_KEY]
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except ssl.SSLError as exc:
        if exc.reason == "KEY_VALUES_MISMATCH":
            raise BadSetting(f"{_KEY}: {key!r} is not the key of the certificate in {_CERT} {cert!r}") from None
        raise BadSetting(f"{_KEY}: {key!r} has no usable key; allowed: a PEM file with an unencrypted one") from None
    except (OSError, ValueError):
        raise BadSetting(f"{_KEY}: {key!r} has no usable key; allowed: a PEM file with an unencrypted one") from None
    if _CLIENT_CA in files:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(files[_CLIENT_CA])
        # A resumed session is not checked again, and an authority may be withdrawn.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
    return context


def _read(name: str, path: str) -> str:
    try:
        return Path(path).read_text("ascii")
    except OSError as exc:
        why = exc.strerror or type(exc).__name__
    except UnicodeDecodeError:
        why = "not PEM"
    allowed = "allowed: a readable PEM file with a private key" if name == _KEY else _CERTIFICATES
    raise BadSetting(f"{name}: {path!r} cannot be read ({why}); {allowed}")


def _require_certificates(name: str, path: str, text: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):
        raise BadSetting(f"{name}: {path!r} has no certificate that can be used; {_CERTIFICATES}") from None


def _no_password() -> str:
    """Asked for an encrypted key's password, where OpenSSL would otherwise ask on the terminal."""
    raise ValueError
