"""Pretrain the base model.

    python -m scripts.base_train --depth=4 --max_seq_len=512 --device_batch_size=8 --total_batch_size=8192
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20 --run=d20

Reads tokenizer/, base_data/ and, for CORE, eval_bundle/; writes base_checkpoints/<model_tag>/ and report/base_train.md.
A run that was interrupted or killed is taken up again by the same command. With --plan=1 it says what the run takes on
--plan_gpus, and ends: that needs neither data nor a tokenizer.
"""

import time
from dataclasses import asdict, dataclass

import torch

from nanochat.checkpoint_manager import checkpoint_root, resume_training, save_training, update_meta
from nanochat.common import (
    UserError,
    autocast,
    compile_model,
    compute_init,
    format_seconds,
    init_wandb,
    print0,
    print_banner,
    user_errors,
)
from nanochat.configurator import opt, parse
from nanochat.core_eval import evaluate_model, find_bundle
from nanochat.dataloader import (
    DATA_LANES,
    check_shards,
    gather_cursors,
    shard_identities,
    tokenizing_distributed_data_loader,
)
from nanochat.gpt import GPT, config_from_depth
from nanochat.guard import Saver, StallWatch
from nanochat.loss_eval import evaluate_bpb
from nanochat.plan import describe_run, fit_batch_size
from nanochat.report import get_report
from nanochat.tokenizer import get_token_bytes, get_tokenizer
from nanochat.train import (
    MetricsLog,
    Portions,
    StopSignal,
    TrainMeter,
    accumulate_gradients,
    evaluation_steps,
    gradient_accumulation_steps,
    is_due,
    lr_multiplier,
    muon_momentum,
    sample_completions,
    step_optimizers,
)


@dataclass
class Config:
    run: str = opt("dummy", "name of the wandb run; 'dummy' logs nothing")
    device_type: str = opt("", "cuda, mps or cpu; empty finds the best there is")
    seed: int = opt(42, "seed of the weights")
    # Model
    depth: int = opt(20, "transformer blocks; the width is depth * aspect_ratio")
    aspect_ratio: int = opt(64, "width per block")
    head_dim: int = opt(128, "width of an attention head, or the nearest that divides the model's")
    max_seq_len: int = opt(2048, "tokens a row")
    # Horizon: the first of these that is set
    num_iterations: int = opt(-1, "optimizer steps; -1 is not set")
    target_flops: float = opt(-1.0, "train for so many FLOPs; -1 is not set")
    target_param_data_ratio: float = opt(20.0, "train on so many tokens per parameter; -1 is not set")
    # Optimization
    device_batch_size: int = opt(32, "rows per rank and micro-batch; -1 is the most that fit the device")
    total_batch_size: int = opt(524_288, "tokens per optimizer step, over all ranks")
    embedding_lr: float = opt(0.2, "learning rate of wte (AdamW)")
    unembedding_lr: float = opt(0.004, "learning rate of lm_head (AdamW)")
    matrix_lr: float = opt(0.02, "learning rate of the matrices (Muon)")
    weight_decay: float = opt(0.0, "weight decay of AdamW; 0 is off")
    grad_clip: float = opt(1.0, "largest global gradient norm; 0 is off")
    warmup_ratio: float = opt(0.0, "share of the steps in which the rates rise")
    warmdown_ratio: float = opt(0.2, "share of the steps in which the rates fall")
    final_lr_frac: float = opt(0.0, "where the rates end, as a share of where they began")
    data_lanes: int = opt(DATA_LANES, "streams into which the data is dealt; a multiple of the processes")
    tokenized_cache: bool = opt(True, "keep token ids in tokenized_data/ and read them from there")
    compile: int = opt(-1, "torch.compile: 1 yes, 0 no, -1 on CUDA only")
    # Evaluation
    eval_every: int = opt(250, "steps between evaluations of val bits per byte; -1 is off")
    eval_tokens: int = opt(20 * 524_288, "tokens of an evaluation")
    core_metric_every: int = opt(2000, "steps between evaluations of CORE; -1 is off")
    core_metric_max_per_task: int = opt(500, "examples a CORE task; -1 is all")
    sample_every: int = opt(2000, "steps between samples; -1 is off")
    # Output
    model_tag: str = opt("", "name of the checkpoint folder; empty is d<depth>")
    save_every: int = opt(-1, "steps between checkpoints; -1 saves at the end only")
    save_keep: int = opt(2, "how many checkpoints to keep; -1 is all")
    log_every: int = opt(1, "steps between lines of the log; -1 is off")
    log_norms_every: int = opt(100, "steps between norms of each group's gradient and update; -1 is off")
    log_stall_seconds: float = opt(600.0, "without a step, after which every rank's stack is written; -1 is off")
    resume: str = opt("auto", "take up an unfinished run of these settings, or start anew", choices=("auto", "never"))
    # Plan
    plan: bool = opt(False, "print what the run takes in memory, time and money, and end")
    plan_gpus: str = opt("8xH100", "on which GPUs, such as 8xH100,8xA100,4090")
    plan_vocab_size: int = opt(65_536, "with how many tokens of vocabulary")


