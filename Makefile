# Two commands do everything on a fresh machine: `make demo` and `make test`.
# Build products live outside the checkout, so that a fresh clone does not compile RocksDB again.
export CARGO_TARGET_DIR ?= $(HOME)/.cache/ogee-target
CARGO_FLAGS := --release --locked

.PHONY: help deps build demo test test-unit test-process test-vm lint fuzz clean-demo

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

deps: ## install what building and testing need (Debian packages)
	@.ci/install-deps.sh

build: deps ## build the command `ogee`
	cargo build $(CARGO_FLAGS) -p ogee-cli

demo: build ## boot a VM from a lazy clone on an embedded cluster, snapshot, damage, roll back, kill a chunkserver
	@scripts/demo.sh

lint: deps ## clippy with the workspace lints
	cargo clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings

test: lint test-unit test-process test-vm ## everything the gate runs

test-unit: deps ## unit, property, golden and component tests
	cargo test $(CARGO_FLAGS) --workspace --exclude ogee-vm-tests

test-process: build ## real processes killed with kill -9 (ROUNDS=30)
	cargo test $(CARGO_FLAGS) -p ogee-vm-tests --test crash -- --nocapture --test-threads 1
	cargo test $(CARGO_FLAGS) -p ogee-vm-tests --test stall -- --nocapture --test-threads 1

test-vm: build ## real QEMU guests
	cargo test $(CARGO_FLAGS) -p ogee-vm-tests -- --test-threads 1

fuzz: ## a short run of each fuzz target
	scripts/fuzz.sh

clean-demo: ## stop the demo cluster and delete its data
	@scripts/demo.sh --clean
