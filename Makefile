# make demo    install into .venv, run the main job on the embedded default, write report.html
# make test    install into .venv, run the tests
# make test-slow   run the tests that take long (a real Slurm among them)
# make check   what .ci/run checks besides the tests: formatting, lint, types, layers
PYTHON ?= python3
VENV   ?= .venv
CORES  ?= 2
# not $(abspath), which takes a directory with a space for two
export BIN := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(VENV)/bin
# the rules call commands of the environment by name
export PATH := $(BIN):$(PATH)

.PHONY: demo test test-slow check install clean

install: $(VENV)/.installed

$(VENV)/.installed: envs/requirements.lock pyproject.toml
	@case "$$BIN" in *[[:cntrl:]:{}\"\`\\$$]*) \
	    printf '%s %s %s\n' "$$BIN: a virtual environment does not work in a directory with a line break or one of" \
	        ': { } " ` \ $$' "in its name; rename the directory, or set VENV to another one" >&2; exit 1;; esac
	$(PYTHON) -m venv "$(VENV)"
	"$$BIN/python" -m pip install --quiet --disable-pip-version-check -r envs/requirements.lock
	"$$BIN/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch "$@"

demo: install
	snakemake --cores $(CORES) results/mmbench.json all
	snakemake --cores $(CORES) results/mmbench.json all --report report.html
	@mmpipe show results/mmbench.json
	@mmpipe show results/pope.json
	@echo
	@echo "The report:      report.html"
	@echo "The checkpoint:  results/demo/finetune/model"
	@echo "To go on:        source $(VENV)/bin/activate && snakemake --cores $(CORES) results/mmbench.json"

test: install
	OMP_NUM_THREADS=1 pytest -m "not slow" --numprocesses auto --dist loadfile --no-loadscope-reorder --durations=10

# a file stays in one worker: the tests on Slurm start and stop one cluster
test-slow: install
	OMP_NUM_THREADS=1 pytest -m slow --numprocesses 2 --dist loadfile --durations=10

check: install
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile rules
	snakemake --lint
	mypy
	lint-imports
	python perf/house.py

clean:
	rm -rf results/*/ results/.mmpipe results/*.json results/*.html resources logs .snakemake report.html
