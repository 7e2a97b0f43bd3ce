"""`tokenloom quantize`: what a model loses when its weights are rounded."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tokenloom.bench.quantization_report import (
    ROWS,
    WINDOW,
    Comparison,
    compare,
    cut,
    held_out_text,
    weight_sizes,
)
from tokenloom.cli.local import load
from tokenloom.config import Config, SchedulerOptions
from tokenloom.engine.batch import PAGE_SIZE
from tokenloom.errors import InvalidParameter
from tokenloom.models.formats import Formats
from tokenloom.models.loading import describe_model
from tokenloom.models.memory_plan import show_bytes
from tokenloom.serving.assembly import choose_formats, choose_ops
from tokenloom.serving.model_directory import model_directory


def read_text(path: Path | None) -> str:
    """The text of a file, or the stories of the package. Raises `InvalidParameter` if it cannot be read."""
    if path is None:
        return held_out_text()
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameter("text", str(path), f"a readable text file ({error})") from None


def run(config: Config, report: bool, text: Path | None, tokens: int, as_json: bool) -> None:
    """Compare the model with itself in the weight format of `config`, and print the report."""
    weights = config.model.weights
    if weights not in ("int8", "int4"):
        raise InvalidParameter("weights", weights, "int8 or int4")
    if not report:
        raise InvalidParameter(
            "report", report, "given: weights are rounded when a model is loaded, this command only compares"
        )
    if tokens < 1:
        raise InvalidParameter("tokens", tokens, "at least 1")
    written = read_text(text)
    ops = choose_ops(config)
    directory = model_directory(config.model.model, config.model.revision)
    before, after = weight_sizes(directory, weights)
    formats = choose_formats(config, describe_model(directory, weights=weights), ops)
    # By name: "auto" may mean another arithmetic for the model as it is, and the report would count that too.
    config = replace(config, model=replace(config.model, dtype=formats.dtype))
    result = _compare(config, written, tokens)
    _show(weights, result, before, after, formats)
    if as_json:
        sizes = {"weight_bytes": before, "weight_bytes_quantized": after}
        print(json.dumps({"weights": weights, **asdict(formats), **result.as_dict(), **sizes}))


def _compare(config: Config, text: str, tokens: int) -> Comparison:
    small = replace(
        config,
        cache=replace(config.cache, num_pages=-(-WINDOW // PAGE_SIZE), kv_memory_mb=0, prefix_cache=False),
        scheduler=SchedulerOptions(max_batch_tokens=ROWS, max_running=1),
    )
    original = load(replace(small, model=replace(config.model, weights="auto")))
    try:
        window = min(WINDOW, original.card.max_context)
        windows = cut(original.tokenizer.encode(text), window, tokens)
        total = sum(len(tokens) - 1 for tokens in windows)
        rounded = load(small)
        try:
            console = Console(stderr=True)
            with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
                task = progress.add_task("tokens", total=total)
                return compare(
                    original.engine.executor,
                    rounded.engine.executor,
                    windows,
                    original.card.vocab_size,
                    lambda done: progress.update(task, completed=done),
                )
        finally:
            rounded.engine.close()
    finally:
        original.engine.close()


def _show(weights: str, result: Comparison, before: int, after: int, formats: Formats) -> None:
    table = Table(show_header=True, box=None, pad_edge=False)
    table.add_column("")
    table.add_column("as it is", justify="right")
    table.add_column(weights, justify="right")
    table.add_row("weights", show_bytes(before), f"{show_bytes(after)} ({after / before:.0%})")
    table.add_row("perplexity", f"{result.perplexity:.4f}", f"{result.perplexity_quantized:.4f}")
    table.add_row("mean KL divergence (nats)", "", f"{result.mean_kl:.6f}")
    table.add_row("largest KL divergence (nats)", "", f"{result.max_kl:.6f}")
    table.add_row("same likeliest token", "", f"{result.same_argmax:.2%}")
    console = Console()
    console.print(table)
    console.print(f"over {result.num_tokens} predicted tokens")
    console.print(
        f"both with dtype {formats.dtype} and kv_dtype {formats.kv_dtype}, {formats.kernels} kernels"
    )
