"""Signed checkpoints: any changed, added or missing file is found, and so is another's key."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import pem_keys
from perta.errors import ConfigError, LedgerError
from perta.store.signing import (
    check_checkpoint,
    check_signed_by,
    entry_key,
    model_key,
    public_key,
    sign_checkpoint,
)

pytest.importorskip("cryptography")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "more" / "w.bin").write_bytes(bytes(range(256)))
    return folder


def test_every_change_to_a_signed_checkpoint_is_found(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="the extra `signing` is not installed")
    key, public = pem_keys(tmp_path, "a", "secp256r1")
    signature = tmp_path / "model.sig"
    signed = sign_checkpoint(model, signature, key)
    assert signed["public_key"] == public.read_text() == public_key(public)
    check_checkpoint(model, signature, signed)
    # The library's own command, with the key that came from elsewhere, agrees.
    run = [sys.executable, "-m", "model_signing", "verify", "key", str(model)]
    run += ["--signature", str(signature), "--public_key", str(public)]
    assert subprocess.run(run, capture_output=True, check=False).returncode == 0
    payload = json.loads(signature.read_text())["dsseEnvelope"]["payload"]
    named = json.loads(base64.b64decode(payload))["predicate"]["resources"]
    assert {entry["name"]: entry["digest"] for entry in named} == {
        str(file.relative_to(model)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in model.rglob("*")
        if file.is_file()
    }
    for change in (
        lambda: (model / "config.json").write_text("{ }"),
        lambda: (model / "README.md").write_text("new"),
        lambda: (model / "more" / "w.bin").rename(model / "w.bin"),
    ):
        whole = {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
        change()
        with pytest.raises(LedgerError, match="does not fit its signature"):
            check_checkpoint(model, signature, signed)
        for file in [*model.rglob("*")]:
            if file.is_file() and file not in whole:
                file.unlink()
        for file, content in whole.items():
            file.write_bytes(content)
        check_checkpoint(model, signature, signed)
    # Another person's signature of the same files, put in the place of this one.
    other, _ = pem_keys(tmp_path, "b", "secp384r1")
    theirs = sign_checkpoint(model, tmp_path / "theirs.sig", other)
    with pytest.raises(LedgerError, match="not the signature that the ledger names"):
        check_checkpoint(model, tmp_path / "theirs.sig", signed)
    mixed = {**theirs, "public_key": signed["public_key"]}
    with pytest.raises(LedgerError, match="does not fit its signature"):
        check_checkpoint(model, tmp_path / "theirs.sig", mixed)
    signature.unlink()
    with pytest.raises(LedgerError, match="cannot be read"):
        check_checkpoint(model, signature, signed)


@pytest.mark.parametrize("kind", ["ed25519", "secp256k1", "rsa"])
def test_keys_of_another_kind_are_refused(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("model_signing", reason="the extra `signing` is not installed")
    key, _ = pem_keys(tmp_path, "a", kind)
    with pytest.raises(ConfigError, match=r"P-256.*openssl genpkey"):
        model_key(key)


def test_without_the_package_the_extra_is_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    key, _ = pem_keys(tmp_path, "a", "secp256r1")
    with pytest.raises(ConfigError, match=r"--model-key needs.*perta\[signing\]"):
        model_key(key)
    with pytest.raises(LedgerError, match=r"is signed.*perta\[signing\]"):
        check_checkpoint(model, tmp_path / "model.sig", {})


def test_trusted_keys(tmp_path: Path) -> None:
    (_, entry), (_, curve), (_, rsa) = (
        pem_keys(tmp_path, kind, kind) for kind in ("ed25519", "secp521r1", "rsa")
    )
    own = public_key(entry)
    assert len(bytes.fromhex(own)) == 32
    assert public_key(curve) == curve.read_text()
    with pytest.raises(ConfigError, match="neither"):
        public_key(rsa)
    for file in (tmp_path / "none.pem", tmp_path / "ed25519.pem"):
        with pytest.raises(ConfigError, match="openssl pkey"):
            public_key(file)
    check_signed_by({"line 1": own}, [own])
    with pytest.raises(LedgerError, match="line 2 is not signed"):
        check_signed_by({"line 1": own, "line 2": None}, [own])
    with pytest.raises(LedgerError, match=r"another key.*SHA-256"):
        check_signed_by({"line 1": public_key(curve)}, [own])


def test_keys_of_a_curve_that_is_not_known_are_refused(tmp_path: Path) -> None:
    files = pem_keys(tmp_path, "a", "secp256r1")
    for file in files:  # SM2 in place of P-256: two names of one length
        head, *lines, tail = file.read_text().splitlines()
        der = base64.b64decode("".join(lines))
        other = der.replace(bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2a811ccf5501822d"))
        assert other != der
        file.write_text(f"{head}\n{base64.b64encode(other).decode()}\n{tail}\n")
    with pytest.raises(ConfigError, match=r"--key .* is no private key"):
        entry_key(files[0])
    with pytest.raises(ConfigError, match=r"--public-key .* is no public key"):
        public_key(files[1])
