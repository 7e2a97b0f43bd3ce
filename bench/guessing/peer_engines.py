"""Engines beside us that speculate, each in processes of its own: OpenVINO GenAI and llama.cpp's server.

llama.cpp is measured as its server, which has every way of guessing that llama.cpp has. llama-cpp-python 0.3.36 would
not do: its `Llama` takes a Python callable that guesses and brings prompt look-up only, no draft model.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import variants
from backends import Engine, llamacpp

HERE: Final = Path(__file__).resolve().parent
CONTEXT: Final = 1024
Prompts = Sequence[Sequence[int]]


class Decoded(NamedTuple):
    """What an engine gave for some prompts, greedily, one after another: the output tokens of each (with the end of
    text, where there is one), the seconds from the first token of each to its last, and the steps of the target in
    that time."""

    token_ids: list[list[int]]
    seconds: float
    steps: int

    @property
    def num_tokens(self) -> int:
        """Tokens after the first of each prompt."""
        return sum(len(tokens) - 1 for tokens in self.token_ids)


class Peer(Protocol):
    """An engine with the models of one workload. `settings` names its ways to guess; the setting `plain` has none."""

    settings: Sequence[str]

    def decode(self, setting: str, prompts: Prompts, max_tokens: int) -> Decoded: ...

    def versions(self) -> dict[str, str]: ...

    def close(self) -> None: ...


class Models(NamedTuple):
    """Checkpoints of a workload; without a draft, what was said before is looked up."""

    target: Path
    draft: Path | None


PLAIN: Final = "plain"

_OPENVINO_DRAFT: Final[dict[str, dict[str, Any]]] = {
    **{f"draft {count}": {"num_assistant_tokens": count} for count in (2, 3, 4, 6)},
    "draft above 0.4": {"assistant_confidence_threshold": 0.4},
}
_OPENVINO_LOOKUP: Final[dict[str, dict[str, Any]]] = {
    f"look-up {count} after {match}": {"num_assistant_tokens": count, "max_ngram_size": match}
    for count, match in ((5, 3), (8, 3), (8, 2), (12, 2), (16, 2))
}
_LLAMA_DRAFT: Final[dict[str, list[str]]] = {
    **{f"draft {count}": ["--spec-draft-n-max", str(count)] for count in (2, 3, 4)},
    "draft 8 above 0.5": ["--spec-draft-n-max", "8", "--spec-draft-p-min", "0.5"],
    "draft 8 above 0.75": ["--spec-draft-n-max", "8", "--spec-draft-p-min", "0.75"],
}
_LLAMA_LOOKUP: Final[dict[str, list[str]]] = {
    **{
        f"ngram-simple {count} after {match}": [
            *("--spec-type", "ngram-simple"),
            *("--spec-ngram-simple-size-n", str(match), "--spec-ngram-simple-size-m", str(count)),
        ]
        for count, match in ((8, 2), (8, 3), (16, 3))
    },
    "ngram-mod 16 after 3": [
        *("--spec-type", "ngram-mod", "--spec-ngram-mod-n-match", "3"),
        *("--spec-ngram-mod-n-min", "1", "--spec-ngram-mod-n-max", "16"),
    ],
    "ngram-cache": ["--spec-type", "ngram-cache"],
}


class OpenVino:
    """A process of openvino_worker.py, with a pipeline that guesses and one that does not."""

    def __init__(self, models: Models, threads: int) -> None:
        self._options = _OPENVINO_DRAFT if models.draft else _OPENVINO_LOOKUP
        self.settings = list(self._options)
        target = _variant("openvino", models.target, threads)
        told = {
            "model": str(target.model),
            "draft": str(_variant("openvino", models.draft, threads).model) if models.draft else "",
            "threads": threads,
            "end_of_text": _end_of_text(models.target),
        }
        self._process = subprocess.Popen(
            [str(target.python), str(HERE / "openvino_worker.py"), json.dumps(told)],
            env=os.environ | target.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._versions: dict[str, str] = self._answer()["versions"]

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"openvino_worker.py ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def decode(self, setting: str, prompts: Prompts, max_tokens: int) -> Decoded:
        options = {} if setting == PLAIN else self._options[setting]
        request = {"options": options, "prompts": [list(p) for p in prompts], "max_tokens": max_tokens}
        if self._process.stdin:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        return Decoded(**self._answer())

    def versions(self) -> dict[str, str]:
        return self._versions

    def close(self) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        _end(self._process)


class LlamaCpp:
    """A server for each call of `decode`: some of its ways to guess remember what other requests were given, and
    the texts of a round are those of the round before."""

    def __init__(self, models: Models, threads: int) -> None:
        self._options = _LLAMA_DRAFT if models.draft else _LLAMA_LOOKUP
        self.settings = list(self._options)
        self._target = _variant("llamacpp", models.target, threads)
        self._threads = threads
        self._guess: list[str] = []
        if models.draft:
            draft = str(_variant("llamacpp", models.draft, threads).model)
            self._guess = ["--spec-type", "draft-simple", "-md", draft]
        self._versions: dict[str, str] = {}

    def _start(self, setting: str) -> llamacpp.Backend:
        extra = [] if setting == PLAIN else [*self._guess, *self._options[setting]]
        options = self._target.options | {"parallel": 1, "context": CONTEXT, "extra": extra}
        return llamacpp.Backend(Engine(str(self._target.model), "bf16", self._threads, options))

    def decode(self, setting: str, prompts: Prompts, max_tokens: int) -> Decoded:
        server = self._start(setting)
        try:
            self._versions = self._versions or server.versions()
            # The first request of a process is slow: one that says nothing about the others.
            server.complete(_completion([3], 2))
            answers = [server.complete(_completion(prompt, max_tokens)) for prompt in prompts]
        finally:
            server.close()
        timings = [answer["timings"] for answer in answers]
        outputs = [[int(token) for token in answer["tokens"]] for answer in answers]
        if [len(tokens) for tokens in outputs] != [each["predicted_n"] for each in timings]:
            raise RuntimeError("llama-server counted other tokens than it gave")
        steps = sum(each["predicted_n"] - 1 - each.get("draft_n_accepted", 0) for each in timings)
        return Decoded(outputs, sum(each["predicted_ms"] for each in timings) / 1e3, steps)

    def versions(self) -> dict[str, str]:
        return self._versions

    def close(self) -> None:
        """Every server ended with its call."""


def _completion(prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
    return {
        "prompt": list(prompt),
        "n_predict": max_tokens,
        "temperature": 0,
        "samplers": ["top_k"],
        "top_k": 1,
        "cache_prompt": False,
        "return_tokens": True,
        "stream": False,
    }


def _variant(engine: str, checkpoint: Path, threads: int) -> variants.Variant:
    """The engine with a checkpoint in bf16, converted. Raises RuntimeError where a file of it is missing."""
    variant = variants.make_variant(engine, "bf16", checkpoint, threads)
    if variant is None or variant.missing:
        raise RuntimeError(f"{engine} cannot run: there is no {variant.missing if variant else 'bf16'}")
    return variant


def _end_of_text(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["eos_token_id"])


def _end(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


ENGINES: Final[Mapping[str, Callable[[Models, int], Peer]]] = {"openvino": OpenVino, "llamacpp": LlamaCpp}


def missing(engine: str) -> str:
    """What of `engine` and of its converter is not installed; empty where nothing is missing."""
    wanted = {
        "openvino": [
            variants.environment("openvino") / "bin" / "python",
            variants.environment("ovconvert") / "bin" / "optimum-cli",
        ],
        "llamacpp": [
            variants.LLAMA_CPP / "llama-server",
            variants.environment("transformers") / "bin" / "python",
        ],
    }[engine]
    return ", ".join(str(path.relative_to(variants.WORK)) for path in wanted if not path.exists())
