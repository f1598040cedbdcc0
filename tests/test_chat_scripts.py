"""Midtraining, finetuning, reinforcement learning and their evaluation, run for a few steps at depth 2.

The world is the pocket one, of which a few rows are left. Reinforcement learning gets a reward that a tiny model can
earn: whether the reply has a certain property, whatever the question was.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_distributed import PROCESSES, run_ranks

from dev.drill import odd_reward, write_small_world
from nanochat import engine
from nanochat.checkpoint_manager import checkpoint_root, complete_steps, load_model, read_meta, write_meta
from nanochat.common import Runtime, UserError
from nanochat.configurator import parse
from nanochat.dataloader import count_targets, padded_batches
from nanochat.task_eval import TaskResult
from nanochat.tokenizer import get_tokenizer
from scripts import base_train, chat_eval, chat_rl, chat_sft, mid_train, tok_train
from tasks import mixtures
from tasks.pocket import PocketMath

STEPS = 6
T = 64
BASE = {
    **{"depth": 2, "aspect_ratio": 16, "head_dim": 16, "max_seq_len": T, "num_iterations": 10, "save_every": 5},
    **{"device_batch_size": 8, "total_batch_size": 512, "data_lanes": 4},
    **{"eval_every": -1, "core_metric_every": -1, "sample_every": -1},
}
MID = {
    **{"max_seq_len": T, "num_iterations": STEPS, "device_batch_size": 4, "total_batch_size": 512, "data_lanes": 4},
    **{"eval_every": -1, "eval_tokens": 512},
}
SFT = {
    **{"num_iterations": STEPS, "device_batch_size": 4, "target_examples_per_step": 8, "init_lr_frac": 0.5},
    **{"eval_every": -1, "eval_steps": 3, "eval_metrics_every": -1},
}
RL = {
    **{"num_iterations": STEPS, "device_batch_size": 4, "examples_per_step": 2, "num_samples": 5, "max_new_tokens": 8},
    **{"rollout_batch_size": 4, "init_lr_frac": 0.5, "eval_every": -1, "eval_examples": 3, "eval_samples": 2},
    **{"save_every": -1},
}
# stage -> (its script, its settings, the folder of its checkpoints)
STAGES: dict[str, tuple[ModuleType, dict[str, Any], str]] = {
    "mid": (mid_train, MID, "mid_checkpoints"),
    "sft": (chat_sft, SFT, "chatsft_checkpoints"),
    "rl": (chat_rl, RL, "chatrl_checkpoints"),
}
MIXTURE_SIZES = {name: size for name, size in vars(mixtures).items() if re.match("POCKET_(MID|SFT)_", name)}
NUM_MADE = 8  # of what a mixture takes a certain number of


def make_small(setattr: Any = setattr) -> None:
    """Small mixtures and a reward that tiny models earn, in this process."""
    for name in MIXTURE_SIZES:
        setattr(mixtures, name, NUM_MADE)
    setattr(PocketMath, "reward", odd_reward)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch.setattr)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A base directory with a small pocket world, a tokenizer and models to start from; copy it, do not write to it."""
    folder = tmp_path_factory.mktemp("prepared")
    write_small_world(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        make_small(patch.setattr)
        tok_train.main.__wrapped__(tok_train.Config(vocab_size=400))
        base_train.main.__wrapped__(base_train.Config(**BASE))
        for stage in ("mid", "sft"):
            train(stage, num_iterations=4)
    return folder


@pytest.fixture
def base_dir(prepared, tmp_path, monkeypatch):
    """A copy of the prepared base directory, in use."""
    folder = tmp_path / "base"
    shutil.copytree(prepared, folder)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


def train(stage: str, output_tag: str = "d2", **settings: Any) -> dict[str, float]:
    script, defaults, _ = STAGES[stage]
    return script.main.__wrapped__(script.Config(output_tag=output_tag, **{**defaults, **settings}))


def stage_dir(base_dir: Path, stage: str, tag: str = "d2") -> Path:
    return base_dir / STAGES[stage][2] / tag


def metrics(base_dir: Path, stage: str, tag: str, name: str = "loss") -> dict[int, float]:
    """Step -> value of a metric."""
    with open(stage_dir(base_dir, stage, tag) / "metrics.jsonl", encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    return {line["step"]: line[name] for line in lines if name in line}


def weights(base_dir: Path, stage: str, tag: str, step: int = STEPS) -> dict[str, torch.Tensor]:
    return torch.load(stage_dir(base_dir, stage, tag) / f"model_{step:06d}.pt", weights_only=True)


def meta(base_dir: Path, stage: str, tag: str, step: int = STEPS) -> dict[str, Any]:
    return json.loads((stage_dir(base_dir, stage, tag) / f"meta_{step:06d}.json").read_text(encoding="utf-8"))


def report_values(base_dir: Path, section: str) -> dict[str, Any]:
    """All settings and values of a section of the report."""
    content = json.loads((base_dir / f"report/{section}.json").read_text(encoding="utf-8"))
    return {name: value for item in content["data"] if "values" in item for name, value in item["values"].items()}


def assert_equal_weights(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_close(one: dict[int, float], other: dict[int, float], tolerance: float = 1e-4) -> None:
    assert one.keys() == other.keys() and len(one) > 0
    assert all(abs(one[step] - other[step]) < tolerance for step in one), (one, other)


# ---------------------------------------------------------------------------------------------------------------------
# All three stages


@pytest.mark.parametrize("stage", STAGES)
def test_n_iterations_are_n_updates_without_any_evaluation(base_dir, stage):
    result = train(stage, "new")
    assert sorted(metrics(base_dir, stage, "new")) == list(range(1, STEPS + 1))
    assert metrics(base_dir, stage, "new", "val_bpb") == metrics(base_dir, stage, "new", "pass@1") == {}
    saved = meta(base_dir, stage, "new")
    assert saved["step"] == saved["meter"]["updates"] == STEPS and saved["val_bpb"] is None
    assert saved["model_config"]["n_layer"] == 2 and saved["user_config"]["num_iterations"] == STEPS
    assert result == {"loss": pytest.approx(result["loss"])}
    sections = {"mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}
    assert report_values(base_dir, sections[stage])["iterations"] == STEPS
    source = {"mid": "base_checkpoints/d2/model_000010.pt", "sft": "mid_checkpoints/d2/model_000004.pt"}
    before = torch.load(base_dir / source.get(stage, "chatsft_checkpoints/d2/model_000004.pt"), weights_only=True)
    for name, value in weights(base_dir, stage, "new").items():
        assert not torch.equal(before[name], value), name


@pytest.mark.parametrize("stage", STAGES)
def test_the_rates_start_whole_and_fall(base_dir, stage):
    """Midtraining holds its rates and lets them fall at the end; the others fall from the first step on."""
    train(stage, "new", num_iterations=10)
    found = list(metrics(base_dir, stage, "new", "lr_multiplier").values())
    if stage == "mid":
        assert found == pytest.approx([1.0] * 9 + [0.5])
    else:
        assert found == pytest.approx([0.5 * (1 - i / 10) for i in range(10)])


@pytest.mark.parametrize("stage", STAGES)
def test_measuring_changes_no_weight_and_is_kept_with_the_checkpoint(base_dir, stage):
    train(stage, "plain")
    extra = {"eval_metrics_every": 4} if stage == "sft" else {}
    result = train(stage, "measured", eval_every=2, save_every=3, save_keep=-1, **extra)
    assert_equal_weights(weights(base_dir, stage, "plain"), weights(base_dir, stage, "measured"))
    name = "pass@2" if stage == "rl" else "val_bpb"
    measured = metrics(base_dir, stage, "measured", name)
    assert sorted(measured) == [0, 2, 4, 6]
    assert meta(base_dir, stage, "measured")[name] == measured[6] == result[name]
    assert meta(base_dir, stage, "measured", 3).get(name) is None
    if stage == "sft":
        assert sorted(metrics(base_dir, "sft", "measured", "PocketMC")) == [4, 6]
    if stage != "rl":
        assert meta(base_dir, stage, "measured")["meter"]["min_val_bpb"] == min(measured.values())


@pytest.fixture(scope="module")
def whole_runs(prepared):
    """Stage -> (losses, weights) of an uninterrupted run."""
    known: dict[str, tuple[dict, dict]] = {}

    def run(base_dir: Path, stage: str) -> tuple[dict, dict]:
        if stage not in known:
            train(stage, "whole", save_every=2)
            known[stage] = metrics(base_dir, stage, "whole"), weights(base_dir, stage, "whole")
        return known[stage]

    return run


def run_until_signal(base_dir: str, stage: str, settings: dict[str, Any], number: int, at_update: int) -> None:
    """In a process of its own: train, and get a signal in the middle of an update."""
    os.environ["NANOCHAT_BASE_DIR"] = base_dir
    make_small()
    script, calls = STAGES[stage][0], []
    real = script.step_optimizers

    def interrupted(*args: Any, **kwargs: Any) -> float:
        calls.append(None)
        if len(calls) == at_update:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    script.step_optimizers = interrupted
    train(stage, "cut", **settings)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("number", "at_update", "saved"), [(signal.SIGKILL, 4, 2), (signal.SIGTERM, 3, 3)])
def test_a_run_that_was_ended_goes_on_to_the_same_bits(base_dir, whole_runs, capsys, stage, number, at_update, saved):
    """kill -9 leaves the last checkpoint; SIGTERM has the step finished and saved."""
    losses, expected = whole_runs(base_dir, stage)
    args = (str(base_dir), stage, {"save_every": 2}, number, at_update)
    process = PROCESSES.Process(target=run_until_signal, args=args)
    process.start()
    process.join(60)
    assert process.exitcode == (-9 if number == signal.SIGKILL else 143)
    capsys.readouterr()
    train(stage, "cut", save_every=2)
    assert f"resumed from step {saved} " in capsys.readouterr().out
    assert metrics(base_dir, stage, "cut") == losses
    assert_equal_weights(weights(base_dir, stage, "cut"), expected)


@pytest.mark.parametrize("stage", STAGES)
def test_a_finished_run_is_not_trained_again(base_dir, stage, capsys):
    train(stage, "new")
    capsys.readouterr()
    train(stage, "new")
    assert f"resumed from step {STEPS} " in capsys.readouterr().out
    assert meta(base_dir, stage, "new")["meter"]["updates"] == STEPS
    with pytest.raises(UserError, match="matrix_lr=0.02 there, 0.01 here"):
        train(stage, "new", matrix_lr=0.01)


@pytest.mark.parametrize("stage", STAGES)
def test_other_settings_name_the_flag_that_leaves_the_old_run_alone(base_dir, stage):
    train(stage, "new", num_iterations=1)
    with pytest.raises(UserError, match="--output_tag=NAME leaves it alone"):
        train(stage, "new", num_iterations=2)


@pytest.mark.parametrize(("stage", "source"), [("mid", "base"), ("sft", "mid"), ("rl", "sft")])
def test_the_origin_is_recorded_and_another_one_refuses_to_resume(base_dir, stage, source, capsys):
    train(stage, "new", num_iterations=2)
    origin = meta(base_dir, stage, "new", 2)["origin"]
    steps = {"base": 10, "mid": 4, "sft": 4}
    expected = {"source": source, "model_tag": "d2", "step": steps[source]}
    assert expected.items() <= origin.items() and len(origin["fingerprint"]) == 16
    path = checkpoint_root(source) / f"d2/model_{steps[source]:06d}.pt"
    data = torch.load(path, weights_only=True)
    data["transformer.h.0.attn.c_q.weight"] += 1e-3  # as if it had been trained anew
    torch.save(data, path)
    content = read_meta(path.parent, steps[source])
    write_meta(path.parent, steps[source], content | {"files": {path.name: path.stat().st_size}})
    script, defaults, _ = STAGES[stage]
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        script.main(script.Config(output_tag="new", **{**defaults, "num_iterations": 2}))
    error = capsys.readouterr().err
    assert exit_info.value.code == 1 and error.count("\n") == 1
    assert "another checkpoint" in error and "--resume=never" in error


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_a_run_does_not_go_on_with_more_conversations_in_its_file(base_dir, stage, tmp_path):
    path = tmp_path / "own.jsonl"
    line = json.dumps([{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Pico."}]) + "\n"
    path.write_text(3 * line, encoding="utf-8")
    train(stage, "new", num_iterations=2, data=str(path))
    train(stage, "new", num_iterations=2, data=str(path))  # as it was
    for changed in (4 * line, 2 * line + line.replace("Pico", "Paco")):
        path.write_text(changed, encoding="utf-8")
        with pytest.raises(UserError, match="with other data"):
            train(stage, "new", num_iterations=2, data=str(path))


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        ("mid", {"data_lanes": 100_000}),
        ("sft", {"num_iterations": -1, "num_epochs": 0}),
        ("rl", {"num_iterations": -1, "num_epochs": 0}),
        *((stage, {"run": "named"}) for stage in ("mid", "sft", "rl")),
    ],
)
def test_what_is_wrong_is_said_before_a_former_run_is_replaced(base_dir, stage, settings, monkeypatch):
    def refuse(run, *args):
        raise UserError("wandb cannot start")

    train(stage, "new", num_iterations=2)
    script = STAGES[stage][0]
    if "run" in settings:
        monkeypatch.setattr(script, "init_wandb", refuse)
    before = complete_steps(checkpoint_root(stage) / "new")
    with pytest.raises(UserError):
        train(stage, "new", **{"num_iterations": 2, **settings}, resume="never")
    assert complete_steps(checkpoint_root(stage) / "new") == before == [2]


def test_tag_and_step_of_the_base_model_are_honoured_and_the_context_is_ones_own(base_dir):
    shutil.copytree(base_dir / "base_checkpoints/d2", base_dir / "base_checkpoints/mine")
    train("mid", "", model_tag="mine", step=5, num_iterations=2, max_seq_len=T // 2)
    saved = meta(base_dir, "mid", "mine", 2)
    assert (saved["origin"]["model_tag"], saved["origin"]["step"]) == ("mine", 5)
    assert saved["model_config"]["sequence_len"] == T // 2  # the context that it was trained for
    assert report_values(base_dir, "mid_train")["base_model"] == "mine, step 5"


@pytest.mark.parametrize(
    ("stage", "missing", "command"),
    [
        ("mid", "base_checkpoints", "scripts.base_train"),
        ("sft", "mid_checkpoints", "scripts.mid_train"),
        ("rl", "chatsft_checkpoints", "scripts.chat_sft"),
    ],
)
def test_a_missing_stage_is_named_with_its_command(base_dir, stage, missing, command, capsys):
    shutil.rmtree(base_dir / missing)
    script, defaults, _ = STAGES[stage]
    with pytest.raises(SystemExit) as exit_info:
        script.main(script.Config(**defaults))
    error = capsys.readouterr().err
    assert exit_info.value.code == 1 and command in error and error.count("\n") == 1


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_a_file_of_ones_own_joins_the_mixture(base_dir, tmp_path, stage):
    messages = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am mine."}]
    own = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, count in zip(own, (5, 2), strict=True):
        path.write_text((json.dumps(messages) + "\n") * count, encoding="utf-8")
    section = {"mid": "mid_train", "sft": "chat_sft"}[stage]
    mixture = {"mid": mixtures.mid_train_mixture, "sft": mixtures.sft_mixture}[stage]("pocket")
    counts = []
    for tag, data in (("plain", ""), ("own", f"{own[0]}, {own[1]}")):
        train(stage, tag, num_iterations=1, data=data)
        counts.append(report_values(base_dir, section)["conversations"])
    assert counts == [len(mixture), len(mixture) + 7]
    own[1].write_text(json.dumps(messages) + "\n[]\n", encoding="utf-8")
    with pytest.raises(UserError, match="b.jsonl, line 2"):
        train(stage, "broken", num_iterations=1, data=f"{own[0]},{own[1]}")


def train_on_ranks(runtime: Runtime, stage: str, settings: dict[str, Any]) -> dict[str, float]:
    make_small()
    return train(stage, "two", **settings)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_the_same_model_and_one_can_take_over(base_dir, stage):
    extra = {"num_samples": 6} if stage == "rl" else {"eval_every": 3}
    train(stage, "one", **extra)
    for result in run_ranks(2, train_on_ranks, stage, {"save_every": 3, **extra}):
        assert set(result) >= {"loss"}
    names = {"rl": ("loss", "reward", "sample_tokens"), "sft": ("loss", "val_bpb"), "mid": ("loss", "val_bpb")}
    for name in names[stage]:
        assert_close(metrics(base_dir, stage, "one", name), metrics(base_dir, stage, "two", name))
    for path in stage_dir(base_dir, stage, "two").glob(f"*_{STEPS:06d}.*"):
        path.unlink()
    train(stage, "two", save_every=3, **extra)  # one process goes on from step 3
    assert_close(metrics(base_dir, stage, "one"), metrics(base_dir, stage, "two"))


# ---------------------------------------------------------------------------------------------------------------------
# Midtraining


def test_midtraining_runs_under_torchrun(base_dir, monkeypatch):
    """The whole command, with the mixture at its full size."""
    for name, size in MIXTURE_SIZES.items():
        monkeypatch.setattr(mixtures, name, size)
    train("mid", "one", num_iterations=3)
    flags = [f"--{name}={value}" for name, value in {**MID, "num_iterations": 3, "output_tag": "two"}.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, "-m", "scripts.mid_train", "--", *flags],
        env=environ,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert_close(metrics(base_dir, "mid", "one"), metrics(base_dir, "mid", "two"))
    assert meta(base_dir, "mid", "two", 3)["world_size"] == 2


def test_an_epoch_ends_when_all_conversations_have_been_read(base_dir):
    """As many steps as the rows of its conversations need, the rates following the progress through them."""
    train("mid", "epoch", num_iterations=-1)
    task, tokenizer = mixtures.mid_train_mixture("pocket"), get_tokenizer()
    rendered = [tokenizer.render_conversation(example, T + 1)[0] for example in task]
    progress = {}
    step = 0
    while not progress or progress[step] < 1.0:
        step += 1
        read_tokens, count = step * 512 // 4, 0
        for lane in range(4):
            left = read_tokens
            while left >= 0:
                for ids in rendered[lane::4]:
                    left -= len(ids)
                    count += left >= 0
        progress[step] = min(1.0, count / len(rendered))
    assert 5 < step < 50
    before = {1: 0.0, **{s + 1: p for s, p in progress.items() if s < step}}  # what the rate of an update depends on
    assert metrics(base_dir, "mid", "epoch", "progress") == pytest.approx(before)
    assert meta(base_dir, "mid", "epoch", step)["step"] == step
    rates = metrics(base_dir, "mid", "epoch", "lr_multiplier")
    assert rates == pytest.approx({s: min(1.0, (1 - p) / 0.2) for s, p in before.items()})
    assert rates[1] == 1.0 and rates[step] < 0.5


def test_no_conversation_may_have_ended_after_the_first_step(base_dir):
    """Every conversation is longer than a row, and a step takes one row from each lane."""
    train("mid", "new", num_iterations=-1, max_seq_len=4, total_batch_size=16)


def test_an_epoch_that_was_interrupted_ends_where_it_would_have(base_dir, monkeypatch):
    """The horizon is the progress through the data, which has to come back with the position in it."""
    train("mid", "whole", num_iterations=-1, save_every=3)
    calls = []
    real = mid_train.step_optimizers

    def dying(*args: Any) -> float:
        calls.append(None)
        if len(calls) == 5:
            raise InterruptedError
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(mid_train, "step_optimizers", dying)
        with pytest.raises(InterruptedError):
            train("mid", "cut", num_iterations=-1, save_every=3)
    train("mid", "cut", num_iterations=-1, save_every=3)
    for name in ("loss", "progress", "lr_multiplier"):
        assert metrics(base_dir, "mid", "cut", name) == metrics(base_dir, "mid", "whole", name)
    last = max(metrics(base_dir, "mid", "whole"))
    assert_equal_weights(weights(base_dir, "mid", "cut", last), weights(base_dir, "mid", "whole", last))


def test_midtraining_goes_on_into_a_second_epoch_and_resumes_there(base_dir, monkeypatch):
    long = {"num_iterations": 30, "save_every": 25}
    train("mid", "whole", **long)
    train("mid", "cut", **long)
    assert any(cursor["epoch"] >= 1 for cursor in meta(base_dir, "mid", "cut", 25)["cursors"].values())
    for path in stage_dir(base_dir, "mid", "cut").glob("*_000030.*"):
        path.unlink()
    train("mid", "cut", **long)
    assert_equal_weights(weights(base_dir, "mid", "cut", 30), weights(base_dir, "mid", "whole", 30))


def test_midtraining_lowers_the_loss(base_dir):
    train("mid", "new", num_iterations=25, eval_every=25, device_batch_size=-1)
    losses, val = metrics(base_dir, "mid", "new"), metrics(base_dir, "mid", "new", "val_bpb")
    assert losses[25] < losses[1] - 0.5 and val[25] < val[0] - 0.3


# ---------------------------------------------------------------------------------------------------------------------
# Supervised finetuning


def test_micro_batches_change_a_finetuning_step_only_by_rounding(base_dir):
    for size in (1, 3, 8, -1):
        train("sft", f"of {size}", device_batch_size=size)
    for size in (3, 8, -1):
        assert_close(metrics(base_dir, "sft", "of 1"), metrics(base_dir, "sft", f"of {size}"), 1e-4)


def test_the_first_loss_is_the_mean_over_what_assistants_say(base_dir):
    train("sft", "new", num_iterations=1)
    model, tokenizer, _ = load_model("mid", torch.device("cpu"), "eval", "d2", 4)
    task, total, count = mixtures.sft_mixture("pocket"), 0.0, 0
    for index in range(SFT["target_examples_per_step"]):
        ids, mask = tokenizer.render_conversation(task[index], T + 1)
        with torch.no_grad():
            each = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]), loss_reduction="none")
        total += (each * torch.tensor(mask[1:])).sum().item()
        count += sum(mask[1:])
    assert metrics(base_dir, "sft", "new")[1] == pytest.approx(total / count, rel=1e-5)
    assert report_values(base_dir, "chat_sft")["supervised_tokens"] == count


def test_conversations_that_are_cut_before_any_target_are_no_nan(base_dir, monkeypatch):
    """With rows of 4 tokens every conversation is cut in its question: nothing is learned, and nothing breaks."""
    monkeypatch.setattr(chat_sft, "sft_mixture", lambda recipe, data: PocketMath("train"))
    train("sft", "new", max_seq_len=4, num_iterations=2, eval_every=2)
    assert metrics(base_dir, "sft", "new") == {1: 0.0, 2: 0.0}
    assert_equal_weights(weights(base_dir, "sft", "new", 2), weights(base_dir, "mid", "d2", 4))


def test_finetuning_takes_a_base_model_too(base_dir):
    train("sft", "new", source="base", num_iterations=2)
    assert meta(base_dir, "sft", "new", 2)["origin"]["source"] == "base"


# ---------------------------------------------------------------------------------------------------------------------
# Reinforcement learning


@pytest.fixture
def rollouts(base_dir):
    """sample_rollouts on the finetuned model: rollouts(step, settings...)."""
    model, tokenizer, _ = load_model("sft", torch.device("cpu"), "train", "d2")
    task = PocketMath("train")

    def sample(step: int = 0, **settings: Any) -> chat_rl.Rollouts:
        return chat_rl.sample_rollouts(model, tokenizer, task, step, chat_rl.Config(**{**RL, **settings}))

    return sample


def sorted_rows(*parts: chat_rl.Rollouts) -> list:
    return sorted(row for part in parts for row in part.rows)


@pytest.mark.parametrize("world_size", [2, 4])
def test_rollouts_are_the_same_at_every_world_size(rollouts, monkeypatch, world_size):
    settings = {"examples_per_step": 6, "num_samples": 4}
    for step in (0, 3):  # step 3 goes on from the first question: 24 are wanted, and there are 16
        monkeypatch.delenv("RANK", raising=False)
        alone = rollouts(step, **settings)
        parts = []
        for rank in range(world_size):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world_size))
            parts.append(rollouts(step, **settings))
        assert sorted_rows(*parts) == sorted_rows(alone) and len(alone.rows) > 6
        assert sum(part.num_targets for part in parts) == alone.num_targets
        assert sorted(r for part in parts for r in part.rewards) == sorted(alone.rewards)


