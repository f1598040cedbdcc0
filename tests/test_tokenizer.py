"""The tokenizer against two others (rustbpe's encoder, Hugging Face's tokenizers), its file, and its two scripts."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
import tokenizers
import torch
from conftest import write_shards

import rustbpe
from nanochat.common import UserError
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    HuggingFaceTokenizer,
    RustBPETokenizer,
    get_token_bytes,
    get_tokenizer,
    token_bytes,
)
from scripts import tok_eval, tok_train

VOCAB_SIZE = 600
TEXTS = [
    "",
    "The quick brown fox doesn't jump over 12345 lazy dogs; it's 3.14 o'clock, WE'LL see.",
    "def f(x):\n\treturn {k: v ** 2 for k, v in x.items()}  # comment\r\n\r\n\n    pass\n",
    "한국어 문장입니다. 日本語の文章です。 Ελληνικά, العربية, हिन्दी, naïve café e\u0301",
    "👩‍👩‍👧‍👦🇰🇷👍🏽 zero\u200bwidth \ufeff \u3000 \u0085 \u00a0 \u180e x\u2028y",
    "<|bos|> or <|assistant_end|><|user_start|> are text here, and so is <|no_such_token|>",
    "   leading, trailing and     inner spaces   \n \n\t \t\n   ",
    "'S 'ſ 'LL 'll a'ſx \x00\x01\x7f !!!???\n\n...",
]


def corpus() -> list[str]:
    """Text with all the five kinds of tok_eval in it, enough for a few hundred merges."""
    return [*tok_eval.TEXTS.values(), *TEXTS]


@pytest.fixture(scope="module")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(corpus(), VOCAB_SIZE)


@pytest.fixture(scope="module")
def folder(tokenizer: RustBPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tokenizer saved in it."""
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path)
    return path


