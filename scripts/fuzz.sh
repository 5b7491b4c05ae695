#!/usr/bin/env bash
# Runs each fuzz target for a while: scripts/fuzz.sh [SECONDS [TARGET...]]. Needs cargo-fuzz (installed from crates.io when missing).
# New inputs go to a folder outside the checkout; with KEEP=1 the corpora are minimised into vm-tests/fuzz/corpus afterwards.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../vm-tests"
seconds=${1:-60}
shift $(($# ? 1 : 0))
command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
# A build folder of its own: everything is compiled once more, to count paths.
export CARGO_TARGET_DIR=${OGEE_FUZZ_TARGET:-$HOME/.cache/ogee-fuzz}
if [ $# -eq 0 ]; then
    mapfile -t all < <(sed -n 's/.*\(target(\|name: \)"\([a-z0-9_]*\)".*/\2/p' src/fuzz/mod.rs)
    set -- "${all[@]}"
fi
[ $# -gt 0 ] || { echo "fuzz: no targets found in vm-tests/src/fuzz/mod.rs" >&2; exit 1; }
for name in "$@"; do
    found=$CARGO_TARGET_DIR/corpus/$name
    mkdir -p "$found" "fuzz/corpus/$name"
    echo "fuzz $name for $seconds s"
    OGEE_FUZZ=$name cargo fuzz run -s none decoders "$found" "fuzz/corpus/$name" -- \
        -max_total_time="$seconds" -max_len=4096 -print_final_stats=1 -artifact_prefix="$CARGO_TARGET_DIR/"
    if [ -n "${KEEP:-}" ]; then
        OGEE_FUZZ=$name cargo fuzz run -s none decoders -- -merge=1 -max_len=1024 "fuzz/corpus/$name" "$found"
    fi
done
