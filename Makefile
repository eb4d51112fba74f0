# Every target creates the environment it needs; `make` alone checks and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.installed-requirements
DEV := $(VENV)/.installed-requirements-dev
SCALE := $(VENV)/.installed-requirements-scale
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := .
SECONDS ?= 300
# Processes for the tests; auto: two for each core (tests/conftest.py).
WORKERS ?= auto
# Compiled once and kept: in some shells Python is told to do without, and each of the tests' processes starts anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: all run test test-browser browser test-scale servers check fmt clean bench turns soak hostile chaos drill doctor

all: check test

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): requirements.txt | $(BIN)/pip
	$(PIP) -r requirements.txt
	touch $@

$(DEV): requirements-dev.txt $(RUNTIME)
	$(PIP) -r requirements-dev.txt
	touch $@

$(SCALE): requirements-scale.txt $(DEV)
	$(PIP) -r requirements-scale.txt
	touch $@

run: $(RUNTIME)
	$(BIN)/python gateway.py

test: $(DEV)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-browser: $(DEV) browser
	$(BIN)/python -m pytest tests/browser

# Chromium and its driver are the system's own packages; root gets them where they are missing.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit; \
	command -v apt-get >/dev/null || { echo "The browser tests need chromium and chromedriver, and there is no apt-get here" \
		"to install them with. Install both and run it again." >&2; exit 1; }; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null

# Several gateways on a Redis and a PostgreSQL of their own, which the tests start and end.
test-scale: $(SCALE) servers
	$(BIN)/python -m pytest tests/scale -n 2 --dist worksteal

servers:
	@command -v redis-server >/dev/null && { command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; } && exit; \
	command -v apt-get >/dev/null || { echo "The tests of several gateways need redis-server and postgresql, and there is no" \
		"apt-get here to install them with. Install both and run it again." >&2; exit 1; }; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq redis-server postgresql >/dev/null

check: $(DEV)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

fmt: $(DEV)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

drill: $(RUNTIME)
	$(BIN)/python gateway.py drill

doctor: $(RUNTIME)
	$(BIN)/python gateway.py doctor

bench: $(DEV)
	$(BIN)/python bench/run.py

turns: $(DEV)
	$(BIN)/python bench/turns.py

soak: $(DEV)
	$(BIN)/python bench/soak.py --seconds $(SECONDS)

hostile: $(DEV)
	$(BIN)/python bench/hostile.py

chaos: $(DEV)
	$(BIN)/python bench/chaos.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
