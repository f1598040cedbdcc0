"""Byte-pair encoding: text to ids and back, trained and run by rustbpe.

Ids 0 to 255 are the bytes, so every text can be encoded; then come the merges in the order in which they were learned,
then SPECIAL_TOKENS. A tokenizer is one file, tokenizer.json, in the format of Hugging Face's tokenizers library, which
reads it as it is and gives equal ids. JSON and not a pickle: loading it can run nothing.

Special tokens in ordinary text are ordinary text: `encode` never makes one of what a user or a document says; they
enter by `encode_special`, `prepend` and `append` alone. A Python str can hold surrogates, which are no text: a pair is
encoded as the character that it stands for, and a lone one as U+FFFD.

The format: https://github.com/huggingface/tokenizers. Byte-pair encoding of bytes: GPT-2 (Radford et al., 2019).

What it does not do: normalise text or drop any of it. Decoding the ids of a text gives the text again.

NANOCHAT_ENCODER=tiktoken encodes with tiktoken instead, for comparisons: the ids are equal, it is several times slower.
"""

import contextlib
import functools
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import tiktoken.load
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

import rustbpe
from nanochat.common import UserError, atomic_write, get_base_dir, printable
from nanochat.conversation import render_conversation, render_for_completion

SPECIAL_TOKENS = [
    "<|bos|>",  # begins every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls a tool
    "<|python_end|>",
    "<|output_start|>",  # the tool's output
    "<|output_end|>",
]
# GPT-4's pattern, but for numbers in pieces of at most two digits: a small vocabulary has no room for all of three.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
# Ours, then those of models of other makers
BOS_NAMES = (
    *("<|bos|>", "<|endoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "<BOS_TOKEN>"),
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
)
MAX_VOCAB_SIZE = 2**31 - 1
HOW_TO_TRAIN = "run python -m scripts.tok_train"


class Tokenizer(ABC):
    """What the two tokenizers have in common. Ids are Python ints, except in encode_batch_flat."""

    @property
    @abstractmethod
    def definition(self) -> dict[str, Any]:
        """The content of tokenizer.json."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of ids; bytes that are no UTF-8, as where a character is cut, become U+FFFD."""

    @abstractmethod
    def get_vocab_size(self) -> int:
        """The number of ids, special tokens included."""

    @abstractmethod
    def id_to_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; for a special token, those of its name."""

    @property
    @abstractmethod
    def special_ids(self) -> dict[str, int]:
        """Special token -> id, ordered by id."""

    @abstractmethod
    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts without lone surrogates."""

    @abstractmethod
    def _encode_flat(self, texts: list[str], first: int | None) -> tuple[np.ndarray, np.ndarray]:
        """encode_batch_flat for texts without lone surrogates; first is the id to prepend, if any."""

    @functools.cached_property
    def hash(self) -> str:
        """Identity: 16 hex digits of SHA-256 over the content of tokenizer.json, however that is laid out."""
        canonical = json.dumps(self.definition, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("utf-8")).hexdigest()[:16]

    def encode(
        self,
        text: str | list[str],
        prepend: int | str | None = None,
        append: int | str | None = None,
        num_threads: int = 8,
    ) -> list[int] | list[list[int]]:
        """The ids of a text, or those of each text of a list.

        prepend, append: a special token (name or id) to put before and after each. num_threads is accepted and not
        used: what makes lists takes one thread's time, and for those who want speed there is encode_batch_flat.

            encode("Hi", prepend="<|bos|>")  ->  [65527, 17250]
        """
        if not isinstance(text, str | list):
            raise TypeError(f"text to encode must be a str or a list of str, not {type(text).__name__}")
        texts = [well_formed(t) for t in ([text] if isinstance(text, str) else text)]
        before = [] if prepend is None else [self._as_id(prepend)]
        after = [] if append is None else [self._as_id(append)]
        rows = self._encode_texts(texts)
        if before or after:
            rows = [[*before, *ids, *after] for ids in rows]
        return rows[0] if isinstance(text, str) else rows

    __call__ = encode

    def encode_batch_flat(self, texts: list[str], prepend: int | str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts in one array, and where each begins: (ids, offsets), for those who want no lists.

        ids: (sum of lengths,) uint16 where the vocabulary allows, else uint32. offsets: (len(texts) + 1,) int64; text i
        is ids[offsets[i]:offsets[i+1]], the prepended special token (name or id) included.
        """
        first = None if prepend is None else self._as_id(prepend)
        try:
            return self._encode_flat(texts, first)
        except UnicodeEncodeError:  # looked for only where there are some: the look takes longer than the encoding
            return self._encode_flat([well_formed(text) for text in texts], first)

    def encode_special(self, token: str) -> int:
        """The id of a special token by its name; ValueError where there is none of that name."""
        ids = self.special_ids
        if token not in ids:
            raise ValueError(f"{token!r} is not a special token of this tokenizer; it has {', '.join(ids)}")
        return ids[token]

    def get_bos_token_id(self) -> int:
        """The id of the token that begins a document. Raises UserError where there is none of a known name."""
        ids = self.special_ids
        name = next((name for name in BOS_NAMES if name in ids), None)
        if name is None:
            has = f"it has {', '.join(ids)}" if ids else "it has no special tokens"
            raise UserError(f"the tokenizer has no token to begin a document, {', '.join(BOS_NAMES)}: {has}")
        return ids[name]

    def get_special_tokens(self) -> list[str]:
        """The names of the special tokens, ordered by id."""
        return list(self.special_ids)

    def id_to_token(self, token_id: int) -> str:
        """The text of one token; a part of a character is shown as U+FFFD."""
        return self.id_to_bytes(token_id).decode("utf-8", errors="replace")

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json into a folder, which is made if need be; a former one is replaced in one step."""
        with atomic_write(Path(directory) / "tokenizer.json") as f:
            json.dump(self.definition, f, ensure_ascii=False)

    def render_conversation(self, conversation: dict[str, Any], max_tokens: int = 2048) -> tuple[list[int], list[int]]:
        """(ids, mask) of a conversation, cut to max_tokens: see conversation.render_conversation."""
        return render_conversation(self, conversation, max_tokens)

    def render_for_completion(self, conversation: dict[str, Any]) -> list[int]:
        """The ids after which the model gives its reply: see conversation.render_for_completion."""
        return render_for_completion(self, conversation)

    def visualize_tokenization(self, ids: list[int], mask: list[int]) -> str:
        """The tokens joined by `|` for a terminal: green where the mask is 1, red where it is 0."""
        colours = {0: "\033[91m", 1: "\033[92m"}
        tokens = zip(map(self.id_to_token, ids), mask, strict=True)
        return "|".join(f"{colours[supervised]}{printable(token)}\033[0m" for token, supervised in tokens)

    def _as_id(self, token: int | str) -> int:
        return self.encode_special(token) if isinstance(token, str) else token


class RustBPETokenizer(Tokenizer):
    """The project's tokenizer: trained by rustbpe, and run by it or by tiktoken."""

    def __init__(self, encoding: tiktoken.Encoding | None, definition: dict[str, Any]):
        """encoding: tiktoken's own, to be run by it; None for the tokenizer that the definition (tokenizer.json) is."""
        self._definition = definition
        self.encoder = None
        if encoding is not None:
            self.encoding = encoding
        else:
            pattern, ranks, specials = read_definition(definition)
            self.special_ids = dict(sorted(specials.items(), key=lambda item: item[1]))
            self.encoder = rustbpe.Tokenizer.from_ranks(ranks, pattern, specials)

    @classmethod
    def train_from_iterator(
        cls,
        text_iterator: Iterable[str],
        vocab_size: int,
        progress: Callable[[str, int, int | None], None] | None = None,
    ) -> "RustBPETokenizer":
        """Learn a tokenizer of vocab_size tokens, SPECIAL_TOKENS included. The same texts give the same tokenizer.

        progress, if given, is called as progress(phase, done, total): "count" in bytes of text (total None until the
        texts end), then "merge" in merges. Raises UserError where vocab_size is too small, or too large for the texts.
        """
        check_vocab_size(vocab_size)
        trainer = rustbpe.Tokenizer()
        num_wanted = vocab_size - len(SPECIAL_TOKENS)
        trainer.train_from_iterator(iter(text_iterator), num_wanted, pattern=SPLIT_PATTERN, progress=progress)
        ranks = dict(trainer.get_mergeable_ranks())
        if len(ranks) < num_wanted:
            raise UserError(
                f"the text is too small for {vocab_size} tokens: give more text, or set "
                f"--vocab_size={len(ranks) + len(SPECIAL_TOKENS)} or less"
            )
        specials = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
        return cls(None, make_definition(SPLIT_PATTERN, ranks, specials))

    @classmethod
    def from_directory(cls, directory: str | Path) -> "RustBPETokenizer":
        """Load tokenizer.json from a folder. Raises UserError when it is missing, damaged or of another kind."""
        path = Path(directory) / "tokenizer.json"
        try:
            return cls(None, json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"no tokenizer in {directory}: {HOW_TO_TRAIN}") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{path} is damaged, or not a tokenizer of this project ({reason}): {HOW_TO_TRAIN}"
            ) from None

    @classmethod
    def from_pretrained(cls, name: str) -> "RustBPETokenizer":
        """One of tiktoken's own encodings, such as gpt2 or cl100k_base, where it is on disk: for comparisons.

        Nothing is downloaded: UserError where it would have to be. It cannot be saved.
        """
        try:
            with _no_downloads():
                encoding = tiktoken.get_encoding(name)
        except (ValueError, OSError) as error:
            command = f'python -c "import tiktoken; tiktoken.get_encoding({name!r})"'
            raise UserError(f"tiktoken has no encoding {name!r} on disk ({error}): get it by {command}") from None
        return cls(encoding, {"tiktoken": name})

    @functools.cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The same tokenizer as tiktoken's."""
        pattern, ranks, specials = read_definition(self._definition)
        return tiktoken.Encoding(
            "nanochat", pat_str=_bounded_pattern(pattern), mergeable_ranks=ranks, special_tokens=specials
        )

    @property
    def definition(self) -> dict[str, Any]:
        return self._definition

    def save(self, directory: str | Path) -> None:
        if "model" not in self._definition:
            raise UserError(f"tiktoken's own encoding {self.encoding.name!r} is for comparisons and cannot be saved")
        super().save(directory)

    def decode(self, ids: list[int]) -> str:
        return self.encoder.decode(ids) if self.encoder else self.encoding.decode(ids)

    def get_vocab_size(self) -> int:
        return self.encoder.vocab_size + len(self.special_ids) if self.encoder else self.encoding.n_vocab

    def id_to_bytes(self, token_id: int) -> bytes:
        if self.encoder:
            return self.encoder.decode_bytes([token_id])
        return self.encoding.decode_single_token_bytes(token_id)

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        ids = {name: self.encoding.encode_single_token(name) for name in self.encoding.special_tokens_set}
        return dict(sorted(ids.items(), key=lambda item: item[1]))

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        encoder = self.encoder if self._uses_rustbpe() else self.encoding
        return [encoder.encode_ordinary(text) for text in texts]

    def _encode_flat(self, texts: list[str], first: int | None) -> tuple[np.ndarray, np.ndarray]:
        if self._uses_rustbpe():
            return self.encoder.encode_batch(texts, bos=first, num_threads=_num_threads())
        # Nothing allowed and nothing disallowed is encode_ordinary, without the detour by a list. It makes something
        # of its own of lone surrogates.
        rows = [
            self.encoding.encode_to_numpy(well_formed(text), allowed_special=set(), disallowed_special=())
            for text in texts
        ]
        return _joined(rows, first, self.get_vocab_size())

    def _uses_rustbpe(self) -> bool:
        return self.encoder is not None and os.environ.get("NANOCHAT_ENCODER") != "tiktoken"


class HuggingFaceTokenizer(Tokenizer):
    """The same interface over Hugging Face's tokenizers: for models of other makers, and to check ours against."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self.tokenizer = tokenizer
        self.tokenizer.encode_special_tokens = True  # by its name: special tokens in text are encoded as text

    @classmethod
    def train_from_iterator(cls, text_iterator: Iterable[str], vocab_size: int) -> "HuggingFaceTokenizer":
        """Learn a tokenizer of at most vocab_size tokens, SPECIAL_TOKENS included and last.

        Like RustBPETokenizer's but for the order of the bytes and of pairs that are equally frequent.
        """
        check_vocab_size(vocab_size)
        tokenizer = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(text_iterator, trainer)
        tokenizer.add_special_tokens(SPECIAL_TOKENS)
        return cls(tokenizer)

    @classmethod
    def from_directory(cls, directory: str | Path) -> "HuggingFaceTokenizer":
        """Load any tokenizer.json from a folder. Raises UserError when it is missing or damaged."""
        path = Path(directory) / "tokenizer.json"
        if not path.exists():
            raise UserError(f"no tokenizer in {directory}: {HOW_TO_TRAIN}")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"{path} is damaged ({error}): {HOW_TO_TRAIN}") from None

    @classmethod
    def from_pretrained(cls, name: str) -> "HuggingFaceTokenizer":
        """The tokenizer of a local folder, or else of a model on the hub, from which it is downloaded."""
        if Path(name).is_dir():
            return cls.from_directory(name)
        try:
            return cls(tokenizers.Tokenizer.from_pretrained(name))
        except Exception as error:  # the library raises Exception itself
            raise UserError(f"{name!r} is no folder, and the hub has no tokenizer of that name ({error})") from None

    @functools.cached_property
    def definition(self) -> dict[str, Any]:
        return json.loads(self.tokenizer.to_str())

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def get_vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def id_to_bytes(self, token_id: int) -> bytes:
        token = self.tokenizer.id_to_token(token_id)
        if token is None:
            raise KeyError(f"no token has the id {token_id}")
        return token.encode("utf-8") if token_id in self.special_ids.values() else _from_byte_chars(token)

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        added = sorted(self.tokenizer.get_added_tokens_decoder().items())
        return {token.content: token_id for token_id, token in added if token.special}

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _encode_flat(self, texts: list[str], first: int | None) -> tuple[np.ndarray, np.ndarray]:
        rows = self._encode_texts([well_formed(text) for text in texts])
        return _joined(rows, first, self.get_vocab_size())


def get_tokenizer() -> RustBPETokenizer:
    """The tokenizer of the base directory. Raises UserError when it is missing or damaged."""
    return RustBPETokenizer.from_directory(get_base_dir() / "tokenizer")


def get_token_bytes(device: torch.device | str = "cpu") -> torch.Tensor:
    """(V,) int32: how many bytes each id of the base directory's tokenizer stands for; see token_bytes.

    Read from token_bytes.pt, or computed where that file is missing. Raises UserError when it belongs to a tokenizer
    of another size.
    """
    tokenizer = get_tokenizer()
    path = get_base_dir() / "tokenizer" / "token_bytes.pt"
    if not path.exists():
        return token_bytes(tokenizer).to(device)
    lengths = torch.load(path, map_location=device, weights_only=True)
    if lengths.shape != (tokenizer.get_vocab_size(),):
        raise UserError(
            f"{path} has {len(lengths)} entries and the tokenizer {tokenizer.get_vocab_size()} tokens: delete that file"
        )
    return lengths


def token_bytes(tokenizer: Tokenizer) -> torch.Tensor:
    """(V,) int32: the length in bytes of each id's own bytes, 0 for special tokens.

    From the raw bytes, not from decoded text: a token may be a part of a character. So the sum over the ids of a text
    is the text's length in UTF-8.
    """
    special_ids = set(tokenizer.special_ids.values())
    lengths = [0 if i in special_ids else len(tokenizer.id_to_bytes(i)) for i in range(tokenizer.get_vocab_size())]
    return torch.tensor(lengths, dtype=torch.int32)


def check_vocab_size(vocab_size: int) -> None:
    """Raise UserError unless vocab_size has room for the bytes and the special tokens, and ids fit in 32 bits."""
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(
            f"--vocab_size={vocab_size} has no room for the 256 bytes and {len(SPECIAL_TOKENS)} special tokens: set "
            f"--vocab_size={smallest} or more"
        )
    if vocab_size > MAX_VOCAB_SIZE:
        raise UserError(f"--vocab_size={vocab_size} is too large: {MAX_VOCAB_SIZE} is the most")


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json


def make_definition(pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]) -> dict[str, Any]:
    """The content of tokenizer.json: exactly what the tokenizers library itself would write for this tokenizer.

    pattern splits text into pieces; ranks gives each token's id by its bytes, 256 bytes first and then the merges in
    their order; special_tokens gives the ids of the special ones.
    """
    names = {token: _to_byte_chars(token) for token in ranks}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token_id, "content": token, **flags} for token, token_id in special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {names[token]: rank for token, rank in ranks.items()},
            "merges": [[names[part] for part in _merged_pair(token, ranks)] for token in ranks if len(token) > 1],
        },
    }


def read_definition(definition: dict[str, Any]) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """(pattern, ranks, special_tokens): what make_definition was given.

    Raises ValueError, TypeError, KeyError or AttributeError for the content of another kind of tokenizer.
    """
    model = definition["model"]
    split, byte_level = definition["pre_tokenizer"]["pretokenizers"]
    if (model["type"], split["type"], byte_level["type"]) != ("BPE", "Split", "ByteLevel") or definition["normalizer"]:
        raise ValueError("this is not byte-level BPE over pieces of unchanged text")
    ranks = {_from_byte_chars(name): rank for name, rank in model["vocab"].items()}
    specials = {token["content"]: token["id"] for token in definition["added_tokens"]}
    if sorted([*ranks.values(), *specials.values()]) != list(range(len(model["vocab"]) + len(specials))):
        raise ValueError("the ids are not 0, 1, 2, ...")
    if not {bytes([b]) for b in range(256)} <= ranks.keys():
        raise ValueError("some of the 256 bytes are missing")
    return split["pattern"]["Regex"], ranks, specials


def _merged_pair(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge made this one: what is left of its bytes after all merges that came before."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = (ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:], strict=False))
        _, i = min((rank, i) for i, rank in enumerate(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _bounded_pattern(pattern: str) -> str:
    r"""A pattern that splits as this one does, but without its limit of a million white-space characters in a row.

    In `\s+(?!\S)` tiktoken's regular expressions push a state for each character, and at a million of them give up, by
    a panic that ends the program. What it matches is white space up to the end of the text, or else all of it but the
    last character; the second half is written here in steps of a thousand.
    """
    return pattern.replace(r"|\s+(?!\S)|\s+", r"|\s++$|(?=\s\s)(?:\s{1000}(?=\s))*+(?:\s(?=\s))*+|\s")


@functools.cache
def _byte_chars() -> dict[int, str]:
    """byte -> the character that stands for it in tokenizer.json: itself where printable, else the next from 256 on."""
    printables = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printables]
    return {byte: chr(byte) for byte in printables} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@functools.cache
def _char_bytes() -> dict[str, int]:
    return {char: byte for byte, char in _byte_chars().items()}


def _to_byte_chars(token: bytes) -> str:
    """b' t' -> 'Ġt'."""
    return "".join(_byte_chars()[byte] for byte in token)


def _from_byte_chars(name: str) -> bytes:
    """'Ġt' -> b' t'; KeyError for a name that is not written in the characters of bytes."""
    return bytes(_char_bytes()[char] for char in name)


# ---------------------------------------------------------------------------------------------------------------------
# Details


def _num_threads() -> int:
    """This process's share of the host's processors, but not so many that their tables cost more than they save."""
    return max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _joined(rows: list[Any], first: int | None, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, offsets) of encode_batch_flat from the ids of each text."""
    before = [] if first is None else [first]
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(before) + len(row) for row in rows], out=offsets[1:])
    ids = np.empty(offsets[-1], dtype=np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    for row, start, end in zip(rows, offsets[:-1], offsets[1:], strict=True):
        ids[start : start + len(before)] = before
        ids[start + len(before) : end] = row
    return ids, offsets


def well_formed(text: str) -> str:
    """The text with surrogate pairs joined to the character that they mean and lone surrogates as U+FFFD."""
    try:
        text.encode("utf-8")  # quick, and nearly always all there is to do
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@contextlib.contextmanager
def _no_downloads() -> Iterator[None]:
    """Make tiktoken raise FileNotFoundError where it would fetch a file. tiktoken itself has no such setting."""
    read_file = tiktoken.load.read_file

    def read_local_file(path: str) -> bytes:
        if "://" in path:
            raise FileNotFoundError(f"{path} was not downloaded before")
        return read_file(path)

    tiktoken.load.read_file = read_local_file
    try:
        yield
    finally:
        tiktoken.load.read_file = read_file
