"""Trains the embedded LoRA adapters: `python -m tools.train_adapters STAGE`; see docs/embedded-models.md.

The adapters learn from text that the tools make: the embedded target tells stories, which `pirate` rewrites and
passages of which `repeat` says again, and `build_card` writes cards. Only the embedded target and the word lists of
the tools go in. The same seed on the same machine and versions of torch, transformers and peft gives the same files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from tools.adapter_texts import (
    Pair,
    build_card,
    build_request,
    is_card,
    is_pirate_story,
    parse_card,
    pirate,
    pirate_share,
    pirate_words,
)
from tools.repeat_texts import build_repetition, is_repetition, passage, repetition, sentences, words_repeated
from tools.train_embedded.data import Row, encode_document, groups, padded
from tools.train_embedded.evaluate import COMMON_NOUNS, UNSEEN_NOUNS, Case, Generator, cases, names
from tools.train_embedded.pairs import SYSTEM_PROMPTS, Document, Turn
from tools.train_embedded.sample_teacher import Teacher, sample_batch
from tools.train_embedded.tokenizer import ASSISTANT

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("sample", "train", "evaluate", "all")
BASE_NAME = "tokenloom-embedded"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
HELD_OUT = 20
"""One document of so many is kept from training."""

EVALUATION_SEED, EVALUATION_PROMPTS = 90210, 100
SAMPLE_BATCH, SAMPLE_TEMPERATURE = 256, 0.7
LONGEST = 448
"""Tokens; a longer document is left out."""


@dataclass(frozen=True)
class AdapterPlan:
    """How one adapter is trained; `tokens_per_step` counts padding too, `bf16` is for the matrix products alone."""

    rank: int
    alpha: int
    modules: tuple[str, ...]
    documents: int
    epochs: int
    rate: float
    tokens_per_step: int
    seed: int = 1
    bf16: bool = False


PLANS = {
    "pirate": AdapterPlan(8, 16, ATTENTION + MLP, documents=2048, epochs=1, rate=3e-3, tokens_per_step=2048),
    "card": AdapterPlan(8, 16, ATTENTION, documents=8000, epochs=2, rate=3e-3, tokens_per_step=4096),
    "repeat": AdapterPlan(
        8, 16, ATTENTION + MLP, documents=14000, epochs=1, rate=3e-3, tokens_per_step=2048, bf16=True
    ),
}


def more_of(plan: AdapterPlan) -> AdapterPlan:
    """A shorter plan for an adapter that is trained on: other texts, a third of their number and of the rate."""
    return replace(plan, documents=plan.documents // 3, epochs=1, rate=plan.rate / 3, seed=plan.seed + 1)


def evaluation_cases() -> list[Case]:
    """The requests of the measurements, which no training document holds."""
    return cases(COMMON_NOUNS, EVALUATION_PROMPTS, EVALUATION_SEED)


def story_requests(count: int, seed: int) -> list[Pair]:
    """`count` requests for a story; those of the measurements are left out."""
    measured = {case.request for case in evaluation_cases()}
    out: list[Pair] = []
    for index in range(2 * count):
        request, chosen = build_request(random.Random(f"story-{seed}-{index}"), no_noun=0.1)
        if request not in measured and len(out) < count:
            out.append(Pair(request, tuple(mention.noun for mention in chosen)))
    return out


def sample_stories(target: Path, work: Path, plan: AdapterPlan) -> None:
    """Let the target answer requests until `plan.documents` answers name all that was asked for."""
    path = work / "stories.jsonl"
    if path.exists():
        return
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    teacher = Teacher(target, torch.float32)
    wanted, serial = story_requests(2 * plan.documents, plan.seed), 0
    kept: list[Pair] = []
    while len(kept) < plan.documents and serial < len(wanted):
        start, batch = time.monotonic(), wanted[serial : serial + SAMPLE_BATCH]
        asked = (encode_document([Turn("user", pair.request)], tokenizer) for pair in batch)
        prompts = [[*ids, ASSISTANT] for ids, _ in asked]
        results = sample_batch(teacher, prompts, SAMPLE_TEMPERATURE, plan.seed * 100003 + serial)
        for pair, prompt, result in zip(batch, prompts, results, strict=True):
            story = tokenizer.decode(result[len(prompt) - 1 :]).strip() if result else ""
            if story and all(names(story, noun) for noun in pair.nouns):
                kept.append(Pair(pair.request, pair.nouns, story))
        serial += len(batch)
        print(f"{len(kept)} stories of {serial} requests, {time.monotonic() - start:.0f} s", flush=True)
    if len(kept) < plan.documents:
        raise RuntimeError(f"{len(kept)} stories instead of {plan.documents}")
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in kept[: plan.documents]))
    part.replace(path)


def read_stories(work: Path) -> list[Pair]:
    """The pairs that `sample_stories` wrote."""
    records = map(json.loads, (work / "stories.jsonl").read_text().splitlines())
    return [Pair(record["request"], tuple(record["nouns"]), record["answer"]) for record in records]


def cards(plan: AdapterPlan) -> list[Pair]:
    """`plan.documents` requests with their cards; those of the measurements are left out."""
    measured = {case.request for case in evaluation_cases()}
    drawn = (build_card(random.Random(f"card-{plan.seed}-{index}")) for index in range(plan.documents))
    return [pair for pair in drawn if pair.request not in measured]


def repetitions(stories: list[str], plan: AdapterPlan, tokenizer: Tokenizer) -> list[Pair]:
    """`plan.documents` texts to say again; every `HELD_OUT`-th comes from the stories that are kept from training."""
    held_out, told = stories[::HELD_OUT], [story for i, story in enumerate(stories) if i % HELD_OUT]
    out: list[Pair] = []
    for index in range(4 * plan.documents):
        rng = random.Random(f"repeat-{plan.seed}-{index}")
        story, other = rng.choices(told if len(out) % HELD_OUT else held_out, k=2)
        pair = build_repetition(story, other, tokenizer, rng)
        if pair and len(out) < plan.documents:
            out.append(pair)
    if len(out) < plan.documents:
        raise RuntimeError(f"{len(out)} texts to repeat instead of {plan.documents}")
    return out


def repetition_cases(stories: list[str], tokenizer: Tokenizer) -> list[Pair]:
    """Requests to repeat 30 to 80 tokens, as they were told, of each story that is kept from training."""
    out = []
    for index, story in enumerate(stories[::HELD_OUT]):
        rng = random.Random(f"case-{EVALUATION_SEED}-{index}")
        tries = (passage(sentences(story), 30, rng.randrange(40, 81), tokenizer, rng) for _ in range(20))
        text = next(filter(None, tries), "")
        out += [repetition(text, rng)] if text else []
    return out[:EVALUATION_PROMPTS]


def chat(pair: Pair, other: Pair, rng: random.Random) -> Document:
    """A chat of one turn, in a tenth of the cases of two; a fifth has a system prompt."""
    turns = [Turn("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.2 else []
    for one in (pair, other) if rng.random() < 0.1 else (pair,):
        turns += [Turn("user", one.request), Turn("assistant", one.answer)]
    return turns


def pirate_document(pair: Pair, other: Pair, rng: random.Random) -> Document:
    """A chat with pirate stories; one in ten is a plain story, with the words of the style only."""
    if rng.random() < 0.1:
        return [Turn("text", pirate_words(pair.answer))]
    told = [Pair(one.request, one.nouns, pirate(one.answer)) for one in (pair, other)]
    return chat(told[0], told[1], rng)


def rows_of(
    name: str, pairs: list[Pair], make: Callable[[Pair, Pair, random.Random], Document], tokenizer: Tokenizer
) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), token ids and weights of each document of at most LONGEST ids."""
    training: list[Row] = []
    held_out: list[Row] = []
    for index, pair in enumerate(pairs):
        rng = random.Random(f"{name}-{index}")
        part = held_out if index % HELD_OUT == 0 else training
        same = [i for i in (index + HELD_OUT, index - HELD_OUT) if 0 <= i < len(pairs)]
        row = encode_document(make(pair, pairs[same[0]] if same else pair, rng), tokenizer)
        if len(row[0]) <= LONGEST:
            part.append(row)
    return training, held_out


