"""The command line starts at once."""

from __future__ import annotations

import os
import subprocess
import sys


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = (
        "import sys, perta.cli; "
        "print([m for m in ('torch', 'transformers', 'datasets', 'scipy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_methods_are_known_where_docstrings_are_left_out() -> None:
    code = "import perta.methods.registry as r; print(r.get_method('perta-grad').summary)"
    found = subprocess.run(
        [sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "W = I_f / (I_f + rho I_r), order 1"


def test_a_reader_that_goes_away_and_a_terminal_of_few_letters_are_no_fault() -> None:
    command = f"{sys.executable} -m perta methods"
    found = subprocess.run(f"{command} | head -c 1", shell=True, capture_output=True, check=True)
    assert found.stderr == b""
    plain = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "20"}
    assert subprocess.run(command.split(), env=plain, capture_output=True, check=True).stdout
