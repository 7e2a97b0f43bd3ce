"""Trains a second draft on what the first one misses: `python -m tools.boost_draft STAGE`; see docs/embedded-models.md.

Boost-tuning after Miao et al., "SpecInfer: Accelerating Large Language Model Serving with Tree-based Speculative
Inference and Verification" (ASPLOS 2024), section 3: the target writes texts, the tokens that the first draft foresees
count little or nothing, and the second draft learns the others. Without `--draft` a first one is trained before, on the
target's distribution at each token. The same seed on the same machine and version of torch gives the same files.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from tools.adapter_texts import build_request
from tools.draft_coverage import Ranks, accepted, coverage, tokens_per_step, union
from tools.train_embedded.data import WEIGHT_ONE, Row, encode_document, groups, padded
from tools.train_embedded.loss import TiedCrossEntropy, TiedDistillation
from tools.train_embedded.model import DRAFT, Llama, read_hf, write_hf
from tools.train_embedded.pairs import SYSTEM_PROMPTS, Turn
from tools.train_embedded.sample_teacher import BOS, EOS, Teacher, opening, sample_batch

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("sample", "first", "train", "evaluate", "all")
PARTS = ("training", "held-out")
GREEDY = 1e-4
"""A temperature so low that the best token is drawn unless another one is as good to three decimals of a logit."""
DEPTH = 4
"""Depth of the trees of the measurements."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class BoostPlan:
    """How many texts the target writes, and how the drafts are trained; `tokens_per_step` counts padding too."""

    texts: int = 10000
    held_out: int = 300
    batch: int = 256
    temperature: float = 0.8
    tokens_per_step: int = 2048
    first_epochs: int = 4
    epochs: int = 2
    first_rate: float = 1e-2
    rate: float = 5e-3
    hit_weight: float = 0.25
    seed: int = 1


QUICK = BoostPlan(texts=24, held_out=8, batch=16, tokens_per_step=1024, first_epochs=1, epochs=1)


@dataclass(frozen=True)
class Text:
    """A prompt and what the target made of it, both as token ids; see `end_of` for the last one of `text`."""

    prompt: list[int]
    text: list[int]
    greedy: bool


