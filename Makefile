# Two commands do everything: `make train` and `make test`. Constants of the scripts are set as in `make train BETA=0 MODEL=tiny`.

PYTHON ?= python3
TASK = game24
OUT = runs/$(TASK)
DATA = $(OUT)/data
SFT = $(OUT)/sft
EVAL = $(OUT)/eval$(if $(HANDS),-$(basename $(notdir $(HANDS))))
Q = $(if $(filter lyrics,$(TASK)),月光 故乡 远方,3 3 8 8)
STAGE = cot
DEVICE = cpu
SCRIPTS = data_prep sft grpo eval
RUN = .venv/bin/python

# The constants of a script are the names in capitals at the starts of its lines, and those of reward.py.
names = $(shell sed -n 's/^\([A-Z][A-Z0-9_, ]*\) = ["0-9.-].*/\1/p' $(1).py reward.py | tr -d ' ' | tr ',' '\n' | sort -u)
$(foreach s,$(SCRIPTS),$(eval NAMES_$(s) := $(call names,$(s))))
given = $(foreach v,$(1),$(if $(filter command,$(firstword $(origin $(v)))),$(v)))
# From make these are constants of grpo.py; sft.py has SFT_STEPS, SFT_LR and so on.
SHARED = STEPS LR WARMUP MIN_LR WEIGHT_DECAY EVAL_EVERY
flag = --$(shell echo $(1) | tr A-Z a-z)='$($(2))'
flags = $(foreach v,$(call given,$(filter-out $(2),$(NAMES_$(1)))),$(call flag,$(v),$(v)))
# RESUME=0 reaches the stages that are asked for, not what they are built on.
again = $(if $(filter train $(1),$(MAKECMDGOALS)),,RESUME)
FLAGS_data_prep = $(call flags,data_prep,$(call again,data))
FLAGS_sft = $(call flags,sft,$(SHARED) $(call again,sft)) $(foreach v,$(call given,$(SHARED:%=SFT_%)),$(call flag,$(v:SFT_%=%),$(v)))
FLAGS_grpo = $(call flags,grpo,$(call again,grpo))
FLAGS_eval = $(call flags,eval,$(call again,eval))
anew = $(if $(call again,$(1)),,$(if $(call given,RESUME),$(if $(filter 0,$(RESUME)),FORCE)))

KNOWN = $(sort $(foreach s,$(SCRIPTS),$(NAMES_$(s))) $(SHARED:%=SFT_%) Q PYTHON DEVICE DATA SFT OUT TASK)
GIVEN = $(foreach v,$(filter-out MAKE% -%,$(.VARIABLES)),$(if $(filter command,$(firstword $(origin $(v)))),$(v)))
UNKNOWN = $(filter-out $(KNOWN),$(GIVEN))
ifneq ($(UNKNOWN),)
NEAREST := $(shell python3 -c "import difflib, sys; print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 3, 0.5))" $(firstword $(UNKNOWN)) $(KNOWN))
$(error no script has a constant $(firstword $(UNKNOWN)); nearest: $(or $(NEAREST),none, see make help))
endif

$(foreach v,OUT DATA SFT HANDS HOLDOUT RAW HUMAN,$(if $(word 2,$($(v))),$(error $(v) must be a path without spaces, not $($(v)))))

.PHONY: help train data sft grpo eval plots ask judge export qwen-lora qwen-cot-lora ds-lora ds-rl test lint soak bench audit clean FORCE
.DELETE_ON_ERROR:

help:             ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /make \1 \t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 21
	@echo 'Constants: make train BETA=0 STEPS=50; each script lists its own with --help'

train: eval       ## environment, data, SFT, GRPO, evaluation with plots
data: $(DATA)/summary.json       ## train, val and test as jsonl
sft: $(SFT)/summary.json         ## supervised fine-tuning
grpo: $(OUT)/grpo/summary.json   ## GRPO from the SFT policy
eval: $(EVAL)/summary.json       ## SFT against GRPO on the test split: table, plots, report.md

.venv: .venv/ready
.venv/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is %d.%d; PYTHON= another one" % sys.version_info[:2] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch $@

# The flags of a stage in a file that changes only when they do, so that another constant runs the stage again.
$(OUT)/.%.flags: FORCE
	@mkdir -p $(OUT); printf '%s\n' "$(FLAGS_$*)" | cmp -s - $@ || printf '%s\n' "$(FLAGS_$*)" > $@

