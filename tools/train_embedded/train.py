"""Training of one model: Muon and AdamW on fp32 weights, bf16 arithmetic, restartable bit for bit."""

from __future__ import annotations

import json
import math
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .data import WEIGHT_MARK, WEIGHT_ONE, DataPlan, Rows
from .loss import TiedCrossEntropy
from .model import TARGET, Llama, ModelConfig


@dataclass(frozen=True)
class TrainPlan:
    """The schedule. ``steps`` may be changed on resuming as long as the decay has not begun."""

    steps: int
    tokens_per_step: int = 8192
    micro_tokens: int = 2048
    muon_lr: float = 5e-3
    adam_lr: float = 3e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup: int = 100
    decay_share: float = 0.4
    finish_share: float = 0.28
    long_share: float = 0.1
    polish_steps: int = 560
    polish_rate: float = 0.6
    mark_weight: float = 8.0
    finish_mark_weight: float = 30.0
    seed: int = 1

    @property
    def total(self) -> int:
        """All steps, those of the polish rows included."""
        return self.steps + self.polish_steps

    def rate(self, step: int) -> float:
        """Factor on the learning rates at ``step``: warm-up, stable, linear decay to zero; once more for polish."""
        if step >= self.steps:
            return self.polish_rate * (self.total - step) / self.polish_steps
        decay = max(1, round(self.steps * self.decay_share))
        return min(1.0, (step + 1) / self.warmup, max(0.0, (self.steps - step) / decay))


