"""Where the files of the served model are."""

from __future__ import annotations

from pathlib import Path

from tokenloom.config import hub_cache
from tokenloom.errors import InvalidParameter, ModelError
from tokenloom.serving.hub_cache import DEFAULT_REVISION, cached_snapshot, is_model_name

EMBEDDED = "tokenloom-embedded"
"""The name of the embedded model in the API."""


def model_directory(model: str, revision: str = "") -> Path:
    """The checkpoint directory of `model`; empty means the target model inside the package.

    A model that is no directory may be the name of one in the cache of the Hugging Face hub, "org/name", at
    `revision` ("org/name@revision" says the same; empty: main). Raises `ModelError` when there is no such
    directory, and `InvalidParameter` for a revision of what has none.
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
        raise ModelError(f"a file at {model!r}", "the directory of a Hugging Face checkpoint on this machine")
    name, _, own = model.partition("@")
    if not is_model_name(name) or (own == "" and "@" in model):
        raise ModelError(
            f"no directory at {model!r}",
            "the directory of a Hugging Face checkpoint on this machine, or the name of a downloaded model",
        )
    if own and revision not in ("", own):
        raise InvalidParameter("revision", revision, f"left out: the model says {own!r}")
    return cached_snapshot(name, own or revision or DEFAULT_REVISION, hub_cache())


def model_name(model: str, served_name: str) -> str:
    """What the API calls the model: `served_name`, else the directory's name, or "org/name" of one from the hub."""
    if served_name:
        return served_name
    if not model:
        return EMBEDDED
    directory = Path(model).expanduser()
    return directory.resolve().name if directory.is_dir() else model.partition("@")[0]