def random_texts(count: int) -> list[str]:
    """Short texts of code points from all of Unicode, mixed with what the pattern treats in a special way."""
    rng = random.Random(0)
    points = [point for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000]
    special = "  \t\n\r'sStTlLaA09.,!\u0085\u00a0\u017f\u3000"

    def character() -> str:
        return rng.choice(special) if rng.random() < 0.6 else chr(rng.choice(points))

    return ["".join(character() for _ in range(rng.randrange(1, 20))) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Encoding and decoding


def test_three_encoders_give_equal_ids(tokenizer: RustBPETokenizer, folder: Path) -> None:
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(corpus()), VOCAB_SIZE - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in [*corpus(), *random_texts(3000)]:
        ids = tokenizer.encode(text)
        assert ids == trainer.encode(text), ascii(text)
        assert ids == theirs.encode(text).ids, ascii(text)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("bos", ["<s>", "<bos>", "<｜begin▁of▁sentence｜>"])
def test_a_document_begins_as_the_maker_of_a_tokenizer_says(bos):
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.add_special_tokens(["<pad>", bos])
    assert HuggingFaceTokenizer(theirs).get_bos_token_id() == 1
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.add_special_tokens(["<pad>", "<eos>"])
    with pytest.raises(UserError, match="no token to begin a document.* it has <pad>, <eos>"):
        HuggingFaceTokenizer(theirs).get_bos_token_id()


def test_hugging_face_class_has_the_same_results(tokenizer: RustBPETokenizer, folder: Path) -> None:
    theirs = HuggingFaceTokenizer.from_pretrained(str(folder))
    assert theirs.encode(TEXTS, prepend="<|bos|>") == tokenizer.encode(TEXTS, prepend="<|bos|>")
    assert theirs.get_special_tokens() == tokenizer.get_special_tokens() == SPECIAL_TOKENS
    assert theirs.get_vocab_size() == tokenizer.get_vocab_size() == VOCAB_SIZE
    assert theirs.get_bos_token_id() == tokenizer.get_bos_token_id() == VOCAB_SIZE - len(SPECIAL_TOKENS)
    assert [theirs.id_to_bytes(i) for i in range(VOCAB_SIZE)] == [tokenizer.id_to_bytes(i) for i in range(VOCAB_SIZE)]
    assert theirs.hash == tokenizer.hash
    ids = tokenizer.encode(TEXTS[3], prepend="<|bos|>")
    assert theirs.decode(ids) == tokenizer.decode(ids) == "<|bos|>" + TEXTS[3]
    assert [a.tolist() for a in theirs.encode_batch_flat(TEXTS)] == [
        a.tolist() for a in tokenizer.encode_batch_flat(TEXTS)
    ]


def test_tokenizer_json_is_what_the_tokenizers_library_writes(tokenizer: RustBPETokenizer, folder: Path) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert json.loads(theirs.to_str()) == tokenizer.definition


def test_hugging_face_training_puts_the_special_tokens_last() -> None:
    trained = HuggingFaceTokenizer.train_from_iterator(corpus(), VOCAB_SIZE)
    assert trained.get_vocab_size() == VOCAB_SIZE
    assert [trained.encode_special(token) for token in SPECIAL_TOKENS] == list(range(VOCAB_SIZE - 9, VOCAB_SIZE))
    assert [trained.decode(ids) for ids in trained(TEXTS)] == TEXTS


def test_encode_list_prepend_append(tokenizer: RustBPETokenizer) -> None:
    bos, end = tokenizer.encode_special("<|bos|>"), tokenizer.encode_special("<|assistant_end|>")
    plain = [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode(TEXTS) == tokenizer(TEXTS, num_threads=2) == plain
    assert tokenizer.encode(TEXTS, prepend=bos, append="<|assistant_end|>") == [[bos, *ids, end] for ids in plain]
    assert tokenizer.encode("", prepend="<|bos|>") == [bos]
    assert tokenizer.encode([]) == []
    with pytest.raises(TypeError, match="bytes"):
        tokenizer.encode(b"bytes")


def test_encode_batch_flat_equals_encode(tokenizer: RustBPETokenizer) -> None:
    ids, offsets = tokenizer.encode_batch_flat(TEXTS, prepend="<|bos|>")
    assert (ids.dtype, offsets.dtype) == (np.uint16, np.int64)
    rows = [ids[start:end].tolist() for start, end in zip(offsets[:-1], offsets[1:], strict=True)]
    assert rows == tokenizer.encode(TEXTS, prepend="<|bos|>")
    assert (offsets[0], offsets[-1]) == (0, len(ids))
    ids, offsets = tokenizer.encode_batch_flat([])
    assert (len(ids), offsets.tolist()) == (0, [0])


def test_flat_ids_are_wide_enough_for_the_vocabulary(
    tokenizer: RustBPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_ENCODER", "tiktoken")  # tests/test_rustbpe.py has rustbpe's own
    for vocab_size, dtype in ((65_536, np.uint16), (65_537, np.uint32)):
        monkeypatch.setattr(tokenizer, "get_vocab_size", lambda size=vocab_size: size)
        assert tokenizer.encode_batch_flat(["text"])[0].dtype == dtype


def test_both_encoders_have_the_same_results(tokenizer: RustBPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*corpus(), *random_texts(2000), "a\ud83dz", "\ud83d\ude00", *tok_eval.TEXTS.values(), " " * 3000 + "x"]

    def results() -> list:
        ids, offsets = tokenizer.encode_batch_flat(texts, prepend="<|bos|>")
        return [tokenizer.encode(texts), tokenizer.encode(texts[1]), ids.tolist(), ids.dtype, offsets.tolist()]

    ours = results()
    monkeypatch.setattr(tokenizer, "encoder", None)
    assert results() == ours
    assert [tokenizer.id_to_bytes(i) for i in range(VOCAB_SIZE)] == [
        RustBPETokenizer(None, tokenizer.definition).id_to_bytes(i) for i in range(VOCAB_SIZE)
    ]


@pytest.mark.parametrize(("name", "unused"), [("", "encoding"), ("rustbpe", "encoding"), ("tiktoken", "encoder")])
def test_the_environment_chooses_the_encoder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, unused: str
) -> None:
    monkeypatch.setenv("NANOCHAT_ENCODER", name)
    loaded = RustBPETokenizer.from_directory(folder)
    expected = loaded.encode(TEXTS)
    vocab_size = loaded.get_vocab_size()
    monkeypatch.setattr(loaded, "get_vocab_size", lambda: vocab_size)
    monkeypatch.setattr(loaded, unused, object())  # any use of it is an AttributeError
    assert loaded.encode(TEXTS) == expected
    assert loaded.encode_batch_flat(TEXTS)[0].tolist() == sum(expected, [])


def test_special_tokens_in_text_stay_text(tokenizer: RustBPETokenizer) -> None:
    first_special = tokenizer.get_bos_token_id()
    for token in SPECIAL_TOKENS:
        text = f"a{token}b {token}"
        for ids in (tokenizer.encode(text), tokenizer.encode([text])[0], tokenizer.encode_batch_flat([text])[0]):
            assert max(ids) < first_special
            assert tokenizer.decode(list(ids)) == text


def test_unknown_special_token_is_named(tokenizer: RustBPETokenizer) -> None:
    with pytest.raises(ValueError, match=r"<\|nobody\|>"):
        tokenizer.encode_special("<|nobody|>")


def test_surrogates_are_replaced(tokenizer: RustBPETokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud83dz")) == "a\ufffdz"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"
    assert tokenizer.encode_batch_flat(["a\ud83dz"])[0].tolist() == tokenizer.encode("a\ufffdz")


@pytest.mark.parametrize("run", ["a" * 10**6, " " * 1_100_000, "\t " * 550_000 + "x", "\n" * 10**6, "!" * 10**6])
def test_long_runs_are_encoded(tokenizer: RustBPETokenizer, run: str) -> None:
    assert tokenizer.decode(tokenizer.encode(run)) == run


def test_white_space_is_split_as_the_pattern_says(tokenizer: RustBPETokenizer, folder: Path) -> None:
    """The pattern that tiktoken runs is not the one in tokenizer.json where white space is concerned."""
    theirs = HuggingFaceTokenizer.from_directory(folder)
    rng = random.Random(1)
    texts = ["".join(rng.choices(" \t\n\r\u3000\u0085ax1.'s", k=rng.randrange(1, 14))) for _ in range(5000)]
    texts += [" " * count + end for count in (999, 1000, 1001, 1002, 2001, 3500) for end in ("", "x", ".", "\n", "1")]
    assert tokenizer.encode(texts) == theirs.encode(texts)


def test_visualize_shows_every_token_and_no_control_character(tokenizer: RustBPETokenizer) -> None:
    ids = [*tokenizer.encode("x\x07"), tokenizer.get_bos_token_id()]
    shown = tokenizer.visualize_tokenization(ids, [0, 1, 1])
    assert shown == "\033[91mx\033[0m|\033[92m\\x07\033[0m|\033[92m<|bos|>\033[0m"


# ---------------------------------------------------------------------------------------------------------------------
# token_bytes


def test_token_bytes_count_the_raw_bytes(tokenizer: RustBPETokenizer) -> None:
    lengths = token_bytes(tokenizer)
    assert (lengths.dtype, lengths.shape) == (torch.int32, (VOCAB_SIZE,))
    assert lengths[:256].tolist() == [1] * 256
    assert lengths[-len(SPECIAL_TOKENS) :].tolist() == [0] * len(SPECIAL_TOKENS)
    assert lengths[256 : -len(SPECIAL_TOKENS)].min() >= 2
    for text in corpus():
        ids = tokenizer.encode(text, prepend="<|bos|>")
        assert lengths[ids].sum() == len(text.encode("utf-8"))


def test_get_token_bytes_reads_the_file_or_computes(tokenizer: RustBPETokenizer, base_dir: Path) -> None:
    tok_train.save_tokenizer(tokenizer, base_dir / "tokenizer")
    expected = token_bytes(tokenizer)
    assert get_token_bytes().equal(expected)
    torch.save(expected + 1, base_dir / "tokenizer" / "token_bytes.pt")
    assert get_token_bytes().equal(expected + 1)  # it is really read
    torch.save(expected[:-1], base_dir / "tokenizer" / "token_bytes.pt")
    with pytest.raises(UserError, match="delete"):
        get_token_bytes()
    (base_dir / "tokenizer" / "token_bytes.pt").unlink()
    assert get_token_bytes().equal(expected)


# ---------------------------------------------------------------------------------------------------------------------
# The file


def test_save_and_load_keep_the_tokenizer(tokenizer: RustBPETokenizer, folder: Path, tmp_path: Path) -> None:
    loaded = RustBPETokenizer.from_directory(folder)
    assert loaded.hash == tokenizer.hash
    assert loaded.encode(TEXTS) == tokenizer.encode(TEXTS)
    loaded.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_hash_depends_on_the_content_and_not_on_its_layout(tokenizer: RustBPETokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer.definition, indent=2, sort_keys=True), encoding="utf-8")
    assert RustBPETokenizer.from_directory(tmp_path).hash == tokenizer.hash
    other = RustBPETokenizer.train_from_iterator(corpus(), VOCAB_SIZE - 1)
    assert other.hash != tokenizer.hash and len(other.hash) == 16


def test_missing_tokenizer_names_the_command() -> None:
    for load in (get_tokenizer, get_token_bytes):
        with pytest.raises(UserError, match="no tokenizer in .*python -m scripts.tok_train"):
            load()


def test_damaged_tokenizer_names_the_command(tokenizer: RustBPETokenizer, folder: Path, base_dir: Path) -> None:
    whole = (folder / "tokenizer.json").read_text(encoding="utf-8")
    gap = json.loads(whole)
    gap["added_tokens"].pop(0)
    wordpiece = json.loads(whole)
    wordpiece["model"]["type"] = "WordPiece"
    lowercase = json.loads(whole)
    lowercase["normalizer"] = {"type": "Lowercase"}
    byteless = json.loads(whole)
    vocab = byteless["model"]["vocab"]
    vocab["zzzz"] = vocab.pop("a")
    path = base_dir / "tokenizer" / "tokenizer.json"
    path.parent.mkdir(parents=True)
    for text in (whole[:1000], "", "[]", "{}", *map(json.dumps, (gap, wordpiece, lowercase, byteless))):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="damaged.*python -m scripts.tok_train"):
            get_tokenizer()
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="damaged"):
        get_tokenizer()
    with pytest.raises(UserError, match="damaged"):
        HuggingFaceTokenizer.from_directory(path.parent)


