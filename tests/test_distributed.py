"""What several processes do together, on Gloo: collectives, optimizers, checkpoints, loaders, evaluation.

Every test starts its ranks with run_ranks: real processes and a real process group, as under torchrun. They are forked
from a server that has imported torch already, so that a test takes tenths of a second.
"""

import itertools
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ByteTokenizer, random_tokens, randomized_model, tiny_config, write_shards

from nanochat import common
from nanochat.checkpoint_manager import load_checkpoint, load_weights, save_checkpoint
from nanochat.common import Runtime, UserError
from nanochat.dataloader import (
    Row,
    count_conversations,
    count_targets,
    deal_rows,
    gather_cursors,
    padded_batches,
    tokenizing_distributed_data_loader,
)
from nanochat.loss_eval import evaluate_bpb
from nanochat.train import StopSignal, accumulate_gradients, step_optimizers

SECONDS = 60
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "conftest",
        "nanochat.train",
        "nanochat.dataloader",
        "nanochat.checkpoint_manager",
        "nanochat.task_eval",
        "scripts.mid_train",
        "scripts.chat_sft",
        "scripts.chat_rl",
        "torch.fx.experimental.symbolic_shapes",  # two seconds, which torch takes when a model leaves the meta device
    ]
)


def run_ranks(world_size: int, work: Callable[..., Any], *args: Any, each: Sequence[dict[str, str]] = ()) -> list[Any]:
    """What work(runtime, *args) returns on each rank, in the order of ranks; the traceback of the first that failed.

    each: variables of the environment that a rank has of its own, one dict a rank. This process keeps the store over
    which the ranks meet, as torchrun's agent does; so its port is surely free.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=SECONDS))
    environment = {
        "NANOCHAT_BASE_DIR": os.environ["NANOCHAT_BASE_DIR"],
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(world_size),
    }
    processes, receivers = [], []
    for rank in range(world_size):
        receiver, sender = PROCESSES.Pipe(duplex=False)
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), **(each[rank] if each else {})}
        process = PROCESSES.Process(target=_rank_main, args=(own, sender, work, args), daemon=True)
        process.start()
        sender.close()
        processes.append(process)
        receivers.append(receiver)
    try:
        return [_receive(rank, receiver) for rank, receiver in enumerate(receivers)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank_main(environment: dict[str, str], sender: Any, work: Callable[..., Any], args: tuple) -> None:
    os.environ.update(environment)
    try:
        result = ("result", work(common.compute_init("cpu"), *args))
    except BaseException:
        result = ("error", traceback.format_exc())
    sender.send(result)
    common.compute_cleanup()


def _receive(rank: int, receiver: Any) -> Any:
    if not receiver.poll(SECONDS):
        pytest.fail(f"rank {rank} did not answer in {SECONDS} seconds")
    kind, value = receiver.recv()
    if kind == "error":
        pytest.fail(f"rank {rank}:\n{value}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Collectives


def collectives(runtime: Runtime) -> dict[str, Any]:
    rank, world_size = runtime.rank, runtime.world_size
    stacked = torch.arange(world_size * 2.0).view(world_size, 2) * (rank + 1)
    share = common.reduce_scatter_mean(stacked)()
    tensor = torch.tensor([float(rank), 1.0])
    return {
        "runtime": tuple(runtime),
        "float": common.all_reduce_sum(rank + 0.5),
        "int": common.all_reduce_sum(2**53 + 2 * rank - 2**53),
        "mean": common.all_reduce_mean(float(rank)),
        "tensor mean": common.all_reduce_mean(tensor).tolist(),
        "in place": tensor.tolist(),
        "any": (common.any_rank(rank == world_size - 1), common.any_rank(False)),
        "objects": common.gather_objects({"rank": rank}),
        "share": share.tolist(),
        "joined": common.all_gather_shares(share).tolist(),
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_collectives_give_every_rank_the_same(world_size):
    ranks = range(world_size)
    mean = sum(ranks) / world_size
    factor = sum(rank + 1 for rank in ranks) / world_size
    joined = [[2 * r * factor, (2 * r + 1) * factor] for r in ranks]
    for rank, result in enumerate(run_ranks(world_size, collectives)):
        assert result == {
            "runtime": (True, rank, rank, world_size, torch.device("cpu")),
            "float": sum(r + 0.5 for r in ranks),
            "int": sum(2 * r for r in ranks),
            "mean": mean,
            "tensor mean": [mean, 1.0],
            "in place": [mean, 1.0],
            "any": (True, False),
            "objects": [{"rank": r} for r in ranks],
            "share": [joined[rank]],
            "joined": joined,
        }
        assert type(result["int"]) is int and type(result["float"]) is float


def first_on_rank_0(runtime: Runtime, folder: Path, fails: bool) -> str:
    path = folder / "made by rank 0"
    try:
        with common.on_rank0_first():
            if runtime.rank == 0:
                time.sleep(0.3)
                path.write_text("whole", encoding="utf-8")
                if fails:
                    raise UserError("rank 0 failed")
            return path.read_text(encoding="utf-8") if path.exists() else "nothing"
    except UserError as error:
        return str(error)


def test_the_others_wait_for_rank_0_and_find_what_it_left(tmp_path):
    assert run_ranks(3, first_on_rank_0, tmp_path, False) == ["whole"] * 3


def test_the_others_do_not_hang_when_rank_0_fails(tmp_path):
    assert run_ranks(2, first_on_rank_0, tmp_path, True) == ["rank 0 failed", "whole"]


def stop_on_last_rank(runtime: Runtime) -> list[bool]:
    with StopSignal() as stop:
        before = stop.requested()
        if runtime.rank == runtime.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return [before, stop.requested()]


def test_a_signal_to_one_rank_stops_all():
    assert run_ranks(2, stop_on_last_rank) == [[False, True]] * 2


def cleanup(runtime: Runtime) -> bool:
    @common.user_errors
    def main() -> None:
        assert dist.is_initialized()

    main()
    return dist.is_initialized()


def test_a_script_that_ends_takes_its_process_group_down():
    assert run_ranks(2, cleanup) == [False, False]


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers and checkpoints

ROWS = 12  # of a step; the world sizes 1, 2, 3 and 4 divide it
GRAD_CLIP = 0.5


def train(runtime: Runtime, folder: Path, steps: range) -> dict[str, Any]:
    """Train the random tiny model for some steps, from the checkpoint at the first of them where that is not 0.

    The model has 257 tokens, 10,240 elements in wte (3 does not divide them), and shapes with as few as two matrices,
    so that on 3 and 4 ranks everything is padded. Rank 0 leaves a checkpoint after the last step.
    """
    model = randomized_model()
    optimizers = model.setup_optimizers()
    if steps[0]:
        model_data, optimizer_data, _ = load_checkpoint(folder, steps[0], "cpu", load_optimizer=True)
        load_weights(model, model_data)
        for optimizer, state in zip(optimizers, optimizer_data, strict=True):
            optimizer.load_state_dict(state)
    losses, norms = [], []
    for step in steps:
        ids = random_tokens(model.config, ROWS, 9, seed=step)[runtime.rank :: runtime.world_size]
        losses.append(accumulate_gradients(model, [(ids[:, :-1], ids[:, 1:])], ROWS * 8, runtime.device))
        norms.append(step_optimizers(optimizers, 0.5, 0.9, GRAD_CLIP))
    states = [optimizer.state_dict() for optimizer in optimizers]
    save_checkpoint(folder, steps[-1] + 1, model.state_dict(), states, {"world_size": runtime.world_size})
    return {
        "weights": {name: p.detach().numpy() for name, p in model.named_parameters()},
        "losses": losses,
        "norms": norms,
    }


def alone(folder: Path, steps: range) -> dict[str, Any]:
    return train(Runtime(False, 0, 0, 1, torch.device("cpu")), folder, steps)


def assert_same_training(result: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=2e-5)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict[int, dict[str, Any]]:
    """Training on one process to the end of step n: {n: result}."""
    return {n: alone(tmp_path_factory.mktemp("alone"), range(n)) for n in (3, 6)}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_train_as_one_process_on_the_mean_gradient(tmp_path, one_process, world_size):
    """With clipping in force: the norm is the one of the mean gradient, not of each rank's own."""
    results = run_ranks(world_size, train, tmp_path, range(3))
    assert min(results[0]["norms"]) > 2 * GRAD_CLIP
    for result in results:
        assert_same_training(result, one_process[3])
    for name, weight in results[0]["weights"].items():
        assert all((result["weights"][name] == weight).all() for result in results), name


