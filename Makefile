# make all METHOD=qlora   the whole comparison for one method: data, base evaluation, training, evaluation, report
# make help               every target and variable

METHOD  ?= qlora
METHODS ?= $(ALL)
RECIPE  ?= auto
# The names of METHODS in kit/methods.py.
ALL      = $(shell sed -n 's/^    "\([a-z]*\)": Method.*/\1/p' kit/methods.py)
SEEDS   ?= $(or $(SEED),0)
# hybrid stands for both hybrids of the published studies: continued at high rank, and combined.
RUNS     = $(if $(filter hybrid,$(METHOD)),hybrid combined,$(METHOD))
SOURCES ?=
ARGS    ?=

# A virtual environment of its own; inside an activated conda environment: make all PYTHON=python.
# Any other PYTHON is used as it is and nothing is installed into it.
VENV   := .venv
PYTHON ?= $(VENV)/bin/python
ifeq ($(PYTHON),$(VENV)/bin/python)
READY  := $(VENV)/.ready
else ifneq ($(and $(CONDA_PREFIX),$(filter $(CONDA_PREFIX)/%,$(shell command -v $(PYTHON)))),)
READY  := $(CONDA_PREFIX)/.kit-ready
endif
UV     := uv==0.13.9
INSTALL = $(PYTHON) -m pip install --quiet --disable-pip-version-check $(UV) && \
  $(PYTHON) -m uv pip install --python "$$(command -v $(PYTHON))" --no-deps --compile-bytecode -r requirements.lock && \
  $(PYTHON) -m uv pip install --python "$$(command -v $(PYTHON))" --no-deps --quiet -e .

FLAGS = --recipe '$(RECIPE)' $(foreach s,$(SOURCES),--source '$(s)') \
        $(if $(NAME),--name '$(NAME)') $(if $(DATA_DIR),--data-dir '$(DATA_DIR)') \
        $(if $(RUNS_DIR),--runs-dir '$(RUNS_DIR)') $(if $(REPORT_DIR),--report-dir '$(REPORT_DIR)') $(ARGS)
RUN = $(PYTHON) scripts

# A misspelt variable would be ignored. Names with an underscore, such as HF_TOKEN, are for the programs that are run.
KNOWN    := METHOD METHODS RECIPE SEED SEEDS SOURCES NAME DATA_DIR RUNS_DIR REPORT_DIR RATER OUT ARGS PYTHON
OTHERS   := VENV UV READY ALL COLUMNS SHELL PATH HOME LANG TMPDIR PYTHONPATH CC CXX
MISSPELT := $(strip $(foreach v,$(filter-out $(KNOWN) $(OTHERS),$(.VARIABLES)),$(if $(filter command,$(origin $(v))),$(if $(findstring _,$(v)),,$(v)))))
ifneq ($(MISSPELT),)
$(error unknown variable $(MISSPELT); known: $(KNOWN))
endif
# In WSL every shell has the computer's name in NAME.
ifeq ($(origin NAME)$(if $(WSL_DISTRO_NAME), of WSL),environment of WSL)
NAME :=
endif

# Before hours go into other methods than those that were meant.
ifneq ($(filter all train eval chat export,$(MAKECMDGOALS)),)
ifeq ($(origin METHODS),command line)
$(error METHODS is for compare and sweep; here give one METHOD, or: make compare METHODS="$(METHODS)")
endif
endif
ifneq ($(filter compare sweep,$(MAKECMDGOALS)),)
ifeq ($(origin METHOD),command line)
$(error METHOD is for a single method; here give METHODS="$(METHOD)")
endif
ifneq ($(filter-out $(ALL),$(METHODS)),)
$(error unknown method $(firstword $(filter-out $(ALL),$(METHODS))); known: $(ALL))
endif
ifeq ($(strip $(METHODS)),)
$(error METHODS names no method; known: $(ALL))
endif
endif
TRAINED = $(filter-out hybrid combined,$(METHODS))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help setup data base train eval report all compare sweep rate chat export doctor bench test lint assets lock clean

help: ## this list
	@awk 'BEGIN {FS = ":.*## "; print "Targets:"} /^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile
	@printf '%s\n' 'Variables:' \
	  '  METHOD=$(METHOD)           one of: $(ALL)' \
	  '  METHODS="$(METHODS)"  those that make compare runs' \
	  '  RECIPE=$(RECIPE)            auto, or one of: $(basename $(notdir $(wildcard kit/recipes/*.yaml))) (auto: t4 with a CUDA GPU, else tiny)' \
	  '  SEEDS="$(SEEDS)"              seeds; each makes a run of its own' \
	  '  SOURCES="mine=FILE ..."  your data instead of the recipe'"'"'s; also mine=OWNER/DATASET' \
	  '  NAME=, DATA_DIR=, RUNS_DIR=, REPORT_DIR=   where things go' \
	  '  ARGS="--limit 200 ..."    any flag of scripts/train.py --help'

setup: $(READY) ## create .venv with every package of requirements.lock

# The stamp is written last: without it the environment is half-finished and is made anew.
$(VENV)/.ready: requirements.lock pyproject.toml
	@test -e $@ || rm -rf $(VENV)
	@rm -f $@
	@python=$$(for p in python3 python3.13 python3.12 python3.11; do \
	    $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done); \
	  test -n "$$python" || { echo "error: Python 3.11, 3.12 or 3.13 is needed, found $$(python3 --version 2>&1)" >&2; exit 2; }; \
	  echo "setting up $(VENV) with $$($$python --version); the first time downloads about 4 GB"; \
	  test -x $(PYTHON) || $$python -m venv $(VENV) || { echo "error: python3 -m venv failed; on Debian or Ubuntu: apt install python3-venv" >&2; exit 2; }
	@$(INSTALL)
	@touch $@

