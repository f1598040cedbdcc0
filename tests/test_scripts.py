"""The training and evaluation scripts, run for a few steps at depth 2: alone, under torchrun, killed and resumed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat.common import UserError
from scripts import base_loss, base_train, tok_train

STEPS = 12
SIZE = {
    "depth": 2,
    "aspect_ratio": 16,
    "head_dim": 16,
    "max_seq_len": 32,
    "device_batch_size": 4,
    "total_batch_size": 256,
    "num_iterations": STEPS,
    "data_lanes": 4,
    "eval_tokens": 256,
    "core_metric_every": -1,
    "sample_every": -1,
    "eval_every": -1,
}
WORDS = (
    "the cat dog bird sees likes finds a red small old house tree river and then sleeps runs sings near under".split()
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A base directory with three small shards and a tokenizer of 300 tokens; copy it, do not write to it."""
    folder = tmp_path_factory.mktemp("prepared")
    rng = random.Random(0)
    for shard in range(3):
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 40))) + "." for _ in range(32)]
        (folder / "base_data").mkdir(exist_ok=True)
        path = folder / "base_data" / f"shard_{shard:05d}.parquet"
        pq.write_table(pa.table({"text": texts}), path, row_group_size=8)
    old = os.environ.get("NANOCHAT_BASE_DIR")
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    try:
        tok_train.main(tok_train.Config(vocab_size=300))
    finally:
        os.environ.pop("NANOCHAT_BASE_DIR")
        if old is not None:
            os.environ["NANOCHAT_BASE_DIR"] = old
    return folder


@pytest.fixture
def base_dir(prepared, tmp_path, monkeypatch):
    """A copy of the prepared base directory, in use."""
    folder = tmp_path / "base"
    shutil.copytree(prepared, folder)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


def train(**settings) -> dict[str, float]:
    return base_train.main.__wrapped__(base_train.Config(**{**SIZE, **settings}))


def flags(**settings) -> list[str]:
    return [f"--{name}={value}" for name, value in {**SIZE, **settings}.items()]


def run(module: str, *args: str, processes: int = 1, **env: str) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", module, *(["--"] if launcher else []), *args]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, env=environ, capture_output=True, text=True, encoding="utf-8", timeout=240)