def test_rollouts_repeat_with_seed_and_step_and_only_with_them(rollouts):
    first = rollouts(0)
    assert rollouts(0) == first
    assert rollouts(0, seed=-42).rows != first.rows != rollouts(0, seed=43).rows
    assert rollouts(8).rows != first.rows  # the same two questions, an epoch later


def test_samples_of_a_question_differ_from_their_first_token_on(rollouts):
    [conversation] = PocketMath("train")[:1]
    prompt = get_tokenizer().render_for_completion(conversation)
    found = rollouts(examples_per_step=1, num_samples=16)
    assert all(row.tokens[: len(prompt)] == prompt for row in found.rows)
    assert len({row.tokens[len(prompt)] for row in found.rows}) > 4


def test_no_sample_is_lost_whatever_fits_a_batch(rollouts):
    results = [rollouts(num_samples=7, rollout_batch_size=size) for size in (1, 3, 100)]
    assert all(len(result.rewards) == 14 and 0 < sum(result.rewards) < 14 for result in results)
    assert results[0] == results[1] == results[2]


def test_advantages_are_rewards_above_the_mean_of_the_question(rollouts):
    found = rollouts(examples_per_step=2, num_samples=8)
    tokenizer = get_tokenizer()
    for number, conversation in enumerate(PocketMath("train")[:2]):
        prompt = tokenizer.render_for_completion(conversation)
        rewards = found.rewards[number * 8 : number * 8 + 8]
        own = [row for row in found.rows if row.tokens[: len(prompt)] == prompt]
        mean = sum(rewards) / 8
        assert 0 < mean < 1
        assert [row.weight for row in own] == pytest.approx([reward - mean for reward in rewards])


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_equal_rewards_have_nothing_to_teach(rollouts, monkeypatch, reward):
    monkeypatch.setattr(PocketMath, "reward", lambda *args: reward)
    found = rollouts()
    assert found.rows == [] and found.num_targets > 0 and found.rewards == [reward] * 10


