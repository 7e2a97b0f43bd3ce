"""Weighted cross entropy over the tied embedding, in chunks, with its gradient computed on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 128


class TiedCrossEntropy(torch.autograd.Function):
    """sum_i w_i * -log softmax(h_i E^T)[t_i]; never holds more than ``CHUNK`` rows of logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, embed: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """``hidden`` [N, D] and ``embed`` [V, D] of one dtype, ``targets`` [N], ``weights`` [N] fp32."""
        total = torch.zeros((), dtype=torch.float32)
        grad_hidden, grad_embed = torch.empty_like(hidden), torch.zeros_like(embed, dtype=torch.float32)
        for start in range(0, hidden.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            rows, target, weight = hidden[part], targets[part, None], weights[part]
            log_p = torch.log_softmax((rows @ embed.t()).float(), -1)
            total -= (log_p.gather(1, target).squeeze(1) * weight).sum()
            grad = log_p.exp_()
            grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
            grad = grad.mul_(weight[:, None]).to(hidden.dtype)
            grad_hidden[part] = grad @ embed
            grad_embed += grad.t() @ rows
        ctx.save_for_backward(grad_hidden, grad_embed.to(embed.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradients."""
        grad_hidden, grad_embed = ctx.saved_tensors
        return grad_hidden * grads[0], grad_embed * grads[0], None, None


class TiedDistillation(torch.autograd.Function):
    """sum_i w_i * KL(teacher_i || softmax(h_i E^T)) for given teacher hidden states and embedding."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, embed: Tensor, teacher: Tensor, teacher_embed: Tensor, weights: Tensor
    ) -> Tensor:
        """``teacher`` [N, D'] and ``teacher_embed`` [V, D'] carry no gradient; the rest as above."""
        total = torch.zeros((), dtype=torch.float32)
        grad_hidden, grad_embed = torch.empty_like(hidden), torch.zeros_like(embed, dtype=torch.float32)
        for start in range(0, hidden.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            rows, weight = hidden[part], weights[part]
            log_p = torch.log_softmax((rows @ embed.t()).float(), -1)
            log_q = torch.log_softmax((teacher[part] @ teacher_embed.t()).float(), -1)
            q = log_q.exp()
            total += ((q * (log_q - log_p)).sum(-1) * weight).sum()
            grad = log_p.exp_().sub_(q).mul_(weight[:, None]).to(hidden.dtype)
            grad_hidden[part] = grad @ embed
            grad_embed += grad.t() @ rows
        ctx.save_for_backward(grad_hidden, grad_embed.to(embed.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradients."""
        grad_hidden, grad_embed = ctx.saved_tensors
        return grad_hidden * grads[0], grad_embed * grads[0], None, None, None
