"""Checkpoints: whole or not there, found again, loaded into the right dtypes, and taken up by the right run."""

import errno
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from conftest import ByteTokenizer, random_tokens, randomized_model
from test_distributed import run_ranks

from nanochat import checkpoint_manager
from nanochat.checkpoint_manager import (
    build_model,
    check_tokenizer,
    checkpoint_root,
    clear_checkpoints,
    complete_steps,
    find_chat_source,
    find_common_step,
    find_largest_model,
    find_last_step,
    find_resume_step,
    load_checkpoint,
    load_model,
    load_weights,
    prune_checkpoints,
    read_meta,
    remove_checkpoint,
    resume_training,
    save_checkpoint,
    save_training,
    update_meta,
)
from nanochat.common import Runtime, UserError, compute_cleanup, file_lock
from nanochat.gpt import GPT
from nanochat.train import TrainMeter, accumulate_gradients, step_optimizers

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch) -> ByteTokenizer:
    """The tokenizer on disk."""
    tokenizer = ByteTokenizer()
    monkeypatch.setattr(checkpoint_manager, "get_tokenizer", lambda: tokenizer)
    return tokenizer


def save_model(folder: Path, step: int = 10, model: GPT | None = None, **meta) -> GPT:
    """A complete checkpoint of a random model, as base_train writes it."""
    model = model or randomized_model(seed=step)
    meta = {"model_config": asdict(model.config), "tokenizer_hash": ByteTokenizer().hash, "val_bpb": 1.5, **meta}
    save_checkpoint(folder, step, model.state_dict(), {"optimizers": [{"steps": step}]}, meta)
    return model


def save_tiny(folder: Path, *steps: int) -> None:
    """Complete checkpoints of one number."""
    for step in steps:
        save_checkpoint(folder, step, {"w": torch.tensor([float(step)])}, {"m": torch.zeros(3)}, {"val_bpb": None})


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def test_what_was_saved_is_loaded(tmp_path):
    save_checkpoint(tmp_path / "d2", 7, {"w": torch.arange(3)}, {"m": [torch.ones(2)], "steps": 4}, {"val_bpb": 1.25})
    assert sorted(os.listdir(tmp_path / "d2")) == ["meta_000007.json", "model_000007.pt", "optim_000007.pt"]
    model_data, optimizer_data, meta = load_checkpoint(tmp_path / "d2", 7, CPU, load_optimizer=True)
    assert model_data["w"].tolist() == [0, 1, 2]
    assert optimizer_data["m"][0].tolist() == [1, 1] and optimizer_data["steps"] == 4
    assert meta["step"] == 7 and meta["val_bpb"] == 1.25
    assert load_checkpoint(tmp_path / "d2", 7, CPU)[1] is None


def test_the_metadata_is_written_last(tmp_path, monkeypatch):
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    save_tiny(tmp_path, 3)
    assert order[-1] == "meta_000003.json" and sorted(order[:2]) == ["model_000003.pt", "optim_000003.pt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")])
@pytest.mark.parametrize("failing", ["w", "m"], ids=["model", "optimizer"])
def test_a_full_disk_is_a_user_error_and_the_checkpoint_before_stands(tmp_path, monkeypatch, error, failing):
    save_tiny(tmp_path, 10)
    save = torch.save

    def fail(data, f):
        save(data, f)
        if failing in data:
            raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError, match="is the disk full"):
        save_tiny(tmp_path, 20)
    assert complete_steps(tmp_path) == [10]
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_a_failed_second_save_of_a_step_is_not_taken_for_the_first(tmp_path, monkeypatch):
    """The new weights beside the old optimizer would look complete if the old metadata were left."""
    save_tiny(tmp_path, 10, 20)
    save = torch.save

    def fail(data, f):
        if "m" in data:  # the optimizer's
            raise OSError(errno.ENOSPC, "No space left on device")
        save(data, f)

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(UserError):
        save_tiny(tmp_path, 20)
    assert complete_steps(tmp_path) == [10]