def check_models(folder: Path, draft: Path | None) -> None:
    """ValueError unless the texts can be sampled from the target in `folder` and a given draft has its tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    wanted: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": True}
    wanted |= {"bos_token_id": BOS, "eos_token_id": EOS}
    for name, value in wanted.items():
        if config.get(name) != value:
            raise ValueError(f"{folder}/config.json: {name} is {config.get(name)}; only {value} is supported")
    if (
        draft is not None
        and (draft / "tokenizer.json").read_bytes() != (folder / "tokenizer.json").read_bytes()
    ):
        raise ValueError(
            f"{draft} has another tokenizer than {folder}; only drafts with the same are supported"
        )
    read_hf(folder)


def end_of(tokenizer: Tokenizer) -> list[int]:
    """What ends a text: the end token; nothing without roles, where a story may end with either of two tokens."""
    return [] if tokenizer.token_to_id("<|assistant|>") is None else [EOS]


def prompt_for(part: str, index: int, tokenizer: Tokenizer, seed: int) -> list[int]:
    """Prompt `index` of a part: the opening of a story, or if the tokenizer has roles mostly a request for one."""
    rng = random.Random(f"boost-{part}-{seed}-{index}")
    assistant = tokenizer.token_to_id("<|assistant|>")
    if assistant is None or rng.random() < 0.4:
        ids = tokenizer.encode(opening(rng), add_special_tokens=False).ids
        return [BOS, *(i for i in ids if i not in (BOS, EOS))]
    turns = [Turn("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.2 else []
    turns.append(Turn("user", build_request(rng, no_noun=0.1)[0]))
    return [*encode_document(turns, tokenizer)[0], assistant]


def write_texts(target: Path, work: Path, part: str, count: int, plan: BoostPlan) -> None:
    """Let the target continue prompts until `count` texts have ended, half of them greedy, half sampled."""
    path = work / f"{part}.jsonl"
    if path.exists():
        if (found := len(read_texts(work, part))) != count:
            raise ValueError(f"{path} holds {found} texts of another run, not {count}: use another --work")
        return
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    # What is measured is the target's own text; for the training bf16, four times as fast, is near enough.
    teacher = Teacher(target, torch.bfloat16 if part == "training" else torch.float32)
    texts: list[Text] = []
    number, start = 0, time.monotonic()
    for greedy, wanted in ((True, count // 2), (False, count)):
        last = number + 4 * math.ceil(count / plan.batch)
        while len(texts) < wanted and number < last:
            first = number * plan.batch
            prompts = [prompt_for(part, first + row, tokenizer, plan.seed) for row in range(plan.batch)]
            serial = plan.seed * 200003 + 2 * number + PARTS.index(part)
            results = sample_batch(teacher, prompts, GREEDY if greedy else plan.temperature, serial)
            for prompt, result in zip(prompts, results, strict=True):
                if result is not None and len(texts) < wanted:
                    texts.append(Text(prompt, result[len(prompt) - 1 :] + end_of(tokenizer), greedy))
            number += 1
            print(f"{part}: {len(texts)} texts, {time.monotonic() - start:.0f} s", flush=True)
        if len(texts) < wanted:
            raise RuntimeError(f"{len(texts)} texts instead of {wanted}: the target does not end its stories")
    unfinished = path.with_suffix(".part")
    unfinished.write_text("".join(json.dumps(asdict(text)) + "\n" for text in texts))
    unfinished.replace(path)


def read_texts(work: Path, part: str) -> list[Text]:
    """What `write_texts` wrote."""
    return [Text(**json.loads(line)) for line in (work / f"{part}.jsonl").read_text().splitlines()]


def unseen_texts(work: Path) -> list[Text]:
    """The held-out texts of which neither the prompt nor the text is one of the training."""
    known = {tuple(ids) for text in read_texts(work, "training") for ids in (text.prompt, text.text)}
    texts = read_texts(work, "held-out")
    return [text for text in texts if not {tuple(text.prompt), tuple(text.text)} & known]


def rows_of(texts: Sequence[Text]) -> list[Row]:
    """Ids of each prompt and text, and weights: only the text counts."""
    return [
        (text.prompt + text.text, [0] * len(text.prompt) + [WEIGHT_ONE] * len(text.text)) for text in texts
    ]


@torch.inference_mode()
def ranks_of(model: Llama, texts: Sequence[Text]) -> list[Ranks]:
    """Of every token of each text: how many tokens the model prefers to it (the lower id, where two are equal)."""
    rows = rows_of(texts)
    out: list[Ranks] = [np.empty(0, dtype=np.int32)] * len(texts)
    numbers = torch.arange(model.config.vocab)
    for group in groups(rows, 4096, random.Random(0)):
        ids, weights = padded(rows, group)
        counted = weights[:, 1:] > 0
        logits = functional.linear(model(ids[:, :-1])[counted], model.embed)
        token = ids[:, 1:][counted][:, None]
        own = logits.gather(1, token)
        better = (logits > own) | ((logits == own) & (numbers < token))
        found = better.sum(-1).split(counted.sum(-1).tolist())
        for index, ranks in zip(group, found, strict=True):
            out[index] = ranks.numpy().astype(np.int32)
    return out


def missed_rows(texts: Sequence[Text], ranks: Sequence[Ranks], hit_weight: float) -> list[Row]:
    """The rows of the texts with `hit_weight` for the tokens of rank 0; a text without any other token is dropped."""
    out: list[Row] = []
    for (ids, weights), found in zip(rows_of(texts), ranks, strict=True):
        if found.any():
            counts = np.where(found > 0, WEIGHT_ONE, round(WEIGHT_ONE * hit_weight)).tolist()
            out.append((ids, weights[: -len(counts)] + counts))
    if not out:
        raise RuntimeError("the first draft misses nothing: there is nothing to learn")
    return out


class Soft(NamedTuple):
    """What the target says at every token that counts: `states[i] @ embed.T` are its logits for row i, bf16."""

    states: list[Tensor]
    embed: Tensor


@torch.inference_mode()
def soft_targets(target: Llama, rows: list[Row]) -> Soft:
    """The target's final hidden states before each token that counts: 2 * hidden bytes of memory for each."""
    model = target.to(torch.bfloat16)
    states: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in groups(rows, 4096, random.Random(0)):
        ids, weights = padded(rows, group)
        counted = weights[:, 1:] > 0
        found = model(ids[:, :-1], torch.bfloat16)[counted].split(counted.sum(-1).tolist())
        for index, part in zip(group, found, strict=True):
            states[index] = part.clone()
    return Soft(states, model.embed.detach())


