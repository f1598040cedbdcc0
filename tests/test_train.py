"""What the training loops share: sizes, schedules, one optimizer step, meters, metrics, stop signals."""

import itertools
import json
import math
import os
import random
import re
import signal
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import build, random_tokens, randomized_model, tiny_config
from test_distributed import run_ranks

from nanochat import train
from nanochat.common import Runtime, UserError
from nanochat.dataloader import Row, count_targets, padded_batches
from nanochat.gpt import GPT
from nanochat.train import (
    WANDB_EVERY,
    MetricsLog,
    StopSignal,
    TrainMeter,
    accumulate_gradients,
    count_epoch_iterations,
    evaluation_steps,
    gradient_accumulation_steps,
    is_due,
    lr_multiplier,
    muon_momentum,
    step_optimizers,
)

CPU = torch.device("cpu")

# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def test_accumulation_makes_up_the_total_batch():
    assert gradient_accumulation_steps(524_288, 32, 2048, world_size=8, data_lanes=8) == 1
    assert gradient_accumulation_steps(524_288, 32, 2048, world_size=1, data_lanes=8) == 8
    assert gradient_accumulation_steps(24 * 16, 3, 16, world_size=2, data_lanes=8) == 4


WRONG_SIZES = [
    {"total_batch_size": total, "device_batch_size": batch, "world_size": world_size, "data_lanes": lanes}
    for total, batch, (world_size, lanes) in itertools.product(
        (1, 100, 256, 320, 512, 1000, 3200), (1, 3, 5, 8, 48), ((1, 8), (1, 3), (2, 8), (3, 6), (4, 8), (4, 3))
    )
]


def test_every_setting_that_an_error_names_works():
    """Each suggestion, fed back in on its own, gives whole micro-batches and equally many rows from each lane."""
    num_errors, names = 0, set()
    for sizes in WRONG_SIZES:
        try:
            gradient_accumulation_steps(sequence_len=32, **sizes)
            continue
        except UserError as error:
            message = str(error)
        num_errors += 1
        suggestions = re.findall(r"--(\w+)=(\d+)", message.partition("; try ")[2])
        assert suggestions, message
        for name, value in suggestions:
            names.add(name)
            mended = {**sizes, name: int(value)}
            steps = gradient_accumulation_steps(sequence_len=32, **mended)
            rows = mended["total_batch_size"] // 32
            assert steps * mended["device_batch_size"] * mended["world_size"] == rows
            assert rows % mended["data_lanes"] == 0
    assert num_errors > 100 and names == {"total_batch_size", "device_batch_size", "data_lanes"}


def test_the_nearest_sizes_are_named():
    with pytest.raises(UserError) as error:
        gradient_accumulation_steps(1000, 8, 32, world_size=1, data_lanes=8)
    assert "--total_batch_size=768 or --total_batch_size=1024" in str(error.value)
    with pytest.raises(UserError) as error:
        gradient_accumulation_steps(512, 12, 32, world_size=1, data_lanes=8)
    assert "--device_batch_size=8" in str(error.value)
    with pytest.raises(UserError) as error:
        gradient_accumulation_steps(12 * 32, 3, 32, world_size=2, data_lanes=8)
    assert "--data_lanes=6" in str(error.value)


@pytest.mark.parametrize("name", ["total_batch_size", "device_batch_size", "max_seq_len", "data_lanes"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_size_below_one_is_named(name, value):
    sizes = {"total_batch_size": 512, "device_batch_size": 8, "max_seq_len": 32, "data_lanes": 8, name: value}
    with pytest.raises(UserError, match=f"--{name}={value}"):
        gradient_accumulation_steps(
            sizes["total_batch_size"], sizes["device_batch_size"], sizes["max_seq_len"], 1, sizes["data_lanes"]
        )


def test_evaluation_takes_about_the_wanted_tokens_and_at_least_one_batch():
    assert evaluation_steps(20 * 524_288, 32, 2048, world_size=8, data_lanes=8) == 20
    assert evaluation_steps(1, 32, 2048, world_size=8, data_lanes=8) == 1
    for tokens in (0, -1):
        with pytest.raises(UserError, match=f"{tokens} tokens are no evaluation"):
            evaluation_steps(tokens, 32, 2048, world_size=8, data_lanes=8)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 6, 32])