def test_the_stop_token_is_trained_and_prompt_and_tool_output_are_not(rollouts, monkeypatch):
    """Two samples whose tokens are given: a call of the calculator, what it answers, a letter, the end."""
    tokenizer = get_tokenizer()
    special = tokenizer.encode_special
    call = [special("<|python_start|>"), *tokenizer.encode("2"), *tokenizer.encode("+"), *tokenizer.encode("3")]
    call.append(special("<|python_end|>"))
    output = [special("<|output_start|>"), *tokenizer.encode("5"), special("<|output_end|>")]
    letters = (tokenizer.encode("x"), tokenizer.encode("y"))
    end = special("<|assistant_end|>")
    scripts = [[*call, *output, *letter, end] for letter in letters]
    steps = iter(zip(*scripts, strict=True))
    monkeypatch.setattr(engine, "pick_tokens", lambda *args: torch.tensor(next(steps)))
    monkeypatch.setattr(PocketMath, "reward", lambda self, conversation, text: float(text == "x"))
    found = rollouts(examples_per_step=1, num_samples=2, rollout_batch_size=2, max_new_tokens=50)
    assert found.rewards == [1.0, 0.0]
    prompt = tokenizer.render_for_completion(PocketMath("train")[0])
    mask = [0] * len(prompt) + [1] * len(call) + [0] * len(output) + [1, 1]
    for row, script, weight in zip(found.rows, scripts, (0.5, -0.5), strict=True):
        assert (row.tokens, row.mask, row.weight) == (prompt + script, mask, weight)
    assert found.num_targets == count_targets(found.rows) == 2 * (len(call) + 2)
    _, targets, _ = next(padded_batches(found.rows, 2, end, "cpu"))
    assert targets[0][targets[0] >= 0].tolist() == [*call, *letters[0], end]