def make_optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and AdamW for the embedding and the norms, both at the rate of the step."""
    blocks = [p for name, p in model.named_parameters() if p.ndim == 2 and name != "embed"]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or name == "embed"]
    return [
        torch.optim.Muon(blocks, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.01),
    ]


def train(
    model: Llama, rows: list[Row], epochs: int, rate: float, plan: BoostPlan, soft: Soft | None = None
) -> list[float]:
    """Train in place; the rate rises over 5 % of the steps and falls to zero. The mean loss of each epoch.

    The loss of a token is -log of its probability, with `soft` KL(target || draft).
    """
    rng = random.Random(f"order-{plan.seed}")
    order = [groups(rows, plan.tokens_per_step, rng) for _ in range(epochs)]
    total, step, start = sum(map(len, order)), 0, time.monotonic()
    optimizers = make_optimizers(model)
    log = []
    for epoch in order:
        losses = []
        for group in epoch:
            rise, fall = (step + 1) / max(1, 0.05 * total), (total - step) / total
            ids, weights = padded(rows, group)
            counted = weights[:, 1:] > 0
            factors = weights[:, 1:][counted].float()
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model(ids[:, :-1])[counted].bfloat16()
            embed, shares = model.embed.bfloat16(), factors / factors.sum()
            if soft is None:
                loss = TiedCrossEntropy.apply(hidden, embed, ids[:, 1:][counted], shares)
            else:
                states = torch.cat([soft.states[index] for index in group])
                loss = TiedDistillation.apply(hidden, embed, states, soft.embed, shares)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"loss is {losses[-1]} at step {step}")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for settings in optimizer.param_groups:
                    settings["lr"] = rate * min(1.0, rise, fall / 0.95)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
        log.append(round(sum(losses) / len(losses), 4))
        print(f"step {step}/{total}: loss {log[-1]}, {time.monotonic() - start:.0f} s", flush=True)
    return log


def write_draft(model: Llama, target: Path, folder: Path) -> None:
    """Write the model (bf16) beside the target's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_hf(model, folder)
    for name in TOKENIZER_FILES:
        if (target / name).exists():
            shutil.copyfile(target / name, folder / name)


def measure(texts: Sequence[Text], first: list[Ranks], second: list[Ranks]) -> dict[str, float]:
    """Coverage of the texts, and tokens per pass of the target for trees `DEPTH` deep, of each draft and of both."""
    both = union(first, second)
    chains = [[accepted(ranks, DEPTH) for ranks in draft] for draft in (first, second)]
    twin = [accepted(ranks, DEPTH, width=2) for ranks in first]
    facts = {"texts": float(len(texts)), "tokens": float(sum(len(text.text) for text in texts))}
    for k in (1, 2, 3, 5):
        for name, ranks in (("first", first), ("second", second), ("both", both)):
            facts[f"{name} top-{k}"] = coverage(ranks, k)
    facts["steps: chain of first"] = tokens_per_step(chains[:1])
    facts["steps: chain of second"] = tokens_per_step(chains[1:])
    facts["steps: two chains of first"] = tokens_per_step([twin])
    facts["steps: chain of each"] = tokens_per_step(chains)
    return {name: round(value, 4) for name, value in facts.items()}


def stage_sample(args: argparse.Namespace) -> None:
    """Let the target write the texts of both parts."""
    for part, count in zip(PARTS, (args.plan.texts, args.plan.held_out), strict=True):
        write_texts(args.target, args.work, part, count, args.plan)


def first_draft(args: argparse.Namespace) -> Path:
    """Folder of the first draft: the given one, or that of one that the tool trains."""
    return args.draft if args.draft is not None else args.work / "draft"


