"""The pages: the README, links that lead somewhere, every public name, tutorials that run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import perta
from perta.cli import main
from perta.evidence.people import generate_people
from perta.methods.method import KNOWN, Edit, Method
from perta.methods.objectives import Training
from perta.methods.registry import get_method, known
from perta.models.demo.tiny import write_tiny_checkpoint
from perta.options import DataConfig
from perta.store.own_code import is_ours

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# In this order each goes on where the one before ended.
TUTORIALS = ("first-request", "strength", "second-request", "own-method", "comparing")
COMMANDS = (
    "", "unlearn", "finetune", "importance", "moments", "merge-moments", "edit", "repair", "train",
    "evaluate", "audit", "bench tofu", "bench muse", "bench people", "bench ability",
    "bench compare", "people", "demo", "methods", "report", "clean",
    "requests init", "requests add", "requests apply", "requests status", "requests recheck",
    "requests verify", "requests clean",
)  # fmt: skip
# The model before it saw the data is tiny and random here, so it learns at another rate.
TINY = ("--learning-rate", "5e-3", "--epochs", "30", "--batch-size", "2")


def prose(page: str) -> list[str]:
    """Paragraphs and list items of a page, without code, tables, pictures and headings."""
    page = re.sub(r"(?ms)^```.*?^```$|<!--.*?-->", "", page)
    page = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", page)
    blocks = re.split(r"\n\s*\n|\n(?=- )", page)
    return [block for block in blocks if block.strip() and not re.match(r"#|\||    |!", block)]


def sentences(block: str) -> list[str]:
    return re.split(r"(?<=[.:?])\s+", re.sub(r"`[^`]*`", "CODE", block.strip()))


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 500
    assert max(len(block.split()) for block in prose(README)) <= 80


def test_the_readme_is_easy_to_read() -> None:
    lengths = [len(s.split()) for block in prose(README) for s in sentences(block)]
    assert len(lengths) > 20
    assert sum(length < 30 for length in lengths) >= 0.9 * len(lengths)
    numbers = [re.findall(r"\d[\d.,]*", s) for block in prose(README) for s in sentences(block)]
    assert max(map(len, numbers)) <= 1


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    found = re.findall(r"(?m)^#+ (.*)$", page.read_text("utf-8"))
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title.lower())) for title in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_api_page_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    assert sorted(re.findall(r"(?m)^::: perta\.(\w+)$", page)) == sorted(perta.__all__)


def test_the_design_page_has_every_folder_and_no_file_that_is_gone() -> None:
    page = (ROOT / "docs" / "design.md").read_text("utf-8")
    source = ROOT / "src" / "perta"
    named = set(re.findall(r"`([\w/]+(?:/|\.py))`", page))
    gone = [n for n in sorted(named) if not (source / n).exists() and not (ROOT / n).exists()]
    assert gone == []
    folders = {f"{f.name}/" for f in source.iterdir() if (f / "__init__.py").exists()}
    assert folders <= named


def test_options_on_the_pages_and_in_messages_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for command in COMMANDS:
        monkeypatch.setattr(sys, "argv", ["perta", *command.split(), "--help"])
        main()
    option = r"(?<![\w-])--[a-z][a-z-]+"
    known = {"--help", *re.findall(option, capsys.readouterr().out)}
    # Other programs' options stand on the pages about speed and about many processes; experiments
    # tell of their own time.
    others = [ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "scale", "processes")]
    pages = [p for p in PAGES if p not in others and "experiments" not in p.parts]
    # The command line knows options of before too, and `parallel` how to start many processes.
    source = ROOT / "src" / "perta"
    told = [p for kind in ("*.py", "words.toml") for p in source.rglob(kind)]
    pages += [p for p in told if p not in (source / "cli" / "_session.py", source / "parallel.py")]
    named = {(p.name, o) for p in pages for o in re.findall(option, p.read_text("utf-8"))}
    assert [(page, o) for page, o in named if o not in known and o != "--no-"] == []


def method_tables() -> dict[str, dict[str, str]]:
    """Method -> cells of all its rows in the tables of methods.md, by their column."""
    found: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for line in (ROOT / "docs" / "methods.md").read_text("utf-8").splitlines():
        if not line.startswith("| "):
            columns = []
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not columns:
            columns = cells
        elif "`" in cells[0]:
            for name in re.findall(r"`([a-z-]+)`", cells[0]):
                found.setdefault(name, {}).update(zip(columns[1:], cells[1:], strict=True))
                if "source" in columns:
                    found[name]["together"] = cells[0]
    return found


def numbers(text: str) -> set[float]:
    return {float(n) for n in re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?:e-\d+)?(?!\w)", text)}


def arxiv(text: str) -> set[str]:
    return set(re.findall(r"\d{4}\.\d{5}", text))


def test_the_tables_of_methods_are_those_of_the_classes() -> None:
    tables = method_tables()
    assert set(tables) == {name for name, cls in known(Method).items() if is_ours(cls)}
    for name, row in tables.items():
        together = re.findall(r"`([a-z-]+)`", row["together"])
        sources = {source for other in together for source in arxiv(known(Method)[other].source)}
        tofu = {"2401.06121"} if "TOFU" in row["source"] else set()
        assert arxiv(row["source"]) | tofu == sources, name


@pytest.mark.parametrize("name", known(Edit))
def test_the_table_of_edits_has_their_defaults_and_passes(name: str) -> None:
    row, needs = method_tables()[name], known(Edit)[name].needs
    together = [get_method(n) for n in re.findall(r"`([a-z-]+)`", row["together"])]
    own = {float(v) for method in together for v in method.settings.values()}
    assert numbers(row["defaults"]) == own | {method.strength for method in together}
    passes = row["passes over data"]
    assert ("E·n" in passes or "as `tv`" in passes) == bool(needs.tuned)
    assert ("MLP" in row["defaults"]) == (together[0].layers == "mlp")
    if "as `" not in passes:
        assert bool(re.search(r"\bm\b", passes)) == (
            "retain" in (*needs.importance, *needs.moments)
        )


@pytest.mark.parametrize("name", [name for name in known(Training) if name != "influence"])
def test_the_tables_of_training_have_their_defaults_and_needs(name: str) -> None:
    row, cls = method_tables()[name], known(Training)[name]
    own = dict(cls().settings)
    for column in ("forget weight", "retain weight"):
        weight = own.pop(column.replace(" ", "_"), None)
        assert numbers(row[column]) == (set() if weight is None else {weight})
    assert numbers(row["epochs"]) == {cls.epochs}
    assert numbers(row["learning rate"]) == {cls.learning_rate}
    # A negative number stands for a choice that the model makes.
    assert numbers(row["β, other"]) == {value for value in own.values() if value >= 0}
    measured = {None: "one number per forget example", "beside": "two numbers per forget example"}
    kept = measured[cls.refusals] if cls.reference == "log_probs" else "–"
    assert row["needs of θ_full"] == ("a frozen copy" if cls().keeps_frozen_model else kept)


class Tutorials:
    """A folder in which the tutorials run one after the other, with a tiny model as `BASE`."""

    def __init__(self, folder: Path) -> None:
        pages = ROOT / "docs" / "tutorials"
        self.pages = {name: (pages / f"{name}.md").read_text("utf-8") for name in TUTORIALS}
        self.folder, self.ran = folder, set[str]()
        (folder / "BASE").mkdir()
        people = [row for seed in (0, 1) for row in generate_people(6, 2, seed)]
        said = [text for row in people for text in (*row["perturbed_answer"], *row.values())]
        texts = [*self.pages.values(), *(text for text in said if isinstance(text, str))]
        write_tiny_checkpoint(folder / "BASE", [*texts, DataConfig().system_prompt])

    def run(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Run a page's code, after that of the pages before it."""
        monkeypatch.chdir(self.folder)
        for page in TUTORIALS[: TUTORIALS.index(name) + 1]:
            if page not in self.ran:
                self.ran.add(page)
                self._run(self.pages[page], monkeypatch)

    def _run(self, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
        blocks = re.findall(r'(?ms)^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', page)
        for language, title, code in blocks:
            if title:
                (self.folder / title).write_text(code, "utf-8")
            elif language == "python":
                exec(compile(code, "page", "exec", dont_inherit=True), {"__name__": "page"})
            else:
                for line in code.replace("\\\n", " ").splitlines():
                    self._command(line, monkeypatch)

    def _command(self, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
        if not line.startswith("perta "):
            subprocess.run(line, shell=True, check=True)
            return
        words = shlex.split(line)
        tunes = {"finetune", "unlearn", "compare"} & set(words[1:3])
        gently = ("--relearn-learning-rate", "1e-3") if "compare" in tunes else ()
        monkeypatch.setattr(sys, "argv", [*words, *(TINY if tunes else ()), *gently])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        assert status == 0, line


@pytest.fixture(scope="module")
def tutorials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tutorials]:
    known = set(KNOWN)
    yield Tutorials(tmp_path_factory.mktemp("tutorials"))
    for name in set(KNOWN) - known:  # a tutorial's own method is nobody else's
        del KNOWN[name]


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs(name: str, tutorials: Tutorials, monkeypatch: pytest.MonkeyPatch) -> None:
    tutorials.run(name, monkeypatch)
