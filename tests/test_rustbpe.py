"""
The Rust tokenizer against independent implementations: a plain Python one, `tokenizers` and `tiktoken`; and how it
behaves as a Python module: threads, signals, references, errors.
"""

import ast
import gc
import inspect
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import regex
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe
from nanochat.tokenizer import make_definition

DEFAULT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
TWO_DIGITS_PATTERN = DEFAULT_PATTERN.replace("{1,3}", "{1,2}")

ENGLISH = (
    "The quick brown fox jumps over the lazy dog. It's 1234567 o'clock, isn't it?\n\n  They'll say: WE'VE won!\r\n"
    "def f(x):\n    return x ** 2  # squared\n\ttabs\t\tand   spaces   \n"
)
UNICODE = (
    "Füße, naïve cafés; привет, мир! Γειά σου Κόσμε. 안녕하세요 세계. 你好,世界。こんにちは\u3000世界\u2003x "
    "👩‍👩‍👧 🇩🇪 e\u0301 ﷽ ١٢٣٤ Ⅷ ² हिन्दी a'ſx \u0085\u00a0\u200b\u2028"
)
SPECIAL_LOOKING = "<|bos|>hello<|assistant_end|> <|endoftext|>"


# A byte-pair encoding in plain Python, by the definition


def pieces_of(text: str, pattern: str) -> list[list[int]]:
    """The pieces of `text`, each as its bytes."""
    return [list(match.group().encode("utf-8")) for match in regex.finditer(pattern, text)]


