"""CORE: how well a base model does on 22 few-shot tasks, as one number in which 0 is chance and 1 is perfect.

Source: DCLM (arXiv 2406.11794), whose evaluation bundle is read here: `eval_bundle/` or `eval_bundle.zip` in the base
directory. There are three types of task, each an item behind num_fewshot solved examples:
- multiple_choice: one context, several continuations; the smallest mean loss of the differing end is the answer.
- schema: several contexts, one continuation; the smallest mean loss of the common end is the answer.
- language_modeling: right when each token of the continuation is the likeliest.

It is fast in three ways, which change no answer. Prompts are sorted by length and computed in batches, padded on the
right, where causal attention does not see the padding. The beginning that the choices of an item have in common is
computed once and its key/value cache copied to the choices. Logits are computed only where tokens are scored.

A model is a GPT or any module like it: `hidden(idx, kv_cache=None)` gives states (B, T, ...) for tokens (B, T),
`logits(states)` gives (..., V), `config.vocab_size` is V. It may set `takes_kv_cache = False` (then nothing is shared)
and `max_prompt_tokens` (longer prompts lose their beginning; a GPT takes any length, as its rotary tables grow).

What it does not do: choose a dtype (run it under common.autocast), or judge generated text.
"""

import csv
import io
import json
import os
import random
import shutil
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
import yaml

from nanochat.common import (
    Progress,
    UserError,
    all_reduce_sum,
    file_lock,
    format_seconds,
    get_base_dir,
    get_dist_info,
    on_rank0_first,
    print0,
)
from nanochat.cross_entropy import chunk_tokens
from nanochat.download import download_file
from nanochat.engine import KVCache

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"  # 162 MB
WINDOW = 1024  # examples that are tokenized, sorted by length and batched together
BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}  # padded tokens a batch: what suits a CPU's cache, or keeps a GPU busy
HOW_TO_MEND = (
    "delete the folder eval_bundle to have the published one unpacked or fetched again,"
    " or run `python -m nanochat.pocket` for the generated one"
)
TASK_FIELDS = {  # task type -> the fields of a line of its data, and what they hold
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}


class TaskMeta(TypedDict):
    """A task of core.yaml."""

    label: str
    task_type: str  # a key of TASK_FIELDS
    dataset_uri: str  # path of the data below eval_data/
    num_fewshot: int
    continuation_delimiter: str  # between a context and its continuation


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def few_shot_indices(index: int, num_examples: int, num_fewshot: int) -> list[int]:
    """Which other examples are shown before example `index`, in order; all others where there are too few.

    Equal to random.Random(1234 + index).sample over the list of the other indices, without making that list.
    """
    num_others = num_examples - 1
    chosen = random.Random(1234 + index).sample(range(num_others), min(num_fewshot, num_others))
    return [other + (other >= index) for other in chosen]


def render_prompts(item: dict[str, Any], shots: Sequence[dict[str, Any]], task_meta: TaskMeta) -> list[str]:
    """The texts of an item behind its solved examples.

    One for each choice (multiple_choice) or context (schema); for language_modeling two, without and with the
    continuation:

        render_prompts({"context": "2+2=", "continuation": "4"}, [{"context": "1+1=", "continuation": "2"}], meta)
        == ["1+1= 2\\n\\n2+2=", "1+1= 2\\n\\n2+2= 4"]
    """
    solve, delimiter = _SOLVERS[task_meta["task_type"]], task_meta["continuation_delimiter"]
    head = "".join(solve(shot, delimiter) + "\n\n" for shot in shots)
    if task_meta["task_type"] == "multiple_choice":
        return [f"{head}{item['query']}{delimiter}{choice}" for choice in item["choices"]]
    if task_meta["task_type"] == "schema":
        return [f"{head}{context}{delimiter}{item['continuation']}" for context in item["context_options"]]
    without = f"{head}{item['context'].strip()}{delimiter}"
    # The space before a word belongs to the word's token: a prompt must not end in one.
    return [without.strip(), without + item["continuation"]]


def _solved_choice(shot: dict[str, Any], delimiter: str) -> str:
    return f"{shot['query']}{delimiter}{shot['choices'][shot['gold']]}"


