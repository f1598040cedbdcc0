#!/usr/bin/env bash
# One stage, or the whole speedrun, on several hosts: the same command on each of them.
#
#   export NUM_HOSTS=2 FIRST_HOST=10.0.0.1
#   bash runs/multinode.sh -m scripts.base_train -- --depth=26 --device_batch_size=16 --data_lanes=16
#   bash runs/multinode.sh speedrun.sh
#
#   NUM_HOSTS      how many there are
#   FIRST_HOST     name or address of one of them under which the others reach it: they meet there, and rank 0 is there
#   PORT           of that meeting (29400); the ranks then find free ports of their own, which must be open, too
#   PROCESSES      of a stage on each host (auto: one a GPU, without any one a core); speedrun.sh decides for itself
#   MAX_RESTARTS   how often a host starts its processes again after one of them died (3)
#   WAIT_SECONDS   how long a host waits for the others, at the start and after one was lost (1800)
#   RENDEZVOUS     more settings of torchrun's rendezvous, such as keep_alive_interval=2
#
# torchrun does the work (c10d rendezvous). When a process or a whole host dies, the processes of all hosts stop and
# wait; the same command on the host that was lost, or on another in its place, and they go on from the last checkpoint
# (have one: --save_every). When FIRST_HOST itself is lost, torchrun ends on all, and the command is given on all again.
#
# Each host needs this checkout at the same path, set up (`bash runs/setup.sh`), and a base directory: NANOCHAT_BASE_DIR
# on a disk that all share, or one on each host. Without a shared disk every host is a replica: it needs all of the
# text, the tokenizer and the chat data (the speedrun gets them on each; or copy the folder), and gets all results.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

[ "$#" -gt 0 ] || fail "what is to run? -m scripts.base_train -- --depth=26, say, or speedrun.sh; see the top of $0"
[ -n "${NUM_HOSTS:-}" ] && [ -n "${FIRST_HOST:-}" ] || fail "set NUM_HOSTS and FIRST_HOST, the same on each host"
# it would forget what is done after every restart, too
[ "${FRESH:-0}" = 0 ] || fail "FRESH=1 is for one host; take another NANOCHAT_BASE_DIR to run everything anew"
[ -n "${VIRTUAL_ENV:-}" ] || source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PORT=${PORT:-29400}
MAX_RESTARTS=${MAX_RESTARTS:-3}
WAIT_SECONDS=${WAIT_SECONDS:-1800}

# This host's address on the way to the first one, its interface, and whether this is the first one
FOUND=$(
    python - "$FIRST_HOST" "$PORT" <<'EOF'
import ipaddress, socket, sys

import psutil

host, port = sys.argv[1:]
try:
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:  # nothing is sent: the kernel says which address it would send from
        probe.connect(target)
        address = probe.getsockname()[0]
except OSError as error:
    sys.exit(f"error: FIRST_HOST={host} cannot be reached from here: {error}")
if ipaddress.ip_address(address).is_loopback:
    sys.exit(f"error: FIRST_HOST={host} is {address} here, which no other host can reach: give the address on the network")
interfaces = psutil.net_if_addrs().items()
interface = next(name for name, addresses in interfaces if address in [entry.address for entry in addresses])
print(address, interface, int(address == target[0]))
EOF
) || exit 2
read -r ADDRESS INTERFACE IS_FIRST <<<"$FOUND"

# Gloo would look for this host's own name, which often leads to 127.0.1.1
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
# A meeting point of its own for each attempt: torchrun would go on using the first one's, of a host that may be gone
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds for the processes to save and leave when they are told to stop
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
# torchrun numbers the hosts in the order of these names, and of them uses the first one's address alone. Rank 0 belongs
# where the meeting is: so there is one host whose loss the others cannot wait out, and not two
if [ "$IS_FIRST" = 1 ]; then HOST_NAME=$ADDRESS; else HOST_NAME="host-$ADDRESS"; fi
export HOST_NAME

HOSTS=(--nnodes="$NUM_HOSTS" --rdzv_backend=c10d --rdzv_id=nanochat --rdzv_endpoint="$FIRST_HOST:$PORT"
    --local_addr="$HOST_NAME" --max_restarts="$MAX_RESTARTS"
    --rdzv_conf="is_host=$IS_FIRST,join_timeout=$WAIT_SECONDS,read_timeout=$WAIT_SECONDS${RENDEZVOUS:+,$RENDEZVOUS}")
case "$1" in
-*)
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # so many processes with a pool of threads each would fight over the cores
    exec torchrun "${HOSTS[@]}" --nproc_per_node="${PROCESSES:-auto}" "$@"
    ;;
*) # a recipe: one on each host, in step (runs/stage.sh); its own torchruns end before it does
    exec torchrun "${HOSTS[@]}" --nproc_per_node=1 --shutdown_timeout=$((TORCH_ELASTIC_SHUTDOWN_TIMEOUT + 30)) \
        --no-python bash "$@"
    ;;
esac
