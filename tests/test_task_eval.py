"""Chat evaluation: replies and letters against one problem at a time, pass@k against brute force, ranks, the mode."""

import itertools
import zlib
from typing import Any

import pytest
import torch
from conftest import randomized_model, tiny_config
from test_distributed import run_ranks

from nanochat.common import Runtime
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT
from nanochat.task_eval import TaskResult, centered, evaluate_task, pass_at_k, reply_text, show_reply
from nanochat.tokenizer import RustBPETokenizer
from tasks.common import Task, as_conversation

VOCAB_SIZE = 280
MAX_NEW_TOKENS = 12
WORDS = "is it five or six and why then not seven ".split()


class Recorded(Task):
    """Problems of very different lengths, which keep what they were asked to judge: question -> completions."""

    name = "problems"

    def __init__(self, n: int):
        super().__init__()
        self.n = n
        self.judged: dict[str, list[str]] = {}

    def num_examples(self) -> int:
        return self.n

    def question(self, index: int) -> str:
        return f"{index}: " + " ".join((WORDS * 9)[index : index + index * 7 % 31 + 1])

    def evaluate(self, conversation: dict[str, Any], completion: str) -> bool:
        self.judged.setdefault(conversation["messages"][0]["content"], []).append(completion)
        return self.is_right(conversation, completion)


class Open(Recorded):
    """Generative: two replies in five are right."""

    def get_example(self, index: int) -> dict[str, Any]:
        return as_conversation(self.question(index), "the reference")

    def is_right(self, conversation: dict[str, Any], completion: str) -> bool:
        return zlib.crc32(completion.encode("utf-8")) % 5 < 2


class Choice(Recorded):
    """Categorical: two to six letters, which are not the same from question to question."""

    eval_type = "categorical"
    baseline = 0.25

    def get_example(self, index: int) -> dict[str, Any]:
        letters = list("ABCDEFGHIJ"[index % 4 : index % 4 + 2 + index % 5])
        return as_conversation(self.question(index), letters[index % len(letters)], letters=letters)

    def is_right(self, conversation: dict[str, Any], completion: str) -> bool:
        assert completion in conversation["letters"]
        return completion == conversation["messages"][-1]["content"]


def make_tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator([" ".join(WORDS)], VOCAB_SIZE)


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return make_tokenizer()


@pytest.fixture
def model() -> GPT:
    return randomized_model(tiny_config(vocab_size=VOCAB_SIZE, sequence_len=64))


def evaluate(task: Task, model: GPT, tokenizer: RustBPETokenizer, **settings: Any) -> TaskResult:
    return evaluate_task(task, model, tokenizer, **{"max_new_tokens": MAX_NEW_TOKENS, **settings})


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_guessing_is_0_and_perfection_1_on_the_centered_scale():
    assert [centered(a, 0.25) for a in (0.25, 1.0, 0.625, 0.0)] == pytest.approx([0.0, 1.0, 0.5, -1 / 3])
    assert centered(0.4, 0.0) == 0.4


# ---------------------------------------------------------------------------------------------------------------------
# The text of a reply


def render_reply(tokenizer: RustBPETokenizer, *parts: tuple[str, str]) -> list[int]:
    """The tokens of a reply of parts (type, text), <|assistant_end|> included."""
    content = [{"type": kind, "text": text} for kind, text in parts]
    conversation = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]}
    return tokenizer.render_conversation(conversation)[0][len(tokenizer.render_for_completion(conversation)) :]


def test_only_the_text_of_a_reply_is_judged_and_all_of_it_is_shown(tokenizer):
    call = [("python", "12+6"), ("python_output", "18")]
    tokens = render_reply(tokenizer, ("text", "Ida has 12+6 = "), *call, ("text", "18 pears. 🍐"))
    assert reply_text(tokenizer, tokens) == "Ida has 12+6 = 18 pears. 🍐"
    assert show_reply(tokenizer, tokens) == "Ida has 12+6 = <<12+6=18>>18 pears. 🍐"


def test_a_call_that_got_no_answer_is_shown_as_such(tokenizer):
    tokens = render_reply(tokenizer, ("text", "It is "), ("python", "2**9"))
    assert reply_text(tokenizer, tokens) == "It is "
    assert show_reply(tokenizer, tokens) == "It is <<2**9>>"


