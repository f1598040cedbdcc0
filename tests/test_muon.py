"""Muon on one process: the orthogonalisation against the SVD, the update against one matrix at a time."""

import pytest
import torch

from nanochat.muon import Muon, muon_update, orthogonalize

SHAPES = [(24, 24), (48, 16), (16, 48)]


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix)


@pytest.mark.parametrize("shape", SHAPES, ids=["square", "tall", "wide"])
def test_singular_values_move_near_one_and_singular_vectors_stay(shape):
    torch.manual_seed(0)
    stack = torch.randn(3, *shape)
    for matrix, result in zip(stack, orthogonalize(stack), strict=True):
        assert result.shape == shape
        values = singular_values(result)
        # The smallest of a square random matrix may start so near zero that five steps do not lift it.
        assert 0.6 < values[: len(values) * 3 // 4].min() and values.max() < 1.3
        U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
        turned = U.mT @ result @ Vh.mT  # diagonal where the singular vectors are the same
        assert (turned - turned.diagonal().diag()).abs().max() < 1e-3
        assert turned.diagonal().min() > 0


@pytest.mark.parametrize("shape", SHAPES[1:], ids=["tall", "wide"])
def test_all_singular_values_of_a_well_conditioned_matrix_are_near_one(shape):
    torch.manual_seed(0)
    values = singular_values(orthogonalize(torch.randn(1, *shape)))
    assert 0.6 < values.min() and values.max() < 1.3


def test_the_scale_of_a_matrix_does_not_matter():
    torch.manual_seed(0)
    matrix = torch.randn(1, 16, 16)
    torch.testing.assert_close(orthogonalize(1e-3 * matrix), orthogonalize(1e3 * matrix), atol=1e-3, rtol=0)


def test_a_zero_matrix_stays_zero():
    assert orthogonalize(torch.zeros(2, 8, 4)).abs().max() == 0


def test_a_matrix_of_low_rank_stays_of_low_rank():
    """Following the Gram matrix alone must not let rounding errors of its zero eigenvalues grow."""
    torch.manual_seed(0)
    low_rank = torch.randn(2, 32, 4) @ torch.randn(2, 4, 256)
    values = singular_values(orthogonalize(low_rank))
    assert 0.6 < values[:, :4].min() and values.max() < 1.3
    assert values[:, 4:].max() < 1e-3


def naive_step(param, gradient, buffer, lr, momentum):
    """One matrix, as the paper's pseudo-code: (new parameter, new buffer)."""
    buffer = momentum * buffer + (1 - momentum) * gradient
    nesterov = (1 - momentum) * gradient + momentum * buffer
    x = nesterov / (nesterov.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x - 4.7750 * (a @ x) + 2.0315 * (a @ a @ x)
    rows, cols = param.shape
    return param - lr * max(1, rows / cols) ** 0.5 * x, buffer


@pytest.mark.parametrize("shape", SHAPES, ids=["square", "tall", "wide"])
def test_the_update_of_a_stack_equals_one_matrix_at_a_time(shape):
    """Over four steps whose momentum and rate change; the naive one never transposes."""
    torch.manual_seed(0)
    params, buffers = torch.randn(3, *shape), torch.zeros(3, *shape)
    expected, expected_buffers = list(params.double()), [torch.zeros(shape, dtype=torch.float64) for _ in range(3)]
    for step in range(4):
        gradients, lr, momentum = torch.randn(3, *shape), 0.02 / (step + 1), 0.85 + 0.02 * step
        params = muon_update(params, gradients, buffers, lr, momentum)
        for i in range(3):
            expected[i], expected_buffers[i] = naive_step(
                expected[i], gradients[i].double(), expected_buffers[i], lr, momentum
            )
    torch.testing.assert_close(params.double(), torch.stack(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(buffers.double(), torch.stack(expected_buffers), atol=1e-6, rtol=0)


def parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    """Matrices of several shapes, in mixed order, not equally many of each."""
    rng = torch.Generator().manual_seed(seed)
    shapes = [(8, 8), (32, 8), (8, 8), (8, 32), (8, 8), (8, 32)]
    return [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes]


def train(params: list[torch.nn.Parameter], optimizer: Muon, steps: range, scale: float = 1.0) -> None:
    """Steps with gradients that depend on the step alone."""
    for step in steps:
        for p, gradient in zip(params, parameters(seed=100 + step), strict=True):
            p.grad = gradient.detach()
        optimizer.reduce()
        optimizer.step(scale)


def test_each_matrix_gets_its_own_update_whatever_the_order_of_shapes():
    params = parameters()
    expected, buffers = [p.detach() for p in parameters()], [torch.zeros_like(p) for p in parameters()]
    train(params, Muon(params, lr=0.02, momentum=0.9), range(3))
    for step in range(3):
        for i, gradient in enumerate(parameters(seed=100 + step)):
            expected[i], buffers[i] = naive_step(expected[i], gradient.detach(), buffers[i], 0.02, 0.9)
    torch.testing.assert_close([p.detach() for p in params], expected, atol=1e-4, rtol=0)


def test_the_step_uses_each_groups_current_rate_and_momentum():
    ours, reference = parameters(), parameters()
    optimizer = Muon(ours, lr=0.02, momentum=0.95)
    for group in optimizer.param_groups:
        group["lr"], group["momentum"] = 0.01, 0.85  # as a schedule does
    train(ours, optimizer, range(2))
    train(reference, Muon(reference, lr=0.01, momentum=0.85), range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


def test_reduce_returns_the_sum_of_squares():
    params = parameters()
    for p in params:
        p.grad = torch.randn_like(p)
    expected = sum(p.grad.square().sum() for p in params)
    torch.testing.assert_close(Muon(params).reduce(), expected)


def test_scale_reaches_the_momentum_and_the_gradients_stay_as_they_were():
    params = parameters()
    optimizer = Muon(params, momentum=0.9)
    train(params, optimizer, range(1), scale=0.5)
    gradients = [g.detach() for g in parameters(seed=100)]
    first = optimizer.param_groups[0]
    torch.testing.assert_close(first["momentum_buffer"][0], 0.1 * 0.5 * gradients[0])
    assert all(torch.equal(p.grad, g) for p, g in zip(params, gradients, strict=True))


def test_zero_gradients_change_nothing():
    params = parameters()
    optimizer = Muon(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.reduce()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, parameters(), strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_stacks_are_padded_in_the_buffers_only(world_size, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    params = parameters()
    optimizer = Muon(params)
    shares = [len(group["momentum_buffer"]) for group in optimizer.param_groups]
    assert shares == [-(-count // world_size) for count in (3, 1, 2)]  # (8, 8), (32, 8), (8, 32)
    for group, share in zip(optimizer.param_groups, shares, strict=True):
        stacked = optimizer._stack(group, group["params"])
        assert len(stacked) == share * world_size
        assert torch.equal(stacked[: len(group["params"])], torch.stack(group["params"]))
        assert stacked[len(group["params"]) :].abs().sum() == 0


def test_a_loaded_state_goes_on_as_if_nothing_had_happened():
    whole, first, second = parameters(), parameters(), parameters()
    train(whole, Muon(whole), range(6))
    before, after = Muon(first), Muon(second)
    train(first, before, range(3))
    with torch.no_grad():
        for p, q in zip(second, first, strict=True):
            p.copy_(q)
    after.load_state_dict(before.state_dict())
    train(second, after, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(second, whole, strict=True))
