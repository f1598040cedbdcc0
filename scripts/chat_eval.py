"""Measure a chat model on its tasks.

    python -m scripts.chat_eval -i sft
    python -m scripts.chat_eval -i mid -a "GSM8K|ARC-Easy" -x 50
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i rl -a GSM8K -n 4 -t 1.0

Reads mid_checkpoints/, chatsft_checkpoints/ or chatrl_checkpoints/ and the tasks' data; writes report/chat_eval_<i>.md.
Which tasks there are depends on the recipe (tasks/mixtures.py); ChatCORE is their mean when all of them were run. Some
tasks or problems alone do not replace what the report has of all of them.
"""

import time
from dataclasses import dataclass
from typing import Any

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, autocast, compute_init, format_seconds, print0, user_errors
from nanochat.configurator import opt, parse
from nanochat.report import get_report
from nanochat.task_eval import centered, evaluate_task
from tasks.mixtures import EVAL_TASKS, find_recipe, make_eval_task


@dataclass
class Config:
    source: str = opt(help="which stage's model: mid, sft or rl", short="i", choices=("mid", "sft", "rl"))
    task_name: str = opt("", "tasks, joined by |; empty is all of the recipe", short="a")
    temperature: float = opt(0.0, "0 takes the likeliest token", short="t")
    max_new_tokens: int = opt(512, "longest reply", short="m")
    num_samples: int = opt(1, "replies to each problem of a generative task", short="n")
    top_k: int = opt(50, "sample among the k likeliest tokens; 0 is off", short="k")
    batch_size: int = opt(8, "sequences at once", short="b")
    model_tag: str = opt("", "checkpoint folder; empty is the largest model", short="g")
    step: int = opt(-1, "checkpoint step; -1 is the last", short="s")
    max_problems: int = opt(-1, "problems a task; -1 is all", short="x")
    device_type: str = opt("", "cuda, mps or cpu; empty finds the best there is")


@user_errors
def main(config: Config) -> dict[str, float]:
    """Evaluate on each task; return the scores by the tasks' names, and ChatCORE."""
    for name in ("batch_size", "num_samples", "max_new_tokens"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)} must be at least 1")
    if config.temperature < 0 or config.top_k < 0:
        raise UserError("--temperature and --top_k must not be negative")
    if config.max_problems == 0 or config.max_problems < -1:
        raise UserError(f"--max_problems={config.max_problems}: 1 or more are wanted, or -1 for all")
    recipe = find_recipe()
    everything = list(EVAL_TASKS[recipe])
    names = [name.strip() for name in config.task_name.split("|") if name.strip()] or everything
    tasks = {name: make_eval_task(name, recipe) for name in names}
    device = compute_init(config.device_type).device
    model, tokenizer, meta = load_model(config.source, device, "eval", config.model_tag, config.step)

    section, model_name = f"chat_eval_{config.source}", f"{meta['model_tag']}, step {meta['step']}"
    known = get_report().values(section)
    is_all_known = known.get("model") == model_name and known.get("max_problems") == -1 and "ChatCORE" in known
    is_logged = not (is_all_known and (config.task_name or config.max_problems != -1))
    if not is_logged:
        print0("not for the report, which has all tasks and problems of this model")

    labels = {known.lower(): known for makers in EVAL_TASKS.values() for known in makers}
    scores: dict[str, float] = {}
    columns = [f"pass@{k}" for k in range(1, config.num_samples + 1)] if config.num_samples > 1 else []
    details: list[list[Any]] = [["Task", "Problems", "Seconds", *columns]]
    examples: list[str] = []

    for name, task in tasks.items():
        label, start = labels[name.lower()], time.monotonic()
        with autocast(device):
            result = evaluate_task(
                task,
                model,
                tokenizer,
                config.max_problems,
                config.batch_size,
                config.num_samples,
                config.max_new_tokens,
                config.temperature,
                config.top_k,
            )
        seconds = time.monotonic() - start
        scores[label] = result.accuracy
        passes = [result.pass_at.get(k) for k in range(1, len(columns) + 1)]
        details.append([label, result.num_problems, round(seconds, 1), *passes])
        examples += [f"{label}: {example}" for example in result.examples]
        print0(f"{label}: {result.accuracy:.4f} ({result.num_problems} problems, {format_seconds(seconds)})")
        for example in result.examples:
            print0(f"  {' '.join(example.split())}")
        if set(scores) == set(everything):
            values = [centered(scores[label], make_eval_task(label, recipe).baseline) for label in everything]
            scores["ChatCORE"] = sum(values) / len(values)
            print0(f"ChatCORE: {scores['ChatCORE']:.4f}")
        # After each task, so that nothing that was measured is lost
        if is_logged:
            items = [config, {"model": model_name}, dict(scores), details, examples]
            get_report().log(section, [item for item in items if item])
    return scores


if __name__ == "__main__":
    main(parse(Config))
