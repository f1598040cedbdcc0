"""Muon for the matrices of the blocks: momentum, then orthogonalisation of the update by Newton-Schulz iteration.

Source: https://kellerjordan.github.io/posts/muon/. Matrices of one shape are stacked, so that one batched iteration
serves all of them; each rank owns an equal share of every stack, updates those matrices and gathers the others. The
stack is padded with zero matrices to a multiple of the world size, in the optimizer's buffers only. The momentum is
float32; the iteration runs in bfloat16 on CUDA and in float32 elsewhere.
"""

from typing import Any

import torch

from nanochat.common import all_gather_shares, compute_dtype, get_dist_info, reduce_scatter_mean

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # maximal slope at zero; singular values end between about 0.7 and 1.2


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Matrices (k, m, n) with their singular values moved near 1, in the dtype in which the device computes.

    Newton-Schulz: steps times x <- p(x x^T) x, with the polynomial p(g) = a + b g + c g^2. All these p(g) commute, so
    that g = x x^T can be followed alone (g <- p^2 g) and x be multiplied once at the end, which halves the work where a
    matrix is much longer than wide. It takes float32: bfloat16 would make small eigenvalues of g negative, and those
    diverge.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(compute_dtype(matrices.device))
    is_tall = x.size(-2) > x.size(-1)
    if is_tall:  # the Gram matrix of the short side is the small one
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.dtype == torch.float32 and x.size(-1) >= 2 * x.size(-2):
        x = _product_of_polynomials(x @ x.mT, steps) @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _product_of_polynomials(gram: torch.Tensor, steps: int) -> torch.Tensor:
    """p(g_steps) ... p(g_2) p(g_1) for Gram matrices (k, m, m), where g_1 = gram and g_(i+1) = p(g_i)^2 g_i."""
    a, b, c = NEWTON_SCHULZ
    product = None
    for step in range(steps):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        product = p if product is None else p @ product
        if step < steps - 1:
            gram = p @ (p @ gram)
    return product


def muon_update(
    params: torch.Tensor, grads: torch.Tensor, momentum_buffer: torch.Tensor, lr: float, momentum: float
) -> torch.Tensor:
    """Return the new params (k, m, n) of a stack of matrices; grads and momentum_buffer float32, the latter in place.

    Nesterov momentum; the step is lr * sqrt(max(1, m / n)) of an orthogonal matrix.
    """
    momentum_buffer.lerp_(grads, 1 - momentum)
    update = orthogonalize(grads.lerp(momentum_buffer, momentum))
    rows, cols = params.shape[-2:]
    return torch.add(params, update.to(params.dtype), alpha=-lr * max(1.0, rows / cols) ** 0.5)


class Muon:
    """Muon over a list of matrices, its state shared out over the ranks; used like AdamW (reduce, then step)."""

    def __init__(self, params: list[torch.Tensor], lr: float = 0.02, momentum: float = 0.95):
        _, self.rank, _, self.world_size = get_dist_info()
        self.param_groups: list[dict[str, Any]] = []
        for shape in dict.fromkeys(p.shape for p in params):
            members = [p for p in params if p.shape == shape]
            share = -(-len(members) // self.world_size)
            buffer = torch.zeros((share, *shape), dtype=torch.float32, device=members[0].device)
            self.param_groups.append(
                {"params": members, "lr": lr, "initial_lr": lr, "momentum": momentum, "momentum_buffer": buffer}
            )
        self.grads: list[torch.Tensor] = []  # one averaged share a group, from reduce to step

    def _stack(self, group: dict[str, Any], tensors: list[torch.Tensor]) -> torch.Tensor:
        """(k, m, n) tensors of a group, padded with zeros to world_size times the rank's share."""
        share = len(group["momentum_buffer"])
        padding = [torch.zeros_like(tensors[0])] * (share * self.world_size - len(tensors))
        return torch.stack(tensors + padding)

    def _share(self, group: dict[str, Any], stacked: torch.Tensor) -> torch.Tensor:
        return stacked.chunk(self.world_size)[self.rank]

    @torch.no_grad()
    def reduce(self) -> torch.Tensor:
        """Average the gradients over ranks; return the sum of squares of this rank's share, a float32 scalar."""
        pending = [reduce_scatter_mean(self._stack(g, [p.grad for p in g["params"]])) for g in self.param_groups]
        sum_of_squares = torch.zeros((), device=self.param_groups[0]["momentum_buffer"].device)
        for finish in pending:
            self.grads.append(finish())
            sum_of_squares += self.grads[-1].square().sum()
        return sum_of_squares

    def group_squares(self) -> list[torch.Tensor]:
        """A group's sum of squares of this rank's share of the averaged gradient, each; between reduce and step."""
        return [grads.square().sum() for grads in self.grads]

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """Update every matrix with its reduced gradient times scale. Every rank must call, after reduce."""
        for group, grads in zip(self.param_groups, self.grads, strict=True):
            params = group["params"]
            own = self._share(group, self._stack(group, [p.detach() for p in params]))
            if scale != 1.0:
                grads.mul_(scale)
            own = muon_update(own, grads, group["momentum_buffer"], group["lr"], group["momentum"])
            torch._foreach_copy_(params, list(all_gather_shares(own)[: len(params)].unbind()))
        self.grads = []

    def state_dict(self) -> dict[str, Any]:
        """The whole state, on the CPU: one (k, m, n) momentum buffer a shape. Every rank must call."""
        whole = [all_gather_shares(g["momentum_buffer"])[: len(g["params"])].cpu().clone() for g in self.param_groups]
        return {"momentum_buffers": whole}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state_dict, saved at any world size."""
        for group, saved in zip(self.param_groups, state["momentum_buffers"], strict=True):
            group["momentum_buffer"].copy_(self._share(group, self._stack(group, list(saved))))
