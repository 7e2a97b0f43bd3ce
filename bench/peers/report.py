"""Medians, ratios and the table, made of the stored measurements."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import variants
import workloads
from store import Record, is_good

# Memory is measured with every workload; these two rows are made of the largest of each round.
MEMORY_ROWS = {"memory": "peak_mb", "memory_anonymous": "anonymous_mb"}
WEIGHT_BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}
"""Bytes that decoding one sequence must read for each parameter, scales left out."""


def summarise(
    records: list[Record], *, setting: dict[str, Any], results: Path, model: Path
) -> dict[str, Any]:
    """The whole result as plain data. `setting` selects the records by model, scale and threads."""
    records = [r for r in records if all(r.get(key) == setting[key] for key in ("model", "scale", "threads"))]
    rulers = [r for r in records if r["engine"] == "ruler" and is_good(r)]
    engines = [r for r in records if r["engine"] != "ruler"]
    good = [r for r in engines if is_good(r)]
    limit = read_limit(rulers)
    rows = []
    for precision in variants.PRECISIONS:
        values = collect(good, precision)
        for name in sorted(values, key=_row_order):
            row = make_row(precision, name, values[name])
            if name == "decode1" and limit:
                row["fraction_of_read_bandwidth"] = bandwidth_fractions(row, precision, model, limit)
            if precision == "bf16" and name not in MEMORY_ROWS and name != "startup":
                row["same_first_token"] = first_token_agreement(results, setting["model"], name)
            rows.append(row)
    sources = {r["versions"]["source"] for r in good if r["engine"] == variants.OURS and "versions" in r}
    return {
        **setting,
        "rounds_done": max((r["round"] for r in good), default=0),
        "rejected_measurements": sum(r.get("rejected", 0) for r in engines),
        "without_a_quiet_measurement": _unresolved(engines),
        "errors": _open_errors(engines),
        "versions": {f"{r['engine']} {r['precision']}": r["versions"] for r in good if "versions" in r},
        "tokenloom_sources": sorted(sources),
        "ruler": summarise_rulers(rulers),
        "results": rows,
    }


def collect(good: list[Record], precision: str) -> dict[str, dict[str, list[float]]]:
    """workload -> engine -> one value for each round (the newest, where a round has several)."""
    newest: dict[tuple[str, str, int], float] = {}
    peaks: dict[tuple[str, str, int], float] = defaultdict(float)
    for record in good:
        if record["precision"] != precision:
            continue
        engine, name, number = record["engine"], record["workload"], record["round"]
        newest[name, engine, number] = record[workloads.metric_of(name).key]
        for row, field in MEMORY_ROWS.items():
            peaks[row, engine, number] = max(peaks[row, engine, number], record.get(field, 0.0))
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (name, engine, _), value in sorted((newest | peaks).items()):
        values[name][engine].append(value)
    return values


def make_row(precision: str, name: str, values: dict[str, list[float]]) -> dict[str, Any]:
    """One line of the result. The ratio is above 1 where tokenloom is better, whatever the unit."""
    if name in MEMORY_ROWS:
        unit, higher_is_better = "MiB", False
    else:
        _, unit, higher_is_better = workloads.metric_of(name)
    medians = {engine: statistics.median(found) for engine, found in values.items()}
    peers = {engine: value for engine, value in medians.items() if engine != variants.OURS}
    best = (max if higher_is_better else min)(peers, key=lambda engine: peers[engine], default=None)
    ours = medians.get(variants.OURS)
    ratio = None
    if best is not None and ours:
        ratio = ours / peers[best] if higher_is_better else peers[best] / ours
    return {
        "precision": precision,
        "workload": name,
        "unit": unit,
        "higher_is_better": higher_is_better,
        "ours": ours,
        "peers": peers,
        "best_peer": best,
        "ratio": ratio,
        "rounds": dict(values.items()),
    }


def _row_order(name: str) -> tuple[int, str]:
    order = [*workloads.DEFAULT, *MEMORY_ROWS]
    return (order.index(name) if name in order else len(order), name)


def _unresolved(engines: list[Record]) -> list[str]:
    """What was measured, but never undisturbed."""
    done = {_name(r) for r in engines if is_good(r)}
    return sorted({_name(r) for r in engines if "error" not in r} - done)


def _name(record: Record) -> str:
    return f"{record['engine']} {record['precision']} {record['workload']} round {record['round']}"


def _open_errors(engines: list[Record]) -> list[dict[str, str]]:
    """The last error of everything that went wrong and has not been measured since."""
    done = {_name(r) for r in engines if is_good(r)}
    errors = {_name(r): str(r["error"])[:200] for r in engines if "error" in r and _name(r) not in done}
    return [{"what": what, "error": error} for what, error in errors.items()]


# --- the ruler -------------------------------------------------------------------------------------------


def read_limit(rulers: list[Record]) -> float:
    """Read bandwidth of the machine in GB/s, the median over the rounds; 0 if it was not measured."""
    return statistics.median([r["read_gb_s"] for r in rulers]) if rulers else 0.0


def summarise_rulers(rulers: list[Record]) -> dict[str, Any]:
    """Read bandwidth and the medians of the products' rates over the rounds."""
    if not rulers:
        return {}
    rates: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for record in rulers:
        for rate in record["gemm"]:
            rates[rate["product"], rate["shape"], rate["rows"]].append(rate)
    gemm = [
        {
            "product": product,
            "shape": shape,
            "rows": rows,
            "gflop_s": statistics.median(rate["gflop_s"] for rate in found),
            "weights_gb_s": statistics.median(rate["weights_gb_s"] for rate in found),
        }
        for (product, shape, rows), found in rates.items()
    ]
    return {"read_gb_s": read_limit(rulers), "versions": rulers[-1].get("versions", {}), "gemm": gemm}


