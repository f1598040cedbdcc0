"""SmolTalk: conversations about everything, to train on. Some begin with a system message.

The version for small models, 460,000 conversations to train and 24,000 to test.
Source: https://huggingface.co/datasets/HuggingFaceTB/smol-smoltalk
"""

from typing import Any

from tasks.common import Conversation, TableTask, check_choice


class SmolTalk(TableTask):
    """Split train or test. There is no right answer to evaluate."""

    def __init__(self, split: str, **bounds: Any):
        check_choice("SmolTalk's split", split, ("train", "test"))
        self.name = f"SmolTalk {split}"
        super().__init__("HuggingFaceTB/smol-smoltalk", "default", split, **bounds)

    def get_example(self, index: int) -> Conversation:
        return {"messages": self.rows[index]["messages"]}