def test_a_checkpoint_without_optimizer_is_complete_and_says_what_it_lacks(tmp_path):
    save_checkpoint(tmp_path, 5, {"w": torch.zeros(1)}, None, {})
    assert find_last_step(tmp_path) == 5
    with pytest.raises(UserError, match="optim_000005.pt"):
        load_checkpoint(tmp_path, 5, CPU, load_optimizer=True)


def test_measurements_are_added_to_the_metadata(tmp_path):
    save_tiny(tmp_path, 4)
    update_meta(tmp_path, 4, val_bpb=1.5, core_metric=0.25)
    meta = read_meta(tmp_path, 4)
    assert (meta["step"], meta["val_bpb"], meta["core_metric"]) == (4, 1.5, 0.25)
    assert complete_steps(tmp_path) == [4]


@pytest.mark.parametrize(
    ("keep", "left"), [(-1, [1, 2, 30, 4000]), (1, [4000]), (2, [30, 4000]), (9, [1, 2, 30, 4000])]
)
def test_pruning_keeps_the_newest(tmp_path, keep, left):
    save_tiny(tmp_path, 1, 2, 30, 4000)
    (tmp_path / "model_000001_backup.pt").write_bytes(b"mine")
    prune_checkpoints(tmp_path, keep)
    assert complete_steps(tmp_path) == left
    assert len([p for p in tmp_path.iterdir() if re.search(r"_\d{6}\.", p.name)]) == 3 * len(left)
    assert (tmp_path / "model_000001_backup.pt").exists()


@pytest.mark.parametrize("keep", [1, 2])
def test_pruning_does_not_count_what_is_damaged(tmp_path, keep):
    """However many newer ones are cut short, the good ones are the last to go."""
    save_tiny(tmp_path, 1, 2, 3, 4)
    for name in ("model_000003.pt", "optim_000004.pt"):
        (tmp_path / name).write_bytes(b"PK")
    prune_checkpoints(tmp_path, keep)
    assert complete_steps(tmp_path, resumable=True) == [1, 2][-keep:]


def test_a_removed_checkpoint_leaves_the_others_alone(tmp_path):
    save_tiny(tmp_path, 1, 2, 3)
    remove_checkpoint(tmp_path, 2)
    remove_checkpoint(tmp_path, 2)
    assert complete_steps(tmp_path) == [1, 3] and len(os.listdir(tmp_path)) == 6


