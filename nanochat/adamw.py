"""AdamW (arXiv 1711.05101) for the embedding and the output layer: one pure update, one optimizer for 1 to N ranks.

Each rank holds the moments of an equal, contiguous share of every parameter's elements, updates that share and gathers
the others (ZeRO stage 2, arXiv 1910.02054). The moments are float32 whatever the parameter's dtype. A state dict holds
the whole moments in the parameter's shape, so that it can be loaded at another world size.
"""

from typing import Any

import torch
import torch.nn.functional as F

from nanochat.common import all_gather_shares, get_dist_info, reduce_scatter_mean

CPU_BLOCK = 2**16  # elements that are updated together on a CPU: its caches hold them from one operation to the next


def adamw_update(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step, in place on param, exp_avg and exp_avg_sq, all of one shape; grad float32; step counts from 1.

    eps is added after the bias correction, as in torch.optim.AdamW.
    """
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    update = exp_avg.div(denominator).mul_(lr / (1 - beta1**step))
    param.mul_(1 - lr * weight_decay).sub_(update.to(param.dtype))


class AdamW:
    """AdamW over parameter groups, its state shared out over the ranks.

    groups: dicts with "params" (a list of parameters) and "lr". A step is reduce() on every rank, then
    step(scale) on every rank, where scale clips the gradients.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        betas: tuple[float, float] = (0.8, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
    ):
        _, self.rank, _, self.world_size = get_dist_info()
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.param_groups = [{**group, "initial_lr": group["lr"]} for group in groups]
        self.steps = 0
        self.moments = {p: self._zeros(p) for p in self._params()}  # parameter -> [exp_avg, exp_avg_sq], shares
        self.grads: dict[torch.Tensor, torch.Tensor] = {}  # parameter -> its averaged share, from reduce to step

    def _params(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _zeros(self, param: torch.Tensor) -> list[torch.Tensor]:
        return [torch.zeros_like(self._share(param.detach()), dtype=torch.float32) for _ in range(2)]

    def _padded(self, tensor: torch.Tensor) -> torch.Tensor:
        """All elements of a tensor, zeros appended up to a multiple of the world size; a view where none are."""
        extra = -tensor.numel() % self.world_size
        return F.pad(tensor.flatten(), (0, extra)) if extra else tensor.flatten()

    def _share(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's elements of a tensor; a view where the world size divides them."""
        return self._padded(tensor).chunk(self.world_size)[self.rank]

    @torch.no_grad()
    def reduce(self) -> torch.Tensor:
        """Average the gradients over ranks; return the sum of squares of this rank's share, a float32 scalar."""
        pending = [(p, reduce_scatter_mean(self._padded(p.grad))) for p in self._params()]
        sum_of_squares = torch.zeros((), device=self._params()[0].device)
        for p, finish in pending:
            self.grads[p] = finish().float()
            sum_of_squares += self.grads[p].square().sum()
        return sum_of_squares

    def group_squares(self) -> list[torch.Tensor]:
        """A group's sum of squares of this rank's share of the averaged gradient, each; between reduce and step."""
        return [sum(self.grads[p].square().sum() for p in group["params"]) for group in self.param_groups]

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """Update every parameter with its reduced gradient times scale. Every rank must call, after reduce."""
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                share = self._share(p.detach())
                whole = (share, self.grads.pop(p), *self.moments[p])
                block = CPU_BLOCK if p.is_cpu else share.numel()
                for own, grad, *moments in zip(*(tensor.split(block) for tensor in whole), strict=True):
                    grad = grad if scale == 1.0 else grad * scale
                    adamw_update(own, grad, *moments, self.steps, group["lr"], self.betas, self.eps, self.weight_decay)
                if self.world_size > 1:
                    p.copy_(all_gather_shares(share)[: p.numel()].view_as(p))

    def state_dict(self) -> dict[str, Any]:
        """The whole state on the CPU: "steps", and "moments", a pair of tensors a parameter. Every rank must call."""
        whole = [
            tuple(all_gather_shares(m)[: p.numel()].view(p.shape).cpu().clone() for m in self.moments[p])
            for p in self._params()
        ]
        return {"steps": self.steps, "moments": whole}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state_dict, saved at any world size."""
        self.steps = state["steps"]
        for p, whole in zip(self._params(), state["moments"], strict=True):
            for own, saved in zip(self.moments[p], whole, strict=True):
                own.copy_(self._share(saved))
