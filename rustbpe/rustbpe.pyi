"""Byte-pair encoding: exact training in parallel, encoding and decoding."""

from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

class Tokenizer:
    """A byte-pair encoding: train it on texts, then encode and decode. A new one has the 256 bytes as its tokens."""

    def __init__(self) -> None: ...
    @classmethod
    def from_ranks(
        cls,
        mergeable_ranks: dict[bytes, int],
        pattern: str | None = None,
        special_tokens: dict[str, int] | None = None,
    ) -> Tokenizer: ...
    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> Tokenizer: ...
    def train_from_iterator(
        self,
        iterator: Iterable[str],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        *,
        num_threads: int | None = None,
        progress: Callable[[str, int, int | None], object] | None = None,
    ) -> None: ...
    def get_pattern(self) -> str: ...
    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]: ...
    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_ordinary(self, text: str) -> list[int]: ...
    def batch_encode(self, texts: Sequence[str]) -> list[list[int]]: ...
    def encode_batch(
        self, texts: Sequence[str], bos: int | None = None, num_threads: int | None = None
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...