def test_a_refused_call_in_the_middle_is_closed_too(tokenizer):
    tokens = render_reply(tokenizer, ("text", "a "), ("python", "2**9"), ("text", " b"))
    assert show_reply(tokenizer, tokens) == "a <<2**9>> b"


def test_a_reply_that_was_cut_ends_in_a_replacement_character(tokenizer):
    tokens = tokenizer.encode("x🎉")[:-1]
    assert reply_text(tokenizer, tokens) == show_reply(tokenizer, tokens) == "x\ufffd"
    assert reply_text(tokenizer, []) == show_reply(tokenizer, []) == ""


# ---------------------------------------------------------------------------------------------------------------------
# Categorical tasks


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_letters_are_ranked_as_one_prompt_at_a_time_on_full_logits(model, tokenizer, batch_size):
    """Prompts of different lengths in one batch, padded; only the letters count, whatever else is likelier."""
    task, expected, num_others = Choice(30), {}, 0
    for index in range(30):
        conversation = task[index]
        prompt = tokenizer.render_for_completion(conversation)
        with torch.no_grad():
            logits = model(torch.tensor([prompt]))[0, -1]
        ids = {letter: tokenizer.encode(letter)[0] for letter in conversation["letters"]}
        expected[conversation["messages"][0]["content"]] = [max(ids, key=lambda letter: logits[ids[letter]].item())]
        num_others += int(logits.argmax()) not in ids.values()
    assert num_others > 20 and len({letter for [letter] in expected.values()}) > 4
    result = evaluate(task, model, tokenizer, batch_size=batch_size)
    assert task.judged == expected
    right = sum(task.is_right(c, expected[c["messages"][0]["content"]][0]) for c in task)
    assert 0 < right < 30
    assert result == TaskResult(right / 30, 30)


# ---------------------------------------------------------------------------------------------------------------------
# Generative tasks


def replies_one_by_one(
    task: Open, model: GPT, tokenizer: RustBPETokenizer, num_samples: int, **settings: Any
) -> dict[str, list[str]]:
    """Question -> texts of its replies, each generated alone, from the seeds "42/{problem}/{sample}"."""
    replies = {}
    for index in range(len(task)):
        prompt = tokenizer.render_for_completion(task[index])
        texts = []
        for sample in range(num_samples):
            request = Request(prompt, MAX_NEW_TOKENS, seed=f"42/{index}/{sample}", **settings)
            [completion] = Engine(model, tokenizer).complete([request], max_rows=1)
            texts.append(reply_text(tokenizer, completion.tokens))
        replies[task.question(index)] = texts
    return replies


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_replies_are_those_of_one_problem_at_a_time(model, tokenizer, batch_size):
    task = Open(17)
    expected = replies_one_by_one(task, model, tokenizer, 1, temperature=0.0, top_k=50)
    assert len({text for [text] in expected.values()}) > 8
    result = evaluate(task, model, tokenizer, batch_size=batch_size)
    assert task.judged == expected
    right = sum(task.is_right({}, text) for [text] in expected.values())
    assert 0 < right < 17
    assert result.accuracy == pytest.approx(right / 17) and result.num_problems == 17
    assert result.pass_at == {1: result.accuracy}


def test_pass_at_k_is_the_mean_over_problems_of_any_of_k_samples(model, tokenizer):
    task = Open(9)
    settings = {"temperature": 1.0, "top_k": 20}
    expected = replies_one_by_one(task, model, tokenizer, 3, **settings)
    assert min(len(set(texts)) for texts in expected.values()) > 1  # samples of a problem differ
    result = evaluate(task, model, tokenizer, batch_size=5, num_samples=3, **settings)
    assert task.judged == expected
    verdicts = [[task.is_right({}, text) for text in texts] for texts in expected.values()]
    for k in (1, 2, 3):
        draws = [list(itertools.combinations(own, k)) for own in verdicts]
        mean = sum(sum(map(any, own)) / len(own) for own in draws) / 9
        assert result.pass_at[k] == pytest.approx(mean)
    assert sorted(result.pass_at) == [1, 2, 3] and result.accuracy == result.pass_at[1]