def _solved_schema(shot: dict[str, Any], delimiter: str) -> str:
    return f"{shot['context_options'][shot['gold']]}{delimiter}{shot['continuation']}"


def _solved_text(shot: dict[str, Any], delimiter: str) -> str:
    return f"{shot['context'].strip()}{delimiter}{shot['continuation']}"


_SOLVERS: dict[str, Callable[[dict[str, Any], str], str]] = {
    "multiple_choice": _solved_choice,
    "schema": _solved_schema,
    "language_modeling": _solved_text,
}


class Prompt(NamedTuple):
    """A text to run; its tokens from `start` to the end are scored."""

    tokens: list[int]
    start: int  # at least 1, less than len(tokens)


def scored_prompts(task_type: str, sequences: list[list[int]], max_tokens: int | None = None) -> list[Prompt]:
    """Where the tokenized texts of render_prompts are scored: one prompt for each choice, or one altogether for LM.

    Choices are scored from where they differ, contexts where they agree at the end; at least one token always is.
    Prompts beyond max_tokens lose their beginning.
    """
    if task_type == "language_modeling":
        prompts = [Prompt(sequences[1], common_prefix(sequences))]
    elif task_type == "multiple_choice":
        start = common_prefix(sequences)
        prompts = [Prompt(tokens, start) for tokens in sequences]
    else:
        suffix = common_prefix([tokens[::-1] for tokens in sequences])
        prompts = [Prompt(tokens, len(tokens) - suffix) for tokens in sequences]
    return [_fitted(prompt, max_tokens or len(prompt.tokens)) for prompt in prompts]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with: common_prefix([[1, 2, 3], [1, 2, 4]]) = 2."""
    length = 0
    for column in zip(*sequences, strict=False):
        if any(token != column[0] for token in column):
            break
        length += 1
    return length


def _fitted(prompt: Prompt, max_tokens: int) -> Prompt:
    """The last max_tokens of a prompt, with a start that leaves a token before it and a token to score."""
    tokens = prompt.tokens[-max_tokens:]
    start = prompt.start - (len(prompt.tokens) - len(tokens))
    return Prompt(tokens, max(1, min(start, len(tokens) - 1)))


# ---------------------------------------------------------------------------------------------------------------------
# Scoring


@dataclass
class Example:
    """An item made ready: what to compute and what to score.

    A prompt's last token predicts nothing, so inputs end before it, and choices of one token have the same input.
    """

    index: int  # in the task's data
    gold: int | None  # the right choice; None for language_modeling
    prompts: list[Prompt]
    rows: list[list[int]]  # the distinct inputs
    row_of: list[int]  # prompt -> row
    shared: int  # tokens that all rows begin with and that come before the first scoring position

    @classmethod
    def make(cls, index: int, gold: int | None, prompts: list[Prompt]) -> "Example":
        """The example with these prompts."""
        inputs = [tuple(prompt.tokens[:-1]) for prompt in prompts]
        distinct = list(dict.fromkeys(inputs))
        shared = min(common_prefix(distinct), min(prompt.start for prompt in prompts) - 1)
        return cls(index, gold, prompts, [list(row) for row in distinct], [distinct.index(i) for i in inputs], shared)

    @property
    def longest(self) -> int:
        """Tokens in the longest row."""
        return max(map(len, self.rows))


def evaluate_task(
    model: Any, tokenizer: Any, data: list[dict[str, Any]], device: torch.device, task_meta: TaskMeta
) -> float:
    """The share of the examples that the model gets right, over all ranks. Every rank must call."""
    correct = score_examples(model, tokenizer, data, device, task_meta)
    return sum(correct) / len(correct)


@torch.inference_mode()
def score_examples(
    model: Any, tokenizer: Any, data: list[dict[str, Any]], device: torch.device, task_meta: TaskMeta
) -> list[bool]:
    """Whether the model gets each example right. Every rank must call; each gets the whole answer.

    Rank r computes the examples congruent to r modulo the world size. The training mode is kept.
    """
    _, rank, _, world_size = get_dist_info()
    own = range(rank, len(data), world_size)
    correct = torch.zeros(len(data), dtype=torch.int32, device=device)
    max_tokens = getattr(model, "max_prompt_tokens", None)
    progress = Progress(len(own), task_meta["label"], unit="examples")
    was_training = model.training
    model.eval()
    for first in range(0, len(own), WINDOW):
        examples = encode_examples(tokenizer, data, own[first : first + WINDOW], task_meta, max_tokens)
        for batch in batches(examples, BATCH_TOKENS.get(torch.device(device).type, 8192)):
            answers = score_batch(model, batch, device)
            indices = torch.tensor([example.index for example in batch], device=device)
            correct[indices] = torch.tensor(answers, dtype=torch.int32, device=device)
            progress.update(len(batch))
    progress.close()
    model.train(was_training)
    return all_reduce_sum(correct).bool().tolist()


def encode_examples(
    tokenizer: Any, data: list[dict[str, Any]], indices: Sequence[int], task_meta: TaskMeta, max_tokens: int | None
) -> list[Example]:
    """Render and tokenize the examples of these indices, each text behind a bos token."""
    groups = []
    for index in indices:
        shots = [data[other] for other in few_shot_indices(index, len(data), task_meta["num_fewshot"])]
        groups.append(render_prompts(data[index], shots, task_meta))
    texts = [text for group in groups for text in group]
    sequences = iter(tokenizer.encode(texts, prepend=tokenizer.get_bos_token_id()))
    examples = []
    for index, group in zip(indices, groups, strict=True):
        prompts = scored_prompts(task_meta["task_type"], [next(sequences) for _ in group], max_tokens)
        gold = None if task_meta["task_type"] == "language_modeling" else data[index]["gold"]
        examples.append(Example.make(index, gold, prompts))
    return examples


def batches(examples: Sequence[Example], batch_tokens: int) -> Iterator[list[Example]]:
    """Cut examples, sorted by what they share and by length, into batches of at most batch_tokens padded tokens.

    An example that is larger than that alone is a batch of its own.
    """
    batch: list[Example] = []
    num_rows = longest = 0
    for example in sorted(examples, key=lambda e: (e.shared if len(e.rows) > 1 else 0, e.longest)):
        rows, length = num_rows + len(example.rows), max(longest, example.longest)
        if batch and rows * length > batch_tokens:
            yield batch
            batch, rows, length = [], len(example.rows), example.longest
        batch.append(example)
        num_rows, longest = rows, length
    if batch:
        yield batch


def score_batch(model: Any, batch: Sequence[Example], device: torch.device) -> list[bool]:
    """Whether the model gets each example of a batch right. Local."""
    states, shared = run_rows(model, batch, device)
    num_states = states.size(1)
    positions, targets, first_row = [], [], 0
    for example in batch:
        for prompt, row in zip(example.prompts, example.row_of, strict=True):
            begin = (first_row + row) * num_states - shared  # where position 0 of the row would be in the flat states
            positions += range(begin + prompt.start - 1, begin + len(prompt.tokens) - 1)
            targets += prompt.tokens[prompt.start :]
        first_row += len(example.rows)
    losses, hits = score_tokens(model, states.flatten(0, 1), positions, targets)
    answers, done = [], 0
    for example in batch:
        spans = []
        for prompt in example.prompts:
            spans.append(slice(done, done + len(prompt.tokens) - prompt.start))
            done = spans[-1].stop
        if example.gold is None:
            answers.append(all(hits[spans[0]]))
        else:
            means = [sum(losses[span]) / len(losses[span]) for span in spans]
            answers.append(means.index(min(means)) == example.gold)
    return answers


def run_rows(model: Any, batch: Sequence[Example], device: torch.device) -> tuple[torch.Tensor, int]:
    """Run all rows of a batch: (states (rows, T, ...), how many tokens of each row come before the first state).

    Where rows share their beginning, as much of it as all examples of the batch have (so that all positions stay
    uniform) is computed once an example.
    """
    rows = [row for example in batch for row in example.rows]
    owner = [number for number, example in enumerate(batch) for _ in example.rows]
    shared = min(example.shared for example in batch)
    if len(rows) == len(batch) or shared == 0 or not getattr(model, "takes_kv_cache", True):
        return model.hidden(_padded(rows, device)), 0
    prefix_cache = KVCache.for_model(model, len(batch), shared)
    model.hidden(_padded([example.rows[0][:shared] for example in batch], device), prefix_cache)
    cache = KVCache.for_model(model, len(rows), max(map(len, rows)))
    cache.prefill(prefix_cache, owner)
    return model.hidden(_padded([row[shared:] for row in rows], device), cache), shared


def score_tokens(
    model: Any, states: torch.Tensor, positions: list[int], targets: list[int]
) -> tuple[list[float], list[bool]]:
    """The loss (nats) of each target at its position in states (N, ...), and whether it is the likeliest token.

    Logits exist for one chunk of positions at a time.
    """
    index = torch.tensor(positions, device=states.device)
    target = torch.tensor(targets, device=states.device)
    losses, hits = [], []
    size = chunk_tokens(len(positions), model.config.vocab_size, states.device.type)
    for where, wanted in zip(index.split(size), target.split(size), strict=True):
        logits = model.logits(states[where])  # (chunk, V)
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        hits.append(logits.argmax(dim=-1) == wanted)
    return torch.cat(losses).tolist(), torch.cat(hits).tolist()


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Rows of token ids as a tensor (rows, longest) int64, padded on the right with 0, which nothing scored sees."""
    idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for number, row in enumerate(rows):
        idx[number, : len(row)] = torch.tensor(row)
    return idx.to(device)


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark


