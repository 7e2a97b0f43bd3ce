"""What the `tokenizers` library leaves to its callers where a file comes from a stranger."""

from __future__ import annotations

import json
from typing import Any, Final

import tokenizers

from tokenloom.errors import ModelError, shorten

MAX_EXPANSION: Final = 256
"""Characters that one character of a text may become at most, by all replacements together."""


def check_expansion(backend: tokenizers.Tokenizer, where: str) -> None:
    """Raise `ModelError` where the normalizers or the decoders of `backend` could blow a short text up: replacements
    that follow one another multiply."""
    for name, step in (("normalizer", backend.normalizer), ("decoder", backend.decoder)):
        if step is None:
            continue
        most = _expansion(json.loads(step.__getstate__()))
        if most > MAX_EXPANSION:
            raise ModelError(
                f"{where} whose {name} makes up to {shorten(most)} characters of one",
                f"at most {MAX_EXPANSION}",
            )


def _expansion(step: Any) -> int:
    """Most characters that one becomes in `step`, which is an object of tokenizer.json."""
    if not isinstance(step, dict):
        return 1
    product = 1
    for inner in (*(step.get("normalizers") or ()), *(step.get("decoders") or ())):
        product = min(product * _expansion(inner), MAX_EXPANSION + 1)
    # An empty match leaves the character itself.
    longest = max(
        (len(step[key]) + 1 for key in ("content", "prepend") if isinstance(step.get(key), str)), default=1
    )
    return product * (1 if longest <= 2 else longest)
