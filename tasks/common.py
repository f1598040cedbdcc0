"""What all tasks share: slicing, lazy tables, multiple choice, and mixtures.

A task is a list of examples, of which any slice is a task again: MMLU("all", "test")[:100]. An example is a
conversation (nanochat/conversation.py), to train on and to evaluate with, or a document {"text": str}, to train on
only. Beside "messages" a conversation may hold what its evaluation needs: "letters" of a multiple choice question,
"answer", "test" and so on.

Evaluation is one of two kinds (`eval_type`):
- "generative": the model writes a reply, and evaluate(conversation, reply) says whether it is right. Calls of the
  calculator and their outputs may stand in the reply or be left out: nothing but its text counts.
- "categorical": the model ranks conversation["letters"], and evaluate(conversation, letter) says whether the best one
  is right.
`baseline` is the share of right answers that guessing gives.

Nothing is read before an example or the number of examples is asked for. Slices of a task share what was read.
"""

import bisect
import copy
import difflib
import random
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from nanochat.common import UserError, print0
from tasks.hub import load_table

Conversation = dict[str, Any]  # "messages" and what the evaluation needs, or a document's "text" alone

SHUFFLE_SEED = 42  # of the rows of a table, and of a mixture


class Task:
    """A list of examples; see the module docstring. Subclasses have a name, num_examples and get_example.

    start, stop, step: the part of all examples that this task is, as in a slice. What lies beyond the end is left out,
    and that is said.
    """

    name = "task"
    eval_type = "generative"
    baseline = 0.0

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        self.slices: tuple[slice, ...] = (slice(start, stop, step),)
        self._view: range | None = None  # indices among all examples, once the slices have been applied
        self._said: set[str] = set()  # shared by all slices, so that nothing is said twice

    def num_examples(self) -> int:
        """The number of all examples, whatever part of them this task is."""
        raise NotImplementedError

    def get_example(self, index: int) -> Conversation:
        """An example by its index among all."""
        raise NotImplementedError

    def describe_example(self, index: int) -> str:
        """Where the example with this index among all comes from, for an error message: 'GSM8K train, row 17'."""
        return f"{self.name}, row {index}"

    def fingerprint(self) -> str:
        """Differs where the examples do; '' for published and for generated data, which nobody edits."""
        return ""

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether a completion, the text of a reply or a letter, is right for a conversation of this task."""
        raise NotImplementedError

    def reward(self, conversation: Conversation, completion: str) -> float:
        """What reinforcement learning gives for a completion: 1.0 where it is right, else 0.0."""
        return float(self.evaluate(conversation, completion))

    @property
    def view(self) -> range:
        """The indices, among all examples, of this task's part."""
        if self._view is None:
            view = range(self.num_examples())
            for part in self.slices:
                beyond = [bound for bound in (part.start, part.stop) if bound is not None and bound > len(view)]
                if beyond:
                    self._say(f"{self.name}: {beyond[-1]:,} lies beyond its {len(view):,} examples, which are all used")
                view = view[part]
            self._view = view
        return self._view

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            print0(text)

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, key: int | slice) -> Any:
        """The example at an index, or this task cut to a slice (nothing is read for that)."""
        if not isinstance(key, slice):
            return self.get_example(self.view[key])
        part = copy.copy(self)
        part.slices, part._view = (*self.slices, key), None
        return part

    def describe(self, index: int) -> str:
        """Where task[index] comes from, for an error message: 'GSM8K train, row 17'."""
        return self.describe_example(self.view[index])


# ---------------------------------------------------------------------------------------------------------------------
# Tasks on a table


