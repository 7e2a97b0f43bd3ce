"""A chat with a server through its HTTP API, for the terminal. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import InvalidParameter, TokenloomError

TIMEOUT_SECONDS = 300


class RemoteChat:
    """Answers of the first model that the server at `url` lists.

    Raises `TokenloomError` when the server cannot be reached or answers with an error.
    """

    def __init__(self, url: str, api_key: str) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidParameter("url", url, "an http or https address")
        self._url = url
        self._parts = parts
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        with closing(self._connect()) as connection:
            self.model = str(self._json(self._ask(connection, "GET", "/v1/models"))["data"][0]["id"])

    def answer(self, messages: list[dict[str, str]], params: SamplingParams) -> Iterator[str]:
        """Pieces of the answer's text as they arrive. Closing the iterator cancels the request."""
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "stream": True,
        }
        if params.seed is not None:
            body["seed"] = params.seed
        with closing(self._connect()) as connection:
            response = self._ask(connection, "POST", "/v1/chat/completions", json.dumps(body))
            for line in self._lines(response):
                if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
                    continue
                event = json.loads(line[5:])
                if "error" in event:
                    raise TokenloomError(event["error"]["message"])
                for choice in event["choices"]:
                    if text := choice["delta"].get("content"):
                        yield text

    def _connect(self) -> HTTPConnection:
        kind = HTTPSConnection if self._parts.scheme == "https" else HTTPConnection
        return kind(self._parts.hostname or "", self._parts.port, timeout=TIMEOUT_SECONDS)

    def _ask(
        self, connection: HTTPConnection, method: str, path: str, body: str | None = None
    ) -> HTTPResponse:
        try:
            connection.request(method, self._path + path, body, self._headers)
            response = connection.getresponse()
        except (OSError, HTTPException) as error:
            raise TokenloomError(f"cannot reach {self._url}: {error}") from None
        if response.status != 200:
            raise TokenloomError(f"{self._url} answered {response.status}: {self._error_text(response)}")
        return response

    def _lines(self, response: HTTPResponse) -> Iterator[bytes]:
        try:
            yield from response
        except (OSError, HTTPException) as error:
            raise TokenloomError(f"{self._url} hung up: {error}") from None

    def _json(self, response: HTTPResponse) -> Any:
        try:
            return json.loads(response.read())
        except (OSError, HTTPException, ValueError) as error:
            raise TokenloomError(f"{self._url} is no server of the OpenAI API: {error}") from None

    @staticmethod
    def _error_text(response: HTTPResponse) -> str:
        try:
            return str(json.loads(response.read())["error"]["message"])
        except (OSError, HTTPException, ValueError, KeyError, TypeError):
            return response.reason
