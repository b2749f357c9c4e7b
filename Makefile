# First: make demo (no network, minutes on a CPU). Then: make pretrain and make eval, or make study.
VIEW   ?= noncontig# of pretrain: stochastic, contig, noncontig, masking, or an alias: see views.py
SEED   ?= 0# of everything random
PRESET ?= paper# paper; small: the same for CPUs; conv: worth most on up to a few thousand records
DATA   ?= data/ptbxl# a PTB-XL folder, another collection, or several; no other is downloaded
LABELS ?= superclass# of eval, compare, info: a label set of PTB-XL, or codes, columns of your own
ARGS   ?=# further flags of the target's script, such as --epochs 20, or --fast for eval
READ   ?=# of other collections: what their files do not tell, such as --unit mV; --skip-bad
NPROC  ?= 1# processes that share each batch of pretrain, one a GPU
ROWS   ?= $(NAMES)# of study: views, with flags of train.py: "contig noncontig+equal+shift"
SEEDS  ?= 3# of study: runs of each row, ten at most
JOBS   ?= 1# of study: runs at a time, each with its share of the cores
EVAL   ?= --fast --cv# of study: flags of eval; --fast leaves out what trains networks
PYTHON ?= python3# makes .venv; 3.11 or later
RATE   ?= $(if $(filter conv,$(PRESET))$(filter $(NAME),$(AT_100)),100,500)# Hz; 100 for conv
RUN    ?= runs/$(NAME)-s$(SEED)# run folder: a new one for other ARGS
ECG    ?=# of embed: recordings, files or folders: WFDB, npy, npz, CSV, HDF5
RUNS   ?=# for compare, by default all finished ones but the demo's; for plots, by default RUN
OUT    ?= runs/study# of study: folder of its runs, comparison and figures

