"""The models that the package ships; docs/embedded-models.md says what they are and how they were made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

DRAFT: Final = Path(__file__).parent / "draft"
"""Directory of the draft model of the target."""

DRAFT2: Final = Path(__file__).parent / "draft2"
"""Directory of the second one, which learnt what the first does not foresee."""

ADAPTERS: Final[Mapping[str, Path]] = MappingProxyType(
    {name: Path(__file__).parent / "adapters" / name for name in ("pirate", "card", "repeat")}
)
"""Directories of the LoRA adapters over the target, in the PEFT format, by name."""