def evaluate_model(model: Any, tokenizer: Any, device: torch.device, max_per_task: int = -1) -> dict[str, Any]:
    """CORE of a model, over all ranks: {"results", "centered_results", "core_metric"}. Every rank must call.

    results: task label -> accuracy. centered_results: label -> (accuracy - baseline) / (1 - baseline), the baseline
    being chance. core_metric: the mean of those. max_per_task: examples a task, after a fixed shuffle; -1 for all.
    """
    if max_per_task == 0 or max_per_task < -1:
        raise UserError(f"max_per_task={max_per_task}: 1 or more examples are wanted, or -1 for all")
    bundle = find_bundle()
    tasks, baselines = read_tasks(bundle), read_baselines(bundle)
    for task_meta in tasks:
        if task_meta["label"] not in baselines:
            raise UserError(f"{bundle / 'eval_meta_data.csv'}: no line for {task_meta['label']!r}, a task of core.yaml")
    results, centered_results = {}, {}
    for task_meta in tasks:
        start = time.monotonic()
        label = task_meta["label"]
        data = read_data(bundle, task_meta)
        random.Random(1337).shuffle(data)
        data = data[: max_per_task if max_per_task > 0 else None]
        accuracy, baseline = evaluate_task(model, tokenizer, data, device, task_meta), baselines[label]
        results[label] = accuracy
        centered_results[label] = (accuracy - baseline) / (1 - baseline)
        print0(
            f"{label}: accuracy {accuracy:.4f}, centered {centered_results[label]:.4f}"
            f" ({len(data)} examples, {task_meta['num_fewshot']}-shot, {format_seconds(time.monotonic() - start)})"
        )
    core_metric = sum(centered_results.values()) / len(centered_results)
    return {"results": results, "centered_results": centered_results, "core_metric": core_metric}