def test_training_on_ranks_has_moved_every_matrix(one_process):
    """The comparison above would hold for optimizers that do nothing."""
    for name, p in randomized_model().named_parameters():
        assert abs(one_process[3]["weights"][name] - p.detach().numpy()).max() > 1e-3, name


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 3), (2, 2), (1, 2), (3, 2)])
def test_a_checkpoint_is_taken_up_at_another_world_size(tmp_path, one_process, before, after):
    for world_size, steps in ((before, range(3)), (after, range(3, 6))):
        result = (alone if world_size == 1 else lambda *a, n=world_size: run_ranks(n, train, *a)[0])(tmp_path, steps)
    assert_same_training(result["weights"], one_process[6]["weights"])
    assert_same_training(result["losses"], one_process[6]["losses"][3:])


def test_a_resumed_run_of_two_ends_in_the_same_bits(tmp_path):
    whole = run_ranks(2, train, tmp_path / "whole", range(4))[0]
    run_ranks(2, train, tmp_path / "parts", range(2))
    resumed = run_ranks(2, train, tmp_path / "parts", range(2, 4))[0]
    assert all((resumed["weights"][name] == weight).all() for name, weight in whole["weights"].items())


def test_optimizer_states_are_whole_and_the_same_from_every_world_size(tmp_path):
    alone(tmp_path / "1", range(2))
    run_ranks(3, train, tmp_path / "3", range(2))
    states = [load_checkpoint(tmp_path / n, 2, "cpu", load_optimizer=True)[1] for n in ("1", "3")]
    torch.testing.assert_close(states[1], states[0], atol=1e-6, rtol=1e-4)
    model = randomized_model()
    assert [m.shape for m, _ in states[1][0]["moments"]] == [
        model.lm_head.weight.shape,
        model.transformer.wte.weight.shape,
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Finetuning: conversations in rows of their own


def conversation_rows(*lengths: int) -> list[Row]:
    """Rows of random tokens, the last third of each supervised, and of weights of both signs."""
    ids = random_tokens(tiny_config(), len(lengths), max(lengths)).tolist()
    return [
        Row(tokens[:length], [int(i >= 2 * length // 3) for i in range(length)], weight=(-1.0) ** number * 0.5)
        for number, (tokens, length) in enumerate(zip(ids, lengths, strict=True))
    ]


def finetuning_step(runtime: Runtime, rows: list[Row], rows_a_micro_batch: int, is_weighted: bool) -> dict[str, Any]:
    """One optimizer step on rows: the loss, the norm of the gradient, and the first moments, which are its shares."""
    model = randomized_model()
    batches = padded_batches(deal_rows(rows), rows_a_micro_batch, 5, runtime.device)
    batches = list(batches) if is_weighted else [(inputs, targets) for inputs, targets, _ in batches]
    loss = accumulate_gradients(model, batches, count_targets(rows), runtime.device)
    optimizers = model.setup_optimizers()
    norm = step_optimizers(optimizers, 0.0, 0.9)
    adamw, muon = (optimizer.state_dict() for optimizer in optimizers)
    moments = [first for first, _ in adamw["moments"]] + muon["momentum_buffers"]
    return {
        "losses": [loss],
        "norms": [norm],
        "moments": [moment.numpy() for moment in moments],
        "rows": sum(len(batch[0]) for batch in batches),
    }


@pytest.mark.parametrize("is_weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("lengths", [(9, 9, 9, 9), (3, 4, 31, 40), (2, 2, 2, 60)], ids=["equal", "two", "one long"])
def test_rows_on_two_ranks_in_micro_batches_or_at_once_are_the_same_step(lengths, is_weighted):
    """1 x 4 rows = 4 x 1 rows = 2 ranks x 2 rows, also where one rank has nearly all of the targets."""
    rows = conversation_rows(*lengths)
    runtime = Runtime(False, 0, 0, 1, torch.device("cpu"))
    at_once = finetuning_step(runtime, rows, 4, is_weighted)
    assert at_once["rows"] == 4 and abs(at_once["losses"][0]) > 0.01 and at_once["norms"][0] > 0.01
    one_by_one = finetuning_step(runtime, rows, 1, is_weighted)
    both = run_ranks(2, finetuning_step, rows, 2, is_weighted)
    assert [result["rows"] for result in both] == [2, 2]
    for result in (one_by_one, *both):
        assert_same_training({**result, "rows": 4}, at_once)


@pytest.mark.parametrize("lengths", [(9,), ()], ids=["one row", "no rows"])
def test_a_rank_without_rows_takes_part_in_the_step(lengths):
    rows = conversation_rows(*lengths) if lengths else []
    expected = finetuning_step(Runtime(False, 0, 0, 1, torch.device("cpu")), rows, 4, False)
    for result in run_ranks(2, finetuning_step, rows, 4, False):
        assert_same_training({**result, "rows": 1}, expected)
    assert all(math.isfinite(value) for value in (*expected["losses"], *expected["norms"]))


# ---------------------------------------------------------------------------------------------------------------------
# Data and evaluation

T, LANES = 16, 4


@pytest.fixture
def shards(base_dir) -> None:
    texts = [f"{i}: " + " ".join(str(i * j) for j in range(i % 13)) for i in range(48)]
    write_shards(base_dir, [texts[:20], texts[20:34], texts[34:]])


def load_rows(runtime: Runtime, steps: int) -> dict[str, Any]:
    """Eight rows a step over all ranks: (rows of each step, cursors of all lanes after the last)."""
    loader = tokenizing_distributed_data_loader(8 // runtime.world_size, T, "train", ByteTokenizer(), LANES)
    batches = list(itertools.islice(loader, steps))
    return {
        "rows": [[str(row.tolist()) for row in batch.inputs] for batch in batches],
        "cursors": gather_cursors(batches[-1].cursors),
    }


@pytest.mark.parametrize("world_size", [2, 4])
def test_loaders_of_all_ranks_are_disjoint_and_complete(shards, world_size):
    """All ranks fill one cold token cache at once."""
    steps = 30
    expected = load_rows(Runtime(False, 0, 0, 1, torch.device("cpu")), steps)
    assert expected["cursors"][0]["epoch"] >= 1
    results = run_ranks(world_size, load_rows, steps)
    for step in range(steps):
        rows = [row for result in results for row in result["rows"][step]]
        assert len(set(rows)) == len(rows) == 8
        assert sorted(rows) == sorted(expected["rows"][step])
    assert all(result["cursors"] == expected["cursors"] for result in results)


def conversations_read(runtime: Runtime) -> int:
    own = range(runtime.rank, LANES, runtime.world_size)
    return count_conversations({lane: {"epoch": 1, "group": lane, "offset": 0} for lane in own}, 22, LANES)


@pytest.mark.parametrize("world_size", [2, 4])
def test_progress_counts_the_conversations_of_all_ranks(world_size):
    """One epoch is 22 conversations; the second one is under way by 0, 1, 2 and 3 of them."""
    assert run_ranks(world_size, conversations_read) == [22 + 6] * world_size


def test_a_loader_for_more_ranks_than_lanes_fails_at_once_on_all(shards):
    for message in run_ranks(3, loader_error):
        assert "--data_lanes=4" in message and "3" in message


def loader_error(runtime: Runtime) -> str:
    with pytest.raises(UserError) as error:
        load_rows(runtime, 1)
    return str(error.value)


def bits_per_byte(runtime: Runtime) -> float:
    """Of the random model on 16 rows of the validation shard, over all ranks."""
    batch_size = 8 // runtime.world_size
    loader = tokenizing_distributed_data_loader(batch_size, T, "val", ByteTokenizer(), LANES)
    token_bytes = torch.tensor([1] * 256 + [0], dtype=torch.int32)
    return evaluate_bpb(randomized_model(tiny_config()), loader, 2, token_bytes)


def test_bits_per_byte_are_those_of_all_ranks(shards):
    expected = bits_per_byte(Runtime(False, 0, 0, 1, torch.device("cpu")))
    assert run_ranks(2, bits_per_byte) == pytest.approx([expected] * 2, rel=1e-6)
