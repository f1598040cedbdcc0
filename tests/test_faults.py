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