def test_the_same_seed_gives_the_same_run(base_dir):
    for tag, seed in (("a", 1), ("b", 1), ("c", 2)):
        train("rl", tag, seed=seed)
    for name in ("loss", "reward", "sample_tokens"):
        assert metrics(base_dir, "rl", "a", name) == metrics(base_dir, "rl", "b", name)
    assert_equal_weights(weights(base_dir, "rl", "a"), weights(base_dir, "rl", "b"))
    assert metrics(base_dir, "rl", "a") != metrics(base_dir, "rl", "c")


def test_steps_without_a_difference_change_no_weight(base_dir, monkeypatch):
    """Nor does momentum: the first step of three has something to teach, the others have not."""
    calls = []

    def reward(*args: Any) -> float:
        calls.append(None)
        return odd_reward(*args) if len(calls) <= 10 else 1.0

    monkeypatch.setattr(PocketMath, "reward", reward)
    train("rl", "new", num_iterations=3, save_every=1, save_keep=-1)
    first, last = (weights(base_dir, "rl", "new", step) for step in (1, 3))
    assert_equal_weights(first, last)
    source = weights(base_dir, "sft", "d2", 4)
    assert any(not torch.equal(first[name], source[name]) for name in first)
    assert metrics(base_dir, "rl", "new", "reward")[3] == 1.0 and metrics(base_dir, "rl", "new")[3] == 0.0