@pytest.mark.parametrize("eval_tokens", [1, 500, 4096])
def test_any_number_of_processes_evaluates_equally_many_rows_of_each_lane(batch_size, eval_tokens):
    for world_size in (1, 2, 4, 8):
        rows = evaluation_steps(eval_tokens, batch_size, 16, world_size, data_lanes=8) * batch_size
        assert rows % (8 // world_size) == 0


@pytest.mark.parametrize(
    ("step", "every", "due"),
    [(0, 5, True), (4, 5, False), (10, 5, True), (0, -1, False), (10, -1, False), (3, 0, False)],
)
def test_minus_one_is_never(step, every, due):
    assert is_due(step, every) is due


# ---------------------------------------------------------------------------------------------------------------------
# Schedules


def test_the_default_rate_is_constant_and_then_falls_to_nothing():
    points = {0.0: 1.0, 0.5: 1.0, 0.8: 1.0, 0.9: 0.5, 0.95: 0.25, 1.0: 0.0}
    assert {p: round(lr_multiplier(p), 9) for p in points} == points


def test_the_rate_rises_in_the_warm_up_and_ends_at_its_final_share():
    values = [
        lr_multiplier(p, warmup_ratio=0.2, warmdown_ratio=0.5, final_lr_frac=0.1) for p in (0.1, 0.2, 0.5, 0.75, 1.0)
    ]
    assert values == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])


def test_linear_to_zero_is_a_warm_down_over_everything():
    assert [lr_multiplier(p, warmdown_ratio=1.0) for p in (0.0, 0.25, 1.0)] == pytest.approx([1.0, 0.75, 0.0])


@pytest.mark.parametrize("ratios", list(itertools.product((0.0, 0.3, 1.0), (0.0, 0.2, 1.0), (0.0, 0.1, 1.0))))
def test_the_rate_is_never_outside_0_to_1(ratios):
    values = [lr_multiplier(p / 50, *ratios) for p in range(-5, 61)]  # progress before 0 and after 1 included
    assert min(values) >= 0 and max(values) <= 1


def test_momentum_warms_up_over_300_steps():
    assert [muon_momentum(step) for step in (0, 150, 300, 10_000)] == pytest.approx([0.85, 0.90, 0.95, 0.95])


# ---------------------------------------------------------------------------------------------------------------------
# One optimizer step


def gradients(model: GPT) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters()]


def test_how_rows_are_dealt_out_to_micro_batches_changes_nothing():
    """The rows have different numbers of targets: a mean of the micro-batches' means would be another number."""
    model = randomized_model()
    ids = random_tokens(model.config, 4, 13)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, 2:] = -1
    targets[2, :5] = -1
    num_targets = int((targets >= 0).sum())
    results = []
    for rows in (4, 2, 1):
        model.zero_grad()
        loss = accumulate_gradients(model, zip(inputs.split(rows), targets.split(rows), strict=True), num_targets, CPU)
        results.append((loss, gradients(model)))
    model.zero_grad()
    expected = model(inputs, targets)
    expected.backward()
    for loss, grads in results:
        assert loss == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(grads, gradients(model), atol=1e-6, rtol=1e-4)


def make_rows(*lengths: int, weights: tuple[float, ...] | None = None) -> list[Row]:
    """Rows of random tokens; of those but the first about two thirds are supervised."""
    rng = random.Random(len(lengths))
    weights = weights or (1.0,) * len(lengths)
    return [
        Row([rng.randrange(257) for _ in range(length)], [0, *(int(rng.random() < 0.67) for _ in range(length - 1))], w)
        for length, w in zip(lengths, weights, strict=True)
    ]


