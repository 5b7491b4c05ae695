# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Build products live outside the checkout, so that a fresh clone compiles only what changed; RocksDB is compiled once and
# linked (scripts/rocksdb.sh says why).
export CARGO_TARGET_DIR ?= $(HOME)/.cache/ogee-target
ROCKSDB_VERSION := $(shell sed -n '/^name = "librocksdb-sys"/{n;s/version = "\(.*\)"/\1/p}' Cargo.lock)
export ROCKSDB_LIB_DIR ?= $(HOME)/.cache/ogee-rocksdb/$(ROCKSDB_VERSION)
export ROCKSDB_STATIC = 1
# Always the whole workspace: with another choice of packages cargo unifies features anew and compiles everything again. So tests are chosen by
# the names of their files: all integration tests but those of vm-tests.
CARGO_FLAGS := --release --locked --workspace
UNIT_FOLDERS := $(filter-out vm-tests/tests/,$(wildcard */tests/ server/*/tests/))
UNIT_FILES := $(foreach dir,$(UNIT_FOLDERS),$(notdir $(basename $(wildcard $(dir)*.rs))))
UNIT_TREES := $(foreach dir,$(UNIT_FOLDERS),$(notdir $(patsubst %/main.rs,%,$(wildcard $(dir)*/main.rs))))
UNIT_TESTS := $(addprefix --test ,$(sort $(UNIT_FILES) $(UNIT_TREES)))

.PHONY: help deps rocksdb moto build dist install install-units demo test lint test-unit test-sim test-process test-vm test-postgres torture sim stalls fuzz bench bench-quick bench-nbd

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

deps: ## install what building and testing need (Debian packages)
	@.ci/install-deps.sh

rocksdb: deps ## compile RocksDB once, for all builds
	@scripts/rocksdb.sh "$(ROCKSDB_LIB_DIR)"

moto: deps ## install the S3 server that tests of backups talk to
	@scripts/moto.sh

build: rocksdb ## build everything, the command `ogee` among it
	cargo build $(CARGO_FLAGS) --all-targets

dist: rocksdb ## build the command `ogee` as it is meant to be run: optimised whole, four minutes more
	cargo build --profile dist --locked --workspace --bins

PREFIX ?= /usr/local
install: dist ## put it into $(PREFIX)/bin
	install -D -m 755 "$(CARGO_TARGET_DIR)/dist/ogee" "$(DESTDIR)$(PREFIX)/bin/ogee"

# DISTRO says which group QEMU runs in: docs/libvirt.md.
DISTRO ?= debian
SYSTEM := $(DESTDIR)/usr/lib
install-units: ## put the systemd units of vhost-blk, their user and its folder of sockets in place (DISTRO=debian or fedora)
	@test -f packaging/sysusers.d/ogee-$(DISTRO).conf || { echo "install-units: DISTRO is debian or fedora" >&2; exit 2; }
	install -d "$(SYSTEM)/systemd/system"
	sed 's#/usr/local/bin/#$(PREFIX)/bin/#' packaging/systemd/ogee-vhost-blk@.service >"$(SYSTEM)/systemd/system/ogee-vhost-blk@.service"
	sed 's#/usr/local/bin/#$(PREFIX)/bin/#' packaging/systemd/ogee-vhost-blk.service >"$(SYSTEM)/systemd/system/ogee-vhost-blk.service"
	install -D -m 644 packaging/sysusers.d/ogee-$(DISTRO).conf "$(SYSTEM)/sysusers.d/ogee.conf"
	install -D -m 644 packaging/tmpfiles.d/ogee.conf "$(SYSTEM)/tmpfiles.d/ogee.conf"
	$(if $(filter fedora,$(DISTRO)),install -D -m 644 packaging/systemd/ogee-vhost-blk@.service.d/fedora.conf "$(SYSTEM)/systemd/system/ogee-vhost-blk@.service.d/fedora.conf")
	$(if $(filter fedora,$(DISTRO)),install -D -m 644 packaging/systemd/ogee-vhost-blk.service.d/fedora.conf "$(SYSTEM)/systemd/system/ogee-vhost-blk.service.d/fedora.conf")

demo: rocksdb ## boot a VM from a lazy clone on an embedded cluster, snapshot, damage, roll back, kill a chunkserver
	cargo build $(CARGO_FLAGS) --bins --examples
	@scripts/demo.sh

lint: rocksdb ## clippy with the workspace lints
	cargo clippy $(CARGO_FLAGS) --all-targets -- -D warnings

test: lint build test-unit test-sim test-process test-vm ## everything the gate runs

test-unit: build moto ## unit, property, golden and component tests
	cargo test $(CARGO_FLAGS) --lib --bins --example bench $(UNIT_TESTS)

