"""Where the files of the served model are."""

from __future__ import annotations

from pathlib import Path

from tokenloom.config import hub_cache
from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.gguf.file import SUFFIX
from tokenloom.serving.hub_cache import DEFAULT_REVISION, cached_snapshot, is_model_name

EMBEDDED = "tokenloom-embedded"
"""The name of the embedded model in the API."""


def model_directory(model: str, revision: str = "") -> Path:
    """The checkpoint directory or the GGUF file of `model`; empty means the target model inside the package.

    A model that is neither may be the name of one in the cache of the Hugging Face hub, "org/name", at
    `revision` ("org/name@revision" says the same; empty: main). Raises `ModelError` when there is no such
    directory or file, and `InvalidParameter` for a revision of what has none.
    """
    if not model:
        directory = Path(__file__).parent.parent / "embedded" / "target"
        if not directory.is_dir():
            raise ModelError(
                "a package without its embedded model", "the directory of a checkpoint as the model"
            )
    else:
        directory = Path(model).expanduser()
    if directory.is_dir():
        if revision:
            raise InvalidParameter("revision", revision, "left out: the model is a directory")
        return directory
    if directory.exists():
        if not (directory.is_file() and directory.name.lower().endswith(SUFFIX)):
            raise ModelError(
                f"a file at {model!r}",
                f"the directory of a Hugging Face checkpoint, or a {SUFFIX} file, on this machine",
            )
        if revision:
            raise InvalidParameter("revision", revision, "left out: the model is a file")
        return directory
    name, _, own = model.partition("@")
    if not is_model_name(name) or (own == "" and "@" in model):
        raise ModelError(
            f"no directory at {model!r}",
            f"the directory of a Hugging Face checkpoint, or a {SUFFIX} file, on this machine, or the name of a "
            "downloaded model",
        )
    if own and revision not in ("", own):
        raise InvalidParameter("revision", revision, f"left out: the model says {own!r}")
    return cached_snapshot(name, own or revision or DEFAULT_REVISION, hub_cache())


def model_name(model: str, served_name: str) -> str:
    """What the API calls the model: `served_name`, else the name of the directory or the file, or "org/name" of one
    from the hub."""
    if served_name:
        return served_name
    if not model:
        return EMBEDDED
    path = Path(model).expanduser()
    if path.is_file():
        return path.resolve().stem
    return path.resolve().name if path.is_dir() else model.partition("@")[0]