def merged(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """`ids` with every `pair` replaced, from left to right."""
    result, i = [], 0
    while i < len(ids):
        found = tuple(ids[i : i + 2]) == pair
        result.append(new_id if found else ids[i])
        i += 2 if found else 1
    return result


def python_ranks(texts: list[str], vocab_size: int, pattern: str) -> tuple[list[tuple[bytes, int]], int]:
    """The mergeable ranks, and how many of the first merges were chosen without a tie."""
    words = Counter(tuple(piece) for text in texts for piece in pieces_of(text, pattern))
    tokens, num_untied = [bytes([i]) for i in range(256)], None
    while len(tokens) < vocab_size:
        counts: Counter[tuple[int, int]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                counts[pair] += count
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if num_untied is None and sum(count == counts[best] for count in counts.values()) > 1:
            num_untied = len(tokens) - 256
        merged_words: Counter[tuple[int, ...]] = Counter()
        for word, count in words.items():
            merged_words[tuple(merged(list(word), best, len(tokens)))] += count
        words = merged_words
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return [(token, rank) for rank, token in enumerate(tokens)], len(tokens) - 256 if num_untied is None else num_untied


def trained(texts: list[str], vocab_size: int, **options) -> rustbpe.Tokenizer:
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(texts), vocab_size, **options)
    return tokenizer


def random_texts(rng: random.Random, alphabet: str, num_texts: int = 20, max_chars: int = 60) -> list[str]:
    return ["".join(rng.choices(alphabet, k=rng.randint(0, max_chars))) for _ in range(num_texts)]


@pytest.fixture(scope="module")
def tokenizer() -> rustbpe.Tokenizer:
    """A tokenizer of 500 tokens that knows some of every kind of text."""
    return trained([ENGLISH * 3, UNICODE * 2, SPECIAL_LOOKING] * 3, 500)


@pytest.fixture(scope="module")
def encoding(tokenizer: rustbpe.Tokenizer) -> tiktoken.Encoding:
    """tiktoken with the vocabulary of `tokenizer`."""
    ranks = dict(tokenizer.get_mergeable_ranks())
    return tiktoken.Encoding("test", pat_str=tokenizer.get_pattern(), mergeable_ranks=ranks, special_tokens={})


# Training


@pytest.mark.parametrize("alphabet", ["ab", "ab ", "abcde ''sdtl", "aé字🙂 \n", "a1 23\r\n\t.!", "aAbB ſİ\u0301\u00a0"])
def test_training_follows_the_definition(alphabet: str):
    rng = random.Random(alphabet)
    for _ in range(5):
        texts = random_texts(rng, alphabet)
        assert trained(texts, 300).get_mergeable_ranks() == python_ranks(texts, 300, DEFAULT_PATTERN)[0]


@pytest.mark.parametrize("pattern", [TWO_DIGITS_PATTERN, r"\p{L}+|\P{L}", r"(?s).+", r"\w+(?=\s)"])
def test_training_follows_the_pattern(pattern: str):
    texts = [ENGLISH, UNICODE]
    tokenizer = trained(texts, 400, pattern=pattern)
    assert tokenizer.get_pattern() == pattern
    assert tokenizer.get_mergeable_ranks() == python_ranks(texts, 400, pattern)[0]


def test_the_default_pattern_takes_three_digits():
    texts = ["1234567 12345 123 12 1234"] * 3
    default = trained(texts, 280)
    assert default.get_pattern() == DEFAULT_PATTERN == rustbpe.Tokenizer().get_pattern()
    assert default.get_mergeable_ranks() == trained(texts, 280, pattern=DEFAULT_PATTERN).get_mergeable_ranks()
    longest_number = {
        pattern: max(len(token) for token, _ in trained(texts, 280, pattern=pattern).get_mergeable_ranks()[256:])
        for pattern in (DEFAULT_PATTERN, TWO_DIGITS_PATTERN)
    }
    assert longest_number == {DEFAULT_PATTERN: 3, TWO_DIGITS_PATTERN: 2}


def test_ties_go_to_the_smaller_pair():
    ranks = trained(["zy", "ab", "aa", "ba"], 260).get_mergeable_ranks()
    assert [token for token, _ in ranks[256:]] == [b"aa", b"ab", b"ba", b"zy"]


def test_overlapping_pairs_count_at_every_place():
    # "aa" stands three times in "aaaa" and so comes before "bc", which stands twice.
    ranks = trained(["aaaa", "bc", "bc"], 300).get_mergeable_ranks()
    assert [token for token, _ in ranks[256:]] == [b"aa", b"bc", b"aaaa"]


def test_training_agrees_with_tokenizers():
    letters = random.Random(1).choices("etaoins ", weights=[90, 61, 41, 27, 18, 12, 8, 120], k=30_000)
    texts = ["".join(letters)]
    _, num_untied = python_ranks(texts, 256 + 40, DEFAULT_PATTERN)
    assert num_untied >= 30, "the text has a tie too early to compare much"

    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(DEFAULT_PATTERN), "isolated")
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    peer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, to_bytes])
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + num_untied, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    peer.train_from_iterator(texts, trainer)
    # Letters stand for themselves in its byte alphabet, and Ġ for the space.
    peer_tokens = ["".join(pair).replace("Ġ", " ").encode() for pair in json.loads(peer.to_str())["model"]["merges"]]
    assert peer_tokens == [token for token, _ in trained(texts, 256 + num_untied).get_mergeable_ranks()[256:]]


def test_the_result_depends_on_neither_buffer_size_nor_order_nor_kind_of_iterable():
    texts = random_texts(random.Random(1), "abc de", num_texts=200)
    expected = trained(texts, 400).get_mergeable_ranks()
    for buffer_size in (1, 3, 199, 200, 10**6):
        assert trained(texts, 400, buffer_size=buffer_size).get_mergeable_ranks() == expected
    assert trained(texts[::-1], 400).get_mergeable_ranks() == expected
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator((text for text in texts), vocab_size=400)
    assert tokenizer.get_mergeable_ranks() == expected


def test_texts_without_pairs_give_the_bytes():
    expected = [(bytes([i]), i) for i in range(256)]
    assert rustbpe.Tokenizer().get_mergeable_ranks() == expected
    for texts in ([], [""], ["", "a", "é"[:0]]):
        tokenizer = trained(texts, 1000)
        assert (tokenizer.get_mergeable_ranks(), tokenizer.vocab_size) == (expected, 256)


def test_vocab_size_is_what_was_asked_for_or_what_the_texts_hold():
    assert trained([ENGLISH], 256).vocab_size == 256
    assert trained([ENGLISH], 300).vocab_size == 300
    assert trained(["abc"], 300).vocab_size == 258


