"""engine.py: the cache against recomputation, sampling at its edges, and the stream against GPT.generate."""

import itertools

import pytest
import torch
from conftest import random_tokens, randomized_model, tiny_config

from nanochat.engine import Engine, KVCache, sample_next_token
from nanochat.gpt import GPT

PROMPT = [3, 141, 59, 26]


class SpecialTokens:
    """As much of a tokenizer as the engine needs."""

    def __init__(self, assistant_end: int = -1, bos: int = -2):  # ids that a model never samples, unless given
        self.assistant_end, self.bos = assistant_end, bos

    def encode_special(self, token: str) -> int:
        return {"<|assistant_end|>": self.assistant_end}[token]

    def get_bos_token_id(self) -> int:
        return self.bos


def make_engine(model: GPT | None = None, **specials: int) -> Engine:
    return Engine(model or randomized_model(), SpecialTokens(**specials))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# KVCache


@pytest.mark.parametrize("parts", [[1] * 12, [5, 1, 6], [12], [3, 9]])
def test_cached_logits_equal_uncached_ones_while_the_cache_grows(parts: list[int]) -> None:
    model = randomized_model()
    idx = random_tokens(model.config, 3, 12)
    cache = KVCache.for_model(model, 3, 2)
    with torch.inference_mode():
        expected = model(idx)
        logits = torch.cat([model(part, kv_cache=cache) for part in idx.split(parts, dim=1)], dim=1)
    assert cache.pos == 12 and cache.seq_len >= 12
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_growing_doubles_and_keeps_content_of_all_layers() -> None:
    cache = KVCache(batch_size=2, num_kv_heads=1, head_dim=4, num_layers=2, seq_len=3)
    k, v = torch.randn(2, 2, 2, 1, 4, 4).unbind()  # each (layer, B, K, T, D)
    for layer in range(2):
        cache.insert(layer, k[layer, :, :, :3], v[layer, :, :, :3])
    cache.advance(3)
    for layer in range(2):
        keys, values = cache.insert(layer, k[layer, :, :, 3:], v[layer, :, :, 3:])
        assert torch.equal(keys, k[layer]) and torch.equal(values, v[layer])
    assert cache.seq_len == 6


def test_cache_takes_dtype_of_what_is_inserted_or_the_one_given() -> None:
    part = torch.randn(1, 1, 2, 4)
    assert KVCache(1, 1, 4, 1, 8).insert(0, part.double(), part.double())[0].dtype == torch.float64
    assert KVCache(1, 1, 4, 1, 8, dtype=torch.float16).insert(0, part, part)[0].dtype == torch.float16


def test_cache_refuses_another_shape() -> None:
    cache = KVCache(batch_size=2, num_kv_heads=1, head_dim=4, num_layers=1, seq_len=3)
    with pytest.raises(AssertionError, match="is wanted"):
        cache.insert(0, torch.zeros(3, 1, 1, 4), torch.zeros(3, 1, 1, 4))


def test_prefill_shares_one_row_or_copies_the_rows_named() -> None:
    model = randomized_model()
    prompts, tails = random_tokens(model.config, 2, 6), random_tokens(model.config, 3, 4, seed=2)
    with torch.inference_mode():
        for rows, owners in [([0, 1, 1], [0, 1, 1]), (None, [0, 0, 0])]:
            first = KVCache.for_model(model, 1 if rows is None else 2, 6)
            model(prompts[: first.batch_size], kv_cache=first)
            cache = KVCache.for_model(model, 3, 4)
            cache.prefill(first, rows)
            whole = torch.cat((prompts[owners], tails), dim=1)
            torch.testing.assert_close(model(tails, kv_cache=cache), model(whole)[:, 6:], atol=1e-4, rtol=1e-4)


