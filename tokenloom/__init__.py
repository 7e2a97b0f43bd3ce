"""tokenloom: one engine for every kind of token work, with outputs that never depend on the batch.

`LLM` and `SamplingParams` are the Python face; importing the package itself stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenloom.engine.sampling_params import SamplingParams
    from tokenloom.serving.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from tokenloom.serving.llm import LLM

        return LLM
    if name == "SamplingParams":
        from tokenloom.engine.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