# With RAW= data_prep.py looks at each text whether it is the same as before: a folder does not say that what is in it has changed.
# DATA= and SFT= from the command line are there already: files of one's own, or a hub model.
DATA_READY = $(if $(filter file,$(origin DATA)),$(DATA)/summary.json,$(wildcard $(DATA)/*.jsonl))
SFT_READY = $(if $(filter file,$(origin SFT)),$(SFT)/summary.json,$(wildcard $(SFT)/summary.json))

ifeq ($(origin DATA),file)
$(DATA)/summary.json: data_prep.py reward.py $(OUT)/.data_prep.flags $(wildcard $(HOLDOUT)) $(if $(RAW),FORCE) $(call anew,data) | .venv/ready
	$(RUN) data_prep.py $(FLAGS_data_prep)
endif
ifeq ($(origin SFT),file)
# Lyrics: SFT on texts alone, then with keywords, then with thoughts, each from the policy of the one before (report on creative text).
BEFORE_keywords = raw
BEFORE_cot = raw keywords
STAGES := $(if $(filter lyrics,$(TASK)),$(if $(filter file,$(origin DATA))$(wildcard $(DATA)/raw),$(BEFORE_$(STAGE))))
from = $(if $(1),--model=$(OUT)/$(lastword $(1))/sft)
stage_ready = $(if $(1),$(OUT)/$(lastword $(1))/sft/summary.json)
$(OUT)/raw/sft/summary.json: sft.py reward.py $(DATA_READY) $(OUT)/.sft.flags $(call anew,sft) | .venv/ready
	$(RUN) sft.py $(FLAGS_sft) --out=$(OUT)/raw --data=$(DATA)/raw --vocabulary=$(DATA)/train.jsonl
$(OUT)/keywords/sft/summary.json: sft.py reward.py $(OUT)/raw/sft/summary.json $(OUT)/.sft.flags $(call anew,sft) | .venv/ready
	$(RUN) sft.py $(FLAGS_sft) --out=$(OUT)/keywords --data=$(DATA)/keywords --model=$(OUT)/raw/sft
$(SFT)/summary.json: sft.py reward.py $(DATA_READY) $(call stage_ready,$(STAGES)) $(OUT)/.sft.flags $(call anew,sft) | .venv/ready
	$(RUN) sft.py $(FLAGS_sft) $(call from,$(STAGES))
endif
$(OUT)/grpo/summary.json: grpo.py reward.py $(DATA_READY) $(SFT_READY) $(OUT)/.grpo.flags $(call anew,grpo) | .venv/ready
	$(RUN) grpo.py $(FLAGS_grpo)
# Of hands of one's own a finished run is asked as it is, whatever constants it was trained with.
TRAINED = $(if $(POLICIES),$(DATA_READY),$(if $(and $(HANDS),$(wildcard $(OUT)/grpo/summary.json)),,$(OUT)/grpo/summary.json))
$(EVAL)/summary.json: eval.py reward.py $(TRAINED) $(OUT)/.eval.flags $(wildcard $(HANDS)) $(call anew,eval) | .venv/ready
	$(RUN) eval.py $(FLAGS_eval)

# The four models of the report on creative text: SFT on texts and keywords; on thoughts too; the same from a reasoning model; then GRPO.
PLACE = $(if $(filter file,$(origin OUT)),runs/$@,$(OUT))
BASE = $(if $(filter qwen-%,$@),Qwen/Qwen2.5-0.5B-Instruct,deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B)
own = TASK=lyrics OUT=$(PLACE) MODEL=$(or $(MODEL),$(BASE)) $(if $(filter qwen-lora,$@),STAGE=keywords)
qwen-lora:         ## Qwen2.5-0.5B on texts, then keywords; no thoughts
qwen-cot-lora:     ## Qwen2.5-0.5B on texts, keywords, then thoughts
ds-lora:           ## DeepSeek-R1-Distill-1.5B likewise
qwen-lora qwen-cot-lora ds-lora:
	$(MAKE) sft $(own)
	$(MAKE) eval $(own) POLICIES=$@=$(PLACE)/sft
ds-rl:             ## DeepSeek-R1-Distill-1.5B likewise, then GRPO
	$(MAKE) train $(own)

plots: | .venv/ready       ## draw the figures of a run again, also of one that is under way
	$(RUN) eval.py $(FLAGS_eval) --plots_only=1

judge: | .venv/ready       ## lyrics: the verses of the evaluation by API_MODEL (API_KEY), or HUMAN=people.csv filled in
	$(RUN) eval.py $(FLAGS_eval) $(if $(strip $(HUMAN)$(JUDGE)),,--judge=1)

ask: | .venv/ready         ## Q="3 3 8 8": the completion before and after GRPO
	$(RUN) eval.py $(FLAGS_eval) --ask='$(or $(strip $(subst ','\'',$(Q))),$(error Q= is empty: what is to be asked?))'

export: | .venv/ready      ## the GRPO policy as a plain folder of transformers, the adapter merged
	$(RUN) eval.py $(FLAGS_eval) --export='$(OUT)/export'

test: .venv/ready-dev lint   ## all tests
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest

lint: .venv/ready-dev      ## ruff
	.venv/bin/ruff check .

soak: .venv/ready-dev        ## kill and damage training runs at random, compare their ends with undisturbed ones
	OMP_NUM_THREADS=1 .venv/bin/python tests/soak.py

bench: .venv/ready-dev       ## speed and memory against transformers and TRL; on a GPU DEVICE=cuda
	.venv/bin/python tests/bench.py --device=$(DEVICE)

audit: .venv/ready         ## known vulnerabilities of the installed packages, by pip-audit
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/pip install --quiet pip-audit==2.10.1
	.venv/audit/bin/pip-audit --path .venv/lib/python*/site-packages

clean:            ## remove the environment and caches; runs/ stays
	rm -rf .venv __pycache__ tests/__pycache__ .pytest_cache .ruff_cache .hypothesis
