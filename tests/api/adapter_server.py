"""A server over a random model of two layers that computes for real, with adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.api.helpers import Server
from tokenloom.config import make_config
from tokenloom.serving.adapter_service import AdapterService
from tokenloom.serving.assembly import build_engine, open_library
from tokenloom.serving.load_listener import SilentLoad
from tokenloom.serving.local_client import ThreadEngineClient

MODEL = "tiny"


@contextlib.contextmanager
def serve_model(directory: Path, **options: Any) -> Iterator[Server]:
    """The model in `directory` under `MODEL`; `options` are those of the configuration."""
    config = make_config(
        {
            "model": str(directory),
            "served_model_name": MODEL,
            "dtype": "float32",
            "threads": 1,
            "num_pages": 2048,
            "debug": True,
            **options,
        },
        env={},
    )
    with contextlib.closing(open_library(config)) as library:
        parts = build_engine(config, SilentLoad())
        client = ThreadEngineClient(
            parts.engine, parts.tokenizer, parts.card, seeds=parts.seeds, adapters=parts.adapters
        )
        adapters = AdapterService(client, library, model=MODEL, options=config.adapters)
        adapters.load_configured()
        with Server(client, config, adapters) as server:
            yield server
