"""How a model is trained on the GPUs that there are, or would be: processes, rows per micro-batch, time and cost.

    python -m nanochat.plan --depth=20

prints two numbers, `processes device_batch_size`, for speedrun.sh, which asks before it downloads anything. Where the
model does not fit at the smallest batch it ends with status 1 and the plan that would fit. base_train asks here how
many rows fit its device (--device_batch_size=-1), and what a run would take on GPUs that are named (--plan=1).

Memory is estimated: weights, gradients and optimizer state, and the larger of what the backward pass and the optimizer
step need beside them. On CUDA that is for a compiled model. On a CPU it is what the tensors take: the process grows to
1.3 to 1.8 times as much, as the C library's heap is left with holes. The estimate knows nothing of other programs.
"""

import math
from dataclasses import dataclass

import psutil
import torch

from nanochat.common import (
    PEAK_FLOPS,
    UserError,
    autodetect_device_type,
    compute_dtype,
    format_seconds,
    gather_objects,
    get_dist_info,
    usable_memory_bytes,
    user_errors,
)
from nanochat.configurator import opt, parse
from nanochat.cross_entropy import CHUNK_ELEMENTS
from nanochat.dataloader import DATA_LANES
from nanochat.gpt import GPT, GPTConfig, config_from_depth
from nanochat.report import PRICE_SETTING, hourly_cost
from nanochat.train import gradient_accumulation_steps

MAX_BATCH_TOKENS = 32 * 2048  # a micro-batch; more at once keeps no device busier
USABLE_SHARE = {"cuda": 0.95, "cpu": 0.5}  # the rest goes to CUDA itself and fragmentation, or to holes in the heap
# What autograd keeps, in bytes per token, block and channel, by the dtype of the matmuls. Counted with
# saved_tensors_hooks: 59 in float32; 47 under bfloat16 autocast, 40 after torch.compile's partitioning.
ACTIVATION_BYTES = {torch.float32: 59, torch.bfloat16: 40}
LOGIT_BYTES = 14  # per logit of a chunk: three float32 buffers and a bfloat16 one

# For plans: what the devices of PEAK_FLOPS have, in bytes that CUDA reports, and which share of the peak a run reaches
GPU_MEMORY = {
    "B200": 192e9,
    "H200": 150e9,
    "H100 PCIe": 85e9,
    "H100": 85e9,
    "A100": 85e9,
    "L40S": 47.7e9,
    "4090": 25.3e9,
    "3090": 25.3e9,
}
ASSUMED_MFU = 0.45

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


