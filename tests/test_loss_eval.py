"""Bits per byte, computed by hand beside evaluate_bpb."""

import math

import pytest
import torch

from nanochat.loss_eval import evaluate_bpb

TOKEN_BYTES = torch.tensor([0, 1, 2, 5], dtype=torch.int32)  # id 0 is special


class FixedLoss(torch.nn.Module):
    """Loses 1 nat on id 1, 2 on id 2, 3 on id 3, 100 on id 0 and nothing where the target is ignored."""

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor, loss_reduction: str) -> torch.Tensor:
        assert loss_reduction == "none" and not self.training
        targets = targets.flatten()
        return torch.tensor([100.0, 1.0, 2.0, 3.0])[targets.clamp(min=0)] * (targets >= 0)


def batch(*targets: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1, len(targets), dtype=torch.int64), torch.tensor([targets])


def test_nats_and_bytes_are_summed_over_batches_before_they_are_divided():
    batches = [batch(1, 1), batch(3, 2)]  # 1 + 1 + 3 + 2 = 7 nats, 1 + 1 + 5 + 2 = 9 bytes
    assert evaluate_bpb(FixedLoss(), batches, 2, TOKEN_BYTES) == pytest.approx(7 / 9 / math.log(2))


def test_special_tokens_and_ignored_targets_count_for_nothing():
    assert evaluate_bpb(FixedLoss(), [batch(1, 0, -1, 3)], 1, TOKEN_BYTES) == pytest.approx(4 / 6 / math.log(2))


def test_no_more_batches_than_asked_for_are_taken():
    batches = iter([batch(1), batch(2), batch(3)])
    evaluate_bpb(FixedLoss(), batches, 2, TOKEN_BYTES)
    assert next(batches)[1].item() == 3


def test_batches_may_carry_more_than_inputs_and_targets():
    assert evaluate_bpb(FixedLoss(), [(*batch(1), {"lane": 0})], 1, TOKEN_BYTES) == pytest.approx(1 / math.log(2))


@pytest.mark.parametrize("batches", [[], [batch(0, -1)]], ids=["no batches", "only special tokens"])
def test_without_bytes_it_is_infinite(batches):
    assert evaluate_bpb(FixedLoss(), batches, 5, TOKEN_BYTES) == math.inf


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_kept(training):
    model = FixedLoss().train(training)
    evaluate_bpb(model, [batch(1)], 1, TOKEN_BYTES)
    assert model.training == training


def test_no_gradient_is_recorded():
    weight = torch.nn.Parameter(torch.ones(()))

    class Model(FixedLoss):
        def forward(self, inputs, targets, loss_reduction):
            assert not (super().forward(inputs, targets, loss_reduction) * weight).requires_grad
            return super().forward(inputs, targets, loss_reduction)

    assert evaluate_bpb(Model(), [batch(1)], 1, TOKEN_BYTES) > 0