def test_micro_batches_change_a_policy_gradient_only_by_rounding(base_dir):
    for size in (1, 10, -1):  # -1: the most that fit
        train("rl", f"of {size}", device_batch_size=size, num_iterations=3)
    for other in ("of 10", "of -1"):
        assert_close(metrics(base_dir, "rl", "of 1"), metrics(base_dir, "rl", other), 1e-4)


def test_what_is_rewarded_is_learned(base_dir, monkeypatch):
    """Replies that hold the letter e: about half of them at first."""
    monkeypatch.setattr(PocketMath, "reward", lambda self, conversation, text: float("e" in text))
    train("rl", "new", num_iterations=12, num_samples=16, rollout_batch_size=32, device_batch_size=16)
    rewards = list(metrics(base_dir, "rl", "new", "reward").values())
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_samples": 1}, "--num_samples=1"),
        ({"temperature": 0.0}, "--temperature"),
        ({"top_k": -1}, "--top_k"),
        ({"rollout_batch_size": 0}, "--rollout_batch_size=0"),
        ({"device_batch_size": 0}, "--device_batch_size=0"),
        ({"num_iterations": -1, "num_epochs": 0}, "no horizon"),
    ],
)
def test_settings_of_reinforcement_learning_are_checked(base_dir, settings, message):
    with pytest.raises(UserError, match=message):
        train("rl", "new", **settings)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