def test_kept_rows_continue_their_own_sequences() -> None:
    model = randomized_model()
    idx = random_tokens(model.config, 4, 8)
    cache = KVCache.for_model(model, 4, 8)
    with torch.inference_mode():
        model(idx[:, :5], kv_cache=cache)
        cache.keep_rows([1, 3])
        logits = model(idx[[1, 3], 5:], kv_cache=cache)
        torch.testing.assert_close(logits, model(idx)[[1, 3], 5:], atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# sample_next_token


def test_temperature_zero_is_argmax() -> None:
    logits = torch.randn(5, 11)
    assert torch.equal(sample_next_token(logits, rng(), temperature=0, top_k=3), logits.argmax(-1, keepdim=True))


def test_top_k_one_is_argmax() -> None:
    logits = torch.randn(5, 11)
    assert torch.equal(sample_next_token(logits, rng(), 1.0, top_k=1), logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize("top_k", [None, 0, 4, 99])
def test_top_k_off_or_too_large_means_all(top_k: int | None) -> None:
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(400, -1)
    ids = sample_next_token(logits, rng(), 1.0, top_k)
    assert ids.shape == (400, 1) and ids.dtype == torch.int64 and ids.unique().tolist() == [0, 1, 2, 3]


def test_top_k_draws_among_the_likeliest_in_proportion() -> None:
    probabilities = torch.tensor([0.1, 0.5, 0.25, 0.15])
    ids = sample_next_token(probabilities.log().expand(20_000, -1), rng(), 1.0, top_k=2)
    shares = ids.flatten().bincount(minlength=4) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0, 2 / 3, 1 / 3, 0]), atol=0.02, rtol=0)


def test_temperature_sharpens() -> None:
    logits = torch.tensor([0.3, 0.7]).log().expand(20_000, -1)
    share = sample_next_token(logits, rng(), temperature=0.5).float().mean().item()
    assert share == pytest.approx(0.49 / (0.49 + 0.09), abs=0.02)


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"top_k": -1}])
def test_negative_settings_are_errors(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        sample_next_token(torch.zeros(1, 3), rng(), **settings)


# ---------------------------------------------------------------------------------------------------------------------
# Engine


def test_greedy_stream_equals_the_naive_generate_beyond_the_rotary_table() -> None:
    model = randomized_model(tiny_config(sequence_len=2, n_embd=64), seed=1)  # the table begins with 20 positions
    expected = list(model.generate(PROMPT, max_tokens=40, temperature=0))
    assert len(set(expected)) > 20  # no loop that hides what comes from the cache
    stream = list(make_engine(model).generate(PROMPT, num_samples=2, max_tokens=40, temperature=0))
    assert [column for column, _ in stream] == [[token, token] for token in expected]
    assert all(masks == [1, 1] for _, masks in stream)


def test_without_max_tokens_the_stream_goes_on_and_the_cache_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.engine.DECODE_ROOM", 3)
    model = randomized_model(tiny_config(n_embd=64), seed=1)
    expected = list(model.generate(PROMPT, max_tokens=30, temperature=0))
    stream = make_engine(model).generate(PROMPT, temperature=0)
    assert [column[0] for column, _ in itertools.islice(stream, 30)] == expected


def test_one_sample_draws_as_the_naive_generate_does() -> None:
    model = randomized_model()
    expected = list(model.generate(PROMPT, max_tokens=20, temperature=1.5, seed=7))
    sequences, _ = make_engine(model).generate_batch(PROMPT, max_tokens=20, temperature=1.5, seed=7)
    assert sequences == [PROMPT + expected]


def test_samples_differ_in_their_first_token() -> None:
    column, _ = next(make_engine().generate(PROMPT, num_samples=16, temperature=2.0, seed=0))
    assert len(set(column)) > 1


def test_seeds_repeat_and_their_absence_differs() -> None:
    engine = make_engine()

    def sample(seed: int | None) -> list[list[int]]:
        return engine.generate_batch(PROMPT, num_samples=4, max_tokens=20, temperature=2.0, seed=seed)[0]

    assert sample(1) == sample(1) != sample(2)
    assert sample(None) != sample(None)


def test_global_rng_and_training_mode_are_untouched() -> None:
    model = randomized_model()
    model.train()
    state = torch.get_rng_state()
    for _ in make_engine(model).generate(PROMPT, num_samples=2, max_tokens=5):
        assert model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), state) and model.training


