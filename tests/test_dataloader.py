"""The loaders: rows against a naive stream per lane, resumption, the token cache, errors, padded rows, the thread."""

import contextlib
import itertools
import json
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ByteTokenizer, write_shards

from nanochat import dataloader
from nanochat.common import UserError
from nanochat.dataloader import (
    Batch,
    Row,
    check_lanes,
    check_shards,
    conversation_data_loader,
    count_conversations,
    count_targets,
    deal_rows,
    padded_batches,
    prefetch,
    tokenizing_distributed_data_loader,
)
from nanochat.dataset import write_source
from nanochat.tokenizer import RustBPETokenizer
from tasks.common import Task

B, T, LANES = 4, 16, 4


def documents(count: int, seed: int) -> list[str]:
    """Distinct short texts, some empty, some longer than a row, some not ASCII."""
    rng = random.Random(seed)
    texts = [f"{seed}.{i}:" + "".join(rng.choices("abcdefghé", k=rng.randint(0, 40))) for i in range(count)]
    texts[count // 2] = ""
    return texts


TRAIN = [documents(9, seed=1), documents(6, seed=2)]  # 5 + 3 row groups of two documents
VAL = documents(8, seed=3)  # 4 row groups


@pytest.fixture
def shards(base_dir) -> list[Path]:
    return write_shards(base_dir, [*TRAIN, VAL])


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    """Be a rank as far as the loader looks: it reads the environment and needs no process group."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


def batches(count: int, split: str = "train", batch_size: int = B, **kwargs) -> list[Batch]:
    loader = tokenizing_distributed_data_loader(batch_size, T, split, ByteTokenizer(), LANES, **kwargs)
    return list(itertools.islice(loader, count))


def naive_streams(shards: list[list[str]], epochs: int = 1) -> list[list[int]]:
    """The tokens of each lane, as the module's docstring has it."""
    streams: list[list[int]] = [[] for _ in range(LANES)]
    groups = [texts[i : i + 2] for texts in shards for i in range(0, len(texts), 2)]
    for _ in range(epochs):
        for g, texts in enumerate(groups):
            for text in texts:
                streams[g % LANES] += [256, *text.encode("utf-8")]
    return streams


def naive_rows(shards: list[list[str]], count: int) -> list[tuple[list[int], list[int]]]:
    """The first rows of one process: one of each lane in turn."""
    streams = naive_streams(shards, epochs=200)
    rows = []
    for i in range(count):
        stream, k = streams[i % LANES], i // LANES
        rows.append((stream[k * T : (k + 1) * T], stream[k * T + 1 : (k + 1) * T + 1]))
    return rows


def as_rows(some_batches: list[Batch]) -> list[tuple[list[int], list[int]]]:
    return [
        (row.tolist(), target.tolist())
        for inputs, targets, _ in some_batches
        for row, target in zip(inputs, targets, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What is in the rows


@pytest.mark.parametrize(("split", "texts"), [("train", TRAIN), ("val", [VAL])])
def test_rows_are_those_of_the_naive_streams_over_several_epochs(shards, split, texts):
    rows = as_rows(batches(12, split))
    assert rows == naive_rows(texts, 12 * B)
    assert batches(12, split)[-1].cursors[0]["epoch"] > 0


@pytest.mark.parametrize(
    ("current", "message"),
    [
        (["a:1", "b:2", "c:3"], None),
        (["a:1", "b:2", "c:3", "d:4"], None),
        (["a:1", "b:9", "c:3"], "b is not what it was"),
        (["a:1", "c:3"], "b is no longer a training shard"),
        (["a:1", "b:2"], "c is no longer a training shard; the last one is the validation shard"),
        ([], "a is no longer a training shard"),
        (["a:1", "aa:5", "b:2", "c:3"], "b is not what it was, or not where it was"),
    ],
)
def test_a_run_goes_on_with_the_shards_that_it_began_with(current, message):
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        check_shards(["a:1", "b:2", "c:3"], current)


def test_shapes_and_types(shards):
    batch = batches(1)[0]
    assert batch.inputs.shape == batch.targets.shape == (B, T)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.is_contiguous() and batch.targets.is_contiguous()


def test_a_batch_is_not_overwritten_by_later_ones(shards):
    first, *_ = kept = batches(8)
    assert as_rows([first]) == as_rows(kept)[:B] == naive_rows(TRAIN, B)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_the_batch_size_does_not_change_the_rows(shards, batch_size):
    count = 24
    assert as_rows(batches(count // batch_size, batch_size=batch_size)) == naive_rows(TRAIN, count)


def test_an_epoch_holds_every_document_exactly_once(shards):
    """All the inputs of a lane up to where its second epoch begins are whole documents; no other lane has them."""
    some_batches = batches(40)
    found = []
    for lane, stream in enumerate(naive_streams(TRAIN)):
        tokens = torch.cat([batch.inputs[lane] for batch in some_batches]).tolist()  # B = LANES: row i is of lane i
        assert len(tokens) > len(stream)
        text = bytes(0 if token == 256 else token for token in tokens[: len(stream)])
        found += text[1:].split(b"\x00")
    assert sorted(found) == sorted(text.encode("utf-8") for texts in TRAIN for text in texts)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_holds_the_same_rows_at_every_world_size(shards, monkeypatch, world_size):
    """Each rank takes B rows a step, and so one process takes B * world_size."""
    steps = 10
    alone = [set(map(str, as_rows([b]))) for b in batches(steps, batch_size=B * world_size)]
    together: list[set[str]] = [set() for _ in range(steps)]
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        for step, batch in enumerate(batches(steps)):
            assert set(batch.cursors) == set(range(rank, LANES, world_size))
            rows = set(map(str, as_rows([batch])))
            assert not rows & together[step]
            together[step] |= rows
    assert together == alone


def test_a_row_group_may_be_longer_and_a_document_shorter_than_rows(base_dir):
    texts = [["x" * 200, ""], ["y" * 3, ""], ["", ""], ["", "z"]]
    flat = [text for group in texts for text in group]
    write_shards(base_dir, [flat, flat])
    assert as_rows(batches(20)) == naive_rows([flat], 20 * B)


# ---------------------------------------------------------------------------------------------------------------------
# Resumption


def merged(cursors_of_ranks: list[dict]) -> dict[int, dict[str, int]]:
    """What gather_cursors gives, after a checkpoint's trip through JSON."""
    together = {lane: cursor for cursors in cursors_of_ranks for lane, cursor in cursors.items()}
    return {int(lane): cursor for lane, cursor in json.loads(json.dumps(together)).items()}


def test_a_run_goes_on_after_any_batch_as_if_nothing_had_happened(shards):
    """Through the end of the first epoch and of the second one."""
    whole = batches(24)
    assert whole[-1].cursors[0]["epoch"] >= 2
    for stop in range(1, 24):
        resumed = batches(24 - stop, cursors=merged([whole[stop - 1].cursors]))
        assert as_rows(resumed) == as_rows(whole[stop:])
        assert resumed[-1].cursors == whole[-1].cursors


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("stop", [1, 7])
def test_a_run_goes_on_at_another_world_size(shards, monkeypatch, before, after, stop):
    """Eight rows a step, two from each lane; step 7 is in the second epoch."""
    steps, rows = 10, 8
    whole = batches(steps, batch_size=rows)
    cursors = []
    for rank in range(before):
        as_rank(monkeypatch, rank, before)
        cursors.append(batches(stop, batch_size=rows // before)[-1].cursors)
    if stop == 7:
        assert merged(cursors)[0]["epoch"] >= 1
    resumed: list[list[str]] = [[] for _ in range(steps - stop)]
    for rank in range(after):
        as_rank(monkeypatch, rank, after)
        for step, batch in enumerate(batches(steps - stop, batch_size=rows // after, cursors=merged(cursors))):
            resumed[step] += map(str, as_rows([batch]))
    assert [sorted(step) for step in resumed] == [sorted(map(str, as_rows([batch]))) for batch in whole[stop:]]


def test_gathered_cursors_are_in_the_order_of_lanes():
    assert list(dataloader.gather_cursors({3: {"epoch": 0}, 1: {"epoch": 1}})) == [1, 3]


# ---------------------------------------------------------------------------------------------------------------------
# The token cache


def cache_files(base_dir: Path, pattern: str = "*.npy") -> list[Path]:
    return sorted((base_dir / "tokenized_data").rglob(pattern))


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many documents each call of the tokenizer got."""
    counts: list[int] = []
    encode = ByteTokenizer.encode_batch_flat

    def counting(self, texts, prepend):
        counts.append(len(texts))
        return encode(self, texts, prepend)

    monkeypatch.setattr(ByteTokenizer, "encode_batch_flat", counting)
    return counts


def test_the_cache_changes_no_row_and_off_leaves_no_file(shards, base_dir):
    without = batches(12, tokenized_cache=False)
    assert not (base_dir / "tokenized_data").exists()
    cold, warm = batches(12), batches(12)
    assert as_rows(without) == as_rows(cold) == as_rows(warm)


def test_text_is_tokenized_once(shards, encoded):
    batches(24)  # more than two epochs
    assert sum(encoded) == sum(map(len, TRAIN))
    batches(24)
    assert sum(encoded) == sum(map(len, TRAIN))


def test_the_cache_holds_ids_and_where_documents_begin(shards, base_dir):
    batches(24)
    ids, offsets = (np.load(cache_files(base_dir, f"00000.{kind}.npy")[0]) for kind in ("ids", "offsets"))
    expected = [[256, *text.encode("utf-8")] for text in TRAIN[0][:2]]
    assert ids.dtype == np.uint16 and ids.tolist() == expected[0] + expected[1]
    assert offsets.dtype == np.int64 and offsets.tolist() == [0, len(expected[0]), len(ids)]


@pytest.mark.parametrize("size", [0, 50, 130, -1], ids=["empty", "within the header", "one token", "one byte short"])
def test_a_file_cut_short_is_encoded_anew(shards, base_dir, size):
    expected = as_rows(batches(12))
    whole = {path: path.read_bytes() for path in cache_files(base_dir, "*.ids.npy")}
    for path, content in whole.items():
        path.write_bytes(content[:size])
    assert as_rows(batches(12)) == expected
    assert {path: path.read_bytes() for path in whole} == whole


def test_no_temporary_file_is_left(shards, base_dir):
    batches(24)
    names = [path.name for path in (base_dir / "tokenized_data").rglob("*") if path.is_file()]
    assert len(names) == 2 * 8 and all(name.endswith((".ids.npy", ".offsets.npy")) for name in names)


def test_another_tokenizer_and_other_text_have_other_files(shards, base_dir, encoded):
    batches(12)
    loader = tokenizing_distributed_data_loader(B, T, "train", ByteTokenizer("another"), LANES)
    list(itertools.islice(loader, 12))
    assert sum(encoded) == 2 * sum(map(len, TRAIN))
    write_shards(base_dir, [[text.upper() + "!" for text in TRAIN[0]], TRAIN[1], VAL])
    assert as_rows(batches(12)) == naive_rows([[text.upper() + "!" for text in TRAIN[0]], TRAIN[1]], 12 * B)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def loader_error(**kwargs) -> str:
    """The message of the error that comes before the first batch."""
    settings = {"B": B, "T": T, "split": "train", "tokenizer": ByteTokenizer(), "data_lanes": LANES, **kwargs}
    with pytest.raises(UserError) as error:
        tokenizing_distributed_data_loader(**settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_fewer_row_groups_than_lanes_names_lanes_that_work(shards):
    message = loader_error(data_lanes=12)
    assert "8 row groups" in message and "--data_lanes=6" in message and "dev.repackage_data_reference" in message
    write_source(shards[0].parent, {"source": "fineweb-edu"})
    assert "nanochat.dataset -n 8" in loader_error(data_lanes=12)
    tokenizing_distributed_data_loader(B, T, "train", ByteTokenizer(), 6)


def test_more_data_is_no_remedy_for_a_small_validation_shard(shards):
    message = loader_error(split="val", data_lanes=8)
    assert "4 row groups" in message and "--data_lanes=4" in message and "nanochat.dataset" not in message


def suggestion(num_groups: int, data_lanes: int, world_size: int) -> tuple[int, int] | None:
    """(data_lanes, world_size) that an error suggests; None where there is no error."""
    try:
        check_lanes(num_groups, data_lanes, world_size, f"the train split has {num_groups} row groups")
    except UserError as error:
        words = str(error).replace(",", " ").replace("--data_lanes=", "try ").split()
        lanes = int(words[len(words) - 1 - words[::-1].index("try") + 1])
        if f"and {lanes} processes" in str(error):
            world_size = lanes
        return lanes, world_size
    return None


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_suggested_lanes_work(world_size):
    for num_groups, data_lanes in itertools.product(range(1, 20), range(-1, 17)):
        settings, tries = (data_lanes, world_size), 0
        while (better := suggestion(num_groups, *settings)) is not None:
            settings, tries = better, tries + 1
            assert tries <= 2  # one for lanes that the ranks cannot share, one for too few row groups


def test_missing_data_names_the_command():
    assert "python -m nanochat.dataset" in loader_error()


def test_an_empty_shard_is_refused_by_name(base_dir):
    write_shards(base_dir, [TRAIN[0], [], VAL])
    assert "shard_00001.parquet" in loader_error()


# ---------------------------------------------------------------------------------------------------------------------
# Conversations and documents in packed rows


class Examples(Task):
    """A list of examples as a task."""

    name = "examples"

    def __init__(self, examples: list[dict[str, Any]]):
        super().__init__()
        self.examples = examples

    def num_examples(self) -> int:
        return len(self.examples)

    def get_example(self, index: int) -> dict[str, Any]:
        return self.examples[index]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def bpe() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(["What is the answer? It is 5."], 270)


def mixed_examples(count: int) -> Examples:
    """Conversations and documents of different lengths, a few of them longer than a row."""
    rng = random.Random(4)
    texts = [f"{i}" + "x" * rng.randint(0, 2 * T if i % 5 == 0 else 8) for i in range(count)]
    return Examples([{"text": text} if i % 3 == 0 else chat(text, str(i)) for i, text in enumerate(texts)])


NUM_EXAMPLES = 21  # lanes have 6, 5, 5 and 5 of them


def chat_batches(count: int, bpe: RustBPETokenizer, batch_size: int = B, **kwargs) -> list[Batch]:
    loader = conversation_data_loader(batch_size, T, mixed_examples(NUM_EXAMPLES), bpe, LANES, **kwargs)
    return list(itertools.islice(loader, count))


def chat_lanes(bpe: RustBPETokenizer) -> list[list[list[int]]]:
    """The tokens of each conversation of each lane, cut to a row and its last target."""
    rendered = [bpe.render_conversation(example)[0][: T + 1] for example in mixed_examples(NUM_EXAMPLES)]
    assert max(map(len, rendered)) == T + 1 > min(map(len, rendered))
    return [rendered[lane::LANES] for lane in range(LANES)]


def test_packed_conversations_are_those_of_the_naive_streams(bpe):
    """Over several epochs, every token an input once and a target once, whoever says it."""
    streams = [sum(lane, []) * 9 for lane in chat_lanes(bpe)]
    rows = as_rows(chat_batches(24, bpe))
    for i, (inputs, targets) in enumerate(rows):
        k = i // LANES * T
        assert (inputs, targets) == (streams[i % LANES][k : k + T], streams[i % LANES][k + 1 : k + T + 1])
    assert chat_batches(24, bpe)[-1].cursors[0]["epoch"] >= 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_holds_the_same_conversations_at_every_world_size(bpe, monkeypatch, world_size):
    steps, rows = 12, 8
    alone = [sorted(as_rows([batch])) for batch in chat_batches(steps, bpe, batch_size=rows)]
    together: list[list] = [[] for _ in range(steps)]
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        for step, batch in enumerate(chat_batches(steps, bpe, batch_size=rows // world_size)):
            together[step] += as_rows([batch])
    assert [sorted(step) for step in together] == alone


def test_conversations_go_on_after_any_batch_in_the_first_epoch_and_later(bpe):
    whole = chat_batches(20, bpe)
    assert whole[-1].cursors[0]["epoch"] >= 2
    for stop in range(1, 20):
        resumed = chat_batches(20 - stop, bpe, cursors=merged([whole[stop - 1].cursors]))
        assert as_rows(resumed) == as_rows(whole[stop:])
        assert resumed[-1].cursors == whole[-1].cursors


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_conversations_are_counted_when_they_have_been_read_to_their_ends(bpe, monkeypatch, world_size):
    """Over all ranks: 0 at first, all of them once every lane is through, and on through the second epoch."""
    steps, rows = 12, 8
    counts = [0] * steps
    for rank in range(world_size):
        if world_size > 1:
            as_rank(monkeypatch, rank, world_size)
        for step, batch in enumerate(chat_batches(steps, bpe, batch_size=rows // world_size)):
            counts[step] += count_conversations(batch.cursors, NUM_EXAMPLES, LANES)
    expected = []
    for step in range(steps):
        read_tokens, count = (step + 1) * rows // LANES * T, 0
        for lane in chat_lanes(bpe):
            ends = np.cumsum([len(conversation) for conversation in lane * 9])
            count += int((ends <= read_tokens).sum())
        expected.append(count)
    assert counts == expected
    assert counts[0] < NUM_EXAMPLES < counts[-1] and sorted(counts) == counts
    assert count_conversations(None, NUM_EXAMPLES, LANES) == 0


def test_the_count_is_whole_exactly_where_an_epoch_ends(bpe):
    """Each lane has two conversations of T tokens in all, so that an epoch ends with a row."""
    text = "x" * (T // 2 - 1)  # and <|bos|>
    loader = conversation_data_loader(LANES, T, Examples([{"text": text}] * 2 * LANES), bpe, LANES)
    for epoch, batch in enumerate(itertools.islice(loader, 3), start=1):
        assert count_conversations(batch.cursors, 2 * LANES, LANES) == epoch * 2 * LANES


def test_a_broken_conversation_is_named_with_its_task_and_index(bpe):
    examples = mixed_examples(NUM_EXAMPLES)
    examples.examples[13] = {"messages": [{"role": "user", "content": 5}]}
    with pytest.raises(UserError, match="examples, row 13: message 0 has content of type int"):
        list(itertools.islice(conversation_data_loader(B, T, examples, bpe, LANES), 12))


@pytest.mark.parametrize(("count", "fix"), [(0, "nothing to read"), (3, "--data_lanes=2")])
def test_too_few_conversations_for_the_lanes_are_refused_at_once(bpe, count, fix):
    with pytest.raises(UserError, match=f"examples has {count} conversations.*{fix}"):
        conversation_data_loader(B, T, Examples([chat("a", "b")] * count), bpe, LANES)


# ---------------------------------------------------------------------------------------------------------------------
# Conversations in rows of their own


def some_rows(*lengths: int) -> list[Row]:
    """Rows of distinct tokens, every second one supervised, of different weights."""
    rows, start = [], 100
    for number, length in enumerate(lengths):
        tokens = list(range(start, start + length))
        rows.append(Row(tokens, [1 - i % 2 for i in range(length)], weight=number + 0.5))
        start += length
    return rows


def test_targets_are_counted_without_the_first_token_which_nothing_predicts():
    assert count_targets(some_rows(2, 3, 6)) == 0 + 1 + 2
    assert count_targets([]) == 0
    assert count_targets([Row([1, 2, 3], [1, 1, 1])]) == 2


def test_padded_batches_hold_every_row_once_shifted_masked_and_weighted():
    rows = some_rows(5, 2, 7, 3, 4)
    batches = list(padded_batches(rows, 2, pad_token=9, device="cpu"))
    assert [batch[0].shape for batch in batches] == [(2, 2), (2, 4), (1, 6)]  # sorted, so that little is padding
    found = [row for batch in batches for row in zip(*(tensor.tolist() for tensor in batch), strict=True)]
    for row, (inputs, targets, weights) in zip(sorted(rows, key=lambda row: len(row.tokens)), found, strict=True):
        padding = len(inputs) - len(row.tokens) + 1
        assert inputs == row.tokens[:-1] + [9] * padding
        expected = [t if m else -1 for t, m in zip(row.tokens[1:], row.mask[1:], strict=True)]
        assert targets == expected + [-1] * padding
        assert weights == [row.weight] * len(inputs)
    for inputs, targets, weights in batches:
        assert (inputs.dtype, targets.dtype, weights.dtype) == (torch.int64, torch.int64, torch.float32)
    assert sum(int((batch[1] >= 0).sum()) for batch in batches) == count_targets(rows)


def test_no_rows_give_one_row_without_a_target():
    [(inputs, targets, _)] = padded_batches([], 4, pad_token=9, device="cpu")
    assert inputs.tolist() == [[9]] and targets.tolist() == [[-1]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_rows_are_dealt_out_whole_and_in_about_equal_lengths(monkeypatch, world_size):
    rng = random.Random(0)
    rows = some_rows(*(rng.choice((3, 30, 200)) + rng.randint(0, 9) for _ in range(24)))
    shares = []
    for rank in range(world_size):
        as_rank(monkeypatch, rank, world_size)
        shares.append(deal_rows(rows))
    assert sorted(itertools.chain(*shares)) == sorted(rows)
    for shortest in (0, 30, 200):  # all rows, the longer ones, the longest ones: of each kind every rank has its share
        counts = [sum(len(row.tokens) >= shortest for row in share) for share in shares]
        assert max(counts) - min(counts) <= 1


def test_there_may_be_fewer_rows_than_ranks(monkeypatch):
    as_rank(monkeypatch, 3, 4)
    assert deal_rows(some_rows(4, 5)) == []


# ---------------------------------------------------------------------------------------------------------------------
# The thread


FORMER_THREADS: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def former_threads() -> None:
    """Threads that other tests have left, such as those whose errors somebody still holds, are not looked at."""
    FORMER_THREADS.update(threading.enumerate())


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch" and thread not in FORMER_THREADS]


def test_prefetch_gives_the_same_items_in_order():
    assert list(prefetch(iter(range(100)), depth=3)) == list(range(100))
    assert prefetch_threads() == []


def test_prefetch_works_ahead_but_not_further_than_asked():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    iterator = prefetch(items(), depth=3)
    assert next(iterator) == 0
    deadline = time.monotonic() + 5
    while len(made) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(made) == 5  # one taken, three waiting, one in hand
    iterator.close()


@pytest.mark.parametrize("end", ["close", "drop"])
def test_the_thread_ends_with_the_loader(shards, end):
    loader = tokenizing_distributed_data_loader(B, T, "train", ByteTokenizer(), LANES)
    next(loader)
    assert len(prefetch_threads()) == 1
    if end == "close":
        loader.close()
    del loader
    assert prefetch_threads() == []


def test_a_loader_that_is_not_used_starts_no_thread(shards):
    loader = tokenizing_distributed_data_loader(B, T, "train", ByteTokenizer(), LANES)
    assert prefetch_threads() == []
    del loader


def test_an_exception_in_the_thread_arrives_after_the_good_items():
    def items():
        yield 1
        yield 2
        raise UserError("the shard is damaged")

    iterator = prefetch(items(), depth=8)
    assert [next(iterator), next(iterator)] == [1, 2]
    with pytest.raises(UserError, match="the shard is damaged"):
        next(iterator)
    assert prefetch_threads() == []


def test_a_shard_damaged_after_the_start_is_a_user_error_that_names_it(shards):
    loader = tokenizing_distributed_data_loader(B, T, "train", ByteTokenizer(), LANES)
    content = bytearray(shards[0].read_bytes())
    content[4:200] = os.urandom(196)  # the row groups' bytes; the footer stays
    shards[0].write_bytes(content)
    with pytest.raises(UserError, match="shard_00000.parquet"):
        list(itertools.islice(loader, 12))
