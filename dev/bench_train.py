"""How much of the machine's matmul rate training reaches, and how much memory it takes; on a CPU.

    python -m dev.bench_train
    python -m dev.bench_train --part=speed --device_batch_size=4

Three parts, each after an exactness gate against a plain implementation:
- memory: the peak of a training step with a large vocabulary, beside the same step with full logits. Each runs in a
  process of its own, because a process's peak never falls.
- speed: FLOP/s of forward and backward as a share of what this process reaches on one large float32 matrix product of
  the model's own sizes. FLOPs per token are 6 (P - wte) + 6 L H D T: the attention's products for its causal half.
- optimizer: the optimizer step beside the same step with one matrix of the blocks at a time.

The things compared run in turns, so that what else the machine does meets them alike. Each figure is the best and the
median of the rounds; ratios are of the medians.
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.common import UserError, peak_memory_bytes, user_errors
from nanochat.configurator import opt, parse
from nanochat.gpt import GPT, config_from_depth
from nanochat.muon import NEWTON_SCHULZ
from nanochat.train import accumulate_gradients, muon_momentum, step_optimizers

CPU = torch.device("cpu")
LOSS_TOLERANCE = 1e-4
UPDATE_TOLERANCE = 1e-3
MATMULS = 8  # products in one measurement of the matmul rate


@dataclass
class Config:
    part: str = opt("all", "what to measure", choices=("all", "memory", "speed", "optimizer"))
    depth: int = opt(6, "transformer blocks; the width is 64 * depth")
    max_seq_len: int = opt(512, "tokens a row")
    vocab_size: int = opt(8192, "vocabulary of the speed and optimizer parts")
    total_batch_size: int = opt(16_384, "tokens a step")
    device_batch_size: int = opt(8, "rows a micro-batch; 8 was fastest of 2, 4, 8 and 32 on two cores")
    rounds: int = opt(5, "measurements of each thing")
    gate_steps: int = opt(50, "training steps in which both losses must be equal")
    memory_vocab_size: int = opt(65_536, "vocabulary of the memory part")
    memory_rows: int = opt(8, "rows a micro-batch of the memory part")
    threads: int = opt(-1, "of torch; -1 leaves it its own choice")


def build(config: Config, vocab_size: int) -> GPT:
    """A model with initial weights, the same at every call."""
    torch.manual_seed(42)
    with torch.device("meta"):
        model = GPT(config_from_depth(config.depth, vocab_size, config.max_seq_len))
    model.to_empty(device=CPU)
    model.init_weights()
    return model


def micro_batches(rows: int, rows_each: int, T: int, vocab_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(inputs, targets), each (rows_each, T) int64, of random tokens, the same at every call."""
    ids = torch.randint(vocab_size, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    return [(part[:, :-1], part[:, 1:]) for part in ids.split(rows_each)]


class FullLogits:
    """The model with the plain loss: all logits at once, then F.cross_entropy. Called like the model."""

    def __init__(self, model: GPT):
        self.model = model

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, loss_reduction: str) -> torch.Tensor:
        return F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten(), reduction=loss_reduction)


def train_step(model: GPT, loss_model: Any, optimizers: list[Any], batches: list, step: int) -> float:
    """One whole training step; returns its loss."""
    num_targets = sum(targets.numel() for _, targets in batches)
    loss = accumulate_gradients(loss_model, batches, num_targets, CPU)
    step_optimizers(optimizers, 1.0, muon_momentum(step), grad_clip=1.0)
    return loss