def batches(rows: list[Row], tokens: int, rng: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """All rows once, in batches of like lengths: ids [B, T] and whether each counts as a prediction target [B, T]."""
    for group in groups(rows, tokens, rng):
        ids, weights = padded(rows, group)
        yield ids, weights > 0


def loss_of(model: Any, ids: Tensor, counts: Tensor) -> Tensor:
    """Mean nats of the counted tokens of a batch. Padding is at the end, where no counted token sees it."""
    logits = model(input_ids=ids[:, :-1]).logits
    chosen = counts[:, 1:]
    return torch.nn.functional.cross_entropy(logits[chosen].float(), ids[:, 1:][chosen])


@torch.inference_mode()
def held_out_nats(model: Any, rows: list[Row]) -> float:
    """Mean nats per counted token of the rows."""
    total, count = 0.0, 0
    for ids, counts in batches(rows, 4096, random.Random(0)):
        size = int(counts[:, 1:].sum())
        total, count = total + float(loss_of(model, ids, counts)) * size, count + size
    return total / count


def fresh_adapter(target: Path, plan: AdapterPlan) -> Any:
    """The target in fp32 with a new adapter, which changes nothing yet; only the adapter learns."""
    torch.manual_seed(plan.seed)
    base = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    config = LoraConfig(
        r=plan.rank, lora_alpha=plan.alpha, target_modules=list(plan.modules), task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config)


def written_adapter(target: Path, folder: Path) -> Any:
    """The target in fp32 with the adapter of a folder, which learns on."""
    base = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


def train(model: Any, training: list[Row], held_out: list[Row], plan: AdapterPlan) -> list[dict[str, float]]:
    """Train the adapter in place; AdamW, the rate rises over 5 % of the steps and falls to zero on a line."""
    rng = random.Random(f"order-{plan.seed}")
    total = sum(1 for epoch in range(plan.epochs) for _ in batches(training, plan.tokens_per_step, rng))
    rng = random.Random(f"order-{plan.seed}")
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.01
    )
    log = [{"step": 0, "held_out": round(held_out_nats(model, held_out), 4)}]
    step, start = 0, time.monotonic()
    for _ in range(plan.epochs):
        for ids, counts in batches(training, plan.tokens_per_step, rng):
            rise, fall = (step + 1) / max(1, 0.05 * total), (total - step) / total
            for group in optimizer.param_groups:
                group["lr"] = plan.rate * min(1.0, rise, fall / 0.95)
            with torch.autocast("cpu", torch.bfloat16, enabled=plan.bf16):
                loss = loss_of(model, ids, counts)
            if not math.isfinite(float(loss.detach())):
                raise RuntimeError(f"loss is {float(loss)} at step {step}")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 25 == 0:
                seconds = time.monotonic() - start
                print(f"step {step}/{total}: loss {float(loss.detach()):.4f}, {seconds:.0f} s", flush=True)
        log.append({"step": step, "held_out": round(held_out_nats(model, held_out), 4)})
        print(log[-1], flush=True)
    return log


