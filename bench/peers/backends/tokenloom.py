"""tokenloom in this process, through `LLM`."""

from __future__ import annotations

import hashlib
from pathlib import Path

from workloads import Request

import tokenloom as package
from backends import Engine
from tokenloom import LLM, SamplingParams


class Backend:
    """`LLM` with the options a user with two cores would take."""

    def __init__(self, engine: Engine) -> None:
        options = {
            "threads": engine.threads,
            "dtype": "bfloat16",
            "max_running": 64,
            "max_batch_tokens": 512,
        }
        if engine.precision != "bf16":
            options["weights"] = engine.precision
        self._llm = LLM(engine.model, **(options | engine.options))

    def generate(self, requests: list[Request]) -> list[list[int]]:
        outputs = self._llm.generate(
            [{"prompt_token_ids": request.prompt} for request in requests],
            [
                SamplingParams(max_tokens=request.num_output, temperature=0.0, ignore_eos=True)
                for request in requests
            ],
            progress=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def versions(self) -> dict[str, str]:
        return {"tokenloom": package.__version__, "source": source_hash()}

    def close(self) -> None:
        self._llm.close()


def source_hash() -> str:
    """Tells two working states of the package apart, compiled libraries included."""
    root = Path(package.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".so", ".cpp", ".h"):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
