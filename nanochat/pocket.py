"""The pocket world: a small generated world that stands in for all data where there is no network and no GPU.

    python -m nanochat.pocket --seed=1337 --chars=10e6

writes into the base directory, in seconds: pretraining text (base_data/), a CORE-like evaluation bundle (eval_bundle/),
chat and task data (task_data/pocket--*), a word list and identity conversations. The same settings give the same
content everywhere, and with the same pyarrow the same bytes. It is real data for a tiny model: true facts in many
phrasings, stories whose counts are right, sums, equations, calendar, spelling. What is in which file:

    pocket_facts    the facts, their statements and questions      pocket_words   names, things, words to spell
    pocket_text     the kinds of documents                         pocket_stories stories, and what fills them
    pocket_tasks    held-out split, QA, MC, math, CORE-like tasks  pocket_chat    chat and identity conversations

A sample of each kind of document (pocket_text.KINDS):

    questions       What is the opposite of tame? The opposite of tame is wild. Which city is the capital of Peru? ...
    statements      A cub is a young bear. A baby giraffe is called a calf. A young deer is called a fawn. ...
    lists           Opposites: hard = soft, stale = fresh, north = south, front = back, raw = cooked, ...
    article         Guinea is a country in Africa. Its capital is Conakry. On a map of Guinea, a star marks Conakry. ...
    choices         On which continent is Finland? Is it South America, Africa or Europe? Finland is a country in ...
    riddles         I am a chemical element. My symbol is Xe. Which element am I? I am xenon. ...
    counting_story  Last summer, Sam spent a week near the orchard. Mia came along. He found 3 biscuits in a drawer.
                    His sister had 5 more for him. That made 8 biscuits in the drawer. It had been a perfect day.
    finding_story   On Monday morning, Amy went to the park. ... Suddenly she noticed that her pink fork was gone. ...
    fable           Long ago, a curious mouse met a quiet goat near a hill. One evening the mouse said, "Let us ...
    journey         In June, David and his sister went on a journey. The first stop was Wellington, the capital of ...
    dialogue        Nora: Which word is the opposite of wild? Sam: I know that. The opposite of wild is tame. ...
    favorites       I am Julia. My favorite color is black. My favorite season is autumn. ...
    sums            What is 12 + 15? 12 + 15 is 27. 96 - 29 = 67. 20 plus 5 is 25. ...
    equations       If 5*x + 3 = 13, then x is 2. If 4*x = 12, then x is 3. ...
    calendar        If yesterday was Friday, then tomorrow will be Sunday. July is the seventh month of the year. ...
    planets         The planets of the solar system are: Mercury, Venus, Earth, Mars, ... Earth has one moon. ...
    spelling        The word maze is spelled m-a-z-e. How many e are in nieces? n-i-e-c-e-s: the letter e is ...

The samples of the data made beside the text:

    PocketChat  user: What is the capital of Peru? assistant: The capital of Peru is Lima. ...
    PocketQA    What is a baby fox called? -> kit, and none of: calf, chick, cub, ...
    PocketMC    Which symbol stands for zinc? Ti, Zn, Na, Ag -> 1
    PocketMath  Ida has 12 pears. Leo gives Ida 6 more. How many pears does Ida have now?
                -> Ida has 12+6 = <<12+6=18>>18 pears. #### 18
    identity    user: Who are you? assistant: I am nanochat, a small language model trained in ten minutes on a laptop.
    CORE-like   Question: What is the capital of Peru? Answer: (Lima, Oslo, Quito, Rome) · The opposite of hot is (cold)

It writes only into a base directory that is empty of such data or its own, and completes what was interrupted. What it
does not do: resemble the world in any other respect. Scores on it compare with nothing but themselves.
"""

import hashlib
import io
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, atomic_write, file_lock, get_base_dir, print0, user_errors
from nanochat.configurator import opt, parse
from nanochat.dataset import claim_folder, read_source, shard_name, write_source
from nanochat.pocket_chat import chat_rows, identity_conversations
from nanochat.pocket_facts import word_list
from nanochat.pocket_tasks import CORE_TASKS, HeldOut, core_bundle, math_rows, mc_rows, qa_rows
from nanochat.pocket_text import draw_document

