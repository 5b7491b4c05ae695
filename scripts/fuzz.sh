#!/usr/bin/env bash
# Runs each fuzz target for a while: scripts/fuzz.sh [SECONDS]. Needs cargo-fuzz (installed from crates.io when missing).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seconds=${1:-60}
command -v cargo-fuzz >/dev/null || cargo install --locked cargo-fuzz
for crate in proto vhost-blk nbd; do
    for target in "$crate"/fuzz/fuzz_targets/*.rs; do
        name=$(basename "$target" .rs)
        echo "fuzz $crate: $name for $seconds s"
        (cd "$crate" && cargo fuzz run -s none "$name" -- -max_total_time="$seconds" -print_final_stats=1)
    done
done