def test_a_second_training_replaces_the_first():
    tokenizer = trained([ENGLISH], 400)
    tokenizer.train_from_iterator(iter([UNICODE]), 300, pattern=TWO_DIGITS_PATTERN)
    assert tokenizer.get_mergeable_ranks() == python_ranks([UNICODE], 300, TWO_DIGITS_PATTERN)[0]
    assert (tokenizer.vocab_size, tokenizer.get_pattern()) == (300, TWO_DIGITS_PATTERN)
    assert tokenizer.decode(tokenizer.encode(UNICODE)) == UNICODE


def test_the_locale_makes_no_difference():
    program = (
        "import rustbpe; t = rustbpe.Tokenizer(); t.train_from_iterator(iter([chr(0xe9) * 3 + chr(0x1f642)]), 262);"
        "print([(token.hex(), rank) for token, rank in t.get_mergeable_ranks()[256:]], t.encode(chr(0x1f642)))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "LC_ALL": locale}, capture_output=True
        ).stdout
        for locale in ("C", "C.UTF-8", "tr_TR.UTF-8")
    }
    assert len(outputs) == 1 and outputs.pop().startswith(b"[('")


# Encoding and decoding


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text(alphabet=ENGLISH + UNICODE) | st.lists(st.sampled_from(ENGLISH.split(" "))).map(" ".join))
def test_encoding_agrees_with_tiktoken(tokenizer: rustbpe.Tokenizer, encoding: tiktoken.Encoding, text: str):
    ids = tokenizer.encode(text)
    assert ids == encoding.encode_ordinary(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["", " ", ENGLISH, UNICODE, "a" * 5000, "ab" * 3000 + "!", " \n" * 999 + "x"])
def test_encoding_agrees_with_tiktoken_on_chosen_texts(tokenizer, encoding, text: str):
    assert tokenizer.encode(text) == encoding.encode_ordinary(text)


