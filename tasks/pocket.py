"""The tasks of the pocket world: PocketChat, PocketQA, PocketMC and PocketMath, which nanochat.pocket writes, and sums.

Their test splits ask about what no training split asks about (nanochat/pocket_tasks.py). Scores on them compare with
nothing but themselves. The rows are random already, so they keep their order.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

from nanochat.pocket_tasks import is_test_number
from tasks.common import ChoiceTask, Conversation, TableTask, Task, as_conversation, check_choice, choice_conversation
from tasks.gsm8k import is_same_answer, parse_answer

LETTERS = ("A", "B", "C", "D")


def _table(name: str, split: str, subset: str = "default", splits: Sequence[str] = ("train", "test")) -> dict[str, Any]:
    """The arguments of TableTask for a table of the pocket world."""
    check_choice(f"{name}'s split", split, splits)
    return {"repo": f"pocket/{name}", "subset": subset, "split": split, "is_shuffled": False}


def says(reply: str, answer: str) -> bool:
    """Whether an answer occurs in a reply word for word, whatever the case and what stands between the words.

    'It is Lima.' says 'Lima', and 'Limassol' does not.
    """
    return f" {_words(answer)} " in f" {_words(reply)} "


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+(?:'\w+)*", text.lower()))  # quotes around a word are none of its own


class PocketChat(TableTask):
    """Small conversations about the pocket world. There is no right answer to evaluate."""

    def __init__(self, split: str, **bounds: Any):
        self.name = f"PocketChat {split}"
        super().__init__(**_table("PocketChat", split), **bounds)

    def get_example(self, index: int) -> Conversation:
        return {"messages": self.rows[index]["messages"]}


class PocketQA(TableTask):
    """Open questions. A reply is right if the answer is in it, and no other candidate: 'Lima or Quito' is wrong."""

    def __init__(self, split: str, **bounds: Any):
        self.name = f"PocketQA {split}"
        super().__init__(**_table("PocketQA", split), **bounds)

    def get_example(self, index: int) -> Conversation:
        return {key: value for key, value in self.rows[index].items() if key in ("messages", "answer", "candidates")}

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        others = (other for other in conversation["candidates"] if other != conversation["answer"])
        return says(completion, conversation["answer"]) and not any(says(completion, other) for other in others)


class PocketMC(ChoiceTask):
    """Questions with four choices of the same kind."""

    def __init__(self, split: str, **bounds: Any):
        self.name = f"PocketMC {split}"
        super().__init__(**_table("PocketMC", split), **bounds)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        return choice_conversation(row["question"], LETTERS, row["choices"], LETTERS[row["answer"]])


class PocketMath(TableTask):
    """Word problems in GSM8K's format, read and evaluated like those.

    The split "practice" is for reinforcement learning: people and joined steps of which "train" shows no solution.
    """

    def __init__(self, split: str, **bounds: Any):
        self.name = f"PocketMath {split}"
        super().__init__(**_table("PocketMath", split, "main", ("train", "practice", "test")), **bounds)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        return as_conversation(row["question"], parse_answer(row["answer"]))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return is_same_answer(conversation, completion)


class PocketSums(Task):
    """Plain sums as people type them, answered with the calculator; to train on. Example i is always the same one."""

    name = "PocketSums"
    QUESTIONS = ("What is {}?", "How much is {}?", "{}", "{} = ?", "Calculate {}.", "What does {} make?")
    SIGNS = {"+": ("+", " + ", " plus "), "-": ("-", " - ", " minus "), "*": ("*", " * ", " times "), "/": ("/", " / ")}

    def __init__(self, size: int, **bounds: Any):
        super().__init__(**bounds)
        self.size = size

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        rng = random.Random(f"{self.name}/{index}")
        sign = rng.choice("++--*/")
        a = b = 7
        while is_test_number(a) or is_test_number(b):  # no training example names the numbers of PocketMath's tests
            most = 12 if sign in "*/" else 99
            a, b = rng.randint(2, most), rng.randint(2, most)
            a, b = (a * b, b) if sign == "/" else (max(a, b), min(a, b)) if sign == "-" else (a, b)
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
        question = rng.choice(self.QUESTIONS).format(f"{a}{rng.choice(self.SIGNS[sign])}{b}")
        return as_conversation(question, parse_answer(f"{a}{sign}{b} = <<{a}{sign}{b}={result}>>{result}."))
