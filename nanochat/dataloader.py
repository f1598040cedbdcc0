"""Batches: documents and conversations packed into full rows, and conversations in rows of their own.

The order of the data depends on the data and the settings, never on the number of processes. For packed rows:

- the parts of the data are numbered, and part g belongs to lane g % data_lanes. A part is a row group of a shard in
  pretraining, and a conversation in midtraining;
- a lane joins its documents or conversations, each begun by <|bos|>, into one endless stream of tokens (epoch after
  epoch), and row k of the lane is tokens k*T to (k+1)*T of it, with the token after each as its target. Nothing is
  lost or doubled;
- rank r owns the lanes congruent to r modulo the world size, and takes one row from each of its lanes in turn.

So as long as every optimizer step takes equally many rows from each lane, one process and N see the same rows in a
step. The position in the data is one cursor a lane: {"epoch", "group", "offset"}, the next token that was not yet an
input. A row group is tokenized when a lane first reaches it and left in tokenized_data/ for later epochs, evaluations
and resumed runs, which read it by memory map.

In finetuning each conversation has a row of its own, so that nothing leaks from one to another. All ranks know the
conversations of a step; sorted by length they are dealt out to the ranks, so that rows of a micro-batch are about
equally long and little is padding. As a step's loss is a sum over its targets, who gets which row changes nothing.

What it does not do: shuffling (the shards come shuffled, and so do mixtures of tasks) and keeping documents apart in a
packed row (attention may look across <|bos|>, as is usual in pretraining).
"""

import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nanochat.common import (
    UserError,
    all_reduce_sum,
    atomic_write,
    check_same,
    gather_objects,
    get_base_dir,
    get_dist_info,
    pin,
)
from nanochat.conversation import ConversationError
from nanochat.cross_entropy import IGNORE_INDEX
from nanochat.dataset import (
    RowGroup,
    data_folder,
    read_row_group,
    read_source,
    row_groups,
    shard_fingerprint,
    split_files,
)

DATA_LANES = 8
PREFETCH_BATCHES = 4


class Batch(NamedTuple):
    """One micro-batch of this rank, and where its lanes stand after it."""

    inputs: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64
    cursors: dict[int, dict[str, int]]  # lane -> {"epoch", "group", "offset"}


class TokenStore:
    """The tokens of row groups: read from tokenized_data/<tokenizer hash>/, or encoded now and left there.

    A row group is two files, NNNNN.offsets.npy (int64, where each document begins, and the end) and NNNNN.ids.npy
    (uint16 or uint32), in a folder named after the shard and a fingerprint of it. The ids are renamed into place last:
    where they are, the row group is complete.
    """

    def __init__(self, tokenizer: Any, use_cache: bool = True):
        self.tokenizer = tokenizer
        self.folder = get_base_dir() / "tokenized_data" / tokenizer.hash if use_cache else None
        self.shard_folders: dict[Path, Path] = {}

    def tokens(self, group: RowGroup) -> np.ndarray:
        """All tokens of a row group, (n,) uint16 or uint32, each document begun by <|bos|>."""
        if self.folder is None:
            return self._encode(group)[0]
        if group.path not in self.shard_folders:
            self.shard_folders[group.path] = self.folder / f"{group.path.stem}-{shard_fingerprint(group.path)}"
        stem = self.shard_folders[group.path] / f"{group.index:05d}"
        path = Path(f"{stem}.ids.npy")
        with contextlib.suppress(FileNotFoundError, ValueError, EOFError):  # a damaged file is encoded anew
            return np.load(path, mmap_mode="r")
        ids, offsets = self._encode(group)
        try:
            for array, name in ((offsets, f"{stem}.offsets.npy"), (ids, path)):
                with atomic_write(name, "wb") as f:
                    np.save(f, array)
        except OSError as error:  # a full disk must not end a run that can do without the cache
            print(f"warning: token ids are no longer kept in {self.folder}: {error}", file=sys.stderr, flush=True)
            self.folder = None
        return ids

    def _encode(self, group: RowGroup) -> tuple[np.ndarray, np.ndarray]:
        texts = read_row_group(group.path, group.index)
        return self.tokenizer.encode_batch_flat(texts, prepend=self.tokenizer.get_bos_token_id())


