"""Fast generation: a key/value cache, sampling, and an engine that streams many samples of one prompt.

    engine = Engine(model, tokenizer)
    for token_column, token_masks in engine.generate(prompt_tokens, num_samples=4, max_tokens=64):
        ...  # one token and one mask for each of the four samples

The prompt is computed once, in one row, and its cache is copied to all samples. Rows that are finished leave the
computation, while their places in the columns stay. All positions are Python ints, so that the loop waits for the
device only to read the sampled tokens.

What it does not do: open files, pick a dtype (callers run it under common.autocast), and batch different prompts. The
slow reference that it is tested against is GPT.generate.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

DECODE_ROOM = 256  # tokens that fit a new cache where no max_tokens says how many will come


class KVCache:
    """Keys and values of all layers for the positions computed so far, the same number of positions in every row.

    The model appends to it: insert in each layer, then advance once. Room for seq_len positions is allocated at the
    first insert, in the dtype and on the device of what is inserted unless they are given. A full cache doubles.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        num_layers: int,
        seq_len: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        self.pos = 0  # positions stored
        self.batch_size, self.num_layers = batch_size, num_layers
        self.num_kv_heads, self.head_dim = num_kv_heads, head_dim
        self.seq_len = max(1, seq_len)  # positions that there is room for
        self.dtype, self.device = dtype, device
        self._store: torch.Tensor | None = None  # (L, 2, B, K, seq_len, D); 0 are keys, 1 are values

    @classmethod
    def for_model(cls, model: Any, batch_size: int, seq_len: int) -> "KVCache":
        """An empty cache of the shape that a GPT's attention wants."""
        c = model.config
        return cls(batch_size, c.n_kv_head, c.head_dim, c.n_layer, seq_len)

    def insert(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, K, T, D) of a layer at positions pos to pos + T.

        Returns views (B, K, pos + T, D) of all keys and values of the layer. They are valid until the next insert.
        """
        expected = (self.batch_size, self.num_kv_heads, k.size(2), self.head_dim)
        assert k.shape == v.shape == expected, f"k {tuple(k.shape)}, v {tuple(v.shape)} where {expected} is wanted"
        end = self.pos + k.size(2)
        self._reserve(end, k)
        keys, values = self._store[layer]
        keys[:, :, self.pos : end] = k
        values[:, :, self.pos : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, num_positions: int) -> None:
        """Count positions as stored, once all layers have inserted them."""
        self.pos += num_positions

    def prefill(self, other: "KVCache", rows: Sequence[int] | None = None) -> None:
        """Begin this empty cache with copies of another's rows.

        rows: for each row of this cache the row of the other that it copies; None where the other has one row for all.
        """
        num_rows = other.batch_size if rows is None else len(rows)
        assert self.pos == 0 and num_rows in (1, self.batch_size), (
            f"{num_rows} rows at 0 into {self.batch_size} at {self.pos}"
        )
        self._reserve(other.pos, other._store)
        stored = other._store[:, :, :, :, : other.pos]
        self._store[:, :, :, :, : other.pos] = stored if rows is None else stored[:, :, rows]
        self.pos = other.pos

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, which are numbered anew in the order given."""
        self.batch_size = len(rows)
        if self._store is not None:
            self._store = self._store[:, :, rows]

    def _reserve(self, end: int, like: torch.Tensor) -> None:
        """Make room for `end` positions: allocate at first, then at least double, keeping the content."""
        if self._store is not None and end <= self.seq_len:
            return
        if end > self.seq_len:
            self.seq_len = max(end, 2 * self.seq_len)
        old = self._store
        shape = (self.num_layers, 2, self.batch_size, self.num_kv_heads, self.seq_len, self.head_dim)
        self._store = torch.empty(shape, dtype=self.dtype or like.dtype, device=self.device or like.device)
        if old is not None:
            self._store[:, :, :, :, : self.pos] = old[:, :, :, :, : self.pos]