# Network namespaces and mounts need root.
HOST_TRIPLE := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p' | tr a-z- A-Z_)
AS_ROOT := $(if $(filter-out 0,$(shell id -u)),CARGO_TARGET_$(HOST_TRIPLE)_RUNNER="sudo -E")
# Tests of real processes and guests share two cores with what they test: one at a time.
test-process: build ## real processes killed with kill -9 and stopped (OGEE_CRASH_ROUNDS=30)
	cargo test $(CARGO_FLAGS) --test crash --test stall --test rot --test mds_killed --test clone_cost --test group_cut --test rollback_fence --test nbd_clients --test lost_disk --test flatten --test byte_flips --test meta_flipped --test failed_disk --test nbd_map --test fuzz_smoke --test qos --test vhost_many -- --nocapture --test-threads 1
	$(AS_ROOT) cargo test $(CARGO_FLAGS) --test nbd_tls --test bare_host --test torture -- --nocapture --test-threads 1

test-vm: build ## real QEMU guests
	cargo test $(CARGO_FLAGS) --test harness_selftest --test boot_and_survive --test clone_isolation \
	  --test rollback --test chunkserver_killed --test clear_errors --test full_disk --test vhost_killed --test resize --test libvirt --test migrate --test mapped_device --test lazy_restore -- --test-threads 1

test-postgres: build ## PostgreSQL on a mounted volume through kill -9 (root; apt-get install postgresql), no part of `make test`
	$(AS_ROOT) cargo test $(CARGO_FLAGS) --test postgres -- --nocapture

# TORTURE_ARGS is for the torture: `make torture TORTURE_ARGS='--seconds 90 --runs 20 --seed 7'`. It needs root.
TORTURE_ARGS ?= --minutes 20
torture: rocksdb ## real processes under kills, stops, partitions and full disks, the whole history checked
	cargo build $(CARGO_FLAGS) --bins --examples
	$(if $(AS_ROOT),sudo -E) "$(CARGO_TARGET_DIR)/release/examples/torture" $(TORTURE_ARGS)

stalls: build ## how long IO stands still when a chunkserver dies or hangs, held to its bars: on a quiet machine
	OGEE_STALL_BARS=1 cargo test $(CARGO_FLAGS) --test stall -- --nocapture

# 200 seeds, one of them twice, and every canary within 200 seeds.
test-sim: build ## the whole cluster simulated in one thread, by seed; planted bugs must be found
	cargo test $(CARGO_FLAGS) --test sim

# make sim SEEDS=2000 FROM=1 JOBS=2; make sim SEED=7 replays one (with RUST_LOG=debug it talks); CANARY=skip-fence plants a bug.
SEEDS ?= 1000000
FROM ?= 1
JOBS ?= 2
sim: rocksdb ## simulate seed after seed, without end unless SEEDS= is given
	cargo test $(CARGO_FLAGS) --test sim -- $(if $(SEED),one $(SEED) $(CANARY),--from $(FROM) --seeds $(SEEDS) --jobs $(JOBS) $(if $(CANARY),--canary $(CANARY)))

fuzz: rocksdb ## libFuzzer on each decoder for a minute (the gate replays what it found)
	scripts/fuzz.sh

# BENCH_ARGS is for the driver: `make bench BENCH_ARGS='--only ogee/ --reps 3 --keep'`; vm-tests/examples/bench says what there is.
BENCH_ARGS ?=
bench: dist ## measure Ogee beside Ceph, qemu-storage-daemon and the raw disk: BENCHMARKS.md, target/bench.json
	scripts/bench/install-deps.sh
	cargo build $(CARGO_FLAGS) --examples
	OGEE_BIN="$(CARGO_TARGET_DIR)/dist/ogee" "$(CARGO_TARGET_DIR)/release/examples/bench" $(BENCH_ARGS)

bench-quick: dist ## the Ogee and raw-disk rows alone, in under five minutes
	scripts/bench/install-deps.sh --quick
	cargo build $(CARGO_FLAGS) --examples
	OGEE_BIN="$(CARGO_TARGET_DIR)/dist/ogee" "$(CARGO_TARGET_DIR)/release/examples/bench" --quick $(BENCH_ARGS)

# BENCH_ARGS takes the place of these arguments as a whole.
BENCH_NBD_ARGS := --only nbd --keep --reps 5 --seconds 3 --size-mib 1024
bench-nbd: dist ## `ogee nbd serve` beside `ogee vhost-blk` and qemu-nbd alone, in about seven minutes: its part of BENCHMARKS.md
	scripts/bench/install-deps.sh --nbd
	cargo build $(CARGO_FLAGS) --examples
	OGEE_BIN="$(CARGO_TARGET_DIR)/dist/ogee" "$(CARGO_TARGET_DIR)/release/examples/bench" $(or $(BENCH_ARGS),$(BENCH_NBD_ARGS))