@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 1_000_000, " " * 1_000_000 + "x", "\n" * 1_000_000])
def test_a_piece_of_a_million_characters_is_encoded_and_learned_from(tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert trained([text], 257).get_mergeable_ranks()[256][0] == text[:2].encode()


def test_special_tokens_in_a_text_are_text(tokenizer: rustbpe.Tokenizer):
    ids = tokenizer.encode(SPECIAL_LOOKING)
    assert len(ids) > 3 and max(ids) < tokenizer.vocab_size
    assert tokenizer.decode(ids) == SPECIAL_LOOKING


def test_an_untrained_tokenizer_encodes_bytes():
    assert rustbpe.Tokenizer().encode("é🙂 a") == list("é🙂 a".encode())


def test_a_batch_is_its_texts(tokenizer: rustbpe.Tokenizer):
    texts = [ENGLISH, "", UNICODE, *random_texts(random.Random(2), "the  \n'sé1", num_texts=300)]
    assert tokenizer.batch_encode(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.batch_encode([]) == []


def test_a_batch_in_arrays_is_its_texts(tokenizer: rustbpe.Tokenizer):
    texts = [ENGLISH, "", UNICODE, *random_texts(random.Random(3), "the  \n'sé1", num_texts=3000)]
    rows = [tokenizer.encode(text) for text in texts]
    for num_threads in (None, 1, 2, 5):
        ids, offsets = tokenizer.encode_batch(texts, num_threads=num_threads)
        assert (ids.dtype, offsets.dtype) == (np.uint16, np.int64)
        assert [ids[i:j].tolist() for i, j in itertools.pairwise(offsets)] == rows
        ids, offsets = tokenizer.encode_batch(texts, 499, num_threads)
        assert [ids[i:j].tolist() for i, j in itertools.pairwise(offsets)] == [[499, *row] for row in rows]
    ids, offsets = tokenizer.encode_batch([])
    assert (ids.tolist(), offsets.tolist()) == ([], [0])
    ids[:] = 0  # arrays that can be written to, and that nothing else holds
    for num_threads in (0, -1):
        with pytest.raises(ValueError, match="num_threads must be at least 1"):
            tokenizer.encode_batch(texts, num_threads=num_threads)


def test_ids_in_arrays_are_wide_enough():
    bytes_only = {bytes([i]): i for i in range(256)}
    for largest, dtype in ((65_535, np.uint16), (65_536, np.uint32)):
        with_special = rustbpe.Tokenizer.from_ranks(bytes_only, special_tokens={"<|bos|>": largest})
        assert with_special.encode_batch(["a"])[0].dtype == dtype
        ids, _ = rustbpe.Tokenizer().encode_batch(["a"], bos=largest)
        assert (ids.dtype, ids.tolist()) == (dtype, [largest, 97])


def test_a_tokenizer_is_built_from_ranks_or_a_file(tokenizer: rustbpe.Tokenizer, tmp_path: Path):
    ranks, pattern = dict(tokenizer.get_mergeable_ranks()), tokenizer.get_pattern()
    special = {"<|bos|>": 500, "<|é|>": 501}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(make_definition(pattern, ranks, special)), encoding="utf-8")
    texts = [ENGLISH, UNICODE, SPECIAL_LOOKING, *random_texts(random.Random(4), "the é<|bos>", num_texts=300)]
    for built in (rustbpe.Tokenizer.from_ranks(ranks, pattern, special), rustbpe.Tokenizer.from_file(path)):
        assert (built.get_mergeable_ranks(), built.get_pattern()) == (tokenizer.get_mergeable_ranks(), pattern)
        assert [built.encode_ordinary(text) for text in texts] == [tokenizer.encode(text) for text in texts]
        assert built.vocab_size == 500
        assert built.decode([501, 65]) == "<|é|>A"
        assert built.decode_bytes([500, 0xC3]) == b"<|bos|>\xc3"


def test_any_ranks_encode_as_in_tiktoken():
    """Ranks that nobody has learned: tokens before their parts, tokens that no merge makes, bytes in another order."""
    rng = random.Random(5)
    for _ in range(40):
        tokens = {"".join(rng.choices("abc", k=rng.randint(2, 6))).encode() for _ in range(30)}
        order = [*sorted(tokens), *(bytes([i]) for i in range(256))]
        rng.shuffle(order)
        ranks = {token: rank for rank, token in enumerate(order)}
        ours = rustbpe.Tokenizer.from_ranks(ranks, r"(?s).+")
        theirs = tiktoken.Encoding("test", pat_str=r"(?s).+", mergeable_ranks=ranks, special_tokens={})
        for length in (1, 5, 20, 90, 400, 1500):
            text = "".join(rng.choices("abc", k=length))
            assert ours.encode(text) == theirs.encode_ordinary(text)


def test_what_is_no_vocabulary_is_a_value_error(tmp_path: Path):
    ranks = {bytes([i]): i for i in range(256)}
    for bad in ({}, {**ranks, b"ab": 300}, {**ranks, b"ab": 255}, {**ranks, b"a": 256}, {**ranks, b"ab": -1}):
        with pytest.raises(ValueError):
            rustbpe.Tokenizer.from_ranks(bad)
    with pytest.raises(ValueError, match="an id of a special token is taken"):
        rustbpe.Tokenizer.from_ranks(ranks, special_tokens={"<|bos|>": 255})
    with pytest.raises(TypeError):
        rustbpe.Tokenizer.from_ranks({**ranks, "ab": 256})
    path = tmp_path / "tokenizer.json"
    with pytest.raises(FileNotFoundError):
        rustbpe.Tokenizer.from_file(path)
    for text in ("", "{}", json.dumps({"model": {"type": "Unigram"}})):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="not a vocabulary"):
            rustbpe.Tokenizer.from_file(path)


def scanner_texts(rng: random.Random, count: int) -> Iterator[str]:
    """Short texts of random Unicode, most of it where the pattern's classes meet."""
    boundary = "aZsſK'’sdmtlvreLVRE019²Ⅷ٣字ी\u0301    \u0085\u00a0\u3000\u200b\u180e\u2028\t\r\n\n\x0b.!-_🙂\0"
    for _ in range(count):
        length = rng.randint(0, 24)
        yield "".join(
            rng.choice(boundary) if rng.random() < 0.9 else chr(rng.choice(SETTLED_CODE_POINTS)) for _ in range(length)
        )


# The splitter and Python's regex may know different versions of Unicode: only what both know is compared.
SETTLED_CODE_POINTS = [i for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]


