"""
Checks this project's rustbpe against the wheel of that name on the package index: from the same texts both must learn
exactly the same mergeable ranks. Prints the times of both, taken in turn, and their peak memory.

    python -m dev.check_rustbpe_wheel                                   # texts generated here
    python -m dev.check_rustbpe_wheel base_data/*.parquet --vocab_sizes 8192 32768

The two have the same import name, so the wheel goes into an environment of its own in a temporary folder, and each
training runs in a fresh process of one of the two interpreters. Needs a network that reaches the package index (or a
pip that is set up to find the wheel). Files are read as Parquet (column `text`, a document a row) or as UTF-8 text (a
document a file). Exits 1 if any ranks differ.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

REFERENCE = "rustbpe==0.1.0"

# Runs in either interpreter, so it needs nothing but rustbpe. Arguments: texts (JSON, one a line), vocabulary size,
# the file for the ranks. Prints seconds and the peak memory in MiB. The texts are in memory before the clock starts.
WORKER = """
import json, resource, sys, time
import rustbpe
texts_file, vocab_size, ranks_file = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with open(texts_file, encoding="utf-8") as f:
    texts = [json.loads(line) for line in f]
tokenizer = rustbpe.Tokenizer()
start = time.perf_counter()
tokenizer.train_from_iterator(iter(texts), vocab_size)
seconds = time.perf_counter() - start
peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
with open(ranks_file, "w", encoding="utf-8") as f:
    f.writelines(f"{bytes(token).hex()} {rank}\\n" for token, rank in tokenizer.get_mergeable_ranks())
print(seconds, peak_mib)
"""


def generated_texts() -> Iterator[str]:
    """Yields about 4 MB of texts, always the same: words of uneven frequency, many scripts, and pieces full of ties."""
    rng = random.Random(1)
    letters = [
        "abcdefghijklmnopqrstuvwxyz",
        "абвгдежзиклмнопрстуя",
        "αβγδεζηθικλμνξοπρσ",
        "가나다라마바사아자차카",
        "的一是不了人我在有他这中大来上国",
    ]
    words = ["".join(rng.choices(alphabet, k=rng.randint(1, 9))) for alphabet in letters for _ in range(4000)]
    weights = [1 / (1 + i % 4000) for i in range(len(words))]
    gaps = [" "] * 20 + [", ", ". ", "\n", "\n\n", "   ", "\t", "'s ", " (", ") ", " 🙂 ", " 12345 ", "\u00a0", "--"]
    for _ in range(400):
        yield "".join(word + rng.choice(gaps) for word in rng.choices(words, weights, k=600))
    for _ in range(400):
        yield "".join(
            chr(rng.choice([rng.randint(1, 0x7F), rng.randint(1, 0xD7FF), rng.randint(0xE000, 0x10FFFF)]))
            for _ in range(300)
        )
    for _ in range(400):
        yield rng.choice("ab ") * rng.randint(0, 60) + "".join(rng.choices("ab ", k=300))


def texts_of(path: Path) -> Iterator[str]:
    """Yields the documents of one file."""
    if path.suffix != ".parquet":
        yield path.read_text(encoding="utf-8")
        return
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
        yield from batch.column("text").to_pylist()


def write_texts(texts: Iterator[str], path: Path) -> int:
    """Writes `texts` as JSON, one a line; returns their size in bytes of UTF-8."""
    num_bytes = 0
    with open(path, "w", encoding="utf-8") as f:
        for text in texts:
            num_bytes += len(text.encode("utf-8"))
            f.write(json.dumps(text) + "\n")
    return num_bytes


def install_reference(folder: Path) -> str:
    """Makes an environment with the published wheel in `folder`; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", REFERENCE], check=True
    )
    return python


def train(python: str, texts_file: Path, vocab_size: int, ranks_file: Path) -> tuple[float, int]:
    """Trains in a fresh process and writes the ranks; returns seconds and peak memory in MiB, texts included."""
    command = [python, "-c", WORKER, str(texts_file), str(vocab_size), str(ranks_file)]
    # Started elsewhere, so that no folder of the checkout is mistaken for a module.
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=texts_file.parent)
    seconds, mib = done.stdout.split()
    return float(seconds), int(mib)


def main() -> None:
    """Compares both on every text source and vocabulary size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="Parquet or text files; together they are one more corpus")
    parser.add_argument("--vocab_sizes", nargs="+", type=int, default=[256, 300, 4096])
    args = parser.parse_args()

    num_different = 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        reference = install_reference(scratch / "reference")
        corpora = {"generated": generated_texts()}
        if args.files:
            corpora["files"] = (text for path in args.files for text in texts_of(path))
        for name, texts in corpora.items():
            texts_file = scratch / f"{name}.jsonl"
            num_bytes = write_texts(texts, texts_file)
            for vocab_size in args.vocab_sizes:
                ours, theirs = scratch / "ours", scratch / "theirs"
                our_seconds, our_mib = train(sys.executable, texts_file, vocab_size, ours)
                their_seconds, their_mib = train(reference, texts_file, vocab_size, theirs)
                same = ours.read_bytes() == theirs.read_bytes()
                num_different += not same
                verdict = "identical" if same else "DIFFERENT"
                print(f"{name}, {num_bytes / 1e6:.1f} MB, {vocab_size} tokens: {verdict} ranks", flush=True)
                print(f"  here            {our_seconds:6.2f} s, peak {our_mib} MiB")
                print(
                    f"  {REFERENCE}  {their_seconds:6.2f} s, peak {their_mib} MiB: {their_seconds / our_seconds:.2f}x"
                )
    sys.exit(1 if num_different else 0)


if __name__ == "__main__":
    main()
