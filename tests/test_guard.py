"""Guards of a training run: which checkpoints are saved, kept and removed, what ends a run, what a stall shows."""

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from test_distributed import run_ranks

from nanochat.checkpoint_manager import complete_steps, read_meta, save_checkpoint
from nanochat.common import Runtime, UserError
from nanochat.guard import Saver, StallWatch
from nanochat.train import MetricsLog, StopSignal, TrainMeter, is_due

CPU = torch.device("cpu")

# ---------------------------------------------------------------------------------------------------------------------
# Saving, keeping, ending


class Training:
    """A run of a model that does not learn, whose losses are given, with everything that saves and ends it.

    The loss of a model of 257 tokens that knows nothing is 5.55.
    """

    def __init__(self, folder: Path, start_step: int = 0, save_keep: int = 2, vocab_size: int | None = 257):
        self.folder, self.step, self.stop = folder, start_step, StopSignal()
        self.model = torch.nn.Linear(2, 2)
        self.meter = TrainMeter(1.0, CPU, vocab_size)
        self.saver = Saver(folder, start_step, self.model, self.meter, save_keep, self.save)

    def save(self, step: int) -> None:
        save_checkpoint(self.folder, step, {"w": torch.zeros(1)}, {}, {})

    def train(self, *losses: float, save_every: int = 1, is_last: bool = False) -> list[int]:
        """Updates of these losses; returns the checkpoints that are left."""
        for loss in losses:
            self.saver.save_or_stop(self.step, is_due(self.step, save_every), False, self.stop)
            self.meter.start_step()
            self.meter.end_step(loss, 1)
            self.saver.check(self.step, loss, grad_norm=1.0)
            self.step += 1
        if is_last:
            self.saver.save_or_stop(self.step, False, True, self.stop)
        return complete_steps(self.folder)


@pytest.mark.parametrize(
    ("step", "is_due", "is_last", "saves", "has_checkpoint"),
    [
        (5, False, False, False, False),
        (5, True, False, True, True),
        (5, False, True, True, True),
        (2, True, False, False, True),  # the step from which the run goes on
        (2, False, True, False, True),  # a finished run
    ],
)
def test_a_checkpoint_is_saved_where_it_is_due_and_at_the_end(tmp_path, step, is_due, is_last, saves, has_checkpoint):
    run = Training(tmp_path, start_step=2)
    assert run.saver.save_or_stop(step, is_due, is_last, run.stop) is has_checkpoint
    assert complete_steps(tmp_path) == [step] * saves


def test_a_former_run_stays_until_the_new_one_saves(tmp_path):
    """What ends before, for a setting that is wrong or a loss that is none, has cost nothing."""
    Training(tmp_path).train(*[4.0] * 6, save_every=5)
    assert complete_steps(tmp_path) == [5]
    with pytest.raises(UserError, match="the loss is nan; there is no checkpoint yet"):
        Training(tmp_path).train(math.nan)
    assert complete_steps(tmp_path) == [5] and "failed_afterwards" not in read_meta(tmp_path, 5)
    run = Training(tmp_path)
    run.stop.received = signal.SIGINT
    with pytest.raises(SystemExit) as exit_info:
        run.saver.save_or_stop(1, False, False, run.stop)
    assert exit_info.value.code == 130 and complete_steps(tmp_path) == [5]
    assert Training(tmp_path).train(4.0, 4.0, 4.0, 4.0, save_every=2) == [2]


def test_the_metrics_of_a_former_run_stay_as_long_as_its_checkpoints(tmp_path):
    def lines() -> list[int]:
        text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line)["step"] for line in text.splitlines()]

    def train(*losses: float, start_step: int = 0) -> None:
        log = MetricsLog(tmp_path, start_step)
        run = Training(tmp_path, start_step)
        for step, loss in enumerate(losses, start_step + 1):
            run.train(loss, save_every=2)
            log.log(step, loss=loss)

    train(4.0, 4.0, 4.0)
    assert lines() == [1, 2, 3] and complete_steps(tmp_path) == [2]
    for _ in range(2):
        train(4.0)  # two that begin anew and save nothing
        assert lines() == [1] and complete_steps(tmp_path) == [2]
    train(4.0, start_step=2)
    assert lines() == [1, 2, 3] and sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["metrics.jsonl"]
    train(4.0, 4.0, 4.0)
    assert lines() == [1, 2, 3] and sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["metrics.jsonl"]


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    run = Training(tmp_path)
    assert not run.saver.save_or_stop(0, True, False, run.stop)
    assert complete_steps(tmp_path) == []


