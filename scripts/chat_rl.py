"""Reinforcement learning: the finetuned model practises word problems whose answers can be checked.

    python -m scripts.chat_rl --examples_per_step=2 --num_samples=4 --num_iterations=3
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --run=d20

Reads chatsft_checkpoints/ and task_data/; writes chatrl_checkpoints/<model_tag>/ and report/chat_rl.md. On-policy
REINFORCE (Williams, 1992), pared down from GRPO (arXiv 2402.03300): several samples answer each question, the advantage
of a sample is its reward minus the mean of its question's, and the log-probability of each sampled token is raised in
proportion. One update for each batch of samples, so there is no ratio and no clip; no reference model, so there is no
KL term; the loss is normalised over all tokens of a step (DAPO, arXiv 2503.14476). What the tool wrote is not trained.

A sample depends on the seed, the step, the question and its number alone, whatever the number of processes. A run that
was interrupted or killed is taken up again by the same command.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from nanochat.checkpoint_manager import checkpoint_root, load_model, resume_training, save_training, update_meta
from nanochat.common import (
    UserError,
    all_reduce_sum,
    autocast,
    compute_init,
    get_dist_info,
    init_wandb,
    print0,
    print_banner,
    user_errors,
)
from nanochat.configurator import opt, parse
from nanochat.dataloader import Row, count_targets, padded_batches
from nanochat.engine import Engine, Request
from nanochat.guard import Saver, StallWatch
from nanochat.plan import fit_batch_size
from nanochat.report import get_report
from nanochat.task_eval import evaluate_task, reply_text
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
from tasks.mixtures import find_recipe, rl_task


@dataclass
class Config:
    run: str = opt("dummy", "name of the wandb run; 'dummy' logs nothing")
    device_type: str = opt("", "cuda, mps or cpu; empty finds the best there is")
    seed: int = opt(42, "seed of the samples")
    # Model
    source: str = opt("sft", "stage to start from: sft or mid", choices=("sft", "mid"))
    model_tag: str = opt("", "model to start from; empty is the largest")
    step: int = opt(-1, "its checkpoint step; -1 is the last")
    # Horizon
    num_epochs: int = opt(1, "times through the questions")
    num_iterations: int = opt(-1, "optimizer steps; -1 is num_epochs")
    # Samples
    examples_per_step: int = opt(16, "questions per optimizer step, over all ranks")
    num_samples: int = opt(16, "samples a question")
    max_new_tokens: int = opt(256, "longest sample")
    temperature: float = opt(1.0, "of the sampling")
    top_k: int = opt(50, "sample among the k likeliest tokens; 0 is off")
    rollout_batch_size: int = opt(128, "sequences per rank that are generated at once")
    # Optimization
    device_batch_size: int = opt(8, "rows per rank and micro-batch; -1 is the most that fit the device")
    embedding_lr: float = opt(0.2, "learning rate of wte (AdamW)")
    unembedding_lr: float = opt(0.004, "learning rate of lm_head (AdamW)")
    matrix_lr: float = opt(0.02, "learning rate of the matrices (Muon)")
    weight_decay: float = opt(0.0, "weight decay of AdamW; 0 is off")
    init_lr_frac: float = opt(0.05, "where the rates begin, as a share of these; they fall to 0")
    # Evaluation
    eval_every: int = opt(60, "steps between evaluations of pass@k; -1 is off")
    eval_examples: int = opt(400, "problems of an evaluation")
    eval_samples: int = opt(8, "samples a problem: pass@1 to pass@8")
    # Output
    output_tag: str = opt("", "name of the checkpoint folder; empty is the model's")
    save_every: int = opt(60, "steps between checkpoints; -1 saves at the end only")
    save_keep: int = opt(2, "how many checkpoints to keep; -1 is all")
    log_every: int = opt(1, "steps between lines of the log; -1 is off")
    log_norms_every: int = opt(100, "steps between norms of each group's gradient and update; -1 is off")
    log_stall_seconds: float = opt(600.0, "without a step, after which every rank's stack is written; -1 is off")
    resume: str = opt("auto", "take up an unfinished run of these settings, or start anew", choices=("auto", "never"))


class Rollouts(NamedTuple):
    """What this rank sampled for one optimizer step."""

    rows: list[Row]  # those that have something to teach, the advantage as their weight
    num_targets: int  # sampled tokens of all rows, whether they teach or not
    rewards: list[float]


def sample_rollouts(model: Any, tokenizer: Any, task: Any, step: int, config: Config) -> Rollouts:
    """Answer this rank's questions of a step, each num_samples times, and weigh the answers. Local."""
    _, rank, _, world_size = get_dist_info()
    first = step * config.examples_per_step
    numbers = range(first + rank, first + config.examples_per_step, world_size)  # of the questions of the whole run
    conversations = [task[number % len(task)] for number in numbers]
    settings = (config.max_new_tokens, config.temperature, config.top_k)
    requests = [
        Request(tokenizer.render_for_completion(conversation), *settings, f"{config.seed}/{step}/{number}/{sample}")
        for number, conversation in zip(numbers, conversations, strict=True)
        for sample in range(config.num_samples)
    ]
    completions = Engine(model, tokenizer).complete(requests, config.rollout_batch_size)
    rows, rewards, num_targets = [], [], 0
    for number, conversation in enumerate(conversations):
        samples = completions[number * config.num_samples : (number + 1) * config.num_samples]
        own = [task.reward(conversation, reply_text(tokenizer, sample.tokens)) for sample in samples]
        mean = sum(own) / len(own)
        for sample, reward in zip(samples, own, strict=True):
            prompt = list(sample.request.tokens)
            row = Row([*prompt, *sample.tokens], [0] * len(prompt) + sample.masks, weight=reward - mean)
            num_targets += count_targets([row])
            if row.weight != 0.0:  # the others add nothing to the gradient
                rows.append(row)
        rewards += own
    return Rollouts(rows, num_targets, rewards)


