"""What the training loops share: sizes, schedules, one optimizer step, meters, metrics, stop signals.

The loops themselves stay in the scripts, where they can be read from top to bottom. Nothing here knows what a loop
trains on: a step is a list of (inputs, targets) micro-batches and a number of targets to divide the loss by.
"""

import itertools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from nanochat.common import (
    DummyWandb,
    UserError,
    all_reduce_sum,
    any_rank,
    atomic_write,
    autocast,
    device_name,
    format_seconds,
    get_dist_info,
    is_writer,
    peak_flops,
    peak_memory_bytes,
    print0,
    release_memory,
    synchronize,
)
from nanochat.engine import Engine

UNTIMED_STEPS = 10  # compilation and warm caches: time is counted from the step after these
EMA_BETA = 0.9
AVERAGE_STEPS = 10  # updates before the average loss means anything
MIN_RISE_NATS = 2.0  # of the average loss above its minimum, before a run counts as lost
WANDB_EVERY = 100  # steps between points of the training curves

# ---------------------------------------------------------------------------------------------------------------------
# Sizes and schedules


def gradient_accumulation_steps(
    total_batch_size: int, device_batch_size: int, sequence_len: int, world_size: int, data_lanes: int
) -> int:
    """How many micro-batches each rank takes in an optimizer step.

    total_batch_size in tokens: whole micro-batches on every rank, and equally many rows from each lane of the data.
    Raises UserError naming the nearest settings that fit.
    """
    settings = {
        "total_batch_size": total_batch_size,
        "device_batch_size": device_batch_size,
        "max_seq_len": sequence_len,
        "data_lanes": data_lanes,
    }
    for name, value in settings.items():
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    micro_rows = device_batch_size * world_size
    unit = math.lcm(micro_rows, data_lanes) * sequence_len
    if total_batch_size % unit == 0:
        return total_batch_size // (micro_rows * sequence_len)
    below, above = total_batch_size // unit * unit, -(-total_batch_size // unit) * unit
    fits = [f"--total_batch_size={size}" for size in (below, above) if size]
    rows, left = divmod(total_batch_size, sequence_len)
    if not left and rows % math.lcm(world_size, data_lanes) == 0:  # the rows fit the lanes, but not the micro-batches
        best = max(n for n in range(1, device_batch_size + 1) if rows % (n * world_size) == 0)
        fits.append(f"--device_batch_size={best}")
    elif not left and rows % micro_rows == 0:  # the other way round
        best = max(n for n in range(world_size, max(data_lanes, world_size) + 1, world_size) if rows % n == 0)
        fits.append(f"--data_lanes={best}")
    raise UserError(
        f"--total_batch_size={total_batch_size} must be a multiple of {unit}, for whole micro-batches of "
        f"{device_batch_size} rows x {sequence_len} tokens x {world_size} processes and equally many rows from each of "
        f"{data_lanes} data lanes; try {' or '.join(fits)}"
    )