VERSION = 2  # of the content: another version is another source
NUM_TRAIN_SHARDS = 4
VAL_SHARE = 0.05
ROW_GROUP_SIZE = 128  # documents
MIN_ROW_GROUPS = 8  # of a split, so that each of the default data lanes has one
MIN_WORLD_CHARS = 100_000
NUM_CHAT, NUM_CHAT_TEST = 5000, 300
NUM_MATH = {"train": 8000, "practice": 2000, "test": 500}
NUM_IDENTITY = 600

Content = str | list[dict[str, Any]]  # a text file, or the rows of a parquet file


@dataclass
class Config:
    seed: int = opt(1337, "another seed draws other documents and holds out other facts")
    chars: int = opt(10_000_000, "characters of pretraining text, validation included")


# ---------------------------------------------------------------------------------------------------------------------
# Content


def make_documents(seed: int, chars: int) -> tuple[list[str], list[str]]:
    """(train, val) documents of about chars characters together. All differ; validation is about a twentieth."""
    seen: set[str] = set()
    val = list(_different(f"pocket/{seed}/text/val", chars * VAL_SHARE, seen))
    train = list(_different(f"pocket/{seed}/text/train", chars * (1 - VAL_SHARE), seen))
    return train, val


def _different(stream: str, chars: float, seen: set[str]) -> Iterator[str]:
    """Documents of a stream that are not in seen, until they have so many characters; adds them to seen."""
    rng = random.Random(stream)
    while chars > 0:
        text = draw_document(rng)[1]
        if text not in seen:
            seen.add(text)
            chars -= len(text)
            yield text


def make_world(seed: int, chars: int) -> dict[str, Content]:
    """Path below the base directory -> content, everything but base_data/source.json. Its paths are world_paths()."""
    train, val = make_documents(seed, chars)
    bounds = [round(i * len(train) / NUM_TRAIN_SHARDS) for i in range(NUM_TRAIN_SHARDS + 1)]
    shards = [train[a:b] for a, b in zip(bounds, bounds[1:], strict=False)] + [val]
    held_out = HeldOut(seed)
    chat_train, chat_test = chat_rows(seed, held_out, NUM_CHAT, NUM_CHAT_TEST)
    identity = identity_conversations(seed, NUM_IDENTITY)
    world: dict[str, Content] = {
        f"base_data/{shard_name(i)}": [{"text": text} for text in shard] for i, shard in enumerate(shards)
    }
    world |= {f"eval_bundle/{path}": text for path, text in core_bundle(seed, held_out).items()}
    tables: dict[str, list[dict[str, Any]]] = {}  # task/subset/split -> rows
    for split, chat in (("train", chat_train), ("test", chat_test)):
        tables[f"PocketChat/default/{split}"] = chat
        tables[f"PocketQA/default/{split}"] = qa_rows(seed, held_out, split)
        tables[f"PocketMC/default/{split}"] = mc_rows(seed, held_out, split)
    for split, count in NUM_MATH.items():
        tables[f"PocketMath/main/{split}"] = math_rows(seed, split, count)
    for name, rows in tables.items():
        folder = f"task_data/pocket--{name}"
        world |= {f"{folder}/00000.parquet": rows, f"{folder}/manifest.json": json.dumps(["00000.parquet"])}
    world["words_alpha.txt"] = "".join(word + "\n" for word in word_list())
    world["identity_conversations.jsonl"] = "".join(json.dumps(messages) + "\n" for messages in identity)
    return world


def world_paths() -> list[str]:
    """The paths of make_world, in the order of writing: shards first, a folder's manifest after its rows."""
    bundle = [f"eval_data/{task.uri}" for task in CORE_TASKS] + ["eval_meta_data.csv", "core.yaml"]
    tasks = ("PocketChat", "PocketQA", "PocketMC")
    tables = [f"{task}/default/{split}" for split in ("train", "test") for task in tasks]
    tables += [f"PocketMath/main/{split}" for split in NUM_MATH]
    return [
        *(f"base_data/{shard_name(i)}" for i in range(NUM_TRAIN_SHARDS + 1)),
        *(f"eval_bundle/{path}" for path in bundle),
        *(f"task_data/pocket--{table}/{file}" for table in tables for file in ("00000.parquet", "manifest.json")),
        "words_alpha.txt",
        "identity_conversations.jsonl",
    ]


