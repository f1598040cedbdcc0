#!/usr/bin/env bash
# The whole pipeline, from a bare machine to a model to talk to and its report card, on a node of GPUs.
#
#   bash speedrun.sh                 about 4 hours on 8 x H100; without a GPU the pocket recipe, runs/pocket.sh: minutes
#   WANDB_RUN=d20 bash speedrun.sh   with curves in Weights & Biases (`wandb login` first)
#   RL=1 bash speedrun.sh            with reinforcement learning at the end, which the pocket recipe always has
#   FRESH=1 bash speedrun.sh         run the finished stages again, too
#   DATA=mine.jsonl bash speedrun.sh add conversations of your own to midtraining and finetuning
#
# Run a second time it skips what is done and takes up what was interrupted from its last checkpoint. Everything is
# written to NANOCHAT_BASE_DIR, ~/.cache/nanochat unless it is set. RECIPE=pocket or RECIPE=speedrun chooses the recipe;
# DEPTH and NUM_SHARDS make a smaller model. Without WANDB_RUN nothing leaves the machine. Several hosts start it with
# runs/multinode.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/runs/setup.sh"

# ----------------------------------------------------------------------------------------------------------------------
# Which recipe, and on how many GPUs

DEVICE=$(python -c 'from nanochat.common import autodetect_device_type; print(autodetect_device_type())')
case "$DEVICE" in cuda) DEFAULT_RECIPE=speedrun ;; *) DEFAULT_RECIPE=pocket ;; esac
RECIPE=${RECIPE:-$DEFAULT_RECIPE}
case "$RECIPE" in
speedrun) ;;
pocket) exec bash "$(dirname "${BASH_SOURCE[0]}")/runs/pocket.sh" ;;
*)
    echo "error: RECIPE=$RECIPE is neither speedrun nor pocket" >&2
    exit 2
    ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/runs/stage.sh"

WANDB_RUN=${WANDB_RUN:-dummy}
DEPTH=${DEPTH:-20}

# One process a GPU, and as many rows per micro-batch as its memory holds: 32 on 80 GB, fewer on smaller GPUs, where
# more micro-batches make an optimizer step. Where the model does not fit at all it stops, before any download.
PLAN=$(python -m nanochat.plan --depth="$DEPTH")
read -r NUM_PROCESSES DEVICE_BATCH_SIZE <<<"$PLAN"

# On several hosts (runs/multinode.sh) a step of 256 rows has fewer for each process, and more than 8 processes want as
# many lanes of data
IN_ALL=$((NUM_HOSTS * NUM_PROCESSES))
[ $((IN_ALL * DEVICE_BATCH_SIZE)) -le 256 ] || DEVICE_BATCH_SIZE=$((256 / IN_ALL))
LANES=
[ "$IN_ALL" -le 8 ] || LANES="--data_lanes=$IN_ALL"
echo "depth $DEPTH on $DEVICE: $IN_ALL process(es), $DEVICE_BATCH_SIZE rows each; results in $NANOCHAT_BASE_DIR"

# ----------------------------------------------------------------------------------------------------------------------
# The report starts with the time, the machine and the code

stage report_reset "" "report/header.json" python -m nanochat.report reset

# ----------------------------------------------------------------------------------------------------------------------
# Text: how much of it
#
#   561M parameters x 20 tokens a parameter (Chinchilla, arXiv 2203.15556)  = 11.2B tokens
#   11.2B tokens x 4.8 characters a token (this tokenizer on English text)  = 54B characters
#   54B characters / 250M characters a shard                                = 216 shards, and some to spare: 240
#
# A shard is about 100 MB, so that is 24 GB. The first eight (2B characters) are enough for the tokenizer; the others
# arrive while it trains. A base_data/ that one has filled oneself is used as it is: with parquet files of one's own,
# without a source.json, or by `python -m nanochat.dataset` from another source.

