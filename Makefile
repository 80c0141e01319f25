# `make demo` and `make test` set everything up by themselves; scripts/setup.sh says what is missing.
.PHONY: demo test lint setup
setup:
	@scripts/setup.sh
demo: setup
	@.venv/bin/aidx demo
test: setup
	@.venv/bin/python -m pytest -n 2 --dist loadgroup
lint: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/pyright --pythonpath .venv/bin/python