def timed(work: Callable[[], Any]) -> float:
    """Seconds that work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work in each round, the works in turns, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_index in range(rounds + 1):
        for name, work in works.items():
            taken = timed(work)
            if round_index:
                seconds[name].append(taken)
    return seconds


def gate(name: str, difference: float, tolerance: float) -> None:
    """Say how exact it is; end the program where that is not exact enough."""
    if not difference <= tolerance:  # NaN fails too
        raise UserError(f"{name}: the difference of {difference:.2e} is above {tolerance:.0e}; no time is worth it")
    print(f"gate, {name}: difference {difference:.1e}, at most {tolerance:.0e} is allowed")


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def peak_of_a_step(config: Config, full_logits: bool, results: Any) -> None:
    """Put (bytes that two steps took at their peak, loss, gradient norm of lm_head) into the queue."""
    before = peak_memory_bytes(CPU)
    model = build(config, config.memory_vocab_size)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5)  # zeros would give every implementation the same loss
    optimizers = model.setup_optimizers()
    batches = micro_batches(config.memory_rows, config.memory_rows, config.max_seq_len, config.memory_vocab_size)
    loss_model = FullLogits(model) if full_logits else model
    loss = accumulate_gradients(loss_model, batches, batches[0][1].numel(), CPU)
    norm = model.lm_head.weight.grad.norm().item()
    step_optimizers(optimizers, 1.0, 0.85, grad_clip=1.0)
    train_step(model, loss_model, optimizers, batches, step=1)
    results.put((peak_memory_bytes(CPU) - before, loss, norm))


def bench_memory(config: Config) -> None:
    """S3. Runs first: on Linux a child's peak starts at its parent's."""
    processes = multiprocessing.get_context("spawn")
    found = {}
    for full_logits in (False, True):
        results = processes.SimpleQueue()
        process = processes.Process(target=peak_of_a_step, args=(config, full_logits, results))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise UserError("the memory part was ended from outside; try a smaller --memory_rows")
        found[full_logits] = results.get()
    (ours, loss, norm), (full, full_loss, full_norm) = found[False], found[True]
    gate("loss and gradient norm", max(abs(loss - full_loss), abs(norm / full_norm - 1)), LOSS_TOLERANCE)
    tokens = config.memory_rows * config.max_seq_len
    print(
        f"memory of a training step, {tokens:,} tokens a micro-batch, V {config.memory_vocab_size:,}, weights and "
        f"optimizer included: {ours / 2**30:.2f} GiB; with full logits {full / 2**30:.2f} GiB; ratio {ours / full:.2f}x"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Speed


def check_losses(config: Config) -> None:
    """The gate of the speed part: training with our loss and with the plain one, side by side."""
    models = [build(config, config.vocab_size) for _ in range(2)]
    optimizers = [model.setup_optimizers() for model in models]
    losses = []
    for step in range(config.gate_steps):
        batch = micro_batches(2, 2, min(config.max_seq_len, 256), config.vocab_size)
        losses.append(
            [
                train_step(model, loss_model, optimizer, batch, step)
                for model, loss_model, optimizer in zip(
                    models, (models[0], FullLogits(models[1])), optimizers, strict=True
                )
            ]
        )
    gate(f"loss of {config.gate_steps} steps", max(abs(a - b) for a, b in losses), LOSS_TOLERANCE)
    print(f"      (it went from {losses[0][0]:.3f} to {losses[-1][0]:.3f})")


def flops_per_token(model: GPT) -> int:
    """6 (P - wte) + 6 L H D T."""
    c = model.config
    matmul_params = model.num_params() - model.transformer.wte.weight.numel()
    return 6 * matmul_params + 6 * c.n_layer * c.n_head * c.head_dim * c.sequence_len


def bench_speed(config: Config) -> None:
    """S1."""
    check_losses(config)
    model = build(config, config.vocab_size)
    T, C = config.max_seq_len, model.config.n_embd
    batches = micro_batches(config.total_batch_size // T, config.device_batch_size, T, config.vocab_size)
    a, b = torch.randn(config.total_batch_size, C), torch.randn(C, 4 * C)
    product = torch.empty(config.total_batch_size, 4 * C)

    def matmuls() -> None:
        for _ in range(MATMULS):
            torch.mm(a, b, out=product)

    def forward_backward() -> None:
        accumulate_gradients(model, batches, config.total_batch_size, CPU)

    seconds = in_turns({"matmul": matmuls, "training": forward_backward}, config.rounds)
    flops = {
        "matmul": MATMULS * 2 * config.total_batch_size * C * 4 * C,
        "training": config.total_batch_size * flops_per_token(model),
    }
    best = {name: flops[name] / min(seconds[name]) for name in flops}
    median = {name: flops[name] / statistics.median(seconds[name]) for name in flops}
    print(f"float32 matmul ({len(a):,} x {C}) x ({C} x {4 * C}): {best['matmul'] / 1e9:.1f} GFLOP/s best, ", end="")
    print(f"{median['matmul'] / 1e9:.1f} median")
    print(
        f"forward and backward, depth {config.depth}, T {T}, V {config.vocab_size:,}, micro-batches of "
        f"{config.device_batch_size} rows: {best['training'] / 1e9:.1f} GFLOP/s best, "
        f"{median['training'] / 1e9:.1f} median, {statistics.median(seconds['training']):.2f} s a step of "
        f"{config.total_batch_size:,} tokens"
    )
    print(
        f"share of the matmul rate: {median['training'] / median['matmul']:.0%} (best of both: "
        f"{best['training'] / best['matmul']:.0%})"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer


class OneMatrixAtATime:
    """Muon as its description says it: each matrix on its own, three products an iteration. One process."""

    def __init__(self, params: list[torch.Tensor], lr: float, momentum: float):
        self.params, self.lr, self.momentum = params, lr, momentum
        self.buffers = [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self) -> None:
        a, b, c = NEWTON_SCHULZ
        for p, buffer in zip(self.params, self.buffers, strict=True):
            buffer.lerp_(p.grad, 1 - self.momentum)
            x = p.grad.lerp(buffer, self.momentum)
            rows, cols = x.shape
            x = x.T if rows > cols else x
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                gram = x @ x.T
                x = a * x + (b * gram + c * (gram @ gram)) @ x
            p -= self.lr * max(1.0, rows / cols) ** 0.5 * (x.T if rows > cols else x)


def bench_optimizer(config: Config) -> None:
    """S2: AdamW is the same in both, Muon differs."""
    models = [build(config, config.vocab_size) for _ in range(2)]
    optimizers = [model.setup_optimizers() for model in models]
    muon_group = optimizers[1][1].param_groups[0]
    singly = OneMatrixAtATime(list(models[1].transformer.h.parameters()), muon_group["lr"], muon_group["momentum"])
    rng = torch.Generator().manual_seed(2)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        ours.grad = torch.randn(ours.shape, generator=rng)
        theirs.grad = ours.grad.clone()

    def batched() -> None:
        for optimizer in optimizers[0]:
            optimizer.reduce()
        for optimizer in optimizers[0]:
            optimizer.step()

    def one_at_a_time() -> None:
        adamw = optimizers[1][0]
        adamw.reduce()
        adamw.step()
        singly.step()

    start = [p.detach().clone() for p in models[0].parameters()]
    seconds = in_turns({"batched": batched, "one at a time": one_at_a_time}, config.rounds)
    errors = [
        ((ours - theirs).norm() / (theirs - before).norm()).item()
        for ours, theirs, before in zip(models[0].parameters(), models[1].parameters(), start, strict=True)
    ]
    gate("relative error of the updates", max(errors), UPDATE_TOLERANCE)
    ours, theirs = statistics.median(seconds["batched"]), statistics.median(seconds["one at a time"])
    print(
        f"optimizer step, {len(singly.params)} matrices: {ours * 1000:.0f} ms; matrix by matrix "
        f"{theirs * 1000:.0f} ms; {theirs / ours:.2f}x (medians; best {min(seconds['batched']) * 1000:.0f} and "
        f"{min(seconds['one at a time']) * 1000:.0f} ms)"
    )


@user_errors
def main(config: Config) -> None:
    """Run the wanted parts."""
    if config.total_batch_size % (config.max_seq_len * config.device_batch_size):
        raise UserError(
            f"--total_batch_size={config.total_batch_size} must be a multiple of --device_batch_size="
            f"{config.device_batch_size} rows x --max_seq_len={config.max_seq_len} tokens"
        )
    if config.threads > 0:
        torch.set_num_threads(config.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {sys.platform}", flush=True)
    parts = {"memory": bench_memory, "speed": bench_speed, "optimizer": bench_optimizer}
    for name, part in parts.items():
        if config.part in ("all", name):
            part(config)


if __name__ == "__main__":
    main(parse(Config))
