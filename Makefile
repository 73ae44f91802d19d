.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu lint types format bench-solver bench-step bench-drift
.PHONY: bench-sharding bench-train bench-gpu profile coord-check transfer leaderboard batch-sweep
.PHONY: finetune reliability chaos fuzz speedrun clean

PYTHON ?= python3
RANKS ?= 2
DEMO ?=
BENCH ?=
BIN := .venv/bin
# A 124M model with the vocabulary and batch of NanoGPT's speedrun, on one GPU.
GPU_RUN := model/size=124m model.n_head=6 model.softcap=15 parallel=single device=cuda \
	data=synthetic data.tokens=2000000 data.vocab_size=50304 data.batch_tokens=524288
MICRO ?= 16
TRACK3 ?=
DION ?=
# What asks a run to save and stop: torchrun passes it on.
SIGNALS := --signals-to-handle=SIGTERM,SIGINT,SIGUSR1

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: .venv/dev ## create .venv with everything that tests and lint need

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train]'
	@touch $@

.venv/dev: .venv/run
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

.venv/data: .venv/run
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[data]'
	@touch $@

.venv/baselines: .venv/run
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[baselines]'
	@touch $@

demo: .venv/run ## train a byte-level GPT on real text, about 3 minutes on 2 cores
	$(BIN)/torchrun --standalone --nproc_per_node=$(RANKS) $(SIGNALS) train.py experiment=first_run $(DEMO)

test: .venv/dev ## run the test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: .venv/dev ## the long proofs: all layouts, transports and rules on 4 and 8 ranks
	$(BIN)/python -m pytest -m slow

test-gpu: .venv/dev ## a GPU against the CPU and one process; several ranks share it where NCCL can
	$(BIN)/python -m pytest -m gpu

lint: .venv/dev ## ruff, check only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev ## mypy on optim/
	@mkdir -p .typing && ln -sfn .. .typing/geon
	MYPYPATH=.typing $(BIN)/mypy -p geon.optim

format: .venv/dev ## ruff, fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-solver: .venv/run ## Manifold Muon's solvers: quality and cost; BENCH='--help' tells more
	$(BIN)/python -m geon.benches.solver $(BENCH)

bench-step: .venv/run ## seconds of a Manifold Muon step over those of a Muon step
	$(BIN)/python -m geon.benches.step $(BENCH)

bench-drift: .venv/run ## how far 10,000 noisy steps leave the manifold, about two minutes
	$(BIN)/python -m geon.benches.step --drift 10000 --angle 0.03 $(BENCH)

bench-sharding: .venv/run ## bytes, collectives, seconds and exactness of sharded steps on 4 ranks
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=4 benches/sharding.py $(BENCH)

bench-train: .venv/run ## tokens/s and where a training step goes; BENCH='overrides --steps 20'
	$(BIN)/python -m geon.benches.train $(BENCH)

profile: .venv/run ## what costs most in a training step; BENCH='overrides --trace FILE'
	$(BIN)/python -m geon.benches.profile_train $(BENCH)

# Where pip reaches nothing but torch is there: make -o .venv/run bench-gpu BIN=folder-of-python
bench-gpu: .venv/run ## all of it on one GPU in under ten minutes; DION=path, TRACK3=tokens/s
	failed=; \
	$(BIN)/python -m geon.benches.step --device cuda --shapes --repeats 12 \
	    $(if $(DION),--dion $(DION)) --json docs/results/gpu_step.json || failed=" step"; \
	for rule in muon hybrid manifold_muon; do for compile in true false; do \
	    echo "optim=$$rule parallel.compile=$$compile"; \
	    label=--label=$$rule,compile=$$compile; test $$label != --label=muon,compile=true || label=; \
	    $(BIN)/python -m geon.benches.train $(GPU_RUN) data.micro_batch=$(MICRO) \
	        optim=$$rule parallel.compile=$$compile --warmup 2 --steps 6 --rounds 3 \
	        $(if $(TRACK3),--track3 $(TRACK3)) $$label \
	        --json docs/results/gpu_train.json $(BENCH) || failed="$$failed $$rule:$$compile"; \
	done; done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

coord-check: .venv/run ## do activations keep their size over widths? under a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m geon.studies.coord_check $(BENCH)

transfer: .venv/run ## does a learning rate serve other widths? about an hour on 2 cores, resumable
	$(BIN)/python -m geon.studies.transfer $(BENCH)

leaderboard: .venv/baselines ## 25 optimizers on the same tokens, under an hour on 2 cores, resumable
	$(BIN)/python -m geon.studies.leaderboard $(BENCH)

speedrun: .venv/data ## AdamW, Muon and the hybrid on this machine's Python sources, ten minutes, resumable
	$(BIN)/python -m geon.studies.speedrun $(BENCH)

batch-sweep: .venv/run ## the same tokens in batches of several sizes, resumable
	$(BIN)/python -m geon.studies.compare batch --along data.batch_tokens $(BENCH)

finetune: .venv/dev ## a pretrained Llama fine-tuned by each recipe, 41 minutes of one core, resumable
	OMP_NUM_THREADS=1 $(BIN)/python -m geon.studies.finetune --json docs/results/finetune.json $(BENCH)

reliability: .venv/dev ## every row of docs/reliability.md, the long proofs too
	$(BIN)/python -m pytest -m "slow or not slow" -n 2 --dist worksteal tests/reliability tests/distributed/test_checkpoints.py \
		tests/distributed/test_deepspeed.py

chaos: .venv/run ## kill ranks of a real run at random, and hold it against one that nobody killed
	OMP_NUM_THREADS=1 $(BIN)/python -m geon.benches.chaos $(BENCH)

fuzz: .venv/run ## bad command lines in bulk: each must be a run, or one line; BENCH='--count 200'
	$(BIN)/python -m geon.benches.fuzz $(BENCH)

clean: ## remove caches, keep .venv and runs
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .typing build dist *.egg-info