def test_other_ranks_write_and_remove_nothing(tmp_path, monkeypatch):
    save_tiny(tmp_path, 1, 2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    save_tiny(tmp_path, 3)
    update_meta(tmp_path, 2, val_bpb=0.5)
    prune_checkpoints(tmp_path, 1)
    remove_checkpoint(tmp_path, 2)
    clear_checkpoints(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def test_the_last_step_is_the_largest_number_of_exactly_named_complete_files(tmp_path):
    save_tiny(tmp_path, 100, 999_999, 1_000_000)
    for name in (
        "model_000200_backup.pt",
        "old_model_3000000.pt",
        "model_4000000.pt.tmp",
        "model_5000000.pt",
        "model_.pt",
    ):
        (tmp_path / name).write_bytes(b"x")  # no metadata, or not a checkpoint's name
    assert find_last_step(tmp_path) == 1_000_000
    assert complete_steps(tmp_path) == [100, 999_999, 1_000_000]


@pytest.mark.parametrize("name", ["model_000020.pt", "optim_000020.pt", "meta_000020.json"])
@pytest.mark.parametrize("damage", ["cut short", "empty", "missing"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, name, damage):
    save_tiny(tmp_path, 10, 20)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -1])
    assert find_common_step(tmp_path) == 10
    assert find_last_step(tmp_path) == (20 if name.startswith("optim") else 10)
    expects_warning = (name, damage) not in {("meta_000020.json", "missing"), ("model_000020.pt", "missing")}
    assert ("warning: checkpoint 20" in capsys.readouterr().out) == expects_warning
    with pytest.raises(UserError):
        load_checkpoint(tmp_path, 20, CPU, load_optimizer=True)


def test_a_file_of_the_right_size_and_wrong_content_is_a_user_error(tmp_path):
    save_tiny(tmp_path, 10)
    path = tmp_path / "model_000010.pt"
    path.write_bytes(b"\x00" * path.stat().st_size)
    with pytest.raises(UserError, match="model_000010.pt cannot be read"):
        load_checkpoint(tmp_path, 10, CPU)


def test_a_missing_step_names_those_that_are_there(tmp_path):
    save_tiny(tmp_path, 10, 20)
    with pytest.raises(UserError, match="10, 20"):
        load_checkpoint(tmp_path, 15, CPU)


def test_no_checkpoint_at_all_is_a_user_error(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError):
            find_last_step(folder)
        with pytest.raises(UserError):
            find_largest_model(folder)


def test_the_largest_model_is_the_deepest_one_with_a_checkpoint(tmp_path):
    for tag in ("d4", "d12", "d9", "my_run"):
        save_tiny(tmp_path / tag, 1)
    (tmp_path / "d20").mkdir()  # a run that has not saved yet
    (tmp_path / "d99").write_bytes(b"")
    assert find_largest_model(tmp_path) == "d12"


def test_without_d_tags_the_newest_model_is_taken(tmp_path):
    for age, tag in enumerate(["newest", "older", "oldest"]):
        save_tiny(tmp_path / tag, 1)
        os.utime(tmp_path / tag, (1e9 - age, 1e9 - age))
    assert find_largest_model(tmp_path) == "newest"


# ---------------------------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize("source", ["base", "mid", "sft", "rl"])
def test_a_model_is_loaded_from_the_folder_of_its_stage(base_dir, source):
    names = {"base": "base", "mid": "mid", "sft": "chatsft", "rl": "chatrl"}
    folder = base_dir / f"{names[source]}_checkpoints" / "d2"
    model = save_model(folder)
    loaded, tokenizer, meta = load_model(source, CPU, "eval")
    ids = random_tokens(model.config, 2, 8)
    assert torch.equal(loaded(ids), model(ids))
    assert tokenizer.hash == ByteTokenizer().hash and not loaded.training
    assert (meta["source"], meta["model_tag"], meta["step"]) == (source, "d2", 10)
    assert Path(meta["checkpoint_dir"]) == folder == checkpoint_root(source) / "d2"


def test_tag_and_step_are_honoured_and_the_defaults_are_the_largest_and_the_last(base_dir):
    for tag, step in (("d2", 10), ("d2", 20), ("other", 30)):
        save_model(base_dir / "base_checkpoints" / tag, step)
    cases = {(None, None): ("d2", 20), ("", -1): ("d2", 20), ("d2", 10): ("d2", 10), ("other", None): ("other", 30)}
    for (tag, step), expected in cases.items():
        _, _, meta = load_model("base", CPU, "eval", model_tag=tag, step=step)
        assert (meta["model_tag"], meta["step"]) == expected


def test_a_missing_stage_names_the_command_and_an_unknown_one_the_known(base_dir):
    with pytest.raises(UserError, match="python -m scripts.mid_train"):
        load_model("mid", CPU, "eval")
    save_model(base_dir / "base_checkpoints" / "d2")
    with pytest.raises(UserError, match="python -m scripts.base_train"):
        load_model("base", CPU, "eval", model_tag="d3")
    with pytest.raises(UserError, match="base, mid, sft, rl"):
        load_model("pretrained", CPU, "eval")


@pytest.mark.parametrize(("phase", "training"), [("train", True), ("eval", False)])
def test_the_phase_is_the_models_mode(tmp_path, phase, training):
    save_model(tmp_path)
    assert build_model(tmp_path, 10, CPU, phase)[0].training is training


def test_the_origin_says_which_checkpoint_it_was_and_with_which_weights(base_dir):
    """A model that was trained anew under the same name and step is another origin."""
    folder = base_dir / "base_checkpoints" / "d2"
    save_model(folder, 10)
    first, again = (load_model("base", CPU, "train")[2]["origin"] for _ in range(2))
    assert first == again
    assert {**first, "fingerprint": ""} == {"source": "base", "model_tag": "d2", "step": 10, "fingerprint": ""}
    save_model(folder, 10, randomized_model(seed=99))
    other = load_model("base", CPU, "train")[2]["origin"]
    assert other != first and {**other, "fingerprint": first["fingerprint"]} == first
    json.dumps(first)


def test_a_chat_is_with_the_furthest_stage_that_has_a_whole_model(base_dir):
    with pytest.raises(UserError, match="no model to chat with.*speedrun.sh.*scripts.mid_train"):
        find_chat_source()
    save_model(base_dir / "base_checkpoints" / "d2")
    with pytest.raises(UserError, match="no model to chat with"):
        find_chat_source()  # a base model does not chat
    for source, folder in (("mid", "mid_checkpoints"), ("sft", "chatsft_checkpoints"), ("rl", "chatrl_checkpoints")):
        save_model(base_dir / folder / "any")
        assert find_chat_source() == source
    (base_dir / "chatrl_checkpoints" / "any" / "meta_000010.json").unlink()
    (base_dir / "chatrl_checkpoints" / "notes.txt").write_bytes(b"")
    assert find_chat_source() == "sft"
    save_model(base_dir / "mid_checkpoints" / "d4")
    assert find_chat_source("any") == "sft" and find_chat_source("d4") == "mid"
    with pytest.raises(UserError, match="no model 'd6' to chat with"):
        find_chat_source("d6")


def test_an_unknown_phase_is_refused(tmp_path):
    with pytest.raises(ValueError, match="test"):
        build_model(tmp_path, 10, CPU, "test")


def test_bf16_weights_load_as_float32_on_a_cpu(tmp_path):
    model = randomized_model()
    save_model(tmp_path, model=randomized_model().bfloat16())
    loaded = build_model(tmp_path, 10, CPU, "eval")[0]
    for p, original in zip(loaded.parameters(), model.parameters(), strict=True):
        assert p.dtype == torch.float32 and torch.equal(p, original.bfloat16().float())
    ids = random_tokens(model.config, 1, 4)
    assert loaded(ids).dtype == torch.float32


def test_the_prefix_of_compiled_models_is_removed_from_the_front_alone():
    received = {}

    class Model:
        def load_state_dict(self, state):
            received.update(state)

    load_weights(Model(), {"_orig_mod.gate.w": 1, "gate.w": 2, "mod._orig_mod.x": 3, "d.w": 4, "_orig_mod._o.w": 5})
    assert received == {"gate.w": 2, "mod._orig_mod.x": 3, "d.w": 4, "_o.w": 5}


def test_weights_of_a_compiled_model_load(tmp_path):
    model = randomized_model()
    compiled = {f"_orig_mod.{name}": value for name, value in model.state_dict().items()}
    meta = {"model_config": asdict(model.config)}
    save_checkpoint(tmp_path, 1, compiled, None, meta)
    loaded = build_model(tmp_path, 1, CPU, "eval")[0]
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


def test_another_tokenizer_on_disk_is_a_user_error(tmp_path, monkeypatch):
    save_model(tmp_path)
    monkeypatch.setattr(checkpoint_manager, "get_tokenizer", lambda: ByteTokenizer("another"))
    with pytest.raises(UserError, match="tokenizer") as error:
        build_model(tmp_path, 10, CPU, "eval")
    assert ByteTokenizer("another").hash in str(error.value) and ByteTokenizer().hash in str(error.value)


def test_metadata_without_a_tokenizer_hash_is_accepted(tokenizer):
    check_tokenizer({}, tokenizer, "d2")


class Payload:
    """Pickles to something that runs on loading."""

    def __reduce__(self):
        return os.mkdir, (os.environ["NANOCHAT_PAYLOAD"],)


def test_loading_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_PAYLOAD", str(tmp_path / "executed"))
    save_checkpoint(tmp_path / "d2", 1, {"w": Payload()}, None, {})
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path / "d2", 1, CPU)
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