# ---------------------------------------------------------------------------------------------------------------------
# The bundle


def find_bundle() -> Path:
    """The folder of the evaluation bundle, unpacked or downloaded first where that is needed. Every rank must call.

    NANOCHAT_EVAL_BUNDLE_URL replaces the address. Raises UserError saying which file to put where, when the address
    cannot be reached, and when the archive is damaged.
    """
    folder, archive = get_base_dir() / "eval_bundle", get_base_dir() / "eval_bundle.zip"
    with on_rank0_first():
        if not folder.is_dir():
            with file_lock(archive):
                if not folder.is_dir():
                    if not archive.is_file():
                        _download_bundle(archive)
                    unpack_bundle(archive, folder)
    return folder


def _download_bundle(archive: Path) -> None:
    url = os.environ.get("NANOCHAT_EVAL_BUNDLE_URL", BUNDLE_URL)
    try:
        download_file(url, archive, check=_check_archive)
    except (UserError, OSError) as error:
        raise UserError(
            f"the evaluation bundle cannot be fetched ({error}): put it at {archive}, for instance with"
            f" `curl -L -o {archive} {url}`; base_train trains without it by --core_metric_every=-1"
        ) from None


def _check_archive(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no zip file")


def unpack_bundle(archive: Path, folder: Path) -> None:
    """Unpack eval_bundle/ of a zip file as folder, all of it or nothing.

    Raises UserError for a damaged archive, one without eval_bundle/core.yaml, and members that leave the folder.
    """
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with zipfile.ZipFile(archive) as file:
            for name in file.namelist():
                if not (temporary / name).resolve().is_relative_to(temporary.resolve()):
                    raise UserError(
                        f"{archive}: its member {name!r} leaves the folder; delete it, it is not to be trusted"
                    )
            file.extractall(temporary)
        if not (temporary / "eval_bundle" / "core.yaml").is_file():
            raise UserError(f"{archive}: there is no eval_bundle/core.yaml in it; delete it to have it fetched again")
        (temporary / "eval_bundle").rename(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}); delete it to have it fetched again") from None
    finally:
        shutil.rmtree(temporary)


