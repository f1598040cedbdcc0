"""Tasks: slices, mixtures, multiple choice, and what each data set's rows become and are evaluated by."""

import json
import random
import re
import zlib
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_shards

from nanochat import execution, pocket
from nanochat.common import UserError
from nanochat.conversation import check_conversation
from nanochat.dataset import write_source
from nanochat.execution import use_calculator
from nanochat.pocket_tasks import is_test_number
from tasks import mixtures
from tasks.arc import ARC
from tasks.common import Task, TaskMixture, TaskSequence, as_conversation, render_mc
from tasks.customjson import CustomJSON, IdentityConversations
from tasks.documents import Documents
from tasks.gsm8k import GSM8K, extract_answer, parse_answer
from tasks.hub import table_folder
from tasks.humaneval import HumanEval, complete_program, extract_program
from tasks.mmlu import MMLU
from tasks.pocket import PocketChat, PocketMath, PocketMC, PocketQA, PocketSums, says
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee, counted


class Numbers(Task):
    """Example i of n says i. It counts how often it is asked for its size."""

    def __init__(self, n: int, name: str = "numbers", **bounds: Any):
        super().__init__(**bounds)
        self.n, self.name, self.asked = n, name, []

    def num_examples(self) -> int:
        self.asked.append(1)
        return self.n

    def get_example(self, index: int) -> dict[str, Any]:
        return as_conversation(f"{self.name} {index}", "yes")


def questions(task: Task) -> list[str]:
    return [conversation["messages"][0]["content"] for conversation in task]


