"""Command line: ``python -m tools.train_embedded STAGE [options]``; see docs/embedded-models.md."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer

from . import corpus, data, nouns, report, sample_teacher, tokenizer
from .model import TARGET, write_hf
from .train import TrainPlan, load_checkpoint
from .train import run as run_training

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("sample", "tokenizer", "data", "train", "export", "evaluate", "report", "all")


def stage_sample(args: argparse.Namespace) -> None:
    """Sample stories from the teacher up to ``--sample-tokens``."""
    training, _ = corpus.load_stories(args.data)
    sample_teacher.run(
        args.data, args.work, training, args.sample_tokens, batch=768, temperature=0.9, seed=args.seed
    )


def stage_tokenizer(args: argparse.Namespace) -> None:
    """Train the tokenizer on the real stories, some sampled ones and the requests."""
    path = args.work / "tokenizer.json"
    if path.exists():
        return
    training, _ = corpus.load_stories(args.data)
    sampled = list(sample_teacher.read_samples(args.work / "samples"))[:6000]
    known = nouns.noun_list(training)
    requests = [
        turn.text
        for document in data.documents(training, [], known, args.seed, (1, 0))
        for turn in document
        if turn.role in ("user", "system")
    ]
    tokenizer.train_tokenizer(training + sampled + requests).save(str(path))


def stage_data(args: argparse.Namespace) -> None:
    """Build the packed training rows."""
    if (args.work / "data" / "data.json").exists():
        return
    training, held_out = corpus.load_stories(args.data)
    sampled = [corpus.normalise(text) for text in sample_teacher.read_samples(args.work / "samples")]
    known = nouns.noun_list(training)
    (args.work / "nouns.txt").write_text("\n".join(known) + "\n")
    plan = data.DataPlan(seed=args.seed, real_epochs=args.real_epochs, sampled_epochs=args.sampled_epochs)
    pieces = Tokenizer.from_file(str(args.work / "tokenizer.json"))
    print(
        json.dumps(data.build(training, sampled, held_out, known, pieces, plan, args.work / "data"), indent=2)
    )


def stage_train(args: argparse.Namespace) -> None:
    """Train the target."""
    run_training(args.work, TrainPlan(steps=args.steps, seed=args.seed), args.compile)


def stage_export(args: argparse.Namespace) -> None:
    """Write the target and its tokenizer in Hugging Face format under ``--out``."""
    model, step = load_checkpoint(args.work / "target" / "checkpoint.pt", TARGET)
    folder = args.out / "target"
    folder.mkdir(parents=True, exist_ok=True)
    write_hf(model, folder)
    tokenizer.write_files(Tokenizer.from_file(str(args.work / "tokenizer.json")), folder, TARGET.context)
    print(f"step {step} written to {folder}")


def stage_evaluate(args: argparse.Namespace) -> None:
    """Measure the exported models; see evaluate.py."""
    from . import evaluate

    evaluate.run(args.out, args.data, args.work, args.seed)


def stage_report(args: argparse.Namespace) -> None:
    """Print the loss tables and draw docs/embedded-models.svg."""
    report.run(args.work, ROOT / "docs" / "embedded-models.svg")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="python -m tools.train_embedded", description=__doc__)
    out.add_argument("stage", choices=STAGES)
    out.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the shared data"
    )
    out.add_argument("--work", type=Path, default=Path("embedded-work"), help="folder of intermediate files")
    out.add_argument("--out", type=Path, default=ROOT / "tokenloom" / "embedded", help="folder of the models")
    out.add_argument("--seed", type=int, default=1)
    out.add_argument("--sample-tokens", type=int, default=5_500_000)
    out.add_argument("--real-epochs", type=int, default=5)
    out.add_argument("--sampled-epochs", type=int, default=4)
    out.add_argument("--steps", type=int, default=2780, help="steps of the target, 8,192 tokens each")
    out.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    return out


def main() -> None:
    """Run one stage, or all of them in order."""
    args = parser().parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    stages = STAGES[:-1] if args.stage == "all" else (args.stage,)
    for stage in stages:
        globals()[f"stage_{stage}"](args)


if __name__ == "__main__":
    main()
