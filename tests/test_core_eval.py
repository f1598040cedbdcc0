"""core_eval.py: prompts as literal texts, answers against one example at a time, ranks, and broken bundles."""

import json
import random
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomized_model, tiny_config
from test_distributed import run_ranks

from nanochat.common import Runtime, UserError
from nanochat.core_eval import (
    TASK_FIELDS,
    Example,
    Prompt,
    TaskMeta,
    batches,
    evaluate_model,
    evaluate_task,
    few_shot_indices,
    find_bundle,
    read_data,
    read_tasks,
    render_prompts,
    score_examples,
    scored_prompts,
    unpack_bundle,
)
from nanochat.gpt import GPT
from nanochat.tokenizer import HuggingFaceTokenizer
from scripts.base_eval import Config as BaseEvalConfig
from scripts.base_eval import load_hf_model
from scripts.base_eval import main as base_eval

CPU = torch.device("cpu")
WORDS = "red green blue black white pink grey brown gold silver".split()


class TextTokenizer:
    """A token is a byte of UTF-8 modulo num_bytes, and num_bytes is bos: a small one makes lucky guesses likely."""

    def __init__(self, num_bytes: int = 256):
        self.num_bytes = num_bytes

    def get_bos_token_id(self) -> int:
        return self.num_bytes

    def encode(self, texts: list[str], prepend: int) -> list[list[int]]:
        return [[prepend, *(byte % self.num_bytes for byte in text.encode("utf-8"))] for text in texts]


def task_meta(task_type: str, num_fewshot: int = 0, delimiter: str = " ") -> TaskMeta:
    return TaskMeta(
        label=task_type,
        task_type=task_type,
        dataset_uri=f"{task_type}.jsonl",
        num_fewshot=num_fewshot,
        continuation_delimiter=delimiter,
    )


def make_data(task_type: str, num_examples: int = 24) -> list[dict[str, Any]]:
    """Random items of unequal lengths, some with choices of one token and some with equal beginnings."""
    rng = random.Random(task_type)

    def text(longest: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))

    def make_item() -> dict[str, Any]:
        options = rng.sample(["a", "b", "ab", text(3), text(3), text(5)], rng.randint(2, 4))
        gold = rng.randrange(len(options))
        if task_type == "multiple_choice":
            return {"query": text(8), "choices": rng.choice([options, ["A", "B"]]), "gold": gold % 2}
        if task_type == "schema":
            start = text(4)
            return {"context_options": [f"{start} {o}" for o in options], "continuation": text(4), "gold": gold}
        return {"context": f" {text(8)} ", "continuation": text(1)[: rng.randint(1, 2)]}

    return [make_item() for _ in range(num_examples)]


def write_bundle(base_dir: Path, num_examples: int = 24) -> Path:
    """A bundle with a task of each type, 2-shot."""
    bundle = base_dir / "eval_bundle"
    (bundle / "eval_data").mkdir(parents=True)
    yaml = "icl_tasks:\n"
    for task_type in TASK_FIELDS:
        lines = "".join(json.dumps(item) + "\n" for item in make_data(task_type, num_examples))
        (bundle / "eval_data" / f"{task_type}.jsonl").write_text(lines, encoding="utf-8")
        yaml += f"-\n  label: {task_type}\n  dataset_uri: {task_type}.jsonl\n  num_fewshot: [2]\n"
        yaml += f"  icl_task_type: {task_type}\n"
    (bundle / "core.yaml").write_text(yaml + '  continuation_delimiter: "\\nAnswer: "\n', encoding="utf-8")
    baselines = "Eval Task,Random baseline\nmultiple_choice,40\nschema,50\nlanguage_modeling,0\n"
    (bundle / "eval_meta_data.csv").write_text(baselines, encoding="utf-8")
    return bundle


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


