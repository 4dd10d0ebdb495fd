# Each target is one call of the command line, in an environment that makes itself. `make` alone lists the targets.
PYTHON ?= python3
CONFIG ?=
DATA ?=
DATA_VAL ?=
RUN ?=
SET ?=
CACHE_ROOT ?=
ARGS ?=
RANKS ?=

READY := .venv/.ready
BIN := .venv/bin
PERMAFROST = $(BIN)/$(if $(RANKS),torchrun --standalone --nproc-per-node $(RANKS) -m -- pipeline,python -m pipeline)
FLAGS = $(if $(CONFIG),--config "$(CONFIG)") $(if $(DATA),--data "$(DATA)") $(if $(DATA_VAL),--data-val "$(DATA_VAL)") \
	$(if $(RUN),--run "$(RUN)") $(if $(CACHE_ROOT),--cache-root "$(CACHE_ROOT)") $(ARGS) $(if $(SET),--set $(SET))
NAME ?=
HOURS ?=

.PHONY: help setup all plan explain status e2e freeze speedup probe report verify repair equivalence gc finetune \
	export study bench test check FORCE

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9%-]+:.*## / { sub("%", "N", $$1); printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo '  CONFIG=recipe or file.toml (sample)   DATA=images   DATA_VAL=images to evaluate on   RUN=folder (runs/<recipe>)'
	@echo '  SET="key=value ..."   CACHE_ROOT=folder   ARGS="further flags such as --debug or --yes"   RANKS=2   PYTHON=python3'
	@echo '  What trains, plan and explain go by CONFIG and SET; all others by the config.toml of RUN, or of runs/<CONFIG>.'

setup: $(READY) ## .venv from pinned versions; does nothing when it is up to date

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"Python 3.11 or newer is needed, this is %d.%d; set PYTHON=python3.11" % sys.version_info[:2])'
	@echo 'making .venv from pinned versions: some minutes, 6 GB where torch comes with CUDA'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

all: $(READY) ## all stages, the arms, evaluation, the table, the report
	@$(PERMAFROST) all $(FLAGS)

stage-%: $(READY) FORCE ## run stage N, and first what before it is missing or stale
	@$(PERMAFROST) stage $* $(FLAGS)

cache-%: $(READY) FORCE ## only build the cache that stage N reads
	@$(PERMAFROST) cache $* $(FLAGS)

plan: $(READY) ## what would run: time, disk, break-even; ARGS="--images N --device-profile NAME" for elsewhere
	@$(PERMAFROST) plan $(FLAGS)

explain: $(READY) ## for every stage: current, stale and why, or missing
	@$(PERMAFROST) explain $(FLAGS)

status: $(READY) ## where the run stands
	@$(PERMAFROST) status $(FLAGS)

e2e: $(READY) ## the baseline arm in which nothing is frozen
	@$(PERMAFROST) arm e2e $(FLAGS)

freeze: $(READY) ## the baseline arm whose frozen blocks still run forward
	@$(PERMAFROST) arm freeze $(FLAGS)

speedup: $(READY) ## the three arms side by side, written to speedup.json
	@$(PERMAFROST) speedup $(FLAGS)

probe: $(READY) ## kNN, linear and other probes of the stages' and arms' encoders
	@$(PERMAFROST) probe $(FLAGS)

report: $(READY) ## report.html with its figures, of what is there
	@$(PERMAFROST) report $(FLAGS)

verify: $(READY) ## hash every shard of every cache again; ARGS="--order all": the order of training against its record
	@$(PERMAFROST) verify $(FLAGS)

repair: $(READY) ## rebuild only the shards that are bad
	@$(PERMAFROST) repair $(FLAGS)

equivalence: $(READY) ## recompute samples live and compare them with the cache
	@$(PERMAFROST) equivalence $(FLAGS)

gc: $(READY) ## remove caches that no current stage needs; asks first
	@$(PERMAFROST) gc $(FLAGS)

finetune: $(READY) ## supervised fine-tuning of the last stage's encoder (ARGS=2: of stage 2's)
	@$(PERMAFROST) finetune $(FLAGS)

export: $(READY) ## an encoder as a folder that timm loads: <run>/export
	@$(PERMAFROST) export $(FLAGS)

study: $(READY) ## a grid of overrides and seeds as one table: NAME=study, HOURS=limit; without NAME their list
	@$(PERMAFROST) study $(NAME) $(if $(HOURS),--hours "$(HOURS)") $(FLAGS)

# What the cache is compared with has needs of its own (an older numpy); where it cannot be had, bench goes on without.
.venv-peers/.tried: constraints-peers.txt
	@echo 'making .venv-peers for the peers of the cache benchmark: some minutes'
	@mkdir -p .venv-peers && touch $@
	@$(PYTHON) -m venv .venv-peers && .venv-peers/bin/python -m pip install --quiet --disable-pip-version-check \
		-r constraints-peers.txt || { rm -rf .venv-peers/bin; \
		echo 'without Streaming, LitData and tcache: .venv-peers could not be made'; }

bench: $(READY) .venv-peers/.tried ## the benchmarks; prints ratios
	@$(PERMAFROST) bench $(FLAGS)

test: $(READY) ## the tests
	@OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

check: $(READY) ## ruff, mypy and the tests
	@$(BIN)/ruff check
	@$(BIN)/mypy
	@$(MAKE) --no-print-directory test
