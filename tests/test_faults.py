"""Faults at random steps of all training stages, after which the same command ends in the same bits.

The trials are those of dev/drill.py: a few of each fault here, any number there.
"""

import pytest
from test_distributed import PROCESSES

from dev import drill


def some_trials() -> list[tuple[str, str, int]]:
    """(fault, stage, processes): every fault once in one process and once, at another stage, in two."""
    trials = []
    for number, fault in enumerate(fault for fault in drill.FAULTS if fault != "kill_restart"):
        stages = [stage for stage in drill.STAGES if drill.is_possible(fault, stage)]
        trials += [(fault, stages[number % len(stages)], 1), (fault, stages[(number + 2) % len(stages)], 2)]
    return trials


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """A small world and the runs that nobody touches; all processes are forked from test_distributed's server."""
    assert PROCESSES.get_start_method() == "forkserver"
    return drill.Drill(drill.make_world(tmp_path_factory.mktemp("world")))


@pytest.mark.parametrize(("fault", "stage", "processes"), some_trials())
def test_a_run_that_was_hit_ends_as_if_nothing_had_happened(trials, fault, stage, processes):
    assert trials.trial(stage, processes, fault, "1") == ""


def test_torchrun_brings_a_run_through_the_death_of_a_rank(trials):
    assert trials.trial("base", 2, "kill_restart", "1") == ""


@pytest.mark.parametrize(("stage", "processes"), [("base", 2), ("mid", 1), ("sft", 1), ("rl", 1)])
def test_a_loader_that_sleeps_is_a_wait_for_data_and_a_stall_of_every_rank(trials, stage, processes):
    """At the fourth step, for a second. The loaders are ahead by a few batches, so it shows a little later."""
    fault = {"fault": "loader_sleeps", "step": 3, "rank": 0, "seed": "1"}
    run = trials.start(stage, "asleep", processes, fault, log_stall_seconds=0.3, num_iterations=12)
    assert run.finish() == 0
    for rank in range(processes):
        assert f"rank {rank}: no step for " in run.text
    assert "in <lambda>" in run.text  # the stack of the sleeper
    waits = [line["data_wait_seconds"] for line in trials.metrics(stage, "asleep") if "loss" in line]
    assert len(waits) == 12 and (max(waits) > 0.3 or stage == "rl")


@pytest.mark.parametrize("stage", drill.STAGES)
def test_every_stage_logs_its_norms_now_and_then(trials, stage):
    trials.reference(stage, 1)
    lines = [line for line in trials.metrics(stage, "whole-1") if "loss" in line]
    assert all("grad_norm" in line for line in lines)
    for kind in ("grad_norm", "update_norm"):
        found = [line["step"] for line in lines if f"{kind}/lm_head" in line and f"{kind}/32x32" in line]
        assert found == [step for step in range(5, drill.STEPS + 1, 5)]