def sample_next_token(
    logits: torch.Tensor, rng: torch.Generator, temperature: float = 1.0, top_k: int | None = None
) -> torch.Tensor:
    """Draw one token a row from logits (B, V): ids (B, 1) int64.

    temperature 0 takes the likeliest token and leaves rng alone. top_k draws among the k likeliest; None or 0 is off,
    and more than V means all. Raises ValueError for negative settings.
    """
    if temperature < 0 or (top_k is not None and top_k < 0):
        raise ValueError(f"temperature={temperature} and top_k={top_k} must not be negative")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if not top_k or top_k >= logits.size(-1):
        return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=rng)
    values, ids = logits.topk(top_k, dim=-1)  # (B, k)
    choice = torch.multinomial((values / temperature).softmax(dim=-1), 1, generator=rng)  # (B, 1), an index into ids
    return ids.gather(1, choice)


class Engine:
    """Generates from a GPT. Run it under common.autocast(device), as every forward pass of a model."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model = model
        self.stop_tokens = {tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()}

    @torch.inference_mode()
    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Stream samples that continue a prompt: yields (token_column, token_masks), a token and a mask a sample.

        A mask is 1 where the token was sampled, 0 where it was forced. A sample ends with <|assistant_end|> or
        <|bos|>; that token is yielded, and in later columns repeated with mask 0 to keep the sample's place. The stream
        ends when all samples have ended, or after max_tokens columns (None: no limit).

        With a seed two calls yield the same, without one they differ. The generator of random numbers is private:
        torch's global one is not touched, nor is the model's training mode, which no layer of it depends on.
        """
        if not tokens or num_samples < 1:
            raise ValueError(f"a prompt of {len(tokens)} tokens, {num_samples} samples: at least one of each is wanted")
        device = self.model.get_device()
        rng = torch.Generator(device=device)
        rng.seed() if seed is None else rng.manual_seed(seed)
        if max_tokens == 0:
            return

        prompt_cache = KVCache.for_model(self.model, 1, len(tokens))
        logits = self._last_logits([list(tokens)], prompt_cache).expand(num_samples, -1)  # (1, V) -> (num_samples, V)
        room = DECODE_ROOM if max_tokens is None else max_tokens
        cache = KVCache.for_model(self.model, num_samples, len(tokens) + room)
        cache.prefill(prompt_cache)
        del prompt_cache

        active = list(range(num_samples))  # the samples that are not finished, in the order of the cache's rows
        column = [0] * num_samples
        num_columns = 0
        while True:
            sampled = sample_next_token(logits, rng, temperature, top_k)[:, 0].tolist()
            masks = [0] * num_samples
            for sample, token in zip(active, sampled, strict=True):
                column[sample], masks[sample] = token, 1  # tool use will put forced tokens here, with mask 0
            yield list(column), masks
            num_columns += 1
            rows = [row for row, sample in enumerate(active) if column[sample] not in self.stop_tokens]
            if not rows or num_columns == max_tokens:
                return
            if len(rows) < len(active):
                cache.keep_rows(rows)
                active = [active[row] for row in rows]
            logits = self._last_logits([[column[sample]] for sample in active], cache)

    def generate_batch(
        self, tokens: Sequence[int], num_samples: int = 1, keep_stop: bool = False, **settings: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The finished samples of generate: (sequences, masks), each of num_samples lists.

        Sequences begin with the prompt, whose mask is 0. keep_stop: whether the token that ended a sample stays in.
        settings are those of generate.
        """
        sequences = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        is_finished = [False] * num_samples
        for token_column, token_masks in self.generate(tokens, num_samples, **settings):
            for sample, (token, mask) in enumerate(zip(token_column, token_masks, strict=True)):
                if is_finished[sample]:
                    continue
                is_finished[sample] = token in self.stop_tokens
                if keep_stop or not is_finished[sample]:
                    sequences[sample].append(token)
                    masks[sample].append(mask)
        return sequences, masks

    def _last_logits(self, ids: list[list[int]], cache: KVCache) -> torch.Tensor:
        """Feed ids (B, T) to the model, which continues the cache. Returns the logits (B, V) after the last of them."""
        idx = torch.tensor(ids, dtype=torch.int64, device=self.model.get_device())
        return self.model.logits(self.model.hidden(idx, cache)[:, -1])