NUM_SHARDS=${NUM_SHARDS:-240}
TEXT="$NANOCHAT_BASE_DIR/base_data"
DOWNLOAD=
if ls "$TEXT"/*.parquet >/dev/null 2>&1 && ! grep -qsE '"source": "(fineweb-edu|pocket)"' "$TEXT"/source.json &&
    ! [ -e "$TEXT/source.json.unfinished" ]; then
    echo "training on your own parquet files in $TEXT"
elif [ "$IS_WRITER" = 1 ]; then # otherwise another host fills the folder that they share
    python -m nanochat.dataset -n 8
    python -m nanochat.dataset -n "$NUM_SHARDS" &
    DOWNLOAD=$!
    trap 'kill "$DOWNLOAD" 2>/dev/null || true' EXIT
fi

# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer: 65,536 tokens, learned from 2B characters

stage tok_train "base_data/source.json" "tokenizer/tokenizer.json tokenizer/token_bytes.pt" \
    python -m scripts.tok_train --max_chars=2e9 --max_shards=8 --vocab_size=65536
stage tok_eval "base_data/source.json tokenizer/tokenizer.json" "report/tokenizer.json" python -m scripts.tok_eval

# ----------------------------------------------------------------------------------------------------------------------
# Base model: depth 20 is 561M parameters, 3.5 GFLOPs a token and 4e19 FLOPs in all: 3 hours on 8 x H100

if [ -n "$DOWNLOAD" ]; then
    echo "waiting for the other shards"
    if ! wait "$DOWNLOAD"; then
        echo "error: not all shards arrived, see above; \`bash speedrun.sh\` goes on from here" >&2
        exit 1
    fi
    trap - EXIT
fi

CHECKPOINT="base_checkpoints/d$DEPTH/meta_*.json"
stage base_train "base_data/source.json tokenizer/tokenizer.json" "$CHECKPOINT" \
    on_all_gpus -m scripts.base_train -- --depth="$DEPTH" --device_batch_size="$DEVICE_BATCH_SIZE" $LANES \
    --save_every=1000 --run="$WANDB_RUN" --resume=auto
stage base_loss "base_data/source.json $CHECKPOINT" "report/base_loss.json" \
    on_all_gpus -m scripts.base_loss -- --model_tag="d$DEPTH" --device_batch_size="$DEVICE_BATCH_SIZE" $LANES
stage base_eval "eval_bundle/core.yaml $CHECKPOINT" "report/base_eval.json" \
    on_all_gpus -m scripts.base_eval -- --model_tag="d$DEPTH"

# ----------------------------------------------------------------------------------------------------------------------
# Midtraining: one epoch of conversations, multiple choice, word problems and spelling, 850K examples in all. The task
# data are fetched from the hub by the stages that need them

MID="mid_checkpoints/d$DEPTH/meta_*.json"
stage mid_train "$CHECKPOINT" "$MID" \
    on_all_gpus -m scripts.mid_train -- --model_tag="d$DEPTH" --device_batch_size="$DEVICE_BATCH_SIZE" $LANES \
    --data="$DATA" --save_every=250 --run="$WANDB_RUN" --resume=auto
stage chat_eval_mid "$MID" "report/chat_eval_mid.json" \
    on_all_gpus -m scripts.chat_eval -- -i mid --model_tag="d$DEPTH" --batch_size=64

# ----------------------------------------------------------------------------------------------------------------------
# Supervised finetuning: one epoch of 23K conversations, each in a row of its own, as it will be in a chat

SFT="chatsft_checkpoints/d$DEPTH/meta_*.json"
stage chat_sft "$MID" "$SFT" \
    on_all_gpus -m scripts.chat_sft -- --model_tag="d$DEPTH" --data="$DATA" --save_every=250 --run="$WANDB_RUN" \
    --resume=auto
stage chat_eval_sft "$SFT" "report/chat_eval_sft.json" \
    on_all_gpus -m scripts.chat_eval -- -i sft --model_tag="d$DEPTH" --batch_size=64

# ----------------------------------------------------------------------------------------------------------------------
# Reinforcement learning on GSM8K, with RL=1: 467 steps of 16 questions x 16 samples

if [ "${RL:-0}" = 1 ]; then
    RL_CHECKPOINT="chatrl_checkpoints/d$DEPTH/meta_*.json"
    stage chat_rl "$SFT" "$RL_CHECKPOINT" \
        on_all_gpus -m scripts.chat_rl -- --model_tag="d$DEPTH" --run="$WANDB_RUN" --resume=auto
    stage chat_eval_rl "$RL_CHECKPOINT" "report/chat_eval_rl.json" \
        on_all_gpus -m scripts.chat_eval -- -i rl -a GSM8K --model_tag="d$DEPTH" --batch_size=64
fi

# ----------------------------------------------------------------------------------------------------------------------
# The report card: report.md, here and in the base directory

[ "$IS_WRITER" = 0 ] || python -m nanochat.report generate
echo "talk to it:  source .venv/bin/activate; python -m scripts.chat_cli   or, in a browser:  python -m scripts.chat_web"
