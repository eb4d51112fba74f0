# Every target creates the environment it needs; `make` alone checks and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-from-requirements
SOURCES := *.py tests bench
SECONDS ?= 300

.PHONY: all run test test-browser browser check fmt clean bench soak hostile

all: check test

$(STAMP): requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

run: $(STAMP)
	$(BIN)/python gateway.py

test: $(STAMP)
	$(BIN)/python -m pytest

test-browser: $(STAMP) browser
	$(BIN)/python -m pytest tests/browser

# Chromium and its driver are the system's own packages; root gets them where they are missing.
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit; \
	command -v apt-get >/dev/null || { echo "The browser tests need chromium and chromedriver, and there is no apt-get here" \
		"to install them with. Install both and run it again." >&2; exit 1; }; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver >/dev/null

check: $(STAMP)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

fmt: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(STAMP)
	$(BIN)/python bench/run.py

soak: $(STAMP)
	$(BIN)/python bench/soak.py --seconds $(SECONDS)

hostile: $(STAMP)
	$(BIN)/python bench/hostile.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
