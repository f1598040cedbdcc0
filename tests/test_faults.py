"""Faults at random steps of all training stages, after which the same command ends in the same bits.

The trials are those of dev/drill.py: a few of each fault here, any number there.
"""

import itertools

import pytest
from test_distributed import PROCESSES

from dev import drill

# every fault with two of the stages in one process, and with another in two
TRIALS = [
    (fault, list(drill.STAGES)[(number + shift) % 4], processes)
    for number, fault in enumerate(fault for fault in drill.FAULTS if fault != "kill_restart")
    for shift, processes in ((0, 1), (2, 1), (1, 2))
]


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """A small world and the runs that nobody touches; all processes are forked from test_distributed's server."""
    assert PROCESSES.get_start_method() == "forkserver"
    return drill.Drill(drill.make_world(tmp_path_factory.mktemp("world")))


@pytest.mark.parametrize(("fault", "stage", "processes"), TRIALS)
def test_a_run_that_was_hit_ends_as_if_nothing_had_happened(trials, fault, stage, processes):
    assert trials.trial(stage, processes, fault, "1") == ""


def test_torchrun_brings_a_run_through_the_death_of_a_rank(trials):
    assert trials.trial("base", 2, "kill_restart", "1") == ""


def test_every_fault_is_tried_with_one_process_and_with_two_and_every_stage_with_most():
    assert {(fault, processes) for fault, _, processes in TRIALS} == set(
        itertools.product(set(drill.FAULTS) - {"kill_restart"}, (1, 2))
    )