def compare_splits(texts: list[str], pattern: str) -> int:
    """Asserts that the splitter and Python's regex find the same pieces, and returns their number."""
    compiled = regex.compile(pattern)
    pieces = [[piece.encode("utf-8") for piece in compiled.findall(text)] for text in texts]
    # With ranks for whole pieces, ids show where the pieces are. Those for each two in a row show where one is missing.
    tokens = [[bytes([i]) for i in range(256)], *pieces]
    tokens += [[a + b for a, b in itertools.pairwise(some)] for some in pieces]
    ranks = {token: i for i, token in enumerate(dict.fromkeys(itertools.chain.from_iterable(tokens)))}
    tokenizer = rustbpe.Tokenizer.from_ranks(ranks, pattern)
    for text, some in zip(texts, pieces, strict=True):
        assert tokenizer.encode(text) == [ranks[piece] for piece in some], ascii(text)
    return sum(map(len, pieces))


def test_the_splitter_agrees_with_python_regular_expressions():
    """For a long run RUSTBPE_CASES sets the number of texts, and RUSTBPE_TEXTS names Parquet files with more of them.

    cargo test compares with fancy-regex in the same way.
    """
    files = os.environ.get("RUSTBPE_TEXTS", "").split()
    rng = random.Random(int(os.environ.get("RUSTBPE_SEED", "0")))
    num_pieces = 0
    for digits in (1, 2, 3):
        pattern = DEFAULT_PATTERN.replace("{1,3}", f"{{1,{digits}}}")
        for text in scanner_texts(rng, int(os.environ.get("RUSTBPE_CASES", "2000"))):
            num_pieces += compare_splits([text], pattern)
        for text_batch in itertools.chain.from_iterable(map(batches_of_texts, files)):
            num_pieces += compare_splits(text_batch, pattern)
    print(f"{num_pieces:,} pieces, no difference")


def batches_of_texts(path: str) -> Iterator[list[str]]:
    """Yields the column `text` of a Parquet file, some documents at a time."""
    for batch in pq.ParquetFile(path).iter_batches(256, columns=["text"]):
        yield batch.column("text").to_pylist()


@pytest.mark.parametrize("alphabet", ["a", "ab", "abcdefgh", "的一是不", "!?", " \t", "\n\r", "0123"])
def test_the_time_for_a_long_piece_is_linear(tokenizer: rustbpe.Tokenizer, alphabet: str):
    rng = random.Random(6)
    text = "".join(rng.choices(alphabet, k=800_000))

    def seconds(characters: int) -> float:
        times = []
        for _ in range(3):
            start = time.thread_time()
            tokenizer.encode(text[:characters])
            times.append(time.thread_time() - start)
        return min(times)

    assert seconds(800_000) < 40 * seconds(100_000) + 0.01  # eight times as much; n log n in the worst cache weather


@given(st.lists(st.integers(0, 499), max_size=20))
def test_decoding_replaces_what_is_no_utf8_as_python_does(tokenizer: rustbpe.Tokenizer, ids: list[int]):
    tokens = [token for token, _ in tokenizer.get_mergeable_ranks()]
    assert tokenizer.decode(ids) == b"".join(tokens[i] for i in ids).decode("utf-8", errors="replace")


# Threads, signals, progress, references


def ticks_during(work: Callable[[], object]) -> int:
    """How often another Python thread gets to run while `work` does."""
    ticks, done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks
    work()
    during = ticks - before
    done.set()
    thread.join()
    return during


def unequal_words(num_words: int) -> str:
    rng = random.Random(3)
    return " ".join("".join(rng.choices("abcdefghij", k=8)) for _ in range(num_words))


def test_other_threads_run_during_the_work(tokenizer: rustbpe.Tokenizer):
    # One text in a list: no Python code runs in between that would let the other thread in.
    long_text, many_words = "the cat sat on the mat. " * 400_000, unequal_words(60_000)
    assert ticks_during(lambda: trained([long_text], 256)) > 3, "counting holds the GIL"
    assert ticks_during(lambda: trained([many_words], 4000)) > 3, "merging holds the GIL"
    assert ticks_during(lambda: tokenizer.encode(many_words * 3)) > 3, "encoding holds the GIL"
    assert ticks_during(lambda: tokenizer.batch_encode([many_words * 3] * 2)) > 3, "batch encoding holds the GIL"