ACCURACIES = {"PocketQA test": 0.5, "PocketMC test": 0.625, "PocketMath test": 0.1, "SpellingBee test": 0.0}


def evaluate(*argv: str) -> dict[str, float]:
    return chat_eval.main.__wrapped__(parse(chat_eval.Config, list(argv)))


@pytest.fixture
def given_accuracies(monkeypatch):
    """evaluate_task with known results, a task whose name is in the list failing."""
    failing: list[str] = []

    def fake(task: Any, *args: Any) -> TaskResult:
        if task.name in failing:
            raise MemoryError
        accuracy = ACCURACIES[task.name]
        return TaskResult(accuracy, 10, {1: accuracy, 2: accuracy + 0.25}, [f"an example of {task.name}"])

    monkeypatch.setattr(chat_eval, "evaluate_task", fake)
    return failing


def test_chatcore_is_the_mean_of_the_centered_accuracies_of_all_tasks(base_dir, given_accuracies):
    scores = evaluate("-i", "sft")
    expected = (0.5 + (0.625 - 0.25) / 0.75 + 0.1 + 0.0) / 4
    assert scores == {
        **{"PocketQA": 0.5, "PocketMC": 0.625, "PocketMath": 0.1, "SpellingBee": 0.0},
        "ChatCORE": pytest.approx(expected),
    }
    assert report_values(base_dir, "chat_eval_sft")["ChatCORE"] == pytest.approx(expected)
    assert "d2, step 4" in report_values(base_dir, "chat_eval_sft")["model"]