class Lane:
    """One endless stream of tokens over its own parts of the data (groups), and a cursor on it.

    read_tokens: part -> its tokens (n,), of an integer dtype.
    """

    def __init__(
        self,
        groups: Sequence[Any],
        read_tokens: Callable[[Any], np.ndarray],
        cursor: dict[str, int] | None = None,
    ):
        self.groups, self.read_tokens = groups, read_tokens
        self.epoch, self.group, self.offset = 0, 0, 0
        if cursor is not None:
            self.epoch, self.group, self.offset = cursor["epoch"], cursor["group"], cursor["offset"]
        self.tokens = read_tokens(groups[self.group])
        self._skip_read_groups()

    def cursor(self) -> dict[str, int]:
        """Where the next row begins."""
        return {"epoch": self.epoch, "group": self.group, "offset": self.offset}

    def read_row(self, row: np.ndarray) -> None:
        """Fill row (T+1,): T tokens from the cursor on, which moves past them, and the one that follows."""
        filled, T = 0, len(row) - 1
        while filled < T:
            part = self.tokens[self.offset : self.offset + T - filled]
            row[filled : filled + len(part)] = part
            filled += len(part)
            self.offset += len(part)
            self._skip_read_groups()
        row[T] = self.tokens[self.offset]

    def _skip_read_groups(self) -> None:
        """Move on while the cursor is at the end of a part, so that it always names a token."""
        skipped = 0
        while self.offset >= len(self.tokens):
            skipped += 1
            if skipped > len(self.groups):
                raise UserError(f"no text in {self.groups[0]} and what follows it; is the data empty?")
            self.offset, self.group = 0, self.group + 1
            if self.group == len(self.groups):
                self.group, self.epoch = 0, self.epoch + 1
            self.tokens = self.read_tokens(self.groups[self.group])


def shard_identities(split: str) -> list[str]:
    """'name:fingerprint' of each shard of a split, in order: what a checkpoint's cursors are positions in."""
    return [f"{path.name}:{shard_fingerprint(path)}" for path in split_files(split)]


def check_shards(saved: list[str], current: list[str]) -> None:
    """Raise UserError unless the shards that a run began with are there, unchanged and first; more may have come."""
    if current[: len(saved)] == saved:
        return
    first = next((s for s in saved if s not in current), None)  # None where others have come before or between them
    first = first or next(s for s, c in zip(saved, current, strict=False) if s != c)
    name = first.split(":")[0]
    if name in (shard.split(":")[0] for shard in current):
        what = f"{name} is not what it was, or not where it was among the shards"
    else:
        what = f"{name} is no longer a training shard; the last one is the validation shard"
    raise UserError(
        f"the data has changed since the run began ({what}): put it back, or start anew with --resume=never"
    )


def check_lanes(num_groups: int, data_lanes: int, world_size: int, what: str, more: str = "") -> None:
    """Raise UserError unless the lanes can be shared out over the ranks and each lane gets a part of the data.

    what: how many parts there are, in words; more: what else would help.
    """
    if data_lanes < 1 or data_lanes % world_size:
        nearest = max(1, round(data_lanes / world_size)) * world_size
        raise UserError(f"--data_lanes={data_lanes} must be a multiple of the {world_size} processes; try {nearest}")
    if num_groups < data_lanes:
        if not num_groups:
            raise UserError(f"{what}: there is nothing to read{more}")
        # a divisor of the lanes, so that a total batch size that fitted them still fits
        unit = world_size if num_groups >= world_size else 1
        most = max(n for n in range(unit, num_groups + 1, unit) if data_lanes % n == 0)
        fix = f"use --data_lanes={most}" + (f" and {most} processes" if most < world_size else "")
        raise UserError(f"{what}, fewer than --data_lanes={data_lanes}: {fix}{more}")


