"""The page of an audit and its bundle: what they say, and that they hold no text of anybody."""

from __future__ import annotations

import hashlib
import html
import json
import random
import re
import stat
import sys
import zipfile
from pathlib import Path

import pytest

from perta.cli import main
from perta.data.rows import write_jsonl
from perta.errors import ConfigError, DataError, OutputExistsError
from perta.models.demo.tiny import write_tiny_checkpoint
from perta.report.audit import write_audit_page
from perta.report.settings import AuditPageConfig

GRAM = 8
SETS = ("forget", "retain", "holdout")


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def grams(text: str) -> set[tuple[str, ...]]:
    told = words(text)
    return {tuple(told[i : i + GRAM]) for i in range(len(told) - GRAM + 1)}


def random_rows(seed: int) -> dict[str, list[dict[str, str]]]:
    """Sets whose words are drawn from a few, so that answers repeat them."""
    draw = random.Random(seed)
    pool = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(40)]

    def sentence(size: int) -> str:
        return " ".join(draw.choices(pool, k=size))

    def row() -> dict[str, str]:
        person = sentence(2).title()
        fact = sentence(3)
        answer = f"{person} {sentence(7)} {fact}."
        return {
            "person": person,
            "question": f"{sentence(9)} {person}?",
            "answer": answer,
            "fact": fact,
        }

    return {name: [row() for _ in range(4)] for name in SETS}


@pytest.fixture(scope="module", params=[0, 1])
def audited(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A bundle made on the command line of tiny models and random rows, and all texts."""
    folder = tmp_path_factory.mktemp("audit")
    rows = random_rows(request.param)
    texts = [str(value) for group in rows.values() for row in group for value in row.values()]
    for name, group in rows.items():
        write_jsonl(group, folder / f"{name}.jsonl")
    for seed, name in enumerate(("cleaned", "full", "base")):
        (folder / name).mkdir()
        write_tiny_checkpoint(folder / name, texts, seed=seed)
    models = [
        str(folder / "cleaned"),
        "--full",
        str(folder / "full"),
        "--base",
        str(folder / "base"),
    ]
    sets = [part for name in SETS for part in (f"--{name}", str(folder / f"{name}.jsonl"))]
    about = ["--request", "R <7>", "--received", "2026-11-02", "--operator", "A. Privacy"]
    output = ["--output", str(folder / "out"), "--bundle", str(folder / "bundle.zip")]
    small = ["--max-new-tokens", "8", "--samples", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["perta", "audit", *models, *sets, *about, *output, *small])
        main()
    return folder, texts


def test_no_eight_words_of_any_row_are_in_the_bundle(audited: tuple[Path, list[str]]) -> None:
    folder, texts = audited
    secret = set[tuple[str, ...]]().union(*map(grams, texts))
    assert len(secret) > 20
    with zipfile.ZipFile(folder / "bundle.zip") as archive:
        for name in archive.namelist():
            held = html.unescape(archive.read(name).decode())
            assert not secret & grams(held), name
            assert not [text for text in texts if len(words(text)) > 2 and text in held], name


def test_the_bundle_is_complete_private_and_its_hashes_hold(
    audited: tuple[Path, list[str]],
) -> None:
    file = audited[0] / "bundle.zip"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        lines = archive.read("SHA256SUMS").decode().splitlines()
        assert {"SHA256SUMS", "audit.html", "audit.json"} <= set(names)
        assert {line.split("  ")[1] for line in lines} == set(names) - {"SHA256SUMS"}
        for line in lines:
            digest, name = line.split("  ")
            assert hashlib.sha256(archive.read(name)).hexdigest() == digest


def test_the_page_says_what_was_found_and_what_not(audited: tuple[Path, list[str]]) -> None:
    out = audited[0] / "out"
    page = (out / "audit.html").read_text()
    audit = json.loads((out / "audit.json").read_text())
    assert stat.S_IMODE((out / "audit.html").stat().st_mode) == 0o600
    for text in ("R &lt;7&gt;", "2026-11-02", "A. Privacy", "Signature", "perta audit"):
        assert text in page
    for probe in audit["probes"]:
        assert html.escape(probe["title"], quote=False) in html.unescape(page).replace("&", "&amp;")
    assert page.count('class="num"') == 3 * len(audit["probes"])
    for verdict in ("passed", "leaks", "harmed", "not sure"):
        count = sum(probe["verdict"] == verdict for probe in audit["probes"])
        assert page.count(f">{verdict}</b>") == count
    worst = [probe["worst_subject"] for probe in audit["probes"] if probe["worst_subject"]]
    assert worst
    for one in worst:
        assert f"{one['value']:.3f} (no. {one['subject']})" in page
    for entry in audit["not_checked"]:
        assert entry["name"] in page
    assert hashlib.sha256((out / "audit.json").read_bytes()).hexdigest() in page
    assert "No record beside the model" in page
    assert "<script" not in page


def test_equal_inputs_give_equal_bytes(audited: tuple[Path, list[str]], tmp_path: Path) -> None:
    out = audited[0] / "out"
    found = []
    for name in ("one", "two"):
        config = AuditPageConfig(request="R1", bundle=tmp_path / f"{name}.zip")
        write_audit_page(out, config)
        found.append((tmp_path / f"{name}.zip").read_bytes())
    assert found[0] == found[1]


def test_what_is_there_and_not_ours_stays(audited: tuple[Path, list[str]], tmp_path: Path) -> None:
    out, other = audited[0] / "out", tmp_path / "mine.zip"
    other.write_text("mine")
    with pytest.raises(OutputExistsError, match=r"mine\.zip"):
        write_audit_page(out, AuditPageConfig(bundle=other))
    assert other.read_text() == "mine"
    (tmp_path / "audit.html").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"audit\.html"):
        write_audit_page(tmp_path)
    assert (tmp_path / "audit.html").read_text() == "mine"


def test_what_is_no_audit_and_no_day_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"audit\.json"):
        write_audit_page(tmp_path)
    (tmp_path / "audit.json").write_text('{"schema": "other"}')
    with pytest.raises(DataError, match="no audit of the form perta-audit/1"):
        write_audit_page(tmp_path)
    with pytest.raises(ConfigError, match="received"):
        AuditPageConfig(received="yesterday")
