# Two commands for a newcomer:   make demo    (synthetic records, no network, minutes on a CPU)
#                                make test
# The real thing:                make pretrain VIEW=noncontig

VIEW   ?= noncontig# stochastic, contig, noncontig; or an alias: augment, nonoverlap, interleaved
SEED   ?= 0# of everything random
PRESET ?= paper# paper; small: the same for CPUs; conv: worth most on up to a few thousand records
DATA   ?= data/ptbxl# a PTB-XL folder; nothing is downloaded when it is another one
ARGS   ?=# further flags of the target's script, such as --epochs 20, or --fast for eval
NPROC  ?= 1# processes that share each batch of pretrain, one a GPU
PYTHON ?= python3# makes .venv; 3.11 or later

NAME  := $(patsubst augment,stochastic,$(patsubst nonoverlap,contig,$(patsubst interleaved,noncontig,$(VIEW))))
ifeq ($(filter stochastic contig noncontig,$(NAME)),)
$(error unknown VIEW '$(VIEW)'; choose one of stochastic (or augment), contig (or nonoverlap), noncontig (or interleaved))
endif
RATE  ?= $(if $(filter stochastic,$(NAME))$(filter conv,$(PRESET)),100,500)# Hz: 100 or 500; as in the paper by default, 100 for conv
RUN   ?= runs/$(NAME)-s$(SEED)# run folder: a new one for other ARGS
RUNS  ?=# for compare, by default all finished ones but the demo's; for plots, by default RUN
FINISHED := $(filter-out runs/demo-%,$(patsubst %/model.pt,%,$(wildcard runs/*/model.pt)))
CACHES := cache/$(notdir $(abspath $(DATA)))
CACHE := $(CACHES)-$(RATE)
PY    := .venv/bin/python
TORCHRUN := $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --standalone --nproc-per-node $(NPROC) --)
ifneq ($(words $(VIEW)) $(words $(DATA)) $(words $(RUN)),1 1 1)
$(error VIEW, DATA and RUN are one word each, without spaces)
endif

# Only the default folder is downloaded into.
SOURCE := $(if $(filter data/ptbxl,$(DATA)),data/ptbxl/.complete-%,$(wildcard $(DATA)/ptbxl_database.csv))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: help download cache pretrain eval compare plots attention bench demo test info clean FORCE
export PYTORCH_ENABLE_MPS_FALLBACK = 1

help: ## this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@awk -F '[?]= *|#' '/^[A-Z]+ *[?]=/ { printf "%-8s%s\n", $$1, $$3 }' $(MAKEFILE_LIST)
	@echo
	@echo "now: VIEW=$(VIEW) SEED=$(SEED) RATE=$(RATE) PRESET=$(PRESET) DATA=$(DATA) RUN=$(RUN) ARGS=$(ARGS)"
	@echo "Scripts skip what is done and resume what was cut off; a changed *.py retrains nothing."

demo: data/synth/SHA256SUMS.txt ## the whole chain on synthetic records, without network
	$(MAKE) pretrain DATA=data/synth RATE=100 PRESET=conv RUN=runs/demo-$(NAME)-s$(SEED) ARGS="--epochs 40 --batch-size 32 $(ARGS)"
	$(MAKE) eval RUN=runs/demo-$(NAME)-s$(SEED) ARGS="--fast --cv"
	$(MAKE) plots RUN=runs/demo-$(NAME)-s$(SEED) RUNS= ARGS=

test: | .venv/.done ## the tests; FAST=1 leaves out the slow ones, PTBXL=folder adds real records
	$(PY) -m pytest -q -rs test_all.py

download: data/ptbxl/.complete-$(RATE) ## PTB-XL 1.0.3 from PhysioNet, only what RATE needs

cache: $(CACHE)/meta.json ## all records of DATA in one int16 array

pretrain: $(RUN)/model.pt ## train an encoder with VIEW; the same command resumes

# Not made from model.pt by rule: that would train, with the wrong flags, what is not there.
eval: | .venv/.done ## tables and figures of the finished run RUN, beside baselines
	$(PY) evaluate.py run --run $(RUN) $(ARGS)

compare: | .venv/.done ## tables over all evaluated RUNS, the paper's numbers beside ours
	$(PY) evaluate.py compare $(or $(RUNS),$(FINISHED)) $(ARGS)

plots: | .venv/.done ## every figure of RUN; with RUNS="runs/a runs/b" their training in one
	$(PY) attention.py plots $(or $(RUNS),$(RUN)) $(ARGS)

attention: | .venv/.done ## attention maps of RUN; ARGS="--ecg-id 9" or ARGS="--superclass MI"
	$(PY) attention.py maps --run $(RUN) $(ARGS)

bench: $(CACHES)-100/meta.json $(CACHES)-500/meta.json ## what loading and training cost here, into runs/bench.json
	$(PY) evaluate.py bench $(CACHES)-100 $(CACHES)-500 $(ARGS)

info: | .venv/.done ## records of DATA by fold and superclass
	$(PY) data.py info --data "$(DATA)"

clean: ## remove caches and the demo; runs, downloads and .venv stay
	rm -rf cache data/synth runs/demo-* __pycache__ .pytest_cache

.venv/.done: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --disable-pip-version-check -r requirements.txt
	touch $@

data/ptbxl/.complete-%: | .venv/.done
	$(PY) data.py download --data data/ptbxl --rate $*

data/synth/SHA256SUMS.txt: | .venv/.done
	$(PY) data.py synth --out data/synth --records 300

# FORCE: the scripts know better than time stamps whether there is something to do.
$(CACHES)-%/meta.json: $(SOURCE) FORCE | .venv/.done
	$(PY) data.py cache --data "$(DATA)" --rate $* --out $(CACHES)-$*

$(RUN)/model.pt: FORCE | $(CACHE)/meta.json
	$(PY) $(TORCHRUN) train.py --view $(VIEW) --cache $(CACHE) --run $(RUN) --seed $(SEED) --preset $(PRESET) $(ARGS)
