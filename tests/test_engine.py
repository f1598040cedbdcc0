"""engine.py: the cache against recomputation, sampling at its edges, batches that change, tools, and GPT.generate."""

import itertools
import random

import pytest
import torch
from conftest import random_tokens, randomized_model, tiny_config

from nanochat.engine import Completion, Engine, GenerationBatch, KVCache, Request, pick_tokens, sample_next_token
from nanochat.gpt import GPT

PROMPT = [3, 141, 59, 26]


class SpecialTokens:
    """As much of a tokenizer as the engine needs: a token is a character, or special with an id that no model samples.

    Other ids can be given to the special tokens, so that a model does sample them.
    """

    def __init__(self, **ids: int):
        self.ids = {
            **{"bos": -1, "assistant_end": -2, "python_start": -3, "python_end": -4},
            **{"output_start": 200, "output_end": 201},
            **ids,
        }

    def encode_special(self, token: str) -> int:
        return self.ids[token.strip("<|>")]

    def get_bos_token_id(self) -> int:
        return self.ids["bos"]

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


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


def replay(model: GPT, seed: str, num_tokens: int, temperature: float, top_k: int | None = None) -> list[int]:
    """What a sequence with that seed draws when everything is recomputed for each token."""
    draws, tokens = random.Random(seed), list(PROMPT)
    with torch.inference_mode():
        for _ in range(num_tokens):
            logits = model(torch.tensor([tokens]))[:, -1]
            tokens.append(int(pick_tokens(logits, torch.tensor([draws.random()]), temperature, top_k)))
    return tokens[len(PROMPT) :]


def test_samples_are_what_their_own_seeds_draw_from_recomputed_logits() -> None:
    model = randomized_model()
    sequences, _ = make_engine(model).generate_batch(PROMPT, num_samples=2, max_tokens=20, temperature=1.5, seed=7)
    assert sequences == [PROMPT + replay(model, f"7/{i}", 20, 1.5) for i in range(2)]


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
    assert first_of not in columns[0] and first_of not in (columns[1][0], columns[1][2])
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
    assert batch_sizes[:4] == [1, 3, 3, 2]


def test_rows_that_stay_draw_what_they_would_have_drawn_alone() -> None:
    model, seed, stop, free_columns = stopping_case()
    engine = make_engine(model, bos=stop)
    sequences, _ = engine.generate_batch(PROMPT, num_samples=3, max_tokens=12, seed=seed, top_k=0)
    for sample in range(3):
        free = [column[sample] for column in free_columns]
        assert sequences[sample] == PROMPT + (free[: free.index(stop)] if stop in free else free)


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
    assert shapes == [(1, 3), (3, 1), (3, width), (3, 1), (3, width)]


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_rows_of_different_lengths_give_the_logits_of_each_alone() -> None:
    model = randomized_model()
    idx = random_tokens(model.config, 3, 12)
    lengths, tail = [3, 9, 0], 3
    cache = KVCache.for_model(model, 3, 4)
    with torch.inference_mode():
        model(idx[:, :9], kv_cache=cache)  # padded on the right where a row is shorter
        cache.set_lengths(lengths)
        part = torch.stack([idx[row, n : n + tail] for row, n in enumerate(lengths)])
        logits = model(part, kv_cache=cache)
        for row, n in enumerate(lengths):
            expected = model(idx[row : row + 1, : n + tail])[0, n:]
            torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)
    assert cache.lengths == [6, 12, 3] and not cache.is_uniform


def greedy(model: GPT, prompt: list[int], num_tokens: int) -> list[int]:
    return list(model.generate(prompt, max_tokens=num_tokens, temperature=0))


def test_sequences_that_join_and_leave_at_any_step_are_the_ones_of_the_naive_generate() -> None:
    model = randomized_model(tiny_config(n_embd=64), seed=1)
    batch = GenerationBatch(model, SpecialTokens())
    choose = random.Random(3)
    prompts = [random_tokens(model.config, 1, choose.randint(1, 20), seed)[0].tolist() for seed in range(12)]
    waiting = [Request(prompt, max_tokens=choose.randint(1, 30), temperature=0.0) for prompt in prompts]
    completions: list[Completion] = []
    while waiting or len(batch):
        if waiting and choose.random() < 0.4:
            completions += batch.add([waiting.pop() for _ in range(min(len(waiting), choose.randint(1, 3)))])
        if len(completions) == 7 and completions[0].finish_reason is None:
            batch.remove(completions[:1])
            completions[0].finish_reason = "cancelled"
        batch.step()
    assert len(completions) == 12
    for completion in completions:
        request = completion.request
        assert completion.finish_reason in ("length", "cancelled")
        assert completion.tokens == greedy(model, request.tokens, request.max_tokens)[: len(completion.tokens)]
        assert len(completion.tokens) == request.max_tokens or completion.finish_reason == "cancelled"


def test_what_a_sequence_draws_does_not_depend_on_the_others() -> None:
    model = randomized_model()
    engine = make_engine(model)
    request = Request(PROMPT, max_tokens=15, temperature=1.3, top_k=9, seed=4)
    others = [Request([seed], max_tokens=seed + 1, temperature=0.5 * seed, seed=seed) for seed in range(8)]
    alone = engine.complete([request], max_rows=1)[0]
    among = engine.complete([*others[:4], request, *others[4:]], max_rows=3)[4]
    assert alone.tokens == among.tokens == replay(model, "4", 15, 1.3, 9)


