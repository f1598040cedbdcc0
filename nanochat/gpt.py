"""The model: a decoder-only Transformer with rotary positions, QK norm, squared ReLU and an untied output layer.

    tokens -> wte -> norm -> L x Block -> norm -> lm_head -> softcap -> logits
    Block: x += attn(norm(x)); x += mlp(norm(x))

Legend of the shapes, here and everywhere:
    B batch   T time (sequence length)   C n_embd    H n_head   K n_kv_head
    D head_dim = C / H                   V vocab_size            L n_layer

Norms have no parameters and linear layers no bias. The logits are 15 * tanh(logits / 15) in float32. Queries and keys
are normalised after the rotation (QK norm, arXiv 2302.05442), rotary positions are arXiv 2104.09864, the squared ReLU
is arXiv 2109.08668, grouped KV heads arXiv 2305.13245. It is the architecture that Hugging Face calls NanoChat.

What it does not do: dropout, sampling beyond a naive reference (engine.py has the fast one), loading (see
checkpoint_manager.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.adamw import AdamW
from nanochat.common import UserError, compute_dtype
from nanochat.cross_entropy import cross_entropy_each, cross_entropy_sum
from nanochat.muon import Muon

LOGIT_CAP = 15.0
ROTARY_BASE = 10_000.0
ROTARY_FACTOR = 10  # the rotary tables cover this many times sequence_len at first
VOCAB_MULTIPLE = 64  # rows of wte and lm_head are padded to a multiple, for sharding and speed


@dataclass
class GPTConfig:
    """The shape of a model."""

    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise ValueError(f"n_embd={self.n_embd} must be n_head={self.n_head} times an even head dimension")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}")

    @property
    def head_dim(self) -> int:
        """D, the width of one head."""
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of wte and lm_head."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def num_heads(n_embd: int, head_dim: int) -> int:
    """How many heads a width gets: ceil(n_embd / head_dim), or the nearest count that gives equal, even heads.

    Of two counts that are equally near the larger one is taken: num_heads(320, 128) = 4, since 3 does not divide 320.
    Raises UserError for an odd width.
    """
    wanted = max(1, math.ceil(n_embd / head_dim))
    legal = [n for n in range(1, n_embd // 2 + 1) if n_embd % n == 0 and (n_embd // n) % 2 == 0]
    if not legal:
        raise UserError(f"a width of {n_embd} cannot be split into even heads; take an even --aspect_ratio")
    return min(legal, key=lambda n: (abs(n - wanted), -n))


def config_from_depth(
    depth: int, vocab_size: int, sequence_len: int, aspect_ratio: int = 64, head_dim: int = 128
) -> GPTConfig:
    """The model that one number describes: depth blocks of width depth * aspect_ratio."""
    for name, value in (("depth", depth), ("aspect_ratio", aspect_ratio), ("head_dim", head_dim)):
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1")
    n_embd = depth * aspect_ratio
    n_head = num_heads(n_embd, head_dim)
    return GPTConfig(sequence_len, vocab_size, n_layer=depth, n_head=n_head, n_kv_head=n_head, n_embd=n_embd)


class _RMSNorm(torch.autograd.Function):
    """norm, where torch has no kernel for it and would make its gradient in a dozen passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        scale = (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        y, scale = ctx.saved_tensors
        return torch.addcmul(grad, y, (grad * y).mean(-1, keepdim=True), value=-1).mul_(scale)


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMS norm over the last dimension, without parameters."""
    if x.is_cpu and x.dtype == torch.float32:
        return _RMSNorm.apply(x)
    return F.rms_norm(x, (x.size(-1),))


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + D/2]) of x (B, T, heads, D) by the angles of cos, sin (1, T, 1, D).

    Both hold each angle twice, as GPT makes them, the sines of the second half with a minus:
    y[i] = x[i] cos + x[i + D/2] sin and y[i + D/2] = x[i + D/2] cos - x[i] sin.
    """
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2. Its gradient, 2 relu(x), needs one saved tensor and no look at the sign of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(x)
        ctx.save_for_backward(y)
        return y.square()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return (grad * y).mul_(2)


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.c_q = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=False)
        self.c_k = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=False)
        self.c_v = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv_cache: Any = None) -> torch.Tensor:
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        q, k = norm(apply_rotary(q, cos, sin)).to(v.dtype), norm(apply_rotary(k, cos, sin)).to(v.dtype)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, T, heads, D) -> (B, heads, T, D)
        mask = None
        if kv_cache is not None:
            mask = kv_cache.mask(T)
            k, v = kv_cache.insert(self.layer, k, v)  # (B, K, T, D) -> (B, K, longest + T, D)
        y = causal_attention(q, k, v, mask)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, H, T, D) -> (B, T, C)
        return self.c_proj(y)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Scaled dot-product attention of q (B, H, T, D) over k, v (B, K, S, D), where q are the last T of S positions.

    mask (B, 1, T, S) bool says otherwise: what each query sees.
    """
    T, S = q.size(2), k.size(2)
    grouped = q.size(1) != k.size(1)
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if T == 1:  # one query sees everything
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)


class MLP(nn.Module):
    """Two linear layers, four times as wide in between, with a squared ReLU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(_SquaredReLU.apply(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP, each on the normalised residual stream."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv_cache: Any = None) -> torch.Tensor:
        x = x + self.attn(norm(x), cos, sin, kv_cache)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The language model. Build it on the meta device, then call to_empty and init_weights (or load weights)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                # nn.Embedding() would draw random weights, which on the meta device costs seconds of imports in torch
                "wte": nn.Embedding.from_pretrained(torch.empty(config.padded_vocab_size, config.n_embd), freeze=False),
                "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(1, 0, 1, config.head_dim), persistent=False)

    def init_weights(self) -> None:
        """Fill all weights from torch's global generator; wte becomes bfloat16 on CUDA devices that compute in it."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                fan_out, fan_in = module.weight.shape
                nn.init.normal_(module.weight, std=fan_in**-0.5 * min(1.0, (fan_out / fan_in) ** 0.5))
        nn.init.normal_(self.transformer.wte.weight, std=1.0)
        nn.init.zeros_(self.lm_head.weight)
        for block in self.transformer.h:
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
        self.prepare()

    def prepare(self) -> None:
        """What has to follow to_empty, beside the weights: the rotary tables, and the dtype of wte."""
        self._set_rotary(ROTARY_FACTOR * self.config.sequence_len)
        self.transformer.wte.to(compute_dtype(self.get_device()))

    def _set_rotary(self, length: int) -> None:
        """Make the tables of apply_rotary for the first length positions, (1, length, 1, D) float32."""
        device, D = self.get_device(), self.config.head_dim
        with torch.inference_mode(False):  # grown while sampling, the tables must still serve training
            frequencies = ROTARY_BASE ** -(torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)
            positions = torch.arange(length, dtype=torch.float32, device=device)
            angles = torch.outer(positions, frequencies)[None, :, None, :]
            cos, sin = angles.cos(), angles.sin()
            self.register_buffer("cos", torch.cat((cos, cos), dim=-1), persistent=False)
            self.register_buffer("sin", torch.cat((sin, -sin), dim=-1), persistent=False)

    def _rotary(self, T: int, kv_cache: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of the next T positions, (1, T, 1, D), or (B, T, 1, D) where the cache's rows differ.

        The tables grow where they are too short.
        """
        end = T if kv_cache is None else kv_cache.longest + T
        if end > self.cos.size(1):
            self._set_rotary(2 * end)
        if kv_cache is None or kv_cache.is_uniform:
            return self.cos[:, end - T : end], self.sin[:, end - T : end]
        positions = kv_cache.positions(T)  # (B, T)
        return self.cos[0, positions], self.sin[0, positions]

    def get_device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    def num_params(self) -> int:
        """How many parameters there are, padding included."""
        return sum(p.numel() for p in self.parameters())

    def estimate_flops(self) -> int:
        """FLOPs per token of forward and backward (arXiv 2204.02311, appendix B).

        Six for each parameter but those of wte, and 12 L H D T for the attention's two products, as if not causal.
        """
        c = self.config
        matmul_params = self.num_params() - self.transformer.wte.weight.numel()
        return 6 * matmul_params + 12 * c.n_layer * c.n_head * c.head_dim * c.sequence_len

    def setup_optimizers(
        self,
        unembedding_lr: float = 0.004,
        embedding_lr: float = 0.2,
        matrix_lr: float = 0.02,
        weight_decay: float = 0.0,
    ) -> list[Any]:
        """[AdamW for wte and lm_head, Muon for the matrices of the blocks].

        AdamW's rates are scaled by (n_embd / 768)^-0.5. Each group's "initial_lr" is what schedules multiply.
        """
        scale = (self.config.n_embd / 768) ** -0.5
        adamw = AdamW(
            [
                {"name": "lm_head", "params": [self.lm_head.weight], "lr": unembedding_lr * scale},
                {"name": "wte", "params": [self.transformer.wte.weight], "lr": embedding_lr * scale},
            ],
            weight_decay=weight_decay,
        )
        muon = Muon(list(self.transformer.h.parameters()), lr=matrix_lr)
        return [adamw, muon]

    def hidden(self, idx: torch.Tensor, kv_cache: Any = None) -> torch.Tensor:
        """The final normalised states (B, T, C) for tokens idx (B, T) int64.

        With a kv_cache the tokens continue what each of its rows holds, and it is advanced by T.
        """
        T = idx.size(1)
        cos, sin = self._rotary(T, kv_cache)
        x = norm(self.transformer.wte(idx))
        for block in self.transformer.h:
            x = block(x, cos, sin, kv_cache)
        if kv_cache is not None:
            kv_cache.advance(T)
        return norm(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Softcapped logits (..., V), float32, of states x (..., C). The padding of the vocabulary is not in them."""
        logits = F.linear(x, self.lm_head.weight[: self.config.vocab_size]).float()
        if torch.is_grad_enabled():
            return LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)
        return logits.div_(LOGIT_CAP).tanh_().mul_(LOGIT_CAP)

    def forward(
        self,
        idx: torch.Tensor,
        targets: torch.Tensor | None = None,
        kv_cache: Any = None,
        loss_reduction: str = "mean",
        loss_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits or loss for tokens idx (B, T) int64.

        Without targets: logits (B, T, V) float32. With targets (B, T) int64, -1 for no loss, in nats and float32:
        the mean over targets or the sum (both without ever holding all logits), or with "none" each loss (B*T,).
        loss_weights (B, T) float32 multiply the losses of a sum.
        """
        x = self.hidden(idx, kv_cache)
        if targets is None:
            return self.logits(x)
        x, targets = x.flatten(0, 1), targets.flatten()
        weight = self.lm_head.weight[: self.config.vocab_size]
        dtype = compute_dtype(x.device)
        if loss_reduction == "none":
            return cross_entropy_each(x, weight, targets, LOGIT_CAP, dtype)
        if loss_weights is not None:
            loss_weights = loss_weights.flatten()
        total = cross_entropy_sum(x, weight, targets, LOGIT_CAP, dtype, loss_weights)
        if loss_reduction == "sum":
            return total
        if loss_reduction != "mean":
            raise ValueError(f"loss_reduction={loss_reduction!r} is not one of mean, sum, none")
        return total / (targets != -1).sum()

    @torch.inference_mode()
    def generate(
        self, tokens: list[int], max_tokens: int, temperature: float = 1.0, top_k: int | None = None, seed: int = 42
    ) -> Iterator[int]:
        """Yield max_tokens sampled ids that continue tokens, recomputing everything each time.

        The slow reference for engine.py: no cache, one row, no stop token. temperature 0 takes the likeliest token,
        top_k None or 0 means all.
        """
        device = self.get_device()
        rng = torch.Generator(device=device).manual_seed(seed)
        ids = torch.tensor([tokens], dtype=torch.int64, device=device)
        for _ in range(max_tokens):
            logits = self.logits(self.hidden(ids)[:, -1])  # (1, V)
            if top_k:
                smallest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                logits = logits.masked_fill(logits < smallest, -torch.inf)
            if temperature == 0:
                next_id = logits.argmax(dim=-1, keepdim=True)
            else:
                next_id = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=rng)
            ids = torch.cat((ids, next_id), dim=1)
            yield int(next_id)
