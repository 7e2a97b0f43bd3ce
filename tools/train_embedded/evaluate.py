"""Measurements of the exported models, as shipped (bf16 weights, fp32 arithmetic, through transformers)."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import corpus, words
from .data import Rows
from .words import with_article

PROMPTS = 50
MAX_NEW_TOKENS = 400
JUDGE_CONTEXT = 512

# Common nouns for the test: easy picture-book words, not tuned to what the model does well.
COMMON_NOUNS = """
dog cat bird horse cow pig fish frog mouse rabbit bear lion tiger elephant monkey duck fox wolf
snake bee boy girl man woman king queen doctor teacher farmer baby friend ball book box car boat
train plane bike truck bus hat shoe coat dress bag cup plate spoon knife bottle table chair bed door
window lamp clock key phone camera computer pen pencil paper letter map flag drum bell guitar piano
toy doll robot kite balloon puzzle tree flower leaf grass stone rock river lake sea beach mountain
forest garden field farm park house castle school bridge road city village shop kitchen apple banana
orange cake bread cheese egg soup pizza cookie milk honey carrot potato tomato sun moon star sky
cloud rain snow wind fire ice rainbow island treasure crown ring sword ladder hammer bucket rope
umbrella blanket pillow mirror candle
""".split()

# Nouns that neither the hand lists nor the mined list hold: only copying from the request can name them.
UNSEEN_NOUNS = """
accordion volcano spaceship typewriter chandelier platypus cathedral mango scarecrow tambourine jellybean
saxophone chameleon lighthouse hammock trampoline chimpanzee artichoke crossbow gramophone
""".split()


@dataclass(frozen=True)
class Case:
    """One request and the nouns its story has to name."""

    request: str
    nouns: tuple[str, ...]


@dataclass
class Outcome:
    """Figures of one run over the cases."""

    both_share: float
    single_share: float
    ended_share: float
    mean_tokens: float
    judge_nats: float
    distinct_starts: float


def cases(nouns: list[str], count: int, seed: int) -> list[Case]:
    """``count`` requests of the form the engine's users see, two random nouns each."""
    rng = random.Random(seed)
    forms = (
        "tell a story about {x} and {y}",
        "Tell me a story about {x} and {y}.",
        "Write a short story about {x} and {y}.",
        "Can you tell me a story about {x} and {y}?",
    )
    out = []
    for index in range(count):
        first, second = rng.sample(nouns, 2)
        adjective = rng.choice(words.ADJECTIVES[:14]) + " " if index % 2 else ""
        text = rng.choice(forms).format(x=with_article(first), y=with_article(adjective + second))
        out.append(Case(text, (first, second)))
    return out


def names(story: str, noun: str) -> bool:
    """True if the story holds the noun or its plural as a whole word."""
    return re.search(rf"\b{re.escape(noun)}(?:s|es)?\b", story, re.IGNORECASE) is not None


