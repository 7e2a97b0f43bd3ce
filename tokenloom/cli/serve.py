"""`tokenloom serve`: the HTTP server in this process, the engine in another one."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from tokenloom import __version__
from tokenloom.api.app import create_app
from tokenloom.cli.options import changed_from_default
from tokenloom.config import Config
from tokenloom.errors import EngineDead, InvalidParameter, TokenloomError
from tokenloom.serving.adapter_library import AdapterLibrary
from tokenloom.serving.adapter_service import AdapterService
from tokenloom.serving.assembly import open_library
from tokenloom.serving.model_directory import model_name
from tokenloom.serving.progress import ConsoleLoad
from tokenloom.serving.supervisor import ProcessEngineClient

EXAMPLE = "Tell a story about a dog and a red ball."
DRAIN_SECONDS = 5
CUT_SECONDS = 3
BACKLOG = 2048


class Server(uvicorn.Server):
    """uvicorn with a quiet end.

    A handled SIGINT or SIGTERM is a normal end: the process exits with 0. Answers that are still open after
    `DRAIN_SECONDS` end with an error that their clients can read.
    """

    def __init__(self, settings: uvicorn.Config, client: ProcessEngineClient) -> None:
        super().__init__(settings)
        self._client = client

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, let open answers finish, then end the others."""
        end = asyncio.create_task(self._end_open_answers())
        await super().shutdown(sockets)
        end.cancel()

    async def _end_open_answers(self) -> None:
        await asyncio.sleep(DRAIN_SECONDS)
        await self._client.close()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle both signals for the length of the context, and do not raise them again after it."""
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; `port` 0 takes a free one. Raises `InvalidParameter` where that is not possible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InvalidParameter("host", host, f"an address of this machine ({error})") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise InvalidParameter(
            "port", port, f"one that can be listened on at {host} ({error.strerror})"
        ) from None
    listener.setblocking(False)
    return listener


def base_url(listener: socket.socket) -> str:
    """The URL at which a client on this machine reaches the socket."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def curl_line(url: str, model: str, *, has_key: bool) -> str:
    """A command that asks for a story. The key itself is not printed."""
    body = {"model": model, "messages": [{"role": "user", "content": EXAMPLE}], "max_tokens": 200}
    key = ' -H "Authorization: Bearer $TOKENLOOM_API_KEY"' if has_key else ""
    headers = f"-H 'Content-Type: application/json'{key}"
    return f"curl {url}/v1/chat/completions {headers} -d {shlex.quote(json.dumps(body))}"


def _has_key(config: Config) -> bool:
    return bool(config.server.api_key or config.server.slo_key)


def _say(text: str) -> None:
    print(text, flush=True)


async def _announce(
    client: ProcessEngineClient, adapters: AdapterService, server: Server, url: str, has_key: bool
) -> None:
    """Print how to use the server once it serves; end it when the engine cannot be started."""
    try:
        await client.wait_ready()
        await adapters.confirm()
    except EngineDead as error:
        server.should_exit = True
        if client.state == "stopped":
            return
        raise TokenloomError(client.failure or str(error)) from None
    except TokenloomError:
        server.should_exit = True
        raise
    while not server.started:
        await asyncio.sleep(0.02)
    _say(f"ready: {url} (API documentation at {url}/docs)")
    _say("try it:")
    _say(curl_line(url, client.card.name, has_key=has_key))


async def _serve(config: Config, library: AdapterLibrary, listener: socket.socket) -> None:
    progress = ConsoleLoad()
    client = ProcessEngineClient(
        config, on_loading=lambda event: progress.advance(event.stage, event.done, event.total)
    )
    name = model_name(config.model.model, config.model.served_model_name)
    adapters = AdapterService(client, library, model=name, options=config.adapters)
    adapters.load_configured()
    settings = uvicorn.Config(
        create_app(client, config, adapters),
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=DRAIN_SECONDS + CUT_SECONDS,
    )
    server = Server(settings, client)
    url = base_url(listener)
    _say(f"listening on {url}")
    announcement = asyncio.create_task(_announce(client, adapters, server, url, _has_key(config)))
    try:
        await server.serve(sockets=[listener])
    finally:
        await client.close()
        announcement.cancel()
        problem = (await asyncio.gather(announcement, return_exceptions=True))[0]
    if isinstance(problem, Exception):
        raise problem
    if not server.started:
        raise TokenloomError("the server could not start; the log says why")


def run(config: Config) -> None:
    """Serve until SIGINT or SIGTERM. Raises a `TokenloomError` when the server cannot be started."""
    logging.basicConfig(
        level=config.server.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    _say(f"tokenloom {__version__}")
    changed = changed_from_default(config)
    if changed:
        _say("options: " + " ".join(f"{name}={value}" for name, value in changed.items()))
    library = open_library(config)
    try:
        listener = listen(config.server.host, config.server.port)
        try:
            asyncio.run(_serve(config, library, listener))
        finally:
            listener.close()
    finally:
        library.close()
    _say("stopped")
