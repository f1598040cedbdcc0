"""How a model is trained on the GPUs that there are: the number of processes and the rows per micro-batch.

    python -m nanochat.plan --depth=20

prints two numbers, `processes device_batch_size`, for speedrun.sh, which asks before it downloads anything. Where the
model does not fit at the smallest batch it ends with status 1 and the plan that would fit.

Memory is estimated: weights, gradients, optimizer state, what the backward pass keeps of the forward pass, and a chunk
of logits. The estimate is for base_train as it runs on CUDA (bfloat16 matmuls, compiled). It knows nothing of other
programs on the GPU.
"""

import math
from dataclasses import dataclass

import psutil
import torch

from nanochat.common import UserError, autodetect_device_type, user_errors
from nanochat.configurator import opt, parse
from nanochat.cross_entropy import CHUNK_ELEMENTS
from nanochat.dataloader import DATA_LANES
from nanochat.gpt import GPT, GPTConfig, config_from_depth

MAX_BATCH_SIZE = 32
USABLE_SHARE = 0.95  # of a GPU's memory; the rest goes to CUDA itself and to fragmentation
# What autograd keeps, in bytes per token, block and channel. Counted with saved_tensors_hooks under bfloat16 autocast:
# 46 as written, 40 after torch.compile's partitioning.
ACTIVATION_BYTES = 40
LOGIT_BYTES = 14  # per logit of a chunk: three float32 buffers and a bfloat16 one

# The data that a depth wants
TOKENS_PER_PARAMETER = 20
CHARS_PER_TOKEN = 4.8
CHARS_PER_SHARD = 250e6
SPARE_SHARDS = 1.1  # documents differ: a tenth more


@dataclass
class Config:
    depth: int = opt(20, "transformer blocks; width is 64 * depth")
    max_seq_len: int = opt(2048, "tokens a row")
    vocab_size: int = opt(65_536, "tokens of the tokenizer")


def estimate_memory(config: GPTConfig, device_batch_size: int, world_size: int) -> int:
    """Bytes that training needs on each GPU, about. Optimizer state is shared out over world_size GPUs."""
    embedding = config.padded_vocab_size * config.n_embd  # wte, and as many in lm_head
    matrices = count_parameters(config) - 2 * embedding
    weights = 2 * embedding + 4 * (embedding + matrices)  # wte is bfloat16
    casts = 2 * (embedding + matrices)  # autocast's copies
    adamw = 8 * 2 * embedding // world_size
    muon = (4 + 8) * matrices // world_size  # momentum; the stacks that Newton-Schulz works on
    tokens = device_batch_size * config.sequence_len
    activations = ACTIVATION_BYTES * tokens * config.n_layer * config.n_embd
    logits = LOGIT_BYTES * min(CHUNK_ELEMENTS["cuda"], tokens * config.vocab_size)
    return 2 * weights + casts + adamw + muon + activations + logits  # gradients are as large as the weights


def count_parameters(config: GPTConfig) -> int:
    """The parameters of a model, without allocating it."""
    with torch.device("meta"):
        return GPT(config).num_params()


def choose_batch_size(config: GPTConfig, world_size: int, memory_bytes: int) -> int | None:
    """The largest power of two up to MAX_BATCH_SIZE that fits; None where not even one row does."""
    batch_size = MAX_BATCH_SIZE
    while batch_size >= 1:
        if estimate_memory(config, batch_size, world_size) <= USABLE_SHARE * memory_bytes:
            return batch_size
        batch_size //= 2
    return None


def count_shards(config: GPTConfig) -> int:
    """Shards of text that training to the usual horizon reads: parameters -> tokens -> characters -> shards."""
    chars = count_parameters(config) * TOKENS_PER_PARAMETER * CHARS_PER_TOKEN
    return math.ceil(SPARE_SHARDS * chars / CHARS_PER_SHARD)


def count_processes(num_gpus: int) -> int:
    """How many processes share the work: the largest power of two that there are GPUs for, at most the data lanes."""
    num_processes = min(max(num_gpus, 1), DATA_LANES)
    return 1 << (num_processes.bit_length() - 1)


def make_plan(config: Config, num_gpus: int, memory_bytes: int) -> tuple[int, int]:
    """(processes, device_batch_size) for num_gpus GPUs with memory_bytes each; num_gpus 0 is a machine without one.

    Raises UserError with the largest model that fits where the wanted one does not.
    """
    num_processes = count_processes(num_gpus)

    def model(depth: int) -> GPTConfig:
        return config_from_depth(depth, config.vocab_size, config.max_seq_len)

    batch_size = choose_batch_size(model(config.depth), num_processes, memory_bytes)
    if batch_size is not None:
        return num_processes, batch_size
    needed = estimate_memory(model(config.depth), 1, num_processes) / USABLE_SHARE
    message = (
        f"depth {config.depth} needs about {needed / 2**30:.1f} GiB at a batch of one row, and each device has "
        f"{memory_bytes / 2**30:.1f} GiB; what fits: "
    )
    for depth in range(config.depth - 1, 0, -1):
        batch_size = choose_batch_size(model(depth), num_processes, memory_bytes)
        if batch_size is not None:
            message += f"`DEPTH={depth} NUM_SHARDS={count_shards(model(depth))} bash speedrun.sh`, or "
            break
    raise UserError(message + "`RECIPE=pocket bash speedrun.sh`")


@user_errors
def main(config: Config) -> None:
    """Print the plan for this machine."""
    if config.depth < 1:
        raise UserError(f"--depth={config.depth} must be at least 1")
    num_gpus = torch.cuda.device_count() if autodetect_device_type() == "cuda" else 0
    memory_bytes = min(
        (torch.cuda.get_device_properties(i).total_memory for i in range(num_gpus)),
        default=psutil.virtual_memory().total,
    )
    print(*make_plan(config, num_gpus, memory_bytes))


if __name__ == "__main__":
    main(parse(Config))
