"""The pretraining text: parquet shards on disk, where they come from, and how they are read.

    python -m nanochat.dataset -n 8 -w 4

fetches shards 0 to 7 and the source's last shard, with four workers, into base_data/ of the base directory. The last
shard is always the validation set, so validation numbers compare whatever number of shards was fetched. A shard is a
parquet file with a column `text`, one document a row; published shards hold about 250M characters in row groups of
1,024 rows. Shards that are there already are kept; one that is cut short is fetched again.

Sources (`--source`):
- `fineweb-edu` (default) and `climbmix`: published data sets. HF_ENDPOINT replaces the hub's host by a mirror's.
- `https://host/path`: any address under which shard_00000.parquet, shard_00001.parquet, ... lie. Nothing can list it,
  so `--last_shard=N` says which is the last one.
- `/path/to/folder`: a local folder of parquet files, which in the order of their names become shards 0, 1, 2, ...
  They are hard-linked, or copied where that is not possible.

A folder belongs to one source. `source.json` names it and is written last: it means that a first fetch went to its end.
Until then `source.json.unfinished` says whose the folder will be. A folder of parquet files with neither is the user's
own: readers take it as it is, and nothing here writes into it.

What this module does not do: shuffle, tokenize, or split rows over processes (dataloader.py does).
"""

import contextlib
import difflib
import functools
import hashlib
import json
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import Progress, UserError, atomic_write, file_lock, get_base_dir, print0, user_errors
from nanochat.configurator import opt, parse
from nanochat.download import (
    BlockedError,
    download_file,
    hub_url,
    partial_file,
    partial_paths,
    remove_stale_partials,
    require_reachable,
)

HUB_SOURCES = {  # name -> (repository on the hub, index of the last shard)
    "fineweb-edu": ("karpathy/fineweb-edu-100b-shuffle", 1822),
    "climbmix": ("karpathy/climbmix-400b-shuffle", 6542),
}
HUB_SHARD_BYTES = 100_000_000  # about what a shard of 250M characters takes
HOW_TO_GET_DATA = "run `python -m nanochat.dataset -n 8` to download or `python -m nanochat.pocket` to generate some"

STOP_SECONDS = 1.0  # what workers have to clean up after an interrupt


# ---------------------------------------------------------------------------------------------------------------------
# Reading shards


class RowGroup(NamedTuple):
    """Where a row group lies and how many documents it holds."""

    path: Path
    index: int  # within the file
    num_rows: int


def data_folder() -> Path:
    """The folder of the pretraining shards: base_data/ in the base directory. It need not exist."""
    return get_base_dir() / "base_data"


def shard_name(index: int) -> str:
    """7 -> 'shard_00007.parquet'."""
    return f"shard_{index:05d}.parquet"


def list_parquet_files(data_dir: str | Path | None = None) -> list[Path]:
    """All shards of a folder (default: data_folder()) in the order of their names; the last is the validation set.

    Raises UserError when there are fewer than two, when the folder is still being filled, and when its source has a
    last shard that is not there: another one must not become the validation set.
    """
    folder = data_folder() if data_dir is None else Path(data_dir)
    files = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))
    if not files:
        raise UserError(f"there are no shards in {folder}: {HOW_TO_GET_DATA}")
    source = read_source(folder)
    if source is None and (unfinished := _read_json(folder / "source.json.unfinished")) is not None:
        command = _command(unfinished)
        raise UserError(f"{folder} is not complete: let the command that fills it end, or run it again: {command}")
    last_shard = (source or {}).get("last_shard")
    if last_shard is not None and files[-1].name != shard_name(last_shard):
        raise UserError(f"the validation shard {folder / shard_name(last_shard)} is missing: run {_command(source)}")
    if len(files) < 2:
        raise UserError(f"{folder} holds one shard, and two are needed, the last for validation: {HOW_TO_GET_DATA}")
    return files


def split_files(split: str, data_dir: str | Path | None = None, max_shards: int = -1) -> list[Path]:
    """The shards of a split. 'train': all but the last, at most the first max_shards (-1: all). 'val': the last."""
    if split not in ("train", "val"):
        raise UserError(f"split {split!r}: 'train' or 'val' is wanted")
    if max_shards == 0 or max_shards < -1:
        raise UserError(f"--max_shards={max_shards}: 1 or more shards are wanted, or -1 for all")
    files = list_parquet_files(data_dir)
    if split == "val":
        return files[-1:]
    return files[:-1] if max_shards == -1 else files[:-1][:max_shards]