def reference_step(model: GPT, rows: list[Row]) -> tuple[float, list[torch.Tensor]]:
    """(loss, gradients) of the weighted mean over all supervised targets, on full logits, one row at a time."""
    model.zero_grad()
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor(row.tokens)
        losses = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
        total = total + row.weight * (losses * torch.tensor(row.mask[1:])).sum()
    loss = total / sum(sum(row.mask[1:]) for row in rows)
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize(
    "lengths", [(9, 9, 9, 9), (2, 3, 30, 31), (2, 2, 2, 60)], ids=["equal", "two sizes", "one long"]
)
@pytest.mark.parametrize("rows_a_micro_batch", [1, 2, 3, 4, 9])
def test_a_finetuning_step_is_the_mean_over_all_its_supervised_tokens(lengths, rows_a_micro_batch):
    """1 x 4 rows, 4 x 1 rows and what lies between, padded and with weights, are the same step."""
    model = randomized_model()
    for weights in (None, (1.0, -0.5, 0.25, 2.0)):
        rows = make_rows(*lengths, weights=weights)
        expected_loss, expected = reference_step(model, rows)
        model.zero_grad()
        batches = list(padded_batches(rows, rows_a_micro_batch, 5, CPU))
        assert len(batches) == -(-4 // rows_a_micro_batch)
        loss = accumulate_gradients(model, batches, count_targets(rows), CPU)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        torch.testing.assert_close(gradients(model), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("rows", [[], [Row([1, 2, 3], [0, 0, 0])]], ids=["no rows", "all masked"])
def test_a_step_without_targets_is_no_nan(rows):
    """Its gradients are there, as every rank has to have some, and they are 0."""
    model = randomized_model()
    loss = accumulate_gradients(model, padded_batches(rows, 4, 5, CPU), count_targets(rows), CPU)
    assert loss == 0.0
    assert all(grad.abs().max() == 0 for grad in gradients(model))


def test_what_is_rewarded_gets_likelier_and_what_is_punished_less_likely():
    """One step of policy gradient on two answers to one prompt, whose weights are their advantages."""
    model = randomized_model()
    prompt, answers = [7, 8, 9], ([10, 11, 12], [20, 21, 22])
    rows = [Row(prompt + a, [0] * 3 + [1] * 3, w) for a, w in zip(answers, (0.5, -0.5), strict=True)]

    @torch.no_grad()
    def logprobs() -> list[float]:
        ids = torch.tensor([row.tokens for row in rows])
        losses = model(ids[:, :-1], ids[:, 1:], loss_reduction="none").view(2, -1)
        return (-losses[:, 2:].sum(dim=1)).tolist()

    before = logprobs()
    accumulate_gradients(model, padded_batches(rows, 8, 5, CPU), count_targets(rows), CPU)
    step_optimizers(model.setup_optimizers(), 0.02, momentum=0.95)
    after = logprobs()
    assert after[0] > before[0] + 0.01 and after[1] < before[1] - 0.01


def prepared(grad_scale: float = 1.0) -> tuple[GPT, list]:
    """A model with gradients of a random loss, and its optimizers."""
    model = randomized_model()
    ids = random_tokens(model.config, 2, 9)
    (grad_scale * model(ids[:, :-1], ids[:, 1:])).backward()
    return model, model.setup_optimizers()


def test_the_norm_is_the_global_one_of_all_gradients():
    model, optimizers = prepared()
    expected = torch.cat([g.flatten() for g in gradients(model)]).norm().item()
    assert step_optimizers(optimizers, 1.0, 0.95) == pytest.approx(expected, rel=1e-5)


def test_clipping_scales_all_gradients_by_the_global_norm():
    """The moments after one step show which gradients the optimizers got."""
    model, optimizers = prepared(grad_scale=10.0)
    reference, reference_optimizers = prepared(grad_scale=10.0)
    norm = step_optimizers(optimizers, 1.0, 0.95, grad_clip=0.5)
    assert norm > 1
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    step_optimizers(reference_optimizers, 1.0, 0.95)
    for ours, theirs in zip(optimizers, reference_optimizers, strict=True):
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("grad_clip", [0.0, 1e9])
def test_small_gradients_and_a_clip_of_0_are_left_alone(grad_clip):
    (model, optimizers), (reference, reference_optimizers) = prepared(), prepared()
    step_optimizers(optimizers, 1.0, 0.95, grad_clip=grad_clip)
    for optimizer in reference_optimizers:
        optimizer.reduce()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))


