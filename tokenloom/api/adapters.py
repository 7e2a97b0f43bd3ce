"""Adapters: load and unload them as in vLLM, and see and pin them."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from tokenloom.api.body import read_struct
from tokenloom.api.context import context_of
from tokenloom.api.errors import ApiError
from tokenloom.api.models import json_response
from tokenloom.api.responses import AdapterInfo, AdapterList
from tokenloom.api.schemas import LoadAdapterRequest, UnloadAdapterRequest
from tokenloom.config import Config
from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.serving.adapter_service import AdapterReport


async def load_lora_adapter(request: Request) -> Response:
    """Serve the adapter in a directory of this machine under a name."""
    context = context_of(request)
    context.ready_card()
    fields = await read_struct(request, LoadAdapterRequest, context.max_body_bytes)
    name = fields.lora_name
    if not name or not fields.lora_path:
        raise ApiError(
            400,
            "lora_name and lora_path are required.",
            param="lora_path" if name else "lora_name",
            code="missing_required_parameter",
        )
    directory = _allowed_directory(context.config, fields.lora_path)
    try:
        await context.adapters.load(name, directory, replace=fields.load_inplace)
    except InvalidParameter as error:
        if name in context.adapters.names() and not fields.load_inplace:
            message = f"The adapter '{name}' is loaded already. To replace it, set load_inplace to true."
            raise ApiError(400, message, param="lora_name", code="already_loaded") from None
        param = {"adapter name": "lora_name", "adapter": "lora_path"}.get(error.param, error.param)
        raise ApiError(400, str(error), param=param, code="invalid_value") from None
    except ModelError as error:
        raise ApiError(400, str(error), param="lora_path", code="invalid_adapter") from None
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload_lora_adapter(request: Request) -> Response:
    """Serve an adapter no longer; requests that run with it go on."""
    context = context_of(request)
    fields = await read_struct(request, UnloadAdapterRequest, context.max_body_bytes)
    if not fields.lora_name:
        raise ApiError(400, "lora_name is required.", param="lora_name", code="missing_required_parameter")
    try:
        await context.adapters.unload(fields.lora_name)
    except KeyError:
        raise _not_found(fields.lora_name, "lora_name") from None
    return PlainTextResponse(f"Success: LoRA adapter '{fields.lora_name}' removed successfully.")


async def list_adapters(request: Request) -> Response:
    """The adapters: what they are, whether they are in memory, and who uses them."""
    context = context_of(request)
    card = context.ready_card()
    data = [_info(report, card.name) for report in await context.adapters.report()]
    return json_response(AdapterList(data=data))


async def pin_adapter(request: Request) -> Response:
    """Keep an adapter in memory from its next use on."""
    return await _pin(request, on=True)


async def unpin_adapter(request: Request) -> Response:
    """Let an adapter leave memory where others need the room."""
    return await _pin(request, on=False)


async def _pin(request: Request, on: bool) -> Response:
    context = context_of(request)
    card = context.ready_card()
    name = request.path_params["name"]
    try:
        await context.adapters.pin(name, on)
    except KeyError:
        raise _not_found(name, "name") from None
    found = [report for report in await context.adapters.report() if report.served.name == name]
    if not found:
        raise _not_found(name, "name")
    return json_response(_info(found[0], card.name))


def _not_found(name: str, param: str) -> ApiError:
    message = f"The adapter '{name[:200]}' cannot be found. GET /v1/models lists all."
    return ApiError(404, message, param=param, code="adapter_not_found")


def _info(report: AdapterReport, parent: str) -> AdapterInfo:
    served, use = report
    return AdapterInfo(
        name=served.name,
        content_id=served.content_id,
        version=served.entry.version,
        parent=parent,
        base_model_name=served.entry.base_model_name,
        source=served.entry.source,
        rank=served.prepared.rank,
        bytes=served.prepared.num_bytes,
        created=int(served.entry.added),
        resident_bytes=use.num_bytes if use else 0,
        requests_live=use.num_live if use else 0,
        sequences_running=use.num_running if use else 0,
        requests_total=served.num_requests,
        last_used=served.last_used or None,
        pinned=served.pinned,
        drafts=served.prepared.draft_contents,
    )


def _allowed_directory(config: Config, path: str) -> Path:
    """The directory at `path`, without links. Raises 403 where the server may not read it, 404 where it is none."""
    root = config.adapters.adapter_root
    if not root and not config.server.api_key and not _is_loopback(config.server.host):
        raise ApiError(
            403,
            "Adapters are loaded over HTTP only on loopback, with an API key, or from the server's adapter_root.",
            type="permission_error",
            param="lora_path",
            code="forbidden_path",
        )
    try:
        real = os.path.realpath(os.path.join(root, path))
        if root and not Path(real).is_relative_to(os.path.realpath(root)):
            raise ApiError(
                403,
                "lora_path must lie in the directory of adapters of this server.",
                type="permission_error",
                param="lora_path",
                code="forbidden_path",
            )
        if os.path.isdir(real):
            return Path(real)
    except (OSError, ValueError):
        pass
    message = f"No directory {path[:200]!r} with an adapter."
    raise ApiError(404, message, param="lora_path", code="adapter_not_found")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