def count_parameters(model: Path) -> float:
    """Parameters of a safetensors checkpoint that one token uses, read from the headers of its files; of a
    mixture of experts as many as a token has, on average."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    experts = config.get("num_local_experts", config.get("num_experts", 1))
    used = config.get("num_experts_per_tok", 1) / experts
    total = 0.0
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                size = 1
                for length in tensor["shape"]:
                    size *= length
                total += size * (used if ".experts." in name else 1)
    return total


def bandwidth_fractions(row: dict[str, Any], precision: str, model: Path, limit: float) -> dict[str, float]:
    """Which part of the read bandwidth each engine's decoding of one sequence spends on weights."""
    gigabytes = count_parameters(model) * WEIGHT_BYTES[precision] / 1e9
    medians = {**row["peers"], variants.OURS: row["ours"]}
    return {engine: round(value * gigabytes / limit, 3) for engine, value in medians.items() if value}


# --- the tokens ------------------------------------------------------------------------------------------


def token_file(results: Path, model: str, engine: str, precision: str, number: int, workload: str) -> Path:
    """Where a measurement's output token ids are kept."""
    return results / "tokens" / f"{model}-{precision}-{engine}-round{number}-{workload}.jsonl"


def first_token_agreement(results: Path, model: str, workload: str) -> dict[str, float]:
    """The part of the first round's requests whose first token is ours, for each peer.

    Later tokens of random weights part ways at the first near-tie, so only the first ones tell whether two
    engines computed the same model.
    """

    def load(engine: str) -> dict[int, list[list[int]]]:
        path = token_file(results, model, engine, "bf16", 1, workload)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return {call["prompts_crc32"]: call["token_ids"] for call in map(json.loads, lines)}

    ours = load(variants.OURS)
    agreement = {}
    for engine in (*variants.PEERS, *variants.MORE_PEERS):
        theirs = load(engine)
        pairs = [
            (a[0], b[0])
            for key in ours.keys() & theirs.keys()
            for a, b in zip(ours[key], theirs[key], strict=True)
        ]
        if pairs:
            agreement[engine] = round(sum(a == b for a, b in pairs) / len(pairs), 3)
    return agreement


# --- the table -------------------------------------------------------------------------------------------


def table(summary: dict[str, Any]) -> str:
    """The result as plain text."""
    rows = summary["results"]
    peers = [
        engine
        for engine in (*variants.PEERS, *variants.MORE_PEERS)
        if any(engine in row["peers"] for row in rows)
    ]
    head = ["prec", "workload", "unit", variants.OURS, *peers, "best peer", "ratio"]
    body = [
        [
            row["precision"],
            row["workload"],
            row["unit"] if row["higher_is_better"] else f"{row['unit']} (less is better)",
            _figure(row["ours"]),
            *(_figure(row["peers"].get(engine)) for engine in peers),
            row["best_peer"] or "-",
            "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (head, *body)) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) if column < 3 else cell.rjust(width) for column, (cell, width) in cells)
        for cells in (list(enumerate(zip(line, widths, strict=True))) for line in (head, *body))
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([line.rstrip() for line in lines] + _notes(summary))


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def _notes(summary: dict[str, Any]) -> list[str]:
    """What a reader must know beside the figures."""
    notes = [
        "",
        f"Model {summary['model']}, {summary['threads']} threads, medians over {summary['rounds_done']} rounds; "
        "a ratio above 1 means tokenloom is better.",
        f"{summary['rejected_measurements']} measurements were rejected because something else used the CPU.",
    ]
    if summary["ruler"]:
        notes.append(f"Memory read bandwidth: {summary['ruler']['read_gb_s']:.1f} GB/s.")
    for row in summary["results"]:
        if "fraction_of_read_bandwidth" in row:
            parts = ", ".join(f"{k} {v:.0%}" for k, v in row["fraction_of_read_bandwidth"].items())
            notes.append(f"Of it spent on weights in decode1, {row['precision']}: {parts}.")
    if summary["without_a_quiet_measurement"]:
        notes.append("Never undisturbed: " + "; ".join(summary["without_a_quiet_measurement"]))
    notes += [f"Error: {error['what']}: {error['error']}" for error in summary["errors"]]
    if len(summary["tokenloom_sources"]) > 1:
        notes.append("WARNING: these results mix several states of tokenloom's source.")
    return notes