def losses(base_dir: Path, tag: str = "d2") -> dict[int, float]:
    with open(base_dir / "base_checkpoints" / tag / "metrics.jsonl", encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def weights(base_dir: Path, tag: str = "d2", step: int = STEPS) -> dict[str, torch.Tensor]:
    return torch.load(base_dir / "base_checkpoints" / tag / f"model_{step:06d}.pt", weights_only=True)


def assert_equal_weights(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Crash(Exception):
    """Stands for a power cut in the middle of a step."""


def crash_at(monkeypatch, step: int) -> None:
    """Let base_train die in its step-th update (counted from 1 in this process), after the backward pass."""
    calls = []
    real = base_train.step_optimizers

    def dying(*args):
        calls.append(None)
        if len(calls) == step:
            raise Crash
        return real(*args)

    monkeypatch.setattr(base_train, "step_optimizers", dying)


def test_n_iterations_are_n_updates_and_the_loss_falls(base_dir):
    train(eval_every=5, sample_every=6)
    curve = losses(base_dir)
    assert sorted(curve) == list(range(1, STEPS + 1))
    assert curve[STEPS] < curve[1] - 0.3
    meta = json.loads((base_dir / "base_checkpoints/d2/meta_000012.json").read_text(encoding="utf-8"))
    assert meta["step"] == STEPS and 0 < meta["val_bpb"] < 10
    assert meta["model_config"]["n_layer"] == 2 and meta["user_config"]["num_iterations"] == STEPS
    assert (base_dir / "report/base_train.md").exists()


def test_same_seed_same_weights_and_measuring_changes_nothing(base_dir):
    train(model_tag="plain")
    train(model_tag="measured", eval_every=3, sample_every=2, save_every=4)
    assert losses(base_dir, "plain") == losses(base_dir, "measured")
    assert_equal_weights(weights(base_dir, "plain"), weights(base_dir, "measured"))


def test_the_token_cache_changes_nothing(base_dir):
    train(model_tag="cached")
    train(model_tag="uncached", tokenized_cache=False)
    assert losses(base_dir, "cached") == losses(base_dir, "uncached")


@pytest.mark.parametrize("crash_step", [3, 8, 12])
def test_a_run_that_crashed_resumes_and_ends_in_the_same_weights(base_dir, monkeypatch, capsys, crash_step):
    train(model_tag="whole", save_every=2)
    with monkeypatch.context() as patch:
        crash_at(patch, crash_step)
        with pytest.raises(Crash):
            train(save_every=2)
    capsys.readouterr()
    train(save_every=2)
    saved = (crash_step - 1) // 2 * 2
    assert f"resumed from step {saved} " in capsys.readouterr().out
    assert losses(base_dir) == losses(base_dir, "whole")
    assert_equal_weights(weights(base_dir), weights(base_dir, "whole"))


def test_resuming_in_a_later_epoch(base_dir, monkeypatch):
    long = {"num_iterations": 60, "save_every": 45}
    train(model_tag="whole", **long)
    with monkeypatch.context() as patch:
        crash_at(patch, 50)
        with pytest.raises(Crash):
            train(**long)
    meta = json.loads((base_dir / "base_checkpoints/d2/meta_000045.json").read_text(encoding="utf-8"))
    assert all(cursor["epoch"] >= 1 for cursor in meta["cursors"].values())
    train(**long)
    assert_equal_weights(weights(base_dir, step=60), weights(base_dir, "whole", step=60))


def test_a_finished_run_is_not_trained_again(base_dir, capsys):
    train()
    before = weights(base_dir)
    capsys.readouterr()
    train()
    assert f"resumed from step {STEPS} " in capsys.readouterr().out
    assert_equal_weights(before, weights(base_dir))
    train(resume="never")
    assert_equal_weights(before, weights(base_dir))


def test_other_settings_in_the_same_folder_are_refused(base_dir):
    train()
    with pytest.raises(UserError, match=r"matrix_lr=0.02 there, 0.01 here.*--resume=never"):
        train(matrix_lr=0.01)
    train(matrix_lr=0.01, resume="never", num_iterations=3)
    steps = [path.name for path in (base_dir / "base_checkpoints/d2").glob("model_*.pt")]
    assert steps == ["model_000003.pt"]  # the longer run's last step cannot be mistaken for this one's


def test_where_and_in_which_portions_it_is_computed_may_change(base_dir):
    train(model_tag="whole", save_every=6)
    train(save_every=6)
    for path in (base_dir / "base_checkpoints/d2").glob("*_000012.*"):
        path.unlink()
    train(save_every=4, device_batch_size=8, device_type="cpu")
    one, other = losses(base_dir, "whole"), losses(base_dir)
    assert all(abs(one[step] - other[step]) < 1e-4 for step in one)


def test_a_checkpoint_has_the_bits_per_byte_of_its_own_step(base_dir):
    train(eval_every=6, save_every=4, save_keep=-1)
    metas = {}
    for path in (base_dir / "base_checkpoints/d2").glob("meta_*.json"):
        meta = json.loads(path.read_text(encoding="utf-8"))
        metas[meta["step"]] = meta["val_bpb"]
    assert metas[4] is None and metas[8] is None and metas[12] > 0


def test_what_a_kill_left_of_a_save_is_removed_by_the_next(base_dir):
    train(save_every=6)
    leftover = base_dir / "base_checkpoints/d2/.model_000012.pt.abc.tmp"
    leftover.write_bytes(b"half a model")
    (base_dir / "base_checkpoints/d2/meta_000012.json").unlink()
    train(save_every=6)
    assert not leftover.exists()


def test_an_evaluation_that_fails_loses_nothing(base_dir, monkeypatch):
    def fail(*args):
        raise Crash

    monkeypatch.setattr(base_train, "find_bundle", lambda: None)
    monkeypatch.setattr(base_train, "evaluate_model", fail)
    with pytest.raises(Crash):
        train(core_metric_every=5)
    assert (base_dir / "base_checkpoints/d2/meta_000005.json").exists()


def test_a_gradient_that_is_not_finite_ends_the_run(base_dir):
    with pytest.raises(UserError, match="step 2: the loss is nan; there is no checkpoint yet"):
        train(unembedding_lr=1e38)


def test_other_data_is_refused_and_more_data_is_not(base_dir):
    train(save_every=6)
    data = base_dir / "base_data"
    shutil.copy(data / "shard_00002.parquet", data / "shard_00003.parquet")  # the validation shard, one further
    train(save_every=6)
    pq.write_table(pa.table({"text": ["something else"] * 32}), data / "shard_00001.parquet", row_group_size=8)
    with pytest.raises(UserError, match="shard_00001.parquet"):
        train(save_every=6)


def test_another_tokenizer_is_refused(base_dir):
    train()
    tok_train.main.__wrapped__(tok_train.Config(vocab_size=290))
    with pytest.raises(UserError, match="tokenizer"):
        train()
    with pytest.raises(UserError, match="tokenizer"):
        base_loss.main.__wrapped__(base_loss.Config(data_lanes=4))


def test_micro_batches_change_the_loss_only_by_rounding(base_dir):
    train(model_tag="small", device_batch_size=2)
    train(model_tag="large", device_batch_size=8)
    small, large = losses(base_dir, "small"), losses(base_dir, "large")
    assert all(abs(small[step] - large[step]) < 1e-4 for step in small)


def test_base_loss_agrees_with_training_and_logs_samples(base_dir):
    final = train(eval_every=STEPS)
    result = base_loss.main.__wrapped__(base_loss.Config(device_batch_size=4, split_tokens=256, data_lanes=4))
    assert result["val_bpb"] == pytest.approx(final["val_bpb"], rel=1e-6)
    assert "The capital of France is" in (base_dir / "report/base_loss.md").read_text(encoding="utf-8")


def test_two_processes_train_the_same_model_and_one_can_take_over(base_dir):
    train(model_tag="one", save_every=4)
    two = run("scripts.base_train", *flags(model_tag="two", save_every=4, eval_every=6), processes=2)
    assert two.returncode == 0, two.stderr
    one_losses, two_losses = losses(base_dir, "one"), losses(base_dir, "two")
    assert one_losses.keys() == two_losses.keys()
    assert all(abs(one_losses[step] - two_losses[step]) < 1e-4 for step in one_losses)
    # what two processes left at step 8, one process goes on with
    folder = base_dir / "base_checkpoints/two"
    for path in folder.glob("*_000012.*"):
        path.unlink()
    train(model_tag="two", save_every=4)
    resumed = losses(base_dir, "two")
    assert all(abs(one_losses[step] - resumed[step]) < 1e-4 for step in one_losses)


def start_training(base_dir: Path, at_step: int, **settings) -> subprocess.Popen:
    """Start base_train in a process of its own and return once its log has reached a step."""
    command = [sys.executable, "-u", "-m", "scripts.base_train", *flags(**settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
    for line in process.stdout:
        if line.startswith("step ") and int(line.split()[1].split("/")[0]) >= at_step:
            return process
    raise AssertionError(f"training ended before step {at_step}")


def test_kill_9_and_the_same_command_again(base_dir):
    settings = {"num_iterations": 120, "save_every": 10}
    process = start_training(base_dir, at_step=random.randint(15, 60), **settings)
    process.kill()
    process.communicate()
    reached = max(losses(base_dir))
    again = run("scripts.base_train", *flags(**settings))
    assert again.returncode == 0, again.stderr
    line = next(line for line in again.stdout.splitlines() if line.startswith("resumed from step"))
    assert reached - 10 <= int(line.split()[3]) <= reached
    assert run("scripts.base_train", *flags(model_tag="whole", **settings)).returncode == 0
    assert losses(base_dir) == losses(base_dir, "whole")
    assert_equal_weights(weights(base_dir, step=120), weights(base_dir, "whole", step=120))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(base_dir, number):
    process = start_training(base_dir, at_step=5, num_iterations=100_000)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    assert "stopped at step" in output and "Traceback" not in output
    step = int(output.split("stopped at step ")[1].split(";")[0])
    assert (base_dir / f"base_checkpoints/d2/meta_{step:06d}.json").exists()


def test_wandb_offline_writes_a_run_and_dummy_writes_nothing(base_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "wandb_runs"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "wandb_runs").mkdir()
    train(num_iterations=2, model_tag="dummy")
    assert list((tmp_path / "wandb_runs").iterdir()) == []
    train(num_iterations=2, model_tag="logged", run="trial")
    assert list((tmp_path / "wandb_runs").rglob("run-*.wandb"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dept=4"], "did you mean --depth?"),
        (["--depth=four"], "whole number"),
        (["--resume=maybe"], "auto"),
    ],
)
def test_wrong_flags_end_with_status_2_and_the_nearest_flag(arguments, message, capsys):
    from nanochat.configurator import parse

    with pytest.raises(SystemExit) as exit_info:
        parse(base_train.Config, arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_iterations": -1, "target_param_data_ratio": 0}, "no horizon"),
        ({"num_iterations": -1, "total_batch_size": 0}, "--total_batch_size=0 must be at least 1"),
        ({"max_seq_len": 0, "plan": 1, "device_batch_size": -1}, "--max_seq_len=0 must be at least 1"),
        ({"total_batch_size": 100}, "--total_batch_size=128"),
        ({"data_lanes": 3}, "--data_lanes="),
        ({"data_lanes": 32, "total_batch_size": 1024}, "row groups"),
        ({"device_type": "abacus"}, "cuda, mps, cpu"),
    ],
)
def test_settings_are_checked_before_training(base_dir, settings, message):
    with pytest.raises(UserError, match=message):
        train(**settings)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("tokenizer", "scripts.tok_train"), ("base_data", "nanochat.dataset")],
)
def test_what_is_missing_is_named_with_its_command(base_dir, capsys, missing, message):
    shutil.rmtree(base_dir / missing)
    with pytest.raises(SystemExit) as exit_info:
        base_train.main(base_train.Config(**SIZE))
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_shard_cut_short_is_named(base_dir):
    shard = base_dir / "base_data/shard_00001.parquet"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match="shard_00001.parquet"):
        train()


def test_training_speed_is_counted_over_all_micro_batches(base_dir):
    start = time.monotonic()
    train(device_batch_size=1)
    seconds = time.monotonic() - start
    section = json.loads((base_dir / "report/base_train.json").read_text(encoding="utf-8"))
    values = {name: value for item in section["data"] for name, value in item["values"].items()}
    assert values["tokens_per_second"] > SIZE["total_batch_size"] / seconds
    with open(base_dir / "base_checkpoints/d2/metrics.jsonl", encoding="utf-8") as f:
        speeds = [line["tokens_per_second"] for line in map(json.loads, f) if "tokens_per_second" in line]
    assert all(speed > SIZE["total_batch_size"] / seconds for speed in speeds)