def test_from_pretrained_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        pytest.fail("a download was tried")

    monkeypatch.setattr(requests, "get", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("r50k_base", "no_such_encoding"):
        with pytest.raises(UserError, match=name):
            RustBPETokenizer.from_pretrained(name)


def test_from_pretrained_uses_what_is_on_disk(tokenizer: RustBPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiktoken.get_encoding", lambda name: tokenizer.encoding)
    pretrained = RustBPETokenizer.from_pretrained("gpt2")
    assert pretrained.encode(TEXTS) == tokenizer.encode(TEXTS)
    with pytest.raises(UserError, match="cannot be saved"):
        pretrained.save("anywhere")


def test_utf8_whatever_the_locale(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from nanochat.tokenizer import RustBPETokenizer as R; t = R.from_directory(sys.argv[1]);"
        "t.save(sys.argv[2]); text = '\\ud55c\\uad6d\\uc5b4 \\U0001f600'; assert t.decode(t.encode(text)) == text"
    )
    environment = {**os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path)], env=environment, check=True)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Training, and the two scripts


def test_vocabulary_that_is_too_small_or_too_large_is_named() -> None:
    with pytest.raises(UserError, match="--vocab_size=10000000000 is too large"):
        RustBPETokenizer.train_from_iterator(["abc abc"], 10**10)
    with pytest.raises(UserError, match="--vocab_size=265"):
        RustBPETokenizer.train_from_iterator(corpus(), 264)
    with pytest.raises(UserError, match="--vocab_size=268 or less"):
        RustBPETokenizer.train_from_iterator(["abc abc"], 300)  # three merges: ab, abc and abc after a space
    for vocab_size in (265, 268):
        assert RustBPETokenizer.train_from_iterator(["abc abc"], vocab_size).get_vocab_size() == vocab_size


