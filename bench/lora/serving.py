"""tokenloom in this process, with random adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases import Choice, Prompts
from files import AdapterFiles, AdapterKind

from tokenloom import LLM, SamplingParams
from tokenloom.config import Config, make_config
from tokenloom.engine.engine import Engine
from tokenloom.engine.plan import StepRecord
from tokenloom.kernels.native import extension
from tokenloom.runtime.adapter_host import AdapterHost
from tokenloom.serving.adapter_library import AdapterLibrary
from tokenloom.serving.assembly import EngineParts, build_engine, open_library
from tokenloom.serving.load_listener import SilentLoad
from tokenloom.serving.threads import set_blas_threads


class Served:
    """An `LLM` whose adapters have numbers: the order in which `load` got them."""

    def __init__(self, config: Config, parts: EngineParts, llm: LLM) -> None:
        self._config = config
        self.llm = llm
        self.engine: Engine = parts.engine
        self.host: AdapterHost | None = parts.adapters
        self.names: list[str] = []
        self.steps: list[StepRecord] = []
        """Every step since it was cleared."""
        self.engine.on_step = self.steps.append

    def load(self, files: AdapterFiles, kinds: Sequence[AdapterKind]) -> None:
        """Register adapters; they are numbered on from those that are there."""
        for kind, directory in zip(kinds, files.make(kinds), strict=True):
            self.llm.load_adapter(kind.name, directory)
            self.names.append(kind.name)

    def open_library(self, data_dir: str) -> AdapterLibrary:
        """A library of its own for the same engine."""
        adapters = replace(self._config.adapters, data_dir=data_dir)
        return open_library(replace(self._config, adapters=adapters))

    def adapter_names(self, adapters: Sequence[Choice]) -> list[str | None]:
        """What `LLM` calls them."""
        return [None if number is None else self.names[number] for number in adapters]

    def serve(self, prompts: Prompts, num_output: int, adapters: Sequence[Choice]) -> list[list[int]]:
        """As `cases.Serve`."""
        self.steps.clear()
        params = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        outputs = self.llm.generate(prompts, params, adapter=self.adapter_names(adapters), progress=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


@contextmanager
def serving(spec: dict[str, Any], **options: Any) -> Iterator[Served]:
    """The engine under test: bf16 on the native kernels (fp32 on numpy where these are missing)."""
    set_blas_threads(spec["threads"])
    chosen = {
        "model": spec["model"],
        "threads": spec["threads"],
        "dtype": "float32" if extension.missing() else "bfloat16",
        "max_running": 64,
        "max_batch_tokens": 512,
        "max_waiting": 4096,
    }
    config = make_config(chosen | options)
    parts = build_engine(config, SilentLoad())
    with LLM.from_parts(config, parts) as llm:
        yield Served(config, parts, llm)


def model_directory(spec: dict[str, Any]) -> Path:
    """Where the checkpoint lies, the embedded one included."""
    import tokenloom

    return Path(spec["model"] or Path(tokenloom.__file__).parent / "embedded" / "target")
