"""ARC: science questions of primary and middle school with a few choices each, an easy and a challenging set.

Most questions have four choices labelled A to D; some have labels 1 to 4, and some three or five choices. A question
keeps the labels of its row. Source: arXiv 1803.05457
"""

from typing import Any

from tasks.common import ChoiceTask, Conversation, check_choice, choice_conversation


class ARC(ChoiceTask):
    """Subset ARC-Easy or ARC-Challenge, split train, validation or test."""

    def __init__(self, subset: str, split: str, **bounds: Any):
        check_choice("ARC's subset", subset, ("ARC-Easy", "ARC-Challenge"))
        check_choice("ARC's split", split, ("train", "validation", "test"))
        self.name = f"{subset} {split}"
        super().__init__("allenai/ai2_arc", subset, split, **bounds)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        choices = row["choices"]
        return choice_conversation(row["question"], choices["label"], choices["text"], row["answerKey"])
