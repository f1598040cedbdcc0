"""Memory that runs out in a training step: smaller portions, the same rows, the same result. The error is injected."""

import gc
import weakref
from typing import Any

import pytest
import torch
from conftest import random_tokens, randomized_model
from test_distributed import run_ranks
from test_scripts import base_dir, losses, prepared, train  # noqa: F401 (fixtures)

from nanochat import plan
from nanochat.common import Runtime
from nanochat.gpt import GPT
from nanochat.train import Portions, accumulate_gradients

ROWS, CPU = 8, torch.device("cpu")


class Cramped(torch.nn.Module):
    """A model on a device that holds so many rows at once; memory runs out in the forward or the backward pass.

    after: how many micro-batches go well all the same, as where the first one's gradients are not there yet.
    """

    def __init__(self, model: GPT, rows: int, where: str, after: int = 0):
        super().__init__()
        self.model, self.rows, self.where, self.left = model, rows, where, after
        self.kept: list[Any] = []  # weak references to what the failed passes made

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor, **settings: Any) -> torch.Tensor:
        loss = self.model(inputs, targets, **settings)
        if len(inputs) > self.rows:
            if self.left == 0:
                self.kept.append(weakref.ref(loss))
                if self.where == "forward":
                    raise torch.OutOfMemoryError("injected")
                loss.register_hook(self.run_out)
            self.left = max(0, self.left - 1)
        return loss

    def run_out(self, gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("injected")


def micro_batches(rank: int = 0):
    """Three micro-batches of ROWS rows, others on each rank, made one by one."""
    for number in range(3):
        ids = random_tokens(randomized_model().config, ROWS, 13, seed=10 * rank + number)
        yield ids[:, :-1], ids[:, 1:]


def step(runtime: Runtime, rows: int, where: str = "forward", after: int = 0, cramped_rank: int = 0) -> dict[str, Any]:
    """The loss and gradients of one step where this rank, or another, has memory for so many rows."""
    model = randomized_model()
    cramped = Cramped(model, rows if runtime.rank == cramped_rank else ROWS, where, after)
    portions = Portions(ROWS)
    batches = micro_batches(runtime.rank)
    num_targets = 3 * ROWS * 12 * runtime.world_size
    loss = accumulate_gradients(cramped, batches, num_targets, runtime.device, portions)
    gc.collect()
    assert next(batches, None) is None
    return {
        "loss": loss,
        "gradients": [p.grad.numpy() for p in model.parameters()],
        "rows": portions.rows,
        "leaks": sum(reference() is not None for reference in cramped.kept),
    }


def assert_same_step(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert result["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for gradient, other in zip(result["gradients"], expected["gradients"], strict=True):
        torch.testing.assert_close(torch.from_numpy(gradient), torch.from_numpy(other), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("rows", "after", "left"), [(4, 0, 4), (3, 1, 2), (1, 2, 1)], ids=["first", "second", "third"])
def test_the_step_is_the_same_in_smaller_portions(where, rows, after, left, capsys):
    """Wherever it happens; the rows are read once, and nothing of the failed pass is kept."""
    alone = Runtime(False, 0, 0, 1, CPU)
    result = step(alone, rows, where, after)
    assert_same_step(result, step(alone, ROWS))
    assert (result["rows"], result["leaks"]) == (left, 0)
    assert f"out of memory with {2 * left} rows at once: going on with {left}" in capsys.readouterr().out


def test_a_size_that_is_no_power_of_two_goes_down_to_one():
    portions, rows = Portions(7), []
    while portions.rows > 1:
        portions.halve()
        rows.append([len(part) for (part,) in portions.split((torch.zeros(7, 2),))])
    assert rows == [[3, 3, 1], [1] * 7]


def test_what_does_not_fit_one_row_ends_in_the_error():
    with pytest.raises(torch.OutOfMemoryError):
        step(Runtime(False, 0, 0, 1, CPU), 0)


def test_an_error_in_the_making_of_a_batch_is_not_taken_for_one_of_the_model():
    """A loader cannot go on after it: its rows would be lost."""

    def broken():
        yield from list(micro_batches())[:1]
        raise torch.OutOfMemoryError("injected")

    with pytest.raises(torch.OutOfMemoryError):
        accumulate_gradients(randomized_model(), broken(), 100, CPU, Portions(ROWS))


def test_all_ranks_go_on_in_smaller_portions_where_one_runs_out():
    expected = run_ranks(2, step, ROWS)
    results = run_ranks(2, step, 2, "backward", 1, 1)
    for result, other in zip(results, expected, strict=True):
        assert_same_step(result, other)
    assert [result["rows"] for result in results] == [2, 2]


def test_base_train_has_the_same_losses_with_less_memory(base_dir, monkeypatch, capsys):  # noqa: F811
    """--device_batch_size=-1 takes what the estimate says, 16 rows here; memory for 3 makes 2 of them."""
    forward = GPT.forward

    def cramped(model, idx, *args, **kwargs):
        if torch.is_grad_enabled() and len(idx) > 3:
            raise torch.OutOfMemoryError("injected")
        return forward(model, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", cramped)
    monkeypatch.setattr(plan, "MAX_BATCH_TOKENS", 16 * 32)
    total = {"total_batch_size": 512}
    train(model_tag="cramped", device_batch_size=-1, eval_every=6, **total)
    output = capsys.readouterr().out
    assert output.count("out of memory with") == 3 and "with 4 rows at once: going on with 2" in output
    monkeypatch.setattr(GPT, "forward", forward)
    train(model_tag="whole", device_batch_size=16, eval_every=6, **total)
    one, other = losses(base_dir, "whole"), losses(base_dir, "cramped")
    assert one.keys() == other.keys()
    assert max(abs(one[step] - other[step]) for step in one) < 1e-5