MC_ITEMS = [
    {"query": "1+1=", "choices": ["2", "3"], "gold": 0},
    {"query": "2+2=", "choices": ["3", "4"], "gold": 1},
    {"query": "Sky?", "choices": ["blue", "red"], "gold": 0},
]
SCHEMA_ITEMS = [
    {"context_options": ["Ann fell as Ann", "Ann fell as Bob"], "continuation": "ran.", "gold": 0},
    {"context_options": ["Ice melts as ice", "Ice melts as air"], "continuation": "is warm.", "gold": 1},
    {"context_options": ["The cat", "The cup"], "continuation": "slept.", "gold": 0},
]
LM_ITEMS = [
    {"context": "One two \n", "continuation": "three"},
    {"context": "  A B", "continuation": "C"},
    {"context": " Red, green, ", "continuation": "blue"},
]


@pytest.mark.parametrize(
    ("task_type", "items", "delimiter", "expected"),
    [
        ("multiple_choice", MC_ITEMS[2:], " ", ["Sky? blue", "Sky? red"]),
        (
            "multiple_choice",
            MC_ITEMS,
            "\nAnswer: ",
            [
                "1+1=\nAnswer: 2\n\n2+2=\nAnswer: 4\n\nSky?\nAnswer: blue",
                "1+1=\nAnswer: 2\n\n2+2=\nAnswer: 4\n\nSky?\nAnswer: red",
            ],
        ),
        ("schema", SCHEMA_ITEMS[2:], " ", ["The cat slept.", "The cup slept."]),
        (
            "schema",
            SCHEMA_ITEMS,
            " ",
            [
                "Ann fell as Ann ran.\n\nIce melts as air is warm.\n\nThe cat slept.",
                "Ann fell as Ann ran.\n\nIce melts as air is warm.\n\nThe cup slept.",
            ],
        ),
        ("language_modeling", LM_ITEMS[2:], " ", ["Red, green,", "Red, green, blue"]),
        (
            "language_modeling",
            LM_ITEMS,
            "\nAnswer: ",
            [
                "One two\nAnswer: three\n\nA B\nAnswer: C\n\nRed, green,\nAnswer:",
                "One two\nAnswer: three\n\nA B\nAnswer: C\n\nRed, green,\nAnswer: blue",
            ],
        ),
    ],
)
def test_prompts(task_type: str, items: list[dict[str, Any]], delimiter: str, expected: list[str]) -> None:
    *shots, item = items
    assert render_prompts(item, shots, task_meta(task_type, len(shots), delimiter)) == expected


@pytest.mark.parametrize(("index", "num_fewshot"), [(0, 3), (4, 3), (9, 9)])
def test_few_shot_examples_are_drawn_from_the_other_indices(index: int, num_fewshot: int) -> None:
    others = [other for other in range(10) if other != index]
    expected = random.Random(1234 + index).sample(others, num_fewshot)
    assert few_shot_indices(index, 10, num_fewshot) == expected


def test_few_shot_count_is_clamped_to_what_there_is() -> None:
    assert sorted(few_shot_indices(1, 4, 10)) == [0, 2, 3]
    assert few_shot_indices(0, 1, 10) == []


def test_scored_tokens_of_each_type() -> None:
    assert scored_prompts("multiple_choice", [[9, 1, 2, 3], [9, 1, 4]]) == [
        Prompt([9, 1, 2, 3], 2),
        Prompt([9, 1, 4], 2),
    ]
    assert scored_prompts("schema", [[9, 1, 2, 5, 6], [9, 3, 5, 6]]) == [
        Prompt([9, 1, 2, 5, 6], 3),
        Prompt([9, 3, 5, 6], 2),
    ]
    assert scored_prompts("language_modeling", [[9, 1], [9, 1, 2, 3]]) == [Prompt([9, 1, 2, 3], 2)]


def test_a_choice_that_begins_another_still_has_a_token_to_score() -> None:
    assert scored_prompts("multiple_choice", [[9, 1, 2], [9, 1, 2, 3]]) == [
        Prompt([9, 1, 2], 2),
        Prompt([9, 1, 2, 3], 3),
    ]


