"""One frozen configuration tree. A field has its type, default and help in one place.

The command line (`--max-batch-tokens`), the environment (`TOKENLOOM_MAX_BATCH_TOKENS`), the TOML file and
`docs/configuration.md` are generated from these declarations; nothing else reads the environment.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tokenloom.errors import InvalidParameter

ENV_PREFIX = "TOKENLOOM_"

MAX_THREADS = 256
"""Most compute threads: more would only wait for each other between ops."""


def knob(
    default: Any,
    help: str,
    *,
    check: Callable[[Any], bool] = lambda value: True,
    limit: str = "",
    words: bool = False,
) -> Any:
    """Declare a configuration field. `check` must hold for its value; `limit` says in words what it asks. Texts that
    are `words` may have commas between them wherever they are given."""
    return field(default=default, metadata={"help": help, "check": check, "limit": limit, "words": words})


def _at_least(low: int) -> dict[str, Any]:
    return {"check": lambda value: value >= low, "limit": f"at least {low}"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model, and how its numbers are held."""

    model: str = knob(
        "",
        "Directory of a Hugging Face checkpoint, a .gguf file, or the name (org/name) of a checkpoint in the local "
        "cache of the hub; empty for the embedded model.",
    )
    revision: str = knob("", "Branch, tag or commit of a model in the cache of the hub; empty for main.")
    served_model_name: str = knob(
        "",
        "Name of the model in the API; empty for org/name, or the name of the directory or the file.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = knob(
        "auto",
        "Arithmetic. auto: bfloat16 for bf16 checkpoints and quantised weights on the native kernels, else float32.",
    )
    weights: Literal["auto", "float", "int8", "int4"] = knob(
        "auto",
        "Format of the linears' weights: as in the checkpoint, widened to floats, or rounded to 8 or 4 bits at load.",
    )
    weight_cache: str = knob(
        "", "Directory that keeps packed weights, for a faster next start; empty for none."
    )
    pooling_type: Literal["last", "mean"] = knob(
        "last", "What an embedding is made of: the last token's hidden state, or the mean over all tokens."
    )
    max_context: int = knob(
        0, "Longest prompt plus output in tokens; 0 for what the model allows.", **_at_least(0)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """KV pages and the prefix cache."""

    num_pages: int = knob(0, "KV pages of 16 tokens; 0 fits them to the machine.", **_at_least(0))
    kv_memory_mb: int = knob(0, "Memory for KV pages in MiB; 0 fits it to the machine.", **_at_least(0))
    kv_dtype: Literal["auto", "float32", "bfloat16", "int8"] = knob(
        "auto", "Format of K and V: that of the arithmetic, or another (int8 is lossy; native kernels only)."
    )
    prefix_cache: bool = knob(True, "Share KV pages between requests with the same prefix.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerOptions:
    """Order and budget."""

    max_batch_tokens: int = knob(512, "Rows of one step at most (the token budget).", **_at_least(1))
    max_chunk_tokens: int = knob(
        0, "Prompt rows of one sequence per step; 0 for the whole budget.", **_at_least(0)
    )
    target_itl_ms: float = knob(
        0.0,
        "Measure at start and choose the budget for this inter-token latency; 0 keeps it.",
        **_at_least(0),
    )
    max_running: int = knob(128, "Sequences that run at once at most.", **_at_least(1))
    max_waiting: int = knob(1024, "Requests that may wait; more are refused with 429.", **_at_least(1))
    policy: Literal["fcfs", "priority", "slo"] = knob(
        "fcfs", "First come first served, by request priority, or by when the first token is due."
    )
    age_bound_s: float = knob(60.0, "A request older than this goes before all younger ones.", **_at_least(0))
    admission: Literal["optimistic", "reserve"] = knob(
        "optimistic",
        "Who may start: whose prompt fits, or only whose longest output would fit beside all others.",
    )
    slo_class: tuple[str, ...] = knob(
        (),
        "An SLO that requests can name, as NAME=tpot_ms:40,ttft_ms:500 (either may be left out); may be given several"
        " times.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOptions:
    """Adapters over the model."""

    adapter: tuple[str, ...] = knob(
        (),
        "An adapter to load at start, as NAME=DIRECTORY; may be given several times (commas between them).",
    )
    adapter_dir: str = knob(
        "", "Directory whose sub-directories are adapters, by name; it is watched while the server runs."
    )
    adapter_root: str = knob(
        "",
        "Directory in which adapters must lie that are loaded over HTTP; empty: any, but only for a server on"
        " loopback or with an API key.",
    )
    data_dir: str = knob(
        "",
        "Directory that keeps adapters and their names; empty for a temporary one that is removed at the end.",
    )
    max_adapter_mb: int = knob(
        0, "Memory for adapters in MiB, of that for KV pages; 0: as much as there is.", **_at_least(0)
    )
    max_adapter_rank: int = knob(
        256, "Adapters of a higher rank are refused.", check=lambda v: 1 <= v <= 256, limit="1 to 256"
    )


PROPOSERS = ("draft", "ngram")
"""What can suggest tokens; see docs/speculation.md."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationOptions:
    """Tokens that are guessed and verified in one step. Outputs stay the same, bit for bit."""

    speculate: tuple[str, ...] = knob(
        (),
        "What suggests tokens: draft (a small model), ngram (what followed the same words before); commas between.",
        check=lambda names: all(name in PROPOSERS for name in names) and len(set(names)) == len(names),
        limit="each at most once of " + ", ".join(PROPOSERS),
        words=True,
    )
    draft_model: tuple[str, ...] = knob(
        (),
        "Directory of a draft with the model's tokenizer, or several with commas; the embedded model has one.",
    )
    max_draft_depth: int = knob(
        8, "Tokens in a row that are guessed at most.", check=lambda v: 1 <= v <= 32, limit="1 to 32"
    )
    max_draft_tokens: int = knob(
        16,
        "Tokens that are verified for one sequence in a step.",
        check=lambda v: 1 <= v <= 64,
        limit="1 to 64",
    )
    max_verify_rows: int = knob(
        64, "Guessed tokens that are verified in one step at most, of all sequences.", **_at_least(1)
    )
    draft_width: int = knob(
        3,
        "Alternatives for one token that a draft model suggests.",
        check=lambda v: 1 <= v <= 8,
        limit="1 to 8",
    )
    draft_pace: Literal["adaptive", "fixed"] = knob(
        "adaptive",
        "Guess as much as pays on this machine at this load, or in every step as much as the limits allow.",
    )
    ngram_min_match: int = knob(
        2, "Tokens that must have occurred before, for what followed them to be guessed.", **_at_least(1)
    )
    ngram_corpus: str = knob("", "Text file in which ngram looks too (UTF-8, documents between blank lines).")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """The HTTP face."""

    host: str = knob("127.0.0.1", "Address to listen on.")
    port: int = knob(
        8000, "Port to listen on; 0 for a free one.", check=lambda v: 0 <= v < 65536, limit="0 to 65535"
    )
    api_key: str = knob("", "Key that clients must send as a bearer token; empty for none.")
    slo_key: tuple[str, ...] = knob(
        (),
        "A key that clients may send, and the SLO class of its requests, as KEY=CLASS; may be given several times.",
    )
    max_body_mb: int = knob(8, "Largest request body in MiB; larger ones get 413.", **_at_least(1))
    log_level: Literal["debug", "info", "warning", "error"] = knob("info", "How much the server logs.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    """How the engine runs."""

    threads: int = knob(
        0,
        f"Compute threads, at most {MAX_THREADS}; 0 for one per core.",
        check=lambda value: 0 <= value <= MAX_THREADS,
        limit=f"0 to {MAX_THREADS}",
    )
    kernels: Literal["auto", "native", "reference"] = knob(
        "auto", "What computes: the native kernels where they were built, else the numpy reference."
    )
    isa: Literal["auto", "avx512", "avx2", "neon", "portable"] = knob(
        "auto", "Instruction set of the native kernels; the bits are the same on each."
    )
    seed: int = knob(-1, "Seed for requests without one; -1 draws a fresh one for each.", **_at_least(-1))
    debug: bool = knob(False, "Check every invariant after each step (slow).")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole tree."""

    model: ModelOptions = ModelOptions()
    cache: CacheOptions = CacheOptions()
    scheduler: SchedulerOptions = SchedulerOptions()
    adapters: AdapterOptions = AdapterOptions()
    speculation: SpeculationOptions = SpeculationOptions()
    server: ServerOptions = ServerOptions()
    runtime: RuntimeOptions = RuntimeOptions()


SECTIONS: dict[str, type[Any]] = {
    "model": ModelOptions,
    "cache": CacheOptions,
    "scheduler": SchedulerOptions,
    "adapters": AdapterOptions,
    "speculation": SpeculationOptions,
    "server": ServerOptions,
    "runtime": RuntimeOptions,
}


@dataclass(frozen=True, slots=True)
class Knob:
    """One field as the generators see it: its section, name, type, default, help, and allowed choices."""

    section: str
    name: str
    type: Any
    default: Any
    help: str
    choices: tuple[str, ...]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()


def knobs() -> Iterator[Knob]:
    """Every knob, in the order of declaration. Names are unique over all sections."""
    for section, options in SECTIONS.items():
        hints = get_type_hints(options)
        for item in fields(options):
            hint = hints[item.name]
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            kind = str if choices else hint
            yield Knob(section, item.name, kind, item.default, item.metadata["help"], choices)


def _convert(entry: Knob, value: Any) -> Any:
    """`value` (perhaps text from the environment or the command line) as the knob's type."""
    wanted = entry.type
    if get_origin(wanted) is tuple:
        return _texts(entry, value)
    if isinstance(value, str) and wanted is not str:
        try:
            if wanted is bool:
                value = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[
                    value.lower()
                ]
            else:
                value = wanted(value)
        except (ValueError, KeyError):
            raise InvalidParameter(entry.name, value, f"of type {wanted.__name__}") from None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise InvalidParameter(entry.name, value, f"of type {wanted.__name__}")
    if entry.choices and value not in entry.choices:
        raise InvalidParameter(entry.name, value, "one of " + ", ".join(entry.choices))
    return value


def _texts(entry: Knob, value: Any) -> tuple[str, ...]:
    """Several texts; of one text, what is between the commas."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise InvalidParameter(entry.name, value, "texts")
    if isinstance(value, str) or _metadata(entry).metadata["words"]:
        items = [part.strip() for item in items for part in item.split(",") if part.strip()]
    return tuple(items)


def _metadata(entry: Knob) -> Field[Any]:
    return next(item for item in fields(SECTIONS[entry.section]) if item.name == entry.name)


def make_config(
    values: Mapping[str, Any] | None = None,
    *,
    file: str | Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Config:
    """Build the tree from flat names: `values` wins over the environment, that over the TOML `file`.

    The file may have the sections as tables or flat names. Raises `InvalidParameter` for an unknown name or a value
    outside its limits.
    """
    entries = {entry.name: entry for entry in knobs()}
    chosen: dict[str, Any] = {}
    if file is not None:
        chosen.update(_read_file(Path(file)))
    environment = os.environ if env is None else env
    for name, entry in entries.items():
        if entry.env in environment:
            chosen[name] = environment[entry.env]
    chosen.update(values or {})
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, value in chosen.items():
        entry = entries.get(name)  # type: ignore[assignment]
        if entry is None:
            raise InvalidParameter(name, value, "a known option; known are " + ", ".join(sorted(entries)))
        value = _convert(entry, value)
        metadata = _metadata(entry).metadata
        if not metadata["check"](value):
            raise InvalidParameter(name, value, metadata["limit"])
        sections[entry.section][name] = value
    return Config(**{section: options(**sections[section]) for section, options in SECTIONS.items()})


def hub_cache(env: Mapping[str, str] | None = None) -> Path:
    """Where the tools of the Hugging Face hub keep what they download on this machine, by the variables that they
    read."""
    environment = os.environ if env is None else env
    if environment.get("HF_HUB_CACHE"):
        return Path(environment["HF_HUB_CACHE"]).expanduser()
    home = environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def _read_file(path: Path) -> dict[str, Any]:
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidParameter("config", str(path), f"a readable TOML file ({error})") from None
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat.update(value if isinstance(value, dict) else {key: value})
    return flat


def flatten(config: Config) -> dict[str, Any]:
    """The effective values by flat name, for printing and export."""
    return {entry.name: getattr(getattr(config, entry.section), entry.name) for entry in knobs()}