def row_groups(files: Iterable[str | Path]) -> list[RowGroup]:
    """The row groups of some shards in order, those without rows left out. Reads each footer once and no text.

    Raises UserError naming the file when one is cut short, has no rows, or has no column `text` of strings.
    """
    groups = []
    for path in map(Path, files):
        try:
            footer = _read_shard_footer(path)
        except ValueError as error:
            raise UserError(f"{path}: {error}; delete it, then {HOW_TO_GET_DATA}") from None
        counts = [footer.row_group(index).num_rows for index in range(footer.num_row_groups)]
        groups += [RowGroup(path, index, count) for index, count in enumerate(counts) if count]
    return groups


def read_row_group(path: str | Path, index: int) -> list[str]:
    """The documents of one row group, one for every row: a null becomes an empty text, so that row numbers hold.

    Raises UserError naming the file when it cannot be read.
    """
    try:
        with pq.ParquetFile(path) as file:
            texts = file.read_row_group(index, columns=["text"]).column("text").to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = f"row group {index} cannot be read ({error})"
        raise UserError(f"{path}: {reason}; delete it, then {HOW_TO_GET_DATA}") from None
    return [text or "" for text in texts]


def parquets_iter_batched(
    split: str, start: int = 0, step: int = 1, max_shards: int = -1, data_dir: str | Path | None = None
) -> Iterator[list[str]]:
    """The documents of a split, one list per row group: row groups start, start + step, ... counted over all shards.

    The settings and every footer are checked before this returns; see split_files, row_groups and read_row_group.
    """
    if start < 0 or step < 1:
        raise UserError(f"start={start}, step={step}: start >= 0 and step >= 1 are wanted")
    groups = row_groups(split_files(split, data_dir, max_shards))
    return (read_row_group(group.path, group.index) for group in groups[start::step])


def shard_fingerprint(path: str | Path) -> str:
    """16 hex digits that stand for a shard's content, for the cache of its tokens and for runs that go on.

    Of what was published or generated it is the SHA-256 over the footer and the size, which takes reading a few
    kilobytes: the footer has the place and size of every column chunk. Of text of the user's own, which is edited, it
    is the SHA-256 of the whole file.
    """
    path = Path(path)
    name = (read_source(path.parent) or {}).get("source", "")
    if name not in (*HUB_SOURCES, "pocket") and "://" not in name:
        stat = path.stat()
        content_hash = _hash_file(path, stat.st_size, stat.st_mtime_ns)
        _footer_hash(path)  # raises where the file is cut short
        return content_hash
    return _footer_hash(path)


@functools.lru_cache(maxsize=4096)
def _hash_file(path: Path, size: int, mtime_ns: int) -> str:
    """16 hex digits of the SHA-256 of a file; size and mtime_ns tell whether it was hashed before."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _footer_hash(path: Path) -> str:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        ending = file.read()
        footer_bytes = int.from_bytes(ending[:4], "little")
        if ending[4:] != b"PAR1" or footer_bytes > size - 12:
            raise UserError(f"{path}: it is cut short; delete it, then {HOW_TO_GET_DATA}")
        file.seek(size - 8 - footer_bytes)
        return hashlib.sha256(file.read() + str(size).encode()).hexdigest()[:16]


def read_footer(path: Path) -> pq.FileMetaData:
    """The footer of a whole Parquet file. Raises ValueError saying what is wrong with the file, without its name."""
    with open(path, "rb") as file:
        head = file.read(4)
        file.seek(-min(4, len(head)), os.SEEK_END)
        tail = file.read()
    if head != b"PAR1":
        raise ValueError(f"it is no Parquet file (it begins with {head!r})")
    if tail != b"PAR1":
        raise ValueError("it is cut short (the Parquet footer is missing)")
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"its Parquet footer is damaged ({error})") from None


def _read_shard_footer(path: Path) -> pq.FileMetaData:
    """The footer of a shard. Raises ValueError saying what is wrong with the file, without its name."""
    footer = read_footer(path)
    try:
        schema = footer.schema.to_arrow_schema()
    except pa.ArrowException as error:
        raise ValueError(f"its Parquet footer is damaged ({error})") from None
    if "text" not in schema.names:
        raise ValueError(f"it has no column `text` (it has: {', '.join(schema.names)})")
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"its column `text` holds {kind}, and strings are wanted")
    if footer.num_rows == 0:
        raise ValueError("it has no rows")
    return footer


# ---------------------------------------------------------------------------------------------------------------------
# Whose a folder is


def read_source(folder: str | Path) -> dict[str, Any] | None:
    """The content of a finished folder's source.json; None where there is none."""
    return _read_json(Path(folder) / "source.json")


