#!/usr/bin/env bash
# From a bare machine to an activated .venv with everything in it.
#
#   source runs/setup.sh     set up and activate
#   bash runs/setup.sh       set up only
#
# Needs git, python3 (3.11 to 3.14) and a C compiler. uv and Rust are found or installed. When nothing has changed since
# the last time it only activates. Written for bash 3.2 (macOS) and later; sourcing works from zsh too.

if [ "${BASH_SOURCE[0]:-}" != "$0" ]; then # sourced: the work is done by a child, so that nothing leaks into this shell
    nanochat_checkout="$(cd "$(dirname "${BASH_SOURCE[0]:-$0}")/.." && pwd)"
    bash "$nanochat_checkout/runs/setup.sh" || return 1
    . "$nanochat_checkout/.venv/bin/activate" || return 1
    export PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin"
    unset nanochat_checkout
    return 0
fi

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON_RANGE=">=3.11,<3.15"
UV_INSTALLER=https://astral.sh/uv/install.sh
RUST_INSTALLER=https://sh.rustup.rs
STAMP=.venv/nanochat-setup

fail() {
    echo "error: $*" >&2
    exit 1
}

# What the environment is made of, as one checksum
fingerprint() {
    cat requirements.lock pyproject.toml runs/setup.sh rustbpe/Cargo.toml rustbpe/Cargo.lock rustbpe/src/*.rs | cksum
}

is_complete() {
    [ -x .venv/bin/python ] && [ -x .venv/bin/maturin ] && [ -x .venv/bin/pytest ] &&
        [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ]
}

works() { "$1" --version >/dev/null 2>&1; } # a shim that is on the PATH may lead nowhere

fetch() { # URL: prints what is there
    if works curl; then
        curl --proto '=https' --tlsv1.2 --connect-timeout 10 --max-time 120 -fsSL "$1"
    else
        wget --timeout=10 --tries=2 -qO- "$1"
    fi
}

run_installer() { # URL [ARGUMENT ...]
    local script
    script=$(fetch "$1") || return 1
    shift
    sh -s -- "$@" <<<"$script"
}

# ----------------------------------------------------------------------------------------------------------------------
# uv: on the PATH, where installers put it, with pip into a folder of its own, or with its installer

find_uv() {
    local candidate
    for candidate in uv "$HOME/.local/bin/uv" "$HOME/.cargo/bin/uv" "$PWD/.uv/bin/uv"; do
        if works "$candidate"; then
            UV=$candidate
            return 0
        fi
    done
    return 1
}

install_uv() {
    echo "setup: installing uv"
    { python3 -m venv .uv && .uv/bin/python -m pip install --quiet --retries 1 uv; } >/dev/null 2>&1 && return 0
    rm -rf .uv
    python3 -m pip install --quiet --retries 1 --user uv >/dev/null 2>&1 && return 0
    run_installer "$UV_INSTALLER" --quiet >/dev/null 2>&1
}

# ----------------------------------------------------------------------------------------------------------------------
# Rust: a cargo that is new enough, or rustup

cargo_is_new_enough() {
    local wanted found
    works cargo || return 1
    wanted=$(sed -n 's/^rust-version = "1\.\([0-9]*\).*/\1/p' rustbpe/Cargo.toml)
    found=$(cargo --version | sed -n 's/^cargo 1\.\([0-9]*\).*/\1/p')
    [ "${found:-0}" -ge "${wanted:-0}" ]
}

install_rust() {
    echo "setup: installing Rust with rustup"
    run_installer "$RUST_INSTALLER" -y --quiet --no-modify-path --profile minimal -c rustfmt -c clippy
}

need_rust() {
    cargo_is_new_enough && return 0
    export PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    cargo_is_new_enough && return 0
    local version
    version=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' rustbpe/Cargo.toml)
    install_rust && cargo_is_new_enough && return 0
    fail "rustbpe needs Rust $version or later: no such cargo is here, and $RUST_INSTALLER could not install one;" \
        "install Rust (https://rustup.rs, or your system's packages) and run this again"
}

# ----------------------------------------------------------------------------------------------------------------------
# The environment

make_venv() {
    if ! .venv/bin/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
        "$UV" venv --quiet --clear --python "$PYTHON_RANGE" .venv ||
            fail "no Python in the range $PYTHON_RANGE was found, and uv could not fetch one; install python3.12, say"
    fi
    rm -f "$STAMP"
    echo "setup: installing the packages of requirements.lock"
    "$UV" pip sync --quiet --python .venv requirements.lock ||
        fail "the packages of requirements.lock could not be installed; see above, and run this again"
    echo "setup: building rustbpe"
    local log # maturin is chatty even when it is told to be quiet
    log=$(VIRTUAL_ENV=$PWD/.venv PATH="$PWD/.venv/bin:$(dirname "$(command -v "$UV")"):$PATH" \
        .venv/bin/maturin develop --release --uv 2>&1) || { echo "$log" >&2 && fail "rustbpe could not be built"; }
    fingerprint >"$STAMP"
}

is_complete && exit 0
works cc || fail "a C compiler, cc, is needed to build rustbpe: apt install build-essential, or xcode-select --install"
need_rust
find_uv || { install_uv && find_uv; } ||
    fail "uv is needed, and neither pip nor $UV_INSTALLER could install it; put uv on the PATH and run this again"
make_venv
echo "setup: done"
