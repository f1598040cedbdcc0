#!/usr/bin/env bash
# The one test command: lint, format, Rust, Python.
#
#   bash runs/test.sh                       everything
#   bash runs/test.sh tests/test_gpt.py -x  arguments go to pytest
#   bash runs/test.sh --full                the whole pocket recipe in a temporary base directory as well
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ "${1:-}" = --full ]; then
    shift
    trial=$(mktemp -d)
    trap 'rm -rf "$trial"' EXIT
    NANOCHAT_BASE_DIR=$trial WANDB_RUN=dummy bash runs/pocket.sh
fi

ruff check .
ruff format --check .
(
    cd rustbpe
    cargo fmt --check
    cargo clippy --quiet --all-targets --features python -- -D warnings
    cargo test --quiet
)
python -m pytest "$@"