def evaluation_steps(
    eval_tokens: int, device_batch_size: int, sequence_len: int, world_size: int, data_lanes: int
) -> int:
    """How many batches each rank takes in an evaluation of about eval_tokens tokens.

    At least one, and as many as take equally many rows from each lane. Where eval_tokens are a multiple of a batch of
    all processes, any number of them sees the same rows. Raises UserError for less than a token or a row.
    """
    if device_batch_size < 1:
        raise UserError(f"--device_batch_size={device_batch_size} must be at least 1")
    if eval_tokens < 1:
        raise UserError(f"{eval_tokens} tokens are no evaluation: set --eval_tokens or --split_tokens to at least 1")
    own_lanes = max(1, data_lanes // world_size)
    whole = own_lanes // math.gcd(own_lanes, device_batch_size)  # batches until each lane was read equally often
    return max(1, round(eval_tokens / (device_batch_size * sequence_len * world_size * whole))) * whole


def count_epoch_iterations(num_iterations: int, num_epochs: int, num_examples: int, examples_per_step: int) -> int:
    """Optimizer steps: num_iterations if it is set, else whole steps through num_epochs epochs, at least one.

    Raises UserError where neither says how long to train.
    """
    if num_iterations > 0:
        return num_iterations
    if num_epochs < 1:
        raise UserError(f"no horizon: --num_epochs={num_epochs} must be at least 1, or set --num_iterations")
    return max(1, num_epochs * num_examples // examples_per_step)


def is_due(step: int, every: int) -> bool:
    """Whether what happens every so many steps happens at this one; -1 (or 0) is never."""
    return every > 0 and step % every == 0


def lr_multiplier(
    progress: float, warmup_ratio: float = 0.0, warmdown_ratio: float = 0.2, final_lr_frac: float = 0.0
) -> float:
    """The factor on every learning rate at a progress in [0, 1]: linear up, constant, linear down to final_lr_frac.

    With the defaults, lr_multiplier(0.8) = 1, lr_multiplier(0.9) = 0.5, lr_multiplier(1.0) = 0.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup_ratio:
        return progress / warmup_ratio
    if progress <= 1.0 - warmdown_ratio:
        return 1.0
    left = (1.0 - progress) / warmdown_ratio
    return left + (1.0 - left) * final_lr_frac


def muon_momentum(step: int) -> float:
    """Muon's momentum: from 0.85 at step 0 to 0.95 at step 300, and from then on."""
    fraction = min(step / 300, 1.0)
    return (1 - fraction) * 0.85 + fraction * 0.95


# ---------------------------------------------------------------------------------------------------------------------
# One optimizer step


class Portions:
    """How many rows of a micro-batch go through the model at once: all, and half as many each time memory runs out.

    rows: all, the same on every rank. What a step computes stays the same to rounding, as its loss is a sum.
    """

    def __init__(self, rows: int):
        self.rows = rows

    def split(self, micro_batch: tuple[torch.Tensor, ...]) -> Iterable[tuple[torch.Tensor, ...]]:
        """The rows of a micro-batch, so many at a time."""
        return zip(*(tensor.split(self.rows) for tensor in micro_batch), strict=True)

    def halve(self) -> None:
        """From now on half as many rows. Every rank must call."""
        print0(f"out of memory with {self.rows} rows at once: going on with {self.rows // 2}, the batch stays the same")
        self.rows //= 2


def accumulate_gradients(
    model: Any,
    micro_batches: Iterable[tuple[torch.Tensor, ...]],
    num_targets: int,
    device: torch.device,
    portions: Portions | None = None,
) -> float:
    """Add up the gradients of a step's micro-batches; return the step's loss, the mean over all ranks, in nats.

    micro_batches are this rank's (inputs, targets), (B, T) int64, or (inputs, targets, weights) with float32 weights of
    the losses; num_targets counts the supervised targets of the whole step over all ranks. The loss is the sum over
    targets divided by it, so that how the rows are dealt out to micro-batches and ranks changes nothing. Optimizers
    average gradients over ranks, hence the world size in the scale. Every rank must call.

    Where memory runs out on any rank, all throw the step's gradients away and go through the same rows again, in
    smaller portions. Without portions, and at one row, it is the caller's torch.OutOfMemoryError.
    """
    scale = get_dist_info()[3] / max(1, num_targets)
    again = micro_batches
    while True:
        now, again = itertools.tee(again)  # keeps what was taken, and no more: batches still come one by one
        total, is_out_of_memory = torch.zeros((), device=device), False
        for micro_batch in now:
            try:
                for portion in portions.split(micro_batch) if portions else [micro_batch]:
                    total += _backward(model, portion, scale, device)
            except torch.OutOfMemoryError:
                if portions is None or portions.rows == 1:
                    raise
                is_out_of_memory = True
                break
        total, num_out_of_memory = all_reduce_sum(torch.stack((total, total.new_tensor(is_out_of_memory)))).tolist()
        if not num_out_of_memory:
            return total / max(1, num_targets)
        portions.halve()
        model.zero_grad()
        release_memory(device)


def _backward(model: Any, rows: tuple[torch.Tensor, ...], scale: float, device: torch.device) -> torch.Tensor:
    """Add the gradients of the rows' summed loss times scale; return that sum."""
    inputs, targets, *weights = rows
    with autocast(device):
        loss = model(inputs, targets, loss_reduction="sum", **({"loss_weights": weights[0]} if weights else {}))
    (loss * scale).backward()
    return loss.detach()


def step_optimizers(
    optimizers: list[Any],
    multiplier: float,
    momentum: float,
    grad_clip: float = 0.0,
    group_norms: dict[str, float] | None = None,
) -> float:
    """Reduce, clip by the global norm (grad_clip 0: off), update; return the gradient norm before clipping.

    multiplier scales every group's initial_lr; momentum goes to the groups that have one (Muon's). Clears the
    gradients. group_norms, if given, gains each parameter group's "grad_norm/<group>", before clipping, and
    "update_norm/<group>". A norm that is not finite updates nothing: the caller has to end the run, as
    guard.Saver.check does. Every rank must call.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if "momentum" in group:
                group["momentum"] = momentum
    norm = all_reduce_sum(sum(optimizer.reduce() for optimizer in optimizers)).sqrt().item()
    if not math.isfinite(norm):
        return norm
    finish_norms = _start_group_norms(optimizers) if group_norms is not None else dict
    scale = min(1.0, grad_clip / (norm + 1e-6)) if grad_clip > 0 else 1.0
    for optimizer in optimizers:
        optimizer.step(scale)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None
    if group_norms is not None:
        group_norms.update(finish_norms())
    return norm


def _start_group_norms(optimizers: list[Any]) -> Callable[[], dict[str, float]]:
    """Call it between reduce and step, and what it returns after the step, for the norms of each parameter group.

    Takes a copy of the parameters, at a time when the activations are gone. Every rank must call.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    names = [group.get("name") or "x".join(map(str, group["params"][0].shape)) for group in groups]
    grads = all_reduce_sum(torch.stack([sum_ for optimizer in optimizers for sum_ in optimizer.group_squares()]))
    before = [[p.detach().clone() for p in group["params"]] for group in groups]

    def finish() -> dict[str, float]:
        updates = torch.stack(
            [
                sum((p.detach() - old).float().square().sum() for p, old in zip(group["params"], olds, strict=True))
                for group, olds in zip(groups, before, strict=True)
            ]
        )
        norms = {"grad_norm": grads.sqrt().tolist(), "update_norm": updates.sqrt().tolist()}
        return {f"{kind}/{name}": v for kind, values in norms.items() for name, v in zip(names, values, strict=True)}

    return finish


# ---------------------------------------------------------------------------------------------------------------------
# What is measured on the way


class TrainMeter:
    """Loss average, speed and time of a training run; its state goes into the checkpoint.

    The loss is a debiased exponential moving average: a constant loss c reads c from the first update on. Time is
    counted without the first UNTIMED_STEPS steps of each process. vocab_size bounds the loss (loss_limit); it is left
    out where the loss is no mean of -log p, as in reinforcement learning.
    """

    def __init__(self, flops_per_token: float, device: torch.device, vocab_size: int | None = None):
        _, _, _, world_size = get_dist_info()
        self.flops_per_token, self.device, self.vocab_size = flops_per_token, device, vocab_size
        peak = peak_flops(device_name(device))
        self.peak = peak * world_size if peak else None
        self.updates = 0
        self.loss_average = 0.0  # biased towards 0
        self.min_loss: float | None = None  # of the debiased average
        self.timed_steps = 0
        self.timed_tokens = 0
        self.timed_seconds = 0.0
        self.steps_here = 0  # in this process: a resumed run compiles and warms up again
        self.val_bpb: float | None = None  # the last that was measured
        self.min_val_bpb: float | None = None
        self.last_tokens = 0
        self.last_seconds = 0.0
        self.data_seconds = 0.0  # of the step, spent on waiting for data
        self.started = 0.0
        self.moved_at = time.monotonic()  # when the last step ended

    def start_step(self) -> None:
        """The step's clock starts."""
        synchronize(self.device)
        self.started, self.data_seconds = time.perf_counter(), 0.0

    def watch_data(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches; the time that they take to come is the step's wait for data."""
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.data_seconds += time.perf_counter() - began
            yield batch

    def end_step(self, loss: float, num_tokens: int) -> None:
        """The step is done; loss in nats per token, num_tokens of all ranks went through the model."""
        synchronize(self.device)
        self.last_tokens, self.last_seconds = num_tokens, time.perf_counter() - self.started
        self.moved_at = time.monotonic()
        self.updates += 1
        self.loss_average = EMA_BETA * self.loss_average + (1 - EMA_BETA) * loss
        if self.updates >= AVERAGE_STEPS:
            self.min_loss = self.loss if self.min_loss is None else min(self.min_loss, self.loss)
        self.steps_here += 1
        if self.steps_here > UNTIMED_STEPS:
            self.timed_steps += 1
            self.timed_tokens += num_tokens
            self.timed_seconds += self.last_seconds

    def note_val_bpb(self, val_bpb: float) -> None:
        """Keep the last and the smallest validation bits per byte."""
        self.val_bpb = val_bpb
        self.min_val_bpb = val_bpb if self.min_val_bpb is None else min(self.min_val_bpb, val_bpb)

    @property
    def loss(self) -> float:
        """The debiased average loss."""
        return self.loss_average / (1 - EMA_BETA**self.updates) if self.updates else float("nan")

    @property
    def best_loss(self) -> float:
        """The smallest average loss so far, or that of a model that knows nothing; infinity without a vocab_size."""
        knows_nothing = math.log(self.vocab_size) if self.vocab_size else math.inf
        return knows_nothing if self.min_loss is None else min(self.min_loss, knows_nothing)

    @property
    def loss_limit(self) -> float:
        """Above it the loss has exploded, in nats: infinity without a vocab_size.

        It is half-way between the best loss so far and that of a model that knows nothing, ln(vocab_size), but at least
        MIN_RISE_NATS above the best: half of what was learned is lost.
        """
        if self.vocab_size is None:
            return math.inf
        return max((self.best_loss + math.log(self.vocab_size)) / 2, self.best_loss + MIN_RISE_NATS)

    @property
    def tokens_per_second(self) -> float:
        """Of the last step, over all ranks."""
        return self.last_tokens / self.last_seconds if self.last_seconds else 0.0

    @property
    def average_tokens_per_second(self) -> float | None:
        """Of all timed steps; None before anything was timed."""
        return self.timed_tokens / self.timed_seconds if self.timed_steps else None

    def mfu(self, average: bool = False) -> float | None:
        """Model FLOPs utilisation in [0, 1] of the last step or of all timed ones; None where the peak is unknown."""
        average_of = (self.timed_tokens, self.timed_seconds)
        tokens, seconds = average_of if average else (self.last_tokens, self.last_seconds)
        if self.peak is None or not seconds:
            return None
        return tokens * self.flops_per_token / (seconds * self.peak)

    def eta_seconds(self, steps_left: int) -> float | None:
        """Seconds until the end at the average speed so far; None before anything was timed."""
        return steps_left * self.timed_seconds / self.timed_steps if self.timed_steps else None

    def line(self, step: int, num_steps: int, **extra: Any) -> str:
        """One line of the training log; the memory is the most that was in use so far."""
        parts = [f"step {step:>{len(str(num_steps))}}/{num_steps}", f"loss {self.loss:.4f}"]
        if self.val_bpb is not None:
            parts.append(f"val bpb {self.val_bpb:.4f}")
        parts += [f"{name} {value:.3g}" for name, value in extra.items()]
        parts += [f"{self.last_seconds * 1000:.0f} ms", f"{self.tokens_per_second:,.0f} tok/s"]
        mfu, eta = self.mfu(), self.eta_seconds(num_steps - step)
        if mfu is not None:
            parts.append(f"mfu {mfu:.1%}")
        parts.append(f"data wait {self.data_seconds * 1000:.0f} ms")
        parts.append(f"memory {peak_memory_bytes(self.device) / 1e9:.1f} GB")
        if eta is not None:
            parts.append(f"{format_seconds(eta)} left")
        return " | ".join(parts)

    def report(self) -> dict[str, Any]:
        """What a stage's section of the report says about its training."""
        return {
            "train_loss": self.loss,
            "mfu": self.mfu(average=True),
            "tokens_per_second": self.average_tokens_per_second and round(self.average_tokens_per_second),
            "training_time_seconds": self.timed_seconds,
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }

    STATE = (
        *("updates", "loss_average", "min_loss", "val_bpb", "min_val_bpb"),
        *("timed_steps", "timed_tokens", "timed_seconds"),
    )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if nothing had happened; JSON-able."""
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state_dict."""
        for name in self.STATE:
            setattr(self, name, state.get(name, getattr(self, name)))


FORMER_METRICS = "metrics.former.jsonl"


class MetricsLog:
    """What is measured on the way: the lines of the log, metrics.jsonl beside a checkpoint, and a wandb run.

    In the file each line is a JSON object with "step" and whatever was measured at it. is_writer writes, rank 0 tells
    wandb. Lines after the step at which a run starts or resumes are dropped; what is measured again at that very step
    is there twice, and the later line counts.
    """

    WANDB_NAMES = {
        "loss": "train/loss",
        "lr_multiplier": "train/lrm",
        "tokens_per_second": "train/tok_per_s",
        "val_bpb": "val/bpb",
    }

    def __init__(self, checkpoint_dir: str | Path, from_step: int = 0, wandb_run: Any = None, log_every: int = 1):
        self.log_every = log_every
        self.path = Path(checkpoint_dir) / "metrics.jsonl"
        self.wandb_run = wandb_run or DummyWandb()
        self.is_writer = is_writer()
        if not self.is_writer:
            return
        former = self.path.with_name(FORMER_METRICS)
        if from_step and former.exists():  # the run that began anew in between has saved nothing
            former.replace(self.path)
        elif not from_step and self.path.exists() and not former.exists():
            self.path.replace(former)  # until guard.Saver removes it with the checkpoints that it belongs to
        kept = [line for line in self._lines() if from_step and _step_of(line) <= from_step]
        with atomic_write(self.path) as f:
            f.writelines(kept)

    def log(self, step: int, **metrics: float) -> None:
        """What an evaluation found."""
        print0(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        self._write(step, metrics)
        self._tell_wandb(step, metrics)

    def log_step(
        self,
        step: int,
        num_steps: int,
        meter: TrainMeter,
        loss: float,
        multiplier: float,
        group_norms: dict[str, float] | None = None,
        **metrics: Any,
    ) -> None:
        """What every optimizer step has, and metrics of its own, which are in the line of the log as well.

        step counts the updates made; loss in nats per token; multiplier is the one on the learning rates. A line is
        printed every log_every steps and at the last, and wandb gets the average loss every WANDB_EVERY steps.
        """
        speed = {"tokens_per_second": meter.tokens_per_second, "data_wait_seconds": meter.data_seconds}
        common = {"lr_multiplier": multiplier, **speed, **metrics, **(group_norms or {})}
        self._write(step, {"loss": loss, **common})
        if is_due(step, WANDB_EVERY):
            self._tell_wandb(step, {"loss": meter.loss, **common})
        if is_due(step, self.log_every) or (step == num_steps and self.log_every > 0):
            print0(meter.line(step, num_steps, lr=multiplier, **metrics))

    def _write(self, step: int, metrics: dict[str, Any]) -> None:
        if self.is_writer:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps({"step": step, **metrics}) + "\n")

    def _tell_wandb(self, step: int, metrics: dict[str, Any]) -> None:
        self.wandb_run.log({"step": step, **{self.WANDB_NAMES.get(name, name): v for name, v in metrics.items()}})

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        with open(self.path, encoding="utf-8") as f:
            return f.readlines()


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for a line that was cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


SAMPLE_PROMPTS = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


def sample_completions(model: Any, tokenizer: Any, max_tokens: int = 16) -> list[str]:
    """The likeliest completion of each of SAMPLE_PROMPTS, prompt included. Local; takes the uncompiled model."""
    engine = Engine(model, tokenizer)
    samples = []
    for prompt in SAMPLE_PROMPTS:
        tokens = tokenizer.encode(prompt, prepend=tokenizer.get_bos_token_id())
        with autocast(model.get_device()):
            sequences, _ = engine.generate_batch(tokens, num_samples=1, max_tokens=max_tokens, temperature=0.0)
        samples.append(tokenizer.decode(sequences[0][1:]))
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# Stopping


class StopSignal:
    """Turns SIGINT and SIGTERM into a flag that the loop looks at between steps, so that it can save and leave.

        with StopSignal() as stop:
            for step in ...:
                if stop.requested(): save; break

    A second SIGINT, two seconds later or more, interrupts at once. SIGTERM never does: who sends it follows up with
    SIGKILL if need be, and torchrun passes an interrupt on as both.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    PATIENCE_SECONDS = 2.0

    def __init__(self) -> None:
        self.received: int | None = None
        self.received_at = 0.0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        self.previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()
            os.write(2, b"\nstopping after this step, saving first (Ctrl-C again stops at once)\n")
        elif number == signal.SIGINT and time.monotonic() - self.received_at > self.PATIENCE_SECONDS:
            raise KeyboardInterrupt

    def requested(self) -> bool:
        """Whether any rank was told to stop. Every rank must call."""
        return any_rank(self.received is not None)

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended: 128 + its number."""
        return 128 + (self.received or signal.SIGTERM)
