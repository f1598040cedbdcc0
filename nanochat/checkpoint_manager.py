"""Checkpoints: complete, atomic, and found again.

    <base>/base_checkpoints/d20/model_021400.pt   weights
                                optim_021400.pt   whole optimizer state, and the RNG (what resuming needs)
                                meta_021400.json  everything else; written last, it means "complete"
                                metrics.jsonl     what was measured on the way

Each file is written to a temporary name and renamed. The metadata records the sizes of the others, so that a file cut
short by a full disk or a crash is never taken for a checkpoint: the one before is used, with a warning. Without its
optimizer state a checkpoint serves for everything but going on with its training. Weights load with weights_only=True:
a checkpoint cannot execute anything.

Hosts that share no disk have all of it each (common.is_writer), and go on from the last step that none of them lacks.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nanochat.common import (
    UserError,
    atomic_write,
    barrier,
    check_same,
    gather_objects,
    get_base_dir,
    get_dist_info,
    hold_lock,
    is_writer,
    print0,
)
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import get_tokenizer

CHECKPOINT_DIRS = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
STAGE_COMMANDS = {
    "base": "python -m scripts.base_train",
    "mid": "python -m scripts.mid_train",
    "sft": "python -m scripts.chat_sft",
    "rl": "python -m scripts.chat_rl",
}
CHAT_SOURCES = ("rl", "sft", "mid")  # the stages whose models chat, the furthest first
# Settings that may change between the parts of one run, by the beginning of their names: they say where and in which
# portions it is computed, what is measured and what is kept, not what is trained. runs/stage.sh has a list of its own.
FREE_SETTINGS = (
    *("run", "resume", "device_type", "device_batch_size", "compile", "tokenized_cache"),
    *("eval_", "sample_", "save_", "log_", "core_metric_", "plan"),
)
CLAIM_SECONDS = 10.0  # a run that was told to stop may need so long to be gone


def checkpoint_root(source: str) -> Path:
    """The folder of a stage's checkpoints, one folder a model in it. source: base, mid, sft or rl."""
    if source not in CHECKPOINT_DIRS:
        raise UserError(f"unknown checkpoint source {source!r}: one of {', '.join(CHECKPOINT_DIRS)} is wanted")
    return get_base_dir() / CHECKPOINT_DIRS[source]


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def save_checkpoint(
    checkpoint_dir: str | Path,
    step: int,
    model_data: dict[str, torch.Tensor],
    optimizer_data: Any,
    meta_data: dict[str, Any],
) -> None:
    """Write a checkpoint; is_writer writes, every rank must call (and must have gathered optimizer_data before).

    optimizer_data may be None (a checkpoint that cannot be resumed). Raises UserError when the disk is full.
    """
    folder = Path(checkpoint_dir)
    files = {f"model_{step:06d}.pt": model_data}
    if optimizer_data is not None:
        files[f"optim_{step:06d}.pt"] = optimizer_data
    if is_writer():
        with _named_disk_errors(folder, step):
            # a checkpoint of this step may be there already: without its metadata it no longer counts as complete
            _meta_path(folder, step).unlink(missing_ok=True)
            for name, data in files.items():
                with atomic_write(folder / name, "wb") as f:
                    torch.save(data, f)
    barrier()  # one disk is slower than another: it becomes complete on all hosts within moments
    if is_writer():
        with _named_disk_errors(folder, step):
            sizes = {name: (folder / name).stat().st_size for name in files}
            write_meta(folder, step, {"step": step, "files": sizes, **meta_data})
            for partial in folder.glob(".*.tmp"):  # what a kill in the middle of an earlier save left behind
                partial.unlink()
    barrier()


@contextlib.contextmanager
def _named_disk_errors(folder: Path, step: int) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        raise UserError(f"cannot write checkpoint {step} to {folder}: {error} (is the disk full?)") from error


def write_meta(checkpoint_dir: str | Path, step: int, meta_data: dict[str, Any]) -> None:
    """Write or replace the metadata of a checkpoint, atomically. Local: call where is_writer."""
    with atomic_write(_meta_path(Path(checkpoint_dir), step)) as f:
        json.dump(meta_data, f, indent=2)