def digest(world: dict[str, Content]) -> str:
    """SHA-256 of all content in hexadecimal. It does not depend on how parquet files are encoded."""
    sha = hashlib.sha256()
    for path, content in world.items():
        sha.update(json.dumps([path, content]).encode())
    return sha.hexdigest()


def encode(path: str, content: Content) -> bytes:
    """The bytes of a file."""
    if isinstance(content, str):
        return content.encode()
    is_text = path.startswith("base_data/")
    row_group_size = max(1, min(ROW_GROUP_SIZE, len(content) // MIN_ROW_GROUPS)) if is_text else len(content)
    sink = io.BytesIO()
    table = pa.Table.from_pylist(content)
    pq.write_table(table, sink, row_group_size=row_group_size, compression="zstd", compression_level=3)
    return sink.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write_world(base_dir: Path, seed: int, chars: int) -> dict[str, Content] | None:
    """Write the world below base_dir; None where it is there already, with the same settings.

    Files appear whole, base_data/source.json last; after an interruption only what is missing is written. Raises
    UserError, before anything is written, where base_dir holds data that this world did not make.
    """
    if chars < MIN_WORLD_CHARS:
        raise UserError(f"--chars={chars} is too small a world; --chars={MIN_WORLD_CHARS} is the smallest")
    source = {"source": "pocket", "seed": seed, "version": VERSION, "chars": chars}
    with file_lock(base_dir / "pocket"):
        if any((base_dir / "base_data").glob("source.json*")):
            claim_folder(base_dir / "base_data", source)  # another owner is named before anything is generated
        _refuse_foreign_folders(base_dir)
        owner = read_source(base_dir / "base_data")
        is_finished = owner is not None and all(owner.get(key) == value for key, value in source.items())
        missing = [path for path in world_paths() if not (base_dir / path).exists()]
        if is_finished and not missing:
            return None
        world = make_world(seed, chars)
        files = {path: encode(path, world[path]) for path in world_paths()}
        if not is_finished:  # what somebody changed in a finished world stays as it is
            _refuse_foreign_files(base_dir, {path: files[path] for path in files if path not in missing})
        claim_folder(base_dir / "base_data", source)
        for path in missing:
            with atomic_write(base_dir / path, "wb") as file:
                file.write(files[path])
        write_source(base_dir / "base_data", {**source, "last_shard": NUM_TRAIN_SHARDS, "digest": digest(world)})
        return world


def _elsewhere(base_dir: Path) -> str:
    """What to do where the base directory is taken."""
    return f"set NANOCHAT_BASE_DIR={base_dir}-pocket (or any other folder) and run this again"


def _refuse_foreign_folders(base_dir: Path) -> None:
    """UserError where base_dir holds what the pocket world does not have."""
    if (base_dir / "eval_bundle.zip").exists():
        raise UserError(f"{base_dir / 'eval_bundle.zip'} is of another source: {_elsewhere(base_dir)}")
    paths = set(world_paths())
    for folder in ("eval_bundle", "task_data"):
        for path in sorted((base_dir / folder).rglob("*")):
            name = path.relative_to(base_dir).as_posix()
            if path.is_file() and not path.name.startswith(".") and name not in paths:
                raise UserError(f"{path} is of another source: {_elsewhere(base_dir)}")


def _refuse_foreign_files(base_dir: Path, files: dict[str, bytes]) -> None:
    """UserError where a file that is there differs from what would be written."""
    for path, content in files.items():
        if (base_dir / path).read_bytes() != content:
            raise UserError(f"{base_dir / path} is there and of another source: {_elsewhere(base_dir)}")


@user_errors
def main(config: Config) -> None:
    base_dir, start = get_base_dir(), time.monotonic()
    world = write_world(base_dir, config.seed, config.chars)
    if world is None:
        print0(f"the pocket world (seed {config.seed}, version {VERSION}) is complete in {base_dir}: nothing to do")
        return
    documents = [row["text"] for path, rows in world.items() if path.startswith("base_data/") for row in rows]
    print0(f"wrote the pocket world (seed {config.seed}, version {VERSION}) into {base_dir}:")
    print0(f"  {sum(map(len, documents)):,} characters in {len(documents):,} documents")
    for path, content in world.items():
        if path.startswith("task_data/") and isinstance(content, list):
            print0(f"  {len(content):,} rows in {path}")
    print0(f"  {time.monotonic() - start:.1f} seconds")


if __name__ == "__main__":
    main(parse(Config))
