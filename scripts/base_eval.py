"""Measure a base model on CORE, the 22 few-shot tasks of DCLM.

    python -m scripts.base_eval
    python -m scripts.base_eval --hf_path=openai-community/gpt2
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval -- --max_per_task=500

Reads base_checkpoints/ (or a Hugging Face model, through transformers) and eval_bundle/; writes base_eval/<model>.csv
and report/base_eval.md.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.common import (
    UserError,
    atomic_write,
    autocast,
    compute_init,
    get_base_dir,
    is_writer,
    print0,
    user_errors,
)
from nanochat.configurator import opt, parse
from nanochat.core_eval import evaluate_model
from nanochat.report import get_report
from nanochat.tokenizer import HuggingFaceTokenizer


@dataclass
class Config:
    device_type: str = opt("", "cuda, mps or cpu; empty finds the best there is")
    max_per_task: int = opt(-1, "examples a task; -1 is all")
    hf_path: str = opt("", "local folder or hub name of a Hugging Face model to measure instead; empty is our own")
    model_tag: str = opt("", "checkpoint folder; empty is the largest model")
    step: int = opt(-1, "checkpoint step; -1 is the last")


class HFModel(torch.nn.Module):
    """A causal language model of transformers, as core_eval wants it: its states are the logits themselves."""

    takes_kv_cache = False  # it has caches of its own kind

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.config = model.config
        self.max_prompt_tokens = getattr(model.config, "max_position_embeddings", None)

    def hidden(self, idx: torch.Tensor) -> torch.Tensor:
        """Logits (B, T, V) for tokens idx (B, T) int64."""
        return self.model(idx, use_cache=False).logits

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The states in float32."""
        return states.float()


def load_hf_model(path: str, device: torch.device) -> tuple[HFModel, HuggingFaceTokenizer]:
    """A Hugging Face model in float32 and its tokenizer, from a local folder or the hub.

    Raises UserError when transformers is not installed, when there is no such model, and when its tokenizer has no
    token to begin a document.
    """
    try:
        from transformers import AutoModelForCausalLM  # no dependency of the project
    except ImportError:
        raise UserError(f"--hf_path={path} needs transformers: run `uv pip install transformers`") from None
    tokenizer = HuggingFaceTokenizer.from_pretrained(path)
    tokenizer.get_bos_token_id()  # a tokenizer that has none should be missed before the model is loaded
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"--hf_path={path}: transformers cannot load this model ({error})") from None
    return HFModel(model.to(device)), tokenizer


def write_csv(path: Path, core: dict[str, Any]) -> None:
    """Write a line for each task, and one for CORE, whose accuracy is left empty."""
    with atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["Task", "Accuracy", "Centered"])
        for task, accuracy in core["results"].items():
            writer.writerow([task, f"{accuracy:.6f}", f"{core['centered_results'][task]:.6f}"])
        writer.writerow(["CORE", "", f"{core['core_metric']:.6f}"])


def print_table(core: dict[str, Any]) -> None:
    """Print the tasks with their accuracy and centred accuracy, then CORE."""
    width = max(map(len, core["results"]))
    print0(f"{'task':<{width}}  accuracy  centered")
    for task, accuracy in core["results"].items():
        print0(f"{task:<{width}}  {accuracy:8.4f}  {core['centered_results'][task]:8.4f}")
    print0(f"{'CORE':<{width}}  {'':8}  {core['core_metric']:8.4f}")


@user_errors
def main(config: Config) -> dict[str, Any]:
    """Return {"results", "centered_results", "core_metric"}, see core_eval.evaluate_model."""
    # Setup
    runtime = compute_init(config.device_type)
    if config.hf_path:
        model, tokenizer = load_hf_model(config.hf_path, runtime.device)
        name, file_name = config.hf_path, re.sub(r"\W+", "-", config.hf_path).strip("-")
    else:
        model, tokenizer, meta = load_model("base", runtime.device, "eval", config.model_tag, config.step)
        name, file_name = f"{meta['model_tag']}, step {meta['step']}", f"{meta['model_tag']}_{meta['step']:06d}"

    # CORE
    with autocast(runtime.device):
        core = evaluate_model(model, tokenizer, runtime.device, config.max_per_task)

    # Finish
    path = get_base_dir() / "base_eval" / f"{file_name}.csv"
    if is_writer():
        write_csv(path, core)
    print_table(core)
    print0(f"written to {path}")
    tasks = [[task, accuracy, core["centered_results"][task]] for task, accuracy in core["results"].items()]
    get_report().log(
        "base_eval_hf" if config.hf_path else "base_eval",  # another maker's model is none of this run's results
        [config, {"Model": name, "CORE metric": core["core_metric"]}, [["Task", "Accuracy", "Centered"], *tasks]],
    )
    return core


if __name__ == "__main__":
    main(parse(Config))
