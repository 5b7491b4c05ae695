#!/usr/bin/env bash
# The demo: see vm-tests/examples/demo.rs. Needs a built `ogee` (make demo builds it).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$HOME/.cache/ogee-target}
export OGEE_BIN=${OGEE_BIN:-$CARGO_TARGET_DIR/release/ogee}
exec "$CARGO_TARGET_DIR/release/examples/demo"