def test_some_tasks_alone_have_no_chatcore(base_dir, given_accuracies):
    assert evaluate("-i", "mid", "-a", "pocketmath | PocketQA") == {"PocketMath": 0.1, "PocketQA": 0.5}
    assert "ChatCORE" not in report_values(base_dir, "chat_eval_mid")


def test_a_part_does_not_replace_what_the_report_has_of_all(base_dir, given_accuracies, capsys):
    for part in (["-a", "PocketQA"], ["-x", "3"]):
        evaluate("-i", "sft", *part)
        assert report_values(base_dir, "chat_eval_sft")["PocketQA"] == 0.5  # there was nothing yet
    evaluate("-i", "sft")
    capsys.readouterr()
    before = report_values(base_dir, "chat_eval_sft")
    for part in (["-a", "PocketQA"], ["-x", "3"]):
        evaluate("-i", "sft", *part)
        assert "not for the report" in capsys.readouterr().out
        assert report_values(base_dir, "chat_eval_sft") == before
    evaluate("-i", "sft", "-t", "0.5")
    assert report_values(base_dir, "chat_eval_sft") == {**before, "temperature": 0.5}
    shutil.copytree(checkpoint_root("sft") / "d2", checkpoint_root("sft") / "d3")  # another model
    evaluate("-i", "sft", "-g", "d3", "-a", "PocketQA")
    assert report_values(base_dir, "chat_eval_sft")["model"] == "d3, step 4"


