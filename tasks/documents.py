"""Documents of the pretraining text, to mix into midtraining: they keep alive what was learned from them."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from nanochat.common import UserError
from nanochat.dataset import read_row_group, row_groups, split_files
from tasks.common import Conversation, Task

_read_row_group = functools.lru_cache(maxsize=128)(read_row_group)


class Documents(Task):
    """The first limit documents (-1: all) of base_data's split train or val: examples are {"text": str}.

    Row groups are read when a document of theirs is asked for, and the last 128 are kept.
    """

    def __init__(self, limit: int = -1, split: str = "train", **bounds: Any):
        if limit < -1 or limit == 0:
            raise UserError(f"limit={limit} documents: 1 or more are wanted, or -1 for all")
        super().__init__(**bounds)
        self.limit, self.split = limit, split
        self.name = f"base_data {split}"
        self._groups: list[tuple[Path, int]] = []  # (file, row group), filled with _starts by the first access
        self._starts: list[int] = []  # number of documents before each group, and of all

    def num_examples(self) -> int:
        if not self._groups:
            groups = row_groups(split_files(self.split))
            self._starts += np.cumsum([0, *(group.num_rows for group in groups)]).tolist()
            self._groups += [(group.path, group.index) for group in groups]
        return self._starts[-1] if self.limit == -1 else min(self.limit, self._starts[-1])

    def get_example(self, index: int) -> Conversation:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return {"text": _read_row_group(*self._groups[number])[index - self._starts[number]]}

    def describe_example(self, index: int) -> str:
        return f"{self.name}, document {index}"
