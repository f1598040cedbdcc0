"""Bits per byte: the loss in a unit that does not depend on the tokenizer, so that models can be compared.

Source: The Pile (arXiv 2101.00027), section 3.1. A loss per token flatters large vocabularies; here the summed loss
is divided by the bytes of text that the targets stand for. Special tokens stand for none and are left out of both sums.
"""

import math
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch

from nanochat.common import all_reduce_sum, autocast


@torch.inference_mode()
def evaluate_bpb(model: Any, batches: Iterable[Any], steps: int | None, token_bytes: torch.Tensor) -> float:
    """Bits per byte of the model over the next `steps` batches (None: all), all ranks together. Every rank must call.

    batches yield (inputs, targets, ...), each (B, T) int64, targets -1 ignored; token_bytes (V,) int32 gives each id's
    length in bytes, 0 for special tokens. Returns inf where the targets stand for no bytes. The training mode is kept.
    """
    device = token_bytes.device
    nats, total_bytes = 0.0, 0
    was_training = model.training
    model.eval()
    for inputs, targets, *_ in islice(batches, steps):
        with autocast(device):
            losses = model(inputs, targets, loss_reduction="none")  # (B*T,)
        targets = targets.flatten()
        num_bytes = token_bytes[targets.clamp(min=0)] * (targets >= 0)
        nats += (losses * (num_bytes > 0)).sum().item()
        total_bytes += int(num_bytes.sum())
    model.train(was_training)
    nats, total_bytes = all_reduce_sum(nats), all_reduce_sum(total_bytes)
    return nats / (math.log(2) * total_bytes) if total_bytes > 0 else math.inf