def test_tok_train_writes_the_same_bytes_again(base_dir: Path) -> None:
    write_shards(base_dir, [corpus()[:6], corpus()[6:], ["validation"]])
    config = tok_train.Config(vocab_size=400)
    tok_train.main(config)
    first = (base_dir / "tokenizer" / "tokenizer.json").read_bytes()
    tok_train.main(config)
    assert (base_dir / "tokenizer" / "tokenizer.json").read_bytes() == first
    assert get_token_bytes().equal(token_bytes(get_tokenizer()))
    section = json.loads((base_dir / "report" / "tok_train.json").read_text(encoding="utf-8"))
    text = json.dumps(section)
    assert all(f"{phase}_megabytes_per_second" in text for phase in ("train", "read", "count", "merge"))
    assert get_tokenizer().hash in text and str(sum(map(len, corpus()))) in text


def test_tok_train_reads_what_its_settings_say(base_dir: Path) -> None:
    documents = ["ab " * 200, "cd " * 200, "ef " * 200, "gh " * 200]
    write_shards(base_dir, [documents[:2], documents[2:], ["validation"]])

    def trained(**settings: int) -> str:
        tok_train.main(tok_train.Config(vocab_size=267, **settings))
        return get_tokenizer().hash

    def expected(texts: list[str]) -> str:
        return RustBPETokenizer.train_from_iterator(texts, 267).hash

    assert trained() == expected(documents)
    assert trained(max_shards=1) == expected(documents[:2]) != expected(documents[2:])
    assert trained(max_chars=600) == expected(documents[:1])
    assert trained(max_chars=601) == expected(documents[:2])
    assert trained(max_chars=600, doc_cap=4) == expected([text[:4] for text in documents])


