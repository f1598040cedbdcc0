"""How a public text corpus becomes the shards that nanochat.dataset fetches: shuffled, of equal size, quick to stream.

    python -m dev.repackage_data_reference --input=corpus/ --output=shards/

reads every .parquet, .jsonl and .txt file below the input folder and writes shard_00000.parquet, shard_00001.parquet,
... with one column `text`: about 250M characters a shard (some 100 MB with zstd), in row groups of 1,024 documents, of
which only the very last may hold fewer. Every document that is not empty comes out once, and the order is uniformly
random: so any number of leading shards is a fair sample of the corpus, and the last shard a fair validation set.

The published FineWeb-Edu shards are of this form: the `sample/100BT` files of HuggingFaceFW/fineweb-edu are fetched to
a folder, this script runs on them with its default settings, and the output folder is uploaded as a data set. Here it
can be used at once: `python -m nanochat.dataset --source=shards/`.

The corpus may be larger than memory, so the shuffle takes two passes: every document goes to a random one of many
buckets on disk; then the buckets are read one after another, each shuffled in memory. That is a true uniform shuffle,
because independent random buckets followed by random orders within them make every order of all documents equally
likely (Rao 1961, Sankhya A 23; Sandelius 1962, JRSS B 24). It needs disk for the text once more, uncompressed, and
memory for one bucket. The same files (in the order of their paths), seed and bucket size give the same shards.

What it does not do: download, filter, or drop duplicates.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import Progress, UserError, atomic_write, user_errors
from nanochat.configurator import opt, parse
from nanochat.dataset import shard_name
from nanochat.tokenizer import well_formed

SUFFIXES = (".parquet", ".jsonl", ".txt")
PARQUET_EXPANSION = 4  # bytes of text in a byte of compressed parquet, roughly
MAX_BUCKETS = 512  # each is an open file in the first pass
READ_ROWS = 1024
LENGTH_BYTES = 4  # before each document in a bucket


@dataclass
class Config:
    input: str = opt(help="folder with the corpus: .parquet, .jsonl (an object a line) and .txt (a document a file)")
    output: str = opt(help="folder for the shards; it must not hold parquet files yet")
    column: str = opt("text", "column of the .parquet files and key of the .jsonl objects that holds the text")
    shard_chars: int = opt(250_000_000, "characters a shard, about")
    row_group_size: int = opt(1024, "documents a row group")
    bucket_bytes: int = opt(500_000_000, "text held in memory at a time, about, in bytes")
    seed: int = opt(42, "of the order of the documents")


class Corpus(NamedTuple):
    """What the first pass found."""

    num_docs: int
    num_chars: int
    num_empty: int  # left out


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def find_files(folder: Path) -> list[Path]:
    """All files below a folder that can be read, in the order of their paths."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"--input={folder}: there are no {', '.join(SUFFIXES)} files in it")
    return files


def read_documents(path: Path, column: str) -> Iterator[str | None]:
    """The documents of a file; a null and an absent key are None. Raises UserError naming the file."""
    if path.suffix == ".txt":
        yield _decode(path.read_bytes(), str(path)).replace("\r\n", "\n").replace("\r", "\n")
    elif path.suffix == ".jsonl":
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield _text_of(_decode(line, f"{path}:{number}"), column, f"{path}:{number}")
    else:
        try:
            with pq.ParquetFile(path) as file:
                for batch in file.iter_batches(READ_ROWS, columns=[column]):
                    yield from batch.column(column).cast(pa.large_string()).to_pylist()
        except (pa.ArrowException, OSError, KeyError) as error:
            raise UserError(f"{path}: the column `{column}` cannot be read ({error}); see --column") from None


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: the text is not UTF-8 (byte {error.start:,}); convert it with iconv") from None


def _text_of(line: str, key: str, place: str) -> str | None:
    try:
        text = json.loads(line).get(key)
    except (ValueError, AttributeError):
        raise UserError(f"{place}: a JSON object is wanted") from None
    if text is not None and not isinstance(text, str):
        raise UserError(f"{place}: {key!r} is no string; see --column")
    return text and well_formed(text)  # JSON can spell half a surrogate pair, which is no character


# ---------------------------------------------------------------------------------------------------------------------
# Shuffling