@dataclass
class Config:
    run: str = "dummy"
    depth: int = 2
    matrix_lr: float = 0.02
    eval_every: int = 250
    eval_tokens: int = 1024
    sample_every: int = 100
    save_every: int = 50
    save_keep: int = 2
    log_every: int = 1
    core_metric_every: int = -1
    tokenized_cache: bool = True
    resume: str = "auto"


def save_run(folder: Path, *steps: int, **config) -> None:
    for step in steps:
        meta = {"user_config": asdict(Config(**config)), "tokenizer_hash": ByteTokenizer().hash}
        save_checkpoint(folder, step, {"w": torch.zeros(1)}, {}, meta)


def resume_step(folder: Path, name: str = "bytes", **config) -> int | None:
    config = Config(**config)
    return find_resume_step(folder, config, config.resume, ByteTokenizer(name))


def test_a_run_of_the_same_settings_is_taken_up_at_its_last_step(tmp_path):
    assert resume_step(tmp_path / "none") is None
    save_run(tmp_path, 50, 100)
    assert resume_step(tmp_path) == 100
    assert resume_step(tmp_path, resume="never") is None


def test_a_checkpoint_cut_short_is_not_resumed_from(tmp_path):
    save_run(tmp_path, 50, 100)
    (tmp_path / "optim_000100.pt").write_bytes(b"PK")
    assert resume_step(tmp_path) == 50


