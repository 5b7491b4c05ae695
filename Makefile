# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Build products live outside the checkout, so that a fresh clone does not compile RocksDB again. Everything is always built
# for the whole workspace: cargo chooses features of shared build dependencies by what is built, and another choice compiles RocksDB again.
export CARGO_TARGET_DIR ?= $(HOME)/.cache/ogee-target
CARGO_FLAGS := --release --locked --workspace
# Tests of real processes and guests share two cores with what they test: one at a time.
VM_TESTS := --release --locked --workspace --test

.PHONY: help deps build demo test lint test-unit test-process test-vm fuzz

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

deps: ## install what building and testing need (Debian packages)
	@.ci/install-deps.sh

build: deps ## build everything, the command `ogee` among it
	cargo build $(CARGO_FLAGS) --all-targets

demo: build ## boot a VM from a lazy clone on an embedded cluster, snapshot, damage, roll back, kill a chunkserver
	@scripts/demo.sh

lint: deps ## clippy with the workspace lints
	cargo clippy $(CARGO_FLAGS) --all-targets -- -D warnings

test: lint build test-unit test-process test-vm ## everything the gate runs

test-unit: build ## unit, property, golden and component tests
	cargo test $(CARGO_FLAGS) --exclude ogee-vm-tests

test-process: build ## real processes killed with kill -9 and stopped (OGEE_CRASH_ROUNDS=30)
	cargo test $(VM_TESTS) crash --test stall -- --nocapture --test-threads 1

test-vm: build ## real QEMU guests
	cargo test $(VM_TESTS) harness_selftest --test boot_and_survive --test clone_isolation --test rollback \
	  --test chunkserver_killed --test clear_errors -- --test-threads 1

fuzz: ## a short run of each fuzz target
	scripts/fuzz.sh
