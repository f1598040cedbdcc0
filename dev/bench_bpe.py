"""How much faster rustbpe is than other byte-pair encodings, after the results are proved equal.

    python -m dev.bench_bpe base_data/*.parquet --runs=5 --chart=bpe.png
    python -m dev.bench_bpe base_data/*.parquet texts/mixed_docs.parquet --parts encode piece --tokenizers_runs=0

The parts, each of which takes all contestants in turn, `runs` times, and prints medians:

- train: training on all files, each time in a fresh process with its peak memory. What merging takes is the time for
  vocab_size tokens without the time for 256. Beside it the published rustbpe wheel, whose ranks must be the same, and
  Hugging Face's tokenizers, which orders ties in another way and so has other merges.
- encode: lists of ids, one thread; then all texts at once into what each encoder has for it, `threads` threads.
- piece: one piece of a million characters, and of a tenth of that: the worst case.
- loader: from Parquet shards to batches: the first epoch, encoded by tiktoken and by rustbpe, and the second one, from
  the token cache. Needs at least two Parquet files, the last of which is left out.

The physical limit beside them is the speed at which one thread reads memory. Files are read as Parquet (column `text`,
a document a row) or as UTF-8 text (a document a file). Needs a pip that finds the wheel. Exits 1 where ids or ranks
differ. Linux only.
"""

import argparse
import itertools
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tokenizers

import rustbpe
from dev.check_rustbpe_wheel import REFERENCE, install_reference, texts_of, write_texts
from nanochat.dataloader import tokenizing_distributed_data_loader
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer, make_definition

PARTS = ("train", "encode", "piece", "loader")
B, T, DATA_LANES = 32, 2048, 8  # of the loader

