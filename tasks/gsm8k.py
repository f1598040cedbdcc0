"""GSM8K: word problems of primary school, answered step by step with a calculator.

An answer of the data set marks its calculations: "He pays 2*3 = $<<2*3=6>>6." Each becomes a call of the calculator
and its output (parts of type python and python_output), and the text goes on behind it. The last line is "#### 6".
Source: arXiv 2110.14168, https://github.com/openai/grade-school-math
"""

import re
from decimal import Decimal, InvalidOperation
from typing import Any

from tasks.common import Conversation, TableTask, as_conversation, check_choice

CALCULATION = re.compile(r"<<([^<>]*)=([^<>=]*)>>")
ANSWER = re.compile(r"#### (-?[0-9.,]+)")


def parse_answer(answer: str) -> list[dict[str, str]]:
    """The parts of an answer: 'so <<1+2=3>>3' -> text 'so ', python '1+2', python_output '3', text '3'."""
    parts = []
    for number, piece in enumerate(CALCULATION.split(answer)):  # text, expression, result, text, expression, ...
        kind = ("text", "python", "python_output")[number % 3]
        if piece or kind != "text":
            parts.append({"type": kind, "text": piece})
    return parts


def extract_answer(text: str) -> Decimal | None:
    """The number behind the first '#### ', with the commas removed; None where there is none.

    '... #### 1,250.0' -> Decimal('1250.0'), which equals Decimal('1250').
    """
    match = ANSWER.search(text)
    try:
        return Decimal(match[1].replace(",", "").rstrip(".")) if match else None
    except InvalidOperation:  # such as '1.2.3'
        return None


def is_same_answer(conversation: Conversation, completion: str) -> bool:
    """Whether a completion ends in the number in which the conversation's reference answer ends."""
    reference = extract_answer(conversation["messages"][-1]["content"][-1]["text"])
    assert reference is not None, f"no answer in {conversation['messages'][-1]}"
    return extract_answer(completion) == reference


class GSM8K(TableTask):
    """GSM8K's subset main or socratic, split train (7,473 problems) or test (1,319)."""

    def __init__(self, subset: str, split: str, **bounds: Any):
        check_choice("GSM8K's subset", subset, ("main", "socratic"))
        check_choice("GSM8K's split", split, ("train", "test"))
        self.name = f"GSM8K {split}"
        super().__init__("openai/gsm8k", subset, split, **bounds)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        return as_conversation(row["question"], parse_answer(row["answer"]))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return is_same_answer(conversation, completion)
