"""Turns tracing on. While it is off, no span is made and `producer.tracing.spans` is not imported."""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from producer.errors import BadSetting
from producer.settings import from_dotenv

if TYPE_CHECKING:
    from producer.tracing.spans import Traces

EXPORTER: Final = "OTEL_TRACES_EXPORTER"  # see https://opentelemetry.io/docs/specs/otel/configuration/
LAST_EXPORT: Final = 0.5  # seconds for the last spans when a process ends
_PREFIX: Final = "OTEL_"
_OFF: Final = ("", "none")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")  # the first one wins
_PROTOCOL: Final = "http/protobuf"


@functools.cache
def set_up(service: str) -> Traces | None:
    """Set up tracing for this process as OpenTelemetry's own variables say. Returns None if it is off.

    `service`: the service's name unless the variables give one. They may be in `.env`. Raises `BadSetting`.
    """
    given = {name: value for name, value in [*from_dotenv().items(), *os.environ.items()] if value}
    kind = given.get(EXPORTER, "").strip().lower()
    if kind in _OFF or given.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if kind not in {"otlp", "console"}:
        raise BadSetting(f"{EXPORTER}: {kind!r} is not allowed; allowed: otlp, console or none")
    for name in _PROTOCOLS:
        if kind == "otlp" and (protocol := given.get(name)) is not None:
            if protocol.strip() == _PROTOCOL:
                break
            raise BadSetting(f"{name}: {protocol!r} is not allowed; allowed: {_PROTOCOL}")
    # OpenTelemetry reads the environment itself, and does not treat an empty value as unset everywhere.
    for name in [name for name in os.environ if name.startswith(_PREFIX) and not os.environ[name]]:
        del os.environ[name]
    os.environ.update({name: value for name, value in given.items() if name.startswith(_PREFIX)})
    try:
        from producer.tracing import export  # noqa: PLC0415 - imported only while tracing is on

        return export.set_up(kind, service)
    except ModuleNotFoundError as exc:
        raise BadSetting(f"{EXPORTER}: traces need {exc.name}: pip install 'verifyserver[traces]'") from None
    except (ValueError, TypeError) as exc:
        raise BadSetting(f"{_PREFIX}*: OpenTelemetry cannot be set up with them: {exc}") from None


def set_up_or_exit(service: str) -> None:
    """`set_up()` when a process starts: a bad setting ends it with one line on stderr."""
    try:
        set_up(service)
    except BadSetting as exc:
        sys.stderr.write(f"{exc}\n")
        raise SystemExit(2) from None


def of_application() -> Traces | None:
    """The tracing that the application around a client has set up, if any. A library sets up none itself."""
    api: Any = sys.modules.get("opentelemetry.trace")
    provider = None if api is None else api.get_tracer_provider()
    if provider is None or isinstance(provider, api.ProxyTracerProvider | api.NoOpTracerProvider):
        return None
    from producer.tracing.spans import Traces  # noqa: PLC0415 - imported only while tracing is on

    return Traces(provider)
