"""How well a draft model guesses its target, whatever it costs: no time is measured.

    python bench/draft_acceptance.py [--model DIR --draft DIR] [--prompts DIR] [--count 48] [--tokens 64] [--json]

The target answers requests for stories and the prompts of files (.jsonl.gz), greedily and at temperature 0.8. Then
the draft is asked along each answer. *Rank r*: how often its r-th candidate of eight was the target's token;
*coverage* adds up ranks. *Tokens per step*: tokens that a verification of such a tree commits, the target's own
included.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tokenloom import LLM, SamplingParams, embedded
from tokenloom.engine.proposer import Proposal, Wanted
from tokenloom.engine.request import Request
from tokenloom.engine.sequence import Sequence as TokenSequence
from tokenloom.kernels.backend import choose_kernels
from tokenloom.speculation.draft_model import DraftModel
from tokenloom.speculation.load_draft import load_draft, plan_draft

NOUNS = "dog cat bird ball tree boat king queen fox bear lake hill star cake hat shoe frog duck horse house".split()
CANDIDATES = 8
MODES = {"greedy": {"temperature": 0.0}, "temperature 0.8": {"temperature": 0.8}}


class Shape(NamedTuple):
    width: int
    depth: int
    nodes: int

    def __str__(self) -> str:
        kind = "chain" if self.width == 1 else f"width {self.width}"
        return f"{kind}, depth {self.depth}, {self.nodes} nodes"


SHAPES = (Shape(1, 4, 4), Shape(3, 4, 12), Shape(1, 8, 8), Shape(3, 8, 16), Shape(3, 8, 24))


class Answer(NamedTuple):
    prompt: list[int]
    params: SamplingParams
    tokens: list[int]


@dataclass
class Tally:
    """Counts of one set of prompts: tokens by rank (the last: none of the candidates), steps and tokens by shape."""

    ranks: list[int] = field(default_factory=lambda: [0] * (CANDIDATES + 1))
    steps: dict[Shape, int] = field(default_factory=dict)
    tokens: dict[Shape, int] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        self.ranks = [one + two for one, two in zip(self.ranks, other.ranks, strict=True)]
        for ours, theirs in ((self.steps, other.steps), (self.tokens, other.tokens)):
            for shape, count in theirs.items():
                ours[shape] = ours.get(shape, 0) + count

    def as_json(self) -> dict[str, Any]:
        total = sum(self.ranks)
        shares = [count / total for count in self.ranks]
        return {
            "tokens": total,
            "ranks": shares[:-1],
            "coverage_1": shares[0],
            "coverage_5": sum(shares[:5]),
            "tokens_per_step": {str(shape): self.tokens[shape] / self.steps[shape] for shape in SHAPES},
        }


def prompt_sets(directory: Path | None, count: int) -> Iterator[tuple[str, list[str]]]:
    """Named lists of user messages."""
    rng = random.Random(0)
    pairs = [rng.sample(NOUNS, 2) for _ in range(count)]
    yield "stories", [f"tell a story about a {one} and a {two}" for one, two in pairs]
    for path in sorted(directory.glob("*.jsonl.gz")) if directory else []:
        with gzip.open(path, "rt") as lines:
            records = [json.loads(line) for line in lines]
        texts = [r["turns"][0] if "turns" in r else r.get("question") or r["prompt"] for r in records]
        yield path.name.removesuffix(".jsonl.gz"), texts[:: max(len(texts) // count, 1)][:count]


def answers(
    llm: LLM, texts: Sequence[str], options: dict[str, float], num_tokens: int, max_context: int
) -> list[Answer]:
    """What the target says to each text that is not too long."""
    prompts = []
    for text in texts:
        rendered = llm.get_tokenizer().render_chat([{"role": "user", "content": text}])
        prompt = llm.encode(rendered, add_special_tokens=False)
        if len(prompt) + num_tokens + max(shape.depth for shape in SHAPES) < max_context:
            prompts.append(prompt)
    params = [SamplingParams(max_tokens=num_tokens, seed=i, **options) for i in range(len(prompts))]
    outputs = llm.generate(prompts, params)
    return [
        Answer(prompt, sampling, list(output.outputs[0].token_ids))
        for prompt, sampling, output in zip(prompts, params, outputs, strict=True)
    ]


def walk(draft: DraftModel, answer: Answer, tally: Tally) -> None:
    """Ask along an answer: for each token alone, then as each shape of tree would go through it."""
    for shape in (Shape(CANDIDATES, 1, CANDIDATES), *SHAPES):
        request = Request(request_id="a", prompt_token_ids=answer.prompt, params=answer.params)
        seq = TokenSequence(request, 0, root=b"", max_length=1 << 30, stop_ids=frozenset(), checker=None)
        done = 0
        while done < len(answer.tokens):
            tree = propose(draft, Wanted(seq, shape.depth, shape.nodes, shape.width))
            path = follow(tree, answer.tokens[done:])
            if shape.depth == 1:
                tally.ranks[tree.ranks[path[0]] if path else CANDIDATES] += 1
                count = 1
            else:
                count = min(len(path) + 1, len(answer.tokens) - done)
                tally.steps[shape] = tally.steps.get(shape, 0) + 1
                tally.tokens[shape] = tally.tokens.get(shape, 0) + count
            for token in answer.tokens[done : done + count]:
                seq.append(token)
            done += count
        draft.forget(seq)


def propose(draft: DraftModel, wanted: Wanted) -> Proposal:
    """A tree, once the draft has caught up with a long prompt."""
    for _ in range(100):
        tree = draft.propose([wanted])[0]
        if tree.tokens:
            return tree
    raise RuntimeError("the draft proposes nothing")


def follow(tree: Proposal, tokens: Sequence[int]) -> list[int]:
    """The nodes that agree with `tokens`, from the root down."""
    children = {pair: node for node, pair in enumerate(zip(tree.parents, tree.tokens, strict=True))}
    path: list[int] = []
    for token in tokens:
        node = children.get((path[-1] if path else -1, token))
        if node is None:
            break
        path.append(node)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="", help="directory of the target (the embedded one)")
    add("--draft", type=Path, default=embedded.DRAFT, help="directory of the draft (the embedded one)")
    add("--prompts", type=Path, help="directory of .jsonl.gz files; stories alone otherwise")
    add("--count", type=int, default=48, help="prompts of each file (48)")
    add("--tokens", type=int, default=64, help="tokens of an answer (64)")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args()
    target = Path(args.model) if args.model else embedded.DRAFT.parent / "target"
    found: dict[str, dict[str, Any]] = {}
    plan = plan_draft(args.draft, target, choose_kernels("auto"), num_pages=4096)
    with LLM(args.model) as llm:
        draft = load_draft(plan, target_vocab_size=plan.described.config.vocab_size)
        for mode, options in MODES.items():
            together = Tally()
            tallies = {"all": together}
            for name, texts in prompt_sets(args.prompts, args.count):
                tally = tallies[name] = Tally()
                for answer in answers(llm, texts, options, args.tokens, draft.max_context):
                    walk(draft, answer, tally)
                together.add(tally)
            found[mode] = {name: tally.as_json() for name, tally in tallies.items() if sum(tally.ranks)}
        draft.close()
    if args.json:
        print(json.dumps(found))
        return
    for mode, sets in found.items():
        print(f"{mode}\n{'':34}{'tokens':>8}  rank 1 to 5 %{'':17}coverage@5 / @1")
        for name, part in sets.items():
            ranks = " ".join(f"{100 * share:5.1f}" for share in part["ranks"][:5])
            print(
                f"  {name:32}{part['tokens']:8}  {ranks}  {part['coverage_5']:.3f} / {part['coverage_1']:.3f}"
            )
        for shape, count in sets["all"]["tokens_per_step"].items():
            print(f"  tokens per step, {shape:28}{count:7.2f}")


if __name__ == "__main__":
    main()