def stopping_case() -> tuple[GPT, int, int, list[list[int]]]:
    """A model, a seed, a token that samples draw at different times, and the samples without that as a stop token."""
    model = randomized_model()
    columns = [column for column, _ in make_engine(model).generate(PROMPT, num_samples=3, max_tokens=12, seed=5)]
    first_of = columns[1][1]  # the second sample's second token
    return model, 5, first_of, columns


@pytest.mark.parametrize("special", ["assistant_end", "bos"])
def test_finished_samples_leave_the_batch_and_keep_their_place(special: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seed, stop, free_columns = stopping_case()
    engine = make_engine(model, **{special: stop})
    batch_sizes = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, cache: batch_sizes.append(len(idx)) or hidden(idx, cache))
    stream = list(engine.generate(PROMPT, num_samples=3, max_tokens=12, seed=seed))
    columns, masks = zip(*stream, strict=True)
    assert list(columns[:2]) == free_columns[:2] and masks[1] == [1, 1, 1]
    assert all(column[1] == stop for column in columns[1:]) and all(mask[1] == 0 for mask in masks[2:])
    assert batch_sizes[:3] == [1, 3, 2]


def test_rows_that_stay_are_computed_from_their_own_past() -> None:
    model, seed, stop, _ = stopping_case()
    engine = make_engine(model, bos=stop)
    sequences, _ = engine.generate_batch(PROMPT, num_samples=3, max_tokens=12, seed=seed, top_k=0)
    # replay with recomputed logits: the same draws for the rows that are left
    generator, rows = rng(seed), [list(PROMPT) for _ in range(3)]
    active = [0, 1, 2]
    with torch.inference_mode():
        for _ in range(12):
            logits = torch.cat([model(torch.tensor([rows[i]]))[:, -1] for i in active])
            for i, token in zip(active, sample_next_token(logits, generator)[:, 0].tolist(), strict=True):
                rows[i].append(token)
            active = [i for i in active if rows[i][-1] != stop]
    assert sequences == [row[:-1] if row[-1] == stop else row for row in rows]


def test_stream_ends_when_all_samples_have() -> None:
    model = randomized_model()
    first, second = list(model.generate(PROMPT, max_tokens=2, temperature=0))
    stream = list(make_engine(model, assistant_end=second).generate(PROMPT, num_samples=2, temperature=0))
    assert stream == [([first, first], [1, 1]), ([second, second], [1, 1])]


def test_generate_batch_drops_the_stop_token_unless_told() -> None:
    model = randomized_model()
    first, second = list(model.generate(PROMPT, max_tokens=2, temperature=0))
    engine = make_engine(model, assistant_end=second)
    assert engine.generate_batch(PROMPT, temperature=0) == ([[*PROMPT, first]], [[0, 0, 0, 0, 1]])
    kept = engine.generate_batch(PROMPT, temperature=0, keep_stop=True)
    assert kept == ([[*PROMPT, first, second]], [[0, 0, 0, 0, 1, 1]])


def test_no_tokens_wanted_and_no_prompt() -> None:
    engine = make_engine()
    assert list(engine.generate(PROMPT, max_tokens=0)) == []
    with pytest.raises(ValueError, match="a prompt of 0 tokens"):
        next(engine.generate([]))
    with pytest.raises(ValueError, match="0 samples"):
        next(engine.generate(PROMPT, num_samples=0))


def test_prefill_computes_the_prompt_once_and_the_last_logits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomized_model()
    shapes = []
    hidden, logits = model.hidden, model.logits
    monkeypatch.setattr(model, "hidden", lambda idx, cache: shapes.append(tuple(idx.shape)) or hidden(idx, cache))
    monkeypatch.setattr(model, "logits", lambda x: shapes.append(tuple(x.shape)) or logits(x))
    list(make_engine(model).generate(PROMPT, num_samples=3, max_tokens=2))
    width = model.config.n_embd
    assert shapes == [(1, 4), (1, width), (3, 1), (3, width)]
