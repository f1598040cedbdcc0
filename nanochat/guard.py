"""What keeps a training run from being lost: good checkpoints, an end before they are gone, stacks where it stalls.

Nothing here mends a run. What is deterministic comes again when the same command goes on from the last good checkpoint,
and what was an accident, a broken bit or a full disk, does not.
"""

import faulthandler
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from nanochat.checkpoint_manager import (
    clear_checkpoints,
    complete_steps,
    find_common_step,
    prune_checkpoints,
    remove_checkpoint,
    update_meta,
)
from nanochat.common import UserError, any_rank, barrier, format_seconds, get_dist_info, is_writer, print0
from nanochat.train import AVERAGE_STEPS, FORMER_METRICS, StopSignal, TrainMeter


class Saver:
    """When a run saves, when it ends before its time, and which of its checkpoints are kept.

    A checkpoint counts as good once the loss of its weights is known, one update later. Only then are older ones
    pruned, and if that loss is too high it is removed again. While the loss is too high nothing is saved. So there is
    always a good checkpoint left, and every one that is left is good: a loss, a gradient or a weight that is no longer
    finite, or an average loss above the meter's loss_limit, ends the run on all ranks and names the last of them. A
    loss that rises for a few steps and comes back costs no more than a checkpoint.

    A run that starts anew (start_step 0) removes what a former one left in the folder when its first checkpoint is due:
    one that does not come so far, for a setting that is wrong, a login that is missing or a Ctrl-C, has cost nothing.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        start_step: int,
        model: Any,
        meter: TrainMeter,
        save_keep: int,
        save: Callable[[int], None],
    ):
        self.checkpoint_dir, self.start_step, self.model = checkpoint_dir, start_step, model
        self.meter, self.save_keep, self.save = meter, save_keep, save
        self.unproven: int | None = None  # the step of a checkpoint the loss of whose weights is not known yet
        self.is_too_high = False  # the loss of the last update
        self.has_folder = start_step > 0  # what is in it is of this run

    def save_or_stop(self, step: int, is_due: bool, is_last: bool, stop: StopSignal) -> bool:
        """Save where a checkpoint is due, at the last step, and where the run was told to stop: then leave, too.

        Call it before anything is evaluated: whatever goes wrong there then costs nothing. The step at which the
        process started has its checkpoint already. Returns whether this step has one. Every rank must call.
        """
        is_stopped = stop.requested()
        is_early = not (is_due or is_last or self.has_folder)
        if is_stopped and is_early and any_rank(bool(complete_steps(self.checkpoint_dir))):
            print0(f"stopped at step {step}; nothing is saved, as it would replace the run in {self.checkpoint_dir}")
            sys.exit(stop.exit_code)
        saves = step > 0 and (is_due or is_last or is_stopped)
        if saves and step > self.start_step:
            if any_rank(not all(p.isfinite().all() for p in self.model.parameters())):
                self._fail(step, "the weights are no longer finite")
            if self.is_too_high and is_last:
                self._fail(step, "the last loss was far too high")
            saves = not self.is_too_high
            if saves:
                if not self.has_folder:
                    clear_checkpoints(self.checkpoint_dir)
                    if is_writer():
                        (Path(self.checkpoint_dir) / FORMER_METRICS).unlink(missing_ok=True)
                    self.has_folder = True
                self.save(step)
                self.unproven = step
            if is_last:
                prune_checkpoints(self.checkpoint_dir, self.save_keep)
        if is_stopped and not is_last:
            print0(f"stopped at step {step}; the same command goes on from the last checkpoint")
            sys.exit(stop.exit_code)
        return saves

    def check(self, step: int, loss: float, grad_norm: float) -> None:
        """Raise UserError where the update after `step`, which the meter has counted, shows that the run is lost.

        loss in nats and grad_norm of all ranks. Every rank must call.
        """
        meter, problem = self.meter, None
        if not math.isfinite(loss):
            problem = f"the loss is {loss}"
        elif not math.isfinite(grad_norm):
            problem = "the gradient is no longer finite"
        elif meter.updates >= AVERAGE_STEPS and meter.loss > meter.loss_limit:
            problem = f"the average loss has exploded, from {meter.best_loss:.4g} to {meter.loss:.4g}"
        self.is_too_high = problem is not None or loss > meter.loss_limit
        if self.unproven is not None:
            if self.is_too_high:
                remove_checkpoint(self.checkpoint_dir, self.unproven)
                print0(f"step {step + 1}: a loss of {loss:.4g} is far too high: checkpoint {self.unproven} is removed")
            else:
                prune_checkpoints(self.checkpoint_dir, self.save_keep)
            self.unproven = None
        if problem:
            self._fail(step, problem)

    def _fail(self, step: int, problem: str) -> NoReturn:
        barrier()  # until what is removed is gone
        good = find_common_step(self.checkpoint_dir) if self.has_folder else None
        if good is None:
            advice = "there is no checkpoint yet, and the same command starts anew"
        elif good == step:
            advice = (
                f"that is what the weights of the last checkpoint, step {good} of {self.checkpoint_dir}, give: remove "
                f"its meta_{good:06d}.json to go on from the one before by the same command"
            )
        else:
            advice = f"the last good checkpoint is step {good} of {self.checkpoint_dir}, where the same command goes on"
            update_meta(self.checkpoint_dir, good, failed_afterwards=f"step {step + 1}: {problem}")
        raise UserError(
            f"step {step + 1}: {problem}; {advice}. If it fails again: lower the learning rates, with --resume=never"
        )


class StallWatch:
    """Writes a stack of every thread of this rank to stderr when no step has ended for so many seconds.

        with StallWatch(meter, config.log_stall_seconds):
            for step in ...:

    And again each time that as long has passed. -1 is off. Nothing is ended: an evaluation, a compilation or a slow
    disk may take its time, and what waits for a rank that is gone is torchrun's to end.
    """

    def __init__(self, meter: TrainMeter, seconds: float):
        self.meter, self.seconds = meter, seconds
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="stall watch", daemon=True)

    def __enter__(self) -> "StallWatch":
        if self.seconds > 0:
            self.thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.done.set()
        if self.thread.is_alive():
            self.thread.join()

    def _watch(self) -> None:
        began = quiet_since = time.monotonic()
        while not self.done.wait(max(0.0, quiet_since + self.seconds - time.monotonic())):
            moved_at = max(began, self.meter.moved_at)
            if moved_at > quiet_since:
                quiet_since = moved_at
                continue
            quiet_since = time.monotonic()
            rank, quiet = get_dist_info()[1], format_seconds(quiet_since - moved_at)
            os.write(2, f"\nrank {rank}: no step for {quiet}; the stack of every thread:\n".encode())
            faulthandler.dump_traceback(2, all_threads=True)