def test_tok_train_errors_name_the_fix(base_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(**settings: int) -> str:
        with pytest.raises(SystemExit) as exit_info:
            tok_train.main(tok_train.Config(**settings))
        assert exit_info.value.code == 1
        return capsys.readouterr().err

    assert "python -m nanochat.dataset" in error()
    assert "--vocab_size=265" in error(vocab_size=264)
    assert "--max_chars=0" in error(max_chars=0)
    write_shards(base_dir, [["some text"], ["validation"]])
    assert "the text is too small" in error()
    assert not (base_dir / "tokenizer" / "tokenizer.json").exists()


def test_tok_eval_measures_every_text(
    tokenizer: RustBPETokenizer, base_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(base_dir))
    tokenizer.save(base_dir / "tokenizer")
    write_shards(base_dir, [["aaa bbb", "ccc"], ["ddd"], ["한국어", "eee"]])
    tok_eval.main(tok_eval.Config())
    output = capsys.readouterr().out
    assert "GPT-4 is left out" in output
    measured = {line.split()[0]: line.split()[1:] for line in output.splitlines()}
    assert set(tok_eval.TEXTS) | {"train", "val"} <= set(measured)
    num_tokens = len(tokenizer.encode("한국어")) + len(tokenizer.encode("eee"))
    assert measured["val"] == ["12", str(round(12 / num_tokens, 3)).rstrip("0").rstrip(".")]
    assert "Korean" in (base_dir / "report" / "tokenizer.md").read_text(encoding="utf-8")


def test_tok_eval_refuses_a_tokenizer_that_loses_text(tokenizer: RustBPETokenizer) -> None:
    class Lossy:
        def encode(self, text: str) -> list[int]:
            return tokenizer.encode(text.lower())

        def decode(self, ids: list[int]) -> str:
            return tokenizer.decode(ids)

    with pytest.raises(AssertionError, match="round trip"):
        tok_eval.bytes_per_token(Lossy(), ["Capital"])
