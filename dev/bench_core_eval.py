"""How much faster core_eval.py is than one example at a time with full logits, after the answers are proved equal.

    python -m dev.bench_core_eval --max_per_task=20
    python -m dev.bench_core_eval --model_tag=d20 --max_per_task=100

For each task of the evaluation bundle both ways run in turns, on the same examples. The gate comes first: the answers
must be equal on every example, but for those whose two smallest losses (or, in language modeling, a token's two largest
logits) are within 1e-5. Without a checkpoint the model has random weights, all of them: the time does not depend on
their values.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, autocast, compute_init, device_name, synchronize, user_errors
from nanochat.configurator import opt, parse
from nanochat.core_eval import TaskMeta, encode_examples, find_bundle, read_data, read_tasks, score_examples
from nanochat.gpt import GPT, config_from_depth
from nanochat.tokenizer import get_tokenizer

TIE = 1e-5


@dataclass
class Config:
    device_type: str = opt("", "cuda, mps or cpu; empty finds the best there is")
    max_per_task: int = opt(20, "examples a task; -1 is all")
    tasks: str = opt("", "labels of the tasks to run, joined by |; empty is all")
    model_tag: str = opt("", "base checkpoint folder; empty is a model of random weights")
    depth: int = opt(4, "depth of the random model")
    seed: int = opt(1, "of the random weights")


def random_model(depth: int, vocab_size: int, seed: int, device: torch.device) -> GPT:
    """A model whose weights are all random, the ones that start at zero too."""
    torch.manual_seed(seed)
    model = GPT(config_from_depth(depth, vocab_size, sequence_len=2048)).to(device)
    model.init_weights()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=parameter.size(1) ** -0.5)
    return model


@torch.inference_mode()
def reference_answers(
    model: GPT, tokenizer: Any, data: list[dict[str, Any]], device: torch.device, task_meta: TaskMeta
) -> tuple[list[bool], list[bool]]:
    """(whether each example is right, whether it is too close to call), one example at a time with full logits."""
    correct, close = [], []
    for index in range(len(data)):
        (example,) = encode_examples(tokenizer, data, [index], task_meta, None)
        idx = torch.zeros(len(example.prompts), max(len(p.tokens) for p in example.prompts), dtype=torch.int64)
        for row, prompt in enumerate(example.prompts):
            idx[row, : len(prompt.tokens)] = torch.tensor(prompt.tokens)
        idx = idx.to(device)
        logits = model(idx)  # (choices, T, V)
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), idx[:, 1:], reduction="none")  # (choices, T - 1)
        if example.gold is None:
            start = example.prompts[0].start
            top2 = logits[0, start - 1 : -1].topk(2)
            correct.append(bool((top2.indices[:, 0] == idx[0, start:]).all()))
            close.append(bool((top2.values[:, 0] - top2.values[:, 1] < TIE).any()))
        else:
            means = [losses[r, p.start - 1 : len(p.tokens) - 1].mean().item() for r, p in enumerate(example.prompts)]
            smallest = sorted(means)[:2]
            correct.append(means.index(smallest[0]) == example.gold)
            close.append(smallest[-1] - smallest[0] < TIE and len(means) > 1)
    return correct, close


def timed(function: Callable[..., Any], device: torch.device, *args: Any) -> tuple[Any, float]:
    """(what a function returns, the seconds that it took)."""
    synchronize(device)
    start = time.perf_counter()
    result = function(*args)
    synchronize(device)
    return result, time.perf_counter() - start


@user_errors
def main(config: Config) -> None:
    """Print a line a task and the speed-up over all."""
    device = compute_init(config.device_type).device
    if config.model_tag:
        model, tokenizer, _ = load_model("base", device, "eval", config.model_tag)
    else:
        tokenizer = get_tokenizer()
        model = random_model(config.depth, tokenizer.get_vocab_size(), config.seed, device)
    shape = model.config
    print(f"{device_name(device)}: n_layer {shape.n_layer}, n_embd {shape.n_embd}, vocab_size {shape.vocab_size}")
    bundle = find_bundle()
    wanted = config.tasks.split("|") if config.tasks else []
    tasks = [meta for meta in read_tasks(bundle) if not wanted or meta["label"] in wanted]
    if not tasks:
        raise UserError(f"--tasks={config.tasks}: the bundle has no such task")
    total_slow = total_fast = 0.0
    for meta in tasks:
        data = read_data(bundle, meta)
        random.Random(1337).shuffle(data)
        data = data[: config.max_per_task if config.max_per_task > 0 else None]
        with autocast(device):
            (expected, close), slow = timed(reference_answers, device, model, tokenizer, data, device, meta)
            answers, fast = timed(score_examples, device, model, tokenizer, data, device, meta)
        wrong = [i for i, tie in enumerate(close) if not tie and answers[i] != expected[i]]
        if wrong:
            raise UserError(f"{meta['label']}: the answers differ on examples {wrong}")
        total_slow, total_fast = total_slow + slow, total_fast + fast
        print(
            f"{meta['label']:<32} {len(data)} equal ({sum(close)} too close to call),"
            f" {sum(expected)} right, {slow:6.2f}s -> {fast:6.2f}s, {slow / fast:5.1f}x",
            flush=True,
        )
    print(f"all: {total_slow:.1f}s -> {total_fast:.1f}s, {total_slow / total_fast:.1f}x")


if __name__ == "__main__":
    main(parse(Config))