def count_iterations(config: Config, num_params: int, flops_per_token: int) -> int:
    """Optimizer steps from the first horizon that is set.

    Raises UserError where none is, where it is too short, and for sizes that are none.
    """
    for name in ("total_batch_size", "max_seq_len"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)} must be at least 1")
    if config.num_iterations > 0:
        return config.num_iterations
    if config.target_flops > 0:
        num_iterations = round(config.target_flops / (flops_per_token * config.total_batch_size))
    elif config.target_param_data_ratio > 0:
        num_iterations = int(config.target_param_data_ratio * num_params) // config.total_batch_size
    else:
        raise UserError("no horizon: set --num_iterations, --target_flops or --target_param_data_ratio above 0")
    if num_iterations < 1:
        raise UserError("the horizon is shorter than one step of --total_batch_size; set --num_iterations instead")
    return num_iterations


@user_errors
def main(config: Config) -> dict[str, float]:
    """Train, evaluate, save; return the final metrics."""
    # -----------------------------------------------------------------------------------------------------------------
    # Setup
    print_banner()
    runtime = compute_init(config.device_type, config.seed)
    device, world_size = runtime.device, runtime.world_size
    tokenizer = None if config.plan else get_tokenizer()
    if config.core_metric_every > 0 and not config.plan:
        find_bundle()  # what cannot be found should be missed now, not at the first evaluation

    # -----------------------------------------------------------------------------------------------------------------
    # Model
    T, vocab_size = config.max_seq_len, tokenizer.get_vocab_size() if tokenizer else config.plan_vocab_size
    model_config = config_from_depth(config.depth, vocab_size, T, config.aspect_ratio, config.head_dim)
    wanted_heads = max(1, -(-model_config.n_embd // config.head_dim))
    if model_config.n_head != wanted_heads:
        print0(
            f"{wanted_heads} heads do not divide the width {model_config.n_embd} evenly: {model_config.n_head} are used"
        )
    with torch.device("meta"):
        model = GPT(model_config)
    num_params, flops_per_token = model.num_params(), model.estimate_flops()
    num_iterations = count_iterations(config, num_params, flops_per_token)
    if config.plan:
        sizes = (num_iterations, config.total_batch_size, config.device_batch_size, config.data_lanes)
        print0("\n".join(describe_run(model, *sizes, config.plan_gpus)))
        return {}
    B = fit_batch_size(config.device_batch_size, model_config, config.total_batch_size, device)
    accumulation = gradient_accumulation_steps(config.total_batch_size, B, T, world_size, config.data_lanes)
    eval_steps = evaluation_steps(config.eval_tokens, B, T, world_size, config.data_lanes)
    token_bytes = get_token_bytes(device)
    model.to_empty(device=device)
    model.init_weights()
    total_tokens = num_iterations * config.total_batch_size
    print0(f"{model_config}: {num_params:,} parameters, {flops_per_token:.2e} FLOPs per token")
    print0(
        f"{num_iterations:,} steps of {config.total_batch_size:,} tokens ({world_size} processes x {accumulation} "
        f"micro-batches x {B} rows x {T}), {total_tokens:,} in all, {total_tokens / num_params:.1f} per parameter"
    )

    # -----------------------------------------------------------------------------------------------------------------
    # Optimizer, and the state of a run that is taken up again
    optimizers = model.setup_optimizers(
        config.unembedding_lr, config.embedding_lr, config.matrix_lr, config.weight_decay
    )
    meter = TrainMeter(flops_per_token, device, model_config.vocab_size)
    checkpoint_dir = checkpoint_root("base") / (config.model_tag or f"d{config.depth}")
    shards = shard_identities("train")
    start_step, meta = resume_training(checkpoint_dir, model, optimizers, meter, config, tokenizer)
    cursors = None
    if start_step:
        check_shards(meta["shards"], shards)
        cursors = {int(lane): cursor for lane, cursor in meta["cursors"].items()}
    train_model = compile_model(model, config.compile)

    # -----------------------------------------------------------------------------------------------------------------
    # Data
    def loader(split: str, cursors: dict | None = None):
        return tokenizing_distributed_data_loader(
            B, T, split, tokenizer, config.data_lanes, device, cursors, config.tokenized_cache
        )

    train_batches = meter.watch_data(loader("train", cursors))
    if config.eval_every > 0:
        loader("val")  # a validation shard that does not serve should be missed now, not at the first evaluation

    def micro_batches():
        """One optimizer step's (inputs, targets); leaves the position in the data in cursors."""
        nonlocal cursors
        for _ in range(accumulation):
            inputs, targets, cursors = next(train_batches)
            yield inputs, targets

    # -----------------------------------------------------------------------------------------------------------------
    # Loop
    wandb_run = init_wandb(config.run, "nanochat", asdict(config))
    metrics = MetricsLog(checkpoint_dir, start_step, wandb_run, config.log_every)
    portions = Portions(B)
    started = time.monotonic()

    def save(step: int) -> None:
        data = {"shards": shards, "cursors": gather_cursors(cursors)}
        save_training(checkpoint_dir, step, model, optimizers, meter, config, tokenizer, **data)

    saver = Saver(checkpoint_dir, start_step, model, meter, config.save_keep, save)
    with StopSignal() as stop, StallWatch(meter, config.log_stall_seconds):
        for step in range(start_step, num_iterations + 1):
            results: dict[str, float] = {}  # what is measured at this step
            is_last = step == num_iterations

            measures_loss = config.eval_every > 0 and (is_last or is_due(step, config.eval_every))
            measures_core = step > 0 and config.core_metric_every > 0
            measures_core = measures_core and (is_last or is_due(step, config.core_metric_every))

            saves = saver.save_or_stop(step, measures_core or is_due(step, config.save_every), is_last, stop)

            # Evaluate
            if measures_loss:
                results["val_bpb"] = evaluate_bpb(train_model, loader("val"), eval_steps, token_bytes)
                meter.note_val_bpb(results["val_bpb"])
                metrics.log(step, val_bpb=results["val_bpb"])
            if measures_core:
                with autocast(device):
                    core = evaluate_model(model, tokenizer, device, config.core_metric_max_per_task)
                results["core_metric"] = core["core_metric"]
                metrics.log(step, core_metric=core["core_metric"])
            if config.sample_every > 0 and step > 0 and (is_last or is_due(step, config.sample_every)):
                for sample in sample_completions(model, tokenizer):
                    print0(f"  {sample}")
            if saves:
                update_meta(checkpoint_dir, step, **results, meter=meter.state_dict())
            if is_last:
                break

            # One update
            meter.start_step()
            loss = accumulate_gradients(train_model, micro_batches(), config.total_batch_size, device, portions)
            multiplier = lr_multiplier(
                step / num_iterations, config.warmup_ratio, config.warmdown_ratio, config.final_lr_frac
            )
            norms = {} if is_due(step + 1, config.log_norms_every) else None
            grad_norm = step_optimizers(optimizers, multiplier, muon_momentum(step), config.grad_clip, norms)
            meter.end_step(loss, config.total_batch_size)
            saver.check(step, loss, grad_norm)
            metrics.log_step(step + 1, num_iterations, meter, loss, multiplier, norms, grad_norm=grad_norm)

    # -----------------------------------------------------------------------------------------------------------------
    # Finish
    print0(f"{format_seconds(time.monotonic() - started)} in this process")
    get_report().log(
        "base_train",
        [
            config,
            {
                "parameters": num_params,
                "flops_per_token": f"{flops_per_token:.3e}",
                "iterations": num_iterations,
                "training_tokens": total_tokens,
                "tokens_per_parameter": round(total_tokens / num_params, 2),
                "processes": world_size,
                "schedule": f"warm-up {config.warmup_ratio:.0%}, warm-down {config.warmdown_ratio:.0%} of the steps, "
                f"to {config.final_lr_frac:g} of the rates",
            },
            {
                "min_val_bpb": meter.min_val_bpb,
                "val_bpb": results.get("val_bpb"),
                "core_metric": results.get("core_metric"),
                "total_flops": f"{flops_per_token * total_tokens:.3e}",
                **meter.report(),
                "metrics_path": str(metrics.path),
            },
        ],
    )
    wandb_run.finish()
    return {"loss": meter.loss, **results}


if __name__ == "__main__":
    main(parse(Config))
