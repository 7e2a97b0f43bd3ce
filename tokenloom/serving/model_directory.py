"""Where the files of the served model are."""

from __future__ import annotations

from pathlib import Path

from tokenloom.errors import ModelError
from tokenloom.gguf.file import SUFFIX

EMBEDDED = "tokenloom-embedded"
"""The name of the embedded model in the API."""


def model_directory(model: str) -> Path:
    """The checkpoint directory or the GGUF file of `model`; empty means the target model inside the package.

    Raises `ModelError` when there is neither.
    """
    if not model:
        directory = Path(__file__).parent.parent / "embedded" / "target"
        if not directory.is_dir():
            raise ModelError(
                "a package without its embedded model", "the directory of a checkpoint as the model"
            )
        return directory
    path = Path(model).expanduser()
    if not path.is_dir() and not (path.is_file() and path.name.lower().endswith(SUFFIX)):
        what = "a file" if path.exists() else "no directory"
        raise ModelError(
            f"{what} at {model!r}",
            f"the directory of a Hugging Face checkpoint, or a {SUFFIX} file, on this machine",
        )
    return path


def model_name(model: str, served_name: str) -> str:
    """What the API calls the model: `served_name`, else the name of the directory or the file."""
    if served_name or not model:
        return served_name or EMBEDDED
    path = model_directory(model).resolve()
    return path.name if path.is_dir() else path.stem