def test_the_multiplier_and_the_momentum_reach_the_groups_and_gradients_are_cleared():
    model, optimizers = prepared()
    before = [p.detach().clone() for p in model.parameters()]
    step_optimizers(optimizers, 0.0, 0.9)
    adamw, muon = optimizers
    assert all(group["lr"] == 0 and group["initial_lr"] > 0 for o in optimizers for group in o.param_groups)
    assert all(group["momentum"] == 0.9 for group in muon.param_groups)
    assert all("momentum" not in group for group in adamw.param_groups)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))  # a rate of 0 moves nothing


def test_a_gradient_that_is_not_finite_updates_nothing():
    model, optimizers = prepared()
    before = [p.detach().clone() for p in model.parameters()]
    model.transformer.h[0].attn.c_q.weight.grad[0, 0] = float("inf")
    assert not math.isfinite(step_optimizers(optimizers, 1.0, 0.95, grad_clip=1.0))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


GROUPS = {
    "lm_head": ["lm_head.weight"],
    "wte": ["transformer.wte.weight"],
    "32x32": [f"transformer.h.{i}.attn.{name}.weight" for i in range(2) for name in ("c_q", "c_proj")],
    "16x32": [f"transformer.h.{i}.attn.{name}.weight" for i in range(2) for name in ("c_k", "c_v")],
    "128x32": [f"transformer.h.{i}.mlp.c_fc.weight" for i in range(2)],
    "32x128": [f"transformer.h.{i}.mlp.c_proj.weight" for i in range(2)],
}


def measured_step(runtime: Runtime) -> dict[str, float]:
    """The norms of one clipped step of the random model on twelve rows."""
    model = randomized_model()
    ids = random_tokens(model.config, 12, 9)[runtime.rank :: runtime.world_size]
    accumulate_gradients(model, [(ids[:, :-1], ids[:, 1:])], 12 * 8, CPU)
    norms: dict[str, float] = {}
    step_optimizers(model.setup_optimizers(), 0.5, 0.95, 0.1, norms)
    return norms


def test_the_norms_of_groups_are_those_of_their_gradients_and_updates():
    model, optimizers = prepared()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    norms: dict[str, float] = {}
    norm = step_optimizers(optimizers, 0.5, 0.95, 0.1, norms)
    updates = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    for kind, tensors in (("grad_norm", grads), ("update_norm", updates)):
        for group, names in GROUPS.items():
            expected = torch.cat([tensors[name].flatten() for name in names]).norm().item()
            assert norms[f"{kind}/{group}"] == pytest.approx(expected, rel=1e-5) and expected > 0
    assert len(norms) == 2 * len(GROUPS)
    assert sum(norms[f"grad_norm/{group}"] ** 2 for group in GROUPS) == pytest.approx(norm**2, rel=1e-5)


def test_measuring_norms_changes_no_bit():
    (model, optimizers), (reference, reference_optimizers) = prepared(), prepared()
    step_optimizers(optimizers, 0.5, 0.95, 0.1, {})
    step_optimizers(reference_optimizers, 0.5, 0.95, 0.1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))


def test_the_norms_of_groups_are_the_same_on_any_number_of_ranks():
    """On three ranks everything is padded."""
    alone = measured_step(Runtime(False, 0, 0, 1, CPU))
    for norms in run_ranks(3, measured_step):
        assert norms == pytest.approx(alone, rel=1e-3)


