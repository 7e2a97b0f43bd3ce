"""The `tokenloom` command."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tokenloom import __version__
from tokenloom.bench.load.options import LoadOptions, SweepOptions
from tokenloom.cli.load_options import LoadCommand, loading
from tokenloom.cli.options import configured
from tokenloom.config import Config
from tokenloom.engine.sampling_params import SamplingParams
from tokenloom.errors import TokenloomError


class Commands(TyperGroup):
    """The group of commands; turns an error that is meant for a user into one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except TokenloomError as error:
            print(f"tokenloom: {error}", file=sys.stderr)
            raise typer.Exit(1) from None


app = typer.Typer(
    name="tokenloom",
    cls=Commands,
    help="Serve language models; what a request gets never depends on whom it shares the machine with.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure the engine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bench, name="bench")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object (as the last line).")]
SaveResult = Annotated[bool, typer.Option("--save-result", help="Save the result as a JSON file.")]
ResultDir = Annotated[str, typer.Option(help="Directory for the saved result; the current one if not given.")]
ResultFilename = Annotated[
    str, typer.Option(help="Name of the saved file; made of label, rate, model and date.")
]
Metadata = Annotated[list[str] | None, typer.Option(help="KEY=VALUE pairs that go into the result.")]
Label = Annotated[str, typer.Option(help="Name of the run, in the result and its file's name.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the result into this PNG file.")]
DisableTqdm = Annotated[bool, typer.Option("--disable-tqdm", help="Show no progress.")]
MaxTokens = Annotated[int, typer.Option(help="Most tokens of an answer.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Seed = Annotated[int, typer.Option("--sampling-seed", help="Seed of the sampler; -1 draws one.")]


@app.command()
@configured(
    ("model", "cache", "scheduler", "adapters", "speculation", "server", "runtime"), model_argument=True
)
def serve(*, config: Config) -> None:
    """Serve a model (the embedded one when none is named) through the OpenAI API."""
    # Imported here so that `tokenloom --help` does not wait for the web server; the same below.
    from tokenloom.cli.serve import run

    run(config)


@app.command()
@configured()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    *,
    config: Config,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    sampling_seed: Seed = -1,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message.")] = False,
    adapter: Annotated[str, typer.Option(metavar="DIRECTORY", help="Adapter over the model.")] = "",
) -> None:
    """Continue a text, in this process."""
    from tokenloom.cli.generate import run

    text = sys.stdin.read() if prompt == "-" else prompt
    run(config, text, sampling(max_tokens, temperature, sampling_seed), chat=chat, adapter=adapter)


@app.command()
@configured(model_argument=True)
def chat(
    *,
    config: Config,
    url: Annotated[str, typer.Option(help="Talk to this server instead of loading a model.")] = "",
    api_key: Annotated[str, typer.Option(help="Key for --url.")] = "",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.7,
    sampling_seed: Seed = -1,
) -> None:
    """Talk to a model, in this process or on a server."""
    from tokenloom.cli.chat import run

    run(config, url, api_key, system, sampling(max_tokens, temperature, sampling_seed))


@bench.command()
@configured()
def throughput(
    *,
    config: Config,
    num_prompts: Annotated[int, typer.Option(help="Random prompts to run.")] = 64,
    input_tokens: Annotated[int, typer.Option(help="Tokens of a random prompt.")] = 128,
    output_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 128,
    prompts: Annotated[
        Path | None, typer.Option(help="File with one prompt a line, instead of random ones.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Run many prompts at once in this process and print requests and tokens per second."""
    from tokenloom.cli.throughput import run

    run(config, num_prompts, input_tokens, output_tokens, prompts, as_json)


@app.command()
@configured(("model", "runtime"), model_argument=True)
def quantize(
    *,
    config: Config,
    report: Annotated[bool, typer.Option("--report", help="Print what the weights' format costs.")] = False,
    text: Annotated[
        Path | None, typer.Option(help="File with a text to read, instead of the built-in stories.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Most tokens of the text to predict.")] = 1024,
    as_json: JsonFlag = False,
) -> None:
    """Compare a model with itself after its weights were rounded (--weights int8 or int4)."""
    from tokenloom.cli.quantize import run

    run(config, report, text, tokens, as_json)


@bench.command()
@configured(("model", "cache", "scheduler", "runtime"), model_argument=True)
def roofline(*, config: Config, as_json: JsonFlag = False) -> None:
    """Measure this machine's limits, and how near each op and each step comes to them."""
    from tokenloom.cli.roofline import run

    run(config, as_json)


@bench.command("serve", cls=LoadCommand)
@loading(LoadOptions)
def bench_serve(
    options: LoadOptions,
    *,
    save_result: SaveResult = False,
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="Save what each request saw, too.")
    ] = False,
    result_dir: ResultDir = "",
    result_filename: ResultFilename = "",
    metadata: Metadata = None,
    label: Label = "",
    plot: Plot = None,
    disable_tqdm: DisableTqdm = False,
    as_json: JsonFlag = False,
) -> None:
    """Put load on a server of the OpenAI API and measure what its clients see."""
    from tokenloom.cli.load import Output, serve

    serve(
        options,
        Output(
            save_result=save_result,
            save_detailed=save_detailed,
            result_dir=result_dir,
            result_filename=result_filename,
            metadata=tuple(metadata or ()),
            label=label,
            plot=plot,
            disable_tqdm=disable_tqdm,
            as_json=as_json,
        ),
    )


@bench.command("sweep", cls=LoadCommand)
@loading(LoadOptions, SweepOptions)
def bench_sweep(
    options: LoadOptions,
    search: SweepOptions,
    *,
    save_result: SaveResult = False,
    result_dir: ResultDir = "",
    result_filename: ResultFilename = "",
    metadata: Metadata = None,
    label: Label = "",
    plot: Plot = None,
    disable_tqdm: DisableTqdm = False,
    as_json: JsonFlag = False,
) -> None:
    """Find the highest request rate (or speed of a trace) that meets the objectives of --goodput."""
    from tokenloom.cli.load import Output, sweep

    sweep(
        options,
        search,
        Output(
            save_result=save_result,
            result_dir=result_dir,
            result_filename=result_filename,
            metadata=tuple(metadata or ()),
            label=label,
            plot=plot,
            disable_tqdm=disable_tqdm,
            as_json=as_json,
        ),
    )


@app.command()
@configured(("model", "cache", "runtime"))
def doctor(*, config: Config, as_json: JsonFlag = False) -> None:
    """Show what this machine offers and what the engine would use of it with these options."""
    from tokenloom.cli.doctor import doctor as examine

    examine(config, as_json)


@app.command()
def version() -> None:
    """Print the version."""
    print(f"tokenloom {__version__} (Python {platform.python_version()})")


def sampling(max_tokens: int, temperature: float, seed: int) -> SamplingParams:
    """Sampling parameters from the options of a command."""
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=None if seed < 0 else seed)


def main() -> None:
    """Entry point of the console script."""
    app()
