"""Errors that reach a user. Each says what was found and what would have been accepted.

```
TokenloomError
├── InvalidParameter     a request or configuration field is out of its limits (HTTP 400)
│   └── ContextLengthExceeded   prompt longer than the model's context (HTTP 400)
├── UnsupportedFeature   asked for by name, not offered by this build (HTTP 400)
├── ModelNotFound        no such model is served (HTTP 404)
├── ModelError           a checkpoint or tokenizer cannot be loaded
├── OutOfMemory          the plan does not fit the machine
├── QueueFull            admission refused, try again later (HTTP 429)
└── EngineDead           the engine process ended while the request ran (HTTP 503)
```
"""

from __future__ import annotations

MAX_FOUND = 8192
"""Characters of what a `ModelError` says was found."""


def shorten(value: object, limit: int = 100) -> str:
    """`repr(value)` cut to `limit` characters, for error messages."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class TokenloomError(Exception):
    """Base of every error that is meant for a user."""


class InvalidParameter(TokenloomError):
    """A field has a value outside its limits.

    `param` names the field as the user wrote it, `value` is what was given, `limit` says what is accepted.
    """

    def __init__(
        self, param: str, value: object, limit: str, *, code: str | None = None, message: str | None = None
    ) -> None:
        self.param = param
        self.value = value
        self.limit = limit
        self.code = code
        super().__init__(message or f"{param}: got {shorten(value)}, but it must be {limit}")


class ContextLengthExceeded(InvalidParameter):
    """The prompt does not fit the model's context; both numbers are in the message."""

    def __init__(self, num_tokens: int, max_context: int, param: str = "prompt") -> None:
        super().__init__(
            param,
            num_tokens,
            f"at most {max_context} tokens",
            code="context_length_exceeded",
            message=f"This model's maximum context length is {max_context} tokens, but the request needs "
            f"{num_tokens} tokens.",
        )


class UnsupportedFeature(TokenloomError):
    """A feature was asked for by name that this build does not offer."""

    def __init__(self, feature: str, detail: str) -> None:
        self.feature = feature
        self.detail = detail
        super().__init__(f"{feature} is not supported: {detail}")


class ModelNotFound(TokenloomError):
    """The request names a model that this server does not serve."""

    def __init__(self, model: str, available: tuple[str, ...]) -> None:
        self.model = model
        self.available = available
        super().__init__(f"The model `{model}` does not exist. Served here: {', '.join(available)}.")


class ModelError(TokenloomError):
    """A checkpoint, tokenizer or configuration cannot be loaded. What is found is cut to `MAX_FOUND` characters: it may
    quote a file, and that may be anything."""

    def __init__(self, found: str, supported: str) -> None:
        self.found = found if len(found) <= MAX_FOUND else found[: MAX_FOUND - 3] + "..."
        self.supported = supported
        super().__init__(f"found {self.found}; supported: {supported}")


class OutOfMemory(TokenloomError):
    """The memory plan does not fit this machine."""


class QueueFull(TokenloomError):
    """Admission was refused; `retry_after` is in seconds."""

    def __init__(self, limit: int, retry_after: float) -> None:
        self.limit = limit
        self.retry_after = retry_after
        super().__init__(f"{limit} requests are waiting already; try again in {retry_after:g} s")


class EngineDead(TokenloomError):
    """The engine process ended while the request was in flight."""