@pytest.mark.parametrize(
    "change",
    [
        {"run": "named"},
        {"eval_every": -1},
        {"eval_tokens": 99},
        {"sample_every": 7},
        {"save_every": 10},
        {"save_keep": -1},
        {"log_every": 20},
        {"core_metric_every": 5},
        {"tokenized_cache": False},
    ],
)
def test_what_is_measured_and_kept_may_change(tmp_path, change):
    save_run(tmp_path, 50)
    assert resume_step(tmp_path, **change) == 50


def test_other_settings_are_named_with_both_values_and_how_to_start_anew(tmp_path):
    save_run(tmp_path, 50)
    with pytest.raises(UserError) as error:
        resume_step(tmp_path, depth=3, matrix_lr=0.5, run="named")
    message = str(error.value)
    assert "depth=2 there, 3 here" in message and "matrix_lr=0.02 there, 0.5 here" in message
    assert "run=" not in message
    assert "--resume=never" in message and "--model_tag=" in message


def test_another_tokenizer_does_not_resume(tmp_path):
    save_run(tmp_path, 50)
    with pytest.raises(UserError, match="another tokenizer.*--resume=never"):
        resume_step(tmp_path, name="another")


@pytest.mark.parametrize("name", ["source", "model_tag", "step", "fingerprint"])
def test_a_run_that_started_from_another_checkpoint_does_not_resume(tmp_path, name):
    origin = {"source": "base", "model_tag": "d2", "step": 10, "fingerprint": "0123"}
    meta = {"user_config": asdict(Config()), "tokenizer_hash": ByteTokenizer().hash, "origin": origin}
    save_checkpoint(tmp_path, 50, {"w": torch.zeros(1)}, {}, meta)
    assert find_resume_step(tmp_path, Config(), "auto", ByteTokenizer(), origin) == 50
    with pytest.raises(UserError, match="another checkpoint.*--resume=never") as error:
        find_resume_step(tmp_path, Config(), "auto", ByteTokenizer(), {**origin, name: "other"})
    assert "\n" not in str(error.value)
    assert find_resume_step(tmp_path, Config(), "never", ByteTokenizer(), {**origin, name: "other"}) is None


