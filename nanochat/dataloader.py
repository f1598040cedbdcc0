"""Batches for pretraining: documents streamed from parquet shards, tokenized once, packed into rows.

The order of the data depends on the data and the settings, never on the number of processes:

- the row groups of all shards of a split are numbered, and row group g belongs to lane g % data_lanes;
- a lane joins its documents, each begun by <|bos|>, into one endless stream of tokens (epoch after epoch), and row k of
  the lane is tokens k*T to (k+1)*T of it, with the token after each as its target. Nothing is lost or doubled;
- rank r owns the lanes congruent to r modulo the world size, and takes one row from each of its lanes in turn.

So as long as every optimizer step takes equally many rows from each lane, one process and N see the same rows in a
step. The position in the data is one cursor a lane: {"epoch", "group", "offset"}, the next token that was not yet an
input. A row group is tokenized when a lane first reaches it and left in tokenized_data/ for later epochs, evaluations
and resumed runs, which read it by memory map.

What it does not do: shuffling (the shards come shuffled) and keeping documents apart in a row (attention may look
across <|bos|>, as is usual in pretraining).
"""

import contextlib
import queue
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nanochat.common import UserError, atomic_write, gather_objects, get_base_dir, get_dist_info
from nanochat.dataset import RowGroup, read_row_group, row_groups, shard_fingerprint, split_files

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
    """One endless stream of tokens over its own row groups, and a cursor on it."""

    def __init__(self, groups: list[RowGroup], store: TokenStore, cursor: dict[str, int] | None = None):
        self.groups, self.store = groups, store
        self.epoch, self.group, self.offset = 0, 0, 0
        if cursor is not None:
            self.epoch, self.group, self.offset = cursor["epoch"], cursor["group"], cursor["offset"]
        self.tokens = store.tokens(groups[self.group])
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
        """Move on while the cursor is at the end of a row group, so that it always names a token."""
        skipped = 0
        while self.offset >= len(self.tokens):
            skipped += 1
            if skipped > len(self.groups):
                raise UserError(f"no documents in the row groups of {self.groups[0].path.parent}; is the data empty?")
            self.offset, self.group = 0, self.group + 1
            if self.group == len(self.groups):
                self.group, self.epoch = 0, self.epoch + 1
            self.tokens = self.store.tokens(self.groups[self.group])


def shard_identities(split: str) -> list[str]:
    """'name:fingerprint' of each shard of a split, in order: what a checkpoint's cursors are positions in."""
    return [f"{path.name}:{shard_fingerprint(path)}" for path in split_files(split)]


def check_shards(saved: list[str], current: list[str]) -> None:
    """Raise UserError unless the shards that a run began with are there, unchanged and first; more may have come."""
    if current[: len(saved)] != saved:
        changed = next(
            (s for s, c in zip(saved, current, strict=False) if s != c), saved[min(len(saved) - 1, len(current))]
        )
        raise UserError(
            f"the data has changed since the run began ({changed.split(':')[0]} is not what it was): put it back, or "
            "start anew with --resume=never"
        )


def check_lanes(num_groups: int, data_lanes: int, world_size: int, split: str) -> None:
    """Raise UserError unless the lanes can be shared out over the ranks and each lane gets a row group."""
    if data_lanes < 1 or data_lanes % world_size:
        nearest = max(1, round(data_lanes / world_size)) * world_size
        raise UserError(f"--data_lanes={data_lanes} must be a multiple of the {world_size} processes; try {nearest}")
    if num_groups < data_lanes:
        # a divisor of the lanes, so that a total batch size that fitted them still fits
        unit = world_size if num_groups >= world_size else 1
        most = max(n for n in range(unit, num_groups + 1, unit) if data_lanes % n == 0)
        fix = f"use --data_lanes={most}" + (f" and {most} processes" if most < world_size else "")
        more = ", or get more data (python -m nanochat.dataset -n 8)" if split == "train" else ""
        raise UserError(
            f"the {split} split has {num_groups} row groups, fewer than --data_lanes={data_lanes}: {fix}{more}"
        )


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
    Raises UserError at once, before the first batch, for data that cannot serve the lanes.
    """
    _, rank, _, world_size = get_dist_info()
    groups = row_groups(split_files(split))
    check_lanes(len(groups), data_lanes, world_size, split)
    store = TokenStore(tokenizer, tokenized_cache)
    own = range(rank, data_lanes, world_size)

    def batches() -> Iterator[Batch]:
        lanes = {lane: Lane(groups[lane::data_lanes], store, cursors and cursors[lane]) for lane in own}
        rows = np.empty((B, T + 1), dtype=np.int64)
        next_row = 0
        while True:
            for row in rows:
                lanes[own[next_row % len(own)]].read_row(row)
                next_row += 1
            # contiguous copies: CUDA copies views through pageable memory, pinned or not
            inputs, targets = torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())
            if torch.device(device).type == "cuda":
                inputs, targets = inputs.pin_memory(), targets.pin_memory()
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
