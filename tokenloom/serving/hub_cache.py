"""Models that the tools of the Hugging Face hub have downloaded, found by name in their cache. Nothing is fetched.

```
CACHE/models--ORG--NAME/refs/REVISION        the commit that a branch or tag stood at, as text
                       /snapshots/COMMIT/    files of that commit, as links into ../../blobs
                       /blobs/*.incomplete   downloads that were not finished
```
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from tokenloom.errors import ModelError
from tokenloom.gguf.file import SUFFIX
from tokenloom.models.checkpoint import INDEX_FILE, SINGLE_FILE
from tokenloom.models.hf_config import CONFIG_FILE
from tokenloom.models.json_fields import open_regular, read_json, shorten

DEFAULT_REVISION: Final = "main"

_NAME: Final = re.compile(
    r"(?:[A-Za-z0-9_](?:[\w.-]{0,94}[\w])?/)?[A-Za-z0-9_](?:[\w.-]{0,94}[\w])?", re.ASCII
)
_REVISION: Final = re.compile(r"[\w][\w.+-]*(?:/[\w][\w.+-]*){0,8}", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_MAX_REVISION: Final = 200
_MAX_SHOWN: Final = 20
_WEIGHTS: Final = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt")


def is_model_name(text: str) -> bool:
    """Whether `text` can be the name of a model in the hub: "name" or "org/name"."""
    return _NAME.fullmatch(text) is not None and ".." not in text and "--" not in text


def cached_snapshot(name: str, revision: str, cache: Path) -> Path:
    """The directory with the files of model `name` at `revision` (a branch, tag or commit).

    Raises `ModelError` that says where it looked, what is missing, and how to download it.
    """
    cure = f"a model that was downloaded with `hf download {name}"
    cure += "`" if revision == DEFAULT_REVISION else f" --revision {revision}`"
    if len(revision) > _MAX_REVISION or not _REVISION.fullmatch(revision) or ".." in revision:
        raise ModelError(
            f"revision {shorten(revision)} of {name}", "the name of a branch or tag, or a commit"
        )
    folder = cache / f"models--{name.replace('/', '--')}"
    if not folder.is_dir():
        raise ModelError(f"no directory {name!r} here, and no model of that name in {cache}", cure)
    commit = _commit(folder, name, revision, cure)
    snapshot = folder / "snapshots" / commit
    if not snapshot.is_dir():
        raise ModelError(f"{name} at {revision} without its files: no directory {snapshot}", cure)
    missing = _missing(snapshot)
    if missing:
        begun = any(folder.glob("blobs/*.incomplete"))
        state = "its download was not finished" if begun else "it is incomplete"
        raise ModelError(f"{snapshot} without {', '.join(missing)}: {state}", cure)
    return snapshot


def _commit(folder: Path, name: str, revision: str, cure: str) -> str:
    if _COMMIT.fullmatch(revision):
        return revision
    path = folder / "refs" / revision
    if not path.is_file():
        refs = folder / "refs"
        known = sorted(str(ref.relative_to(refs)) for ref in refs.rglob("*") if ref.is_file())
        raise ModelError(f"{name} without the revision {revision!r}; {refs} has {shorten(known)}", cure)
    with open(open_regular(path), "rb") as file:
        text = file.read(100).decode("ascii", "replace").strip()
    if not _COMMIT.fullmatch(text):
        raise ModelError(f"{path} with {shorten(text)}", "the 40 hexadecimal digits of a commit")
    return text


def _missing(snapshot: Path) -> list[str]:
    """Files that a model needs and `snapshot` lacks, or has as links to nothing."""
    present = [entry.name for entry in os.scandir(snapshot) if os.path.exists(entry.path)]
    is_gguf = CONFIG_FILE not in present and any(name.lower().endswith(SUFFIX) for name in present)
    missing = [] if CONFIG_FILE in present or is_gguf else [CONFIG_FILE]
    missing += sorted(entry.name for entry in os.scandir(snapshot) if entry.name not in present)
    if INDEX_FILE in present and SINGLE_FILE not in present:
        listed = read_json(snapshot / INDEX_FILE).get("weight_map")
        shards = (
            {shard for shard in listed.values() if isinstance(shard, str)}
            if isinstance(listed, dict)
            else set()
        )
        missing += sorted(shards - set(present) - set(missing))
    elif not (is_gguf or any(name.endswith(_WEIGHTS) for name in present)) and SINGLE_FILE not in missing:
        missing.append(SINGLE_FILE)
    return (
        missing
        if len(missing) <= _MAX_SHOWN
        else [*missing[:_MAX_SHOWN], f"{len(missing) - _MAX_SHOWN} more"]
    )