def update_meta(checkpoint_dir: str | Path, step: int, **changes: Any) -> None:
    """Add to the metadata of a checkpoint what was measured after it was saved. Local: is_writer writes."""
    if is_writer():
        write_meta(checkpoint_dir, step, {**read_meta(checkpoint_dir, step), **changes})


def prune_checkpoints(checkpoint_dir: str | Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints (-1 keeps all). Local: is_writer removes."""
    folder = Path(checkpoint_dir)
    if keep < 0 or not is_writer():
        return
    for step in complete_steps(folder, resumable=True)[:-keep] if keep else []:
        remove_checkpoint(folder, step)


def remove_checkpoint(checkpoint_dir: str | Path, step: int) -> None:
    """Remove a checkpoint, its metadata first. Local: is_writer removes."""
    folder = Path(checkpoint_dir)
    if is_writer():
        for path in (_meta_path(folder, step), folder / f"model_{step:06d}.pt", folder / f"optim_{step:06d}.pt"):
            path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Finding


def _meta_path(folder: Path, step: int) -> Path:
    return folder / f"meta_{step:06d}.json"


def _meta_of(weights: Path) -> Path:
    """The path of the metadata that a model_<step>.pt has beside it."""
    return weights.with_name(weights.name.replace("model_", "meta_", 1)).with_suffix(".json")


def read_meta(checkpoint_dir: str | Path, step: int) -> dict[str, Any]:
    """The metadata of a checkpoint. Raises UserError where there is none or it cannot be read."""
    path = _meta_path(Path(checkpoint_dir), step)
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        steps = complete_steps(path.parent)
        have = f"there are steps {', '.join(map(str, steps))}" if steps else "there is none at all"
        raise UserError(f"no checkpoint of step {step} in {path.parent}: {have}") from None
    except ValueError as error:
        raise UserError(f"{path} is no checkpoint metadata: {error}; remove it to use another step") from None


def complete_steps(checkpoint_dir: str | Path, resumable: bool = False) -> list[int]:
    """The steps of all checkpoints in a folder whose weights are whole, ascending; resumable: and all else, too.

    Those that are left out are reported.
    """
    steps = []
    folder = Path(checkpoint_dir)
    for path in folder.glob("model_*.pt") if folder.is_dir() else []:
        match = re.fullmatch(r"model_(\d+)\.pt", path.name)
        if match and _meta_of(path).exists():
            problem = _damage(folder, int(match[1]), resumable)
            if problem:
                print0(f"warning: checkpoint {int(match[1])} in {folder} is not used: {problem}")
            else:
                steps.append(int(match[1]))
    return sorted(steps)


def _damage(folder: Path, step: int, resumable: bool) -> str | None:
    """What is wrong with the files of a checkpoint, or None. The optimizer state counts where it is to be resumable."""
    try:
        with open(_meta_path(folder, step), encoding="utf-8") as f:
            sizes = json.load(f).get("files", {})
    except (ValueError, OSError):
        return "its metadata cannot be read"
    for name, size in sizes.items():
        if name.startswith("optim_") and not resumable:
            continue
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found != size:
            return f"{name} has {found} of {size} bytes"
    return None


def find_last_step(checkpoint_dir: str | Path) -> int:
    """The largest step that has a complete checkpoint. Raises UserError where there is none."""
    steps = complete_steps(checkpoint_dir)
    if not steps:
        raise UserError(f"no complete checkpoint in {checkpoint_dir}")
    return steps[-1]


def find_largest_model(checkpoints_dir: str | Path) -> str:
    """The tag of the model to use by default: the deepest d<N>, else the one that was written last.

    Only folders with a complete checkpoint count. Raises UserError where there is none.
    """
    folder = Path(checkpoints_dir)
    tags = [p.name for p in folder.iterdir() if p.is_dir() and complete_steps(p)] if folder.is_dir() else []
    if not tags:
        raise UserError(f"no checkpoints in {folder}")
    depths = {tag: int(tag[1:]) for tag in tags if re.fullmatch(r"d\d+", tag)}
    if depths:
        return max(depths, key=depths.get)
    return max(tags, key=lambda tag: (folder / tag).stat().st_mtime)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_checkpoint(
    checkpoint_dir: str | Path, step: int, device: torch.device | str, load_optimizer: bool = False
) -> tuple[dict[str, torch.Tensor], Any, dict[str, Any]]:
    """(model_data, optimizer_data or None, meta_data) of a checkpoint, tensors on the device. Local."""
    folder = Path(checkpoint_dir)
    meta = read_meta(folder, step)
    problem = _damage(folder, step, load_optimizer)
    if problem:
        raise UserError(f"checkpoint {step} in {folder} is damaged: {problem}; choose another --step")
    model_data = _load_tensors(folder / f"model_{step:06d}.pt", device)
    optimizer_data = _load_tensors(folder / f"optim_{step:06d}.pt", "cpu") if load_optimizer else None
    return model_data, optimizer_data, meta


def _load_tensors(path: Path, device: torch.device | str) -> Any:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def build_model(checkpoint_dir: str | Path, step: int, device: torch.device, phase: str) -> tuple[GPT, Any, dict]:
    """(model, tokenizer, meta_data) of a checkpoint; phase 'train' or 'eval' sets the model's mode. Local.

    Raises UserError where the tokenizer on disk is not the one that the model was trained with.
    """
    if phase not in ("train", "eval"):
        raise ValueError(f"phase={phase!r} is not one of train, eval")
    model_data, _, meta = load_checkpoint(checkpoint_dir, step, device)
    tokenizer = get_tokenizer()
    check_tokenizer(meta, tokenizer, checkpoint_dir)
    with torch.device("meta"):
        model = GPT(GPTConfig(**meta["model_config"]))
    model.to_empty(device=device)
    model.prepare()
    load_weights(model, model_data)
    return model.train(phase == "train"), tokenizer, meta


def load_weights(model: GPT, model_data: dict[str, torch.Tensor]) -> None:
    """Copy weights into a model, into its own dtypes; the prefix of compiled models is taken off the names."""
    model.load_state_dict({name.removeprefix("_orig_mod."): value for name, value in model_data.items()})


def load_model(
    source: str, device: torch.device, phase: str, model_tag: str | None = None, step: int | None = None
) -> tuple[GPT, Any, dict]:
    """(model, tokenizer, meta_data) of a stage's checkpoint: base, mid, sft or rl.

    model_tag None or '' takes the largest model, step None or -1 the last one. meta_data gains "source", "model_tag"
    and "checkpoint_dir", which say which checkpoint it was, and "origin", the same for the metadata of runs that start
    from it. Raises UserError, naming the command, where there is none. Every rank must call: it raises, too, where the
    ranks found different ones.
    """
    root = checkpoint_root(source)
    try:
        tag = model_tag or find_largest_model(root)
        if not (root / tag).is_dir():
            tags = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
            raise UserError(f"no model {tag!r} in {root}" + (f" (there is {', '.join(tags)})" if tags else ""))
        step = find_last_step(root / tag) if step is None or step < 0 else step
    except UserError as error:
        raise UserError(f"{error}: run {STAGE_COMMANDS[source]} first") from None
    print0(f"model: {root / tag}, step {step}")
    model, tokenizer, meta = build_model(root / tag, step, device, phase)
    origin = {"source": source, "model_tag": tag, "step": step, "fingerprint": _fingerprint(model)}
    check_same(f"the checkpoints in {root}", origin)
    found = {"source": source, "model_tag": tag, "checkpoint_dir": str(root / tag), "origin": origin}
    return model, tokenizer, {**meta, **found}


def find_chat_source(model_tag: str = "") -> str:
    """The furthest stage that has a model to chat with, of that tag if one is given: rl, sft or mid.

    Raises UserError where no stage has one.
    """
    for source in CHAT_SOURCES:
        root = checkpoint_root(source)
        folders = [root / model_tag] if model_tag else sorted(root.iterdir()) if root.is_dir() else []
        if any(folder.is_dir() and complete_steps(folder) for folder in folders):
            return source
    named = f" {model_tag!r}" if model_tag else ""
    raise UserError(
        f"there is no model{named} to chat with in {get_base_dir()}: run `bash speedrun.sh`, or {STAGE_COMMANDS['mid']}"
    )


def _fingerprint(model: GPT) -> str:
    """16 hex digits that stand for a model's weights: SHA-256 of one matrix, which every update changes."""
    matrix = model.transformer.h[0].attn.c_q.weight.detach().float().cpu().contiguous()
    return hashlib.sha256(matrix.numpy().tobytes()).hexdigest()[:16]


def check_tokenizer(meta: dict[str, Any], tokenizer: Any, checkpoint_dir: str | Path) -> None:
    """Raise UserError unless the tokenizer is the one that a checkpoint's metadata names."""
    expected = meta.get("tokenizer_hash")
    if expected and expected != tokenizer.hash:
        raise UserError(
            f"the tokenizer on disk ({tokenizer.hash}) is not the one that {checkpoint_dir} was trained with "
            f"({expected}): put that tokenizer back, or train the model again"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


def save_training(
    checkpoint_dir: str | Path,
    step: int,
    model: GPT,
    optimizers: list[Any],
    meter: Any,
    config: Any,
    tokenizer: Any,
    **meta_data: Any,
) -> None:
    """Save a run so that resume_training can take it up. Every rank must call.

    meta_data: what else the run needs to know when it goes on, JSON-able.
    """
    optimizer_data = {"optimizers": [o.state_dict() for o in optimizers], "rng": torch.get_rng_state()}
    meta = {
        "model_config": asdict(model.config),
        "user_config": asdict(config),
        "tokenizer_hash": tokenizer.hash,
        "val_bpb": None,  # measured after the save, and added then
        "meter": meter.state_dict(),
        "world_size": get_dist_info()[3],
        **meta_data,
    }
    save_checkpoint(checkpoint_dir, step, model.state_dict(), optimizer_data, meta)


def resume_training(
    checkpoint_dir: str | Path,
    model: GPT,
    optimizers: list[Any],
    meter: Any,
    config: Any,
    tokenizer: Any,
    origin: dict[str, Any] | None = None,
) -> tuple[int, dict[str, Any]]:
    """(step, meta_data) from which a run goes on, with its state in model, optimizers and meter; (0, {}) for a new run.

    What a new run replaces stays until it saves (guard.Saver). origin: the checkpoint and the data that the run starts
    from. Where the newest checkpoint has the right size but cannot be read, the one before is taken. Every rank must
    call. Raises UserError as claim_run and find_resume_step do, and where no checkpoint can be read: that they are lost
    is the user's to say.
    """
    if config.save_keep == 0:
        raise UserError("--save_keep=0 would keep no checkpoint: 1 or more are wanted, or -1 for all")
    claim_run(checkpoint_dir, config)
    check_same("the tokenizer", tokenizer.hash)
    check_same("the data", origin)
    step = find_resume_step(checkpoint_dir, config, config.resume, tokenizer, origin)
    if step is None:
        return 0, {}
    while True:
        problem = ""
        try:
            model_data, optimizer_data, meta = load_checkpoint(checkpoint_dir, step, "cpu", load_optimizer=True)
        except UserError as error:
            problem = str(error)
        problem = next(filter(None, gather_objects(problem)), "")
        if not problem:
            break
        unreadable, step = step, find_common_step(checkpoint_dir, before=step)
        if step is None:
            raise UserError(problem)
        print0(f"warning: checkpoint {unreadable} is removed, as it cannot be used: {problem}")
        remove_checkpoint(checkpoint_dir, unreadable)
    load_weights(model, model_data)
    for optimizer, state in zip(optimizers, optimizer_data["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    torch.set_rng_state(optimizer_data["rng"])
    meter.load_state_dict(meta["meter"])
    print0(f"resumed from step {step} of {checkpoint_dir}")
    if "failed_afterwards" in meta:
        print0(f"warning: from this checkpoint on the run has failed before, at {meta['failed_afterwards']}")
    return step, meta


def claim_run(checkpoint_dir: str | Path, config: Any) -> None:
    """Keep other runs out of a folder of checkpoints until this one ends. Every rank must call.

    Raises UserError, on all ranks, where another run trains there: the two would replace each other's checkpoints.
    """
    lock = Path(checkpoint_dir) / ".run"
    is_free = not is_writer() or hold_lock(lock, CLAIM_SECONDS)
    if not all(gather_objects(is_free)):
        raise UserError(
            f"another run is training in {checkpoint_dir}: wait for its end, or train beside it with "
            f"{_other_folder(config)} (if there is none, remove {lock}.lock)"
        )


def _other_folder(config: Any) -> str:
    """The setting by which a training script writes to another folder."""
    return f"--{'output_tag' if hasattr(config, 'output_tag') else 'model_tag'}=NAME"


def find_resume_step(
    checkpoint_dir: str | Path, config: Any, resume: str, tokenizer: Any, origin: dict[str, Any] | None = None
) -> int | None:
    """The step from which a run goes on, or None for a new run. The same on every rank; every rank must call.

    resume: 'auto' takes up the checkpoint of a run with the same settings, if there is one; 'never' starts anew.
    Raises UserError where the folder holds a run with other settings, another tokenizer or another origin, naming the
    differences, or one that lacks what it takes to go on. Starting anew would replace it: that is the user's to say.
    """
    if resume == "never":
        return None
    step = find_common_step(checkpoint_dir)
    anew = f"--resume=never starts anew and replaces it, {_other_folder(config)} leaves it alone"
    if step is None:
        unusable = [path.name for path in Path(checkpoint_dir).glob("model_*.pt") if _meta_of(path).exists()]
        for name in sum(gather_objects(unusable), []):
            raise UserError(f"{checkpoint_dir} holds {name}, but not all that it takes to go on from it: {anew}")
        return None
    meta = read_meta(checkpoint_dir, step)
    saved, current = meta.get("user_config", {}), asdict(config)
    names = [name for name in {**saved, **current} if not name.startswith(FREE_SETTINGS)]
    changed = [f"{n}={saved.get(n)} there, {current.get(n)} here" for n in names if saved.get(n) != current.get(n)]
    if changed:
        raise UserError(f"{checkpoint_dir} holds a run with other settings ({'; '.join(changed)}): {anew}")
    if meta.get("tokenizer_hash") != tokenizer.hash:
        raise UserError(f"{checkpoint_dir} holds a run with another tokenizer: {anew}")
    if meta.get("origin") != origin:
        raise UserError(f"{checkpoint_dir} holds a run that started from another checkpoint or with other data: {anew}")
    return step


def find_common_step(checkpoint_dir: str | Path, before: int | None = None) -> int | None:
    """The last step (before that one) whose checkpoint no rank lacks; None where none has any. Every rank must call.

    Hosts that share no disk differ by a step where one of them died while they were saving. Raises UserError where a
    host has nothing of what the others have: a run that starts anew on all of them would remove it.
    """
    steps = complete_steps(checkpoint_dir, resumable=True)
    found = gather_objects([step for step in steps if before is None or step < before])
    common = set(found[0]).intersection(*found)
    if any(found) and not common:
        raise UserError(
            f"the hosts have no checkpoint in common in {checkpoint_dir}: copy the folder from the one that has the "
            "last one to the others, or start anew with --resume=never"
        )
    return max(common, default=None)


def clear_checkpoints(checkpoint_dir: str | Path) -> None:
    """Remove a former run's checkpoints, lest its last step be taken for the new run's. Every rank must call."""
    if is_writer() and Path(checkpoint_dir).is_dir():
        for path in Path(checkpoint_dir).iterdir():
            if re.fullmatch(r"(model|optim|meta)_\d+\.(pt|json)", path.name):
                path.unlink()
    barrier()