$(CONDA_PREFIX)/.kit-ready: requirements.lock pyproject.toml
	@rm -f $@
	@$(INSTALL)
	@touch $@

SEEDED = $(FLAGS) --seeds $(subst $(space),$(comma),$(strip $(SEEDS)))
# One run: ARGS, which comes later, may name another seed.
ONE    = --seed '$(firstword $(SEEDS))' $(FLAGS)
comma := ,
space := $(subst ,, )

# The method that asks the most: combined wants validation rows, --tuned a sweep, and each says so before hours go into what comes first.
ASKED = $(if $(filter compare,$(MAKECMDGOALS)),$(or $(filter combined,$(METHODS)),$(if $(filter --tuned,$(ARGS)),$(firstword $(TRAINED))),base),$(lastword $(RUNS)))

data: $(READY) ## build the data and show what was kept and dropped
	@$(RUN)/data.py --method '$(ASKED)' $(FLAGS)

base: $(READY)
	@$(RUN)/eval.py --method base $(FLAGS)

train: $(READY) ## train METHOD
	@set -e; for m in $(RUNS); do $(RUN)/train.py --method $$m $(SEEDED); done

eval: $(READY) ## evaluate METHOD
	@set -e; for m in $(RUNS); do $(RUN)/eval.py --method $$m $(SEEDED); done

report: $(READY) ## console tables and report/ from all runs there are
	@$(RUN)/report.py $(FLAGS)

all: data base train eval report ## data, base evaluation, training, evaluation and report for METHOD

compare: data base ## the same for every one of METHODS, then one report
	@left=; for m in $(METHODS); do \
	  $(RUN)/train.py --method $$m $(SEEDED) && $(RUN)/eval.py --method $$m $(SEEDED) || { code=$$?; test $$code -lt 128 || exit $$code; left="$$left $$m"; }; \
	done; $(RUN)/report.py $(FLAGS) && { test -z "$$left" || { echo "error: not finished, for the reasons above:$$left" >&2; exit 2; }; }

sweep: $(READY) ## the same small learning-rate budget for every one of METHODS, judged on validation rows
	@test -n "$(TRAINED)" || { echo "error: hybrid and combined are not swept; sweep their parts, qlora and highrank" >&2; exit 2; }
	@set -e; for m in $(TRAINED); do $(RUN)/sweep.py --method $$m $(FLAGS); done

rate: $(READY) ## score the replies by hand, blind, from 0 to 5 (RATER=your-name)
	@$(RUN)/rate.py $(FLAGS) $(if $(RATER),--rater '$(RATER)')

chat: $(READY) ## talk to the tuned model of METHOD in the terminal
	@$(RUN)/chat.py --method '$(METHOD)' $(ONE)

export: $(READY) ## write METHOD's model, merged in 16 bits, to the folder OUT
	@$(RUN)/export.py --method '$(METHOD)' $(ONE) --out '$(OUT)'

doctor: $(READY) ## what this machine has, and what to do where something is wrong
	@$(RUN)/doctor.py --method '$(METHOD)' $(FLAGS)

bench: $(READY) ## time both sides of every claim of speed, interleaved (minutes each; dora half an hour on a CPU)
	@set -e; for b in startup data metrics report generate train dora scaling; do $(RUN)/bench.py $$b $(FLAGS); done

test: $(READY) ## the tests (4 to 8 minutes on 2 cores)
	@$(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(READY) ## ruff and mypy
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

assets: $(READY) ## rebuild the built-in model and data from their script (about 20 minutes on 2 cores)
	@$(PYTHON) -m kit.assets.make

lock: $(READY) ## resolve requirements.lock anew from pyproject.toml
	@$(PYTHON) -m uv pip compile --quiet --universal --extra dev --no-header --no-annotate pyproject.toml -o requirements.lock

# Results and ratings take hours and cannot be made again by a command: all is listed, and a person says yes.
LEFT = { find data runs -mindepth 1 -maxdepth 1; find runs -mindepth 2 -maxdepth 2 -name ratings; \
         find report -mindepth 1 -maxdepth 1 ! -name example ! -name benchmarks; } 2>/dev/null | sort
clean: ## remove built data, all runs with their ratings, and the report (not .venv); lists them and asks (ARGS=--yes: unasked)
	@test -z "$(filter-out --yes,$(ARGS))$(NAME)$(DATA_DIR)$(RUNS_DIR)$(REPORT_DIR)" || \
	  { echo "error: clean removes data, runs and report of all experiments; it takes ARGS=--yes and nothing else" >&2; exit 2; }
	@left=$$($(LEFT)); test -n "$$left" || { echo "there is nothing to remove"; exit 0; }; \
	printf 'these go:\n%s\n' "$$left"; \
	if test -z "$(filter --yes,$(ARGS))"; then \
	  test -t 0 || { echo "error: nothing was removed; to remove all of this unasked: make clean ARGS=--yes" >&2; exit 2; }; \
	  printf 'remove all of this? [y/N] '; read answer; \
	  case "$$answer" in [yY]|[yY][eE][sS]) ;; *) echo "nothing was removed"; exit 0 ;; esac; \
	fi; \
	rm -rf data runs; test ! -d report || find report -mindepth 1 -maxdepth 1 ! -name example ! -name benchmarks -exec rm -rf {} +