@pytest.mark.parametrize(("step", "saved"), [(5, [5]), (2, [])])
def test_a_run_that_is_told_to_stop_saves_and_leaves_unless_it_is_at_its_end(tmp_path, capsys, step, saved):
    run = Training(tmp_path, start_step=2)
    run.stop.received = signal.SIGTERM
    with pytest.raises(SystemExit) as exit_info:
        run.saver.save_or_stop(step, False, False, run.stop)
    assert exit_info.value.code == 143 and complete_steps(tmp_path) == saved
    assert f"stopped at step {step};" in capsys.readouterr().out
    assert run.saver.save_or_stop(9, False, True, run.stop)
    assert complete_steps(tmp_path) == [*saved, 9]


def test_older_checkpoints_go_once_the_loss_of_the_newest_is_known(tmp_path):
    run = Training(tmp_path, save_keep=1)
    assert run.train(4.0, 4.0) == [1]
    run.saver.save_or_stop(2, True, False, run.stop)
    assert complete_steps(tmp_path) == [1, 2]
    run.saver.check(2, 4.0, 1.0)
    assert complete_steps(tmp_path) == [2]
    run.saver.save_or_stop(3, False, True, run.stop)  # nothing comes after the last
    assert complete_steps(tmp_path) == [3]


@pytest.mark.parametrize("vocab_size", [257, None])
@pytest.mark.parametrize(
    ("loss", "grad_norm", "problem"),
    [(math.nan, 1.0, "the loss is nan"), (-math.inf, 1.0, "the loss is -inf"), (4.0, math.inf, "the gradient")],
)
@pytest.mark.parametrize("save_keep", [1, 2])
def test_what_is_not_finite_ends_the_run_and_names_the_last_good_checkpoint(
    tmp_path, vocab_size, loss, grad_norm, problem, save_keep
):
    """The checkpoint whose own loss it is goes, and the one before is still there, however few are kept."""
    run = Training(tmp_path, save_keep=save_keep, vocab_size=vocab_size)
    run.train(*[4.0] * 6, save_every=3)
    run.saver.save_or_stop(6, True, False, run.stop)
    with pytest.raises(UserError, match=f"step 7: {problem}.*last good checkpoint is step 3 of .*the same command"):
        run.saver.check(6, loss, grad_norm)
    assert complete_steps(tmp_path) == [3]
    assert read_meta(tmp_path, 3)["failed_afterwards"].startswith(f"step 7: {problem}")


def test_a_failure_before_the_first_checkpoint_says_that_there_is_none(tmp_path):
    with pytest.raises(UserError, match="step 1: the loss is nan; there is no checkpoint yet.*--resume=never"):
        Training(tmp_path).train(math.nan)


def test_a_checkpoint_that_was_resumed_from_is_not_removed_by_its_loss(tmp_path):
    """A broken machine must not eat one checkpoint a restart."""
    Training(tmp_path).train(*[4.0] * 6, save_every=2)
    with pytest.raises(UserError, match=r"step 4 .*remove its meta_000004\.json"):
        Training(tmp_path, start_step=4).train(math.nan)
    assert complete_steps(tmp_path) == [2, 4]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    run = Training(tmp_path)
    run.train(4.0, 4.0)
    run.model.bias.data[1] = math.inf
    with pytest.raises(UserError, match="weights are no longer finite; the last good checkpoint is step 1 "):
        run.train(4.0)
    assert complete_steps(tmp_path) == [1]