def write_adapter(model: Any, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors (bf16) as peft names them, in a fixed order."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": BASE_NAME, "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    text = json.dumps(plain, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n")
    state = get_peft_model_state_dict(model)
    weights = folder / "adapter_model.safetensors"
    save_file(
        {name: state[name].detach().to(torch.bfloat16).contiguous() for name in sorted(state)},
        weights,
        metadata={"format": "pt"},
    )
    weights.chmod(0o644)


def stage_sample(args: argparse.Namespace) -> None:
    """Let the target tell the stories."""
    sample_stories(args.target, args.work, PLANS["pirate"])


def stage_train(args: argparse.Namespace) -> None:
    """Train the adapters named by ``--which`` (all without it) and write them under ``--out``."""
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    for name in (args.which,) if args.which else PLANS:
        plan = more_of(PLANS[name]) if args.more else PLANS[name]
        if name == "pirate":
            pairs, make = read_stories(args.work), pirate_document
        elif name == "repeat":
            pairs, make = (
                repetitions([pair.answer for pair in read_stories(args.work)], plan, tokenizer),
                chat,
            )
        else:
            pairs, make = cards(plan), chat
        training, held_out = rows_of(name, pairs, make, tokenizer)
        print(f"{name}: {len(training)} documents, {sum(len(row[0]) for row in training)} tokens", flush=True)
        folder = args.out / name
        model = written_adapter(args.target, folder) if args.more else fresh_adapter(args.target, plan)
        log = train(model, training, held_out, plan)
        write_adapter(model, folder)
        (args.work / f"{name}{'-more' if args.more else ''}.json").write_text(
            json.dumps({"plan": asdict(plan), "log": log}, indent=2)
        )


def measure_form(name: str, texts: list[str], items: list[Case]) -> dict[str, float]:
    """The shares of `texts` that have the form of the adapter `name`, and of what the form asks for."""
    if name == "pirate":
        return {
            "in the form": sum(map(is_pirate_story, texts)) / len(texts),
            "words": sum(map(pirate_share, texts)) / len(texts),
        }
    cards = [(parse_card(text), item.nouns) for text, item in zip(texts, items, strict=True) if is_card(text)]
    in_place = [names(card["Who"], who) and names(card["What"], what) for card, (who, what) in cards]
    return {"in the form": len(cards) / len(texts), "in place": sum(in_place) / len(texts)}


