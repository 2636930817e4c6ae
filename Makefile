# Needs Python 3.10 or newer, make and pip; all else is installed into .venv.
PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=
TORCH_INDEX ?=

CHECK_PYTHON = import sys; v = sys.version_info; \
	sys.exit(v < (3, 10) and "error: Python 3.10 or newer is needed, not %d.%d: name one with PYTHON=" % (v[0], v[1]))
# Before anything else, because an older Python could not even read setup_env.py.
set_up = @$(PYTHON) -c '$(CHECK_PYTHON)' && $(PYTHON) tools/setup_env.py --torch-index '$(TORCH_INDEX)'

.PHONY: help run test test-gpu test-gfx950 lint clean

help:
	@echo 'make run        recite a sonnet with the megakernel; ARGS="--chat ... --max-new-tokens N"'
	@echo 'make test       all tests that need no GPU; PYTEST_ARGS="-k ...", -n 0 for one process'
	@echo 'make test-gpu   the tests that need one'
	@echo 'make test-gfx950 the gfx950 code of everything, executed in an emulator; long'
	@echo 'make lint       ruff'
	@echo 'make clean      remove .venv and caches'
	@echo
	@echo 'The first use sets up .venv. PYTHON=... names the Python: its torch and triton are used if they find a GPU.'
	@echo 'With no GPU CPU builds are installed; TORCH_INDEX=URL adds a package index that has them.'

run:
	$(set_up) run
	@.venv/bin/python gpt_oss_megakernel.py --quant $(ARGS) < /dev/null

test:
	$(set_up) test
	@.venv/bin/python -m pytest -n auto --dist worksteal $(PYTEST_ARGS)

test-gpu:
	$(set_up) test
	@.venv/bin/python -m pytest tests/gpu -n auto --durations=25 $(PYTEST_ARGS)

test-gfx950:
	$(set_up) test
	@.venv/bin/python -m pytest tests/emulator -n auto --dist worksteal --durations=25 $(PYTEST_ARGS)

lint:
	$(set_up) lint
	@.venv/bin/python -m ruff check --output-format concise .
	@.venv/bin/python -m ruff format --check .

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
