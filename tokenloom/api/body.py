"""From the bytes of a request to a checked Struct, with errors that name the field."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import gc
import logging
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from tokenloom.api.errors import ApiError, missing
from tokenloom.api.unsupported import HARMLESS_FIELDS, REFUSED, refuse_unsupported

log = logging.getLogger(__name__)

BODY_TIMEOUT_SECONDS = 60.0
MAX_UNKNOWN_FIELDS = 32
MAX_WARNED_FIELDS = 256

StructT = TypeVar("StructT", bound=msgspec.Struct)
_decode_object = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_value = msgspec.json.Decoder().decode
_warned_fields: set[str] = set()
_NULL = memoryview(b"null")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises 413 as soon as it is known to be longer than `max_bytes`, 408 if it stalls."""
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    break
                chunks.append(chunk)
    except TimeoutError:
        raise ApiError(
            408, f"The body did not arrive within {BODY_TIMEOUT_SECONDS:g} s.", code="timeout"
        ) from None
    if size > max_bytes:
        raise _too_large(max_bytes)
    return b"".join(chunks)


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"The request body is larger than {max_bytes} bytes.", code="request_too_large")


async def read_struct(request: Request, kind: type[StructT], max_bytes: int) -> StructT:
    """The body as `kind`. Null stands for a field's default; raises `ApiError` 400 naming what is wrong."""
    known = {*kind.__struct_encode_fields__, *REFUSED, "best_of", "n"}
    fields, ignored = parse_object(await read_body(request, max_bytes), known)
    refuse_unsupported(fields, kind.__struct_encode_fields__)
    _check_names([*fields, *ignored], kind)
    return convert(fields, kind)


def parse_object(body: bytes, known: Container[str]) -> tuple[dict[str, Any], list[str]]:
    """The `known` fields of a JSON object, and the names of its others; fields that are null are left out.

    Values of the others are checked and skipped.
    """
    try:
        raw = _decode_object(body)
        present = {name: value for name, value in raw.items() if memoryview(value) != _NULL}
        with _collector_paused():
            fields = {name: _decode_value(value) for name, value in present.items() if name in known}
    except RecursionError:
        raise ApiError(400, "The JSON body is nested too deeply.", code="invalid_json") from None
    except msgspec.ValidationError as error:
        given = _EXPECTED.search(str(error))
        word = _TYPE_WORDS.get(given.group(2), given.group(2)) if given else "something else"
        raise ApiError(400, f"The body must be a JSON object, not {word}.", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}", code="invalid_json") from None
    return fields, [name for name in present if name not in known]


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Millions of small lists at once would have the garbage collector walk over them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_names(names: Sequence[str], kind: type[msgspec.Struct]) -> None:
    """Refuse what looks like a misspelt field; warn once about any other that is not known."""
    known = kind.__struct_encode_fields__
    unknown = [name for name in names if name not in known and name not in HARMLESS_FIELDS]
    if len(unknown) > MAX_UNKNOWN_FIELDS:
        # Looking for the nearest name takes a millisecond each.
        message = f"{len(unknown)} unknown fields, among them {unknown[0][:64]!r}."
        raise ApiError(400, message, param=unknown[0][:64], code="unknown_parameter")
    for name in unknown:
        close = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.85)
        if close:
            message = f"Unknown field {name[:64]!r}; did you mean {close[0]!r}?"
            raise ApiError(400, message, param=name[:64], code="unknown_parameter")
        if name not in _warned_fields and len(_warned_fields) < MAX_WARNED_FIELDS:
            _warned_fields.add(name)
            log.warning("ignoring the unknown request field %r (said once)", name[:64])


def convert(fields: Mapping[str, Any], kind: type[StructT]) -> StructT:
    """`fields` as `kind`; raises `ApiError` 400 naming the field, what was given and what is wanted."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise _translate(str(error), fields) from None
    except RecursionError:
        raise ApiError(400, "The JSON body is nested too deeply.", code="invalid_json") from None


_MISSING = re.compile(r"Object missing required field `(.+?)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)` - at `\$\.(.*?)`$", re.DOTALL)
_EXPECTED = re.compile(r"Expected `(.+?)`, got `(.+?)`")
_PATH = re.compile(r" - at `\$\.?(.*)`$")
_TYPE_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def _translate(text: str, fields: Mapping[str, Any]) -> ApiError:
    """msgspec's message in the words of the API."""
    found = _PATH.search(text)
    # Keys of maps have no place in msgspec's paths.
    path = found.group(1).replace("[...]", "") if found else ""
    unknown = _UNKNOWN.match(text)
    if unknown:
        name = f"{unknown.group(2)}.{unknown.group(1)[:64]}"
        return ApiError(400, f"Unknown field {name!r}.", param=name, code="unknown_parameter")
    absent = _MISSING.search(text)
    if absent:
        name = f"{path}.{absent.group(1)}" if path else absent.group(1)
        return missing(name)
    top = re.split(r"[.\[]", path, maxsplit=1)[0]
    given = _describe(_lookup(fields, path, top))
    expected = _EXPECTED.search(text)
    if expected:
        words = [_TYPE_WORDS.get(word, word) for word in expected.group(1).split(" | ") if word != "null"]
        wanted = "must be " + " or ".join(words)
    else:
        wanted = _PATH.sub("", text)
        wanted = wanted[:1].lower() + wanted[1:]
    message = f"{path or 'body'}: got {given}, but {'it ' if expected else ''}{wanted}"
    return ApiError(400, message, param=path or None, code="invalid_type")


def _lookup(fields: Mapping[str, Any], path: str, top: str) -> Any:
    """The value at a path such as `messages[0].role`; the nearest one above it where the path has a gap."""
    value: Any = fields.get(top)
    for name, index in re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", path[len(top) :]):
        if name and isinstance(value, dict) and name in value:
            value = value[name]
        elif index and isinstance(value, list) and int(index) < len(value):
            value = value[int(index)]
        else:
            break
    return value


def _describe(value: object) -> str:
    """A value in few words, never long."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case dict():
            return "an object"
        case list():
            return f"a list of {len(value)} items"
        case str():
            return f"the string {value[:60]!r}"
    return f"the number {str(value)[:60]}"
