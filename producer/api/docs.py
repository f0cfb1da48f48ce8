"""The HTTP door's description: what OpenAPI says of bodies and answers, and a page of it for people.

FastAPI's own page loads its programs from a content delivery network; this one is plain HTML and works offline.
"""

from __future__ import annotations

import html
import json
import re
from typing import Any, Final

from fastapi.responses import PlainTextResponse

from producer.contract import PURPOSE_PATTERN, ErrorCode

DESCRIPTION: Final = (
    "Every answered request is HTTP 200 with a number in `error`: 0 Success, 1 RedisErr, 2 Exception,"
    " 3 InvalidAddress, 4 TooManyRequests, 5 MailRejected, 6 Timeout (unknown: the mail may still arrive, ask again),"
    " 1001 Error_Json (no JSON object, or a field is missing or malformed), 1003 VarifyExpired, 1004 VarifyCodeErr."
    " A body is JSON whatever its content type, of at most 16 kB."
)
_EMAIL: Final = {"type": "string", "description": "The address. It comes back exactly as given."}
_PURPOSE: Final = {"type": "string", "pattern": f"^{PURPOSE_PATTERN.pattern}$", "default": "default"}
_LOCALE: Final = {
    "type": ["string", "null"],
    "description": "Language of the mail: zh-CN or en; anything else means the worker's own.",
}


_HOST: Final = re.compile(r"[A-Za-z0-9.-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?", re.ASCII)


def _body(required: tuple[str, ...], example: dict[str, str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "example": {"email": "a@example.com", **example},
    }


def _outcome(*errors: ErrorCode) -> dict[str, Any]:
    return {
        "oneOf": [
            {
                "type": "object",
                "required": ["error", "email"],
                "properties": {
                    "error": {
                        "type": "integer",
                        "enum": [int(error) for error in errors],
                        "description": ", ".join(f"{int(error)} {error.title}" for error in errors),
                    },
                    "email": {"type": "string"},
                },
                "additionalProperties": False,
            },
            {
                "type": "object",
                "required": ["error"],
                "properties": {"error": {"type": "integer", "const": int(ErrorCode.ERROR_JSON)}},
                "additionalProperties": False,
            },
        ]
    }


REQUEST: Final = _body(("email",), {}, email=_EMAIL, purpose=_PURPOSE, locale=_LOCALE)
REQUEST_ANSWER: Final = _outcome(*(error for error in ErrorCode if error < ErrorCode.ERROR_JSON))
CHECK: Final = _body(
    ("email", "varifycode"), {"varifycode": "123456"}, email=_EMAIL, varifycode={"type": "string"}, purpose=_PURPOSE
)
CHECK_ANSWER: Final = _outcome(
    ErrorCode.SUCCESS,
    ErrorCode.REDIS_ERR,
    ErrorCode.EXCEPTION,
    ErrorCode.VARIFY_EXPIRED,
    ErrorCode.VARIFY_CODE_ERR,
)
_REFUSAL: Final = {
    "type": "object",
    "required": ["error", "detail"],
    "properties": {"error": {"type": "integer"}, "detail": {"type": "string"}},
}


def _responses(described: dict[int, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    return {
        "responses": {
            status: {"description": what, "content": {"application/json": {"schema": schema}}}
            for status, (what, schema) in described.items()
        }
    }


def describe(body: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """What FastAPI is told of a POST: it reads the body itself only from declared parameters, and none are."""
    content = {"application/json": {"schema": body}}
    refusals = {
        400: ("The body ended early", _REFUSAL),
        408: ("The body did not arrive within 5 s", _REFUSAL),
        413: ("The body has more than 16 kB", _REFUSAL),
    }
    return {
        **_responses({200: ("Answered", answer), **refusals}),
        "openapi_extra": {"requestBody": {"required": True, "content": content}},
    }


_FOUND: Final = {"type": "object", "required": ["ready", "broker", "results", "codes", "workers", "leaving"]}
HEALTH: Final = _responses({200: ("Up", {"type": "object", "required": ["status"]})})
READY: Final = _responses({200: ("Ready", _FOUND), 503: ("Not ready", _FOUND)})
METRICS: Final[dict[str, Any]] = {
    "response_class": PlainTextResponse,
    "responses": {200: {"description": "Metrics", "content": {"text/plain": {"schema": {"type": "string"}}}}},
}


def with_keys(openapi: dict[str, Any], free: frozenset[str]) -> dict[str, Any]:
    """The description of a door that asks for a key, except at the paths in `free`."""
    openapi.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    refusal = {"description": "No key, or a wrong one", "content": {"application/json": {"schema": _REFUSAL}}}
    for path, operations in openapi["paths"].items():
        for operation in operations.values():
            if path not in free:
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = refusal
    return openapi


def page(openapi: dict[str, Any], asked: str) -> str:
    """The description as one HTML page without scripts, styles or images from elsewhere.

    `asked`: the host and port under which it was asked for; its examples ask there too.
    """
    door = asked if _HOST.fullmatch(asked) else "127.0.0.1:8081"
    parts = [f"<p>{html.escape(openapi['info']['description'])}</p>"]
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation.get('description') or operation['summary'])}</p>")
            if body := operation.get("requestBody"):
                schema = body["content"]["application/json"]["schema"]
                example = json.dumps(schema["example"])
                parts.append(_schema("Body", schema))
                parts.append(f"<pre>curl -d '{html.escape(example)}' http://{door}{html.escape(path)}</pre>")
            for status, response in operation["responses"].items():
                what = f"{status}: {response['description']}"
                parts += [_schema(what, content["schema"]) for content in response["content"].values()]
    title = html.escape(openapi["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,"><style>'
        "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}"
        ":root{color-scheme:light dark}"
        "pre{overflow-x:auto;padding:.6rem;border:1px solid #8886;border-radius:6px}h2{margin-top:2.5rem}"
        f'</style></head><body><h1>{title}</h1><p><a href="/openapi.json">openapi.json</a></p>'
        f"{''.join(parts)}</body></html>"
    )


def _schema(what: str, schema: dict[str, Any]) -> str:
    text = json.dumps(schema, indent=2, ensure_ascii=False)
    return f"<details><summary>{html.escape(what)}</summary><pre>{html.escape(text)}</pre></details>"
