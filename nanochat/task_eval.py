"""How well a chat model does on tasks: replies that are judged, letters that are ranked, pass@k, and one number.

A task (tasks/common.py) says how it is evaluated. In a generative one the model writes a reply to each problem, all
problems in one batch that they join and leave, and the task judges the reply's text. In a categorical one the logits
behind the prompt are compared, those of the letters alone; prompts are sorted by length and batched.

pass@k of a problem is the chance that at least one of k replies is right, estimated from num_samples >= k of them
without bias (arXiv 2107.03374). ChatCORE is the mean over tasks of (accuracy - baseline) / (1 - baseline), the baseline
being what guessing gives.

Problems are dealt out to the ranks, and a reply depends on the seed, the problem and the sample alone, so that any
number of processes gives the same scores. What it does not do: pick tasks, or a dtype (run it under common.autocast).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nanochat.common import Progress, all_reduce_sum, gather_objects, get_dist_info
from nanochat.conversation import ReplyReader
from nanochat.engine import Completion, Engine, Request

NUM_EXAMPLES = 3  # replies that a result shows


@dataclass
class TaskResult:
    """What a model did on a task."""

    accuracy: float  # share of the problems that the model gets right; pass@1 where there are several samples
    num_problems: int
    pass_at: dict[int, float] = field(default_factory=dict)  # k -> pass@k; generative tasks only
    examples: list[str] = field(default_factory=list)  # a few problems, replies and verdicts


def reply_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """The text of a reply, without tool calls, their output and special tokens."""
    return "".join(part["text"] for part in _read_reply(tokenizer, tokens) if part["type"] == "text")


def _read_reply(tokenizer: Any, tokens: Sequence[int]) -> list[dict[str, str]]:
    reader = ReplyReader(tokenizer)
    for token in tokens:
        reader.push(token)
    reader.finish()
    return reader.content


def show_reply(tokenizer: Any, tokens: Sequence[int]) -> str:
    """A reply as people read it, its tool calls in double angle brackets: 'Ida has 12+6 = <<12+6=18>>18 pears.'"""
    text, is_open = "", False  # whether a call has no closing brackets yet
    for part in _read_reply(tokenizer, tokens):
        is_result = part["type"] == "python_output"
        if is_open and not is_result:
            text += ">>"
        text += {"text": "{}", "python": "<<{}", "python_output": "={}>>"}[part["type"]].format(part["text"])
        is_open = part["type"] == "python"
    return text + (">>" if is_open else "")


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that k of the samples, drawn without replacement, hold a right one: pass_at_k(4, 1, 2) = 0.5."""
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def evaluate_task(
    task: Any,
    model: Any,
    tokenizer: Any,
    max_problems: int = -1,
    batch_size: int = 8,
    num_samples: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int | None = 50,
    seed: int = 42,
) -> TaskResult:
    """Evaluate a model on a task, over all ranks. Every rank must call. The training mode is kept.

    max_problems: the first so many, -1 for all. batch_size: sequences at once. The other settings are for generative
    tasks: num_samples replies a problem, of at most max_new_tokens tokens.
    """
    if max_problems > 0:
        task = task[: min(max_problems, len(task))]
    was_training = model.training
    model.eval()
    try:
        if task.eval_type == "categorical":
            return _evaluate_categorical(task, model, tokenizer, batch_size)
        settings = {"max_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
        return _evaluate_generative(task, model, tokenizer, batch_size, num_samples, seed, settings)
    finally:
        model.train(was_training)


def _own_problems(task: Any) -> range:
    """This rank's problems."""
    _, rank, _, world_size = get_dist_info()
    return range(rank, len(task), world_size)


def _evaluate_generative(
    task: Any,
    model: Any,
    tokenizer: Any,
    batch_size: int,
    num_samples: int,
    seed: int,
    settings: dict[str, Any],
) -> TaskResult:
    own = _own_problems(task)
    conversations = [task[index] for index in own]
    requests = []
    for index, conversation in zip(own, conversations, strict=True):
        prompt = tokenizer.render_for_completion(conversation)
        requests += [Request(prompt, seed=f"{seed}/{index}/{sample}", **settings) for sample in range(num_samples)]
    progress = Progress(len(requests), task.name, unit="replies")
    completions = Engine(model, tokenizer).complete(requests, batch_size, on_finish=lambda _: progress.update())
    progress.close()

    pass_sums = [0.0] * num_samples
    examples = []
    for number, conversation in enumerate(conversations):
        replies = completions[number * num_samples : (number + 1) * num_samples]
        verdicts = [task.evaluate(conversation, reply_text(tokenizer, reply.tokens)) for reply in replies]
        for k in range(1, num_samples + 1):
            pass_sums[k - 1] += pass_at_k(num_samples, sum(verdicts), k)
        if len(examples) < NUM_EXAMPLES:
            examples.append(_example(tokenizer, conversation, replies[0], verdicts[0]))
    count = max(1, len(task))
    pass_at = {k: all_reduce_sum(pass_sums[k - 1]) / count for k in range(1, num_samples + 1)}
    return TaskResult(pass_at[1], len(task), pass_at, gather_objects(examples)[0])


def _example(tokenizer: Any, conversation: dict[str, Any], reply: Completion, is_right: bool) -> str:
    question = next(m["content"] for m in reversed(conversation["messages"]) if m["role"] == "user")
    verdict = "right" if is_right else "wrong"
    return f"{question} → {show_reply(tokenizer, reply.tokens)} ({verdict})"


@torch.inference_mode()
def _evaluate_categorical(task: Any, model: Any, tokenizer: Any, batch_size: int) -> TaskResult:
    own = _own_problems(task)
    device = model.get_device()
    prompts = [tokenizer.render_for_completion(task[index]) for index in own]
    order = sorted(range(len(own)), key=lambda i: len(prompts[i]))
    progress = Progress(len(own), task.name, unit="questions")
    letter_ids: dict[str, int] = {}
    num_correct = 0
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        lengths = torch.tensor([len(prompts[i]) for i in members])
        idx = torch.zeros(len(members), int(lengths.max()), dtype=torch.int64)
        for row, i in enumerate(members):
            idx[row, : len(prompts[i])] = torch.tensor(prompts[i])  # causal attention does not see the padding
        states = model.hidden(idx.to(device))[torch.arange(len(members)), lengths.to(device) - 1]  # (b, C)
        logits = model.logits(states).cpu()  # (b, V)
        for row, i in enumerate(members):
            conversation = task[own[i]]
            ids = [_letter_id(tokenizer, letter, letter_ids) for letter in conversation["letters"]]
            chosen = conversation["letters"][int(logits[row, ids].argmax())]
            num_correct += task.evaluate(conversation, chosen)
        progress.update(len(members))
    progress.close()
    return TaskResult(all_reduce_sum(num_correct) / max(1, len(task)), len(task))


def _letter_id(tokenizer: Any, letter: str, known: dict[str, int]) -> int:
    """The one token of a letter; every byte is one."""
    if letter not in known:
        ids = tokenizer.encode(letter)
        assert len(ids) == 1, f"the letter {letter!r} is {len(ids)} tokens"
        known[letter] = ids[0]
    return known[letter]


def centered(accuracy: float, baseline: float) -> float:
    """An accuracy on the scale in which guessing is 0 and perfection 1."""
    return (accuracy - baseline) / (1 - baseline)
