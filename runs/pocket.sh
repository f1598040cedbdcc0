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

# The model: 4 blocks of 4 x 32 channels, in four heads
VOCAB_SIZE=2048
MODEL="--depth=4 --aspect_ratio=32 --head_dim=32 --max_seq_len=256"

# Steps of 32 rows x 256 tokens = 8,192 tokens; 360 of them = 2.9M tokens, nearly all of the text once
BATCH="--device_batch_size=32 --total_batch_size=8192"
NUM_ITERATIONS=360
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
# The report card: report.md, here and in the base directory

python -m nanochat.report generate