def test_a_tokenizer_can_be_read_while_it_is_trained():
    tokenizer = trained(["abab"], 300)
    before, seen = tokenizer.encode("abab"), []
    tokenizer.train_from_iterator(iter(["zz"]), 300, progress=lambda *_: seen.append(tokenizer.encode("abab")))
    assert seen and all(ids == before for ids in seen)
    assert tokenizer.encode("abab") != before


class Interrupted(Exception):
    """Raised by the tests where they interrupt a training."""


@pytest.fixture
def interrupt_after() -> Iterator[Callable[[float], None]]:
    """Call it with seconds: a signal then raises Interrupted in the main thread, as Ctrl-C raises KeyboardInterrupt."""

    def interrupt(*_) -> None:
        raise Interrupted

    timers = []

    def start(seconds: float) -> None:
        timers.append(threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR1)))
        timers[-1].start()

    previous = signal.signal(signal.SIGUSR1, interrupt)
    yield start
    for timer in timers:
        timer.join()
    signal.signal(signal.SIGUSR1, previous)


def test_a_signal_ends_the_counting(interrupt_after: Callable[[float], None]):
    tokenizer = trained(["abab"], 257)
    interrupt_after(0.2)
    with pytest.raises(Interrupted):
        tokenizer.train_from_iterator(itertools.repeat(ENGLISH * 100, 50_000), 300)  # takes many seconds
    assert tokenizer.get_mergeable_ranks()[256:] == [(b"ab", 256)]


def test_a_signal_ends_the_merging(interrupt_after: Callable[[float], None]):
    merges_done = []

    def progress(phase: str, done: int, total: int | None) -> None:
        if phase == "merge":
            merges_done.append(done)
        elif total is not None:
            interrupt_after(0.001)

    with pytest.raises(Interrupted):
        trained([unequal_words(100_000)], 50_000, progress=progress)
    assert merges_done == []


def test_progress_reports_both_phases_to_their_ends():
    texts, reports = [ENGLISH, UNICODE], []
    trained(texts, 300, buffer_size=1, progress=lambda *report: reports.append(report))
    num_bytes = sum(len(text.encode()) for text in texts)
    assert [report for report in reports if report[0] == "count"][-1] == ("count", num_bytes, num_bytes)
    assert reports[-1] == ("merge", 44, 44)
    reports.clear()
    trained(["abc"], 300, progress=lambda *report: reports.append(report))
    assert reports[-1] == ("merge", 2, 44)


def test_progress_is_reported_on_the_way_but_not_too_often():
    reports = []
    start = time.monotonic()
    texts = itertools.takewhile(lambda _: time.monotonic() < start + 0.55, itertools.repeat(ENGLISH))
    trained(texts, 257, buffer_size=1, progress=lambda *report: reports.append(report))
    on_the_way = [done for phase, done, total in reports if phase == "count" and total is None]
    assert 1 <= len(on_the_way) <= 6
    assert on_the_way == sorted(set(on_the_way))


def test_no_reference_is_leaked_or_lost(tokenizer: rustbpe.Tokenizer):
    text, ids = "".join(["hello ", "wörld"]), [1000, 72]
    text_of_errors = "".join(["a", "\ud800"])
    no_text, texts, pattern = object(), [text] * 3, "".join([r"\w", "+"])

    def progress(*_) -> None: ...

    def use() -> None:
        tokenizer.encode(text)
        tokenizer.batch_encode(texts)
        tokenizer.encode_batch(texts)
        tokenizer.get_mergeable_ranks()
        own.train_from_iterator(iter(texts), 258, 2, pattern, progress=progress)
        for bad_call in (lambda: tokenizer.decode(ids), lambda: tokenizer.encode(text_of_errors)):
            with pytest.raises(ValueError):
                bad_call()
        with pytest.raises(TypeError):
            own.train_from_iterator(iter([text, no_text]), 258, 8, pattern, progress=progress)

    own = rustbpe.Tokenizer()
    watched = (text, ids, ids[0], text_of_errors, texts, pattern, progress, no_text, own, tokenizer)
    use()
    gc.collect()
    before = [sys.getrefcount(thing) for thing in watched]
    for _ in range(1000):
        use()
    gc.collect()  # tracebacks of the errors hold references in cycles
    after = [sys.getrefcount(thing) for thing in watched]
    assert after == before