def tokenizing_distributed_data_loader(
    B: int,
    T: int,
    split: str,
    tokenizer: Any,
    data_lanes: int = DATA_LANES,
    device: torch.device | str = "cpu",
    cursors: dict[int, dict[str, int]] | None = None,
    tokenized_cache: bool = True,
) -> Iterator[Batch]:
    """Yield this rank's batches of a split ("train" or "val") for ever, made in the background.

    cursors: where to go on, one cursor for each lane (gather_cursors of a former loader, at any world size); None
    starts at the beginning. Row i of the rank's sequence comes from its lane i modulo the number of its lanes.
    Raises UserError at once, before the first batch, for data that cannot serve the lanes or are not the same on all
    hosts. Every rank must call.
    """
    check_same(f"the shards of the {split} split", shard_identities(split))
    groups = row_groups(split_files(split))
    repackage = "python -m dev.repackage_data_reference --input=TEXTS --output=SHARDS"
    more = f", or make smaller row groups of the text ({repackage})"
    if read_source(data_folder()) is not None:  # else the parquet files are the user's own
        more = ", or get more data (python -m nanochat.dataset -n 8)" if split == "train" else ""
    check_lanes(len(groups), data_lanes, get_dist_info()[3], f"the {split} split has {len(groups)} row groups", more)
    store = TokenStore(tokenizer, tokenized_cache)
    return _packed_batches(B, T, groups, store.tokens, data_lanes, device, cursors)


def conversation_data_loader(
    B: int,
    T: int,
    task: Any,
    tokenizer: Any,
    data_lanes: int = DATA_LANES,
    device: torch.device | str = "cpu",
    cursors: dict[int, dict[str, int]] | None = None,
) -> Iterator[Batch]:
    """Like tokenizing_distributed_data_loader, over the examples of a task (conversations and documents).

    Every token is a target. What is longer than a row and its last target is cut. Raises UserError naming the example
    that breaks the rules of conversations.
    """
    check_lanes(len(task), data_lanes, get_dist_info()[3], f"{task.name} has {len(task)} conversations")

    def read_tokens(index: int) -> np.ndarray:
        return np.array(render_example(tokenizer, task, index, T + 1)[0])

    return _packed_batches(B, T, range(len(task)), read_tokens, data_lanes, device, cursors)


def count_conversations(cursors: dict[int, dict[str, int]] | None, num_examples: int, data_lanes: int) -> int:
    """How many conversations the lanes of all ranks have read to their ends. Every rank must call.

    cursors: those of this rank's lanes, None at the very beginning.
    """
    sizes = {lane: len(range(lane, num_examples, data_lanes)) for lane in cursors or {}}
    return all_reduce_sum(sum(c["epoch"] * sizes[lane] + c["group"] for lane, c in (cursors or {}).items()))


def _packed_batches(
    B: int,
    T: int,
    groups: Sequence[Any],
    read_tokens: Callable[[Any], np.ndarray],
    data_lanes: int,
    device: torch.device | str,
    cursors: dict[int, dict[str, int]] | None,
) -> Iterator[Batch]:
    """Batches of this rank's lanes over the parts of some data, made in the background."""
    _, rank, _, world_size = get_dist_info()
    own = range(rank, data_lanes, world_size)

    def batches() -> Iterator[Batch]:
        lanes = {lane: Lane(groups[lane::data_lanes], read_tokens, cursors and cursors[lane]) for lane in own}
        rows = np.empty((B, T + 1), dtype=np.int64)
        next_row = 0
        while True:
            for row in rows:
                lanes[own[next_row % len(own)]].read_row(row)
                next_row += 1
            # contiguous copies: CUDA copies views through pageable memory, pinned or not
            inputs, targets = (pin(torch.from_numpy(part.copy()), device) for part in (rows[:, :-1], rows[:, 1:]))
            yield Batch(inputs, targets, {lane: lanes[lane].cursor() for lane in own})

    return _on_device(prefetch(batches(), PREFETCH_BATCHES), torch.device(device))