def test_training_learns_a_sequence_by_heart():
    torch.manual_seed(0)
    model = build(tiny_config())
    optimizers = model.setup_optimizers()
    ids = random_tokens(model.config, 2, 17)
    losses = []
    for step in range(20):
        losses.append(accumulate_gradients(model, [(ids[:, :-1], ids[:, 1:])], 32, CPU))
        step_optimizers(optimizers, 1.0, muon_momentum(step), grad_clip=1.0)
    assert losses[0] == pytest.approx(math.log(257), rel=1e-5) and losses[-1] < 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Meter


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: clock[0] is the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def run_steps(
    meter: TrainMeter, clock: list[float], losses: list[float], seconds: float, num_tokens: int = 100
) -> None:
    for loss in losses:
        meter.start_step()
        clock[0] += seconds
        meter.end_step(loss, num_tokens)


def test_a_constant_loss_reads_as_itself_from_the_first_line_on(clock):
    meter = TrainMeter(1.0, CPU)
    assert math.isnan(meter.loss)
    for _ in range(30):
        run_steps(meter, clock, [3.25], 1.0)
        assert meter.loss == pytest.approx(3.25, rel=1e-12)


def test_the_average_weighs_recent_losses_most(clock):
    meter = TrainMeter(1.0, CPU)
    run_steps(meter, clock, [4.0, 2.0], 1.0)
    assert meter.loss == pytest.approx((0.9 * 4 + 2) / 1.9)


def test_time_is_counted_from_step_11_on(clock):
    meter = TrainMeter(1.0, CPU)
    run_steps(meter, clock, [1.0] * 10, 60.0)
    assert meter.timed_seconds == 0 and meter.eta_seconds(5) is None
    run_steps(meter, clock, [1.0] * 4, 2.0)
    assert (meter.timed_steps, meter.timed_seconds) == (4, 8.0)
    assert meter.eta_seconds(5) == 10.0
    assert meter.tokens_per_second == meter.average_tokens_per_second == 50.0  # whole steps, of any micro-batches


def test_steps_of_different_sizes_weigh_by_their_tokens(clock):
    """Conversations make steps of unequal lengths: 300 tokens in 1 second and 100 in 3 are 100 a second."""
    meter = TrainMeter(1.0, CPU)
    run_steps(meter, clock, [1.0] * 10, 1.0)
    assert meter.average_tokens_per_second is None
    run_steps(meter, clock, [1.0], 1.0, num_tokens=300)
    run_steps(meter, clock, [1.0], 3.0, num_tokens=100)
    assert meter.average_tokens_per_second == 100.0
    assert meter.tokens_per_second == pytest.approx(100 / 3)
    assert meter.report()["tokens_per_second"] == 100 and meter.report()["training_time_seconds"] == 4.0


