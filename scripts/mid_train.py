"""Midtraining: the base model learns conversations, multiple choice and tools, on packed rows.

    python -m scripts.mid_train --max_seq_len=512 --device_batch_size=8 --total_batch_size=8192 --num_iterations=50
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train -- --run=d20

Reads base_checkpoints/ and task_data/; writes mid_checkpoints/<model_tag>/ and report/mid_train.md. It trains for one
epoch of the mixture (tasks/mixtures.py), or for num_iterations steps; the learning rates follow the progress through
it. A run that was interrupted or killed is taken up again by the same command.
"""

from dataclasses import asdict, dataclass

from nanochat.checkpoint_manager import checkpoint_root, load_model, resume_training, save_training, update_meta
from nanochat.common import compile_model, compute_init, init_wandb, print0, print_banner, user_errors
from nanochat.configurator import opt, parse
from nanochat.dataloader import DATA_LANES, conversation_data_loader, count_conversations, gather_cursors
from nanochat.guard import Saver, StallWatch
from nanochat.loss_eval import evaluate_bpb
from nanochat.plan import fit_batch_size
from nanochat.report import get_report
from nanochat.tokenizer import get_token_bytes
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
    step_optimizers,
)
from tasks.mixtures import find_recipe, mid_train_mixture, mid_val_mixture


@dataclass
class Config:
    run: str = opt("dummy", "name of the wandb run; 'dummy' logs nothing")
    device_type: str = opt("", "cuda, mps or cpu; empty finds the best there is")
    # Model and data
    model_tag: str = opt("", "base model to start from; empty is the largest")
    step: int = opt(-1, "its checkpoint step; -1 is the last")
    max_seq_len: int = opt(2048, "tokens a row")
    data: str = opt("", "JSONL files of conversations of one's own to add, joined by commas; empty is none")
    # Horizon
    num_iterations: int = opt(-1, "optimizer steps; -1 is one epoch")
    # Optimization
    device_batch_size: int = opt(32, "rows per rank and micro-batch; -1 is the most that fit the device")
    total_batch_size: int = opt(524_288, "tokens per optimizer step, over all ranks")
    embedding_lr: float = opt(0.2, "learning rate of wte (AdamW)")
    unembedding_lr: float = opt(0.004, "learning rate of lm_head (AdamW)")
    matrix_lr: float = opt(0.02, "learning rate of the matrices (Muon)")
    weight_decay: float = opt(0.0, "weight decay of AdamW; 0 is off")
    init_lr_frac: float = opt(1.0, "where the rates begin, as a share of these")
    warmdown_ratio: float = opt(0.2, "share of the training in which the rates fall to 0")
    data_lanes: int = opt(DATA_LANES, "streams into which the data is dealt; a multiple of the processes")
    compile: int = opt(-1, "torch.compile: 1 yes, 0 no, -1 on CUDA only")
    # Evaluation
    eval_every: int = opt(150, "steps between evaluations of val bits per byte; -1 is off")
    eval_tokens: int = opt(20 * 524_288, "tokens of an evaluation")
    # Output
    output_tag: str = opt("", "name of the checkpoint folder; empty is the base model's")
    save_every: int = opt(-1, "steps between checkpoints; -1 saves at the end only")
    save_keep: int = opt(2, "how many checkpoints to keep; -1 is all")
    log_every: int = opt(1, "steps between lines of the log; -1 is off")
    log_norms_every: int = opt(100, "steps between norms of each group's gradient and update; -1 is off")
    log_stall_seconds: float = opt(600.0, "without a step, after which every rank's stack is written; -1 is off")
    resume: str = opt("auto", "take up an unfinished run of these settings, or start anew", choices=("auto", "never"))