class Run:
    """A training run of the tiny model as the scripts have one."""

    def __init__(self, seed: int = 0):
        self.model = randomized_model(seed=seed)
        self.optimizers = self.model.setup_optimizers()
        self.meter = TrainMeter(1.0, CPU)

    def train(self, steps: range) -> None:
        for step in steps:
            self.meter.start_step()
            ids = torch.randint(257, (2, 9))  # from the global generator, which the checkpoint has to restore
            loss = accumulate_gradients(self.model, [(ids[:, :-1], ids[:, 1:])], 16, CPU)
            step_optimizers(self.optimizers, 0.5, 0.9)
            self.meter.end_step(loss, 16)
            self.meter.note_val_bpb(2.0 - step)

    def save(self, folder: Path, step: int, **config) -> None:
        data = {"cursors": {0: {"epoch": 1}}, "origin": {"step": 3}}
        save_training(folder, step, self.model, self.optimizers, self.meter, Config(**config), ByteTokenizer(), **data)

    def resume(self, folder: Path, **config) -> tuple[int, dict]:
        config = Config(**config)
        return resume_training(folder, self.model, self.optimizers, self.meter, config, ByteTokenizer(), {"step": 3})


def test_a_run_that_was_saved_goes_on_in_the_same_bits(tmp_path):
    """Weights, both optimizers, the global random numbers, the meter, and what else the run wants to know."""
    torch.manual_seed(5)
    whole = Run()
    whole.train(range(3))
    whole.save(tmp_path, 3)
    whole.train(range(3, 6))
    torch.manual_seed(6)
    resumed = Run(seed=8)
    step, meta = resumed.resume(tmp_path)
    assert (step, meta["cursors"], meta["origin"]) == (3, {"0": {"epoch": 1}}, {"step": 3})
    resumed.train(range(3, 6))
    for p, q in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert resumed.meter.loss == whole.meter.loss and resumed.meter.updates == 6
    assert resumed.meter.min_val_bpb == whole.meter.min_val_bpb == -3.0
    assert resumed.meter.timed_steps == 0  # 6 steps in all, none of which is timed in its process


def spoil(path: Path) -> None:
    """Zeros where the content was, as a file system may leave them when the power fails."""
    path.write_bytes(b"\x00" * path.stat().st_size)


@pytest.mark.parametrize("name", ["model_000006.pt", "optim_000006.pt"])
def test_a_newest_checkpoint_that_cannot_be_read_falls_back_to_the_one_before(tmp_path, capsys, name):
    run = Run()
    for step in (2, 4, 6):
        run.save(tmp_path, step)
    spoil(tmp_path / name)
    assert Run(seed=8).resume(tmp_path)[0] == 4
    assert f"warning: checkpoint 6 is removed, as it cannot be used: {tmp_path / name}" in capsys.readouterr().out
    run.save(tmp_path, 5)
    prune_checkpoints(tmp_path, 1)  # what could not be read must not count as the newest
    assert complete_steps(tmp_path) == [5]


def test_where_no_checkpoint_can_be_read_none_is_removed(tmp_path):
    Run().save(tmp_path, 4)
    spoil(tmp_path / "optim_000004.pt")
    with pytest.raises(UserError, match="optim_000004.pt cannot be read"):
        Run().resume(tmp_path)
    assert complete_steps(tmp_path) == [4]


def resume_beside_another_run(runtime: Runtime, folder: Path) -> str:
    """What the ranks of a second run are told."""
    checkpoint_manager.CLAIM_SECONDS = 0.1
    with pytest.raises(UserError) as error:
        Run().resume(folder, resume="never")
    return str(error.value)


def test_a_second_run_leaves_the_folder_of_the_first_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_manager, "CLAIM_SECONDS", 0.1)
    Run().save(tmp_path, 4)
    assert Run().resume(tmp_path)[0] == 4  # it trains from here on, and may look again
    assert Run().resume(tmp_path)[0] == 4
    advice = f"train beside it with --model_tag=NAME (if there is none, remove {tmp_path}/.run.lock)"
    line = f"another run is training in {tmp_path}: wait for its end, or {advice}"
    assert run_ranks(2, resume_beside_another_run, tmp_path) == [line] * 2
    assert complete_steps(tmp_path) == [4]
    compute_cleanup()
    with file_lock(tmp_path / ".run"):
        assert "another run" in resume_beside_another_run(None, tmp_path)
    assert Run().resume(tmp_path)[0] == 4


