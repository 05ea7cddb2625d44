.PHONY: check test slow faults format docs
check:
	ruff format --check .
	ruff check .
	lint-imports
	mypy
test:
	pytest
slow:
	pytest -m slow
faults:
	PERTA_FUZZ=20000 PERTA_KILLS=1100 pytest -o faulthandler_timeout=120 tests/faults
format:
	ruff format .
	ruff check --fix .
docs:
	mkdocs build --strict
