"""Where the files of the served model are."""

from __future__ import annotations

from pathlib import Path

from tokenloom.errors import ModelError

EMBEDDED = "tokenloom-embedded"
"""The name of the embedded model in the API."""


def model_directory(model: str) -> Path:
    """The checkpoint directory of `model`; empty means the target model inside the package.

    Raises `ModelError` when there is no such directory.
    """
    if not model:
        directory = Path(__file__).parent.parent / "embedded" / "target"
        if not directory.is_dir():
            raise ModelError(
                "a package without its embedded model", "the directory of a checkpoint as the model"
            )
        return directory
    directory = Path(model).expanduser()
    if not directory.is_dir():
        what = "a file" if directory.exists() else "no directory"
        raise ModelError(f"{what} at {model!r}", "the directory of a Hugging Face checkpoint on this machine")
    return directory


def model_name(model: str, served_name: str) -> str:
    """What the API calls the model: `served_name`, else the directory's name."""
    return served_name or (model_directory(model).resolve().name if model else EMBEDDED)
