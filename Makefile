PYTHON ?= python3
BIN = .venv/bin

demo: .venv/installed  # train ReBRAC on the bundled dataset
	$(BIN)/python rebrac.py --dataset_path data/halfcheetah_medium_replay-v2.hdf5 \
		--critic_loss mse --batch_size 256 --num_updates 15000 --eval_every 5000

test: lint  # all but the slow tests
	$(BIN)/python -m pytest -q -m "not slow" -n logical --dist worksteal

test-all: lint
	$(BIN)/python -m pytest -q -n logical --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml harness/mujoco210/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else \
		"error: Python 3.11, 3.12 or 3.13 is needed, not " + sys.version.split()[0] + "; name one: make PYTHON=python3.11")'
	@# Debian has venv's own pip in python3-venv, and another one in python3-pip: either will do.
	$(PYTHON) -m venv .venv >/dev/null || { $(PYTHON) -m venv --without-pip .venv && \
		$(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check pip==25.3; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.txt
	touch $@

.PHONY: demo test test-all lint install
