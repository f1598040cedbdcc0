"""What the processes of a training step send each other, and how that scales; dev/scaling.md explains the tables.

    python -m dev.bench_scaling
    python -m dev.bench_scaling --part=arithmetic --mfu=0.4

Two parts:
- arithmetic: bytes that each rank sends in a step, by parameter group, and how fast the wires between hosts of 8 H100
  must be to hide that behind the computation, for the usual depths.
- measured: the same training step on 1, 2 and 4 processes of this machine, each with one thread, and the bytes that
  their collectives move, counted, beside the formula. Before any time is taken, the losses of all must agree.

Bytes are those of the ring algorithm, in which each of N ranks sends (N - 1) / N of a tensor in a reduce-scatter and as
much in an all-gather. What Gloo really sends may be more; NCCL has the ring and trees, which send about as much.
"""

import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from nanochat.adamw import AdamW
from nanochat.common import PEAK_FLOPS, TIMEOUT, UserError, compute_cleanup, compute_init, user_errors
from nanochat.configurator import opt, parse
from nanochat.gpt import GPT, config_from_depth
from nanochat.muon import Muon
from nanochat.train import accumulate_gradients, step_optimizers

DEPTHS = (20, 26, 32)
HOSTS = (1, 2, 4, 8)  # of 8 GPUs
WIRES = {"NVLink": 450, "3,200 Gb/s": 400, "800 Gb/s": 100, "100 Gb/s": 12.5}  # GB/s out of a rank, out of a host
LOSS_TOLERANCE = 1e-4


@dataclass
class Config:
    part: str = opt("all", "what to print", choices=("all", "arithmetic", "measured"))
    mfu: float = opt(0.45, "model FLOPs utilisation of the H100 in the arithmetic")
    total_batch_size: int = opt(524_288, "tokens a step in the arithmetic")
    depth: int = opt(4, "transformer blocks of the measured model; the width is 64 * depth")
    vocab_size: int = opt(4096, "its vocabulary")
    max_seq_len: int = opt(256, "its tokens a row")
    rows: int = opt(32, "its rows a step, over all processes")
    processes: str = opt("1,2,4", "process counts to measure")
    steps: int = opt(6, "steps of each; the first is not counted")


# ---------------------------------------------------------------------------------------------------------------------
# The formula