def claim_folder(folder: str | Path, source: dict[str, Any]) -> None:
    """Make sure that a source may write into a folder, and mark the folder as its own. Call it before writing.

    source: what identifies it, {"source": name, ...}. Two sources are the same when they agree in every key that both
    have, so a finished folder may record more than is known beforehand. Creates the folder; leaves one that is the
    source's already as it is. Raises UserError, naming a NANOCHAT_BASE_DIR to use instead, when the folder is
    another source's or holds parquet files of the user's own.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / ".source.json"):
        owner = read_source(folder)
        if owner is None:
            owner = _read_json(folder / "source.json.unfinished")
        if owner is None:
            if any(folder.glob("*.parquet")):
                raise UserError(f"{folder} holds parquet files of your own: {_elsewhere(folder, source)}")
            with atomic_write(folder / "source.json.unfinished") as file:
                json.dump(source, file)
        elif any(owner[key] != source[key] for key in owner.keys() & source.keys()):
            raise UserError(f"{folder} holds {_describe(owner)}, not {_describe(source)}: {_elsewhere(folder, source)}")


def write_source(folder: str | Path, source: dict[str, Any]) -> None:
    """Declare a claimed folder finished: write its source.json. Call it after everything else is in place."""
    folder = Path(folder)
    with atomic_write(folder / "source.json") as file:
        json.dump(source, file)
    (folder / "source.json.unfinished").unlink(missing_ok=True)


def release_folder(folder: str | Path) -> None:
    """Take back a claim that led to nothing: a folder that holds no parquet files becomes free for any source."""
    folder = Path(folder)
    with file_lock(folder / ".source.json"):
        if not any(folder.glob("*.parquet")):
            (folder / "source.json.unfinished").unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("source"), str):
        raise UserError(f'{path} is damaged: it should read like {{"source": "fineweb-edu"}}; mend it or delete it')
    return content


DESCRIBING_KEYS = ("seed", "version", "chars", "last_shard", "digest")


def _describe(source: dict[str, Any]) -> str:
    """{"source": "pocket", "seed": 1} -> 'pocket (seed 1)'."""
    details = [f"{key} {value}" for key, value in source.items() if key in DESCRIBING_KEYS]
    return source["source"] + (f" ({', '.join(details)})" if details else "")


def _command(source: dict[str, Any]) -> str:
    """The command that fills a folder from a source."""
    if source["source"] == "pocket":
        return "`python -m nanochat.pocket`"
    name, last_shard = source["source"], source.get("last_shard")
    setting = "" if name == "fineweb-edu" else f" --source={name}"
    if "://" in name:
        setting += f" --last_shard={last_shard}"
    return f"`python -m nanochat.dataset -n 8{setting}`"


def _elsewhere(folder: Path, source: dict[str, Any]) -> str:
    """Advice: a base directory beside this one that is not in use."""
    slug = re.sub(r"\W+", "-", source["source"]).strip("-")
    suffixes = ("", *(f"-{number}" for number in range(2, 100)))
    candidates = (Path(f"{folder.absolute().parent}-{slug}{suffix}") for suffix in suffixes)
    free = next(path for path in candidates if not path.exists())
    return f"set NANOCHAT_BASE_DIR={free} to use another folder"


# ---------------------------------------------------------------------------------------------------------------------
# Sources of shards


@dataclass(frozen=True)
class Source:
    """Where shards come from: shards 0 to last_shard, the last one for validation."""

    name: str  # as in source.json
    base: str  # address that shard names are appended to; '' for a local folder
    last_shard: int
    shard_bytes: int = 0  # about the size of a shard; 0 where it is not known
    files: tuple[Path, ...] = ()  # the shards of a local folder

    def identity(self) -> dict[str, Any]:
        """What source.json says. The last shard belongs to it: with another one, validation would be another.

        So does the content of a local folder, which may be another one tomorrow.
        """
        identity = {"source": self.name, "last_shard": self.last_shard}
        if self.files:
            hashes = (_hash_file(path, path.stat().st_size, path.stat().st_mtime_ns) for path in self.files)
            identity["digest"] = hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]
        return identity

    def fetch(self, index: int, path: Path, report: Callable[[int, int], None]) -> None:
        """Bring a shard to path, whole and checked, replacing what is there. Raises UserError."""
        if self.base:
            download_file(self.base + shard_name(index), path, _read_shard_footer, report=report, first_contact=False)
            return
        row_groups([self.files[index]])
        _link_or_copy(self.files[index], path)
        report(path.stat().st_size, path.stat().st_size)


def find_source(name: str, last_shard: int = -1) -> Source:
    """The source that `--source` names: a key of HUB_SOURCES, an address (needs last_shard) or a folder."""
    if name in HUB_SOURCES:
        repository, last = HUB_SOURCES[name]
        if last_shard not in (-1, last):
            raise UserError(f"--last_shard={last_shard}: {name} ends with shard {last}; leave the setting out")
        return Source(name, hub_url(f"datasets/{repository}/resolve/main/"), last, HUB_SHARD_BYTES)
    if name.startswith(("http://", "https://")):
        if last_shard < 1:
            raise UserError(f"--source={name} needs --last_shard=N, the index (1 or more) of its last shard")
        base = name.rstrip("/") + "/"
        return Source(base, base, last_shard)
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        near = difflib.get_close_matches(name, HUB_SOURCES, n=1, cutoff=0)[0]
        raise UserError(f"--source={name} is no folder and no known source; did you mean --source={near}?")
    files = list_parquet_files(folder)
    if last_shard not in (-1, len(files) - 1):
        raise UserError(f"--last_shard={last_shard}: {folder} holds {len(files)} shards; leave the setting out")
    return Source(str(folder), "", len(files) - 1, files=tuple(files))


def _link_or_copy(source: Path, path: Path) -> None:
    """Hard-link a file to path, which is replaced; copy it where that is not possible (another disk, mostly)."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        os.link(source.resolve(), path)
        return
    with partial_file(path) as copy, open(source, "rb") as original:
        shutil.copyfileobj(original, copy)
        copy.flush()
        os.replace(copy.name, path)