# Views as in VIEWS of views.py: names, aliases, and which of them the paper runs at 100 Hz.
NAMES   := stochastic contig noncontig masking
ALIASES := stochastic:augment contig:nonoverlap noncontig:interleaved
AT_100  := stochastic masking
NAME    := $(or $(filter $(NAMES),$(VIEW)),$(patsubst %:$(VIEW),%,$(filter %:$(VIEW),$(ALIASES))))
CACHES  := cache/$(shell echo $(notdir $(abspath $(DATA))) | tr ' ' +)
CACHE    = $(CACHES)-$(RATE)
FINISHED := $(filter-out runs/demo-%,$(patsubst %/model.pt,%,$(wildcard runs/*/model.pt)))
ROW_VIEWS := $(foreach row,$(ROWS),$(firstword $(subst +, ,$(row))))
PY      := .venv/bin/python
# What is mistyped ends here, before any work.
KNOWN   := $(shell awk '/^[A-Z]+ *[?]=/ { print $$1 }' Makefile) FAST PTBXL OMP_NUM_THREADS
UNKNOWN := $(filter-out $(KNOWN),$(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $v)),$v)))
$(if $(UNKNOWN),$(error unknown variable $(UNKNOWN); choose of $(KNOWN)))
$(if $(filter 1,$(words $(NAME))),,$(error unknown VIEW '$(VIEW)'; choose one of $(NAMES)))
$(if $(filter-out $(NAMES),$(ROW_VIEWS)),$(error unknown view in ROWS=$(ROWS); choose of $(NAMES)))
$(if $(filter paper small conv,$(PRESET)),,$(error unknown PRESET '$(PRESET)': paper, small, conv))
$(if $(filter 100 500,$(RATE)),,$(error unknown RATE '$(RATE)'; choose 100 or 500))
$(if $(filter --view% --seed --seed=% --run%,$(ARGS)),$(error give VIEW, SEED, RUN, not $(ARGS)))

help: ## this text; scripts skip what is done and resume what was cut off
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile
	@awk -F '[?]= *|#' '/^[A-Z]+ *[?]=/ { printf "%-8s%s\n", $$1, $$3 }' Makefile
	@echo "now: VIEW=$(VIEW) SEED=$(SEED) RATE=$(RATE) PRESET=$(PRESET) DATA=$(DATA) RUN=$(RUN)"
demo: data/synth/SHA256SUMS.txt ## the whole chain on synthetic records, without network
	$(MAKE) pretrain DATA=data/synth RATE=100 PRESET=conv RUN=runs/demo-$(NAME)-s$(SEED) \
		ARGS="--epochs 40 --batch-size 32 $(ARGS)"
	$(MAKE) plots RUN=runs/demo-$(NAME)-s$(SEED) RUNS= ARGS=
	$(MAKE) eval RUN=runs/demo-$(NAME)-s$(SEED) ARGS="--fast --cv"
test: | .venv/.done ## the tests; FAST=1 leaves out the slow ones, PTBXL=folder adds real records
	$(PY) -m pytest -q -rs test_all.py
download: data/ptbxl/.complete-$(RATE) ## PTB-XL 1.0.3 from PhysioNet, only what RATE needs
cache: $(CACHE)/meta.json ## all records of DATA in one int16 array
pretrain: $(RUN)/model.pt ## train an encoder with VIEW; the same command resumes
eval: | .venv/.done ## tables and figures of the finished run RUN, beside baselines
	$(PY) evaluate.py run --run $(RUN) --labels-of '$(LABELS)' $(ARGS)
embed: | .venv/.done ## representations and probabilities of your recordings ECG="files or folders"
	$(PY) evaluate.py embed $(ECG) --run $(RUN) $(ARGS)
compare: | .venv/.done ## tables over all evaluated RUNS
	$(PY) evaluate.py compare $(or $(RUNS),$(FINISHED)) --labels-of '$(LABELS)' $(ARGS)
plots: | .venv/.done ## every figure of RUN; with RUNS="runs/a runs/b" theirs side by side
	$(PY) attention.py plots $(or $(RUNS),$(RUN)) $(ARGS)
attention: | .venv/.done ## attention maps of RUN; ARGS="--ecg-id 9" or ARGS="--superclass MI"
	$(PY) attention.py maps $(RUN) $(ARGS)
info: | .venv/.done ## records of DATA by fold and label
	$(PY) data.py info --data $(DATA) --labels-of '$(LABELS)'
clean: ## remove caches and the demo; runs, downloads and .venv stay
	rm -rf cache data/synth runs/demo-* __pycache__ .pytest_cache
# A run of a study, such as OUT/contig-s0, is a row and a seed; .done marks one that has ended well.
STUDY   := $(foreach n,$(wordlist 1,$(SEEDS),0 1 2 3 4 5 6 7 8 9),$(ROWS:%=$(OUT)/%-s$(n)))
DONE    := $(patsubst %/.done,%,$(wildcard $(STUDY:%=%/.done)))
REPORT := $(if $(filter superclass,$(LABELS)),,$(shell echo 'labels-$(LABELS)' | tr ' ' ,)/)report.md
seed     = $(lastword $(subst -s, ,$*))
row      = $(subst +, ,$(*:%-s$(seed)=%))# as words: the view, and flags
threads  = $(shell expr \( $$(getconf _NPROCESSORS_ONLN) + $(JOBS) - 1 \) / $(JOBS))
study: $(sort $(foreach NAME,$(ROW_VIEWS),$(CACHE)/meta.json)) ## pretrain, eval and compare ROWS
	rm -f $(STUDY:%=%/.done)
	-$(MAKE) -k $(if $(filter-out 1,$(JOBS)),-j$(JOBS) OMP_NUM_THREADS=$(threads)) study-runs
	$(MAKE) study-report
study-runs: $(STUDY:%=%/.done)
$(OUT)/%/.done: $(OUT)/%/$(REPORT)
	touch $@
$(OUT)/%/$(REPORT): $(OUT)/%/model.pt
	$(MAKE) eval RUN=$(OUT)/$* ARGS='$(EVAL)'
$(OUT)/%/model.pt: FORCE
	$(MAKE) pretrain RUN=$(OUT)/$* VIEW=$(firstword $(row)) SEED=$(seed) \
		ARGS='$(addprefix --,$(wordlist 2,99,$(row))) $(ARGS)'
study-report:
	$(if $(DONE),$(MAKE) compare RUNS="$(DONE)" ARGS="--out $(OUT)/compare")
	$(if $(DONE),$(MAKE) plots RUNS="$(or $(filter %-s0,$(DONE)),$(DONE))" ARGS="--out $(OUT)/figures")
	@echo "without result: $(or $(filter-out $(DONE),$(STUDY)),none)"; test "$(DONE)" = "$(STUDY)"
.venv/.done: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON= of 3.11 or later")'
	$(PYTHON) -m venv .venv && .venv/bin/pip install -q -r requirements.txt
	touch $@
data/ptbxl/.complete-%: | .venv/.done
	$(PY) data.py download --data data/ptbxl --rate $*
data/synth/SHA256SUMS.txt: | .venv/.done
	$(PY) data.py synth --out data/synth --records 300
# FORCE: scripts know better than time stamps what there is to do. Only data/ptbxl is downloaded.
$(CACHES)-%/meta.json: $(if $(filter data/ptbxl,$(DATA)),data/ptbxl/.complete-%) FORCE | .venv/.done
	$(PY) data.py cache $(READ) --data $(DATA) --rate $* --out $(CACHES)-$*
$(RUN)/model.pt: FORCE | $(CACHE)/meta.json
	$(PY) $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --standalone --shutdown-timeout 600 \
		--nproc-per-node $(NPROC) --) train.py --view $(VIEW) --cache $(CACHE) --run $(RUN) \
		--seed $(SEED) --preset $(PRESET) $(ARGS)
.DELETE_ON_ERROR .SECONDARY:
.PHONY: help demo test download cache pretrain eval embed compare study plots attention info clean
.PHONY: study-runs study-report FORCE
export PYTORCH_ENABLE_MPS_FALLBACK = 1
