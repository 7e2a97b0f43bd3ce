"""A thousand adapters on one model: what they cost, and that they change nothing for the others.

    python bench/adapters.py --model M [--parts equal,mixes] [--peers vllm,peft] [--results DIR] [--json]
    python bench/adapters.py --quick --json               (embedded model, few adapters, under a minute)

Each part is a process of its own, measures its cases in alternating rounds, and repeats measurements during which
something else used the machine. Finished parts are kept in the directory of results; the same command goes on with
those that are missing or were disturbed. The last line of `--json` is one JSON object with everything; tokens and
logprobs of the requests that were compared go to `--tokens`.

    equal      == of tokens and logprobs: 32 requests with adapters in one batch, each alone, and the base model's
    mixes      decoding 32 requests: no adapter, 32 distinct ones, one for all
    all7       32 distinct adapters of all seven projections, over the least time that memory bandwidth allows
    prefill    a prompt of 2,048 tokens with an adapter
    loading    steps of a running batch while 100 adapters are loaded
    register   register 1,000 adapters (kept for `zipf`; --registered)
    zipf       a Zipf mix over them, in a pool that holds an eighth
    many       register and serve 2,000 adapters of rank 8 (--many)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import machine
import variants

import tokenloom

HERE = Path(__file__).resolve().parent
PARTS = ("equal", "mixes", "all7", "prefill", "loading", "register", "zipf", "many")
PEERS = {"vllm": ("vllm_base", "vllm"), "peft": ("peft",)}
KEYS = {
    "outputs_equal": "equal",
    "zipf1000_over_base": "zipf",
    "distinct_over_identical": "mixes",
    "all7_over_bound": "all7",
    "load_step_p99_ratio": "loading",
    "prefill_adapter_over_base": "prefill",
}
"""The figures that are asked for most, and the part that each comes from."""


def run_part(part: str, spec: dict[str, Any]) -> dict[str, Any]:
    """What a part found; an `error` where it failed."""
    paths = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(HERE / "peers")]
    threads = str(spec["threads"])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OPENBLAS_NUM_THREADS": threads}
    started = time.perf_counter()
    shown = subprocess.run(
        [sys.executable, str(HERE / "lora" / "part.py"), json.dumps(spec | {"part": part})],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    seconds = round(time.perf_counter() - started, 1)
    if shown.returncode != 0 or not shown.stdout.strip():
        return {"error": f"the process of {part} ended with {shown.returncode}", "part_seconds": seconds}
    result: dict[str, Any] = json.loads(shown.stdout.strip().splitlines()[-1])
    return result | {"part_seconds": seconds}


def source_hash() -> str:
    """Tells two states of the package apart, compiled modules included."""
    digest = hashlib.sha256()
    root = Path(tokenloom.__file__).parent
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".so"):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Results:
    """Finished parts, one JSON line each, in a file that a second start reads again. Those of another setting, or of
    another state of the package, do not count; peers do not depend on it."""

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self._path = path
        self._setting = setting
        self._source = source_hash()
        self.parts: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:  # the run was stopped while it wrote this line
                    continue
                if entry["setting"] == setting and (
                    entry["part"] not in PARTS or entry["source"] == self._source
                ):
                    self.parts[entry["part"]] = entry["result"]

    def is_done(self, part: str) -> bool:
        """Whether there is a result without an error or a disturbance."""
        found = self.parts.get(part)
        return found is not None and "error" not in found and not found.get("disturbed")

    def add(self, part: str, result: dict[str, Any]) -> None:
        """Keep a result, at once on the disk."""
        self.parts[part] = result
        self._path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"part": part, "source": self._source, "setting": self._setting, "result": result}
        with self._path.open("a", encoding="utf-8") as lines:
            print(json.dumps(entry), file=lines)


def summarise(parts: dict[str, dict[str, Any]], setting: dict[str, Any]) -> dict[str, Any]:
    """The asked figures first (null: not measured), then everything."""
    chosen = {key: parts.get(part, {}).get(key) for key, part in KEYS.items()}
    disturbed = {part: found["disturbed"] for part, found in parts.items() if found.get("disturbed")}
    return {
        **chosen,
        "disturbed": disturbed,
        "errors": {part: found["error"] for part, found in parts.items() if "error" in found},
        "same_first_tokens": same_first_tokens(parts),
        "setting": setting,
        "machine": machine.describe(),
        "parts": parts,
    }


def same_first_tokens(parts: dict[str, dict[str, Any]]) -> dict[str, float]:
    """By peer and case, the part of the requests whose first token was the one that tokenloom gave: near 1 where
    both computed the same adapters."""
    ours = parts.get("mixes", {}).get("first_tokens", {})
    found = {}
    for peer in ("vllm", "peft"):
        theirs = parts.get(peer, {}).get("first_tokens", {})
        for seed in ours.keys() & theirs.keys():
            pairs = list(zip(ours[seed], theirs[seed], strict=True))
            found[f"{peer} {seed}"] = sum(a == b for a, b in pairs) / len(pairs)
    return dict(sorted(found.items()))


def show(summary: dict[str, Any]) -> None:
    """What a person wants to see."""
    for key in KEYS:
        value = summary[key]
        print(f"{key}: {value if value is None or isinstance(value, bool) else f'{value:.3f}'}")
    for part, found in summary["parts"].items():
        for case, figures in found.get("medians", {}).items():
            print(f"  {part} {case}: " + ", ".join(f"{name} {value:g}" for name, value in figures.items()))
    for part, cases in summary["disturbed"].items():
        print(f"  DISTURBED, measure again: {part}: {', '.join(cases)}")
    for part, error in summary["errors"].items():
        print(f"  ERROR: {part}: {error}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="", help="S, M, L of bench/peers or the directory of a checkpoint like Llama's")
    add("--parts", type=_list_of(PARTS), default=list(PARTS), help=f"none or {','.join(PARTS)}")
    add("--peers", type=_list_of(tuple(PEERS)), default=[], help=f"none or {','.join(PEERS)}")
    add("--quick", action="store_true", help="few adapters and tokens, one round, on a noisy machine too")
    add("--json", action="store_true", help="print one JSON object as the last line")
    add(
        "--tokens", type=Path, help="tokens and logprobs of `equal` (adapters-tokens.jsonl among the results)"
    )
    add("--results", type=Path, default=Path("bench/results/adapters"), help="directory of finished parts")
    add("--work", type=Path, help="directory for adapters, 20 GB for M (work in the directory of results)")
    add("--again", action="store_true", help="measure parts again that are finished")
    add("--rounds", type=int, help="3, or 1 with --quick")
    add("--threads", type=int, help="compute threads (2)")
    add("--registered", type=int, help="adapters of `zipf`: 1000, or 24 with --quick")
    add("--many", type=int, help="adapters of `many`: 2000, or 48 with --quick")
    add(
        "--max-other",
        type=float,
        help="cores that others may use during a measurement: 0.1; any with --quick",
    )
    add("--attempts", type=int, default=3, help="tries at a measurement until it is undisturbed (3)")
    add("--patience", type=float, default=60.0, help="seconds to wait for a quiet machine before each (60)")
    args = parser.parse_args()
    for name, (full, quick) in {
        "rounds": (3, 1), "registered": (1000, 24), "many": (2000, 48), "max_other": (0.1, 1e9), "threads": (2, 2)
    }.items():  # fmt: skip
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if not args.quick and not args.model:
        parser.error("--model is needed without --quick")
    args.again = args.again or args.quick
    if args.model:
        args.model = variants.find_model(args.model)
        if not (args.model / "config.json").is_file():
            parser.error(f"--model: there is no checkpoint in {args.model}")
    return args


def _list_of(allowed: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        names = [] if text == "none" else text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(allowed)}")
        return names

    return parse


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Run what is not finished yet."""
    setting = {
        "model": str(args.model),
        "quick": args.quick,
        "threads": args.threads,
        "rounds": args.rounds,
        "registered": args.registered,
        "many": args.many,
    }
    results = Results(args.results / "parts.jsonl", setting)
    tokens = args.tokens or args.results / "adapters-tokens.jsonl"
    tokens.parent.mkdir(parents=True, exist_ok=True)
    spec = setting | {
        "max_other": args.max_other,
        "attempts": args.attempts,
        "patience_s": args.patience,
        "work": str(work),
        "tokens": str(tokens.resolve()),
    }
    wanted = [*args.parts, *(part for peer in args.peers for part in PEERS[peer])]
    for part in wanted:
        if results.is_done(part) and not args.again:
            say(f"{part}: finished before")
            continue
        say(part)
        found = run_part(part, spec)
        results.add(part, found)
        say(f"  {found.get('error', 'done')} ({found['part_seconds']} s)")
    return summarise({part: results.parts[part] for part in wanted}, setting)


def say(text: str) -> None:
    """Progress goes to standard error; standard output is for the result."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> int:
    args = parse_arguments()
    if args.quick and args.work is None:
        with tempfile.TemporaryDirectory(prefix="tokenloom-adapters-") as folder:
            summary = measure(args, Path(folder))
    else:
        summary = measure(args, (args.work or args.results / "work").resolve())
    show(summary)
    if args.json:
        print(json.dumps(summary))
    return 1 if summary["errors"] or summary["outputs_equal"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