@user_errors
def main(config: Config) -> dict[str, float]:
    """Train, evaluate, save; return the final metrics."""
    # -----------------------------------------------------------------------------------------------------------------
    # Setup
    print_banner()
    runtime = compute_init(config.device_type)
    device = runtime.device
    for name in ("examples_per_step", "max_new_tokens", "rollout_batch_size", "eval_samples"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name}={getattr(config, name)} must be at least 1")
    if config.num_samples < 2:
        raise UserError(
            f"--num_samples={config.num_samples}: samples are compared with each other, 2 or more are wanted"
        )
    if config.temperature <= 0 or config.top_k < 0:
        raise UserError("--temperature must be above 0, or all samples are the same, and --top_k not negative")

    # -----------------------------------------------------------------------------------------------------------------
    # Model and optimizer, and the state of a run that is taken up again
    model, tokenizer, source_meta = load_model(config.source, device, "train", config.model_tag, config.step)
    most_tokens = config.examples_per_step * config.num_samples * model.config.sequence_len
    B = fit_batch_size(config.device_batch_size, model.config, most_tokens, device)
    optimizers = model.setup_optimizers(
        config.unembedding_lr, config.embedding_lr, config.matrix_lr, config.weight_decay
    )
    meter = TrainMeter(model.estimate_flops(), device)  # sets no bound: what shows a collapse is the reward
    checkpoint_dir = checkpoint_root("rl") / (config.output_tag or source_meta["model_tag"])
    origin = source_meta["origin"]
    start_step, _ = resume_training(checkpoint_dir, model, optimizers, meter, config, tokenizer, origin)

    # -----------------------------------------------------------------------------------------------------------------
    # Data
    recipe = find_recipe()
    task, eval_task = rl_task(recipe, "train"), rl_task(recipe, "test")
    num_iterations = count_epoch_iterations(
        config.num_iterations, config.num_epochs, len(task), config.examples_per_step
    )
    print0(
        f"{len(task):,} questions ({task.name}), {num_iterations:,} steps of {config.examples_per_step} questions "
        f"x {config.num_samples} samples"
    )

    # -----------------------------------------------------------------------------------------------------------------
    # Loop
    wandb_run = init_wandb(config.run, "nanochat-rl", asdict(config))
    metrics = MetricsLog(checkpoint_dir, start_step, wandb_run, config.log_every)
    portions = Portions(B)
    pad_token = tokenizer.encode_special("<|assistant_end|>")

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
                with autocast(device):
                    result = evaluate_task(
                        eval_task,
                        model,
                        tokenizer,
                        config.eval_examples,
                        config.rollout_batch_size,
                        config.eval_samples,
                        config.max_new_tokens,
                        temperature=1.0,
                        top_k=config.top_k,
                    )
                results = {f"pass@{k}": value for k, value in result.pass_at.items()}
                metrics.log(step, **results)
            if saves:
                update_meta(checkpoint_dir, step, **results, meter=meter.state_dict())
            if is_last:
                break

            # Sample
            meter.start_step()
            began = time.perf_counter()
            with autocast(device):
                rollouts = sample_rollouts(model, tokenizer, task, step, config)
            rollout_seconds = time.perf_counter() - began
            num_targets = all_reduce_sum(rollouts.num_targets)
            num_rewards = all_reduce_sum(len(rollouts.rewards))
            reward = all_reduce_sum(sum(rollouts.rewards)) / num_rewards

            # One update. Where all samples of each question are equally good there is nothing to learn from, and
            # momentum alone should not move the weights
            loss = grad_norm = 0.0
            norms = {} if is_due(step + 1, config.log_norms_every) else None
            multiplier = config.init_lr_frac * lr_multiplier(step / num_iterations, warmdown_ratio=1.0)
            if all_reduce_sum(len(rollouts.rows)) > 0:
                micro_batches = padded_batches(rollouts.rows, B, pad_token, device)
                loss = accumulate_gradients(model, micro_batches, num_targets, device, portions)
                grad_norm = step_optimizers(optimizers, multiplier, momentum=0.95, group_norms=norms)
            meter.end_step(loss, num_targets)
            saver.check(step, loss, grad_norm)
            extra = {"grad_norm": grad_norm, "reward": reward, "sample_tokens": num_targets / num_rewards}
            extra["rollout_seconds"] = rollout_seconds
            metrics.log_step(step + 1, num_iterations, meter, loss, multiplier, norms, **extra)

    # -----------------------------------------------------------------------------------------------------------------
    # Finish
    get_report().log(
        "chat_rl",
        [
            config,
            {
                "started_from": f"{origin['source']} {origin['model_tag']}, step {origin['step']}",
                "questions": len(task),
                "iterations": num_iterations,
                "samples": num_iterations * config.examples_per_step * config.num_samples,
                "processes": runtime.world_size,
            },
            {**results, **meter.report(), "metrics_path": str(metrics.path)},
        ],
    )
    wandb_run.finish()
    return {"loss": meter.loss, **results}


if __name__ == "__main__":
    main(parse(Config))