def test_mfu_is_of_the_devices_own_peak_over_all_ranks(clock, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(train, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    meter = TrainMeter(flops_per_token=312e6, device=CPU)
    run_steps(meter, clock, [1.0] * 10 + [1.0] * 2, 0.5, num_tokens=1_000_000)
    assert meter.mfu() == meter.mfu(average=True) == pytest.approx(0.5)  # 312e12 FLOPs in half a second on four
    assert "mfu 50.0%" in meter.line(12, 100)
    run_steps(meter, clock, [1.0], 1.0, num_tokens=1_000_000)
    assert meter.mfu() == pytest.approx(0.25) and meter.mfu(average=True) == pytest.approx(0.375)  # 3M in 2 seconds


def test_mfu_is_not_printed_where_the_peak_is_unknown(clock):
    meter = TrainMeter(1e9, CPU)
    run_steps(meter, clock, [2.0] * 12, 0.5)
    assert meter.mfu() is None and meter.mfu(average=True) is None
    line = re.sub(r"memory \d+\.\d GB", "memory M", meter.line(12, 100, lr=0.5))
    expected = "step  12/100 | loss 2.0000 | lr 0.5 | 500 ms | 200 tok/s | data wait 0 ms | memory M | 44s left"
    assert line == expected
    meter.note_val_bpb(1.25)
    assert "| loss 2.0000 | val bpb 1.2500 |" in meter.line(12, 100)


def test_the_wait_for_data_is_the_time_in_the_loader_of_one_step(clock):
    meter = TrainMeter(1e9, CPU)

    def load(seconds: float):
        clock[0] += seconds
        return seconds

    batches = meter.watch_data(load(seconds) for seconds in (0.25, 0.5, 1.0))
    for count, expected in ((2, 0.75), (1, 1.0)):
        meter.start_step()
        for _ in range(count):
            next(batches)
            clock[0] += 10.0  # the work with a batch
        meter.end_step(2.0, 100)
        assert meter.data_seconds == expected
    assert "data wait 1000 ms" in meter.line(2, 2)
    assert list(batches) == []


def test_a_loader_that_is_watched_raises_as_it_is():
    def broken():
        yield 1
        raise OSError("gone")

    batches = TrainMeter(1e9, CPU).watch_data(broken())
    assert next(batches) == 1
    with pytest.raises(OSError, match="gone"):
        next(batches)


def test_a_loss_has_exploded_when_half_of_what_was_learned_is_lost(clock):
    """And never by less than two nats, nor in the first ten steps, nor where it is no -log p."""
    meter, nats = TrainMeter(1.0, CPU, vocab_size=65_536), math.log(65_536)
    assert meter.loss_limit == nats + 2
    run_steps(meter, clock, [0.01] * 9, 1.0)
    assert meter.min_loss is None and meter.loss_limit == nats + 2
    run_steps(meter, clock, [3.0] * 200, 1.0)
    smallest = meter.min_loss
    assert smallest == pytest.approx((0.01 * (1 - 0.9**9) * 0.9 + 0.3) / (1 - 0.9**10))
    assert meter.loss_limit == pytest.approx((smallest + nats) / 2)
    meter.min_loss = nats - 1
    assert meter.loss_limit == pytest.approx(nats + 1)
    assert TrainMeter(1.0, CPU).loss_limit == math.inf


def test_a_meter_goes_on_from_its_state_by_way_of_json(clock):
    whole, first, second = (TrainMeter(1.0, CPU) for _ in range(3))
    losses = [5.0 - 0.1 * i for i in range(24)]
    run_steps(whole, clock, losses, 0.25)
    run_steps(first, clock, losses[:12], 0.25)
    first.min_val_bpb = 1.5
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    run_steps(second, clock, losses[12:], 0.25)
    # each process has its own untimed steps: 24 - 10 in one, 2 + 2 in two
    timed = {"timed_steps": 4, "timed_tokens": 400, "timed_seconds": 1.0}
    assert second.state_dict() == {**whole.state_dict(), **timed, "min_val_bpb": 1.5}
    assert second.loss == whole.loss


def test_the_smallest_validation_value_is_kept():
    meter = TrainMeter(1.0, CPU)
    assert meter.min_val_bpb is None
    for value, smallest in ((1.5, 1.5), (1.25, 1.25), (1.75, 1.25)):
        meter.note_val_bpb(value)
        assert meter.min_val_bpb == smallest


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def steps_of(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_metrics_are_lines_of_json(tmp_path):
    log = MetricsLog(tmp_path / "d2")
    log.log(1, loss=2.5, grad_norm=0.5)
    log.log(2, val_bpb=1.25)
    lines = (tmp_path / "d2" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 2.5, "grad_norm": 0.5},
        {"step": 2, "val_bpb": 1.25},
    ]


def test_a_resumed_run_drops_what_came_after_its_checkpoint_and_a_line_cut_short(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 8):
        log.log(step, loss=1.0)
    with open(log.path, "a", encoding="utf-8") as f:
        f.write('{"step": 3, "lo')
    resumed = MetricsLog(tmp_path, from_step=4)
    resumed.log(5, loss=0.5)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def test_a_new_run_starts_an_empty_file(tmp_path):
    MetricsLog(tmp_path).log(1, loss=1.0)
    MetricsLog(tmp_path)
    assert steps_of(tmp_path) == []


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    MetricsLog(tmp_path).log(1, loss=1.0)
    assert os.listdir(tmp_path) == []


class FakeWandb:
    """Keeps what a wandb run is told."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []

    def log(self, metrics: dict[str, float]) -> None:
        self.points.append(metrics)


def test_every_step_is_in_the_file_and_wandb_gets_the_average_now_and_then(tmp_path, clock):
    run, meter = FakeWandb(), TrainMeter(1.0, CPU)
    log = MetricsLog(tmp_path, wandb_run=run)
    num_steps = 2 * WANDB_EVERY + 1
    for step in range(1, num_steps + 1):
        run_steps(meter, clock, [float(step)], 0.5)
        log.log_step(step, num_steps, meter, float(step), multiplier=0.25, reward=0.125)
    lines = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [line["loss"] for line in lines] == list(range(1, num_steps + 1))
    same = {"lr_multiplier": 0.25, "tokens_per_second": 200.0, "data_wait_seconds": 0.0, "reward": 0.125}
    assert all(line == {"step": line["step"], "loss": line["loss"], **same} for line in lines)
    assert [point["step"] for point in run.points] == [WANDB_EVERY, 2 * WANDB_EVERY]
    average = 0.0
    for loss in range(1, WANDB_EVERY + 1):
        average = 0.9 * average + 0.1 * loss
    assert run.points[0] == {
        "step": WANDB_EVERY,
        "train/loss": pytest.approx(average / (1 - 0.9**WANDB_EVERY)),
        "train/lrm": 0.25,
        "train/tok_per_s": 200.0,
        "data_wait_seconds": 0.0,
        "reward": 0.125,
    }


@pytest.mark.parametrize(("log_every", "printed"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (-1, [])])
def test_lines_are_printed_every_so_many_steps_and_at_the_end(tmp_path, clock, capsys, log_every, printed):
    meter = TrainMeter(1.0, CPU)
    log = MetricsLog(tmp_path, log_every=log_every)
    for step in range(1, 6):
        run_steps(meter, clock, [2.0], 0.5)
        norms = {"grad_norm/wte": 3.5} if step == 2 else None
        log.log_step(step, 5, meter, 2.0, 0.25, norms, reward=0.125)
    output = capsys.readouterr().out
    assert [int(number) for number in re.findall(r"step (\d)/5", output)] == printed
    assert output.count(" | reward 0.125 | ") == len(printed) and "wte" not in output
    lines = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
    assert [line.get("grad_norm/wte") for line in lines] == [None, 3.5, None, None, None]


def test_what_an_evaluation_found_is_printed_under_its_name(tmp_path, capsys):
    MetricsLog(tmp_path).log(40, val_bpb=1.25, core_metric=0.2)
    assert capsys.readouterr().out == "step 40: val_bpb 1.2500, core_metric 0.2000\n"


def test_evaluations_go_to_wandb_at_once_under_its_names(tmp_path):
    run = FakeWandb()
    MetricsLog(tmp_path, wandb_run=run).log(3, val_bpb=1.5, core_metric=0.25)
    assert run.points == [{"step": 3, "val/bpb": 1.5, "core_metric": 0.25}]


# ---------------------------------------------------------------------------------------------------------------------
# Stopping


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_sets_a_flag_and_the_handlers_come_back(number):
    before = {n: signal.getsignal(n) for n in StopSignal.SIGNALS}
    with StopSignal() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested() and stop.exit_code == 128 + number
        os.kill(os.getpid(), number)  # at once again, as torchrun passes one on: still only the flag
        assert stop.exit_code == 128 + number
    assert {n: signal.getsignal(n) for n in StopSignal.SIGNALS} == before


def test_a_second_interrupt_after_a_while_ends_at_once(monkeypatch):
    monkeypatch.setattr(StopSignal, "PATIENCE_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt), StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


def test_epochs_are_gone_through_in_whole_steps():
    assert count_epoch_iterations(-1, 1, 80, 8) == count_epoch_iterations(-1, 1, 87, 8) == 10
    assert count_epoch_iterations(-1, 1, 3, 8) == 1
    assert count_epoch_iterations(-1, 3, 87, 8) == 32
    assert count_epoch_iterations(5, 3, 87, 8) == 5
    with pytest.raises(UserError, match="no horizon"):
        count_epoch_iterations(-1, 0, 80, 8)