def test_all_tasks_by_name_in_any_order_have_one(base_dir, given_accuracies):
    scores = evaluate("-i", "sft", "-a", "SpellingBee|pocketmath|POCKETMC|PocketQA")
    assert scores == pytest.approx({**scores, "ChatCORE": (0.5 + 0.5 + 0.1 + 0.0) / 4})


def test_what_was_measured_is_in_the_report_when_a_later_task_fails(base_dir, given_accuracies):
    given_accuracies.append("PocketMath test")
    with pytest.raises(MemoryError):
        evaluate("-i", "sft", "-n", "2")
    values = report_values(base_dir, "chat_eval_sft")
    assert (values["PocketQA"], values["PocketMC"]) == (0.5, 0.625)
    assert "PocketMath" not in values and "ChatCORE" not in values
    text = (base_dir / "report/chat_eval_sft.md").read_text(encoding="utf-8")
    assert "pass@2" in text and "0.75" in text and "an example of PocketMC test" in text


def test_an_unknown_task_names_the_nearest_before_a_model_is_loaded(base_dir):
    shutil.rmtree(base_dir / "chatsft_checkpoints")
    with pytest.raises(UserError, match="'PocketMaths'; did you mean PocketMath?"):
        evaluate("-i", "sft", "-a", "PocketQA|PocketMaths")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-b", "0"], "--batch_size=0"),
        (["-n", "0"], "--num_samples=0"),
        (["-m", "0"], "--max_new_tokens=0"),
        (["-t", "-1"], "--temperature"),
        (["-k", "-1"], "--top_k"),
        (["-x", "0"], "--max_problems=0"),
    ],
)
def test_settings_of_an_evaluation_are_checked(base_dir, flags, message):
    with pytest.raises(UserError, match=message):
        evaluate("-i", "sft", *flags)


def test_a_tiny_model_goes_through_all_tasks_and_their_scores_repeat(base_dir, capsys):
    flags = ["-i", "sft", "-g", "d2", "-s", "4", "-x", "3", "-m", "6", "-n", "2", "-t", "1.0", "-k", "20", "-b", "5"]
    first = evaluate(*flags)
    assert sorted(first) == ["ChatCORE", "PocketMC", "PocketMath", "PocketQA", "SpellingBee"]
    assert all(score in (0.0, 1 / 6, 1 / 3, 0.5, 2 / 3, 5 / 6, 1.0) for name, score in first.items() if name[0] != "C")
    assert "PocketQA: " in capsys.readouterr().out
    assert evaluate(*flags) == first
    section = json.loads((base_dir / "report/chat_eval_sft.json").read_text(encoding="utf-8"))
    [rows] = [item["rows"] for item in section["data"] if item["kind"] == "table"]
    assert rows[0] == ["Task", "Problems", "Seconds", "pass@1", "pass@2"]
    assert [row[:2] for row in rows[1:]] == [
        [name, 3] for name in ("PocketQA", "PocketMC", "PocketMath", "SpellingBee")
    ]
