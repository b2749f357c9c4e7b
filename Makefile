# Two commands for a newcomer:   make demo    (synthetic records, no network, minutes on a CPU)
#                                make test
# The real thing:                make pretrain VIEW=noncontig
# All views, compared:           make study

VIEW   ?= noncontig# of pretrain: stochastic, contig, noncontig, masking, or an alias: see views.py
SEED   ?= 0# of everything random
PRESET ?= paper# paper; small: the same for CPUs; conv: worth most on up to a few thousand records
DATA   ?= data/ptbxl# a PTB-XL folder, another collection, or several; no other is downloaded
ARGS   ?=# further flags of the target's script, such as --epochs 20, or --fast for eval
READ   ?=# of other collections: what their files do not tell, such as --unit mV; --skip-bad
NPROC  ?= 1# processes that share each batch of pretrain, one a GPU
STUDY  ?= views# of study: views, equal, streams, collapse, departures, cost: see STUDIES in evaluate.py
SEEDS  ?= 3# of study: runs of each row
JOBS   ?= 1# of study: runs at a time, each with its share of the cores
EVAL   ?= --fast --cv# of study: how runs are evaluated; --fast leaves out what trains networks
PYTHON ?= python3# makes .venv; 3.11 or later

# Names, aliases and rates are those of VIEWS in views.py.
NAMES := $(shell sed -nE 's/^    "([a-z0-9]+)": View.*/\1/p' views.py)
NAME  := $(or $(filter $(VIEW),$(NAMES)),$(shell sed -nE 's/^    "([a-z0-9]+)": View.*alias="$(VIEW)".*/\1/p' views.py))
ifeq ($(NAME),)
$(error unknown VIEW '$(VIEW)'; choose one of $(NAMES), or an alias: see views.py)
endif
STUDIES := $(shell sed -nE 's/^    "([a-z]+)": Study.*/\1/p' evaluate.py)
ifeq ($(filter $(STUDY),$(STUDIES)),)
$(error unknown STUDY '$(STUDY)'; choose one of $(STUDIES))
endif
RATE  ?= $(if $(filter conv,$(PRESET))$(shell grep '^    "$(NAME)": View.*rate=100' views.py),100,500)# Hz: 100 or 500; by default as in the paper, 100 for conv
RUN   ?= runs/$(NAME)-s$(SEED)# run folder: a new one for other ARGS
ECG   ?=# of embed: recordings, files or folders: WFDB, EDF, npy, npz, CSV, HDF5
RUNS  ?=# for compare, by default all finished ones but the demo's; for plots, by default RUN
FINISHED := $(filter-out runs/demo-%,$(patsubst %/model.pt,%,$(wildcard runs/*/model.pt)))
EMPTY :=
CACHES := cache/$(subst $(EMPTY) ,+,$(notdir $(abspath $(DATA))))
CACHE := $(CACHES)-$(RATE)
STUDY_RATES := $(if $(filter-out file,$(origin RATE)),$(RATE),100 $(if $(filter views,$(STUDY)),$(if $(filter conv,$(PRESET)),,500)))
OUT   ?= runs/study$(addprefix -,$(filter-out views,$(STUDY)))# of study: folder of its runs and report
PY    := .venv/bin/python
TORCHRUN := $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --standalone --nproc-per-node $(NPROC) --shutdown-timeout 600 --)
ifneq ($(words $(VIEW)) $(words $(RUN)),1 1)
$(error VIEW and RUN are one word each, without spaces)
endif
# Else runs/contig-s0 could hold another view than it says.
NAMING := $(filter --view% --seed% --run% --cache%,$(ARGS))
ifneq ($(and $(NAMING),$(filter pretrain demo,$(MAKECMDGOALS))),)
$(error $(NAMING) in ARGS: give VIEW=, SEED=, RUN= or DATA= of make instead)
endif

# Only the default folder is downloaded into.
SOURCE := $(if $(filter data/ptbxl,$(DATA)),data/ptbxl/.complete-%)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: help download cache pretrain eval embed export compare plots attention study bench demo test info clean FORCE
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

embed: | .venv/.done ## representations and probabilities of your recordings ECG="files or folders"
	$(PY) evaluate.py embed $(ECG) --run $(RUN) $(ARGS)

export: | .venv/.done ## one folder with all that RUN's encoder needs elsewhere
	$(PY) evaluate.py export --run $(RUN) $(ARGS)

compare: | .venv/.done ## tables over all evaluated RUNS, the paper's numbers beside ours
	$(PY) evaluate.py compare $(or $(RUNS),$(FINISHED)) $(ARGS)

study: $(STUDY_RATES:%=$(CACHES)-%/meta.json) ## all views, SEEDS runs each: one report in OUT; or another STUDY
	$(PY) evaluate.py study --study $(STUDY) --caches $(STUDY_RATES:%=$(CACHES)-%) --preset $(PRESET) \
		--seeds $(SEEDS) --jobs $(JOBS) --out $(OUT) --eval="$(EVAL)" --train="$(ARGS)"

plots: | .venv/.done ## every figure of RUN; with RUNS="runs/a runs/b" theirs side by side
	$(PY) attention.py plots $(or $(RUNS),$(RUN)) $(ARGS)

attention: | .venv/.done ## attention maps of RUN; ARGS="--ecg-id 9" or ARGS="--superclass MI"
	$(PY) attention.py maps --run $(RUN) $(ARGS)

bench: ## what a step of PRESET costs here, exact and otherwise: STUDY=cost
	$(MAKE) study STUDY=cost SEEDS=2 ARGS="--epochs 3 $(ARGS)"

info: | .venv/.done ## records of DATA by fold and superclass
	$(PY) data.py info --data $(DATA)

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
	$(PY) data.py cache $(READ) --data $(DATA) --rate $* --out $(CACHES)-$*

$(RUN)/model.pt: FORCE | $(CACHE)/meta.json
	$(PY) $(TORCHRUN) train.py --view $(VIEW) --cache $(CACHE) --run $(RUN) --seed $(SEED) --preset $(PRESET) $(ARGS)