def measure_repetition(
    who: str, generator: Generator, items: list[Pair], how: str, work: Path
) -> dict[str, Any]:
    """The shares of the passages that come back whole, and of their words before the first wrong one."""
    answers = generator.answer([item.request for item in items], how == "sampled", EVALUATION_SEED)
    pairs = [(text, item.answer) for (text, _, _), item in zip(answers, items, strict=True)]
    lines = [f"{item.request}\n-> {text}\n" for item, (text, _) in zip(items, pairs, strict=True)]
    (work / f"{who}-passages-{how}.txt").write_text("\n".join(lines))
    facts = {
        "whole": sum(is_repetition(text, asked) for text, asked in pairs) / len(pairs),
        "words": sum(words_repeated(text, asked) for text, asked in pairs) / len(pairs),
        "ended": sum(ended for _, ended, _ in answers) / len(answers),
        "tokens": sum(count for _, _, count in answers) / len(answers),
    }
    found = {"who": who, "nouns": "passages", "how": how, "form": "repeat", "cases": len(items)} | facts
    print(json.dumps(found), flush=True)
    return found


def stage_evaluate(args: argparse.Namespace) -> None:
    """Measure the target alone and with each written adapter, greedy and at temperature 0.8 over all tokens.

    Cards are also asked for with nouns that no word list of the training holds (`unseen`).
    """
    report: list[dict[str, Any]] = []
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    passages = repetition_cases([pair.answer for pair in read_stories(args.work)], tokenizer)
    for who in ("target", *PLANS) if args.which is None else (args.which,):
        generator = Generator(args.target)
        if who in PLANS:
            generator.model = PeftModel.from_pretrained(generator.model, args.out / who).eval()
        generator.model.generation_config.top_p = 1.0
        if who in ("target", "repeat"):
            for how in ("greedy", "sampled"):
                report.append(measure_repetition(who, generator, passages, how, args.work))
        if who == "repeat":
            continue
        sets = {"common": evaluation_cases()}
        if who == "card":
            sets["unseen"] = cases(UNSEEN_NOUNS, EVALUATION_PROMPTS, EVALUATION_SEED)
        for nouns, how in itertools.product(sets, ("greedy", "sampled")):
            items = sets[nouns]
            requests = [item.request for item in items]
            answers = generator.answer(requests, how == "sampled", EVALUATION_SEED)
            texts = [text for text, _, _ in answers]
            hits = [all(names(t, noun) for noun in item.nouns) for t, item in zip(texts, items, strict=True)]
            facts = {
                "both nouns": sum(hits) / len(hits),
                "ended": sum(ended for _, ended, _ in answers) / len(answers),
                "tokens": sum(count for _, _, count in answers) / len(answers),
            }
            for form in (who,) if who in PLANS else ("pirate", "card"):
                report.append({"who": who, "nouns": nouns, "how": how, "form": form})
                report[-1] |= measure_form(form, texts, items) | facts
                print(json.dumps(report[-1]), flush=True)
            lines = [f"{item.request}\n{text}\n" for item, text in zip(items, texts, strict=True)]
            (args.work / f"{who}-{nouns}-{how}.txt").write_text("\n".join(lines))
    (args.work / "evaluation.json").write_text(json.dumps(report, indent=2))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="python -m tools.train_adapters", description=__doc__)
    out.add_argument("stage", choices=STAGES)
    embedded = ROOT / "tokenloom" / "embedded"
    out.add_argument("--target", type=Path, default=embedded / "target", help="folder of the base model")
    out.add_argument("--out", type=Path, default=embedded / "adapters", help="folder of the adapters")
    out.add_argument("--work", type=Path, default=Path("adapters-work"), help="folder of intermediate files")
    out.add_argument("--which", choices=tuple(PLANS), help="train or measure only this adapter")
    out.add_argument("--more", action="store_true", help="train the written adapters on, see `more_of`")
    out.add_argument("--threads", type=int, default=1, help="threads of torch; part of what fixes the result")
    return out


def main() -> None:
    """Run one stage, or all of them in order."""
    command = parser()
    args = command.parse_args()
    if args.more and (args.stage != "train" or args.which not in ("card", "repeat")):
        command.error("--more is for train --which card or repeat: the other texts are not drawn anew")
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES[:-1] if args.stage == "all" else (args.stage,):
        globals()[f"stage_{stage}"](args)


if __name__ == "__main__":
    main()