# Runs in any interpreter that has the trainer. Arguments: rustbpe or tokenizers, texts (JSON, one a line), vocabulary
# size, the file for the ranks. Prints the seconds for 256 tokens and for the vocabulary, and the peak memory in MiB.
WORKER = r"""
import json, sys, time
trainer, texts_file, vocab_size, ranks_file = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
with open(texts_file, encoding="utf-8") as f:
    texts = [json.loads(line) for line in f]
seconds = []
for size in (256, vocab_size):
    start = time.perf_counter()
    if trainer == "rustbpe":
        import rustbpe
        tokenizer = rustbpe.Tokenizer()
        tokenizer.train_from_iterator(iter(texts), size)
    else:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(ranks_file), "isolated")  # here the pattern
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(iter(texts), bpe)
    seconds.append(time.perf_counter() - start)
if trainer == "rustbpe":
    with open(ranks_file, "w", encoding="utf-8") as f:
        f.writelines(f"{bytes(token).hex()} {rank}\n" for token, rank in tokenizer.get_mergeable_ranks())
with open("/proc/self/status", encoding="utf-8") as f:  # getrusage would count what the parent had before the exec
    print(*seconds, next(int(line.split()[1]) // 1024 for line in f if line.startswith("VmHWM:")))
"""


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, what the function returned)."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def medians(contestants: dict[str, Callable[[], Any]], runs: int) -> dict[str, float]:
    """The median seconds of each contestant, taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(runs):
        for name, function in contestants.items():
            seconds[name].append(timed(function)[0])
    return {name: statistics.median(times) for name, times in seconds.items()}


def show(title: str, seconds: dict[str, float], num_bytes: int) -> dict[str, float]:
    """Print a line for each contestant, the first of which is ours, and return the MB/s of each."""
    print(title, flush=True)
    ours = next(iter(seconds.values()))
    for name, time_taken in seconds.items():
        ratio = "" if time_taken == ours else f"  {time_taken / ours:6.2f}x"
        print(f"  {name:<34} {time_taken:9.4f} s  {num_bytes / 1e6 / time_taken:8.2f} MB/s{ratio}", flush=True)
    return {name: num_bytes / 1e6 / time_taken for name, time_taken in seconds.items()}


def require_equal(what: str, expected: Any, found: Any) -> None:
    """Exit 1 where a result is not what it must be."""
    if expected != found:
        sys.exit(f"error: {what}: the results differ")


def memory_megabytes_per_second() -> float:
    """How fast one thread reads memory."""
    array = np.ones(1 << 25, dtype=np.int64)
    return array.nbytes / 1e6 / min(timed(array.sum)[0] for _ in range(5))


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train_once(python: str, trainer: str, texts_file: Path, vocab_size: int, last: str) -> tuple[float, float, int]:
    """(seconds for 256 tokens, seconds for vocab_size, peak MiB) of a fresh process."""
    command = [python, "-c", WORKER, trainer, str(texts_file), str(vocab_size), last]
    # Started elsewhere, so that no folder of the checkout is mistaken for a module.
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=texts_file.parent)
    small, full, mib = done.stdout.split()
    return float(small), float(full), int(mib)


def bench_training(texts: list[str], args: argparse.Namespace, scratch: Path) -> dict[str, float]:
    """Train in turn; return the MB/s of each trainer."""
    texts_file = scratch / "texts.jsonl"
    num_bytes = write_texts(iter(texts), texts_file)
    reference = install_reference(scratch / "reference")
    pattern = rustbpe.Tokenizer().get_pattern()
    ours, theirs = scratch / "ours", scratch / "theirs"
    contestants = {
        "rustbpe (here)": (sys.executable, "rustbpe", str(ours), args.runs),
        REFERENCE: (reference, "rustbpe", str(theirs), args.runs),
        f"tokenizers {tokenizers.__version__}": (sys.executable, "tokenizers", pattern, args.tokenizers_runs),
    }
    results: dict[str, list[tuple[float, float, int]]] = {name: [] for name in contestants}
    for run in range(args.runs):
        for name, (python, trainer, last, runs) in contestants.items():
            if run < runs:
                results[name].append(train_once(python, trainer, texts_file, args.vocab_size, last))
        require_equal("mergeable ranks", theirs.read_bytes(), ours.read_bytes())
    results = {name: times for name, times in results.items() if times}
    full = {name: statistics.median(time[1] for time in times) for name, times in results.items()}
    merging = {name: statistics.median(time[1] - time[0] for time in times) for name, times in results.items()}
    rates = show(f"training, {args.vocab_size:,} tokens, {num_bytes / 1e6:.1f} MB, equal ranks", full, num_bytes)
    show(f"merging alone: {args.vocab_size:,} tokens without 256", merging, num_bytes)
    for name, times in results.items():
        print(f"  {name:<34} peak {max(time[2] for time in times)} MiB, texts included")
    return rates


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


def random_unicode(count: int) -> list[str]:
    """Short texts of random characters, many of them such as the pattern treats in a special way."""
    rng = random.Random(0)
    special = "  \t\n\r'sStTlLaA09.,!\u0085\u00a0\u017f\u3000\u0301"
    points = [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]
    return [
        "".join(
            rng.choice(special) if rng.random() < 0.6 else chr(rng.choice(points)) for _ in range(rng.randrange(40))
        )
        for _ in range(count)
    ]


def encoders_of(ranks: dict[bytes, int], pattern: str) -> tuple[rustbpe.Tokenizer, tiktoken.Encoding, Any]:
    """The same vocabulary in rustbpe, tiktoken and tokenizers."""
    definition = json.dumps(make_definition(pattern, ranks, {}))
    return (
        rustbpe.Tokenizer.from_ranks(ranks, pattern),
        tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}),
        tokenizers.Tokenizer.from_str(definition),
    )


def bench_encoding(texts: list[str], encoders: tuple, args: argparse.Namespace) -> dict[str, float]:
    """Encode in turn, to lists and in batches; return the MB/s of each."""
    ours, tik, hf = encoders
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    for text in itertools.chain(texts, random_unicode(20_000)):
        require_equal("ids", tik.encode_ordinary(text), ours.encode(text))
    ids, offsets = ours.encode_batch(texts, num_threads=args.threads)
    require_equal(
        "ids of a batch",
        [ours.encode(text) for text in texts],
        [ids[start:end].tolist() for start, end in itertools.pairwise(offsets)],
    )
    tik_name, hf_name = f"tiktoken {version('tiktoken')}", f"tokenizers {tokenizers.__version__}"
    lists = {
        "rustbpe (here)": lambda: [ours.encode(text) for text in texts],
        tik_name: lambda: [tik.encode_ordinary(text) for text in texts],
    }
    if args.tokenizers_runs:
        lists[hf_name] = lambda: [hf.encode(text, add_special_tokens=False).ids for text in texts]
    rates = show(
        f"encoding to lists, one thread, {num_bytes / 1e6:.1f} MB, equal ids", medians(lists, args.runs), num_bytes
    )
    batches = {"rustbpe (here)": lambda: ours.encode_batch(texts, num_threads=args.threads)}
    for threads in sorted({1, args.threads, 2 * args.threads}):
        name = f"{tik_name}, {threads} threads"
        batches[name] = lambda threads=threads: tik.encode_ordinary_batch(texts, num_threads=threads)
    if args.tokenizers_runs:
        batches[hf_name] = lambda: hf.encode_batch_fast(texts, add_special_tokens=False)
    batch_rates = show(f"encoding a batch, {args.threads} threads", medians(batches, args.runs), num_bytes)
    return rates | {f"{name}, batch": rate for name, rate in batch_rates.items()}


def bench_pieces(encoders: tuple, args: argparse.Namespace) -> None:
    """One long piece, to lists."""
    ours, tik, _ = encoders
    rng = random.Random(0)
    letters, han = "abcdefghijklmnopqrstuvwxyz", "的一是不了人我在有他这中大来上国"
    pieces = {
        "one letter": "a" * 10**6,
        "two letters in turn": "ab" * (10**6 // 2),
        "random letters": "".join(rng.choices(letters, k=10**6)),
        "random Chinese characters": "".join(rng.choices(han, k=10**6)),
        "spaces": " " * 900_000,  # at a million of them tiktoken's regular expression gives up
    }
    for name, piece in pieces.items():
        require_equal(f"ids of {name}", tik.encode_ordinary(piece), ours.encode(piece))
        tenth = piece[: len(piece) // 10]
        contestants = {
            "rustbpe (here)": lambda piece=piece: ours.encode(piece),
            f"tiktoken {version('tiktoken')}": lambda piece=piece: tik.encode_ordinary(piece),
            "a tenth": lambda tenth=tenth: ours.encode(tenth),
        }
        seconds = medians(contestants, args.runs)
        tenth_seconds = seconds.pop("a tenth")
        show(f"one piece of {len(piece):,} characters: {name}", seconds, len(piece.encode()))
        print(f"  a tenth of it takes rustbpe 1/{seconds['rustbpe (here)'] / tenth_seconds:.0f} of the time")


# ---------------------------------------------------------------------------------------------------------------------
# The loader


def bench_loader(
    files: list[Path], ranks: dict[bytes, int], pattern: str, args: argparse.Namespace, scratch: Path
) -> None:
    """Batches of the first epoch with either encoder, and of the second epoch."""
    base_dir = scratch / "base"
    (base_dir / "base_data").mkdir(parents=True)
    for file in files:
        shutil.copy(file, base_dir / "base_data" / file.name)
    os.environ["NANOCHAT_BASE_DIR"] = str(base_dir)
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    tokenizer = RustBPETokenizer(None, make_definition(pattern, ranks, special))

    def epoch(encoder: str) -> tuple[float, list[int]]:
        """(batches a second, a check sum of each batch) of one epoch."""
        os.environ["NANOCHAT_ENCODER"] = encoder
        loader = tokenizing_distributed_data_loader(B, T, "train", tokenizer, DATA_LANES)
        start, sums = time.perf_counter(), []
        for batch in loader:
            if batch.cursors[0]["epoch"] > 0:
                break
            sums.append(hash(batch.inputs.numpy().tobytes()))
        seconds = time.perf_counter() - start
        loader.close()
        return len(sums) / seconds, sums

    rates: dict[str, list[float]] = {"second epoch": [], "first epoch": [], "first epoch by tiktoken": []}
    for _ in range(args.runs):
        sums = []
        for name in reversed(rates):
            if name.startswith("first"):
                shutil.rmtree(base_dir / "tokenized_data", ignore_errors=True)
            rate, found = epoch("tiktoken" if "tiktoken" in name else "rustbpe")
            rates[name].append(rate)
            sums.append(found)
        require_equal("batches", sums[0], sums[1])
        require_equal("batches", sums[0], sums[2])
    slowest = statistics.median(rates["first epoch by tiktoken"])
    print(f"loader, {B} rows of {T} tokens, {len(sums[0])} equal batches")
    for name, some in rates.items():
        print(f"  {name:<34} {statistics.median(some):9.1f} batches/s  {statistics.median(some) / slowest:6.2f}x")


# ---------------------------------------------------------------------------------------------------------------------


def draw(rates: dict[str, float], path: Path) -> None:
    """A chart with a bar for each rate in MB/s."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.4 * len(rates) + 1), layout="constrained")
    axes = figure.add_subplot()
    names = list(reversed(rates))
    bars = axes.barh(names, [rates[name] for name in names], color=["C0" if "here" in name else "C7" for name in names])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel("MB/s")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="Parquet or text files")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--vocab_size", type=int, default=32_768)
    parser.add_argument("--runs", type=int, default=5, help="how often each contestant runs")
    parser.add_argument(
        "--tokenizers_runs", type=int, default=1, help="the same for tokenizers' training; 0 leaves it out"
    )
    parser.add_argument("--threads", type=int, default=2, help="of batches")
    parser.add_argument("--chart", type=Path, help="draw the rates into this file")
    args = parser.parse_args()

    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}"
    )
    print(f"memory is read at {memory_megabytes_per_second():,.0f} MB/s by one thread")
    texts = [text for path in args.files for text in texts_of(path)]
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), args.vocab_size)
    ranks, pattern = dict(trainer.get_mergeable_ranks()), trainer.get_pattern()
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        if "train" in args.parts:
            trained = bench_training(texts, args, scratch)
            rates |= {f"training: {name}": rate for name, rate in trained.items()}
        encoders = encoders_of(ranks, pattern)
        if "encode" in args.parts:
            encoded = bench_encoding(texts, encoders, args)
            rates |= {f"encoding: {name}": rate for name, rate in encoded.items()}
        if "piece" in args.parts:
            bench_pieces(encoders, args)
        shards = [path for path in args.files if path.suffix == ".parquet"]
        if "loader" in args.parts and len(shards) > 1:
            bench_loader(shards, ranks, pattern, args, scratch)
    if args.chart:
        draw(rates, args.chart)


if __name__ == "__main__":
    main()