def test_long_prompts_are_cropped_on_the_left() -> None:
    assert scored_prompts("language_modeling", [[9, 1, 2], [9, 1, 2, 3]], 2) == [Prompt([2, 3], 1)]
    assert scored_prompts("language_modeling", [[9], [9, 1, 2, 3]], 2) == [Prompt([2, 3], 1)]
    assert scored_prompts("multiple_choice", [[9, 1, 2], [9, 1, 3, 4]], 3) == [
        Prompt([9, 1, 2], 2),
        Prompt([1, 3, 4], 1),
    ]


def test_example_shares_what_is_the_same() -> None:
    letters = Example.make(0, 0, [Prompt([9, 1, 2, 3], 3), Prompt([9, 1, 2, 4], 3)])
    assert (letters.rows, letters.row_of, letters.shared) == ([[9, 1, 2]], [0, 0], 2)
    words = Example.make(0, 0, [Prompt([9, 1, 2, 3, 4], 3), Prompt([9, 1, 2, 5, 4], 3)])
    assert (words.rows, words.row_of, words.shared) == ([[9, 1, 2, 3], [9, 1, 2, 5]], [0, 1], 2)


def test_batches_keep_to_the_budget_and_lose_nothing() -> None:
    rng = random.Random(0)
    prompts = [Prompt([1] * rng.randint(3, 40), 1) for _ in range(50)]
    examples = [Example.make(i, None, [prompt]) for i, prompt in enumerate(prompts)]
    cut = list(batches(examples, 100))
    assert sorted(e.index for batch in cut for e in batch) == list(range(50))
    assert all(len(batch) * max(e.longest for e in batch) <= 100 for batch in cut) and len(cut) < 25
    assert [len(batch) for batch in batches(examples[:3], 1)] == [1, 1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def reference_scores(
    model: GPT, tokenizer: TextTokenizer, data: list[dict[str, Any]], meta: TaskMeta
) -> list[tuple[bool, float]]:
    """(is right, margin) of each example, from its texts, one prompt at a time and with all logits.

    The margin is how far the decision is from a tie.
    """
    scores = []
    for index, item in enumerate(data):
        shots = [data[other] for other in few_shot_indices(index, len(data), meta["num_fewshot"])]
        rows = tokenizer.encode(render_prompts(item, shots, meta), prepend=tokenizer.num_bytes)
        if meta["task_type"] == "language_modeling":
            without, row = rows
            logits = model(torch.tensor([row]))[0, len(without) - 1 : -1]
            top = logits.topk(2).values
            hits = logits.argmax(-1) == torch.tensor(row[len(without) :])
            scores.append((bool(hits.all()), (top[:, 0] - top[:, 1]).min().item()))
            continue
        step = 1 if meta["task_type"] == "multiple_choice" else -1  # common beginning, or common end
        shortest = min(map(len, rows))
        common = next((i for i in range(shortest) if len({row[::step][i] for row in rows}) > 1), shortest)
        means = []
        for row in rows:
            start = min(common if step == 1 else len(row) - common, len(row) - 1)
            losses = F.cross_entropy(model(torch.tensor([row]))[0, :-1], torch.tensor(row[1:]), reduction="none")
            means.append(losses[start - 1 :].mean().item())
        smallest = sorted(means)[:2]
        scores.append((means.index(smallest[0]) == item["gold"], smallest[1] - smallest[0]))
    return scores


@pytest.mark.parametrize("takes_kv_cache", [True, False])
@pytest.mark.parametrize("num_fewshot", [0, 2])
@pytest.mark.parametrize("task_type", list(TASK_FIELDS))
def test_every_answer_equals_the_reference(
    task_type: str, num_fewshot: int, takes_kv_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = TextTokenizer(num_bytes=3 if task_type == "language_modeling" else 256)
    # the rotary table begins with 20 positions, and most prompts are longer
    model = randomized_model(tiny_config(sequence_len=2, vocab_size=tokenizer.num_bytes + 1))
    model.takes_kv_cache = takes_kv_cache
    data, meta = make_data(task_type), task_meta(task_type, num_fewshot, delimiter="")
    monkeypatch.setattr("nanochat.core_eval.BATCH_TOKENS", {"cpu": 1200})
    with torch.inference_mode():
        expected = reference_scores(model, tokenizer, data, meta)
    answers = score_examples(model, tokenizer, data, CPU, meta)
    decided = [i for i, (_, margin) in enumerate(expected) if margin > 1e-5]
    assert [answers[i] for i in decided] == [expected[i][0] for i in decided]
    assert len(decided) > 20 and 2 < sum(answers) < 22
    assert evaluate_task(model, tokenizer, data, CPU, meta) == sum(answers) / 24


def test_shared_beginnings_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomized_model()
    shapes, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, *cache: shapes.append(tuple(idx.shape)) or hidden(idx, *cache))
    item = {"query": "q" * 50, "choices": ["aa", "bb", "cc"], "gold": 0}
    score_examples(model, TextTokenizer(), [item], CPU, task_meta("multiple_choice"))
    assert shapes == [(1, 51), (3, 2)]  # bos and the query; the space, and a choice without its last letter


def test_training_mode_and_rng_are_untouched() -> None:
    model = randomized_model().train()
    state = torch.get_rng_state()
    score_examples(model, TextTokenizer(), make_data("schema", 3), CPU, task_meta("schema"))
    assert model.training and torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------------------------
# The benchmark


def test_core_is_the_mean_of_centred_accuracies(base_dir: Path) -> None:
    bundle = write_bundle(base_dir)
    model = randomized_model()
    core = evaluate_model(model, TextTokenizer(), CPU, max_per_task=10)
    for meta, baseline in zip(read_tasks(bundle), [0.4, 0.5, 0.0], strict=True):
        data = read_data(bundle, meta)
        random.Random(1337).shuffle(data)
        accuracy = evaluate_task(model, TextTokenizer(), data[:10], CPU, meta)
        assert core["results"][meta["label"]] == accuracy
        assert core["centered_results"][meta["label"]] == pytest.approx((accuracy - baseline) / (1 - baseline))
    assert core["core_metric"] == pytest.approx(sum(core["centered_results"].values()) / 3)
    assert list(core["results"]) == list(TASK_FIELDS)


def test_tasks_are_read_with_their_settings(base_dir: Path) -> None:
    metas = read_tasks(write_bundle(base_dir))
    assert metas[0] == task_meta("multiple_choice", 2, " ")
    assert metas[2] == task_meta("language_modeling", 2, "\nAnswer: ")


def test_wrong_max_per_task() -> None:
    with pytest.raises(UserError, match="max_per_task=0"):
        evaluate_model(randomized_model(), TextTokenizer(), CPU, max_per_task=0)


def core_of_random_model(runtime: Runtime) -> dict[str, Any]:
    return evaluate_model(randomized_model(), TextTokenizer(), runtime.device)


@pytest.mark.parametrize("num_examples", [7, 1])
def test_two_ranks_equal_one_also_where_one_has_nothing_to_do(num_examples: int, base_dir: Path) -> None:
    write_bundle(base_dir, num_examples)
    expected = core_of_random_model(Runtime(False, 0, 0, 1, CPU))
    assert run_ranks(2, core_of_random_model) == [expected, expected]


def test_each_rank_computes_its_own_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.core_eval.get_dist_info", lambda: (True, 1, 1, 3))
    scored = []
    monkeypatch.setattr(
        "nanochat.core_eval.score_batch", lambda m, batch, d: scored.extend(batch) or [True] * len(batch)
    )
    score_examples(randomized_model(), TextTokenizer(), make_data("schema", 8), CPU, task_meta("schema"))
    assert sorted(example.index for example in scored) == [1, 4, 7]


# ---------------------------------------------------------------------------------------------------------------------
# The bundle


def make_archive(base_dir: Path, names: dict[str, str], compression: int = zipfile.ZIP_STORED) -> Path:
    """eval_bundle.zip with these members."""
    base_dir.mkdir(parents=True, exist_ok=True)
    path = base_dir / "eval_bundle.zip"
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in names.items():
            file.writestr(name, content)
    return path


def test_archive_is_unpacked_once(base_dir: Path) -> None:
    archive = make_archive(base_dir, {"eval_bundle/core.yaml": "icl_tasks: []", "eval_bundle/eval_data/a.jsonl": "{}"})
    assert find_bundle() == base_dir / "eval_bundle"
    assert (base_dir / "eval_bundle" / "eval_data" / "a.jsonl").read_text(encoding="utf-8") == "{}"
    archive.unlink()
    assert find_bundle() == base_dir / "eval_bundle"


@pytest.mark.parametrize("name", ["../outside", "eval_bundle/../../outside", "/tmp/outside"])
def test_members_that_leave_the_folder_are_refused(name: str, base_dir: Path) -> None:
    make_archive(base_dir, {"eval_bundle/core.yaml": "", name: "x"})
    with pytest.raises(UserError, match="leaves the folder"):
        find_bundle()
    assert sorted(path.name for path in base_dir.iterdir()) == ["eval_bundle.zip", "eval_bundle.zip.lock"]


def test_damaged_archives_leave_nothing_behind(base_dir: Path) -> None:
    archive = make_archive(base_dir, {"other/core.yaml": ""})
    with pytest.raises(UserError, match="no eval_bundle/core.yaml in it"):
        find_bundle()
    content = bytearray(
        make_archive(base_dir, {"eval_bundle/core.yaml": "x" * 1000}, zipfile.ZIP_DEFLATED).read_bytes()
    )
    content[30 + len("eval_bundle/core.yaml")] ^= (
        0x06  # the kind of the first block of the compressed data: none that is
    )
    archive.write_bytes(content)
    with pytest.raises(UserError, match="eval_bundle.zip is damaged"):
        unpack_bundle(archive, base_dir / "eval_bundle")
    archive.write_bytes(archive.read_bytes()[:30])
    with pytest.raises(UserError, match="eval_bundle.zip is damaged"):
        unpack_bundle(archive, base_dir / "eval_bundle")
    assert not (base_dir / "eval_bundle").exists()


def test_a_missing_bundle_that_cannot_be_fetched_is_named(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_EVAL_BUNDLE_URL", "http://127.0.0.1:9/eval_bundle.zip")
    with pytest.raises(UserError, match="cannot be fetched") as error:
        find_bundle()
    assert f"curl -L -o {base_dir / 'eval_bundle.zip'} http://127.0.0.1:9/eval_bundle.zip" in str(error.value)


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    """A way to break a bundle: one text in one file becomes another."""

    def change(bundle: Path) -> None:
        path = bundle / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


MC_FILE = "eval_data/multiple_choice.jsonl"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda bundle: (bundle / "core.yaml").unlink(), "core.yaml is missing"),
        (lambda bundle: (bundle / "core.yaml").write_text("icl_tasks: []", encoding="utf-8"), "lists no tasks"),
        (replaced("core.yaml", "icl_tasks:", "icl_tasks: ["), "core.yaml is damaged"),
        (replaced("core.yaml", "label:", "name:"), "core.yaml is damaged .*label"),
        (replaced("core.yaml", "num_fewshot: [2]", "num_fewshot: []"), "core.yaml is damaged"),
        (replaced("core.yaml", "icl_task_type: schema", "icl_task_type: essay"), "'essay' is none of multiple_choice"),
        (lambda bundle: (bundle / "eval_meta_data.csv").unlink(), "eval_meta_data.csv is missing"),
        (replaced("eval_meta_data.csv", "schema,50", "schema,half"), "eval_meta_data.csv, line 3"),
        (replaced("eval_meta_data.csv", "schema,50\n", ""), "no line for 'schema'"),
        (lambda bundle: (bundle / MC_FILE).unlink(), "multiple_choice.jsonl is missing"),
        (lambda bundle: (bundle / MC_FILE).write_text("\n", encoding="utf-8"), "holds no examples"),
        (lambda bundle: (bundle / MC_FILE).write_bytes(b'{"query": "\xff"}'), "multiple_choice.jsonl is damaged"),
        (replaced(MC_FILE, '{"query"', '{"query'), "multiple_choice.jsonl, line 1"),
        (replaced(MC_FILE, '"gold": 1', '"gold": 7'), "line [0-9]+: gold is 7, and there are"),
        (replaced(MC_FILE, '"choices"', '"answers"'), "line 1: .* needs 'choices' of type list"),
    ],
)
def test_a_broken_bundle_is_named_with_file_and_line(
    damage: Callable[[Path], Any], message: str, base_dir: Path
) -> None:
    damage(write_bundle(base_dir))
    with pytest.raises(UserError, match=message) as error:
        evaluate_model(randomized_model(), TextTokenizer(), CPU, max_per_task=1)
    assert "\n" not in str(error.value) or "core.yaml" in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# scripts.base_eval


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 of 64 positions with random weights, and a tokenizer, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf")
    tokenizer = HuggingFaceTokenizer.train_from_iterator([" ".join(WORDS)] * 9, vocab_size=280)
    tokenizer.save(folder)
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64, "initializer_range": 0.5}
    config = transformers.GPT2Config(vocab_size=tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=0, **sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_hf_model_gives_transformers_logits_and_its_limit(hf_folder: Path) -> None:
    model, tokenizer = load_hf_model(str(hf_folder), CPU)
    idx = torch.randint(tokenizer.get_vocab_size(), (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(model.hidden(idx)), model.model(idx).logits)
    assert model.max_prompt_tokens == 64


def test_base_eval_of_an_hf_model_writes_table_and_report(
    hf_folder: Path, base_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_bundle(base_dir)
    long_item = {"query": " ".join(WORDS * 20), "choices": ["a", "b"], "gold": 0}  # more than 64 tokens
    with open(bundle / "eval_data" / "multiple_choice.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(long_item) + "\n")
    core = base_eval(BaseEvalConfig(device_type="cpu", hf_path=str(hf_folder)))
    (path,) = (base_dir / "base_eval").glob("*.csv")
    lines = path.read_text(encoding="utf-8").splitlines()
    label, accuracy, centered = lines[1].split(",")
    assert lines[0] == "Task,Accuracy,Centered" and label == "multiple_choice" and len(lines) == 5
    assert float(accuracy) == pytest.approx(core["results"][label], abs=1e-6)
    assert float(centered) == pytest.approx(core["centered_results"][label], abs=1e-6)
    assert lines[4] == f"CORE,,{core['core_metric']:.6f}" and f"{core['core_metric']:8.4f}" in capsys.readouterr().out
    section = (base_dir / "report" / "base_eval_hf.json").read_text(encoding="utf-8")
    assert "CORE metric" in section and str(core["core_metric"]) in section


def test_base_eval_without_transformers_or_model_says_so(
    hf_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes())
    with pytest.raises(SystemExit):
        base_eval(BaseEvalConfig(device_type="cpu", hf_path=str(tmp_path)))
    assert "transformers cannot load this model" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit):
        base_eval(BaseEvalConfig(device_type="cpu", hf_path=str(hf_folder)))
    assert "needs transformers: run `uv pip install transformers`" in capsys.readouterr().err
