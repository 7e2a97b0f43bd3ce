"""`tokenloom bench throughput`: all prompts at once through an engine in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tokenloom.bench.throughput import Throughput, measure, random_prompts
from tokenloom.cli.local import load
from tokenloom.config import Config
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import InvalidParameter


def read_prompts(path: Path) -> list[str]:
    """The non-empty lines of a text file. Raises `InvalidParameter` when there are none."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameter("prompts", str(path), f"a readable text file ({error})") from None
    if not lines:
        raise InvalidParameter("prompts", str(path), "a file with at least one line")
    return lines


def show(result: Throughput) -> None:
    """Print the counts and rates as a table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in result.as_dict().items():
        table.add_row(name.replace("_", " "), f"{value:,}")
    Console().print(table)


def run(
    config: Config,
    num_prompts: int,
    input_tokens: int,
    output_tokens: int,
    prompts: Path | None,
    as_json: bool,
) -> None:
    """Measure and print. Random prompts are ignored where a file is given."""
    counts = {"num_prompts": num_prompts, "input_tokens": input_tokens, "output_tokens": output_tokens}
    for name, value in counts.items():
        if value < 1:
            raise InvalidParameter(name, value, "at least 1")
    texts = [] if prompts is None else read_prompts(prompts)
    parts = load(config)
    try:
        token_ids = [parts.tokenizer.encode(text) for text in texts] or random_prompts(
            num_prompts, input_tokens, parts.card.vocab_size
        )
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("requests", total=len(token_ids))
            result = measure(
                parts.engine, token_ids, params, lambda done: progress.update(task, completed=done)
            )
    finally:
        parts.engine.close()
    show(result)
    if as_json:
        print(json.dumps({"model": parts.card.name, **result.as_dict()}))
