"""Measure the base model's bits per byte on both splits, and let it complete the sample prompts.

    python -m scripts.base_loss
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss

Reads base_checkpoints/ and base_data/; writes report/base_loss.md.
"""

from dataclasses import dataclass

from nanochat.checkpoint_manager import load_model
from nanochat.common import compute_init, print0, user_errors
from nanochat.configurator import opt, parse
from nanochat.dataloader import DATA_LANES, tokenizing_distributed_data_loader
from nanochat.loss_eval import evaluate_bpb
from nanochat.report import get_report
from nanochat.tokenizer import get_token_bytes
from nanochat.train import evaluation_steps, sample_completions


@dataclass
class Config:
    device_type: str = opt("", "cuda, mps or cpu; empty finds the best there is")
    device_batch_size: int = opt(32, "rows per rank and batch")
    split_tokens: int = opt(20 * 524_288, "tokens of each split to evaluate on")
    data_lanes: int = opt(DATA_LANES, "streams into which the data is dealt; a multiple of the processes")
    model_tag: str = opt("", "checkpoint folder; empty is the largest model")
    step: int = opt(-1, "checkpoint step; -1 is the last")


@user_errors
def main(config: Config) -> dict[str, float]:
    """Return {"train_bpb", "val_bpb"}."""
    # Setup
    runtime = compute_init(config.device_type)
    model, tokenizer, meta = load_model("base", runtime.device, "eval", config.model_tag, config.step)
    B, T = config.device_batch_size, model.config.sequence_len
    steps = evaluation_steps(config.split_tokens, B, T, runtime.world_size, config.data_lanes)
    token_bytes = get_token_bytes(runtime.device)

    # Loss
    bpb = {}
    for split in ("train", "val"):
        batches = tokenizing_distributed_data_loader(B, T, split, tokenizer, config.data_lanes, runtime.device)
        bpb[split] = evaluate_bpb(model, batches, steps, token_bytes)
        print0(f"{split} bits per byte: {bpb[split]:.4f}")

    # Samples
    samples = sample_completions(model, tokenizer)
    for sample in samples:
        print0(f"  {sample}")

    # Finish
    get_report().log(
        "base_loss",
        [
            config,
            {
                "model": f"{meta['model_tag']}, step {meta['step']}",
                "train_bpb": bpb["train"],
                "val_bpb": bpb["val"],
                "samples": samples,
            },
        ],
    )
    return {"train_bpb": bpb["train"], "val_bpb": bpb["val"]}


if __name__ == "__main__":
    main(parse(Config))
