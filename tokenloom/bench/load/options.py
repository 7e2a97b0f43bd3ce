"""Options of the load generator. The names are those of `vllm bench serve` where they mean the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from math import inf, isfinite
from typing import Any, Literal

import msgspec

from tokenloom.bench.load.objectives import METRICS, parse_goodput
from tokenloom.errors import InvalidParameter


def option(
    default: Any,
    help: str,
    *,
    check: Callable[[Any], bool] = lambda value: True,
    limit: str = "",
    names: tuple[str, ...] = (),
) -> Any:
    """Declare an option. `check` must hold for a value that was given; `names` are further flags for it."""
    metadata = {"help": help, "check": check, "limit": limit, "names": names}
    return field(default=default, metadata=metadata)


def _at_least(low: float) -> dict[str, Any]:
    return {"check": lambda value: low <= value < inf, "limit": f"at least {low}"}


def _between(low: int, high: int) -> dict[str, Any]:
    # What is allocated for a run grows with these numbers.
    return {"check": lambda value: low <= value <= high, "limit": f"from {low} to {high}"}


MAX_TOKENS = 10_000_000
MAX_REQUESTS = 1_000_000

_ABOVE_0: dict[str, Any] = {"check": lambda value: 0 < value < inf, "limit": "above 0"}
# Gaps between arrivals are finite numbers.
_RATE: dict[str, Any] = {"check": lambda value: value >= 1e-6, "limit": "at least 1e-06, or inf"}


def flag(name: str) -> str:
    """The option of a field: num_prompts -> --num-prompts."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What is sent, where, and when. None = not given."""

    backend: Literal["openai", "openai-chat"] = option(
        "openai", "Completions or chat completions.", names=("--endpoint-type",)
    )
    base_url: str = option("", "Server, such as http://127.0.0.1:8000; goes before --host and --port.")
    host: str = option("127.0.0.1", "Host of the server.")
    port: int = option(8000, "Port of the server.", check=lambda value: 0 < value < 65536, limit="1 to 65535")
    endpoint: str = option("", "Path, if it is not /v1/completions or /v1/chat/completions.")
    header: tuple[str, ...] = option((), "Headers KEY=VALUE for every request.")
    model: str = option("", "Model to ask for; the first one that the server lists if not given.")
    tokenizer: str = option(
        "", "Local directory with tokenizer.json; without it words are tried out at the server's /tokenize."
    )
    vocab_size: int = option(
        0, "Draw token ids below this number; needs no tokenizer.", **_between(0, MAX_TOKENS)
    )
    prompt_form: Literal["auto", "ids", "text"] = option(
        "auto", "Made-up prompts as token ids (completions only) or as text. auto: ids where possible."
    )
    temperature: float = option(0.0, "Sampling temperature.", **_at_least(0))
    top_p: float | None = option(None, "Top-p of the sampling.", **_ABOVE_0)
    ignore_eos: bool = option(False, "Ask the server to go on to the output length asked for (an extension).")
    extra_body: str = option("", "JSON object of more fields for every request.")
    continuous_usage: bool = option(
        True, "Ask for the number of tokens in each chunk (an extension, off with --no-continuous-usage)."
    )
    timeout: float = option(600.0, "Seconds after which a request has failed.", **_ABOVE_0)

    dataset_name: Literal["random", "custom"] = option("random", "Random tokens, or the prompts of a file.")
    dataset_path: str = option("", "JSONL file with a prompt in each line, for --dataset-name custom.")
    custom_output_len: int = option(
        256,
        "Output tokens of a custom prompt; -1 takes output_tokens of each line.",
        check=lambda value: value == -1 or value > 0,
        limit="above 0, or -1",
    )
    random_input_len: int = option(1024, "Mean prompt tokens of random prompts.", **_between(1, MAX_TOKENS))
    random_output_len: int = option(128, "Mean output tokens of random prompts.", **_between(1, MAX_TOKENS))
    random_range_ratio: float = option(
        0.0,
        "Random lengths are uniform from (1 - r) to (1 + r) times their mean.",
        check=lambda value: 0 <= value < 1,
        limit="at least 0 and below 1",
    )
    random_prefix_len: int = option(
        0, "Tokens before each random prompt that all share.", **_between(0, MAX_TOKENS)
    )
    trace: str = option("", "Replay this trace (may be gzip) instead of a dataset.")
    trace_format: Literal["auto", "azure", "mooncake", "aibrix", "coding-agent"] = option(
        "auto", "Format of the trace; auto looks at its first line."
    )
    speed: float = option(1.0, "Replay a trace this many times faster, think times too.", **_ABOVE_0)
    length_scale: float = option(
        1.0,
        "Multiply all lengths of a trace; shared prefixes stay shared, texts become tokens.",
        check=lambda value: 0 < value <= 100,
        limit="above 0 and at most 100",
    )
    max_request_tokens: int = option(
        0, "Leave out requests of a trace with more tokens, prompt and output; 0 for none.", **_at_least(0)
    )
    num_prompts: int = option(
        1000, "Requests to send at most; a trace is not read further.", **_between(1, MAX_REQUESTS)
    )
    num_warmups: int = option(
        0,
        "Requests sent beforehand, of the same shape and other content.",
        names=("--warmups",),
        **_between(0, MAX_REQUESTS),
    )
    seed: int = option(0, "Seed of lengths, arrivals and prompts.", **_at_least(0))

    request_rate: float | None = option(
        None,
        "Requests (or sessions) per second; inf sends all at once. Not given: the trace's times.",
        **_RATE,
    )
    burstiness: float = option(
        1.0, "Shape of the gamma distribution of the gaps; 1 is Poisson, less is burstier.", **_RATE
    )
    max_concurrency: int = option(0, "Requests in flight at most; 0 for any number.", **_at_least(0))
    duration: float = option(
        0.0, "Seconds after which no request is sent any more; 0 for none.", **_at_least(0)
    )
    ready_check_timeout_sec: float = option(
        30.0, "Seconds to wait for the first answer of the server; 0 skips the check.", **_at_least(0)
    )
    goodput: tuple[str, ...] = option((), "Objectives in ms for goodput, such as ttft:200 tpot:50 e2el:4000.")
    percentile_metrics: str = option(
        ",".join(METRICS), f"Latencies to show, of {', '.join(METRICS)}, separated by commas."
    )
    metric_percentiles: str = option("50,90,99", "Percentiles to show, separated by commas.")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.dataset_name == "custom" and not self.dataset_path and not self.trace:
            raise InvalidParameter("--dataset-path", "", "given for --dataset-name custom")
        if self.dataset_path and self.dataset_name != "custom":
            raise InvalidParameter("--dataset-path", self.dataset_path, "used with --dataset-name custom")
        if self.trace and self.dataset_name == "custom":
            raise InvalidParameter("--trace", self.trace, "given without --dataset-name custom")
        if not self.trace:
            for name in ("speed", "length_scale"):
                if getattr(self, name) != 1:
                    raise InvalidParameter(flag(name), getattr(self, name), "1 without --trace")
            if self.max_request_tokens:
                raise InvalidParameter("--max-request-tokens", self.max_request_tokens, "0 without --trace")
        if self.prompt_form == "ids" and self.backend == "openai-chat":
            raise InvalidParameter("--prompt-form", "ids", "text or auto for openai-chat")
        if self.request_rate is None and self.burstiness != 1:
            raise InvalidParameter("--burstiness", self.burstiness, "1 without --request-rate")
        _ = (self.objectives, self.percentiles, self.metrics, self.headers, self.body)

    @property
    def objectives(self) -> dict[str, float]:
        """Seconds by metric."""
        return parse_goodput(" ".join(self.goodput))

    @property
    def percentiles(self) -> list[float]:
        """Percentiles, ascending."""
        try:
            found = sorted({float(part) for part in self.metric_percentiles.split(",")})
        except ValueError:
            found = [-1.0]
        if not all(0 <= value <= 100 for value in found):
            raise InvalidParameter("--metric-percentiles", self.metric_percentiles, "numbers from 0 to 100")
        return found

    @property
    def metrics(self) -> list[str]:
        """Names of the latencies to show."""
        names = [part.strip() for part in self.percentile_metrics.split(",")]
        for name in names:
            if name not in METRICS:
                raise InvalidParameter("--percentile-metrics", name, f"of {', '.join(METRICS)}")
        return names

    @property
    def headers(self) -> dict[str, str]:
        """The extra headers."""
        return pairs("--header", self.header)

    @property
    def body(self) -> dict[str, Any]:
        """Fields that go with every request, those of `extra_body` last."""
        fields: dict[str, Any] = {"temperature": self.temperature}
        if self.top_p is not None:
            fields["top_p"] = self.top_p
        if self.ignore_eos:
            fields["ignore_eos"] = True
        if self.extra_body:
            try:
                extra = msgspec.json.decode(self.extra_body)
            except msgspec.DecodeError as error:
                raise InvalidParameter("--extra-body", self.extra_body, f"JSON ({error})") from None
            if not isinstance(extra, dict):
                raise InvalidParameter("--extra-body", self.extra_body, "a JSON object")
            fields |= extra
        return fields

    @property
    def root(self) -> str:
        """URL of the server, without a path of the API."""
        root = self.base_url.rstrip("/").removesuffix("/v1")
        if root and not root.startswith(("http://", "https://")):
            raise InvalidParameter("--base-url", self.base_url, "an address with http:// or https://")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return root or f"http://{host}:{self.port}"

    @property
    def url(self) -> str:
        """Where requests go."""
        path = self.endpoint or ("/v1/completions" if self.backend == "openai" else "/v1/chat/completions")
        return f"{self.root}/{path.lstrip('/')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOptions:
    """How the highest load is looked for."""

    attainment: float = option(
        0.9,
        "Share of the requests that must meet every objective of --goodput.",
        check=lambda value: 0 < value <= 1,
        limit="above 0 and at most 1",
    )
    start: float = option(
        1.0, "Load of the first probe: requests per second, or speed of a trace.", **_ABOVE_0
    )
    tolerance: float = option(0.05, "Stop when the bracket is within this share of the load.", **_ABOVE_0)
    max_probes: int = option(12, "Runs at most.", **_at_least(1))
    probe_seconds: float = option(20.0, "Length of a probe: that many seconds of arrivals.", **_ABOVE_0)
    min_requests: int = option(30, "Requests of a probe at least, however low the rate.", **_at_least(1))
    trim: float = option(
        0.1,
        "Share of a probe's time left out at each end, while the server fills and empties.",
        check=lambda value: 0 <= value < 0.5,
        limit="at least 0 and below 0.5",
    )

    def __post_init__(self) -> None:
        check_fields(self)


def check_fields(options: Any) -> None:
    """Raise `InvalidParameter` for the first field whose check does not hold."""
    for entry in fields(options):
        value = getattr(options, entry.name)
        numeric = isinstance(value, float) and not isfinite(value) and value != inf
        if value is not None and (numeric or not entry.metadata["check"](value)):
            raise InvalidParameter(flag(entry.name), value, entry.metadata["limit"] or "a number")


def pairs(name: str, values: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE texts as a dictionary. Raises `InvalidParameter` that names the option."""
    found = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise InvalidParameter(name, text, "KEY=VALUE")
        found[key] = value
    return found