def _on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    for inputs, targets, cursors in batches:
        yield Batch(inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True), cursors)


def gather_cursors(cursors: dict[int, dict[str, int]]) -> dict[int, dict[str, int]]:
    """The cursors of all lanes from each rank's own. Every rank must call, between two optimizer steps."""
    merged: dict[int, dict[str, int]] = {}
    for part in gather_objects(cursors):
        merged.update(part)
    return dict(sorted(merged.items()))


# ---------------------------------------------------------------------------------------------------------------------
# Conversations in rows of their own


class Row(NamedTuple):
    """A sequence to train on, its last token a target only."""

    tokens: list[int]
    mask: list[int]  # 1 where a token is to be learned
    weight: float = 1.0  # of its losses


def render_example(tokenizer: Any, task: Any, index: int, max_tokens: int) -> tuple[list[int], list[int]]:
    """(ids, mask) of an example of a task, at most max_tokens. Raises UserError naming one that breaks the rules."""
    try:
        return tokenizer.render_conversation(task[index], max_tokens)
    except ConversationError as error:
        raise UserError(f"{task.describe(index)}: {error}") from None


def count_targets(rows: Sequence[Row]) -> int:
    """How many supervised targets rows have: the masked tokens but for the first, which nothing predicts."""
    return sum(sum(row.mask[1:]) for row in rows)


def deal_rows(rows: Sequence[Row]) -> list[Row]:
    """This rank's rows of a step whose rows all ranks know: of about the same lengths as the other ranks'. Local."""
    _, rank, _, world_size = get_dist_info()
    return sorted(rows, key=lambda row: len(row.tokens))[rank::world_size]


def padded_batches(
    rows: Sequence[Row], B: int, pad_token: int, device: torch.device | str
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Micro-batches (inputs, targets, weights) of at most B rows each, sorted by length; at least one.

    inputs and targets (b, t) int64, padded on the right with pad_token and IGNORE_INDEX to the longest row of the
    micro-batch; weights (b, t) float32, each row's weight in all its positions. No rows at all give one row without any
    target: on every rank something has to go through the model, or its gradients would be missing.
    """
    rows = sorted(rows, key=lambda row: len(row.tokens)) or [Row([pad_token, pad_token], [0, 0])]
    for start in range(0, len(rows), B):
        part = rows[start : start + B]
        longest = max(len(row.tokens) for row in part) - 1
        inputs = np.full((len(part), longest), pad_token, dtype=np.int64)
        targets = np.full((len(part), longest), IGNORE_INDEX, dtype=np.int64)
        for i, row in enumerate(part):
            tokens, mask = np.array(row.tokens), np.array(row.mask[1:], dtype=bool)
            inputs[i, : len(tokens) - 1] = tokens[:-1]
            targets[i, : len(tokens) - 1] = np.where(mask, tokens[1:], IGNORE_INDEX)
        weights = np.repeat(np.array([[row.weight] for row in part], dtype=np.float32), longest, axis=1)
        tensors = (pin(torch.from_numpy(array), device) for array in (inputs, targets, weights))
        yield tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


# ---------------------------------------------------------------------------------------------------------------------
# In the background


def prefetch(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """The same items, made up to depth ahead by a thread, which ends when the consumer closes or drops the iterator.

    An exception in the making is raised where the item would have come.
    """
    ready: queue.Queue[tuple[Any, BaseException | None, bool]] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: tuple[Any, BaseException | None, bool]) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(entry, timeout=0.1)
                return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None, False)):
                    return
            put((None, None, True))
        except BaseException as error:  # handed to the consumer, whatever it is
            put((None, error, True))

    def consume() -> Iterator[Any]:
        thread.start()
        try:
            while True:
                item, error, is_last = ready.get()
                if error is not None:
                    raise error
                if is_last:
                    return
                yield item
        finally:
            stop.set()
            thread.join()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    return consume()
