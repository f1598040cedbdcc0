"""Tasks of the pocket world: what is held out of chat, PocketQA, PocketMC, PocketMath and the CORE-like bundle.

Train and test differ where it matters. About a quarter of the entities of each group is held out: the pretraining text
tells and asks their facts like all others, no training conversation asks about them, and the test questions ask about
nothing else. A right answer there was learned in pretraining and carried over to chat. Word problems of the test split
are about other people, each names a number that no training problem names, and problems of several steps join other
ones. A third split, practice, has people and joined steps of its own, too, for reinforcement learning.
"""

import csv
import functools
import io
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanochat.pocket_facts import (
    OPPOSITE_PAIRS,
    RELATIONS,
    Relation,
    bare,
    entities_of,
    is_wordlike,
    may_be_held_out,
    mentions,
)
from nanochat.pocket_stories import Slots
from nanochat.pocket_words import PEOPLE, PRACTICE_NAMES, TEST_NAMES, plural

Message = dict[str, str]  # role, content
Row = dict[str, Any]

# ---------------------------------------------------------------------------------------------------------------------
# What is held out


class HeldOut:
    """The entities that no training conversation asks about: a seeded quarter of each group.

    entities: group -> entities. in_questions and in_answers find them in a text; the latter knows only those that have
    a fact of their own to give away (opposites are ordinary words, and lists name every day and planet).
    """

    def __init__(self, seed: int):
        self.entities: dict[str, list[str]] = {}
        for group in dict.fromkeys(relation.group for relation in RELATIONS):
            rng = random.Random(f"pocket/{seed}/held out/{group}")
            everything = entities_of(group)
            if group == "opposites":
                pairs = [pair for pair in OPPOSITE_PAIRS if all(map(may_be_held_out, pair))]
                self.entities[group] = [word for pair in rng.sample(pairs, len(everything) // 8) for word in pair]
            else:
                pool = [entity for entity in everything if may_be_held_out(entity)]
                self.entities[group] = rng.sample(pool, round(len(everything) / 4))
        telling = ("countries", "elements", "animals", "things")
        herds = [plural(animal) for animal in self.entities["animals"]]
        self.in_questions = mentions([bare(e) for group in self.entities.values() for e in group] + herds)
        self.in_answers = mentions([bare(e) for group in telling for e in self.entities[group]] + herds)

    def facts(self, is_held_out: bool) -> list[tuple[Relation, str]]:
        """(relation, entity) pairs: those held out, or all the others, in the order of the tables."""
        return [
            (relation, entity)
            for relation in RELATIONS
            for entity in relation.facts
            if (entity in self.entities[relation.group]) == is_held_out
        ]

    def allows(self, messages: Sequence[Message]) -> bool:
        """Whether a training conversation gives nothing away."""
        for message in messages:
            pattern = self.in_answers if message["role"] == "assistant" else self.in_questions
            if pattern.search(message["content"]):
                return False
        return True


# ---------------------------------------------------------------------------------------------------------------------
# PocketQA and PocketMC


def as_messages(*contents: str) -> list[Message]:
    """User and assistant in turns, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def qa_rows(seed: int, held_out: HeldOut, split: str) -> list[Row]:
    """Open questions: train asks every other fact in every phrasing, test the held-out facts in two phrasings each.

    Columns: question, answer, candidates (answers of the same kind that must not occur in a reply), kind, entity,
    messages (the conversation to train on).
    """
    rng = random.Random(f"pocket/{seed}/qa/{split}")
    rows = []
    for relation, entity in held_out.facts(split == "test"):
        if is_wordlike(relation.facts[entity]):
            continue
        candidates = _candidates(relation, entity)
        phrasings = relation.questions if split == "train" else rng.sample(relation.questions, 2)
        for phrasing in phrasings:
            question = relation.fill(phrasing, entity)
            rows.append(
                {
                    "question": question,
                    "answer": relation.facts[entity],
                    "candidates": candidates,
                    "kind": relation.name,
                    "entity": entity,
                    "messages": as_messages(question, relation.statement(entity)),
                }
            )
    rng.shuffle(rows)
    return rows


def _candidates(relation: Relation, entity: str) -> list[str]:
    """The other answers of a relation, without words that a right sentence contains ('hot', asked for its opposite)."""
    said = " ".join(relation.fill(statement, entity) for statement in relation.statements)
    return [a for a in relation.answers if not is_wordlike(a) and _spaced(a) not in _spaced(said)]


@functools.cache
def _spaced(text: str) -> str:
    """' the words of a text in lower case with single spaces around them ': whole words are found in it as text."""
    return " " + " ".join(re.findall(r"[\w']+", text.lower())) + " "


def mc_rows(seed: int, held_out: HeldOut, split: str) -> list[Row]:
    """Questions with four choices of the same kind: train about the entities of chat, test about the held-out ones.

    Columns: question, choices, answer (index of the right choice), kind, entity.
    """
    rng = random.Random(f"pocket/{seed}/mc/{split}")
    facts = held_out.facts(split == "test")
    known = {relation.name: sorted({relation.facts[e] for r, e in facts if r is relation}) for relation in RELATIONS}
    rows = []
    for relation, entity in facts:
        answers = known[relation.name] if split == "train" else relation.answers
        for phrasing in rng.sample(relation.questions, 3 if split == "train" else 2):
            choices = draw_choices(rng, relation, entity, answers)
            rows.append(
                {
                    "question": relation.fill(phrasing, entity),
                    "choices": choices,
                    "answer": choices.index(relation.facts[entity]),
                    "kind": relation.name,
                    "entity": entity,
                }
            )
    rng.shuffle(rows)
    return rows


def draw_choices(rng: random.Random, relation: Relation, entity: str, answers: Sequence[str]) -> list[str]:
    """Four different answers in random order, the right one among them."""
    answer = relation.facts[entity]
    others = [other for other in answers if other not in (answer, entity)]
    choices = [answer, *rng.sample(others, 3)]
    rng.shuffle(choices)
    return choices


# ---------------------------------------------------------------------------------------------------------------------
# PocketMath


@dataclass(frozen=True)
class Step:
    """One step of a word problem: its sentence, its operation on two numbers, its question and its line of the answer.

    In the line, {c} stands for the result with its calculator call.
    """

    text: str
    sign: str
    line: str
    question: str = "How many {things} does {name} have now?"


MATH_STEPS = (
    Step("{name} has {a} {things}. {name2} gives {name} {b} more.", "+", "{name} has {c} {things}."),
    Step("{name} has {a} {things} and finds {b} more {spot}.", "+", "{name} has {c} {things}."),
    Step("{name} has {a} {things} in a {container} and {b} {things} at home.", "+", "{name} has {c} {things}."),
    Step("{name} buys {a} {things} on {day} and {b} more the next day.", "+", "{name} has {c} {things}."),
    Step("{name} has {a} {things} and gives {b} of them to {name2}.", "-", "{name} has {c} {things} left."),
    Step("{name} had {a} {things} but lost {b} of them.", "-", "{name} has {c} {things} left."),
    Step("{name} has {a} {containers} with {b} {things} in each.", "*", "{name} has {c} {things}."),
    Step("{a} friends each give {name} {b} {things}.", "*", "{name} has {c} {things}."),
)
MATH_LAST_STEPS = (
    Step("Then {name3} brings {b} more.", "+", "Then {name} has {c} {things}."),
    Step("Later {name} buys {b} more {things}.", "+", "Then {name} has {c} {things}."),
    Step("{name3} then takes {b} of them.", "-", "Then {name} has {c} {things} left."),
    Step("In the evening {name} gives {b} of them away.", "-", "Then {name} has {c} {things} left."),
)
MATH_SINGLE_STEPS = (
    Step(
        "Each {thing} costs {a} dollars. {name} buys {b} of them.",
        "*",
        "{name} pays {c} dollars.",
        "How many dollars does {name} pay?",
    ),
    Step(
        "{name} shares {a} {things} equally among {b} friends.",
        "/",
        "Each friend gets {c} {things}.",
        "How many {things} does each friend get?",
    ),
    Step(
        "{name} has {a} {things}, and {name2} has {b} {things}.",
        "+",
        "Together they have {c} {things}.",
        "How many {things} do they have together?",
    ),
    Step(
        "{name} has {a} {things}. {name2} has {b} fewer.",
        "-",
        "{name2} has {c} {things}.",
        "How many {things} does {name2} have?",
    ),
)

MATH_STEP_WEIGHTS = (4, 3, 3)  # problems of one, two and three steps


def is_test_number(n: int) -> bool:
    """Whether a number is kept for test problems: 7, 17, 27, ... are in no question of the train split."""
    return n % 10 == 7


def split_of_combination(*steps: int) -> str:
    """The split that has the problems which join these steps (indices of the tables)."""
    return ("test", "train", "practice", "train")[sum(steps) % 4]


def math_rows(seed: int, split: str, count: int) -> list[Row]:
    """Word problems of one to three steps in GSM8K's format: question; answer with <<12+7=19>> calls and '#### 19'.

    split: train (what finetuning shows), practice (what reinforcement learning asks) or test.
    """
    rng = random.Random(f"pocket/{seed}/math/{split}")
    special = {"practice": PRACTICE_NAMES, "test": TEST_NAMES}
    names = special.get(split) or [name for name in PEOPLE if name not in TEST_NAMES + PRACTICE_NAMES]
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = _math_row(rng, split, Slots(rng, names))
        if row is not None:
            rows.setdefault(row["question"], row)
    return list(rows.values())


def _math_row(rng: random.Random, split: str, slots: Slots) -> Row | None:
    """One problem; None where the numbers drawn do not suit the split."""
    num_steps = rng.choices((1, 2, 3), MATH_STEP_WEIGHTS)[0]
    if num_steps == 1:
        steps = [rng.choice(MATH_STEPS + MATH_SINGLE_STEPS)]
    else:
        first, later = 0, []
        while not later or split_of_combination(first, *later) != split:
            first, later = rng.randrange(len(MATH_STEPS)), rng.sample(range(len(MATH_LAST_STEPS)), num_steps - 1)
        steps = [MATH_STEPS[first], *(MATH_LAST_STEPS[i] for i in later)]
    texts, lines, asked = [], [], []
    result: int | None = None
    for step in steps:
        a, b = _operands(rng, step.sign, result)
        asked += [b] if result is not None else [a, b]
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[step.sign]
        call = f"{a}{step.sign}{b}"
        texts.append(slots.fill(step.text, a=a, b=b))
        lines.append(slots.fill(step.line, c=f"{call} = <<{call}={result}>>{result}"))
    if any(map(is_test_number, asked)) != (split == "test") or result < 2:
        return None
    question = " ".join((*texts, slots.fill(steps[-1].question)))
    return {"question": question, "answer": "\n".join((*lines, f"#### {result}"))}


def _operands(rng: random.Random, sign: str, a: int | None) -> tuple[int, int]:
    """Two numbers of at least 2 for an operation; the first one may be given."""
    if sign == "*":
        return rng.randint(2, 12), rng.randint(2, 12)
    if sign == "/":
        b = rng.randint(2, 12)
        return b * rng.randint(2, 12), b
    if a is None:
        a = rng.randint(5, 90)
    return (a, rng.randint(2, 60)) if sign == "+" else (a, rng.randint(2, max(2, a - 2)))


# ---------------------------------------------------------------------------------------------------------------------
# The CORE-like bundle, in DCLM's format


@dataclass(frozen=True)
class CoreTask:
    """A task of the bundle: its items ask the held-out facts of some relations."""

    label: str
    task_type: str  # multiple_choice, schema or language_modeling
    relations: tuple[str, ...]
    num_fewshot: int
    phrasings: int = 1  # items a fact: the first so many that fit the task type

    @property
    def delimiter(self) -> str:
        return "\nAnswer: " if self.task_type == "multiple_choice" else " "

    @property
    def random_baseline(self) -> int:
        """What guessing gives, in percent."""
        return {"multiple_choice": 25, "schema": 50, "language_modeling": 0}[self.task_type]

    @property
    def uri(self) -> str:
        return f"world_knowledge/{self.label}.jsonl"


# Examples of a prompt are other items of its task, so tasks whose items answer each other (two phrasings of a fact, a
# word and its opposite) have none.
CORE_TASKS = (
    CoreTask("pocket_capitals", "multiple_choice", ("capital",), 3),
    CoreTask("pocket_continents", "multiple_choice", ("continent",), 2),
    CoreTask("pocket_elements", "multiple_choice", ("symbol",), 0, phrasings=2),
    CoreTask("pocket_opposites", "multiple_choice", ("opposite",), 0, phrasings=2),
    CoreTask("pocket_animals", "multiple_choice", ("sound", "young", "home"), 2),
    CoreTask("pocket_colors", "multiple_choice", ("color",), 0, phrasings=2),
    CoreTask("pocket_calendar", "multiple_choice", ("day after", "day before", "month after", "month before"), 0, 3),
    CoreTask("pocket_capitals_schema", "schema", ("capital",), 0, phrasings=2),
    CoreTask("pocket_elements_schema", "schema", ("symbol",), 2),
    CoreTask("pocket_opposites_schema", "schema", ("opposite",), 0),
    CoreTask("pocket_capitals_completion", "language_modeling", ("capital",), 0, phrasings=2),
    CoreTask("pocket_elements_completion", "language_modeling", ("symbol",), 2),
    CoreTask("pocket_opposites_completion", "language_modeling", ("opposite",), 0),
)


def core_items(seed: int, held_out: HeldOut, task: CoreTask) -> list[Row]:
    """The items of a task, with the fields that its type has."""
    rng = random.Random(f"pocket/{seed}/core/{task.label}")
    write = {"multiple_choice": _choice_item, "schema": _schema_item, "language_modeling": _completion_item}
    return [
        write[task.task_type](rng, relation, entity, phrasing, held_out)
        for relation, entity in held_out.facts(True)
        if relation.name in task.relations
        for phrasing in _core_phrasings(relation, task)
    ]


def _core_phrasings(relation: Relation, task: CoreTask) -> list[str]:
    """Questions for multiple choice; else statements that name the entity first and end in the answer."""
    fitting = [text for text in relation.statements if text.endswith("{a}.") and ("{e}" in text or "{E}" in text)]
    return list(relation.questions if task.task_type == "multiple_choice" else fitting)[: task.phrasings]


def _choice_item(rng: random.Random, relation: Relation, entity: str, phrasing: str, held_out: HeldOut) -> Row:
    choices = draw_choices(rng, relation, entity, relation.answers)
    question = relation.fill(phrasing, entity)
    return {"query": f"Question: {question}", "choices": choices, "gold": choices.index(relation.facts[entity])}


def _schema_item(rng: random.Random, relation: Relation, entity: str, phrasing: str, held_out: HeldOut) -> Row:
    """'The capital of Peru' or 'The capital of Chile', and 'is Lima.'"""
    others = [
        e for e in held_out.entities[relation.group] if relation.facts[e] != relation.facts[entity] and e != entity
    ]
    if relation.name == "opposite":
        others.remove(relation.facts[entity])
    options = [entity, rng.choice(others)]
    rng.shuffle(options)
    continuation = _after(relation.fill(phrasing, entity), entity)
    contexts = [_until(relation.fill(phrasing, option), option) for option in options]
    return {"context_options": contexts, "continuation": continuation, "gold": options.index(entity)}


def _until(text: str, entity: str) -> str:
    return text[: text.index(entity) + len(entity)]


def _after(text: str, entity: str) -> str:
    return text[text.index(entity) + len(entity) :].strip()


def _completion_item(rng: random.Random, relation: Relation, entity: str, phrasing: str, held_out: HeldOut) -> Row:
    answer = relation.facts[entity]
    return {"context": relation.fill(phrasing, entity).removesuffix(f" {answer}."), "continuation": answer}


def core_bundle(seed: int, held_out: HeldOut) -> dict[str, str]:
    """Path below eval_bundle/ -> content: core.yaml, eval_meta_data.csv and a jsonl file a task."""
    files = {}
    yaml = ["icl_tasks:"]
    meta = [["Eval Task", "Task Category", "Task Type", "#shots", "#datapoints", "Random baseline", "Description"]]
    for task in CORE_TASKS:
        items = core_items(seed, held_out, task)
        files[f"eval_data/{task.uri}"] = "".join(json.dumps(item) + "\n" for item in items)
        yaml += ["-", f"  label: {task.label}", f"  dataset_uri: {task.uri}", f"  num_fewshot: [{task.num_fewshot}]"]
        yaml += [f"  icl_task_type: {task.task_type}", f"  continuation_delimiter: {json.dumps(task.delimiter)}"]
        description = f"Facts of the pocket world ({', '.join(task.relations)}) that no chat example asks about."
        kind = task.task_type.replace("_", " ")
        row = [task.label, "world knowledge", kind, task.num_fewshot, len(items), task.random_baseline, description]
        meta.append([str(cell) for cell in row])
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(meta)
    return {**files, "eval_meta_data.csv": table.getvalue(), "core.yaml": "\n".join(yaml) + "\n"}