def exchanged_bytes(model: GPT, optimizers: list[Any], world_size: int, wte_bytes: int = 4) -> dict[str, int]:
    """Bytes of each parameter group that a step reduces, and as many that it gathers again; padding included.

    Gradients have the dtype of their parameters: float32, and wte_bytes a value in wte. AdamW's parameters are padded
    to a multiple of the world size in elements, Muon's stacks in matrices.
    """
    groups: dict[str, int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            params = group["params"]
            if isinstance(optimizer, Muon):
                m, n = params[0].shape
                groups[f"{len(params)} matrices of {m} x {n}"] = _padded(len(params), world_size) * m * n * 4
            elif isinstance(optimizer, AdamW):
                for p in params:
                    is_wte = p is model.transformer.wte.weight
                    size = _padded(p.numel(), world_size)
                    groups["wte" if is_wte else "lm_head"] = size * (wte_bytes if is_wte else 4)
    return groups


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def sent_bytes(exchanged: int, world_size: int) -> int:
    """Bytes that a rank sends in a step that reduce-scatters and all-gathers so many; a few single numbers left out."""
    return 2 * exchanged * (world_size - 1) // world_size


@contextlib.contextmanager
def counted_collectives() -> Iterator[dict[str, int]]:
    """Count in a dict what this rank sends in the collectives of the body, in bytes of the ring algorithm, by kind."""
    counts = {"reduce_scatter": 0, "all_gather": 0, "all_reduce": 0}
    whole = {"reduce_scatter_tensor": 1, "all_gather_into_tensor": 0, "all_reduce": 0}  # the argument that is whole
    names = dict(zip(whole, counts, strict=True))

    def counting(function: str) -> Any:
        real = getattr(dist, function)

        def call(*args: Any, **kwargs: Any) -> Any:
            world_size = dist.get_world_size()
            passes = 2 if function == "all_reduce" else 1
            counts[names[function]] += passes * args[whole[function]].nbytes * (world_size - 1) // world_size
            return real(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for function in whole:
            stack.enter_context(mock.patch.object(dist, function, counting(function)))
        yield counts


# ---------------------------------------------------------------------------------------------------------------------
# The arithmetic


def print_arithmetic(config: Config) -> None:
    peak = PEAK_FLOPS["H100"]
    for depth in DEPTHS:
        with torch.device("meta"):
            model = GPT(config_from_depth(depth, 65_536, 2048))
        optimizers = model.setup_optimizers()
        print(f"\ndepth {depth}: {model.num_params():,} parameters, {model.estimate_flops():.2e} FLOPs a token")
        for name, size in exchanged_bytes(model, optimizers, 1, wte_bytes=2).items():
            print(f"  {name:<28} {size / 1e6:>8,.0f} MB")
        print(f"  {'hosts':>5} {'ranks':>5} {'padding':>8} {'sent/rank':>10} {'compute':>9}", end="")
        print("".join(f" {name:>11}" for name in WIRES), f" {'10% takes':>11}")
        unpadded = sum(exchanged_bytes(model, optimizers, 1, wte_bytes=2).values())
        for hosts in HOSTS:
            ranks = 8 * hosts
            exchanged = sum(exchanged_bytes(model, optimizers, ranks, wte_bytes=2).values())
            sent = sent_bytes(exchanged, ranks)
            seconds = config.total_batch_size * model.estimate_flops() / (ranks * peak * config.mfu)
            print(f"  {hosts:>5} {ranks:>5} {exchanged / unpadded:>7.2f}x {sent / 1e9:>7.2f} GB", end="")
            print(f" {seconds * 1000:>6.0f} ms", end="")
            for name, rate in WIRES.items():
                is_used = hosts > 1 or name == "NVLink"
                print(f" {sent / rate / 1e6:>8.0f} ms" if is_used else f" {'':>11}", end="")
            print(f" {sent / (0.1 * seconds) / 1e9:>6.0f} GB/s")


# ---------------------------------------------------------------------------------------------------------------------
# Measured


def train_steps(config: Config, world_size: int, rank: int, port: int, results: Any) -> None:
    """One rank's steps; puts (losses, seconds of forward and backward, seconds of a step, bytes counted, formula)."""
    if world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    runtime = compute_init("cpu")
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = GPT(config_from_depth(config.depth, config.vocab_size, config.max_seq_len))
    model.to_empty(device=runtime.device)
    model.init_weights()
    optimizers = model.setup_optimizers()
    ids = torch.randint(
        config.vocab_size, (config.rows, config.max_seq_len + 1), generator=torch.Generator().manual_seed(1)
    )
    batches = [(part[:, :-1], part[:, 1:]) for part in ids[rank::world_size].split(8)]
    losses, computing, stepping = [], [], []
    with counted_collectives() as counts:
        for _ in range(config.steps):
            start = time.perf_counter()
            losses.append(accumulate_gradients(model, batches, config.rows * config.max_seq_len, runtime.device))
            middle = time.perf_counter()
            step_optimizers(optimizers, 1.0, 0.95, grad_clip=1.0)
            computing.append(middle - start)
            stepping.append(time.perf_counter() - start)
    counted = (counts["reduce_scatter"] + counts["all_gather"]) // config.steps
    formula = sent_bytes(sum(exchanged_bytes(model, optimizers, world_size).values()), world_size)
    results.put((rank, losses, statistics.median(computing[1:]), statistics.median(stepping[1:]), counted, formula))
    compute_cleanup()


def run_processes(config: Config, world_size: int) -> list[tuple]:
    """What train_steps puts, of all ranks in order."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    arguments = [(config, world_size, rank, store.port, results) for rank in range(world_size)]
    processes = [context.Process(target=train_steps, args=args, daemon=True) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode != 0:
            raise UserError("a process of the measured part has failed, see above")
    return sorted(results.get() for _ in processes)


def print_measured(config: Config) -> None:
    counts = [int(word) for word in config.processes.split(",")]
    print(f"\ntorch {torch.__version__}, {os.cpu_count()} cores, {sys.platform}, one thread a process; ", end="")
    print(f"depth {config.depth}, T {config.max_seq_len}, V {config.vocab_size:,}, ", end="")
    print(f"{config.rows * config.max_seq_len:,} tokens a step")
    print(
        f"{'processes':>9} {'step':>9} {'tok/s':>8} {'of ideal':>8} {'optimizer':>9} {'sent/rank':>11} {'formula':>11}"
    )
    expected, base = None, None
    for world_size in counts:
        results = run_processes(config, world_size)
        losses = results[0][1]
        expected = expected or losses
        difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        if not difference <= LOSS_TOLERANCE:
            raise UserError(f"the losses on {world_size} processes differ by {difference:.1e}: no time is worth it")
        _, _, computing, seconds, counted, formula = max(results, key=lambda result: result[3])
        tokens = config.rows * config.max_seq_len / seconds
        base = base or tokens / world_size
        print(f"{world_size:>9} {seconds * 1000:>6.0f} ms {tokens:>8,.0f} {tokens / (base * world_size):>8.0%}", end="")
        print(f" {(seconds - computing) * 1000:>6.0f} ms {counted:>11,} {formula:>11,}", flush=True)


@user_errors
def main(config: Config) -> None:
    """Print the wanted parts."""
    parts = {"arithmetic": print_arithmetic, "measured": print_measured}
    for name, part in parts.items():
        if config.part in ("all", name):
            part(config)


if __name__ == "__main__":
    main(parse(Config))
