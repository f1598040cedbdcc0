"""AdamW on one process equals torch.optim.AdamW; several processes are in test_distributed.py."""

import pytest
import torch

from nanochat.adamw import AdamW, adamw_update


def train(param: torch.Tensor, optimizer, gradients: list[torch.Tensor]) -> torch.Tensor:
    """The parameter after one step for each gradient."""
    for gradient in gradients:
        param.grad = gradient.clone()
        if isinstance(optimizer, AdamW):
            optimizer.reduce()
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("gradient_scale", [1.0, 1e-9, 1e-11], ids=["usual", "tiny", "below eps"])
def test_ten_steps_equal_torch(weight_decay, gradient_scale):
    """With gradients near eps = 1e-10 it matters that eps is added after the bias correction."""
    torch.manual_seed(0)
    start = torch.randn(7, 5)
    gradients = [gradient_scale * torch.randn(7, 5) for _ in range(10)]
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": weight_decay}
    reference = train(theirs, torch.optim.AdamW([theirs], lr=0.03, **settings), gradients)
    result = train(ours, AdamW([{"params": [ours], "lr": 0.03}], **settings), gradients)
    torch.testing.assert_close(result, reference, atol=1e-6, rtol=1e-5)
    assert (result - start).abs().min() > 1e-4  # every element has moved


def test_the_defaults_are_the_recipe():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([{"params": [param], "lr": 0.1}])
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.8, 0.95), 1e-10, 0.0)


def test_groups_have_rates_of_their_own():
    fast, slow = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = AdamW([{"params": [fast], "lr": 0.2}, {"params": [slow], "lr": 0.1}])
    optimizer.param_groups[1]["lr"] = 0.05  # as a schedule does
    fast.grad, slow.grad = torch.ones(3), torch.ones(3)
    optimizer.reduce()
    optimizer.step()
    torch.testing.assert_close(fast.detach(), torch.full((3,), -0.2))  # the first step is lr * sign(gradient)
    torch.testing.assert_close(slow.detach(), torch.full((3,), -0.05))
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.2, 0.1]


def test_reduce_returns_the_sum_of_squares_and_scale_multiplies_gradients():
    start = torch.randn(4, 3)
    gradients = [torch.randn(4, 3) for _ in range(3)]
    scaled, reference = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = AdamW([{"params": [scaled], "lr": 0.1}])
    for gradient in gradients:
        scaled.grad = gradient.clone()
        torch.testing.assert_close(optimizer.reduce(), gradient.square().sum())
        optimizer.step(scale=0.25)
    expected = train(reference, AdamW([{"params": [reference], "lr": 0.1}]), [0.25 * g for g in gradients])
    torch.testing.assert_close(scaled.detach(), expected)


def test_a_bf16_parameter_has_float32_moments():
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW([{"params": [param], "lr": 0.5}])
    train(param, optimizer, [torch.full((4,), 0.001, dtype=torch.bfloat16)])
    assert param.dtype == torch.bfloat16 and param.detach().tolist() == [0.5] * 4
    assert {m.dtype for m in optimizer.moments[param]} == {torch.float32}


def test_a_loaded_state_goes_on_as_if_nothing_had_happened():
    torch.manual_seed(1)
    gradients = [torch.randn(5) for _ in range(6)]
    whole, first, second = (torch.nn.Parameter(torch.ones(5)) for _ in range(3))
    expected = train(whole, AdamW([{"params": [whole], "lr": 0.1}]), gradients)
    before = AdamW([{"params": [first], "lr": 0.1}])
    middle = train(first, before, gradients[:3])
    after = AdamW([{"params": [second], "lr": 0.1}])
    with torch.no_grad():
        second.copy_(middle)
    after.load_state_dict(before.state_dict())
    assert torch.equal(train(second, after, gradients[3:]), expected)


def test_a_state_dict_is_a_snapshot():
    param = torch.nn.Parameter(torch.ones(5))
    optimizer = AdamW([{"params": [param], "lr": 0.1}])
    train(param, optimizer, [torch.ones(5)])
    state = optimizer.state_dict()
    before = [m.clone() for m in state["moments"][0]]
    train(param, optimizer, [torch.ones(5)])
    assert all(torch.equal(a, b) for a, b in zip(state["moments"][0], before, strict=True))
    assert state["steps"] == 1


def test_the_update_is_in_place():
    param, exp_avg, exp_avg_sq = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    adamw_update(param, torch.tensor([2.0]), exp_avg, exp_avg_sq, 1, 0.1, (0.8, 0.95), 1e-10, 0.0)
    assert exp_avg.item() == pytest.approx(0.4)  # (1 - 0.8) * 2
    assert exp_avg_sq.item() == pytest.approx(0.2)  # (1 - 0.95) * 2^2
    assert param.item() == pytest.approx(-0.1)