class Rows:
    """The rows of a table that is loaded when the first one is asked for, in its own or in a shuffled order.

    Rows become Python objects one at a time: a table of SmolTalk takes 1 GB as Arrow memory, and several as objects.
    """

    def __init__(self, load: Callable[[], pa.Table], is_shuffled: bool):
        self.load, self.is_shuffled = load, is_shuffled
        self.table: pa.Table | None = None
        self.order: np.ndarray | None = None  # position -> row of the table, where shuffled

    def _ensure_loaded(self) -> pa.Table:
        if self.table is None:
            table = self.load()
            if self.is_shuffled:
                self.order = np.random.default_rng(SHUFFLE_SEED).permutation(table.num_rows)
            self.table = table
        return self.table

    def __len__(self) -> int:
        return self._ensure_loaded().num_rows

    def row_number(self, index: int) -> int:
        """The row of the table that stands at a position."""
        self._ensure_loaded()
        return index if self.order is None else int(self.order[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._ensure_loaded().slice(self.row_number(index), 1).to_pylist()[0]


class TableTask(Task):
    """A task whose examples are the rows of one split of a data set on the hub. Subclasses have get_example.

    is_shuffled: rows come in the order that numpy.random.default_rng(42).permutation gives, else as they lie.
    """

    def __init__(self, repo: str, subset: str, split: str, is_shuffled: bool = True, **bounds: Any):
        super().__init__(**bounds)
        self.rows = Rows(lambda: load_table(repo, subset, split), is_shuffled)

    def num_examples(self) -> int:
        return len(self.rows)

    def describe_example(self, index: int) -> str:
        return f"{self.name}, row {self.rows.row_number(index)}"


def check_choice(setting: str, value: str, choices: Iterable[str]) -> str:
    """Return value if it is one of the choices; raise UserError naming the nearest one if it is not."""
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1, cutoff=0)[0]
        raise UserError(f"{setting} {value!r} is none of {', '.join(choices)}; did you mean {near!r}?")
    return value


def as_conversation(question: str, answer: Any, **evaluation: Any) -> Conversation:
    """A conversation of one question and its answer (text or parts), with what its evaluation needs beside it."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **evaluation}


# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice


def render_mc(question: str, letters: Sequence[str], choices: Sequence[str]) -> str:
    r"""The text of a multiple choice question; letters and choices are equally many.

    The letter follows its choice and stands behind `=` without a space, so that it is the same token in the question
    and as the reply. "2+2?", "AB", ["4", "5"] become

        Multiple Choice question: 2+2?\n- 4=A\n- 5=B\n\nRespond only with the letter of the correct answer.
    """
    lines = [f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True)]
    return (
        f"Multiple Choice question: {question}\n{''.join(lines)}\nRespond only with the letter of the correct answer."
    )


class ChoiceTask(TableTask):
    """A table of multiple choice questions. Subclasses have get_example, which calls choice_conversation."""

    eval_type = "categorical"
    baseline = 0.25

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the letter that was chosen is the right one."""
        letters = conversation["letters"]
        assert completion in letters, f"{completion!r} is none of the letters {letters}"
        return completion == conversation["messages"][-1]["content"]


def choice_conversation(question: str, letters: Sequence[str], choices: Sequence[str], answer: str) -> Conversation:
    """The conversation of a multiple choice question, its letters beside it. answer: the right letter."""
    return as_conversation(render_mc(question, letters, choices), answer, letters=list(letters))


# ---------------------------------------------------------------------------------------------------------------------
# Several tasks as one, to train on


class TaskSequence(Task):
    """Tasks one after the other, each in its own order."""

    name = "sequence"

    def __init__(self, tasks: Sequence[Task], **bounds: Any):
        super().__init__(**bounds)
        self.tasks = list(tasks)
        self._ends: list[int] = []  # number of examples up to and with each task, once they have been counted

    @property
    def ends(self) -> list[int]:
        if not self._ends:
            self._ends = np.cumsum([0, *map(len, self.tasks)]).tolist()[1:]
        return self._ends

    def num_examples(self) -> int:
        return self.ends[-1] if self.tasks else 0

    def locate(self, index: int) -> tuple[Task, int]:
        """The task that the example with this index among all is from, and its index there."""
        number = bisect.bisect_right(self.ends, index)
        return self.tasks[number], index - (self.ends[number - 1] if number else 0)

    def get_example(self, index: int) -> Conversation:
        task, position = self.locate(index)
        return task[position]

    def describe_example(self, index: int) -> str:
        task, position = self.locate(index)
        return task.describe(position)

    def fingerprint(self) -> str:
        return " ".join(filter(None, (task.fingerprint() for task in self.tasks)))


class TaskMixture(TaskSequence):
    """Tasks shuffled into each other; one that is given twice is there twice.

    The order is the one that random.Random(42).shuffle makes of the list of (task, index) pairs. It is kept as one
    array of numbers, which are positions in the sequence of the tasks.
    """

    name = "mixture"

    def __init__(self, tasks: Sequence[Task], **bounds: Any):
        super().__init__(tasks, **bounds)
        self._order = array("I")

    def locate(self, index: int) -> tuple[Task, int]:
        if not self._order:
            self._order = array("I", range(self.num_examples()))
            random.Random(SHUFFLE_SEED).shuffle(self._order)
        return super().locate(self._order[index])