def test_a_run_that_failed_after_a_checkpoint_says_so_when_it_goes_on_from_it(tmp_path, capsys):
    Run().save(tmp_path, 4)
    Run().resume(tmp_path)
    assert "failed before" not in capsys.readouterr().out
    update_meta(tmp_path, 4, failed_afterwards="step 6: the loss is nan")
    Run().resume(tmp_path)
    assert "the run has failed before, at step 6: the loss is nan" in capsys.readouterr().out


def damage_optimizer(folder: Path) -> None:
    (folder / "optim_000004.pt").write_bytes(b"PK")


@pytest.mark.parametrize(
    "damage",
    [
        damage_optimizer,
        lambda folder: (folder / "optim_000004.pt").unlink(),
        lambda folder: (folder / "meta_000004.json").write_text("", encoding="utf-8"),
    ],
)
def test_weights_that_cannot_be_trained_on_are_not_replaced_unasked(tmp_path, damage):
    run = Run()
    run.save(tmp_path, 4)
    damage(tmp_path)
    with pytest.raises(UserError, match=r"model_000004\.pt, but not all .*--resume=never starts anew and replaces it"):
        run.resume(tmp_path)
    assert run.resume(tmp_path, resume="never") == (0, {})
    assert (tmp_path / "model_000004.pt").exists()


def test_weights_without_metadata_are_those_of_a_first_save_that_was_cut_off(tmp_path):
    Run().save(tmp_path, 4)
    (tmp_path / "meta_000004.json").unlink()
    assert Run().resume(tmp_path) == (0, {})


@pytest.mark.parametrize("damage", [damage_optimizer, lambda folder: (folder / "optim_000004.pt").unlink()])
def test_without_its_optimizer_state_a_model_is_still_used(base_dir, damage):
    folder = checkpoint_root("sft") / "d2"
    save_model(folder, 4)
    damage(folder)
    assert find_chat_source() == "sft" and find_last_step(folder) == 4
    assert load_model("sft", CPU, "eval")[2]["step"] == 4
    assert complete_steps(folder) == [4] and complete_steps(folder, resumable=True) == []


def test_keeping_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="--save_keep=0.*1 or more"):
        Run().resume(tmp_path, save_keep=0)


def test_a_checkpoint_of_a_run_says_what_it_is(tmp_path):
    run = Run()
    run.save(tmp_path, 3, matrix_lr=0.5)
    meta = read_meta(tmp_path, 3)
    assert meta["model_config"] == asdict(run.model.config) and meta["user_config"]["matrix_lr"] == 0.5
    assert meta["tokenizer_hash"] == ByteTokenizer().hash and meta["world_size"] == 1
    assert "val_bpb" in meta and meta["val_bpb"] is None


def test_a_new_run_starts_at_0_and_leaves_the_former_one_for_now(tmp_path):
    run = Run()
    assert run.resume(tmp_path) == (0, {})
    run.save(tmp_path, 4)
    weights = [p.clone() for p in Run(seed=8).model.parameters()]
    anew = Run(seed=8)
    assert anew.resume(tmp_path, resume="never") == (0, {})
    assert complete_steps(tmp_path) == [4]  # guard.Saver removes it, when there is another
    assert all(torch.equal(p, q) for p, q in zip(anew.model.parameters(), weights, strict=True))


def test_clearing_removes_checkpoints_and_nothing_else(tmp_path):
    save_run(tmp_path, 50, 1_000_000)
    (tmp_path / "optim_000100.pt").write_bytes(b"left over")
    kept = ["metrics.jsonl", "model_000050_backup.pt", "notes.txt"]
    for name in kept:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    clear_checkpoints(tmp_path)
    clear_checkpoints(tmp_path / "none")
    assert sorted(os.listdir(tmp_path)) == kept


def test_metadata_is_plain_json(tmp_path):
    save_model(tmp_path, note="größer")
    meta = json.loads((tmp_path / "meta_000010.json").read_text(encoding="utf-8"))
    assert meta["note"] == "größer" and meta["model_config"]["n_layer"] == 2
