"""Shared by the tests: a clean environment for each test, a tiny model, a byte tokenizer and parquet shards."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import download
from nanochat.gpt import GPT, GPTConfig

torch.set_num_threads(1)  # the tensors here are tiny: several threads cost more than they save

PROCESS_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a base directory of its own and is one process, whatever it was started from."""
    for name in PROCESS_VARIABLES + ("NANOCHAT_TRACEBACK",):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(path))
    return path


@pytest.fixture(autouse=True)
def quick_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads come from servers of the tests alone, and failed attempts are repeated at once."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.005)


def tiny_config(**changes: int) -> GPTConfig:
    """Two layers, more query than key heads, and a vocabulary that is no multiple of 64."""
    sizes = {"sequence_len": 32, "vocab_size": 257, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
    return GPTConfig(**{**sizes, **changes})


def build(config: GPTConfig) -> GPT:
    """A model as the scripts build it: on the meta device first, then with freshly initialised weights."""
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    model.init_weights()
    return model


def randomized_model(config: GPTConfig | None = None, seed: int = 0) -> GPT:
    """A model in which no weight is zero, and whose logits are large enough to bend the softcap."""
    model = build(config or tiny_config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
        model.lm_head.weight.mul_(12.0)
    return model


def random_tokens(config: GPTConfig, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Token ids (batch, length) from the model's vocabulary."""
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


class ByteTokenizer:
    """Stands in for a trained tokenizer: a token is a byte of UTF-8, and 256 is <|bos|>."""

    def __init__(self, name: str = "bytes"):
        self.hash = hashlib.sha256(name.encode("utf-8")).hexdigest()[:16]

    def get_bos_token_id(self) -> int:
        return 256

    def get_vocab_size(self) -> int:
        return 257

    def encode_batch_flat(self, texts: Sequence[str], prepend: int) -> tuple[np.ndarray, np.ndarray]:
        rows = [[prepend, *text.encode("utf-8")] for text in texts]
        offsets = np.cumsum([0] + [len(row) for row in rows], dtype=np.int64)
        return np.array([token for row in rows for token in row], dtype=np.uint16), offsets


def write_shards(base_dir: Path, shards: Sequence[Sequence[str]], row_group_size: int = 2) -> list[Path]:
    """Parquet shards in base_data/, one a list of documents; the last of them is the validation set."""
    folder = base_dir / "base_data"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"shard_{index:05d}.parquet" for index in range(len(shards))]
    for path, texts in zip(paths, shards, strict=True):
        table = pa.table({"text": pa.array(list(texts), type=pa.string())})
        pq.write_table(table, path, row_group_size=row_group_size)
    return paths