@user_errors
def main(config: Config) -> dict[str, float]:
    """Train, evaluate, save; return the final metrics."""
    # -----------------------------------------------------------------------------------------------------------------
    # Setup
    print_banner()
    runtime = compute_init(config.device_type)
    device, world_size = runtime.device, runtime.world_size
    T, lanes = config.max_seq_len, config.data_lanes

    # -----------------------------------------------------------------------------------------------------------------
    # Model and optimizer, and the state of a run that is taken up again
    model, tokenizer, base_meta = load_model("base", device, "train", config.model_tag, config.step)
    token_bytes = get_token_bytes(device)
    model.config.sequence_len = T
    B = fit_batch_size(config.device_batch_size, model.config, config.total_batch_size, device)
    accumulation = gradient_accumulation_steps(config.total_batch_size, B, T, world_size, lanes)
    eval_steps = evaluation_steps(config.eval_tokens, B, T, world_size, lanes)
    optimizers = model.setup_optimizers(
        config.unembedding_lr, config.embedding_lr, config.matrix_lr, config.weight_decay
    )
    meter = TrainMeter(model.estimate_flops(), device, model.config.vocab_size)
    checkpoint_dir = checkpoint_root("mid") / (config.output_tag or base_meta["model_tag"])
    recipe = find_recipe()
    train_task = mid_train_mixture(recipe, config.data)
    num_conversations = len(train_task)
    # the cursors are positions in these conversations
    origin = {**base_meta["origin"], "conversations": num_conversations, "files": train_task.fingerprint()}
    start_step, meta = resume_training(checkpoint_dir, model, optimizers, meter, config, tokenizer, origin)
    cursors = {int(lane): cursor for lane, cursor in meta["cursors"].items()} if start_step else None
    train_model = compile_model(model, config.compile)

    # -----------------------------------------------------------------------------------------------------------------
    # Data
    print0(f"{num_conversations:,} conversations of the {recipe} mixture")
    train_batches = meter.watch_data(conversation_data_loader(B, T, train_task, tokenizer, lanes, device, cursors))
    val_task = mid_val_mixture(recipe) if config.eval_every > 0 else None

    def micro_batches():
        """One optimizer step's (inputs, targets); leaves the position in the data in cursors."""
        nonlocal cursors
        for _ in range(accumulation):
            inputs, targets, cursors = next(train_batches)
            yield inputs, targets

    def measure_progress(step: int) -> float:
        """How much of the training is done, 0 to 1. Every rank must call."""
        if config.num_iterations > 0:
            return step / config.num_iterations
        own = {lane: cursors[lane] for lane in range(runtime.rank, lanes, world_size)} if cursors else None
        return min(1.0, count_conversations(own, num_conversations, lanes) / num_conversations)

    # -----------------------------------------------------------------------------------------------------------------
    # Loop
    wandb_run = init_wandb(config.run, "nanochat-mid", asdict(config))
    metrics = MetricsLog(checkpoint_dir, start_step, wandb_run, config.log_every)
    portions = Portions(B)

    def save(step: int) -> None:
        data = {"cursors": gather_cursors(cursors), "origin": origin}
        save_training(checkpoint_dir, step, model, optimizers, meter, config, tokenizer, **data)

    saver = Saver(checkpoint_dir, start_step, model, meter, config.save_keep, save)
    with StopSignal() as stop, StallWatch(meter, config.log_stall_seconds):
        step = start_step
        while True:
            results: dict[str, float] = {}  # what is measured at this step
            progress = measure_progress(step)
            is_last = progress >= 1.0

            saves = saver.save_or_stop(step, is_due(step, config.save_every), is_last, stop)

            # Evaluate
            if config.eval_every > 0 and (is_last or is_due(step, config.eval_every)):
                val_batches = conversation_data_loader(B, T, val_task, tokenizer, lanes, device)
                results["val_bpb"] = evaluate_bpb(train_model, val_batches, eval_steps, token_bytes)
                meter.note_val_bpb(results["val_bpb"])
                metrics.log(step, val_bpb=results["val_bpb"])
            if saves:
                update_meta(checkpoint_dir, step, **results, meter=meter.state_dict())
            if is_last:
                break

            # One update
            meter.start_step()
            loss = accumulate_gradients(train_model, micro_batches(), config.total_batch_size, device, portions)
            multiplier = config.init_lr_frac * lr_multiplier(progress, warmdown_ratio=config.warmdown_ratio)
            norms = {} if is_due(step + 1, config.log_norms_every) else None
            grad_norm = step_optimizers(optimizers, multiplier, muon_momentum(step), 0.0, norms)
            meter.end_step(loss, config.total_batch_size)
            saver.check(step, loss, grad_norm)
            step += 1
            progress_now = measure_progress(step)
            num_steps = max(step, round(step / progress_now)) if progress_now else step
            extra = {"grad_norm": grad_norm, "progress": progress}
            metrics.log_step(step, num_steps, meter, loss, multiplier, norms, **extra)

    # -----------------------------------------------------------------------------------------------------------------
    # Finish
    get_report().log(
        "mid_train",
        [
            config,
            {
                "base_model": f"{origin['model_tag']}, step {origin['step']}",
                "conversations": num_conversations,
                "iterations": step,
                "training_tokens": step * config.total_batch_size,
                "processes": world_size,
            },
            {
                "min_val_bpb": meter.min_val_bpb,
                "val_bpb": results.get("val_bpb"),
                **meter.report(),
                "metrics_path": str(metrics.path),
            },
        ],
    )
    wandb_run.finish()
    return {"loss": meter.loss, **results}


if __name__ == "__main__":
    main(parse(Config))