def test_a_loss_that_explodes_ends_the_run_and_nothing_is_saved_from_its_rise_on(tmp_path, capsys):
    run = Training(tmp_path)
    assert run.train(*[3.0] * 20) == [18, 19]
    with pytest.raises(UserError, match=r"average loss has exploded, from 3 to .* is step 19 of"):
        run.train(*[12.0] * 9)
    assert run.step < 25 and complete_steps(tmp_path) == [18, 19]
    assert "checkpoint 20 is removed" in capsys.readouterr().out


def test_a_loss_that_explodes_early_ends_the_run_once_the_average_means_something(tmp_path):
    run = Training(tmp_path)
    with pytest.raises(UserError, match=r"average loss has exploded, from 5\.549 to"):
        run.train(5.5, 5.5, *[14.0] * 20)
    assert run.step + 1 == 10 and complete_steps(tmp_path) == [1]


def test_a_loss_that_rises_and_comes_back_costs_a_checkpoint_alone(tmp_path):
    run = Training(tmp_path)
    assert run.train(*[3.0] * 20, 9.0, 3.0, 3.0) == [19, 22]
    assert run.train(*[3.0] * 3, is_last=True) == [25, 26]


def test_a_last_loss_that_is_too_high_is_no_end_of_a_run(tmp_path):
    run = Training(tmp_path)
    with pytest.raises(UserError, match="last loss was far too high; the last good checkpoint is step 19 "):
        run.train(*[3.0] * 20, 9.0, is_last=True)


def test_a_loss_of_reinforcement_learning_may_be_anything_finite(tmp_path):
    run = Training(tmp_path, vocab_size=None)
    assert run.train(*[0.01, -0.5, 40.0] * 10, is_last=True) == [29, 30]


def check_on_ranks(runtime: Runtime, folder: Path) -> str:
    run = Training(folder)
    run.train(4.0, 4.0)
    if runtime.rank == 1:
        run.model.bias.data[1] = math.nan
    try:
        run.train(4.0)
    except UserError as error:
        return str(error)
    return "went on"


def test_all_ranks_end_together_where_one_has_lost_its_weights(tmp_path):
    [first, second] = run_ranks(2, check_on_ranks, tmp_path)
    assert first == second and "weights are no longer finite" in first


# ---------------------------------------------------------------------------------------------------------------------
# Stalls


def test_a_loader_that_sleeps_is_shown_by_its_stack_again_and_again(capfd):
    meter = TrainMeter(1.0, CPU)

    def sleeping_loader():
        yield 1
        time.sleep(0.8)
        yield 2

    with StallWatch(meter, 0.2):
        for _ in meter.watch_data(sleeping_loader()):
            meter.end_step(1.0, 1)
    error = capfd.readouterr().err
    assert error.count("in sleeping_loader") == error.count("rank 0: no step for ") >= 2
    time.sleep(0.3)  # it is over now
    assert capfd.readouterr().err == ""


def test_a_run_that_steps_is_no_stall_and_minus_one_is_off(capfd):
    meter = TrainMeter(1.0, CPU)
    with StallWatch(meter, 1.0), StallWatch(TrainMeter(1.0, CPU), -1):
        for _ in range(13):
            time.sleep(0.1)
            meter.end_step(1.0, 1)
    assert capfd.readouterr().err == ""


def stall(runtime: Runtime, path: Path) -> None:
    """Rank 1 sleeps, and rank 0 waits for it."""
    with open(f"{path}{runtime.rank}", "w") as f:
        os.dup2(f.fileno(), 2)
    with StallWatch(TrainMeter(1.0, CPU), 0.2):
        if runtime.rank == 1:
            time.sleep(0.5)
        StopSignal().requested()


def test_every_rank_shows_where_it_stands(tmp_path):
    run_ranks(2, stall, tmp_path / "rank")
    first, second = ((tmp_path / f"rank{rank}").read_text(encoding="utf-8") for rank in (0, 1))
    assert "rank 0: no step" in first and "all_reduce" in first
    assert "rank 1: no step" in second and "in stall" in second and "all_reduce" not in second