def answer_text(conversation: dict[str, Any]) -> str:
    """The text of the reference answer, without calls and their outputs."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


def decoded(conversation: dict[str, Any]) -> str:
    """The reference answer as the tokens of a reply are decoded, with calls and their outputs."""
    marks = {
        "text": "{}",
        "python": "<|python_start|>{}<|python_end|>",
        "python_output": "<|output_start|>{}<|output_end|>",
    }
    return "".join(marks[p["type"]].format(p["text"]) for p in conversation["messages"][-1]["content"])


def write_table(repo: str, subset: str, split: str, rows: list[dict[str, Any]], files: int = 1) -> None:
    """Rows as task data in the base directory, in so many files."""
    folder = table_folder(repo, subset, split)
    folder.mkdir(parents=True)
    names = [f"{number:05d}.parquet" for number in range(files)]
    for number, name in enumerate(names):
        part = rows[number * len(rows) // files : (number + 1) * len(rows) // files]
        pq.write_table(pa.Table.from_pylist(part), folder / name)
    (folder / "manifest.json").write_text(json.dumps(names), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Slices


def test_slices_are_those_of_a_list():
    task, numbers = Numbers(20), [f"numbers {i}" for i in range(20)]
    for part in (slice(3, 9), slice(None, None, 4), slice(-5, None), slice(5, 1), slice(None, None, -1)):
        assert questions(task[part]) == numbers[part] and len(task[part]) == len(numbers[part])
    assert questions(task[2:18:2][1:5]) == numbers[2:18:2][1:5]
    assert questions(Numbers(20, start=4, stop=16, step=3)) == numbers[4:16:3]
    assert task[-1] == task[19] and task[2:18:2].describe(1) == "numbers, row 4"
    with pytest.raises(IndexError):
        task[3:5][2]


def test_slices_beyond_the_end_are_cut_and_said_once(capsys):
    part = Numbers(5, stop=1200)[:1000]
    assert len(part) == len(part[:]) == 5
    assert capsys.readouterr().out.splitlines() == [
        "numbers: 1,200 lies beyond its 5 examples, which are all used",
        "numbers: 1,000 lies beyond its 5 examples, which are all used",
    ]
    assert len(Numbers(5, start=9)) == 0
    assert len(Numbers(5, stop=5)) == 5 and "9 lies" in capsys.readouterr().out


def test_nothing_is_read_before_it_is_needed_and_slices_share_what_was():
    task = MMLU("all", "test", stop=100)
    part, mixture = task[:2], TaskMixture([task, SmolTalk("train")])[::2]
    rows = [{"question": f"q{i}", "subject": "s", "choices": list("abcd"), "answer": 0} for i in range(4)]
    write_table("cais/mmlu", "all", "test", rows)  # the tasks above have not looked for it
    assert len(part) == 2 and len(task) == 4
    assert part.rows is task.rows and task.rows.table is not None
    with pytest.raises(UserError, match="smol-smoltalk default/train cannot be fetched"):
        len(mixture)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No test of this file reaches a hub."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures


def test_a_mixture_has_the_order_of_shuffled_pairs():
    tasks = [Numbers(30, "a"), Numbers(10, "b")[::3], Numbers(0, "nothing"), Numbers(30, "a")]
    pairs = [(number, index) for number, task in enumerate(tasks) for index in range(len(task))]
    random.Random(42).shuffle(pairs)
    mixture = TaskMixture(tasks)
    assert len(mixture) == 64 and [mixture[i] for i in range(64)] == [tasks[t][i] for t, i in pairs]
    assert [mixture.describe(i) for i in range(64)] == [tasks[t].describe(i) for t, i in pairs]
    assert questions(mixture[10:20]) == questions(mixture)[10:20]
    assert questions(mixture).count("a 7") == 2  # a task given twice


def test_a_sequence_goes_through_its_tasks():
    sequence = TaskSequence([Numbers(2, "a"), Numbers(0, "nothing"), Numbers(3, "b")[1:]])
    assert questions(sequence) == ["a 0", "a 1", "b 1", "b 2"]
    assert questions(sequence[1:3]) == ["a 1", "b 1"] and sequence[1:].describe(1) == "b, row 1"
    assert len(TaskSequence([])) == len(TaskMixture([])) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice


def test_render_mc():
    expected = "Multiple Choice question: 2+2?\n- 4=A\n- 5=B\n\nRespond only with the letter of the correct answer."
    assert render_mc("2+2?", "AB", ["4", "5"]) == expected


def arc_row(labels: str, answer: str) -> dict[str, Any]:
    choices = {"text": [f"choice {label}" for label in labels], "label": list(labels)}
    return {"id": "x", "question": f"which of {labels}?", "choices": choices, "answerKey": answer}


def test_arc_keeps_the_labels_of_its_rows():
    rows = [arc_row("ABCD", "C"), arc_row("1234", "2"), arc_row("ABC", "A"), arc_row("ABCDE", "E")]
    write_table("allenai/ai2_arc", "ARC-Easy", "test", rows)
    task = ARC("ARC-Easy", "test")
    assert {"".join(c["letters"]): answer_text(c) for c in task} == {"ABCD": "C", "1234": "2", "ABC": "A", "ABCDE": "E"}
    digits = next(c for c in task if c["letters"] == list("1234"))
    assert questions([digits])[0].startswith("Multiple Choice question: which of 1234?\n- choice 1=1\n- choice 2=2\n")
    assert task.evaluate(digits, "2") and not task.evaluate(digits, "1")
    assert (task.eval_type, task.baseline) == ("categorical", 0.25)
    with pytest.raises(AssertionError, match="none of the letters"):
        task.evaluate(digits, "A")


def test_mmlu_reads_rows_inside_a_struct_column_too():
    row = {"question": "2+2?", "subject": "arithmetic", "choices": ["3", "5", "4", "6"], "answer": 2}
    write_table("cais/mmlu", "all", "test", [row])
    write_table("cais/mmlu", "auxiliary_train", "train", [{"train": row}])
    test, train = MMLU("all", "test"), MMLU("auxiliary_train", "train")
    assert test[0] == train[0] and "- 4=C\n" in questions(test)[0] and test[0]["letters"] == list("ABCD")
    assert test.evaluate(test[0], "C") and not test.evaluate(test[0], "D")


@pytest.mark.parametrize(
    "make, nearest",
    [
        (lambda: ARC("ARC-easy", "test"), "ARC-Easy"),
        (lambda: ARC("ARC-Easy", "val"), "validation"),
        (lambda: MMLU("all", "tests"), "test"),
        (lambda: GSM8K("main", "tst"), "test"),
        (lambda: PocketQA("validation"), "train"),
        (lambda: SpellingBee("test", languages="English"), "english"),
    ],
)
def test_unknown_subsets_and_splits_name_the_nearest(make, nearest):
    with pytest.raises(UserError, match=f"did you mean '{nearest}'"):
        make()


# ---------------------------------------------------------------------------------------------------------------------
# Word problems


def test_calculations_become_calls_and_their_outputs():
    assert parse_answer("He pays 2*3 = $<<2*3=6>>6.\nSo <<6-1=5>><<5*2=10.0>>10\n#### 10") == [
        {"type": "text", "text": "He pays 2*3 = $"},
        {"type": "python", "text": "2*3"},
        {"type": "python_output", "text": "6"},
        {"type": "text", "text": "6.\nSo "},
        {"type": "python", "text": "6-1"},
        {"type": "python_output", "text": "5"},
        {"type": "python", "text": "5*2"},
        {"type": "python_output", "text": "10.0"},
        {"type": "text", "text": "10\n#### 10"},
    ]


@pytest.mark.parametrize(
    "text, answer",
    [
        ("#### 7", "7"),
        ("so\n#### 1,250\n", "1250"),
        ("#### 10.0", "10"),
        ("#### -3", "-3"),
        ("#### 12.", "12"),
        ("#### 3\n#### 4", "3"),
        ("it is 7", None),
        ("#### seven", None),
        ("####7", None),
        ("#### 1.2.3", None),
        ("#### ,", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == (None if answer is None else Decimal(answer))


def test_gsm8k_is_right_when_the_numbers_are_equal():
    answer = "It is <<1000+250=1250>>1,250.\n#### 1,250"
    write_table("openai/gsm8k", "main", "test", [{"question": "How many?", "answer": answer}])
    task = GSM8K("main", "test")
    conversation = task[0]
    assert task.evaluate(conversation, answer_text(conversation)) and task.evaluate(conversation, decoded(conversation))
    assert task.reward(conversation, "#### 1250.0") == 1.0
    for wrong in ("1250", "#### 125", "#### 1251", "", "#### "):
        assert not task.evaluate(conversation, wrong) and task.reward(conversation, wrong) == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Programs

PROMPT = "import math\n\ndef half(x):\n    return x / 2\n\ndef quarter(x):\n    '''A quarter of x.'''\n"
TEST = "def check(candidate):\n    assert candidate(8) == 2\n    assert half(candidate(8)) == 1\n"
PROBLEM = {
    "task_id": "x/0",
    "prompt": PROMPT,
    "entry_point": "quarter",
    "canonical_solution": "    return half(half(x))\n",
    "test": TEST,
}


@pytest.mark.parametrize(
    "completion, program",
    [
        ("def f():\n    pass", "def f():\n    pass"),
        ("Here:\n```python\ndef f():\n    pass\n```\nIt does nothing.", "def f():\n    pass"),
        ("```python3\nx = 1\n```\nIt is 1.", "x = 1"),
        ("``` {.python title=a}\nx = 1\n```\nIt is 1.", "x = 1"),
        ("```\nx = 1\n```\n```\ny = 2\n```", "x = 1"),
        ("```py\nx = 1\ny = 2", "x = 1\ny = 2"),
    ],
)
def test_extract_program(completion, program):
    assert extract_program(completion) == program


def test_a_program_has_the_imports_and_helpers_of_its_prompt():
    whole = complete_program(PROMPT, "quarter", "def quarter(x):\n    return half(half(x))")
    assert whole.startswith("import math") and whole.count("def half") == whole.count("def quarter") == 1
    assert complete_program(PROMPT, "quarter", "    return x / 4") == PROMPT + "    return x / 4"


@pytest.fixture
def humaneval():
    write_table("openai/openai_humaneval", "openai_humaneval", "test", [PROBLEM])
    return HumanEval()


def test_humaneval_passes_programs_that_pass_the_tests(humaneval):
    conversation = humaneval[0]
    for completion in (
        answer_text(conversation),
        "```python\ndef quarter(x):\n    return x / 4\n```",
        "    return math.floor(x) / 4",
    ):
        assert humaneval.evaluate(conversation, completion), completion


@pytest.mark.parametrize(
    "body",
    ["pass", "return x / 3", "return x /", "import os; os._exit(0)", "import sys; sys.exit(0)", "raise SystemExit"],
)
def test_humaneval_fails_programs_that_do_not(humaneval, body):
    assert not humaneval.evaluate(humaneval[0], f"def quarter(x):\n    {body}\n")


def test_humaneval_wants_proof_that_the_tests_ran_to_their_end(humaneval, monkeypatch):
    ended_well = execution.ExecutionResult(True, "", "", None, False, False)
    monkeypatch.setattr("tasks.humaneval.execute_code", lambda code, timeout_seconds: ended_well)
    assert not humaneval.evaluate(humaneval[0], answer_text(humaneval[0]))


# ---------------------------------------------------------------------------------------------------------------------
# Conversations and documents


def test_table_rows_come_shuffled_and_are_named_by_their_place_in_the_table():
    rows = [{"messages": as_conversation(f"row {i}", "yes")["messages"], "source": "s"} for i in range(50)]
    write_table("HuggingFaceTB/smol-smoltalk", "default", "train", rows, files=3)
    task = SmolTalk("train")
    order = np.random.default_rng(42).permutation(50)
    assert questions(task) == [f"row {i}" for i in order]
    assert task[5:].describe(2) == f"SmolTalk train, row {order[7]}" and set(task[0]) == {"messages"}


LINE = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello\u2028!"},
    {"role": "user", "content": "?"},
]


def test_customjson_takes_lists_and_objects_and_a_last_user_turn(tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [json.dumps(LINE, ensure_ascii=False), "", json.dumps({"messages": LINE, "more": 1}) + "\r"]
    path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    task = CustomJSON(path)
    assert len(task) == 2 and task[0] == task[1] == {"messages": LINE}
    assert task.describe(1) == "mine.jsonl, line 3" and len(CustomJSON(str(path))[1:]) == 1


@pytest.mark.parametrize(
    "line, reason",
    [
        ("[{", "line 2 is no JSON"),
        ('{"text": "x"}', 'line 2: a conversation is {"messages"'),
        ("7", 'line 2: a conversation is {"messages"'),
        ('[{"role": "assistant", "content": "x"}]', "line 2: message 0 has the role 'assistant'"),
    ],
)
def test_customjson_names_the_file_and_the_line_of_an_error(tmp_path, line, reason):
    path = tmp_path / "mine.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        len(CustomJSON(path))
    assert str(error.value).startswith(f"{path}, {reason}") and "\n" not in str(error.value)


def test_customjson_that_is_missing_empty_or_no_text(tmp_path):
    path = tmp_path / "mine.jsonl"
    with pytest.raises(UserError, match="mine.jsonl cannot be read"):
        len(CustomJSON(path))
    path.write_text("\n")
    with pytest.raises(UserError, match="holds no conversations"):
        len(CustomJSON(path))
    path.write_bytes(b'["\xff"]')
    with pytest.raises(UserError, match="no UTF-8 text"):
        len(CustomJSON(path))


def test_documents_are_the_first_of_a_split(base_dir):
    shards = [[f"document {i}" for i in range(first, first + 5)] for first in (0, 5, 10)]
    write_shards(base_dir, shards, row_group_size=2)
    texts = [f"document {i}" for i in range(10)]
    assert [document["text"] for document in Documents()] == texts
    task = Documents(limit=7)
    assert [document["text"] for document in task] == texts[:7] and task[3:].describe(
        1
    ) == "base_data train, document 4"
    assert Documents(split="val")[0] == {"text": "document 10"} and len(Documents(limit=99)) == 10
    with pytest.raises(UserError, match="limit=0"):
        Documents(limit=0)


# ---------------------------------------------------------------------------------------------------------------------
# Spelling


@pytest.fixture
def words(base_dir):
    base_dir.mkdir(parents=True)
    words = [f"{a}{b}{c}" for a in "strawbe" for b in "rryx" for c in "aeiou"] + ["strawberry", "barrel", "banana"]
    (base_dir / "words_alpha.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return words


def test_counted():
    assert counted("strawberry", "r") == "s-t-r1-a-w-b-e-r2-r3-y" and counted("maze", "x") == "m-a-z-e"


def test_spelling_bee_counts_in_two_ways(words):
    task = SpellingBee("train", 200)
    for conversation in task:
        check_conversation(conversation)
        text, call, output, end = conversation["messages"][1]["content"]
        assert call["text"].split("'")[1] in words and output["text"] == str(eval(call["text"]))
        word, letter = call["text"].split("'")[1:4:2]
        assert f"spelled {'-'.join(word)}.\nCounting {letter}: {counted(word, letter)}\n" in text["text"]
        assert end["text"] == f"\n#### {output['text']}"
        assert task.evaluate(conversation, decoded(conversation))
        assert not task.evaluate(conversation, f"#### {int(output['text']) + 1}")
    assert len(set(questions(task))) > 150 and any("есть" in q or "слове" in q for q in questions(task))


def test_spelling_in_english_only(words):
    assert all(q.isascii() for q in questions(SpellingBee("train", 200, languages="english")))


def test_spelling_never_tests_what_it_trained(words):
    def spelled(task):
        return {answer_text(c).split(" is spelled ")[1].split(".")[0].replace("-", "") for c in task}

    trained = spelled(SimpleSpelling("train", 300)) | spelled(SpellingBee("train", 300))
    tested = spelled(SimpleSpelling("test", 300)) | spelled(SpellingBee("test"))
    assert trained | tested <= set(words) and trained and not trained & tested
    assert set() < tested <= {word for word in words if zlib.crc32(word.encode()) % 8 == 0}
    assert len(SpellingBee("test")) == 256


def test_spelling_examples_are_the_same_every_time_and_differ_between_splits(words):
    assert list(SpellingBee("test")[:20]) == list(SpellingBee("test", 20))
    train, test = SimpleSpelling("train", 20), SimpleSpelling("test", 20)
    assert questions(train) == questions(SimpleSpelling("train", 20)) != questions(test)
    assert train.evaluate(train[0], answer_text(train[0])) and not train.evaluate(train[0], "The word is spelled x-y.")


# ---------------------------------------------------------------------------------------------------------------------
# The pocket world


@pytest.mark.parametrize(
    "reply, is_said",
    [("It is Lima.", True), ("LIMA!", True), ("Limassol", False), ("li ma", False), ("Quito-Lima", True)],
)
def test_says_looks_for_whole_words(reply, is_said):
    assert says(reply, "Lima") is is_said


def test_says_looks_for_all_words_of_an_answer():
    assert says("The opposite of 'hot' is 'cold'.", "cold") and not says("it's", "it") and says("It's Kim's.", "Kim's")
    assert says("The capital is Abu  Dhabi.", "Abu Dhabi") and not says("Abu and Dhabi", "Abu Dhabi")


def test_pocket_qa_wants_the_answer_and_no_other():
    row = {"question": "?", "answer": "Lima", "candidates": ["Lima", "Quito"], "kind": "capital", "entity": "Peru"}
    write_table("pocket/PocketQA", "default", "test", [{**row, "messages": as_conversation("?", "Lima.")["messages"]}])
    task = PocketQA("test")
    assert task.evaluate(task[0], "The capital of Peru is Lima.")
    assert not task.evaluate(task[0], "It is Lima or Quito.") and not task.evaluate(task[0], "It is Quito.")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pocket")
    pocket.write_world(folder, seed=1337, chars=pocket.MIN_WORLD_CHARS)
    return folder


@pytest.fixture
def pocket_base(world, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world))


@pytest.mark.parametrize("make", [PocketQA, PocketMC, PocketMath])
def test_every_reference_answer_of_the_pocket_world_is_right(pocket_base, make):
    for task in (make("test"), make("train")[:300]):
        assert len(task) >= 300 and all(task.evaluate(c, answer_text(c)) for c in task)


def test_pocket_math_is_right_with_the_calls_in_the_reply_too(pocket_base):
    task = PocketMath("test")
    assert all(task.evaluate(c, decoded(c)) for c in task)


def test_pocket_rows_keep_their_order(pocket_base):
    first = (
        pq.read_table(table_folder("pocket/PocketChat", "default", "train") / "00000.parquet").slice(0, 2).to_pylist()
    )
    assert [PocketChat("train")[i] for i in range(2)] == first


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


def test_every_example_of_the_pocket_recipe_keeps_the_rules(pocket_base):
    assert mixtures.find_recipe() == "pocket"
    for mixture in (
        mixtures.mid_train_mixture("pocket")[::5],
        mixtures.mid_val_mixture("pocket"),
        mixtures.sft_mixture("pocket")[::5],
        mixtures.sft_val_mixture("pocket"),
        mixtures.rl_task("pocket", "train"),
    ):
        assert len(mixture) > 1000
        for example in mixture:
            if "text" not in example:
                check_conversation(example)


def test_own_data_joins_a_mixture(pocket_base, tmp_path):
    for name, count in (("a.jsonl", 2), ("b.jsonl", 3)):
        (tmp_path / name).write_text(f"{json.dumps(LINE)}\n" * count, encoding="utf-8")
    data = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    for make in (mixtures.mid_train_mixture, mixtures.sft_mixture):
        assert len(make("pocket", data)) == len(make("pocket")) + 5


def test_the_speedrun_mixtures_are_what_was_published():
    def parts(mixture):
        return [(task.name, task.slices[0].stop, getattr(task, "size", None)) for task in mixture.tasks]

    assert parts(mixtures.mid_train_mixture("speedrun")) == [
        ("SmolTalk train", None, None),
        ("MMLU auxiliary_train train", None, None),
        ("GSM8K train", None, None),
        ("identity_conversations.jsonl", None, None),
        ("identity_conversations.jsonl", None, None),
        ("SimpleSpelling train", None, 200_000),
        ("SpellingBee train", None, 80_000),
    ]
    assert parts(mixtures.mid_val_mixture("speedrun")) == [
        ("SmolTalk test", None, None),
        ("MMLU all test", 5200, None),
        ("GSM8K test", 420, None),
    ]
    assert parts(mixtures.sft_mixture("speedrun")) == [
        ("ARC-Easy train", None, None),
        ("ARC-Challenge train", None, None),
        ("GSM8K train", None, None),
        ("SmolTalk train", 10_000, None),
        ("identity_conversations.jsonl", None, None),
        ("SimpleSpelling train", None, 300),
        ("SpellingBee train", None, 300),
    ]
    assert mixtures.rl_task("speedrun", "test").name == "GSM8K test"


def test_find_recipe(base_dir):
    assert mixtures.find_recipe() == "speedrun"
    (base_dir / "task_data" / "pocket--PocketQA").mkdir(parents=True)
    assert mixtures.find_recipe() == "pocket"
    (base_dir / "task_data" / "openai--gsm8k").mkdir()
    assert mixtures.find_recipe() == "speedrun"
    write_source(base_dir / "base_data", {"source": "pocket", "seed": 1})
    assert mixtures.find_recipe() == "pocket"
    with pytest.raises(UserError, match="did you mean 'pocket'"):
        mixtures.sft_mixture("packet")


def test_evaluation_tasks_are_found_by_name():
    for recipe, makers in mixtures.EVAL_TASKS.items():
        for name in makers:
            assert mixtures.make_eval_task(name.lower(), recipe).name.startswith(name)
    assert mixtures.make_eval_task("SpellingBee", "speedrun").languages == "all"
    assert mixtures.make_eval_task("SpellingBee", "pocket").languages == "english"
    assert mixtures.make_eval_task("pocketqa").name == "PocketQA test"  # of the other recipe
    with pytest.raises(UserError, match="no task 'GSM8'; did you mean GSM8K?"):
        mixtures.make_eval_task("GSM8")
    assert all(name in mixtures.EVAL_TASKS[recipe] for recipe, names in mixtures.SFT_METRICS.items() for name in names)


def test_identity_conversations_come_from_the_base_directory(base_dir):
    base_dir.mkdir(parents=True)
    (base_dir / "identity_conversations.jsonl").write_text(json.dumps(LINE) + "\n", encoding="utf-8")
    assert IdentityConversations()[0] == {"messages": LINE}


def test_sums_are_right_and_name_no_number_of_the_tests() -> None:
    task = PocketSums(400)
    for conversation in task:
        check_conversation(conversation)
        said, call, output, result = (part["text"] for part in conversation["messages"][-1]["content"])
        assert use_calculator(call) == output and result == f"{output}." and said == f"{call} = "
        assert not any(
            is_test_number(int(number)) for number in re.findall(r"\d+", conversation["messages"][0]["content"])
        )
    assert len({call[-1] for call in questions(task)}) > 3 and questions(task) == questions(PocketSums(400))