def estimate_memory(
    config: GPTConfig,
    device_batch_size: int,
    world_size: int,
    device_type: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes that training needs on each device, about, with matmuls in dtype.

    Optimizer state is shared out over world_size devices.
    """
    embedding = config.padded_vocab_size * config.n_embd  # wte, and as many in lm_head
    matrices = count_parameters(config) - 2 * embedding
    is_cast = dtype != torch.float32  # then wte has that dtype, and autocast makes copies of the others
    weights = (2 if is_cast else 4) * embedding + 4 * (embedding + matrices)
    state = (8 * 2 * embedding + 4 * matrices) // world_size  # two moments; Muon's momentum
    tokens = device_batch_size * config.sequence_len
    activations = ACTIVATION_BYTES[dtype] * tokens * config.n_layer * config.n_embd
    logits = LOGIT_BYTES * min(CHUNK_ELEMENTS.get(device_type, 2**26), tokens * config.vocab_size)
    backward = 2 * is_cast * (embedding + matrices) + activations + logits + 8 * embedding  # lm_head's gradient, twice
    # Muon's stacks: all gradients, and what Newton-Schulz works on; or AdamW's temporaries
    optimizer = max(4 * matrices + 8 * matrices // world_size, 12 * embedding // world_size)
    return 2 * weights + state + max(backward, optimizer)  # gradients are as large as the weights


def count_parameters(config: GPTConfig) -> int:
    """The parameters of a model, without allocating it."""
    with torch.device("meta"):
        return GPT(config).num_params()


def choose_batch_size(
    config: GPTConfig,
    world_size: int,
    memory_bytes: int,
    rows: int = -1,
    device_type: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
) -> int | None:
    """The most rows that fit; None where not even one does.

    They divide rows, those of an optimizer step on one device, or MAX_BATCH_TOKENS' (-1), beyond which they never go.
    """
    most = max(1, MAX_BATCH_TOKENS // max(1, config.sequence_len))
    usable = USABLE_SHARE.get(device_type, 0.5) * memory_bytes
    divisors = [n for n in range(most, 0, -1) if (rows if rows > 0 else most) % n == 0]
    fits = (n for n in divisors if estimate_memory(config, n, world_size, device_type, dtype) <= usable)
    return next(fits, None)


def fit_batch_size(setting: int, config: GPTConfig, tokens: int, device: torch.device) -> int:
    """The device_batch_size of a run: the setting, or for -1 the most rows that fit all ranks' devices, at least 1.

    tokens: of an optimizer step, over all ranks. Every rank must call. Raises UserError for another setting below 1.
    """
    if setting < 1 and setting != -1:
        raise UserError(f"--device_batch_size={setting} must be at least 1, or -1 for the most that fit")
    if setting != -1:
        return setting
    world_size, dtype = get_dist_info()[3], compute_dtype(device)
    memory_bytes = min(gather_objects(usable_memory_bytes(device)))
    rows = max(1, tokens // max(1, config.sequence_len * world_size))
    return choose_batch_size(config, world_size, memory_bytes, rows, device.type, dtype) or 1


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
    needed = estimate_memory(model(config.depth), 1, num_processes) / USABLE_SHARE["cuda"]
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


def parse_gpus(gpus: str) -> list[tuple[int, str]]:
    """'8xH100,4090' -> [(8, 'H100'), (1, '4090')]. Raises UserError for what is not known."""
    found = []
    for text in gpus.split(","):
        count, _, name = text.strip().rpartition("x")
        if name not in GPU_MEMORY or not (count or "1").isdigit() or count == "0":
            raise UserError(f"{text!r} are no known GPUs: something like 8xH100 is wanted, of {', '.join(GPU_MEMORY)}")
        found.append((int(count or 1), name))
    return found


def describe_run(
    model: GPT, num_iterations: int, total_batch_size: int, device_batch_size: int, data_lanes: int, gpus: str
) -> list[str]:
    """What a run of base_train takes, in lines: the model, the tokens, and a line for each kind of GPU.

    model may be on the meta device. gpus: as parse_gpus has them. Of device_batch_size -1 is the most that fit.
    """
    config, num_params, flops_per_token = model.config, model.num_params(), model.estimate_flops()
    tokens = num_iterations * total_batch_size
    flops = tokens * flops_per_token
    lines = [
        f"{config}: {num_params:,} parameters, {flops_per_token:.2e} FLOPs per token",
        f"{num_iterations:,} steps of {total_batch_size:,} tokens, {tokens / 1e9:.3g}B in all, "
        f"{tokens / num_params:.1f} per parameter, {flops:.2e} FLOPs",
    ]
    usable, prices = USABLE_SHARE["cuda"], []
    for count, name in parse_gpus(gpus):
        world_size, memory = count_processes(count), GPU_MEMORY[name]
        B = device_batch_size
        if B == -1:
            rows = max(1, total_batch_size // (config.sequence_len * world_size))
            B = choose_batch_size(config, world_size, memory, rows) or 1
        accumulation = gradient_accumulation_steps(total_batch_size, B, config.sequence_len, world_size, data_lanes)
        needed = estimate_memory(config, B, world_size)
        seconds = flops / (ASSUMED_MFU * PEAK_FLOPS[name] * world_size)
        price = hourly_cost([name]) or 0.0
        prices.append(f"${price:.2f} ({name})")
        lines.append(
            f"{count} x {name}: {format_seconds(seconds)}, ${price * count * seconds / 3600:,.0f}; "
            f"{world_size} processes x {accumulation} micro-batches x {B} rows; {needed / 2**30:.1f} GiB a rank "
            f"{'of' if needed <= usable * memory else 'do not fit'} {usable * memory / 2**30:.1f}"
        )
    lines.append(
        f"assumed: {ASSUMED_MFU:.0%} of the peak FLOPs, and time for nothing but training steps; per GPU and hour "
        f"{', '.join(dict.fromkeys(prices))}, or what {PRICE_SETTING} says"
    )
    return lines


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
