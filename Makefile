# Two commands: `make demo` and `make test`. Both get what this machine lacks (`make packages` says what it does).

CARGO ?= cargo
# Compilers may take long on a small machine; they should not stand in the way of what runs.
NICE := $(shell command -v nice)

# What cannot be traced: tests that trace, or judge who traces and what a policy kills. What takes too long: labs, fuzzing, QEMU's tests.
UNTRACED := binary(/^(lab|audit)_/) + binary(/^(attacks|sandbox|violations|ordinary_user|ipc_fuzz|iotests)$$/) + test(/audit|a_broken_policy|served_by_the_thread/)

.PHONY: help demo test soak bench iotests coverage lint packages build guest lab clean

help:
	@echo 'make demo      builds, boots a real Linux guest and shows it (minutes)'
	@echo 'make test      the whole suite, with lint'
	@echo 'make lint      rustfmt, clippy, cargo-deny'
	@echo 'make soak      what takes long: ignored tests, and the lab again and again'
	@echo 'make bench     measurements beside QEMU (or QEMU=path), and beside FIRECRACKER=path; ROWS="group …", ROW=text: some of them'
	@echo 'make iotests   QEMU'"'"'s own block tests, fetched from Debian, on Bulkhead'
	@echo 'make coverage  which rules of the policies the tests exercise'
	@echo 'make packages  gets what the tests need and this machine lacks'
	@echo 'make lab RUN=SCRIPT   runs a shell script in the lab'

# A Python with the public QMP client library, which `make packages` puts there.
export BULKHEAD_PYTHON ?= $(abspath tests/.cache/venv/bin/python3)

# --- What is run

demo: packages
	@echo 'demo: building (a minute or two, most of it for other people'"'"'s crates; once)'
	@$(NICE) $(CARGO) build --quiet --locked --workspace
	@$(CARGO) run --quiet --locked -p bulkhead-tests --bin demo

# The runner's summary comes last. nextest runs each test in its own process and lets a lab have the machine for itself.
test: packages lint build guest
	@$(CARGO) run --quiet --locked -p bulkhead-tests --bin lab -- where
	@if $(CARGO) nextest --version >/dev/null 2>&1; then \
		$(CARGO) nextest run --locked --workspace --config-file tests/nextest.toml; \
	else \
		echo 'test: cargo-nextest is not installed, cargo test takes its place'; \
		$(CARGO) test --locked --workspace --no-fail-fast -- --test-threads=1; \
	fi

SOAK_ROUNDS ?= 5
soak: packages build guest
	$(NICE) $(CARGO) build --locked --release --workspace
	$(CARGO) test --locked --release --workspace -- --ignored --nocapture --test-threads=1
	BULKHEAD_FUZZ_SECONDS=600 $(CARGO) test --locked --release -p bulkhead-tests --test ipc_fuzz -- --nocapture --test-threads=2
	for round in $$(seq $(SOAK_ROUNDS)); do $(CARGO) test --locked -p bulkhead-tests --test lab_linux --test lab_jobs || exit 1; done
	BULKHEAD_LAB_ALL=1 BULKHEAD_VMLINUX=$$(tests/lab/symbols) \
		$(CARGO) test --locked -p bulkhead-tests --test lab_readers --test lab_restarts -- --nocapture

bench: packages guest
	@$(NICE) $(CARGO) build --quiet --locked --release --workspace
	@ROW='$(ROW)' BULKHEAD_BENCH_PAGE=docs/PERFORMANCE.md QEMU='$(QEMU)' FIRECRACKER='$(FIRECRACKER)' \
		$(CARGO) run --quiet --locked --release -p bulkhead-tests --bin bench -- $(ROWS)

iotests: packages build
	@tests/iotests/fetch
	@$(CARGO) test --quiet --locked -p bulkhead-tests --test iotests

coverage: packages build guest
	@rm -f target/coverage
	-$(CARGO) run --quiet --locked -p audit --bin bulkhead-audit -- coverage --record target/coverage -- \
		$(CARGO) nextest run --locked -p bulkhead-tests --config-file tests/nextest.toml -E 'not ($(UNTRACED))'
	@$(CARGO) run --quiet --locked -p audit --bin bulkhead-audit -- coverage target/coverage

lab: build
	@$(CARGO) run --quiet --locked -p bulkhead-tests --bin lab -- run '$(RUN)'

# --- What it takes

packages:
	@tests/lab/packages

# Helpers are separate programs: cargo does not know that the tests start them.
build:
	$(NICE) $(CARGO) build --locked --workspace

# The freestanding guest is a workspace of its own, with its own flags; the tests look for it in this folder.
GUEST_TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))/guest
guest:
	cd tests/guest && env -u RUSTFLAGS $(NICE) $(CARGO) build --locked --release --quiet --target-dir $(GUEST_TARGET)

lint:
	$(CARGO) fmt --all --check
	$(NICE) $(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	cd tests/guest && $(CARGO) fmt --check && \
		env -u RUSTFLAGS $(NICE) $(CARGO) clippy --locked --release --target-dir $(GUEST_TARGET) -- -D warnings
	@command -v cargo-deny >/dev/null || { \
		echo 'lint: cargo-deny is missing: cargo install --locked cargo-deny (a few minutes, once)'; \
		$(NICE) $(CARGO) install --quiet --locked cargo-deny; }
	$(CARGO) deny --offline --log-level error check licenses bans sources

clean:
	$(CARGO) clean
	rm -rf tests/guest/target tests/.cache
