#!/usr/bin/env bash
# Builds the static RocksDB of the locked version once and keeps it: scripts/rocksdb.sh DIR makes DIR/librocksdb.a.
#
# Why not leave it to cargo: cargo unifies features of shared build dependencies over what is being built, so each choice of
# packages (-p) compiles RocksDB again, 20 CPU minutes. With ROCKSDB_LIB_DIR set (the Makefile does) it is only linked.
# A plain `cargo build` without the Makefile works as well and compiles it as part of the build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
dir=$1
[ ! -f "$dir/librocksdb.a" ] || exit 0
mkdir -p "$dir"
exec 9>"$dir/lock"
flock 9
[ ! -f "$dir/librocksdb.a" ] || exit 0
echo "rocksdb: compiling the static library into $dir (once; about 12 minutes on two cores)" >&2
build=$dir/build
unset ROCKSDB_LIB_DIR ROCKSDB_STATIC
ROCKSDB_COMPILE=1 CARGO_TARGET_DIR=$build cargo build --release --locked -p ogee-disk
library=$(find "$build" -name librocksdb.a | head -n 1)
[ -n "$library" ] || { echo "rocksdb: the build left no librocksdb.a under $build" >&2; exit 1; }
cp "$library" "$dir/librocksdb.a.new"
mv "$dir/librocksdb.a.new" "$dir/librocksdb.a"
rm -rf "$build"
