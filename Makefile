.PHONY: check test slow format docs
check:
	ruff format --check .
	ruff check .
	lint-imports
	mypy
test:
	pytest
slow:
	pytest -m slow
format:
	ruff format .
	ruff check --fix .
docs:
	mkdocs build --strict
