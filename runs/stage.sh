# Stages that are skipped when they are done and taken up again when they were interrupted. The recipes source it after
# setup.sh, under `set -euo pipefail`. It settles the base directory and moves to the checkout.
#
#   stage NAME "READS" "WRITES" COMMAND [ARGUMENT ...]
#
# READS are the small files by which one input differs from another, WRITES those by which a stage's results are known
# to be there (at least one): patterns relative to the base directory, and of several matches the last one counts. A
# training stage lists as READS only what earlier stages made, not what it fetches itself.
#
# A stage's identity is its command line and the content of what it reads, the file that --data names included. Before
# the command runs it is written to stages/NAME.started, afterwards to stages/NAME.done.
# - NAME.done tells the same identity and WRITES are there: the stage is skipped.
# - Otherwise it runs. `--resume=auto` on its command line becomes `--resume=never`, which replaces what is there, when
#   a record tells another identity; it stays when the stage was interrupted, or was never run by a recipe.
#
# FRESH=1 forgets the records: every stage runs again and replaces its own results. Downloads stay.
#
# On several hosts (runs/multinode.sh) each of them runs the recipe. A stage on all GPUs is one run over all hosts, which
# decide together: it is skipped where all have finished it. What is one process runs once for each base directory.

# DATA, a JSONL file of conversations of one's own, is named from where the recipe was started
DATA=${DATA:-}
case "$DATA" in "" | /*) ;; *) DATA="$PWD/$DATA" ;; esac
[ -z "$DATA" ] || [ -f "$DATA" ] || {
    echo "error: DATA=$DATA is no file: a JSONL file of conversations is wanted, one a line" >&2
    exit 2
}

NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR/#\~\//$HOME/}"
STAGES="$NANOCHAT_BASE_DIR/stages"
mkdir -p "$STAGES"
STAGES="$(cd "$STAGES" && pwd)"
export NANOCHAT_BASE_DIR="${STAGES%/stages}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${FRESH:-0}" = 1 ]; then
    for record in "$STAGES"/*.started "$STAGES"/*.done; do
        [ ! -e "$record" ] || mv "$record" "${record%.*}.forgotten"
    done
fi

# Print DECISION about a stage as all hosts take it (never if one says never, else auto if one does, else skip), and 1
# where this host is the one that writes its base directory, 0 where another does
agree() { # NAME DECISION
    RANK=$GROUP_RANK WORLD_SIZE=$NUM_HOSTS LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 \
        TORCHELASTIC_USE_AGENT_STORE=True TORCHELASTIC_RESTART_COUNT="to agree on $1" python - "$2" <<'EOF'
import sys

from nanochat.common import compute_cleanup, compute_init, gather_objects, is_writer

compute_init("cpu")
decisions = [decision for writes, decision in gather_objects((is_writer(), sys.argv[1])) if writes]
print(next(decision for decision in ("never", "auto", "skip") if decision in decisions), int(is_writer()))
compute_cleanup()
EOF
}

# Serve the store in which the hosts meet at each stage, for as long as this script runs. In the background only
serve_store() {
    exec python - "$MASTER_PORT" "$$" <<'EOF'
import os, sys, time

from torch.distributed import TCPStore

port, script = map(int, sys.argv[1:])
store = TCPStore("localhost", port, is_master=True, wait_for_workers=False)
while os.getppid() == script:
    time.sleep(5)  # the other hosts may take a moment longer
EOF
}

NUM_HOSTS=${GROUP_WORLD_SIZE:-1} # torchrun says so
IS_WRITER=1
if [ "$NUM_HOSTS" -gt 1 ]; then
    unset RANK WORLD_SIZE # of this script among those of the other hosts: what it starts is something else
    trap 'exit 143' TERM  # not before what it started has ended, or the next attempt would meet it on the GPUs
    [ "$GROUP_RANK" != 0 ] || serve_store &
    IS_WRITER=$(agree hosts skip)
    IS_WRITER=${IS_WRITER#* }
fi

# stage NAME "READS" "WRITES" COMMAND [ARGUMENT ...]; ends the script when the command fails
stage() {
    local name=$1 reads=$2 writes=$3 record="$STAGES/$1" identity resume code=0 began=$SECONDS word
    shift 3
    [ "$IS_WRITER" = 1 ] || [ "$1" = on_all_gpus ] || return 0
    identity=$(describe_stage "$reads" "$@")
    if is_same "$record.done" "$identity" && [ -n "$(newest "$writes")" ]; then
        resume=skip
    else
        resume=$(choose_resume "$record" "$identity" "$writes")
    fi
    if [ "$NUM_HOSTS" -gt 1 ] && [ "$1" = on_all_gpus ]; then
        resume=$(agree "$name" "$resume")
        resume=${resume% *}
    fi
    if [ "$resume" = skip ]; then
        echo "== $name: skipped, $(head -n 1 "$record.done")"
        return 0
    fi

    if [ "$IS_WRITER" = 0 ]; then
        : # the records are the writer's
    elif ! is_same "$record.started" "$identity"; then # an interrupted stage keeps the record of its first start
        write_record "$record.started" "resume=$resume, started on $(date '+%Y-%m-%d %H:%M:%S')" "$identity"
    fi
    [ "$IS_WRITER" = 0 ] || rm -f "$record.done" "$record.forgotten"
    for word in "$@"; do
        shift
        [ "$word" != --resume=auto ] || word="--resume=$resume"
        set -- "$@" "$word"
    done

    echo "== $name: $*"
    STAGE=$name
    "$@" || code=$?
    if [ "$code" -ne 0 ]; then
        echo "== $name: stopped with status $code; run the same command again to go on from here, or first" \
            "\`mv '$record.started' '$record.forgotten'\` to start this stage anew" >&2
        exit "$code"
    fi
    [ "$IS_WRITER" = 1 ] || return 0
    case "$identity" in *"absent "*) identity=$(describe_stage "$reads" "$@") ;; esac # it fetched that itself
    write_record "$record.done" "done on $(date '+%Y-%m-%d %H:%M:%S') in $((SECONDS - began)) s" "$identity"
    rm -f "$record.started"
}

# Print auto or never, the way in which a training stage treats what an earlier run of it left
choose_resume() { # RECORD IDENTITY WRITES
    if is_same "$1.started" "$2"; then
        # Started anew and stopped before it saved anything: what is there is still what it was to replace
        case "$(head -n 1 "$1.started")" in
        resume=never*) [ "$(newest "$3")" -nt "$1.started" ] || { echo never && return 0; } ;;
        esac
        echo auto
    elif [ -e "$1.started" ] || [ -e "$1.done" ] || [ -e "$1.forgotten" ]; then
        echo never
    else
        echo auto
    fi
}

# Print what makes a stage the same stage: its command, without what says where it runs, and the sha256 of each input
describe_stage() { # READS COMMAND [ARGUMENT ...]
    local reads=$1 word data=
    shift
    for word in "$@"; do
        case "$word" in --data=*) data=${word#--data=} ;; esac
        case "$word" in
        # --data_lanes changes the result: an interrupted run refuses to go on with others, a finished one stays
        --run=* | --resume=* | --device_batch_size=* | --data_lanes=* | --save_* | --log_* | --eval_* | --sample_* | --core_metric_*) ;;
        *) printf '%s ' "$word" ;;
        esac
    done
    printf '\n'
    python - "$NANOCHAT_BASE_DIR" "$reads" "$data" <<'EOF'
import glob, hashlib, os, sys

os.chdir(sys.argv[1])
for pattern in [*sys.argv[2].split(), *filter(None, [glob.escape(sys.argv[3])])]:
    matches = sorted(glob.glob(pattern))
    if matches:
        with open(matches[-1], "rb") as f:
            print(hashlib.sha256(f.read()).hexdigest(), matches[-1])
    else:  # text of the user's own has no source.json: its files stand for themselves
        print("absent", pattern)
        for path in sorted(glob.glob(os.path.join(os.path.dirname(pattern), "*.parquet"))):
            with open(path, "rb") as f:
                print(hashlib.file_digest(f, "sha256").hexdigest(), path)
EOF
}

# Print the path of the last match of the last pattern; nothing if one of the patterns has no match
newest() { # PATTERNS
    python - "$NANOCHAT_BASE_DIR" "$1" <<'EOF'
import glob, os, sys

matches = [sorted(glob.glob(os.path.join(sys.argv[1], pattern))) for pattern in sys.argv[2].split()]
if matches and all(matches):
    print(matches[-1][-1])
EOF
}

is_same() { # RECORD IDENTITY
    [ -e "$1" ] && [ "$(tail -n +2 "$1")" = "$2" ]
}

write_record() { # RECORD FIRST-LINE IDENTITY
    printf '%s\n%s\n' "$2" "$3" >"$1.tmp"
    mv "$1.tmp" "$1"
}

# Run `python ARGUMENT ...` in one process a GPU of all hosts; NUM_PROCESSES says how many there are on each
on_all_gpus() { # -m MODULE -- [ARGUMENT ...]
    if [ "$NUM_HOSTS" -gt 1 ]; then # when one host's processes end so do the others', and runs/multinode.sh starts over
        OMP_NUM_THREADS=1 torchrun --nnodes="$NUM_HOSTS" --rdzv_backend=c10d --rdzv_id="$STAGE" \
            --rdzv_endpoint="$MASTER_ADDR:$MASTER_PORT" --rdzv_conf=is_host=0 --local_addr="$HOST_NAME" \
            --nproc_per_node="${NUM_PROCESSES:-1}" "$@"
    elif [ "${NUM_PROCESSES:-1}" -gt 1 ]; then
        # so many processes with a pool of threads each would fight over the cores
        OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node="$NUM_PROCESSES" "$@"
    else
        python "$@"
    fi
}