def test_another_seed_gives_other_samples_and_the_same_seed_the_same(model, tokenizer):
    judged = []
    for seed in (1, 1, 2):
        task = Open(4)
        evaluate(task, model, tokenizer, temperature=1.0, seed=seed)
        judged.append(task.judged)
    assert judged[0] == judged[1] != judged[2]


def test_the_reference_answer_is_not_in_the_prompt(model, tokenizer):
    class Told(Open):
        def get_example(self, index: int) -> dict[str, Any]:
            return as_conversation(self.question(index), f"the answer {index}")

    tasks = [Open(5), Told(5)]
    for task in tasks:
        evaluate(task, model, tokenizer)
    assert tasks[0].judged == tasks[1].judged


def test_a_few_problems_are_shown_with_reply_and_verdict(model, tokenizer):
    task = Open(8)
    examples = evaluate(task, model, tokenizer).examples
    assert len(examples) == 3
    for index, example in enumerate(examples):
        [text] = task.judged[task.question(index)]
        verdict = "right" if task.is_right({}, text) else "wrong"
        assert example.startswith(f"{task.question(index)} → ") and example.endswith(f" ({verdict})")


# ---------------------------------------------------------------------------------------------------------------------
# Both


@pytest.mark.parametrize("kind", [Open, Choice])
@pytest.mark.parametrize(("max_problems", "count"), [(-1, 7), (3, 3), (7, 7), (50, 7)])
def test_the_first_problems_are_taken_and_never_more_than_there_are(model, tokenizer, kind, max_problems, count):
    task = kind(7)
    assert evaluate(task, model, tokenizer, max_problems=max_problems).num_problems == count
    assert set(task.judged) == {task.question(index) for index in range(count)}


@pytest.mark.parametrize("kind", [Open, Choice])
@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_and_the_random_numbers_of_training_are_left_alone(model, tokenizer, kind, training):
    model.train(training)
    before = torch.get_rng_state()
    evaluate(kind(3), model, tokenizer, temperature=1.0)
    assert model.training is training
    assert torch.equal(before, torch.get_rng_state())


def both_kinds(runtime: Runtime) -> list[Any]:
    """Results of both kinds of tasks, and the problems that this rank judged."""
    tokenizer = make_tokenizer()
    model = randomized_model(tiny_config(vocab_size=VOCAB_SIZE, sequence_len=64))
    tasks = (Open(11), Choice(11))
    results = [evaluate(task, model, tokenizer, num_samples=2, temperature=1.0, batch_size=3) for task in tasks]
    return [
        [(r.accuracy, r.pass_at, r.num_problems, r.examples[:1]) for r in results],
        [sorted(t.judged) for t in tasks],
    ]


def test_two_ranks_share_the_problems_and_give_the_same_scores():
    alone, judged_alone = both_kinds(Runtime(False, 0, 0, 1, torch.device("cpu")))
    assert all(0 < accuracy < 1 for accuracy, *_ in alone)
    together = run_ranks(2, both_kinds)
    for results, _ in together:
        for (accuracy, pass_at, *rest), (expected, expected_pass_at, *expected_rest) in zip(
            results, alone, strict=True
        ):
            assert accuracy == pytest.approx(expected, abs=1e-12) and rest == expected_rest
            assert pass_at == pytest.approx(expected_pass_at, abs=1e-12)
    for kind in range(2):
        shares = [judged[kind] for _, judged in together]
        assert abs(len(shares[0]) - len(shares[1])) == 1
        assert sorted(shares[0] + shares[1]) == judged_alone[kind]


def rank_without_problems(runtime: Runtime) -> list[tuple[float, int]]:
    tokenizer = make_tokenizer()
    model = randomized_model(tiny_config(vocab_size=VOCAB_SIZE, sequence_len=64))
    results = [evaluate(task, model, tokenizer) for task in (Open(1), Choice(1))]
    return [(result.accuracy, result.num_problems) for result in results]


def test_there_may_be_fewer_problems_than_ranks():
    expected = rank_without_problems(Runtime(False, 0, 0, 1, torch.device("cpu")))
    assert run_ranks(2, rank_without_problems) == [expected] * 2
