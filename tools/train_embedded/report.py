"""The loss curves of the training logs as a text table and as a small SVG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Log = list[dict[str, Any]]

WIDTH, HEIGHT, MARGIN = 640, 320, 44
LOW, HIGH = 1.4, 4.4


def read_log(path: Path) -> Log:
    """Entries by step; after a restart the later entry of a step counts."""
    if not path.exists():
        return []
    entries = {entry["step"]: entry for entry in map(json.loads, path.read_text().splitlines())}
    return [entries[step] for step in sorted(entries)]


def table(log: Log, every: int) -> str:
    """A markdown table with one line for every ``every`` steps and for the last one."""
    lines = ["| step | tokens | training loss | held-out nats | rate |", "|---:|---:|---:|---:|---:|"]
    for entry in log:
        if entry["step"] % every == 0 or entry is log[-1]:
            held = f"{entry['held_out']:.3f}" if "held_out" in entry else ""
            lines.append(
                f"| {entry['step']} | {entry['tokens'] / 1e6:.2f} M | {entry['loss']:.3f} | {held} "
                f"| {entry['rate']:.2f} |"
            )
    return "\n".join(lines)


def summary(log: Log) -> dict[str, float]:
    """Steps, tokens, busy seconds and mean speed."""
    seconds = sum(entry["seconds"] for entry in log)
    tokens = log[-1]["tokens"] if log else 0
    return {
        "steps": log[-1]["step"] if log else 0,
        "tokens": tokens,
        "minutes": round(seconds / 60, 1),
        "tokens_per_second": round(tokens / seconds) if seconds else 0,
        "best_tokens_per_second": max((entry["tokens_per_second"] for entry in log), default=0),
    }


def _points(log: Log, field: str, last: int) -> str:
    out = []
    for entry in log:
        if field in entry:
            x = MARGIN + (WIDTH - 2 * MARGIN) * entry["tokens"] / last
            y = (HIGH - min(HIGH, max(LOW, entry[field]))) / (HIGH - LOW)
            out.append(f"{x:.1f},{MARGIN + (HEIGHT - 2 * MARGIN) * y:.1f}")
    return " ".join(out)


def svg(log: Log) -> str:
    """Held-out nats (full) and training loss (thin) over tokens."""
    last = log[-1]["tokens"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    ]
    for tick in range(7):
        value = LOW + (HIGH - LOW) * tick / 6
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * tick / 6
        parts.append(f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.1f}</text>')
    for field, width in (("loss", 0.8), ("held_out", 2.2)):
        points = _points(log, field, last)
        parts.append(f'<polyline fill="none" stroke="#1f5fa8" stroke-width="{width}" points="{points}"/>')
    parts.append(
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 10}" text-anchor="middle">tokens, 0 to {last / 1e6:.1f} million'
        f" (thick: held-out nats per token, thin: weighted training loss)</text></svg>"
    )
    return "\n".join(parts) + "\n"


def run(work: Path, target: Path) -> None:
    """Print the table and write the figure to ``target``."""
    log = read_log(work / "target" / "log.jsonl")
    print(f"{json.dumps(summary(log))}\n\n{table(log, 250)}\n")
    target.write_text(svg(log))
