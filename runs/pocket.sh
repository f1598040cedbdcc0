#!/usr/bin/env bash
# The whole pipeline in minutes, on a laptop without GPU or network: speedrun.sh's stages on a small generated world.
#
#   bash speedrun.sh           where there is no GPU
#   bash runs/pocket.sh        anywhere
#
# The code is the same; the settings below and the data are smaller. Scores compare with nothing but themselves.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
source "$(dirname "${BASH_SOURCE[0]}")/stage.sh"

WANDB_RUN=${WANDB_RUN:-dummy}

# The model: 4 blocks of 4 x 32 channels, in two heads (of 64: QK norm bounds the scores by the root of that)
VOCAB_SIZE=3072  # 84% of the world's answers are one token (of 2,048: 47%), and most numbers are digits
MODEL="--depth=4 --aspect_ratio=32 --head_dim=64 --max_seq_len=256"

# Steps of 32 rows x 256 tokens = 8,192 tokens; 310 of them = 2.5M tokens, the text once
BATCH="--device_batch_size=32 --total_batch_size=8192"
NUM_ITERATIONS=310
EVAL_TOKENS=65536

# ----------------------------------------------------------------------------------------------------------------------
# The report starts with the time, the machine and the code

stage report_reset "" "report/header.json" python -m nanochat.report reset

# ----------------------------------------------------------------------------------------------------------------------
# Text: 10M characters, written in seconds, with the CORE-like tasks and the chat data that go with them

stage pocket "" "base_data/source.json eval_bundle/core.yaml" python -m nanochat.pocket

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer

stage tok_train "base_data/source.json" "tokenizer/tokenizer.json tokenizer/token_bytes.pt" \
    python -m scripts.tok_train --vocab_size=$VOCAB_SIZE
stage tok_eval "base_data/source.json tokenizer/tokenizer.json" "report/tokenizer.json" python -m scripts.tok_eval

# ----------------------------------------------------------------------------------------------------------------------
# Base model

CHECKPOINT="base_checkpoints/d4/meta_*.json"
stage base_train "base_data/source.json tokenizer/tokenizer.json" "$CHECKPOINT" \
    python -m scripts.base_train $MODEL $BATCH --num_iterations=$NUM_ITERATIONS --eval_every=100 \
    --eval_tokens=$EVAL_TOKENS --core_metric_every=-1 --sample_every=-1 --save_every=100 \
    --run="$WANDB_RUN" --resume=auto
stage base_loss "base_data/source.json $CHECKPOINT" "report/base_loss.json" \
    python -m scripts.base_loss --model_tag=d4 --split_tokens=$EVAL_TOKENS
stage base_eval "eval_bundle/core.yaml $CHECKPOINT" "report/base_eval.json" \
    python -m scripts.base_eval --model_tag=d4

# ----------------------------------------------------------------------------------------------------------------------
# Midtraining: conversations, multiple choice, the calculator, and some of the text lest it be forgotten; 2M tokens

MID="mid_checkpoints/d4/meta_*.json"
CHAT_EVAL="--batch_size=128 --max_new_tokens=160"
stage mid_train "$CHECKPOINT" "$MID" \
    python -m scripts.mid_train --model_tag=d4 --max_seq_len=256 $BATCH --warmdown_ratio=0.6 \
    --eval_every=100 --eval_tokens=$EVAL_TOKENS --data="$DATA" --save_every=100 --run="$WANDB_RUN" --resume=auto
stage chat_eval_mid "$MID" "report/chat_eval_mid.json" \
    python -m scripts.chat_eval -i mid --model_tag=d4 $CHAT_EVAL

# ----------------------------------------------------------------------------------------------------------------------
# Supervised finetuning: answers, 290 steps of 64 conversations

SFT="chatsft_checkpoints/d4/meta_*.json"
stage chat_sft "$MID" "$SFT" \
    python -m scripts.chat_sft --model_tag=d4 --device_batch_size=8 --target_examples_per_step=64 \
    --init_lr_frac=0.3 --eval_every=100 --eval_steps=40 --eval_metrics_every=-1 \
    --data="$DATA" --save_every=100 --run="$WANDB_RUN" --resume=auto
stage chat_eval_sft "$SFT" "report/chat_eval_sft.json" \
    python -m scripts.chat_eval -i sft --model_tag=d4 $CHAT_EVAL

# ----------------------------------------------------------------------------------------------------------------------
# Reinforcement learning: practice with word problems of which no solution was shown, 10 steps of 128 x 8 samples

RL_CHECKPOINT="chatrl_checkpoints/d4/meta_*.json"
stage chat_rl "$SFT" "$RL_CHECKPOINT" \
    python -m scripts.chat_rl --model_tag=d4 --num_iterations=10 --examples_per_step=128 --num_samples=8 \
    --max_new_tokens=120 --rollout_batch_size=512 --device_batch_size=16 --init_lr_frac=0.2 --eval_every=-1 \
    --save_every=4 --run="$WANDB_RUN" --resume=auto
stage chat_eval_rl "$RL_CHECKPOINT" "report/chat_eval_rl.json" \
    python -m scripts.chat_eval -i rl --model_tag=d4 $CHAT_EVAL

# ----------------------------------------------------------------------------------------------------------------------
# The report card: report.md, here and in the base directory

python -m nanochat.report generate
echo "talk to it:  source .venv/bin/activate; python -m scripts.chat_cli   or, in a browser:  python -m scripts.chat_web"
