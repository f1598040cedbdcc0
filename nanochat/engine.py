"""Fast generation: a key/value cache, sampling, and batches of sequences that join and leave at any token.

    engine = Engine(model, tokenizer)
    for token_column, token_masks in engine.generate(prompt_tokens, num_samples=4, max_tokens=64):
        ...  # one token and one mask for each of the four samples
    completions = engine.complete([Request(tokens, max_tokens=64, temperature=0.0) for tokens in prompts], max_rows=32)

All of it is one GenerationBatch: each row of its cache is a sequence of its own length, with its own settings and its
own random numbers, so that what one sequence draws does not depend on who else is in the batch. A prompt is computed
up to its last token, once for all requests that have it in common; from then on every row is fed one token a step. Rows
that end leave at once, and their places are taken by the last ones. Positions are Python ints, so that the loop waits
for the device only to read the sampled tokens.

Tool use is a state machine on the tokens: what stands between <|python_start|> and <|python_end|> goes to the
calculator, and its result is forced upon the sequence between <|output_start|> and <|output_end|>. An expression that
the calculator refuses is left without a result.

What it does not do: open files, pick a dtype (callers run it under common.autocast), or know about conversations. The
slow reference that it is tested against is GPT.generate.
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanochat.execution import use_calculator

DECODE_ROOM = 256  # tokens that fit a new cache; it grows
PREFILL_TOKENS = {"cpu": 4096, "cuda": 65536}  # padded tokens of prompts that are computed at once
MIN_TEMPERATURE = 1e-6  # what is colder, but not 0, would overflow
MAX_UNIFORM = 1 - 2**-23  # a draw that float32 rounds to 1 would pick a token of probability 0


class KVCache:
    """Keys and values of all layers for the positions computed so far; rows may hold different numbers of them.

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
        self.lengths = [0] * batch_size  # positions stored, a row
        self.num_kv_heads, self.head_dim, self.num_layers = num_kv_heads, head_dim, num_layers
        self.num_rows = batch_size  # rows that there is room for
        self.seq_len = max(1, seq_len)  # positions that there is room for
        self.dtype, self.device = dtype, device
        self._store: torch.Tensor | None = None  # (L, 2, num_rows, K, seq_len, D); 0 are keys, 1 are values
        self._positions: torch.Tensor | None = None  # what positions() and mask() returned, until the lengths change
        self._mask: torch.Tensor | None = None

    @classmethod
    def for_model(cls, model: Any, batch_size: int, seq_len: int) -> "KVCache":
        """An empty cache of the shape that a GPT's attention wants."""
        c = model.config
        return cls(batch_size, c.n_kv_head, c.head_dim, c.n_layer, seq_len)

    @property
    def batch_size(self) -> int:
        """How many rows there are."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Positions stored in the longest row."""
        return max(self.lengths, default=0)

    @property
    def is_uniform(self) -> bool:
        """Whether all rows hold equally many positions."""
        return min(self.lengths, default=0) == self.longest

    @property
    def pos(self) -> int:
        """Positions stored, where all rows hold equally many."""
        assert self.is_uniform, f"rows of different lengths: {self.lengths}"
        return self.longest

    def positions(self, num_positions: int) -> torch.Tensor:
        """(B, T) int64: the positions of the next num_positions tokens of each row, on the cache's device."""
        if self._positions is None or self._positions.size(1) != num_positions:
            device = self.device if self._store is None else self._store.device
            starts = torch.tensor(self.lengths, dtype=torch.int64).to(device)
            self._positions = starts[:, None] + torch.arange(num_positions, device=device)
        return self._positions

    def mask(self, num_positions: int) -> torch.Tensor | None:
        """Which keys the next tokens see, (B, 1, T, longest + T) bool; None where all rows are equally long."""
        if self.is_uniform:
            return None
        if self._mask is None or self._mask.size(2) != num_positions:
            positions = self.positions(num_positions)
            keys = torch.arange(self.longest + num_positions, device=positions.device)
            self._mask = (keys <= positions[:, :, None])[:, None]
        return self._mask

    def insert(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, K, T, D) of a layer behind what each row holds.

        Returns views (B, K, longest + T, D) of all keys and values of the layer. They are valid until the next insert.
        """
        expected = (self.batch_size, self.num_kv_heads, k.size(2), self.head_dim)
        assert k.shape == v.shape == expected, f"k {tuple(k.shape)}, v {tuple(v.shape)} where {expected} is wanted"
        end = self.longest + k.size(2)
        self._reserve(end, k)
        keys, values = self._store[layer, :, : self.batch_size].unbind()
        if self.is_uniform:
            keys[:, :, self.longest : end] = k
            values[:, :, self.longest : end] = v
        else:
            rows, positions = torch.arange(self.batch_size, device=k.device)[:, None], self.positions(k.size(2))
            keys[rows, :, positions] = k.transpose(1, 2).to(keys.dtype)  # (B, T, K, D)
            values[rows, :, positions] = v.transpose(1, 2).to(values.dtype)
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, num_positions: int) -> None:
        """Count positions as stored in every row, once all layers have inserted them."""
        self.set_lengths([length + num_positions for length in self.lengths])

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Say how many positions each row holds: fewer than were stored where rows were padded on the right."""
        self.lengths, self._positions, self._mask = list(lengths), None, None

    def append(self, other: "KVCache", rows: Sequence[int]) -> None:
        """Add copies of another cache's rows, these ones, behind the rows of this cache."""
        first, longest = self.batch_size, max((other.lengths[row] for row in rows), default=0)
        self.set_lengths([*self.lengths, *(other.lengths[row] for row in rows)])
        if longest:
            self._reserve(longest, other._store)
            # one row for all needs no copies in between
            stored = other._store[:, :, rows if len(set(rows)) > 1 else rows[:1], :, :longest]
            self._store[:, :, first : self.batch_size, :, :longest] = stored

    def prefill(self, other: "KVCache", rows: Sequence[int] | None = None) -> None:
        """Begin this empty cache with copies of another's rows.

        rows: for each row of this cache the row of the other that it copies; None where the other has one row for all.
        """
        num_rows = other.batch_size if rows is None else len(rows)
        assert self.longest == 0 and num_rows in (1, self.batch_size), (
            f"{num_rows} rows into {self.batch_size} of {self.longest} positions"
        )
        rows = [0] * self.batch_size if rows is None and num_rows == 1 else rows or range(num_rows)
        self.set_lengths([])
        self.append(other, rows)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, which are numbered anew in the order given; rows that keep their number stay put."""
        moved = [(new, old) for new, old in enumerate(rows) if new != old]
        longest = max((self.lengths[old] for _, old in moved), default=0)
        if longest:
            new, old = map(list, zip(*moved, strict=True))
            self._store[:, :, new, :, :longest] = self._store[:, :, old, :, :longest]
        self.set_lengths([self.lengths[row] for row in rows])

    def _reserve(self, end: int, like: torch.Tensor) -> None:
        """Make room for all rows and `end` positions: allocate at first, then at least double, keeping the content."""
        if self._store is not None and end <= self.seq_len and self.batch_size <= self.num_rows:
            return
        if end > self.seq_len:
            self.seq_len = max(end, 2 * self.seq_len)
        if self.batch_size > self.num_rows:
            self.num_rows = max(self.batch_size, 2 * self.num_rows)
        old = self._store
        shape = (self.num_layers, 2, self.num_rows, self.num_kv_heads, self.seq_len, self.head_dim)
        # zeros, as positions that are masked are multiplied all the same, and must not be NaN
        self._store = torch.zeros(shape, dtype=self.dtype or like.dtype, device=self.device or like.device)
        if old is not None:
            self._store[:, :, : old.size(2), :, : old.size(4)] = old


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def sample_next_token(
    logits: torch.Tensor, rng: torch.Generator, temperature: float = 1.0, top_k: int | None = None
) -> torch.Tensor:
    """Draw one token a row from logits (B, V): ids (B, 1) int64.

    temperature 0 takes the likeliest token and leaves rng alone. top_k draws among the k likeliest; None or 0 is off,
    and more than V means all. Raises ValueError for negative settings.
    """
    check_sampling(temperature, top_k)
    uniforms = torch.rand(len(logits), generator=rng, device=logits.device) if temperature > 0 else None
    return pick_tokens(logits, uniforms, temperature, top_k)[:, None]


def check_sampling(temperature: float, top_k: int | None) -> None:
    """Raise ValueError for settings that mean nothing."""
    if not temperature >= 0 or (top_k is not None and top_k < 0):
        raise ValueError(f"temperature={temperature} and top_k={top_k} must not be negative")


def pick_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor | None, temperature: float, top_k: int | None
) -> torch.Tensor:
    """The token (B,) int64 of each row of logits (B, V) that a uniform number in [0, 1) picks; uniforms (B,).

    By inversion: the first token at which the cumulated probability exceeds the number. So a row's token depends on
    its own number alone. With temperature 0 uniforms may be None.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    ids = None
    if top_k and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k, dim=-1)  # (B, k)
    cumulated = (logits / max(temperature, MIN_TEMPERATURE)).softmax(dim=-1).cumsum(dim=-1)
    wanted = uniforms[:, None].clamp(max=MAX_UNIFORM) * cumulated[:, -1:]
    picked = torch.searchsorted(cumulated, wanted, right=True).clamp_(max=logits.size(-1) - 1)  # (B, 1)
    return (picked if ids is None else ids.gather(1, picked))[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@dataclass
class Request:
    """One sequence to generate: its prompt and how to continue it."""

    tokens: Sequence[int]  # the prompt, at least one token
    max_tokens: int | None = None  # None: no limit
    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int | None = None  # None or 0 is off
    seed: int | str | None = None  # None: different each time

    def check(self) -> None:
        """Raise ValueError for a request that cannot be met."""
        check_sampling(self.temperature, self.top_k)
        if not self.tokens:
            raise ValueError("a prompt of 0 tokens: at least one is wanted")


class Completion:
    """A sequence under way, or ended: what was generated so far."""

    def __init__(self, request: Request):
        self.request = request
        self.tokens: list[int] = []  # without the prompt
        self.masks: list[int] = []  # 1 where a token was sampled, 0 where it was forced
        self.finish_reason: str | None = None  # "stop" after a stop token, "length" after max_tokens
        # text as seed: random.Random(1) and random.Random(-1) are the same, random.Random("1") and ("-1") are not
        self._rng = random.Random(None if request.seed is None else str(request.seed))
        self._forced: deque[int] = deque()
        self._expression: list[int] | None = None  # tokens since <|python_start|>

    @property
    def last_token(self) -> int:
        """The token after which the next one comes."""
        return self.tokens[-1] if self.tokens else self.request.tokens[-1]


class GenerationBatch:
    """Sequences that are generated together, one token a step; they join and leave at any step.

        batch = GenerationBatch(model, tokenizer)
        batch.add([Request(tokens, max_tokens=64)])
        while len(batch):
            for completion, token, mask in batch.step(): ...

    Run it under common.autocast(device), as every forward pass of a model, and in one thread at a time. The model's
    training mode and torch's global random numbers are not touched.
    """

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.device = model.get_device()
        special = tokenizer.encode_special
        self.stop_tokens = {special("<|assistant_end|>"), tokenizer.get_bos_token_id()}
        self.python_start, self.python_end = special("<|python_start|>"), special("<|python_end|>")
        self.output_start, self.output_end = special("<|output_start|>"), special("<|output_end|>")
        self.completions: list[Completion] = []  # in the order of the cache's rows
        self.cache = KVCache.for_model(model, 0, DECODE_ROOM)

    def __len__(self) -> int:
        return len(self.completions)

    @torch.inference_mode()
    def add(self, requests: Sequence[Request]) -> list[Completion]:
        """Let sequences join: compute their prompts. Returns one Completion a request, in order.

        Raises ValueError for an empty prompt or negative settings; then none has joined.
        """
        for request in requests:
            request.check()
        completions = [Completion(request) for request in requests]
        joining = []
        for completion in completions:
            if completion.request.max_tokens is not None and completion.request.max_tokens < 1:
                completion.finish_reason = "length"
            else:
                joining.append(completion)
        if not len(self):  # nobody is using the room that a former crowd took
            self.cache = KVCache.for_model(self.model, 0, DECODE_ROOM)
        prefixes = [tuple(completion.request.tokens[:-1]) for completion in joining]
        distinct = list(dict.fromkeys(sorted(prefixes, key=len)))
        for group in _portions(distinct, PREFILL_TOKENS.get(self.device.type, 8192)):
            cache = self._prefill(group)
            members = [(c, group.index(p)) for c, p in zip(joining, prefixes, strict=True) if p in group]
            self.cache.append(cache, [row for _, row in members])
            self.completions += [completion for completion, _ in members]
        return completions

    def _prefill(self, prefixes: Sequence[Sequence[int]]) -> KVCache:
        """A cache with a row for each prefix, which may be empty. The padding on the right is seen by nobody."""
        longest = max(map(len, prefixes))
        cache = KVCache.for_model(self.model, len(prefixes), longest)
        if longest:
            idx = torch.zeros(len(prefixes), longest, dtype=torch.int64)
            for row, prefix in enumerate(prefixes):
                idx[row, : len(prefix)] = torch.tensor(prefix)
            self.model.hidden(idx.to(self.device), cache)
        cache.set_lengths(map(len, prefixes))
        return cache

    @torch.inference_mode()
    def step(self) -> list[tuple[Completion, int, int]]:
        """Generate one token more for every sequence: (completion, token, mask) of each.

        The mask is 1 where the token was sampled, 0 where it was forced. Sequences that end with it have left.
        """
        if not self.completions:
            return []
        idx = torch.tensor([[completion.last_token] for completion in self.completions]).to(self.device)
        logits = self.model.logits(self.model.hidden(idx, self.cache)[:, -1])  # (B, V)
        sampled = self._sample(logits)
        results = []
        for completion, token in zip(self.completions, sampled, strict=True):
            mask = 1
            if completion._forced:
                token, mask = completion._forced.popleft(), 0
            self._push(completion, token, mask)
            results.append((completion, token, mask))
        self.remove([completion for completion in self.completions if completion.finish_reason])
        return results

    def _sample(self, logits: torch.Tensor) -> list[int]:
        """A token for each row of logits (B, V); those of rows that have a token forced upon them mean nothing."""
        groups: dict[tuple[float, int | None], list[int]] = {}
        for row, completion in enumerate(self.completions):
            request = completion.request
            groups.setdefault((request.temperature, request.top_k), []).append(row)
        sampled = [0] * len(self.completions)
        for (temperature, top_k), rows in groups.items():
            uniforms = None
            if temperature > 0:
                draws = [0.0 if (c := self.completions[row])._forced else c._rng.random() for row in rows]
                uniforms = torch.tensor(draws, dtype=torch.float32).to(self.device)
            own = logits if len(groups) == 1 else logits[rows]
            for row, token in zip(rows, pick_tokens(own, uniforms, temperature, top_k).tolist(), strict=True):
                sampled[row] = token
        return sampled

    def _push(self, completion: Completion, token: int, mask: int) -> None:
        """Append a token to a sequence and do what it asks for."""
        completion.tokens.append(token)
        completion.masks.append(mask)
        if token in self.stop_tokens:
            completion.finish_reason = "stop"
        elif len(completion.tokens) == completion.request.max_tokens:
            completion.finish_reason = "length"
        elif token == self.python_start:
            completion._expression = []
        elif token == self.python_end and completion._expression is not None:
            result = use_calculator(self.tokenizer.decode(completion._expression))
            if result is not None:
                completion._forced.extend([self.output_start, *self.tokenizer.encode(result), self.output_end])
            completion._expression = None
        elif completion._expression is not None:
            completion._expression.append(token)

    @torch.inference_mode()
    def remove(self, completions: Iterable[Completion]) -> None:
        """Let sequences leave at once, whether they have ended or not; those that are not in the batch are ignored."""
        leaving = {id(completion) for completion in completions}
        stays = [id(completion) not in leaving for completion in self.completions]
        if all(stays):
            return
        num_rows = sum(stays)
        last = iter([row for row in range(num_rows, len(stays)) if stays[row]])
        rows = [row if stays[row] else next(last) for row in range(num_rows)]  # the last ones fill the gaps
        self.cache.keep_rows(rows)
        self.completions = [self.completions[row] for row in rows]


def _portions(prefixes: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[Sequence[int]]]:
    """Cut prefixes, sorted by length, into groups of at most max_tokens tokens when padded; at least one a group."""
    group: list[Sequence[int]] = []
    for prefix in prefixes:
        if group and (len(group) + 1) * len(prefix) > max_tokens:
            yield group
            group = []
        group.append(prefix)
    if group:
        yield group


# ---------------------------------------------------------------------------------------------------------------------
# The engine


class Engine:
    """Generates from a GPT, everything at once. Run it under common.autocast(device), as a GenerationBatch."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | str | None = None,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Stream samples that continue a prompt: yields (token_column, token_masks), a token and a mask a sample.

        A mask is 1 where the token was sampled, 0 where it was forced. A sample ends with <|assistant_end|> or
        <|bos|>; that token is yielded, and in later columns repeated with mask 0 to keep the sample's place. The stream
        ends when all samples have ended, or after max_tokens columns (None: no limit).

        With a seed two calls yield the same, without one they differ; sample i draws from the seed "{seed}/{i}".
        """
        if num_samples < 1:
            raise ValueError(f"{num_samples} samples: at least one is wanted")
        seeds = [None if seed is None else f"{seed}/{i}" for i in range(num_samples)]
        batch = GenerationBatch(self.model, self.tokenizer)
        completions = batch.add([Request(tokens, max_tokens, temperature, top_k, s) for s in seeds])
        while len(batch):
            news = {id(completion): mask for completion, _, mask in batch.step()}
            yield [c.tokens[-1] for c in completions], [news.get(id(c), 0) for c in completions]

    def generate_batch(
        self, tokens: Sequence[int], num_samples: int = 1, keep_stop: bool = False, **settings: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """The finished samples of generate: (sequences, masks), each of num_samples lists.

        Sequences begin with the prompt, whose mask is 0. keep_stop: whether the token that ended a sample stays in.
        settings are those of generate.
        """
        seed = settings.pop("seed", None)
        requests = [
            Request(tokens, seed=None if seed is None else f"{seed}/{i}", **settings) for i in range(num_samples)
        ]
        sequences, masks = [], []
        for completion in self.complete(requests, max_rows=num_samples):
            end = len(completion.tokens) - (completion.finish_reason == "stop" and not keep_stop)
            sequences.append([*tokens, *completion.tokens[:end]])
            masks.append([0] * len(tokens) + completion.masks[:end])
        return sequences, masks

    def complete(
        self,
        requests: Sequence[Request],
        max_rows: int,
        on_finish: Callable[[Completion], Any] | None = None,
    ) -> list[Completion]:
        """Continue all requests to their ends, at most max_rows at once; one Completion each, in order.

        Requests join as others leave, a few at a time, so that their prompts are computed together. on_finish is called
        with each completion that has ended.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: at least one row is wanted")
        batch = GenerationBatch(self.model, self.tokenizer)
        completions: list[Completion] = []
        while len(batch) or len(completions) < len(requests):
            free = max_rows - len(batch)
            if len(completions) < len(requests) and (free >= max(1, max_rows // 8) or not len(batch)):
                joined = batch.add(requests[len(completions) : len(completions) + free])
                completions += joined
                ended = [completion for completion in joined if completion.finish_reason]  # no tokens were wanted
            else:
                ended = [completion for completion, _, _ in batch.step() if completion.finish_reason]
            for completion in ended if on_finish else []:
                on_finish(completion)
        return completions