def read_tasks(bundle: Path) -> list[TaskMeta]:
    """The tasks of core.yaml. Raises UserError naming what is wrong with it."""
    path = bundle / "core.yaml"
    text = _read_text(path)
    try:
        tasks = [_task_meta(task) for task in yaml.safe_load(text)["icl_tasks"]]
    except (yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {HOW_TO_MEND}") from None
    if not tasks:
        raise UserError(f"{path} lists no tasks; {HOW_TO_MEND}")
    return tasks


def _task_meta(task: dict[str, Any]) -> TaskMeta:
    if task["icl_task_type"] not in TASK_FIELDS:
        raise ValueError(f"icl_task_type {task['icl_task_type']!r} is none of {', '.join(TASK_FIELDS)}")
    return TaskMeta(
        label=task["label"],
        task_type=task["icl_task_type"],
        dataset_uri=task["dataset_uri"],
        num_fewshot=int(task["num_fewshot"][0]),
        continuation_delimiter=task.get("continuation_delimiter", " "),
    )


def read_baselines(bundle: Path) -> dict[str, float]:
    """Task label -> the accuracy of guessing, 0 to 1. Raises UserError naming the line of the file that is wrong."""
    path = bundle / "eval_meta_data.csv"
    reader = csv.DictReader(io.StringIO(_read_text(path)))
    baselines = {}
    for row in reader:
        try:
            baselines[row["Eval Task"]] = 0.01 * float(row["Random baseline"])
        except (KeyError, TypeError, ValueError):
            wanted = "'Eval Task' and a number under 'Random baseline'"
            raise UserError(f"{path}, line {reader.line_num}: {wanted} are wanted; {HOW_TO_MEND}") from None
    return baselines


def read_data(bundle: Path, task_meta: TaskMeta) -> list[dict[str, Any]]:
    """The items of a task, in the file's order. Raises UserError naming the file and line that is wrong."""
    path = bundle / "eval_data" / task_meta["dataset_uri"]
    data = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            _check_item(item, task_meta["task_type"])
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; {HOW_TO_MEND}") from None
        data.append(item)
    if not data:
        raise UserError(f"{path} holds no examples; {HOW_TO_MEND}")
    return data


def _check_item(item: Any, task_type: str) -> None:
    """Raise ValueError unless an item has the fields of its type, and a gold that is one of its options."""
    for name, kind in TASK_FIELDS[task_type].items():
        if not isinstance(item, dict) or not isinstance(item.get(name), kind):
            raise ValueError(f"an item of type {task_type} needs {name!r} of type {kind.__name__}")
    options = item.get("choices" if task_type == "multiple_choice" else "context_options", [])
    if task_type != "language_modeling" and not 0 <= item["gold"] < len(options):
        raise ValueError(f"gold is {item['gold']}, and there are {len(options)} options")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {HOW_TO_MEND}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); {HOW_TO_MEND}") from None
