"""Train the tokenizer on the first training shards.

    python -m scripts.tok_train --max_chars=2e9 --max_shards=8

Reads base_data/ and writes tokenizer/tokenizer.json and tokenizer/token_bytes.pt, both under the base directory. The
result depends on the text and on these settings alone: the same shards give the same bytes again, so with --max_shards
it does not matter what else has arrived. One process.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat.common import Progress, UserError, atomic_write, format_seconds, get_base_dir, print0, user_errors
from nanochat.configurator import opt, parse
from nanochat.dataset import read_row_group, row_groups, split_files
from nanochat.report import get_report
from nanochat.tokenizer import RustBPETokenizer, check_vocab_size, token_bytes

ROUND_TRIP_TEXT = """Hello, world! It's 2026: we'll count 1, 22, 333, 4444 and 3.14159.
\tdef f(x):\r\n    return {"a": [x ** 2], 'b': None}  # indented\n\n\n
한국어 · 日本語 · العربية · हिन्दी · Ελληνικά · naïve café, 👩‍👩‍👧‍👦 🇰🇷 e\u0301 \u3000 \x00\x7f
<|bos|> and <|assistant_end|> are ordinary text here.   """


@dataclass
class Config:
    max_chars: int = opt(10_000_000_000, "characters to train on, at most")
    doc_cap: int = opt(10_000, "characters of a document that are used; what is longer is cut")
    vocab_size: int = opt(65_536, "tokens, the nine special ones included; at least 265")
    max_shards: int = opt(-1, "use only the first N training shards; -1 is all that are there")


class TrainProgress:
    """Shows how far training is, and keeps the number of bytes that it has read and the seconds of its phases."""

    def __init__(self, num_documents: int):
        self.text_bytes = 0
        self.start = time.perf_counter()
        self.count_seconds = 0.0
        self.merge_seconds = 0.0
        self.reading = Progress(num_documents, "read", unit="documents")
        self.merging: Progress | None = None

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """What RustBPETokenizer.train_from_iterator calls now and then."""
        seconds = time.perf_counter() - self.start
        if phase == "count":
            self.text_bytes, self.count_seconds = done, seconds
            return
        self.merge_seconds = seconds - self.count_seconds
        if self.merging is None:
            self.reading.close()
            self.merging = Progress(total or 0, "merge", unit="merges")
        self.merging.update(done - self.merging.done)
        if done == total:
            self.merging.close()


def capped_documents(documents: Iterable[str], max_chars: int, doc_cap: int) -> Iterator[str]:
    """The documents, each cut to doc_cap characters, up to and including the one that reaches max_chars in all."""
    num_chars = 0
    for document in documents:
        document = document[:doc_cap]
        num_chars += len(document)
        yield document
        if num_chars >= max_chars:
            return


@dataclass
class Reading:
    """What has passed through `measured`."""

    documents: int = 0
    characters: int = 0
    seconds: float = 0.0  # until the documents were there


def measured(documents: Iterable[str], reading: Reading, progress: Progress) -> Iterator[str]:
    """The same documents, with what is counted and timed of them in reading as they pass."""
    start = time.perf_counter()
    for document in documents:
        reading.seconds += time.perf_counter() - start
        reading.documents += 1
        reading.characters += len(document)
        progress.update()
        yield document
        start = time.perf_counter()


def megabytes_per_second(text_bytes: int, seconds: float) -> float:
    """MB/s, rounded; 0 where it took no time."""
    return round(text_bytes / 1e6 / seconds, 2) if seconds else 0.0


def check_round_trip(tokenizer: RustBPETokenizer) -> None:
    """Raise AssertionError unless text with something of everything comes back as it was."""
    decoded = tokenizer.decode(tokenizer.encode(ROUND_TRIP_TEXT))
    assert decoded == ROUND_TRIP_TEXT, f"{decoded!r} is not {ROUND_TRIP_TEXT!r}"


def save_tokenizer(tokenizer: RustBPETokenizer, folder: Path) -> torch.Tensor:
    """Write tokenizer.json and token_bytes.pt, and return the latter's content.

    The old token_bytes.pt goes first and the new one comes last, so that no kill leaves one that belongs to another
    tokenizer; where it is missing it is computed.
    """
    (folder / "token_bytes.pt").unlink(missing_ok=True)
    tokenizer.save(folder)
    lengths = token_bytes(tokenizer)
    with atomic_write(folder / "token_bytes.pt", "wb") as f:
        torch.save(lengths, f)
    return lengths


@user_errors
def main(config: Config) -> None:
    # Setup
    for name in ("max_chars", "doc_cap"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)}: 1 or more characters are wanted")
    check_vocab_size(config.vocab_size)
    folder = get_base_dir() / "tokenizer"

    # Data
    files = split_files("train", max_shards=config.max_shards)
    groups = row_groups(files)
    documents = (document for group in groups for document in read_row_group(group.path, group.index))
    progress = TrainProgress(sum(group.num_rows for group in groups))
    reading = Reading()
    texts = measured(capped_documents(documents, config.max_chars, config.doc_cap), reading, progress.reading)
    print0(f"training a tokenizer of {config.vocab_size:,} tokens on {len(files)} shards")

    # Train
    start = time.perf_counter()
    tokenizer = RustBPETokenizer.train_from_iterator(texts, config.vocab_size, progress)
    seconds = time.perf_counter() - start

    # Finish
    check_round_trip(tokenizer)
    lengths = save_tokenizer(tokenizer, folder)
    check_round_trip(RustBPETokenizer.from_directory(folder))
    ordinary = lengths[lengths > 0].double()  # without the special tokens
    results = {
        "documents": reading.documents,
        "characters": reading.characters,
        "shards": len(files),
        "train_time_seconds": round(seconds, 2),
        "train_megabytes_per_second": megabytes_per_second(progress.text_bytes, seconds),
        # Reading is the time in which the documents were waited for; other threads count meanwhile, so that the phase
        # of counting takes as long as the slower of the two.
        "read_megabytes_per_second": megabytes_per_second(progress.text_bytes, reading.seconds),
        "count_megabytes_per_second": megabytes_per_second(progress.text_bytes, progress.count_seconds),
        "merge_megabytes_per_second": megabytes_per_second(progress.text_bytes, progress.merge_seconds),
        "num_special_tokens": len(tokenizer.get_special_tokens()),
        "token_bytes_min": int(ordinary.min()),
        "token_bytes_max": int(ordinary.max()),
        "token_bytes_mean": round(float(ordinary.mean()), 3),
        "token_bytes_std": round(float(ordinary.std()), 3),
        "tokenizer_hash": tokenizer.hash,
    }
    get_report().log("tok_train", [config, results])
    print0(
        f"trained on {reading.documents:,} documents, {progress.text_bytes / 1e6:,.1f} MB, in {format_seconds(seconds)}"
        f": {results['train_megabytes_per_second']} MB/s (reading {results['read_megabytes_per_second']}, reading and "
        f"counting {results['count_megabytes_per_second']}, merging {results['merge_megabytes_per_second']}); "
        f"wrote {folder / 'tokenizer.json'}"
    )


if __name__ == "__main__":
    main(parse(Config))