def stage_first(args: argparse.Namespace) -> None:
    """Train the first draft on what the target says, and write it; nothing where one is given."""
    if args.draft is not None:
        return
    plan: BoostPlan = args.plan
    rows = rows_of(read_texts(args.work, "training"))
    config = json.loads((args.target / "config.json").read_text())
    shape = replace(DRAFT, vocab=config["vocab_size"], context=config["max_position_embeddings"])
    model, soft = Llama(shape, plan.seed), soft_targets(read_hf(args.target), rows)
    losses = train(model, rows, plan.first_epochs, plan.first_rate, plan, soft)
    write_draft(model, args.target, first_draft(args))
    write_log(args.work / "first.json", plan, loss=losses)


def stage_train(args: argparse.Namespace) -> None:
    """Train the second draft from the first one, on what that misses, and write it."""
    plan: BoostPlan = args.plan
    texts = read_texts(args.work, "training")
    model = read_hf(first_draft(args))
    rows = missed_rows(texts, ranks_of(model, texts), plan.hit_weight)
    missed = sum(w == WEIGHT_ONE for _, weights in rows for w in weights)
    losses = train(model, rows, plan.epochs, plan.rate, plan)
    write_draft(model, args.target, args.out)
    write_log(args.work / "training.json", plan, missed=missed, loss=losses)


def write_log(path: Path, plan: BoostPlan, **facts: Any) -> None:
    """Write how a draft was trained."""
    path.write_text(json.dumps({"plan": asdict(plan), **facts}, indent=2) + "\n")


def stage_evaluate(args: argparse.Namespace) -> None:
    """Measure the drafts as they are written, on texts that no draft was trained on."""
    texts = unseen_texts(args.work)
    drafts = [ranks_of(read_hf(folder), texts) for folder in (first_draft(args), args.out)]
    report = {}
    for name, greedy in (("greedy", True), ("sampled", False)):
        chosen = [i for i, text in enumerate(texts) if text.greedy == greedy]
        first, second = ([ranks[i] for i in chosen] for ranks in drafts)
        report[name] = measure([texts[i] for i in chosen], first, second)
        print(json.dumps({name: report[name]}, indent=2), flush=True)
    (args.work / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="python -m tools.boost_draft", description=__doc__)
    out.add_argument("stage", choices=STAGES)
    embedded = ROOT / "tokenloom" / "embedded"
    out.add_argument("--target", type=Path, default=embedded / "target", help="folder of the target")
    out.add_argument("--draft", type=Path, help="folder of the first draft; without it one is trained")
    out.add_argument("--out", type=Path, required=True, help="folder of the second draft")
    out.add_argument("--work", type=Path, default=Path("boost-work"), help="folder of intermediate files")
    out.add_argument("--texts", type=int, help=f"texts of the training ({BoostPlan.texts})")
    out.add_argument("--epochs", type=int, help=f"epochs of the first draft ({BoostPlan.first_epochs})")
    out.add_argument("--hit-weight", type=float, help="weight of the tokens that the first draft foresees")
    out.add_argument(
        "--quick", action="store_true", help="a few texts and steps: seconds, and useless drafts"
    )
    out.add_argument("--threads", type=int, default=1, help="threads of torch; part of what fixes the result")
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stage, or all of them in order."""
    args = parser().parse_args(arguments)
    args.plan = QUICK if args.quick else BoostPlan()
    for name, field, least in (("texts", "texts", 2), ("epochs", "first_epochs", 1)):
        if (value := getattr(args, name)) is not None:
            if value < least:
                raise ValueError(f"--{name} is {value}; it must be at least {least}")
            args.plan = replace(args.plan, **{field: value})
    if args.hit_weight is not None:
        if not 0.0 <= args.hit_weight <= 1.0:
            raise ValueError(f"--hit-weight is {args.hit_weight}; it must be in [0, 1]")
        args.plan = replace(args.plan, hit_weight=args.hit_weight)
    check_models(args.target, args.draft)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES[:-1] if args.stage == "all" else (args.stage,):
        globals()[f"stage_{stage}"](args)


if __name__ == "__main__":
    main()
