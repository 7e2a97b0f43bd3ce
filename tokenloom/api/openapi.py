"""/openapi.json from the Structs, and /docs: one page that renders it and loads nothing from elsewhere."""

from __future__ import annotations

import functools
import re
from html import escape
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import tokenloom
from tokenloom.api.auth import OPEN_PATHS
from tokenloom.api.endpoints import ENDPOINTS, Endpoint
from tokenloom.api.errors import ErrorResponse

_REF = "#/components/schemas/{name}"
_PAGE_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 description of every endpoint."""
    types = [ErrorResponse]
    for endpoint in ENDPOINTS:
        types += [kind for kind in (endpoint.request, endpoint.response, endpoint.chunk) if kind is not None]
    types = list(dict.fromkeys(types))
    references, schemas = msgspec.json.schema_components(types, ref_template=_REF)
    by_type = dict(zip(types, references, strict=True))
    paths: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        path = endpoint.path.replace(":path", "")
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, by_type)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tokenloom",
            "version": tokenloom.__version__,
            "description": "OpenAI-compatible serving. A null field stands for its default.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint, by_type: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if endpoint.response is not None:
        content = {"application/json": {"schema": by_type[endpoint.response]}}
    if endpoint.chunk is not None:
        content["text/event-stream"] = {"schema": by_type[endpoint.chunk]}
    error = {"description": "An error.", "content": {"application/json": {"schema": by_type[ErrorResponse]}}}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": endpoint.handler.__name__ if endpoint.path != "/ping" else "ping",
        "responses": {"200": {"description": "Success.", "content": content}, "default": error},
        "security": [] if endpoint.path in OPEN_PATHS else [{"bearer": []}, {}],
    }
    if endpoint.request is not None:
        body = {"application/json": {"schema": by_type[endpoint.request]}}
        operation["requestBody"] = {"required": True, "content": body}
    for name in re.findall(r"{(\w+)", endpoint.path):
        parameter = {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        operation.setdefault("parameters", []).append(parameter)
    return operation


async def openapi_json(request: Request) -> Response:
    """The OpenAPI document."""
    return Response(msgspec.json.encode(document()), media_type="application/json")


async def docs(request: Request) -> Response:
    """The OpenAPI document for people."""
    return Response(_page(), media_type="text/html", headers=_PAGE_HEADERS)


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0 1rem; }
td, th { text-align: left; border-bottom: 1px solid #8884; padding: .25rem .75rem .25rem 0;
  vertical-align: top; }
code { font-size: .9em; } summary { cursor: pointer; padding: .3rem 0; }
.method { display: inline-block; width: 3.5rem; font-weight: 600; }
:root { color-scheme: light dark; }
"""


@functools.cache
def _page() -> str:
    spec = document()
    parts = [f"<h1>tokenloom {escape(spec['info']['version'])}</h1><p>{escape(spec['info']['description'])} "]
    parts.append(
        'The same as a machine reads it: <a href="openapi.json">openapi.json</a>.</p><h2>Endpoints</h2>'
    )
    for path, operations in spec["paths"].items():
        for method, operation in operations.items():
            parts.append(_operation_html(path, method, operation))
    parts.append("<h2>Types</h2>")
    for name, schema in spec["components"]["schemas"].items():
        parts.append(_schema_html(name, schema))
    body = "\n".join(parts)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>tokenloom</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>'
    )


def _operation_html(path: str, method: str, operation: dict[str, Any]) -> str:
    rows = []
    if "requestBody" in operation:
        rows.append(("Request", _content_html(operation["requestBody"]["content"])))
    for status, answer in operation["responses"].items():
        rows.append(("Error" if status == "default" else "Response", _content_html(answer["content"])))
    table = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in rows)
    name = f'<span class="method">{method.upper()}</span><code>{escape(path)}</code>'
    title = f"{name} {escape(operation['summary'])}"
    return f"<details><summary>{title}</summary><table>{table}</table></details>"


def _content_html(content: dict[str, Any]) -> str:
    return "<br>".join(
        f"{_type_html(entry['schema'])} <small>{escape(kind)}</small>" for kind, entry in content.items()
    )


def _schema_html(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = []
    for field, kind in schema.get("properties", {}).items():
        default = (
            "required" if field in required else f"default <code>{escape(_json(kind.get('default')))}</code>"
        )
        rows.append(
            f"<tr><td><code>{escape(field)}</code></td><td>{_type_html(kind)}</td><td>{default}</td>"
            f"<td>{escape(kind.get('description', ''))}</td></tr>"
        )
    text = f"<p>{escape(schema.get('description', ''))}</p>"
    title = f'<summary id="{escape(name)}"><code>{escape(name)}</code></summary>'
    return f"<details>{title}{text}<table>{''.join(rows)}</table></details>"


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _type_html(schema: dict[str, Any]) -> str:
    """A type in few words, with links to named ones."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type_html(kind) for kind in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"<code>{escape(_json(value))}</code>" for value in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type_html(schema.get('items', {}))}"
    return escape(str(kind))
