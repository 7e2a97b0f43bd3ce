"""Speculation: that it changes no output, and what it gains.

    python bench/speculation.py --model M [--parts replay,story] [--json]
    python bench/speculation.py --parts story --target DIR --draft DIR[,DIR]    (another pair than the embedded one)
    python bench/speculation.py --parts none --peers openvino,llamacpp --json   (after bench/peers/install.py)
    python bench/speculation.py --quick --json                       (embedded models, about two minutes)

Each part measures its cases in alternating rounds and repeats measurements during which something else used the
machine. The last line of `--json` is one JSON object with everything; tokens and logprobs of `equal` go to `--tokens`.

    equal      == of tokens and logprobs: no speculation against each proposer and all of them, batches of 1, 8, 64,
               with chunked prompts, prefix cache, tiny pools, cancels, masks and penalties at once
    replay     batch 1 on --model: a proposer that knows the text, by acceptance and shape of tree
    batch16    16 sequences on --model: adaptive speculation against plain decoding, step by step in turns
    pace       1, 4 and 16 sequences on --model: the adaptive pace against every fixed length, likewise
    ragged     what it costs that sequences accept different numbers of tokens, here and in a rectangular batch
    story      batch 1 on the embedded pair or --target and --draft: the draft models, chains and trees
    copy       batch 1 on the embedded model: n-gram look-up where the output repeats the prompt
    slo        requests with different paces on a simulated machine, whatever --model is; the main case of
               bench/slo_simulation.py, without --quick some minutes

With --peers, stories and copies are also measured beside other engines that guess (guessing/peers.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

import machine
import slo_simulation
import variants
from guessing import embedded, equality, pace, peer_engines, peers, ragged, replay

PARTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "equal": equality.measure_equal,
    "replay": replay.measure_replay,
    "batch16": replay.measure_batch16,
    "pace": pace.measure_pace,
    "ragged": ragged.measure_ragged,
    "story": embedded.measure_story,
    "copy": embedded.measure_copy,
    "slo": slo_simulation.measure_slo,
}
KEYS = {
    "outputs_equal": "equal",
    "speedup_replay07_batch1": "replay",
    "worst_cost_model_error": "replay",
    "ratio_batch16_low": "batch16",
    "ratio_batch16_switched_off_low": "batch16",
    "adaptive_over_best_fixed_low": "pace",
    "worst_realign_share": "ragged",
    "speedup_story_batch1": "story",
    "tokens_per_step_story": "story",
    "speedup_copy_batch1": "copy",
    "tree_over_chain": "story",
    "slo_violation_ratio": "slo",
    "goodput_ratio": "slo",
    "story_over_peers": "peers",
    "copy_over_peers": "peers",
}
"""The figures that are asked for most, and the part that each comes from."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        default="",
        help="S, M, L of bench/peers or the directory of a checkpoint (replay, batch16, pace, ragged)",
    )
    add("--target", default="", help="directory of the target of story; the embedded one otherwise")
    add("--draft", default="", help="directories of its drafts, with commas; the embedded ones otherwise")
    add("--parts", default=",".join(PARTS), help="of " + ",".join(PARTS))
    add("--peers", default="none", help="none or of " + ",".join(peer_engines.ENGINES))
    add("--quick", action="store_true", help="few tokens, one round, on a noisy machine too")
    add("--json", action="store_true", help="print one JSON object as the last line")
    add("--tokens", type=Path, default=Path("bench/results/speculation-tokens.jsonl"))
    add("--prompts", type=Path, help="directory of prompts (.jsonl.gz) for equal; made-up ones otherwise")
    add("--rounds", type=int, help="3, or 1 with --quick")
    add("--pairs", type=int, default=24, help="rounds of batch16, three times those of pace (24)")
    add("--threads", type=int, default=2)
    add("--max-other", type=float, help="cores that others may use: 0.1; any with --quick")
    add("--attempts", type=int, default=3, help="tries at a measurement until it is undisturbed (3)")
    add("--patience", type=float, default=60.0, help="seconds to wait for a quiet machine before each (60)")
    args = parser.parse_args()
    args.parts = [] if args.parts == "none" else args.parts.split(",")
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"--parts: {part!r} is not one of {', '.join(PARTS)}")
    if bool(args.target) != bool(args.draft):
        parser.error("--target and --draft: one was given without the other")
    if args.target and "story" not in args.parts:
        parser.error("--target: only the part story has another target")
    args.peers = [] if args.peers == "none" else args.peers.split(",")
    for name in args.peers:
        if name not in peer_engines.ENGINES:
            parser.error(f"--peers: {name!r} is not one of {', '.join(peer_engines.ENGINES)}")
        if missing := peer_engines.missing(name):
            parser.error(f"--peers: {name} is not installed (bench/peers/install.py does): no {missing}")
    if args.pairs < 1:
        parser.error("--pairs must be above 0")
    args.rounds = args.rounds or (1 if args.quick else 3)
    args.max_other = (1e9 if args.quick else 0.1) if args.max_other is None else args.max_other
    if args.model:
        args.model = str(variants.find_model(args.model))
    return args


def main() -> int:
    args = parse_arguments()
    spec = {
        "model": args.model,
        "target": args.target,
        "draft": args.draft,
        "quick": args.quick,
        "threads": args.threads,
        "rounds": args.rounds,
        "pairs": args.pairs,
        "max_other": args.max_other,
        "attempts": args.attempts,
        "patience_s": args.patience,
        "tokens": str(args.tokens),
        "prompts": str(args.prompts or ""),
    }
    parts = {}
    for part in args.parts:
        print(f"{time.strftime('%H:%M:%S')} {part}", file=sys.stderr, flush=True)
        parts[part] = PARTS[part](spec)
    if args.peers:
        print(f"{time.strftime('%H:%M:%S')} peers", file=sys.stderr, flush=True)
        parts["peers"] = peers.measure_peers(spec, args.peers)
    summary = {key: parts.get(part, {}).get(key) for key, part in KEYS.items()}
    for key, value in summary.items():
        print(f"{key}: {value if value is None or isinstance(value, bool) else f'{value:.3f}'}")
    if args.json:
        print(json.dumps({**summary, "setting": spec, "machine": machine.describe(), "parts": parts}))
    return 1 if summary["outputs_equal"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
