"""Questions to the server before a run: its models, and how it tokenises. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any, Final
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from tokenloom.errors import TokenloomError

TIMEOUT_SECONDS: Final = 30


class Server:
    """The server at `root`. Every method raises `TokenloomError` when it cannot be asked."""

    def __init__(self, root: str, headers: Mapping[str, str]) -> None:
        self.root = root
        self._headers = {"Content-Type": "application/json", **headers}
        # As the load itself, past any proxy that the environment names.
        self._opener = build_opener(ProxyHandler({}))

    def first_model(self) -> str:
        """Name of the first model that is listed."""
        answer = self._ask("/v1/models")
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise TokenloomError(f"{self.root}/v1/models lists no model; name one with --model") from None

    def tokenize(self, fields: Mapping[str, Any]) -> list[int]:
        """Token ids of a `prompt` or of `messages`, as POST /tokenize of tokenloom and vLLM gives them."""
        answer = self._ask("/tokenize", fields)
        tokens = answer.get("tokens") if isinstance(answer, dict) else None
        if not isinstance(tokens, list) or not all(isinstance(token, int) for token in tokens):
            raise TokenloomError(f"{self.root}/tokenize gave no list of token ids")
        return tokens

    def _ask(self, path: str, fields: Mapping[str, Any] | None = None) -> Any:
        data = None if fields is None else json.dumps(fields).encode()
        try:
            request = Request(self.root + path, data, self._headers)
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                return json.loads(response.read())
        except HTTPError as error:
            text = error.read(300).decode(errors="replace")
            raise TokenloomError(f"{self.root}{path} answered {error.code}: {text}") from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise TokenloomError(f"cannot reach {self.root}: {reason}") from None
        except ValueError as error:
            raise TokenloomError(f"{self.root}{path} is no answer of the OpenAI API: {error}") from None