def test_complete_keeps_the_order_the_limit_and_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomized_model()
    sizes, finished = [], []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, cache: sizes.append(len(idx)) or hidden(idx, cache))
    requests = [Request([*PROMPT, i], max_tokens=i % 4, temperature=0.0) for i in range(10)]
    completions = make_engine(model).complete(requests, max_rows=3, on_finish=finished.append)
    assert [len(completion.tokens) for completion in completions] == [i % 4 for i in range(10)]
    assert [completion.request for completion in completions] == requests
    assert max(sizes) == 3 and {id(c) for c in finished} == {id(c) for c in completions} and len(finished) == 10


def test_equal_prompts_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomized_model()
    shapes = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, cache: shapes.append(tuple(idx.shape)) or hidden(idx, cache))
    GenerationBatch(model, SpecialTokens()).add([Request(PROMPT), Request([7, 8]), Request(PROMPT)])
    assert shapes == [(2, 3)]


def test_long_prompts_are_computed_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanochat.engine.PREFILL_TOKENS", {"cpu": 12})
    model = randomized_model(tiny_config(n_embd=64), seed=1)
    prompts = [random_tokens(model.config, 1, length, length)[0].tolist() for length in (9, 2, 30, 5, 1)]
    completions = make_engine(model).complete([Request(p, max_tokens=5, temperature=0.0) for p in prompts], 5)
    assert [c.tokens for c in completions] == [greedy(model, prompt, 5) for prompt in prompts]


def test_a_bad_request_keeps_all_of_its_company_out() -> None:
    batch = GenerationBatch(randomized_model(), SpecialTokens())
    for bad in (Request([]), Request(PROMPT, temperature=-1.0), Request(PROMPT, top_k=-1)):
        with pytest.raises(ValueError):
            batch.add([Request(PROMPT), bad])
    assert len(batch) == 0


def test_seeds_of_either_sign_differ() -> None:
    draws = {seed: Completion(Request(PROMPT, seed=seed))._rng.random() for seed in (1, -1, "1/0", "1/1")}
    assert len(set(draws.values())) == 4
    assert Completion(Request(PROMPT))._rng.random() != Completion(Request(PROMPT))._rng.random()


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0])
def test_a_very_low_temperature_is_greedy_and_the_edges_of_the_draw_are_tokens(uniform: float) -> None:
    logits = torch.randn(4, 50)
    picked = pick_tokens(logits, torch.full((4,), uniform), 1e-30, None)
    assert torch.equal(picked, logits.argmax(-1))
    assert pick_tokens(logits, torch.full((4,), uniform), 1.0, None).max() < 50


# ---------------------------------------------------------------------------------------------------------------------
# Tools


class ScriptedModel:
    """Says what it is told to: its logits make each token of a script the likeliest, whatever was forced in between."""

    def __init__(self, scripts: dict[int, list[int]]):
        self.config = tiny_config()
        self.scripts = {prompt: iter(script) for prompt, script in scripts.items()}
        self.prompts: list[int] = []  # of the rows, by their first token
        self.fed: list[list[int]] = []

    def get_device(self) -> torch.device:
        return torch.device("cpu")

    def hidden(self, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        self.fed.append(idx[:, -1].tolist())
        cache.advance(idx.size(1))
        return torch.zeros(len(idx), 1, 1)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(x), 300)
        for row, script in enumerate(self.scripts.values()):
            logits[row, next(script)] = 1.0
        return logits


START, END, OUT, OUT_END, STOP, WASTED = 202, 203, 200, 201, 204, 66


def say(expression: str, result: str | None) -> list[tuple[int, int]]:
    """(token, mask) of a reply that calls the tool."""
    forced = [] if result is None else [OUT, *map(ord, result), OUT_END]
    sampled = [65, START, *map(ord, expression), END]
    return [*((t, 1) for t in sampled), *((t, 0) for t in forced), (67, 1), (STOP, 1)]


@pytest.mark.parametrize(
    ("expression", "result"),
    [("12+7", "19"), ("10/4*4", "10"), ("'strawberry'.count('r')", "3"), ("2**9", None), ("x", None), ("", None)],
)
def test_the_calculator_is_called_and_its_result_forced(expression: str, result: str | None) -> None:
    expected = say(expression, result)
    script = [token if mask else WASTED for token, mask in expected]  # what is sampled while a token is forced is lost
    tokenizer = SpecialTokens(python_start=START, python_end=END, assistant_end=STOP)
    model = ScriptedModel({1: script})
    completion = Engine(model, tokenizer).complete([Request([1], temperature=0.0)], 1)[0]
    assert list(zip(completion.tokens, completion.masks, strict=True)) == expected
    assert completion.finish_reason == "stop"
    assert [fed[0] for fed in model.fed] == [1, *completion.tokens[:-1]]  # forced tokens are read by the model, too


def test_a_call_without_an_end_and_an_end_without_a_call_force_nothing() -> None:
    tokenizer = SpecialTokens(python_start=START, python_end=END, assistant_end=STOP)
    for script in ([START, 49, STOP], [END, 49, STOP], [START, 49, START, 50, END, OUT, 50, OUT_END, STOP]):
        model = ScriptedModel({1: [*script, STOP]})
        completion = Engine(model, tokenizer).complete([Request([1], temperature=0.0)], 1)[0]
        assert completion.tokens[: len(script)] == script or sum(completion.masks) < len(completion.masks)
        if script[-4:] != [OUT, 50, OUT_END, STOP]:
            assert completion.tokens == script and all(completion.masks)


def test_what_is_forced_counts_as_tokens_of_the_reply() -> None:
    expected = say("12+7", "19")
    tokenizer = SpecialTokens(python_start=START, python_end=END, assistant_end=STOP)
    model = ScriptedModel({1: [token if mask else WASTED for token, mask in expected]})
    completion = Engine(model, tokenizer).complete([Request([1], max_tokens=8, temperature=0.0)], 1)[0]
    assert completion.tokens == [token for token, _ in expected[:8]] and completion.finish_reason == "length"