def count_buckets(files: list[Path], bucket_bytes: int) -> int:
    """How many buckets make one of them about bucket_bytes large."""
    text_bytes = sum(path.stat().st_size * (PARQUET_EXPANSION if path.suffix == ".parquet" else 1) for path in files)
    return min(MAX_BUCKETS, 1 + text_bytes // bucket_bytes)


def scatter(files: list[Path], column: str, buckets: list[BinaryIO], seed: int) -> Corpus:
    """First pass: append every document that is not empty to a random bucket, as its length and its UTF-8."""
    rng = np.random.default_rng(seed)
    progress = Progress(sum(path.stat().st_size for path in files), "reading", unit="B")
    num_docs = num_chars = num_empty = 0
    for path in files:
        for text in read_documents(path, column):
            if not text:
                num_empty += 1
                continue
            encoded = text.encode("utf-8")
            bucket = buckets[rng.integers(len(buckets))]
            bucket.write(len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded)
            num_docs += 1
            num_chars += len(text)
        progress.update(path.stat().st_size)
    progress.close()
    return Corpus(num_docs, num_chars, num_empty)


def gather(buckets: list[BinaryIO], seed: int) -> Iterator[str]:
    """Second pass: all documents, bucket by bucket, each bucket in an order of its own."""
    for number, bucket in enumerate(buckets):
        bucket.seek(0)
        content = bucket.read()
        bucket.truncate(0)  # gives the disk back
        places = []  # (start, end) of each document
        position = 0
        while position < len(content):
            start = position + LENGTH_BYTES
            position = start + int.from_bytes(content[position:start], "little")
            places.append((start, position))
        for index in np.random.default_rng([seed, number]).permutation(len(places)):
            start, end = places[index]
            yield content[start:end].decode("utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def groups_per_shard(num_docs: int, num_chars: int, row_group_size: int, shard_chars: int) -> list[int]:
    """How many row groups each shard gets: at least two shards, as equal as whole row groups allow.

    The documents are shuffled, so equally many of them are about equally many characters.
    """
    num_groups = -(-num_docs // row_group_size)
    if num_groups < 2:
        raise UserError(
            f"{num_docs} documents fill one row group of {row_group_size}, and two shards need two: "
            f"lower --row_group_size, for instance to {max(1, num_docs // 10)}"
        )
    num_shards = min(num_groups, max(2, round(num_chars / shard_chars)))
    bounds = [index * num_groups // num_shards for index in range(num_shards + 1)]
    return [end - start for start, end in zip(bounds, bounds[1:], strict=False)]


def write_shard(path: Path, documents: Iterator[str], num_groups: int, row_group_size: int) -> int:
    """Write the next num_groups * row_group_size documents, or what is left of them; returns how many these were.

    One row group is held in memory. The file has its name when it is whole.
    """
    schema = pa.schema({"text": pa.string()})
    num_docs = 0
    with atomic_write(path, "wb") as file:
        # Neither a dictionary nor minimum and maximum are of use for documents, which are long and all different.
        with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False, write_statistics=False) as writer:
            for _ in range(num_groups):
                texts = list(islice(documents, row_group_size))
                writer.write_table(pa.table({"text": texts}, schema=schema), row_group_size=row_group_size)
                num_docs += len(texts)
    return num_docs


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def check_settings(config: Config) -> None:
    """Raise UserError for numbers and folders that cannot work."""
    for name in ("shard_chars", "row_group_size", "bucket_bytes"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)}: at least 1 is wanted")
    if config.seed < 0:
        raise UserError(f"--seed={config.seed}: 0 or more is wanted")
    if not Path(config.input).is_dir():
        raise UserError(f"--input={config.input} is no folder")
    if any(Path(config.output).glob("*.parquet")):
        raise UserError(f"--output={config.output} holds parquet files already: name another folder")


@user_errors
def main(config: Config) -> None:
    check_settings(config)
    files = find_files(Path(config.input))
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)

    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=output, prefix=".buckets."))
        buckets = [
            stack.enter_context(open(os.path.join(folder, str(number)), "w+b"))
            for number in range(count_buckets(files, config.bucket_bytes))
        ]
        corpus = scatter(files, config.column, buckets, config.seed)
        shares = groups_per_shard(corpus.num_docs, corpus.num_chars, config.row_group_size, config.shard_chars)
        documents = gather(buckets, config.seed)
        progress = Progress(corpus.num_docs, "writing", unit="documents")
        for index, num_groups in enumerate(shares):
            progress.update(write_shard(output / shard_name(index), documents, num_groups, config.row_group_size))
        progress.close()

    print(
        f"{corpus.num_docs:,} documents ({corpus.num_chars:,} characters) in {len(shares)} shards in {output}, "
        f"the last one for validation; {corpus.num_empty:,} empty documents left out"
    )


if __name__ == "__main__":
    main(parse(Config))
