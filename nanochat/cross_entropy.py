"""Cross-entropy over a large vocabulary without ever holding all logits.

The logits of B*T positions over V tokens are the largest tensor of a training step by far (32 x 2048 x 65,536 floats
are 17 GB). Here the positions go through the output layer, the softcap and the loss in chunks. The gradient of a sum of
losses does not need to wait for the backward pass, so each chunk leaves its share of both gradients behind and its
logits are dropped. That is three matrix products a chunk, like the plain computation, and no recomputation.

What it does not do: second derivatives, and a gradient through per-token losses. Their weighted sum has one, which is
all that policy gradients need.
"""

from typing import Any

import torch
import torch.nn.functional as F

IGNORE_INDEX = -1  # targets with this value have no loss
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**28}  # logits a chunk: what fits a CPU's cache, or keeps a GPU busy


def chunk_tokens(num_tokens: int, vocab_size: int, device_type: str) -> int:
    """How many positions go through the output layer at once."""
    elements = CHUNK_ELEMENTS.get(device_type, 2**26)
    return max(64, min(num_tokens, elements // vocab_size))


class _SoftcappedCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        cap: float,
        dtype: torch.dtype,
        loss_weights: torch.Tensor | None,
    ) -> torch.Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        counts = (targets != IGNORE_INDEX).float()  # how much each loss counts
        if loss_weights is not None:
            counts *= loss_weights
        compute_weight = weight.to(dtype)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x) if needs_x else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        size = chunk_tokens(len(x), len(weight), x.device.type)
        chunks = zip(x.split(size), targets.split(size), counts.split(size), range(0, len(x), size), strict=True)
        for x_chunk, target, count, start in chunks:
            x_chunk = x_chunk.to(dtype)
            tanh = (x_chunk @ compute_weight.T).float().div_(cap).tanh_()  # (chunk, V)
            index = target.clamp(min=0).unsqueeze(1)
            # |logits| <= cap, so that exp cannot overflow and no maximum has to be subtracted
            probs = torch.mul(tanh, cap).exp_()
            normalizer = probs.sum(dim=1, keepdim=True)
            losses = normalizer.log().squeeze(1) - cap * tanh.gather(1, index).squeeze(1)
            total += (losses * count).sum()
            if not (needs_x or needs_weight):
                continue
            grad = probs.div_(normalizer)
            grad.scatter_add_(1, index, torch.full_like(normalizer, -1.0))
            grad.mul_(tanh.square_().neg_().add_(1.0)).mul_(count.unsqueeze(1))  # d tanh(u) = 1 - tanh(u)^2
            grad = grad.to(dtype)
            if needs_x:
                grad_x[start : start + size] = grad @ compute_weight
            if needs_weight:
                if dtype == torch.float32:
                    grad_weight.addmm_(grad.T, x_chunk)
                else:
                    grad_weight += grad.T @ x_chunk
        ctx.save_for_backward(*(g for g in (grad_x, grad_weight) if g is not None))
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        grad_x = saved.pop(0) * grad_total if ctx.needs_input_grad[0] else None
        grad_weight = (saved.pop(0) * grad_total).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None, None, None, None


def _drop_ignored(
    x: torch.Tensor, targets: torch.Tensor, loss_weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The positions that have a loss; the arguments themselves where all have one, as in pretraining, or none."""
    kept = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    if len(kept) in (0, len(targets)):
        return x, targets, loss_weights
    return x[kept], targets[kept], None if loss_weights is None else loss_weights[kept]


def cross_entropy_sum(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    cap: float,
    dtype: torch.dtype,
    loss_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The summed loss of softcapped logits, with gradients to x and weight.

    x (N, C) states; weight (V, C) of the output layer; targets (N,) int64, IGNORE_INDEX for no loss; dtype of the
    matrix products; loss_weights (N,) float32, by which each loss is multiplied (constants; None is 1 everywhere).
    Returns a float32 scalar in nats. Memory beyond the inputs: one chunk of logits and the gradients. Positions without
    a loss are left out of all products (the states of the others are copied then), except under torch.compile, which
    wants fixed shapes.
    """
    if not torch.compiler.is_compiling():
        x, targets, loss_weights = _drop_ignored(x, targets, loss_weights)
    if not torch.is_grad_enabled():
        losses = cross_entropy_each(x, weight, targets, cap, dtype)
        return (losses if loss_weights is None else losses * loss_weights).sum()
    return _SoftcappedCrossEntropySum.apply(x, weight, targets, cap, dtype, loss_weights)


def cross_entropy_each(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float, dtype: torch.dtype
) -> torch.Tensor:
    """The loss of each position (N,), float32, 0 where the target is IGNORE_INDEX; arguments as cross_entropy_sum.

    Also in chunks. Gradients flow, but then autograd keeps the chunks: use it where no gradient is needed.
    """
    size = chunk_tokens(len(x), len(weight), x.device.type)
    compute_weight = weight.to(dtype)
    losses = []
    for x_chunk, target in zip(x.split(size), targets.split(size), strict=True):
        logits = cap * torch.tanh((x_chunk.to(dtype) @ compute_weight.T).float() / cap)
        losses.append(F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="none"))
    return torch.cat(losses)