class Batches:
    """The rows of every step, as a pure function of the step: main, finish and long rows, then polish rows."""

    def __init__(self, folder: Path, plan: TrainPlan, data: DataPlan) -> None:
        self.plan, self.data = plan, data
        self.phases = [
            (plan.steps, Rows(folder, "polish"), data.short_row),
            (round(plan.steps * (1 - plan.long_share)), Rows(folder, "long"), data.long_row),
            (round(plan.steps * (1 - plan.finish_share)), Rows(folder, "finish"), data.short_row),
            (0, Rows(folder, "main"), data.short_row),
        ]

    def step(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Micro-batches (ids [b, T + 1], weights [b, T + 1] as fp32 multiples of an ordinary token)."""
        begin, rows, length = next(phase for phase in self.phases if step >= phase[0])
        count = max(1, self.plan.tokens_per_step // length)
        size = max(1, self.plan.micro_tokens // length)
        ids, weights = rows.batch((step - begin) * count, count)
        mark = self.plan.finish_mark_weight if begin else self.plan.mark_weight
        factors = np.where(weights == WEIGHT_MARK, mark, weights / WEIGHT_ONE)
        parts = torch.from_numpy(ids).split(size), torch.from_numpy(factors.astype(np.float32)).split(size)
        return list(zip(*parts, strict=True))


class Trainer:
    """fp32 master weights and optimizers, and a bf16 copy of the model that does the arithmetic.

    Micro-batches go to ``threads`` single-threaded workers as these become free, so that a busy machine costs
    no more than the time it takes away; the gradients are added in the order of the micro-batches, whoever
    computed them, so that the result does not depend on the timing.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: TrainPlan,
        dtype: torch.dtype = torch.bfloat16,
        compiled: bool = False,
        threads: int = 2,
    ) -> None:
        self.plan, self.dtype, self.step = plan, dtype, 0
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        self.shapes: set[torch.Size] = set()
        self.master, self.worker = Llama(config, plan.seed), Llama(config, plan.seed).to(dtype)
        if compiled:
            torch._dynamo.config.cache_size_limit = 64
            for block in self.worker.blocks:
                block.forward = torch.compile(block.forward, dynamic=False)
        matrices = [p for n, p in self.master.named_parameters() if p.ndim == 2 and n != "embed"]
        vectors = [p for p in self.master.parameters() if p.ndim == 1]
        adam = [
            {"params": [self.master.embed], "weight_decay": plan.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(
                matrices,
                lr=plan.muon_lr,
                weight_decay=plan.weight_decay,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(adam, lr=plan.adam_lr, betas=(0.9, 0.95), eps=1e-10),
        ]
        self.peaks = [plan.muon_lr, plan.adam_lr]
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        for source, copy in zip(self.master.parameters(), self.worker.parameters(), strict=True):
            copy.copy_(source)

    def _loss(self, ids: Tensor, weights: Tensor, scale: float) -> Tensor:
        """Weighted sum of the losses of one micro-batch times ``scale``."""
        hidden = self.worker(ids[:, :-1], self.dtype).flatten(0, 1)
        targets, weight = ids[:, 1:].flatten(), weights[:, 1:].flatten() * scale
        return TiedCrossEntropy.apply(hidden, self.worker.embed, targets, weight)

    def _gradient(self, ids: Tensor, weights: Tensor, scale: float) -> tuple[float, list[Tensor]]:
        """Loss and gradients of one micro-batch, in the calling thread alone."""
        loss = self._loss(ids, weights, scale)
        gradients = torch.autograd.grad(loss, list(self.worker.parameters()))
        return float(loss.detach()), list(gradients)

    def train_step(self, batch: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """One optimizer step; returns (weighted mean loss, gradient norm)."""
        scale = 1.0 / max(1.0, sum(float(weights[:, 1:].sum()) for _, weights in batch))
        masters = list(self.master.parameters())
        key = batch[0][0].shape
        if key not in self.shapes:  # compile for this case in one thread before several use it
            self.pool.submit(self._gradient, *batch[0], scale).result()
            self.shapes.add(key)
        total = 0.0
        for loss, gradients in self.pool.map(lambda part: self._gradient(*part, scale), batch):
            total += loss
            for master, fresh in zip(masters, gradients, strict=True):
                master.grad = fresh.float() if master.grad is None else master.grad.add_(fresh)
        norm = float(torch.nn.utils.clip_grad_norm_(masters, self.plan.clip))
        rate = self.plan.rate(self.step)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._refresh()
        self.step += 1
        return total, norm

    @torch.no_grad()
    def held_out(self, rows: Rows, micro: int = 8) -> float:
        """Mean nats per counted token of the held-out rows, every counted token alike."""
        total = count = 0.0
        for first in range(0, len(rows.ids), micro):
            size = min(micro, len(rows.ids) - first)
            ids, weights = rows.batch(first, size)
            even = torch.from_numpy((weights[:, 1:] > 0).astype("float32")).flatten()
            hidden = self.worker(torch.from_numpy(ids[:, :-1]), self.dtype).flatten(0, 1)
            loss = TiedCrossEntropy.apply(
                hidden, self.worker.embed, torch.from_numpy(ids[:, 1:]).flatten(), even
            )
            total, count = total + float(loss.detach()), count + float(even.sum())
        return total / count

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on, atomically."""
        state = {
            "step": self.step,
            "master": self.master.state_dict(),
            "plan": asdict(self.plan),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        """Continue from :meth:`save`."""
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.master.load_state_dict(state["master"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._refresh()


def load_checkpoint(path: Path, config: ModelConfig) -> tuple[Llama, int]:
    """The fp32 model of a checkpoint and its step."""
    state = torch.load(path, weights_only=True)
    model = Llama(config)
    model.load_state_dict(state["master"])
    return model, state["step"]


def run(work: Path, plan: TrainPlan, compiled: bool, minutes: float = 4.0) -> None:
    """Train the target to ``plan.total``, with a checkpoint every ``minutes``, at the end and on SIGTERM."""
    folder = work / "target"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / "checkpoint.pt", folder / "log.jsonl"
    data = work / "data"
    batches = Batches(data, plan, DataPlan(**json.loads((data / "data.json").read_text())["plan"]))
    held = Rows(data, "held_out")
    trainer = Trainer(TARGET, plan, compiled=compiled)
    if checkpoint.exists():
        trainer.load(checkpoint)
    stop: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda code, _frame: stop.append(code))
    saved = mark = time.monotonic()
    mean, seen = 0.0, 0
    while trainer.step < plan.total and not stop:
        loss, norm = trainer.train_step(batches.step(trainer.step))
        if not math.isfinite(loss):
            raise RuntimeError(f"loss is {loss} at step {trainer.step}")
        mean, seen = mean + loss, seen + 1
        if trainer.step % 25 == 0 or trainer.step == plan.total:
            now = time.monotonic()
            entry: dict[str, Any] = {
                "step": trainer.step,
                "tokens": trainer.step * plan.tokens_per_step,
                "loss": round(mean / seen, 4),
                "norm": round(norm, 3),
                "rate": round(plan.rate(trainer.step - 1), 4),
                "tokens_per_second": round(seen * plan.tokens_per_step / (now - mark)),
                "seconds": round(now - mark, 1),
            }
            if trainer.step % 250 == 0 or trainer.step == plan.total:
                entry["held_out"] = round(trainer.held_out(held), 4)
            with log.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")
            print(entry, flush=True)
            mean, seen, mark = 0.0, 0, time.monotonic()
        if time.monotonic() - saved > 60 * minutes:
            trainer.save(checkpoint)
            saved = time.monotonic()
    trainer.save(checkpoint)
