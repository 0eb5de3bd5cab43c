# Two commands for newcomers: `make demo` and `make test`. Each installs what it needs into .venv first.

python3 ?= python3
JOBS    ?= 2
BENCHMARKS := quantizers generation_speed
bin     := .venv/bin
stamp   := .venv/.installed
docs    := .venv/.installed-docs

# The tests start Python dozens of times: without bytecode each time would compile what it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install test lint demo bench docs clean

help:
	@echo "make demo      install, show what the bundled models do on a page that opens offline"
	@echo "make test      install, lint, run the tests (JOBS=0 in one process instead of two)"
	@echo "make lint      ruff, pyrefly, pydoclint, import-linter, codespell, deptry"
	@echo "make bench     run the benchmarks that need no photographs of yours"
	@echo "make docs      build the pages of docs/ as a site in site/, which opens offline"
	@echo "make install   make .venv and install softvq with everything that training and testing need"
	@echo "make clean     remove caches and .venv; runs/ stays"

install: $(stamp)

$(stamp): pyproject.toml
	@echo "== Making .venv with $(python3)"
	@$(python3) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "softvq needs Python 3.11 or newer, this is %d.%d: try make python3=python3.12" % sys.version_info[:2])'
	@$(python3) -m venv .venv
	@echo "== Installing softvq and its dependencies into .venv (several minutes the first time)"
	@$(bin)/python -m pip install --disable-pip-version-check --progress-bar off --no-compile -e '.[train,dev]'
	@# pip would compile on one core, and the packages' own tests too; what has no valid syntax is never imported
	@$(bin)/python -m compileall -qq -j 0 -x '/tests/' .venv/lib || true
	@touch $@

lint: install
	@echo "== ruff";          $(bin)/ruff check . && $(bin)/ruff format --check .
	@echo "== pyrefly";       $(bin)/pyrefly check --python-interpreter-path $(bin)/python
	@echo "== pydoclint";     $(bin)/pydoclint softvq
	@echo "== import-linter"; $(bin)/lint-imports --no-cache
	@echo "== codespell";     $(bin)/codespell
	@echo "== deptry";        $(bin)/deptry .

test: lint
	@echo "== pytest"
	@$(bin)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

demo: install
	@$(bin)/softvq demo

bench: install
	@set -e; for job in encode decode; do $(bin)/softvq bench $$job --baseline timm --batch 4 --precision float32 --no-compile; done
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(bin)/python benchmarks/$$name.py; done

$(docs): $(stamp)
	@$(bin)/python -m pip install --disable-pip-version-check --progress-bar off -e '.[docs]'
	@touch $@

docs: $(docs)
	@NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --strict --quiet
	@echo "open site/index.html"

clean:
	rm -rf .venv site .hypothesis .import_linter_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -prune -exec rm -rf {} +
