"""Supervised finetuning: the midtrained model learns to answer, on conversations in rows of their own.

    python -m scripts.chat_sft --num_iterations=50
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --run=d20

Reads mid_checkpoints/ and task_data/; writes chatsft_checkpoints/<model_tag>/ and report/chat_sft.md. The loss is on
what the assistant says, tool output excepted: the mean over all such tokens of an optimizer step, however its
conversations are dealt out. A run that was interrupted or killed is taken up again by the same command.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanochat.checkpoint_manager import checkpoint_root, load_model, resume_training, save_training, update_meta
from nanochat.common import UserError, autocast, compute_init, init_wandb, print0, print_banner, user_errors
from nanochat.configurator import opt, parse
from nanochat.dataloader import Row, count_targets, deal_rows, padded_batches, prefetch, render_example
from nanochat.guard import Saver, StallWatch
from nanochat.loss_eval import evaluate_bpb
from nanochat.plan import fit_batch_size
from nanochat.report import get_report
from nanochat.task_eval import evaluate_task
from nanochat.tokenizer import get_token_bytes
from nanochat.train import (
    MetricsLog,
    Portions,
    StopSignal,
    TrainMeter,
    accumulate_gradients,
    count_epoch_iterations,
    is_due,
    lr_multiplier,
    step_optimizers,
)
from tasks.mixtures import SFT_METRICS, find_recipe, make_eval_task, sft_mixture, sft_val_mixture


@dataclass
class Config:
    run: str = opt("dummy", "name of the wandb run; 'dummy' logs nothing")
    device_type: str = opt("", "cuda, mps or cpu; empty finds the best there is")
    # Model and data
    source: str = opt("mid", "stage to start from: mid or base", choices=("mid", "base"))
    model_tag: str = opt("", "model to start from; empty is the largest")
    step: int = opt(-1, "its checkpoint step; -1 is the last")
    max_seq_len: int = opt(-1, "longest conversation in tokens, the rest is cut; -1 is the model's context")
    data: str = opt("", "JSONL files of conversations of one's own to add, joined by commas; empty is none")
    # Horizon
    num_epochs: int = opt(1, "times through the mixture")
    num_iterations: int = opt(-1, "optimizer steps; -1 is num_epochs")
    # Optimization
    device_batch_size: int = opt(4, "rows per rank and micro-batch; -1 is the most that fit the device")
    target_examples_per_step: int = opt(32, "conversations per optimizer step, over all ranks")
    embedding_lr: float = opt(0.2, "learning rate of wte (AdamW)")
    unembedding_lr: float = opt(0.004, "learning rate of lm_head (AdamW)")
    matrix_lr: float = opt(0.02, "learning rate of the matrices (Muon)")
    weight_decay: float = opt(0.0, "weight decay of AdamW; 0 is off")
    init_lr_frac: float = opt(0.02, "where the rates begin, as a share of these; they fall to 0")
    # Evaluation
    eval_every: int = opt(100, "steps between evaluations of val bits per byte; -1 is off")
    eval_steps: int = opt(100, "conversations of an evaluation, in units of device_batch_size (4 for -1)")
    eval_metrics_every: int = opt(200, "steps between evaluations of multiple choice tasks; -1 is off")
    eval_metrics_max_problems: int = opt(1024, "problems a task; -1 is all")
    # Output
    output_tag: str = opt("", "name of the checkpoint folder; empty is the model's")
    save_every: int = opt(-1, "steps between checkpoints; -1 saves at the end only")
    save_keep: int = opt(2, "how many checkpoints to keep; -1 is all")
    log_every: int = opt(1, "steps between lines of the log; -1 is off")
    log_norms_every: int = opt(100, "steps between norms of each group's gradient and update; -1 is off")
    log_stall_seconds: float = opt(600.0, "without a step, after which every rank's stack is written; -1 is off")
    resume: str = opt("auto", "take up an unfinished run of these settings, or start anew", choices=("auto", "never"))


def render_rows(task: Any, tokenizer: Any, indices: range, max_seq_len: int) -> list[Row]:
    """The rows of these examples of a task, which is read round and round; those without any target are left out."""
    rows = [Row(*render_example(tokenizer, task, index % len(task), max_seq_len + 1)) for index in indices]
    return [row for row in rows if any(row.mask[1:])]


@user_errors
def main(config: Config) -> dict[str, float]:
    """Train, evaluate, save; return the final metrics."""
    # -----------------------------------------------------------------------------------------------------------------
    # Setup
    print_banner()
    runtime = compute_init(config.device_type)
    device = runtime.device
    examples_per_step = config.target_examples_per_step
    for name in ("target_examples_per_step", "eval_steps"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)} must be at least 1")

    # -----------------------------------------------------------------------------------------------------------------
    # Model and optimizer, and the state of a run that is taken up again
    model, tokenizer, source_meta = load_model(config.source, device, "train", config.model_tag, config.step)
    token_bytes = get_token_bytes(device)
    max_seq_len = config.max_seq_len if config.max_seq_len > 0 else model.config.sequence_len
    longest = replace(model.config, sequence_len=max_seq_len)
    B = fit_batch_size(config.device_batch_size, longest, examples_per_step * max_seq_len, device)
    optimizers = model.setup_optimizers(
        config.unembedding_lr, config.embedding_lr, config.matrix_lr, config.weight_decay
    )
    meter = TrainMeter(model.estimate_flops(), device, model.config.vocab_size)
    checkpoint_dir = checkpoint_root("sft") / (config.output_tag or source_meta["model_tag"])
    recipe = find_recipe()
    train_task = sft_mixture(recipe, config.data)
    if not len(train_task):
        raise UserError("there are no conversations to train on")
    # a step is a position in these conversations
    origin = {**source_meta["origin"], "conversations": len(train_task), "files": train_task.fingerprint()}
    start_step, _ = resume_training(checkpoint_dir, model, optimizers, meter, config, tokenizer, origin)

    # -----------------------------------------------------------------------------------------------------------------
    # Data
    num_iterations = count_epoch_iterations(
        config.num_iterations, config.num_epochs, len(train_task), examples_per_step
    )
    print0(
        f"{len(train_task):,} conversations of the {recipe} mixture, {num_iterations:,} steps of {examples_per_step}"
    )
    metric_tasks = SFT_METRICS[recipe] if config.eval_metrics_every > 0 else ()

    def steps() -> Iterator[list[Row]]:
        """The rows of each optimizer step, those of all ranks."""
        for step in range(start_step, num_iterations):
            indices = range(step * examples_per_step, (step + 1) * examples_per_step)
            yield render_rows(train_task, tokenizer, indices, max_seq_len)

    train_rows = meter.watch_data(prefetch(steps(), 2))
    val_rows: list[Row] = []
    if config.eval_every > 0:
        val_task = sft_val_mixture(recipe)
        num_val = min(len(val_task), config.eval_steps * (B if config.device_batch_size > 0 else 4))
        val_rows = deal_rows(render_rows(val_task, tokenizer, range(num_val), max_seq_len))

    # -----------------------------------------------------------------------------------------------------------------
    # Loop
    wandb_run = init_wandb(config.run, "nanochat-sft", asdict(config))
    metrics = MetricsLog(checkpoint_dir, start_step, wandb_run, config.log_every)
    portions = Portions(B)
    pad_token = tokenizer.encode_special("<|assistant_end|>")
    num_tokens = num_targets_in_all = 0  # of this process

    def save(step: int) -> None:
        save_training(checkpoint_dir, step, model, optimizers, meter, config, tokenizer, origin=origin)

    saver = Saver(checkpoint_dir, start_step, model, meter, config.save_keep, save)
    with StopSignal() as stop, StallWatch(meter, config.log_stall_seconds):
        for step in range(start_step, num_iterations + 1):
            results: dict[str, float] = {}  # what is measured at this step
            is_last = step == num_iterations

            saves = saver.save_or_stop(step, is_due(step, config.save_every), is_last, stop)

            # Evaluate
            if config.eval_every > 0 and (is_last or is_due(step, config.eval_every)):
                val_batches = padded_batches(val_rows, B, pad_token, device)
                results["val_bpb"] = evaluate_bpb(model, val_batches, None, token_bytes)
                meter.note_val_bpb(results["val_bpb"])
            if metric_tasks and step > 0 and (is_last or is_due(step, config.eval_metrics_every)):
                for name in metric_tasks:
                    task = make_eval_task(name, recipe)
                    with autocast(device):
                        result = evaluate_task(task, model, tokenizer, config.eval_metrics_max_problems, batch_size=B)
                    results[name] = result.accuracy
            if results:
                metrics.log(step, **results)
            if saves:
                update_meta(checkpoint_dir, step, **results, meter=meter.state_dict())
            if is_last:
                break

            # One update
            meter.start_step()
            rows = next(train_rows)
            num_targets = count_targets(rows)
            batches = padded_batches(deal_rows(rows), B, pad_token, device)
            micro_batches = ((inputs, targets) for inputs, targets, _ in batches)
            loss = accumulate_gradients(model, micro_batches, num_targets, device, portions)
            multiplier = config.init_lr_frac * lr_multiplier(step / num_iterations, warmdown_ratio=1.0)
            norms = {} if is_due(step + 1, config.log_norms_every) else None
            grad_norm = step_optimizers(optimizers, multiplier, momentum=0.95, group_norms=norms)
            step_tokens = sum(len(row.tokens) - 1 for row in rows)
            meter.end_step(loss, step_tokens)
            saver.check(step, loss, grad_norm)
            metrics.log_step(step + 1, num_iterations, meter, loss, multiplier, norms, grad_norm=grad_norm)
            num_tokens, num_targets_in_all = num_tokens + step_tokens, num_targets_in_all + num_targets

    # -----------------------------------------------------------------------------------------------------------------
    # Finish
    get_report().log(
        "chat_sft",
        [
            config,
            {
                "started_from": f"{origin['source']} {origin['model_tag']}, step {origin['step']}",
                "conversations": len(train_task),
                "iterations": num_iterations,
                "training_tokens": num_tokens if start_step == 0 else None,
                "supervised_tokens": num_targets_in_all if start_step == 0 else None,
                "processes": runtime.world_size,
            },
            {
                "min_val_bpb": meter.min_val_bpb,
                "val_bpb": results.get("val_bpb"),
                **{name: results.get(name) for name in metric_tasks},
                **meter.report(),
                "metrics_path": str(metrics.path),
            },
        ],
    )
    wandb_run.finish()
    return {"loss": meter.loss, **results}


if __name__ == "__main__":
    main(parse(Config))
