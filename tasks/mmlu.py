"""MMLU: questions with four choices from 57 subjects, from abstract algebra to world religions.

The subset auxiliary_train holds questions of other benchmarks in the same form, to train on; its rows sit inside a
column `train`. Source: arXiv 2009.03300
"""

from typing import Any

from tasks.common import ChoiceTask, Conversation, check_choice, choice_conversation

LETTERS = ("A", "B", "C", "D")
SPLITS = {"all": ("dev", "validation", "test"), "auxiliary_train": ("train",)}


class MMLU(ChoiceTask):
    """Subset all, with the splits dev, validation and test, or auxiliary_train, with the split train."""

    def __init__(self, subset: str, split: str, **bounds: Any):
        check_choice("MMLU's subset", subset, SPLITS)
        check_choice(f"the split of MMLU's subset {subset}", split, SPLITS[subset])
        self.name = f"MMLU {subset} {split}"
        super().__init__("cais/mmlu", subset, split, **bounds)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        row = row.get("train", row)
        return choice_conversation(row["question"], LETTERS, row["choices"], LETTERS[row["answer"]])
