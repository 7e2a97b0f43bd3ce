"""`tokenloom generate`: one text, continued in this process."""

from __future__ import annotations

import sys

from tokenloom.cli.local import LocalModel
from tokenloom.config import Config
from tokenloom.engine.sampling_params import SamplingParams


def run(config: Config, prompt: str, params: SamplingParams, *, chat: bool, adapter: str = "") -> None:
    """Print the continuation (or, with `chat`, the answer) as it comes; `adapter` is the directory of one."""
    model = LocalModel(config, adapter)
    try:
        if chat:
            pieces = model.answer([{"role": "user", "content": prompt}], params)
        else:
            pieces = model.complete(prompt, params)
        for text in pieces:
            print(text, end="", flush=True)
        print()
        sys.stdout.flush()
    finally:
        model.close()
