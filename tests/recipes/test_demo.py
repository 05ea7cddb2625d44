"""What the demonstration asks of its folder before it makes anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from perta.errors import ConfigError, OutputExistsError
from perta.recipes.demo import plan_demo, run_demo
from perta.recipes.settings import DemoConfig


@pytest.mark.parametrize("go", [plan_demo, run_demo])
def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path: Path, go: object) -> None:
    assert callable(go)
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    (folder / "report.html").write_text("mine", "utf-8")
    for output in (file, file / "under"):
        with pytest.raises(ConfigError, match="cannot be written"):
            go(DemoConfig(output=output, tiny=True))
    with pytest.raises(OutputExistsError, match="is not a report"):
        go(DemoConfig(output=folder, tiny=True))
    assert [path.name for path in folder.iterdir()] == ["report.html"]
