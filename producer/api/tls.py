"""TLS at HTTP and gRPC: one certificate for both, read again when its files change."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path
from typing import Final

from producer.errors import BadSetting
from producer.settings import Settings

logger = logging.getLogger(__name__)

_CERT, _KEY, _CLIENT_CA = "VERIFY_TLS_CERT", "VERIFY_TLS_KEY", "VERIFY_TLS_CLIENT_CA"
_HTTP, _GRPC = "http/1.1", "h2"  # as ALPN has them
_CERTIFICATES: Final = "allowed: a readable PEM file with certificates"


class Certificates:
    """The server's certificate, its key and the CAs that vouch for clients, as the files have them now.

    Every handshake looks at the files, which costs it a few microseconds. While certificate and key do not fit each
    other, as in the middle of a renewal, the previous ones stay in use.
    """

    def __init__(self, cert: str, key: str, client_ca: str) -> None:
        """Paths of PEM files; `client_ca` may be empty. Raises `BadSetting`."""
        self._files = {name: path for name, path in ((_CERT, cert), (_KEY, key), (_CLIENT_CA, client_ca)) if path}
        self._version = self._look()
        self._loaded = self._load()

    def http_context(self) -> ssl.SSLContext:
        """The context for HTTP's listening sockets."""
        return self._listening(_HTTP)

    def grpc_context(self) -> ssl.SSLContext:
        """The context for gRPC's listening sockets."""
        return self._listening(_GRPC)

    def _listening(self, protocol: str) -> ssl.SSLContext:
        """A context that hands each handshake on to the one with the newest files."""

        def hand_on(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = self._current()[protocol]

        context = self._loaded[protocol]
        context.sni_callback = hand_on  # called for a client that sends no name, too
        return context

    def _current(self) -> dict[str, ssl.SSLContext]:
        version = self._look()
        if version != self._version:
            self._version = version  # files that cannot be used are logged once, and tried again once they change
            try:
                loaded = self._load()
            except BadSetting as exc:
                logger.warning("%s; the previous certificate stays in use", exc)
            else:
                # If the files changed meanwhile, what was read may be of two versions.
                if self._look() == version:
                    self._loaded = loaded
                    logger.info("the renewed TLS certificate is in use")
                else:
                    self._version = ()
        return self._loaded

    def _look(self) -> tuple[object, ...]:
        """The version of the files: it changes when a file does, or when a link points to another file."""
        found: list[object] = []
        for path in self._files.values():
            try:
                status = os.stat(path)  # noqa: PTH116 - a third of a Path's cost, at each handshake
            except OSError:
                found.append(None)
            else:
                found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        return tuple(found)

    def _load(self) -> dict[str, ssl.SSLContext]:
        """A context for each protocol."""
        return {protocol: _server_context(self._files, protocol) for protocol in (_HTTP, _GRPC)}


def certificates(settings: Settings) -> Certificates | None:
    """The certificates that the settings name; None if they name none. Raises `BadSetting`."""
    cert, key, client_ca = settings.tls_cert, settings.tls_key, settings.tls_client_ca
    if not cert and not key and not client_ca:
        return None
    for name, value in ((_CERT, cert), (_KEY, key)):
        if not value:
            given = ", ".join(name for name, path in ((_CERT, cert), (_KEY, key), (_CLIENT_CA, client_ca)) if path)
            raise BadSetting(f"{name} is not set; {given} needs it")
    return Certificates(cert, key, client_ca)


def _server_context(files: dict[str, str], protocol: str) -> ssl.SSLContext:
    """Raises `BadSetting`, which names the setting whose file cannot be used."""
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
