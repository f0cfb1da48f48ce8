"""The HTTP API's bodies and answers. FastAPI checks bodies against them and makes OpenAPI from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema

from producer.contract import DEFAULT_PURPOSE, LONGEST_CLIENT, PURPOSE_PATTERN, ErrorCode, is_client, is_purpose


def _require_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")  # noqa: TRY004 - the only one that pydantic reports
    return value


def _require_purpose(value: object) -> str:
    if not is_purpose(value):
        raise ValueError("must be 1 to 32 characters of a-z, 0-9, _ and -")
    return str(value)


def _require_client(value: object) -> str | None:
    if not is_client(value):
        raise ValueError(f"must be a string of at most {LONGEST_CLIENT} characters")
    return cast("str | None", value)


def client_in(header: Sequence[str]) -> str | None:
    """The caller's word for its end user, from the values of CLIENT_HEADER. Raises `ValueError`."""
    if len(header) > 1 or not all(map(is_client, header)):
        raise ValueError(f"must come once, with at most {LONGEST_CLIENT} characters")
    return header[0] if header else None


# pydantic's own `str` refuses half a surrogate pair, which JSON can carry and which must come back as given.
Text = Annotated[str, PlainValidator(_require_text), WithJsonSchema({"type": "string"})]
Purpose = Annotated[
    str,
    PlainValidator(_require_purpose),
    WithJsonSchema({"type": "string", "pattern": f"^{PURPOSE_PATTERN.pattern}$", "default": DEFAULT_PURPOSE}),
]
_EMAIL: Final = "The address. It comes back exactly as given."


class CodeRequest(BaseModel):
    """Asks for a code."""

    model_config = ConfigDict(json_schema_extra={"example": {"email": "a@example.com"}})

    email: Annotated[Text, Field(description=_EMAIL)]
    purpose: Purpose = DEFAULT_PURPOSE
    locale: Annotated[
        Any,
        WithJsonSchema(
            {
                "type": ["string", "null"],
                "description": "Language of the mail, such as en. Without templates for it, the worker uses its own.",
            }
        ),
    ] = None
    client: Annotated[
        str | None,
        PlainValidator(_require_client),
        WithJsonSchema(
            {
                "type": ["string", "null"],
                "maxLength": LONGEST_CLIENT,
                "description": "Your word for the end user who asks, such as a hash of the IP address or the account."
                " Each end user has limits of its own.",
            }
        ),
    ] = None


class CodeCheck(BaseModel):
    """Checks a code."""

    model_config = ConfigDict(json_schema_extra={"example": {"email": "a@example.com", "varifycode": "123456"}})

    email: Annotated[Text, Field(description=_EMAIL)]
    varifycode: Annotated[Text, Field(description="The code that the user typed.")]
    purpose: Purpose = DEFAULT_PURPOSE


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _one_of(*errors: ErrorCode) -> Any:
    listed = ", ".join(f"{int(error)} {error.title}" for error in errors)
    return Field(description=listed, json_schema_extra={"enum": [int(error) for error in errors]})


class RequestAnswer(_Answer):
    """What became of a request."""

    error: Annotated[int, _one_of(*(error for error in ErrorCode if error < ErrorCode.ERROR_JSON))]
    email: Text


class CheckAnswer(_Answer):
    """What became of a check."""

    error: Annotated[
        int,
        _one_of(
            ErrorCode.SUCCESS,
            ErrorCode.REDIS_ERR,
            ErrorCode.EXCEPTION,
            ErrorCode.VARIFY_EXPIRED,
            ErrorCode.VARIFY_CODE_ERR,
        ),
    ]
    email: Text


class Malformed(_Answer):
    """The body is not a JSON object, or a field of it is missing or malformed."""

    error: Literal[ErrorCode.ERROR_JSON]
    detail: Annotated[str, Field(description="Names the field.", examples=["email is missing"])]


class Refusal(BaseModel):
    """The body of every answer with a status other than 200."""

    error: int
    detail: str


class Health(BaseModel):
    """The process is up."""

    status: Literal["ok"]


class ReadinessAnswer(BaseModel):
    """Which part is ready."""

    ready: bool
    broker: bool
    results: bool
    codes: bool
    workers: Annotated[int, Field(description="Workers that gave a sign of life within 5 s.")]
    leaving: Annotated[bool, Field(description="The process is shutting down.")]
    problem: Annotated[str, Field(description="Why a database cannot be used, if one cannot.")] = ""


def error_table() -> str:
    """The error codes as a Markdown table."""
    rows = [f"| {int(error)} | {error.title}&ensp; | {error.meaning} | {error.advice} |" for error in ErrorCode]
    return "\n".join(["| error | name | meaning | what to do |", "|---|---|---|---|", *rows])