def shards_to_fetch(source: Source, num_files: int) -> list[int]:
    """Indices of the first num_files shards (-1: all) and of the last, which comes first: nothing goes without it."""
    count = source.last_shard + 1 if num_files == -1 else min(num_files, source.last_shard)
    return [source.last_shard, *(index for index in range(count) if index != source.last_shard)]


def missing_shards(folder: Path, indices: Iterable[int]) -> list[int]:
    """Those of some shards that are not in a folder, or not whole, which is said."""
    missing = []
    for index in indices:
        path = folder / shard_name(index)
        try:
            _read_shard_footer(path)
        except FileNotFoundError:
            missing.append(index)
        except ValueError as error:
            print0(f"{path}: {error}; it is fetched again")
            missing.append(index)
    return missing


class _StoppedError(Exception):
    """The fetch that this download belongs to has been stopped."""


class ShardFetcher:
    """Threads that fetch shards into a folder, and what they share: the waiting shards, byte counts and failures."""

    def __init__(self, source: Source, folder: Path, indices: list[int]):
        self.source, self.folder, self.indices = source, folder, indices
        self.waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in indices:
            self.waiting.put(index)
        self.done: set[int] = set()
        self.reasons: dict[int, str] = {}  # index -> why it could not be fetched
        self.sizes: dict[int, tuple[int, int]] = {}  # index -> (bytes received, bytes in all or 0)
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.progress = Progress(0, f"shard 0/{len(indices)}", unit="B")

    def run(self, num_workers: int) -> None:
        """Fetch all shards; see done and reasons afterwards. An interrupt ends it within moments and leaves no trace.

        A shard that cannot be had leaves the others alone; a host out of reach or a full disk ends the whole.
        """
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(min(num_workers, len(self.indices)))]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) and not self.stop.is_set():
                time.sleep(0.05)
        finally:
            self.stop.set()
            deadline = time.monotonic() + STOP_SECONDS
            for thread in threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            for partial in [path for path in partial_paths if path.parent == self.folder]:
                partial.unlink(missing_ok=True)  # of a thread that waits for the network; it ends with the process
            self.progress.close()

    def _work(self) -> None:
        """One thread: fetch waiting shards until there are none."""
        while not self.stop.is_set():
            try:
                index = self.waiting.get_nowait()
            except queue.Empty:
                return
            try:
                report = functools.partial(self._report, index)
                self.source.fetch(index, self.folder / shard_name(index), report)
            except _StoppedError:
                return
            except (UserError, OSError) as error:
                self.reasons[index] = str(error)
                if isinstance(error, (BlockedError, OSError)):
                    self.stop.set()
            else:
                self.done.add(index)

    def _report(self, index: int, received: int, total: int) -> None:
        """Count a shard's bytes; the size of shards that have not begun is guessed from those that have."""
        if self.stop.is_set():
            raise _StoppedError
        with self.lock:
            before = self.sizes.get(index, (0, 0))[0]
            self.sizes[index] = (received, total)
            known = [size for _, size in self.sizes.values() if size]
            self.progress.total = sum(known) * len(self.indices) // len(known) if known else 0
            self.progress.label = f"shard {len(self.done)}/{len(self.indices)}"
            self.progress.update(received - before)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@dataclass
