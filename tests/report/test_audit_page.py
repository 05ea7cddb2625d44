"""The page of an audit and its bundle: what they say, and that they hold no text of anybody."""

from __future__ import annotations

import hashlib
import html
import json
import random
import re
import shlex
import shutil
import stat
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from perta.cli import main
from perta.data.rows import write_jsonl
from perta.errors import ConfigError, DataError, OutputExistsError
from perta.models.demo.tiny import write_tiny_checkpoint
from perta.report.audit import write_audit_page
from perta.report.settings import AuditPageConfig
from perta.store.record import content_of_results

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


def run_audit(arguments: list[str]) -> dict[str, Any]:
    """An audit as on the command line -> what `audit.json` holds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["perta", "audit", *arguments])
        main()
    output = Path(arguments[arguments.index("--output") + 1])
    found: dict[str, Any] = json.loads((output / "audit.json").read_text())
    return found


ODD_OPTIONS = [
    *("--request", "R 7", "--received", "2026-11-02", "--level", "quick", "--retain-rows", "3"),
    *("--probe", "fact", "--probe", "choice", "--samples", "4", "--max-new-tokens", "8"),
    *("--format", "qa", "--prompt-column", "the question", "--answer-column=--reply"),
    *("--messages-column", "m", "--text-column", "t", "--fact-column", "it's", "--split=-s"),
    *("--subject-column", "who", "--system-prompt=", "--no-chat-template", "--max-length", "512"),
    *("--skip-bad-rows", "--seed", "5", "--dtype", "float32", "--pass-batch-size", "3"),
]
"""Something unusual for every option of rows."""


@pytest.mark.parametrize("options", [[], ODD_OPTIONS], ids=["usual", "odd"])
def test_the_command_of_the_page_makes_the_same_audit(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"question": "the question", "answer": "--reply", "fact": "it's", "person": "who"}
    rows = random_rows(3)
    texts = [text for group in rows.values() for row in group for text in row.values()]
    for name, group in rows.items():
        named = [{names[k] if options else k: v for k, v in row.items()} for row in group]
        write_jsonl(named, tmp_path / f"{name}.jsonl")
    for seed, name in enumerate(("cleaned", "full", "a base")):
        (tmp_path / name).mkdir()
        write_tiny_checkpoint(tmp_path / name, texts, seed=seed)
    models = [str(tmp_path / "cleaned"), "--full", str(tmp_path / "full")]
    few = options or ["--max-new-tokens", "8", "--samples", "4"]
    given = [*models, "--base", str(tmp_path / "a base"), *few]
    for seed in (3, 4) if options else ():
        shadow = tmp_path / f"shadow {seed}"
        shadow.mkdir()
        write_tiny_checkpoint(shadow, texts, seed=seed)
        given += ["--shadow", str(shadow)]
    sets = [part for name in SETS for part in (f"--{name}", str(tmp_path / f"{name}.jsonl"))]
    first = run_audit([*given, *sets, "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "audit.html").read_text()
    (told,) = re.findall(r"To run it again: </small><code>(.*?)</code>", page)
    command = shlex.split(html.unescape(re.sub("</?span>", "", told)))
    assert command[:2] == ["perta", "audit"]
    # An audit with anything else in its key would be refused, for the first one is still there.
    (tmp_path / "out" / "audit.html").unlink()
    again = run_audit(command[2:])
    assert "audit.json is up to date, reused" in capsys.readouterr().err.replace("\n", " ")
    assert again["perta"]["settings"] == first["perta"]["settings"]
    again_page = (tmp_path / "out" / "audit.html").read_text()
    assert re.findall(r"To run it again: .*", again_page) == re.findall(
        r"To run it again: .*", page
    )


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
    unchecked = html.unescape(page).partition("What was not checked")[2].partition("</ul>")[0]
    for line in (
        "The fact in drawn answers, as chat programs draw them; The fact, after some training; "
        "The fact between the layers; The fact in the model's states, put into the full one "
        "(left out at level standard)",
        "Told apart one by one, beside models that never saw them "
        "(it needs other models that never had the rows)",
        "What the model knew of the world (it needs facts of the world)",
        "facts of the world: rows 1–40 (the model has no words for the facts)",
        "The fact, asked for in other ways: in two steps (no row could be asked so)",
    ):
        assert line in unchecked
    assert hashlib.sha256((out / "audit.json").read_bytes()).hexdigest() in page
    assert "No record beside the model" in page
    assert "leaves one, perta.json" in page
    assert "<script" not in page
    order = ["leaks", "harmed", "not-sure", "passed"]
    told = [order.index(name) for name in re.findall(r'<tr class="([a-z-]+)">', page)]
    assert len(told) == len(audit["probes"])
    assert told == sorted(told)


def test_the_appendix_has_the_mean_of_each_subject(audited: tuple[Path, list[str]]) -> None:
    out = audited[0] / "out"
    page = html.unescape((out / "audit.html").read_text("utf-8")).partition("<details open>")[2]
    audit = json.loads((out / "audit.json").read_text("utf-8"))
    people = audit["subject_numbers"]["forget"]
    assert len(set(people)) > 1
    for probe in audit["probes"]:
        part = page.partition(f"name: {probe['name']} (")[2].partition("</table>")[0]
        assert f"{probe['verdict']}: {probe['reason']}" in part
        for name, value in probe["notes"].items():
            assert f"{name}: {value:.3f}" in part
        for scores in probe["scores"].values():
            for one in set(people):
                pairs = zip(scores, people, strict=True)
                known = [s for s, person in pairs if person == one and s is not None]
                assert not known or f"<td>{sum(known) / len(known):.3f}</td>" in part


def test_the_appendix_names_whose_facts_are_told_by_number(
    audited: tuple[Path, list[str]], tmp_path: Path
) -> None:
    audit = json.loads((audited[0] / "out" / "audit.json").read_text("utf-8"))
    (whose,) = [probe for probe in audit["probes"] if probe["name"] == "whose"]
    told = [[1, "retain", 1], [1, "retain", 2], [2, "retain", 4], [2, "forget", 3]]
    whose["more"] = {"cleaned": {"forget": {"told": told}}}
    audit["perta"]["content"] = content_of_results(audit)
    (tmp_path / "audit.json").write_text(json.dumps(audit), "utf-8")
    page = html.unescape(write_audit_page(tmp_path).read_text("utf-8"))
    numbers = audit["subject_numbers"]["retain"], audit["subject_numbers"]["forget"]
    assert [number[:4] for number in numbers] == [[0, 1, 2, 3]] * 2
    told_of = "retain: rows 1–2, 4, subjects 0–1, 3; forget: rows 3, subjects 2"
    assert f"whose facts they are: {told_of}" in page


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
    shutil.copy(out / "audit.json", tmp_path)
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


def test_the_command_on_the_page_makes_the_same_audit(
    audited: tuple[Path, list[str]], tmp_path: Path
) -> None:
    audit = json.loads((audited[0] / "out" / "audit.json").read_text("utf-8"))
    audit["perta"]["settings"] |= {"probes": ["fact", "own file.py"], "retain_rows": 7}
    (tmp_path / "audit.json").write_text(json.dumps(audit), "utf-8")
    written = write_audit_page(tmp_path).read_text("utf-8")
    page = html.unescape(re.sub("</?span>", "", written))
    for given in ("--probe fact --probe 'own file.py'", "--retain-rows 7", "--max-new-tokens 8"):
        assert given in page


def _listed(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "place",
    [
        *("cleaned/new.zip", "full/deep/new.zip", "base/model.safetensors", "retain.jsonl"),
        *("out", "out/audit.json", "out/audit.html", "out/audit.journal", "out/audit.json/new.zip"),
        *("", "forget.jsonl/new.zip", "new", "new/audit.json", "new/audit.html", "new/x/.."),
    ],
)
def test_a_bundle_gets_into_nothing_that_is_read_or_written(
    audited: tuple[Path, list[str]],
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = audited[0]
    before = _listed(folder)
    given = [part for name in ("full", "base") for part in (f"--{name}", str(folder / name))]
    given += [part for name in SETS for part in (f"--{name}", str(folder / f"{name}.jsonl"))]
    output = folder / ("new" if place.startswith("new") else "out")
    words = ["perta", "audit", str(folder / "cleaned"), *given, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*words, "--bundle", str(folder / place)])
    monkeypatch.setattr("perta.stages.audit.audit_checkpoint", None)
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "defect" not in told
    assert _listed(folder) == before
    assert not (folder / "new").exists()
    if output.name == "out":
        with pytest.raises((ConfigError, OutputExistsError)):
            write_audit_page(output, AuditPageConfig(bundle=folder / place))


@pytest.mark.parametrize("text", ["", "[]", "{}", "cut", "changed", "quick", "\xff", "[" * 9999])
def test_a_damaged_audit_has_no_page(
    audited: tuple[Path, list[str]], tmp_path: Path, text: str
) -> None:
    whole = (audited[0] / "out" / "audit.json").read_text("utf-8")
    audit = json.loads(whole)
    quick = {**audit, "perta": {**audit["perta"], "settings": {"level": "quick"}}}
    made = {
        "cut": whole[: len(whole) // 2],
        "changed": whole.replace('"verdict": "not sure"', '"verdict": "passed"', 1),
        "quick": json.dumps(quick),
    }
    (tmp_path / "audit.json").write_text(made.get(text, text), "latin-1")
    with pytest.raises(DataError, match=r"audit\.json"):
        write_audit_page(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["audit.json"]


@pytest.mark.parametrize("request_number", ["\x00<b>", "\u202e7\n\r\t", "{{ 7 * 7 }}", "ü" * 999])
def test_a_request_of_odd_characters_is_shown_and_obeyed_by_nothing(
    audited: tuple[Path, list[str]], request_number: str
) -> None:
    with pytest.raises(ConfigError, match=r"--request is .*\\udcff"):
        AuditPageConfig(request=f"{request_number}\udcff")
    config = AuditPageConfig(request=request_number, operator=request_number)
    page = write_audit_page(audited[0] / "out", config).read_text("utf-8")
    assert "<b>" not in page
    assert "49" not in re.findall(r"<dd>(.*?)</dd>", page)
    assert not set("\x00\u202e") & set(page)
