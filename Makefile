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
	PERTA_FUZZ_CASES=20000 PERTA_KILLS=1100 pytest -s tests/faults
	python tests/faults/guided.py
format:
	ruff format .
	ruff check --fix .
docs:
	mkdocs build --strict