class Config:
    num_files: int = opt(-1, "fetch shards 0 to N-1 and the last one; -1 = all of the source", short="n")
    num_workers: int = opt(4, "shards that are fetched at the same time", short="w")
    source: str = opt("fineweb-edu", "fineweb-edu, climbmix, an address that shard names are appended to, or a folder")
    last_shard: int = opt(-1, "index of the last shard where the source is an address; -1 = known")


def check_settings(config: Config) -> None:
    """Raise UserError for numbers that make no sense."""
    if config.num_files == 0 or config.num_files < -1:
        raise UserError(f"--num_files={config.num_files}: 1 or more shards are wanted, or -1 for all, such as -n 8")
    if config.num_workers < 1:
        raise UserError(f"--num_workers={config.num_workers}: at least 1 is wanted, such as -w 4")


def check_disk_space(folder: Path, needed_bytes: int) -> None:
    """Raise UserError when a folder's disk has less free space than needed."""
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise UserError(
            f"the shards take about {needed_bytes / 1e9:.1f} GB and {folder} has {free_bytes / 1e9:.1f} GB free: "
            "fetch fewer with -n, or set NANOCHAT_BASE_DIR to a larger disk"
        )


def fetch_shards(source: Source, folder: Path, config: Config) -> None:
    """Bring a source's shards that are asked for and not there yet into a folder; UserError unless all are there."""
    remove_stale_partials(folder)
    wanted = shards_to_fetch(source, config.num_files)
    missing = missing_shards(folder, wanted)
    if missing:
        check_disk_space(folder, len(missing) * source.shard_bytes)
        if source.base:
            require_reachable(source.base)
        print0(f"fetching {len(missing)} of {len(wanted)} shards of {source.name} into {folder}")
        fetcher = ShardFetcher(source, folder, missing)
        fetcher.run(config.num_workers)
        check_all_fetched(fetcher, folder)
    print0(f"{folder} holds all {len(wanted)} shards, {shard_name(source.last_shard)} for validation")


def check_all_fetched(fetcher: ShardFetcher, folder: Path) -> None:
    """Raise UserError naming the shards that a fetch did not bring, and the reason why."""
    missing = sorted(set(fetcher.indices) - fetcher.done)
    if missing:
        names = ", ".join(shard_name(index) for index in missing[:10]) + (", ..." if len(missing) > 10 else "")
        reasons = "; ".join(list(dict.fromkeys(fetcher.reasons.values()))[:3])
        raise UserError(
            f"{len(missing)} of {len(fetcher.indices)} shards are missing in {folder}: {names} ({reasons}); "
            "what has arrived is kept, run the same command again for the rest"
        )


@user_errors
def main(config: Config) -> None:
    check_settings(config)
    source = find_source(config.source, config.last_shard)
    folder = data_folder()
    if folder.resolve() == Path(source.name).resolve():
        raise UserError(f"--source={config.source} is the folder to fill itself: it can be used as it is")
    claim_folder(folder, source.identity())
    try:
        fetch_shards(source, folder, config)
        write_source(folder, source.identity())
    finally:
        release_folder(folder)


if __name__ == "__main__":
    main(parse(Config))