# Errors


def test_bad_arguments_are_value_errors():
    for vocab_size in (255, 0, -1, 2**40):
        with pytest.raises(ValueError, match=f"vocab_size must be .* not {vocab_size}"):
            trained([ENGLISH], vocab_size)
    for buffer_size in (0, -1):
        with pytest.raises(ValueError, match=f"buffer_size must be .* not {buffer_size}"):
            trained([ENGLISH], 300, buffer_size=buffer_size)
    with pytest.raises(ValueError, match=r"invalid split pattern \"\(a\": "):
        trained([ENGLISH], 300, pattern="(a")


def test_a_pattern_that_gives_up_is_a_value_error():
    with pytest.raises(ValueError, match="the split pattern failed on a text"):
        trained(["ab" * 200], 300, pattern=r"(?:a|b|ab)*?(?<!x)c")


def test_items_that_are_no_text_are_type_errors():
    for item in (b"bytes", None, 3, ["text"]):
        with pytest.raises(TypeError, match=f"texts must be str, not {type(item).__name__}"):
            trained(["text", item], 300)
    with pytest.raises(TypeError):
        rustbpe.Tokenizer().train_from_iterator(3, 300)
    with pytest.raises(TypeError):
        rustbpe.Tokenizer().batch_encode("one text instead of a list")
    with pytest.raises(TypeError):
        rustbpe.Tokenizer().encode_batch("one text instead of a list")
    with pytest.raises(TypeError):
        rustbpe.Tokenizer().encode_batch([b"bytes"])


def test_lone_surrogates_are_value_errors(tokenizer: rustbpe.Tokenizer):
    batches = (lambda text: tokenizer.batch_encode([text]), lambda text: tokenizer.encode_batch(["a", text]))
    for use in (tokenizer.encode, *batches, lambda text: trained([text], 300)):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            use("a\ud800")


def test_unknown_ids_are_value_errors(tokenizer: rustbpe.Tokenizer):
    for unknown in (-1, 500, 2**32 + 1):
        with pytest.raises(ValueError, match=f"unknown token id {unknown}: ids go from 0 to 499"):
            tokenizer.decode([65, unknown])


@pytest.mark.parametrize("place", ["iterator", "count", "merge"])
def test_exceptions_pass_through_and_leave_the_tokenizer_as_it_was(place: str):
    tokenizer = trained([UNICODE], 300)
    before = tokenizer.get_mergeable_ranks()

    def texts() -> Iterator[str]:
        yield ENGLISH
        if place == "iterator":
            raise Interrupted

    def progress(phase: str, done: int, total: int | None) -> None:
        if phase == place:
            raise Interrupted

    with pytest.raises(Interrupted):
        tokenizer.train_from_iterator(texts(), 280, 1, TWO_DIGITS_PATTERN, progress=progress)
    assert (tokenizer.get_mergeable_ranks(), tokenizer.get_pattern()) == (before, DEFAULT_PATTERN)


# As a package


def test_the_example_in_the_readme_runs():
    readme = (Path(__file__).parent.parent / "rustbpe" / "README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], {})


def test_the_type_stubs_are_those_of_the_module():
    stub = ast.parse((Path(__file__).parent.parent / "rustbpe" / "rustbpe.pyi").read_text(encoding="utf-8"))
    (tokenizer_class,) = [node for node in stub.body if isinstance(node, ast.ClassDef)]
    methods = {node.name: node.args for node in tokenizer_class.body if isinstance(node, ast.FunctionDef)}
    public = {name for name in dir(rustbpe.Tokenizer) if not name.startswith("_")}
    assert methods.keys() - {"__init__"} == public
    for name in public - {"vocab_size"}:
        args = methods[name]
        parameters = inspect.signature(getattr(rustbpe.Tokenizer, name)).parameters.values()
        found = [(p.name, p.kind is p.KEYWORD_ONLY, p.default is not p.empty) for p in parameters]
        num_required = len(args.args) - len(args.defaults)
        expected = [(arg.arg, False, i >= num_required) for i, arg in enumerate(args.args)]
        expected += [
            (arg.arg, True, default is not None) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)
        ]
        assert [p for p in found if p[0] != "self"] == [p for p in expected if p[0] not in ("self", "cls")], name