class Generator:
    """A model and its tokenizer from a folder, fp32."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer(self, requests: list[str], sample: bool, seed: int) -> list[tuple[str, bool, int]]:
        """(text, ended, tokens) for each request; sampling as in generation_config.json."""
        torch.manual_seed(seed)
        prompts = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
            )
            for request in requests
        ]
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        options = {} if sample else {"do_sample": False, "temperature": None, "top_p": None}
        ids = self.model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            top_k=0 if sample else None,
            **options,
        )
        out = []
        for row in ids[:, batch["input_ids"].shape[1] :].tolist():
            end = self.tokenizer.eos_token_id
            ended = end in row
            row = row[: row.index(end)] if ended else row
            out.append((self.tokenizer.decode(row, skip_special_tokens=True).strip(), ended, len(row)))
        return out


class Judge:
    """stories3M: mean nats per token of its own tokenization of a text, given the text so far."""

    def __init__(self, data: Path) -> None:
        folder = data / "models" / "hf" / "stories3M"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def nats(self, texts: list[str]) -> float:
        """Sum of costs over all texts by the number of their tokens (each text's first 511)."""
        total, count = 0.0, 0
        for text in texts:
            ids = [1] + [i for i in self.tokenizer(text, add_special_tokens=False)["input_ids"] if i > 2]
            tokens = torch.tensor([ids[:JUDGE_CONTEXT]])
            if tokens.shape[1] < 2:
                continue
            log_p = torch.log_softmax(self.model(tokens).logits[0, :-1].float(), -1)
            total -= float(log_p.gather(1, tokens[0, 1:, None]).sum())
            count += tokens.shape[1] - 1
        return total / max(1, count)


def measure(
    generator: Generator, judge: Judge, items: list[Case], sample: bool, seed: int
) -> tuple[Outcome, list[str]]:
    """Run the cases; the stories come back for the report."""
    answers = generator.answer([item.request for item in items], sample, seed)
    stories = [text for text, _, _ in answers]
    hits = [[names(story, noun) for noun in item.nouns] for story, item in zip(stories, items, strict=True)]
    return Outcome(
        both_share=sum(all(row) for row in hits) / len(items),
        single_share=sum(sum(row) for row in hits) / (2 * len(items)),
        ended_share=sum(ended for _, ended, _ in answers) / len(items),
        mean_tokens=sum(count for _, _, count in answers) / len(items),
        judge_nats=judge.nats(stories),
        distinct_starts=len({story[:60] for story in stories}) / len(items),
    ), stories


@torch.inference_mode()
def held_out_nats(generator: Generator, rows: Rows) -> float:
    """Mean nats per counted token of the held-out rows (story text of chats and plain documents)."""
    total = count = 0.0
    for first in range(0, len(rows.ids), 8):
        ids, weights = rows.batch(first, min(8, len(rows.ids) - first))
        tokens, counted = torch.from_numpy(ids), torch.from_numpy(weights[:, 1:] > 0)
        log_p = torch.log_softmax(generator.model(tokens[:, :-1]).logits.float(), -1)
        cost = -log_p.gather(2, tokens[:, 1:, None]).squeeze(2)
        total, count = total + float(cost[counted].sum()), count + int(counted.sum())
    return total / count


@torch.inference_mode()
def agreement(target: Generator, draft: Generator, rows: Rows) -> dict[str, float]:
    """How well the draft predicts the target on held-out text: equal argmax, and sum of min(p, q)."""
    ids, weights = rows.batch(0, min(16, len(rows.ids)))
    tokens, counted = torch.from_numpy(ids[:, :-1]), torch.from_numpy(weights[:, 1:] > 0)
    p, q = (torch.softmax(g.model(tokens).logits.float(), -1)[counted] for g in (target, draft))
    return {
        "same_argmax": float((p.argmax(-1) == q.argmax(-1)).float().mean()),
        "acceptance": float(torch.minimum(p, q).sum(-1).mean()),
    }


def run(models: Path, data: Path, work: Path, seed: int) -> dict[str, Any]:
    """All measurements; prints them and writes ``evaluation.json`` under ``work``."""
    judge, target = Judge(data), Generator(models / "target")
    report: dict[str, Any] = {}
    samples: list[dict[str, str]] = []
    for title, nouns in (("common", COMMON_NOUNS), ("unseen", UNSEEN_NOUNS)):
        items = cases(nouns, PROMPTS, seed)
        for mode in ("greedy", "sampled"):
            outcome, stories = measure(target, judge, items, mode == "sampled", seed)
            report[f"{title}/{mode}"] = asdict(outcome)
            samples += [
                {
                    "kind": f"{title}/{mode}",
                    "request": item.request,
                    "story": story,
                    "missing": ", ".join(noun for noun in item.nouns if not names(story, noun)),
                }
                for item, story in zip(items, stories, strict=True)
            ]
    _, held = corpus.load_stories(data)
    report["human_judge_nats"] = judge.nats(held)
    rows = Rows(work / "data", "held_out")
    generators = {"target": target}
    if (models / "draft" / "model.safetensors").exists():
        generators["draft"] = Generator(models / "draft")
        report["draft_agreement"] = agreement(target, generators["draft"], rows)
    for name, generator in generators.items():
        nats = held_out_nats(generator, rows)
        report[f"{name}_held_out"] = {"nats": nats, "perplexity": math.exp(nats)}
    (work / "evaluation.json").write_text(json.dumps({"report": report, "samples": samples}, indent=1))
    print(json.dumps(report, indent=2))
    return report
