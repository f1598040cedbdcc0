"""The chunked cross-entropy: the same numbers as with full logits, and never full logits."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat import cross_entropy
from nanochat.cross_entropy import chunk_tokens, cross_entropy_each, cross_entropy_sum

N, C, V, CAP = 300, 8, 97, 15.0


def example(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States (N, C), weight (V, C) and targets (N,), a few of them ignored; logits far into the softcap's bend."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(N, C, generator=rng).requires_grad_()
    weight = (6 * torch.randn(V, C, generator=rng)).requires_grad_()
    targets = torch.randint(V, (N,), generator=rng)
    targets[::7] = -1
    return x, weight, targets


def plain_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    logits = CAP * torch.tanh((x @ weight.T) / CAP)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction)


@pytest.fixture(params=[64, 100, 299, 300, 10_000])
def chunk(request, monkeypatch):
    """How many positions a chunk holds: some divide N and some do not."""
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", request.param * V)
    return request.param


def test_sum_and_gradients_equal_full_logits(chunk):
    x, weight, targets = example()
    loss = cross_entropy_sum(x, weight, targets, CAP, torch.float32)
    grads = torch.autograd.grad(loss * 0.3, (x, weight))  # a factor, as loss scaling applies it
    expected = plain_loss(x, weight, targets, "sum")
    expected_grads = torch.autograd.grad(expected * 0.3, (x, weight))
    assert chunk_tokens(N, V, "cpu") == min(chunk, N)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, expected_grads, atol=1e-5, rtol=1e-4)
    assert grads[0][targets == -1].abs().max() == 0


def test_a_weighted_sum_and_its_gradients_equal_full_logits(chunk):
    """Weights of both signs, some 0, and some on positions without a target."""
    x, weight, targets = example()
    weights = torch.randn(N, generator=torch.Generator().manual_seed(1))
    weights[::5] = 0.0
    loss = cross_entropy_sum(x, weight, targets, CAP, torch.float32, weights)
    expected = (plain_loss(x, weight, targets, "none") * weights).sum()
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-5)
    grads = torch.autograd.grad(loss * 0.3, (x, weight))
    torch.testing.assert_close(grads, torch.autograd.grad(expected * 0.3, (x, weight)), atol=1e-4, rtol=1e-4)
    assert grads[0][(targets == -1) | (weights == 0)].abs().max() == 0
    with torch.no_grad():
        without_grad = cross_entropy_sum(x, weight, targets, CAP, torch.float32, weights)
    torch.testing.assert_close(without_grad, loss, atol=1e-3, rtol=1e-5)


def test_weights_of_one_change_nothing_and_are_not_changed():
    x, weight, targets = example()
    weights = torch.ones(N)
    losses = [cross_entropy_sum(x, weight, targets, CAP, torch.float32, w) for w in (None, weights)]
    grads = [torch.autograd.grad(loss, (x, weight)) for loss in losses]
    assert torch.equal(*losses) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert torch.equal(weights, torch.ones(N))


def test_each_loss_and_its_gradients_equal_full_logits(chunk):
    x, weight, targets = example()
    losses = cross_entropy_each(x, weight, targets, CAP, torch.float32)
    expected = plain_loss(x, weight, targets, "none")
    torch.testing.assert_close(losses, expected)
    assert losses[targets == -1].abs().max() == 0
    grads = torch.autograd.grad(losses.square().sum(), (x, weight))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), (x, weight)), atol=1e-4, rtol=1e-4)


def test_without_targets_the_sum_is_zero_and_so_are_the_gradients():
    x, weight, targets = example()
    loss = cross_entropy_sum(x, weight, torch.full_like(targets, -1), CAP, torch.float32)
    assert loss.item() == 0
    assert all(grad.abs().max() == 0 for grad in torch.autograd.grad(loss, (x, weight)))


def test_positions_without_a_target_are_in_no_product(monkeypatch):
    seen = []

    def record(num_tokens: int, *sizes) -> int:
        seen.append(num_tokens)
        return chunk_tokens(num_tokens, *sizes)

    monkeypatch.setattr(cross_entropy, "chunk_tokens", record)
    x, weight, targets = example()
    cross_entropy_sum(x, weight, targets, CAP, torch.float32, torch.ones(N)).backward()
    assert seen == [int((targets != -1).sum())]
    assert x.grad[targets == -1].abs().max() == 0


@pytest.mark.parametrize("frozen", ["x", "weight", "both"])
def test_only_the_wanted_gradients_are_made(frozen):
    x, weight, targets = example()
    full = torch.autograd.grad(cross_entropy_sum(x, weight, targets, CAP, torch.float32), (x, weight))
    x.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "x")
    loss = cross_entropy_sum(x, weight, targets, CAP, torch.float32)
    torch.testing.assert_close(loss, plain_loss(x, weight, targets, "sum"))
    assert loss.requires_grad == (frozen != "both")
    if loss.requires_grad:
        loss.backward()
        expected = full[0] if frozen == "weight" else full[1]
        torch.testing.assert_close(x.grad if frozen == "weight" else weight.grad, expected)


def test_gradients_reach_a_slice_of_a_padded_weight():
    x, weight, targets = example()
    padded = F.pad(weight.detach(), (0, 0, 0, 31)).requires_grad_()
    cross_entropy_sum(x, padded[:V], targets, CAP, torch.float32).backward()
    plain_loss(x, weight, targets, "sum").backward()
    torch.testing.assert_close(padded.grad[:V], weight.grad, atol=1e-5, rtol=1e-4)
    assert padded.grad[V:].abs().max() == 0


def test_bf16_products_give_a_float32_loss_near_the_exact_one():
    x, weight, targets = example()
    loss = cross_entropy_sum(x, weight, targets, CAP, torch.bfloat16)
    expected = plain_loss(x, weight, targets, "sum")
    grads = torch.autograd.grad(loss, (x, weight))
    assert loss.dtype == grads[0].dtype == grads[1].dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-2)
    for grad, exact in zip(grads, torch.autograd.grad(expected, (x, weight)), strict=True):
        assert (grad - exact).norm() / exact.norm() < 0.05


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest tensor has that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_full_logits_never_exist(monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 64 * V)
    x, weight, targets = example()
    with LargestTensor() as largest:
        cross_entropy_sum(x, weight, targets, CAP, torch.float32).backward()
        with torch.no_grad():
            cross_entropy_each(x, weight, targets, CAP, torch.float32)
    assert largest.numel == 64 * V
    with LargestTensor() as largest:
        plain_loss(x, weight, targets, "sum").backward()
    assert largest.numel == N * V  # the recorder sees them where they do exist
