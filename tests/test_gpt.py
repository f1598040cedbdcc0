"""The model: its size, its logits against a naive implementation and transformers' NanoChat, losses, initialisation."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import build, random_tokens, randomized_model, tiny_config

from nanochat.common import UserError
from nanochat.gpt import (
    GPT,
    GPTConfig,
    _RMSNorm,
    _SquaredReLU,
    apply_rotary,
    causal_attention,
    config_from_depth,
    norm,
    num_heads,
)

# ---------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("depth", range(1, 33))
def test_every_depth_builds(depth):
    config = config_from_depth(depth, vocab_size=65_536, sequence_len=2048)
    with torch.device("meta"):
        model = GPT(config)
    assert (len(model.transformer.h), config.n_embd, config.n_kv_head) == (depth, 64 * depth, config.n_head)
    assert config.n_embd % config.n_head == 0 and config.head_dim % 2 == 0


def test_depth_20_has_the_published_size_and_cost():
    with torch.device("meta"):
        model = GPT(config_from_depth(20, vocab_size=65_536, sequence_len=2048))
    assert (model.config.n_head, model.config.head_dim) == (10, 128)
    assert model.num_params() == 560_988_160
    assert f"{model.estimate_flops():.2e}" == "3.49e+09"


@pytest.mark.parametrize(
    ("depth", "n_head"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 4), (7, 4), (9, 6), (11, 8), (13, 8), (19, 8), (20, 10)]
)
def test_the_nearest_legal_head_count_is_taken_and_of_two_the_larger(depth, n_head):
    """5 x 64 = 320 wants three heads of 128, which do not fit: 2 and 4 are equally near. 704 wants six: 4 and 8."""
    assert num_heads(64 * depth, 128) == n_head


def test_a_width_without_legal_heads_is_a_user_error():
    with pytest.raises(UserError, match="33"):
        num_heads(33, 128)


@pytest.mark.parametrize("wrong", [{"depth": 0}, {"aspect_ratio": 0}, {"head_dim": -1}])
def test_a_size_below_one_is_a_user_error_that_names_the_setting(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}="):
        config_from_depth(**{"depth": 2, "vocab_size": 257, "sequence_len": 32, **wrong})


@pytest.mark.parametrize("sizes", [{"n_embd": 30, "n_head": 4}, {"n_embd": 12, "n_head": 4}, {"n_kv_head": 3}])
def test_impossible_head_counts_are_refused(sizes):
    with pytest.raises(ValueError, match="n_head"):
        tiny_config(**sizes)


def test_parameter_names_are_the_published_ones_and_there_are_no_others():
    config = tiny_config()
    block = ["attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    names = [f"transformer.h.{i}.{part}.weight" for i in range(config.n_layer) for part in block]
    expected = {"transformer.wte.weight", "lm_head.weight", *names}
    model = build(config)
    assert {name for name, _ in model.named_parameters()} == expected  # so: no bias, no norm has weights
    assert set(model.state_dict()) == expected  # so: the rotary tables are not saved
    assert model.lm_head.weight is not model.transformer.wte.weight


# ---------------------------------------------------------------------------------------------------------------------
# Logits


def naive_logits(model: GPT, ids: list[int]) -> torch.Tensor:
    """Logits (T, V) of one row, position by position and head by head, as the definition of the model has it."""
    c = model.config
    weights = {name: p.detach().double() for name, p in model.named_parameters()}

    def rms_norm(x):
        return x / (x.square().mean(dim=-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotate(x, position):
        half = c.head_dim // 2
        angles = position * 10_000.0 ** -(torch.arange(half, dtype=torch.float64) * 2 / c.head_dim)
        turned = x.clone()
        turned[:half] = x[:half] * angles.cos() + x[half:] * angles.sin()
        turned[half:] = -x[:half] * angles.sin() + x[half:] * angles.cos()
        return turned

    def attend(x, prefix):
        q, k, v = ((x @ weights[f"{prefix}.{name}.weight"].T) for name in ("c_q", "c_k", "c_v"))
        rows = []
        for t in range(len(x)):
            heads = []
            for h in range(c.n_head):
                kv = slice(h * c.n_kv_head // c.n_head * c.head_dim, (h * c.n_kv_head // c.n_head + 1) * c.head_dim)
                query = rms_norm(rotate(q[t, h * c.head_dim : (h + 1) * c.head_dim], t))
                keys = torch.stack([rms_norm(rotate(k[s, kv], s)) for s in range(t + 1)])
                scores = keys @ query / math.sqrt(c.head_dim)
                heads.append(scores.softmax(dim=0) @ v[: t + 1, kv])
            rows.append(torch.cat(heads))
        return torch.stack(rows) @ weights[f"{prefix}.c_proj.weight"].T

    x = rms_norm(weights["transformer.wte.weight"][ids])
    for i in range(c.n_layer):
        x = x + attend(rms_norm(x), f"transformer.h.{i}.attn")
        hidden = (rms_norm(x) @ weights[f"transformer.h.{i}.mlp.c_fc.weight"].T).clamp(min=0).square()
        x = x + hidden @ weights[f"transformer.h.{i}.mlp.c_proj.weight"].T
    logits = rms_norm(x) @ weights["lm_head.weight"].T
    return 15 * torch.tanh(logits / 15)[:, : c.vocab_size]


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (4, 4)], ids=["grouped", "one kv head", "all heads"])
def test_logits_equal_the_naive_model(heads):
    model = randomized_model(tiny_config(n_head=heads[0], n_kv_head=heads[1]))
    ids = random_tokens(model.config, 2, 9)
    logits = model(ids)
    assert logits.abs().max() > 13  # the softcap bends them
    for row in range(2):
        torch.testing.assert_close(logits[row].double(), naive_logits(model, ids[row].tolist()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("n_kv_head", [2, 4])
def test_logits_equal_those_of_transformers(n_kv_head):
    transformers = pytest.importorskip("transformers")
    model = randomized_model(tiny_config(n_kv_head=n_kv_head))
    c = model.config
    theirs = transformers.NanoChatForCausalLM(
        transformers.NanoChatConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.n_embd,
            intermediate_size=4 * c.n_embd,
            num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head,
            num_key_value_heads=c.n_kv_head,
            rms_norm_eps=torch.finfo(torch.float32).eps,
        )
    )
    names = {
        "wte": "model.embed_tokens",
        "c_q": "self_attn.q_proj",
        "c_k": "self_attn.k_proj",
        "c_v": "self_attn.v_proj",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    state = {"lm_head.weight": model.lm_head.weight[: c.vocab_size]}
    state["model.embed_tokens.weight"] = model.transformer.wte.weight[: c.vocab_size]
    for i, block in enumerate(model.transformer.h):
        for name, p in block.named_parameters():
            short = name.removesuffix(".weight")
            state[f"model.layers.{i}.{names.get(short) or names[short.split('.')[1]]}.weight"] = p
    theirs.load_state_dict(state)  # strict: all of theirs are ours, and the other way round
    ids = random_tokens(c, 2, 20)
    with torch.no_grad():
        logits = model(ids)
        assert logits.abs().max() > 13
        torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=0)


def test_padded_vocabulary_is_not_in_the_logits():
    model = randomized_model()
    assert model.lm_head.weight.shape[0] == model.transformer.wte.weight.shape[0] == 320
    assert model(random_tokens(model.config, 1, 5)).shape == (1, 5, 257)


def test_no_position_sees_a_later_token():
    model = randomized_model()
    ids = random_tokens(model.config, 1, 12)
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % 257
    before, after = model(ids)[0], model(changed)[0]
    torch.testing.assert_close(before[:7], after[:7], atol=0, rtol=0)
    assert not torch.allclose(before[7], after[7])


def test_a_bf16_model_gives_float32_logits_with_the_tanh_in_float32():
    model = randomized_model().bfloat16()
    ids = random_tokens(model.config, 2, 8)
    with torch.no_grad():
        logits = model(ids)
        uncapped = F.linear(model.hidden(ids), model.lm_head.weight[:257])
    assert logits.dtype == torch.float32 and uncapped.dtype == torch.bfloat16
    torch.testing.assert_close(logits, 15 * torch.tanh(uncapped.float() / 15), atol=1e-5, rtol=0)


def test_logits_are_the_same_with_and_without_grad():
    model = randomized_model()
    ids = random_tokens(model.config, 1, 6)
    with torch.no_grad():
        without = model(ids)
    torch.testing.assert_close(model(ids).detach(), without, atol=1e-5, rtol=0)


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    model = build(tiny_config())
    D = model.config.head_dim
    q, k = torch.randn(1, 1, 1, D), torch.randn(1, 1, 1, D)

    def at(position):
        return model.cos[:, position : position + 1], model.sin[:, position : position + 1]

    def product(i, j):
        return (apply_rotary(q, *at(i)) * apply_rotary(k, *at(j))).sum()

    torch.testing.assert_close(apply_rotary(q, *at(9)).norm(), q.norm())
    torch.testing.assert_close(product(3, 1), product(40, 38), atol=1e-4, rtol=0)
    assert not torch.isclose(product(3, 1), product(3, 2))


@pytest.mark.parametrize(("T", "S"), [(5, 5), (1, 5), (3, 5)])
def test_queries_are_the_last_positions_of_the_keys(T, S):
    q, k, v = torch.randn(2, 4, T, 8), torch.randn(2, 2, S, 8), torch.randn(2, 2, S, 8)
    keys, values = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = q @ keys.mT / 8**0.5
    scores = scores.masked_fill(torch.arange(S) > torch.arange(S - T, S)[:, None], -torch.inf)
    torch.testing.assert_close(causal_attention(q, k, v), scores.softmax(-1) @ values)


@pytest.mark.parametrize(
    ("function", "definition"),
    [
        (_RMSNorm, lambda x: x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()),
        (_SquaredReLU, lambda x: x.clamp(min=0) ** 2),
    ],
)
def test_gradients_written_by_hand_are_those_of_the_definition(function, definition):
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(function.apply(x), definition(x))
    assert torch.autograd.gradcheck(function.apply, x)


def test_the_norm_of_a_cpu_is_that_of_torch():
    """To the last bit: what is sampled, without gradients, sees what was trained."""
    torch.manual_seed(0)
    for x in (torch.randn(7, 3, 64), torch.randn(7, 128) * 1e-3):
        assert torch.equal(norm(x), torch.nn.functional.rms_norm(x, (x.size(-1),)))


# ---------------------------------------------------------------------------------------------------------------------
# Rotary tables


def test_rotary_tables_cover_ten_contexts_and_grow_beyond():
    model = randomized_model(tiny_config(sequence_len=4))
    assert model.cos.shape == (1, 40, 1, model.config.head_dim)
    ids = random_tokens(model.config, 1, 50)
    logits = model(ids)
    assert model.cos.size(1) >= 50
    reference = randomized_model(tiny_config(sequence_len=50))
    torch.testing.assert_close(logits, reference(ids))


def test_rotary_tables_that_grew_in_inference_mode_serve_training():
    model = randomized_model(tiny_config(sequence_len=4))
    with torch.inference_mode():
        model(random_tokens(model.config, 1, 50))
    ids = random_tokens(model.config, 1, 60)
    model(ids[:, :-1], ids[:, 1:]).backward()
    assert model.transformer.wte.weight.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def test_loss_reductions_equal_cross_entropy_of_the_logits():
    model = randomized_model()
    ids = random_tokens(model.config, 3, 11)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, 4:] = -1
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    each = model(inputs, targets, loss_reduction="none")
    assert each.shape == (30,) and each[4:10].abs().max() == 0
    torch.testing.assert_close(each, expected)
    torch.testing.assert_close(model(inputs, targets, loss_reduction="sum"), expected.sum())
    torch.testing.assert_close(model(inputs, targets), expected.sum() / 24)


def test_gradients_of_all_weights_equal_those_of_full_logits():
    model = randomized_model()
    ids = random_tokens(model.config, 2, 9)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(inputs, targets).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_loss_weights_multiply_the_losses_of_a_sum():
    """Policy gradients: the gradient is that of sum(w * CE) on full logits, to all weights of the model."""
    model = randomized_model()
    ids = random_tokens(model.config, 3, 9)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[1, :3] = -1
    weights = torch.tensor([[0.75], [-1.5], [0.25]]).repeat(1, 8)
    weights[2, 4:] = 0.0
    losses = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    expected = (weights.flatten() * losses).sum()
    expected.backward()
    expected_grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = model(inputs, targets, loss_reduction="sum", loss_weights=weights)
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad, expected_grads[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_an_unknown_reduction_is_refused():
    model = build(tiny_config())
    ids = random_tokens(model.config, 1, 4)
    with pytest.raises(ValueError, match="median"):
        model(ids, ids, loss_reduction="median")


# ---------------------------------------------------------------------------------------------------------------------
# Initialisation, dtypes, generation


def test_initial_weights_have_the_standard_deviations_of_the_recipe():
    torch.manual_seed(0)
    C = 256
    model = build(GPTConfig(64, 257, n_layer=2, n_head=4, n_kv_head=2, n_embd=C))
    block = model.transformer.h[1]
    expected = {
        model.transformer.wte: 1.0,
        block.attn.c_q: C**-0.5,
        block.attn.c_k: C**-0.5 * 0.5**0.5,  # half as many outputs as inputs
        block.mlp.c_fc: C**-0.5,
    }
    for module, std in expected.items():
        assert module.weight.std().item() == pytest.approx(std, rel=0.02)
        assert module.weight.mean().item() == pytest.approx(0, abs=0.02 * std)
    for module in (model.lm_head, block.attn.c_proj, block.mlp.c_proj):
        assert module.weight.abs().max() == 0


def test_an_untrained_model_knows_nothing():
    model = build(tiny_config())
    ids = random_tokens(model.config, 2, 9)
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(257), rel=1e-6)


def test_the_same_seed_gives_the_same_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(7)
        models.append(build(tiny_config()))
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)


def test_everything_is_float32_on_a_cpu():
    model = build(tiny_config())
    assert {t.dtype for t in (*model.parameters(), *model.buffers())} == {torch.float32}


def test_wte_alone_is_bf16_where_the_device_computes_in_it(monkeypatch):
    monkeypatch.setattr("nanochat.gpt.compute_dtype", lambda device: torch.bfloat16)
    model = build(tiny_config())
    in_bf16 = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert in_bf16 == {"transformer.wte.weight"}
    assert model.cos.dtype == torch.float32


def test_optimizer_groups_and_their_rates():
    model = build(tiny_config(n_embd=192, n_head=4))
    adamw, muon = model.setup_optimizers(unembedding_lr=0.004, embedding_lr=0.2, matrix_lr=0.02)
    rates = {p: group["initial_lr"] for o in (adamw, muon) for group in o.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    assert rates.pop(model.lm_head.weight) == pytest.approx(0.008)  # (192 / 768)^-0.5 = 2
    assert rates.pop(model.transformer.wte.weight) == pytest.approx(0.4)
    assert set(rates.values()) == {0.02}


def test_greedy_generation_takes_the_likeliest_token_each_time():
    model = randomized_model()
    ids = [5, 6, 7]
    generated = list(model.generate(ids, max_tokens=5, temperature=0))
    with torch.no_grad():
        for token in generated:
            assert token == model(torch.tensor([ids]))[0, -1].argmax().item()
            ids = [*ids, token]
    assert len(generated) == 5


def test_sampling_repeats_with_a_seed_and_only_with_it():
    model = randomized_model()
    first, again, other = (list(model.generate([1], max_tokens=12, seed=seed)) for seed in (3, 3, 4))
    assert first == again != other
    assert max(first) < 257


def test_top_k_draws_from_the_k_likeliest_and_none_or_zero_is_off():
    model = randomized_model()
    greedy = list(model.generate([1], max_tokens=6, temperature=0))
    assert list(model.generate([1], max_tokens=6, temperature=1.0, top_k=1)) == greedy
    with torch.no_grad():
        likeliest = set(model(torch.tensor([[1]]))[0, -1].topk(3).indices.tolist())
    assert {next(model.generate([1], max_tokens=1, temperature=2.0, top_k=3, seed=s)) for s in range(40)} == likeliest
    free = [list(model.generate([1], max_tokens=6, temperature=2.0, top_k=k)) for k in (None, 0, 10_000)]
    assert free[0] == free[1] == free[2]


def test_generation_leaves_the_training_generator_alone():
    model = randomized_model()
    before = torch.get_rng_state()
    list(model.generate([1], max_tokens=3))
    assert torch.equal(before, torch.get_rng_state())
