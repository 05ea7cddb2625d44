"""Inputs that grow towards unseen lines of the readers of headers, GGUF files and JSON.

    python tests/faults/guided.py [RUNS]                   all readers, each in a process
    python tests/faults/guided.py READER FOLDER [OPTIONS]  one of them, with libFuzzer's options

Needs `atheris`. A reader must return or raise an error of this package, within 20 seconds and two
gigabytes; what breaks that is left in FOLDER and named.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

READERS = ("header", "gguf", "json")


def main() -> int:
    if not find_spec("atheris"):
        sys.stdout.write("guided inputs: skipped, atheris is not installed\n")
        return 0
    if len(sys.argv) > 2:
        _grow(*sys.argv[1:])
    runs, status = (sys.argv[1:] or ["100000"])[0], 0
    for reader in READERS:
        with tempfile.TemporaryDirectory() as folder:
            _seed(reader, Path(folder))
            limits = [f"-runs={runs}", "-timeout=20", "-rss_limit_mb=2048", "-max_len=16384"]
            marks = [f"-artifact_prefix={reader}-", "-print_final_stats=1"]
            command = [sys.executable, __file__, reader, folder, *limits, *marks]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = [line for line in done.stderr.splitlines() if "number_of_executed" in line]
        counts = " ".join(" ".join(said).split())
        sys.stdout.write(f"{reader}: status {done.returncode}, {counts}\n")
        sys.stdout.flush()
        if done.returncode:
            sys.stdout.write(done.stderr[-4000:])
            status = 1
    return status


def _grow(reader: str, *options: str) -> None:
    import atheris

    with atheris.instrument_imports(include=["perta.store", "perta.models", "gguf", "json"]):
        read = _reader(reader)
    from perta.errors import PertaError

    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / f"model.{'gguf' if reader == 'gguf' else 'safetensors'}"

        def once(content: bytes) -> None:
            file.write_bytes(content)
            with suppress(PertaError):
                read(file)

        atheris.Setup([sys.argv[0], *options], once)
        atheris.Fuzz()


def _reader(reader: str) -> Callable[[Path], object]:
    from perta.errors import DataError
    from perta.models.formats.gguf import read_gguf
    from perta.store.checkpoint import open_index
    from perta.store.parse import read_json

    def header(file: Path) -> object:
        return open_index(file.parent)

    def parsed(file: Path) -> object:
        return read_json(file, DataError)

    return {"header": header, "gguf": read_gguf, "json": parsed}[reader]


def _seed(reader: str, folder: Path) -> None:
    """Sound files to begin with."""
    import gguf
    import numpy as np

    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    text = json.dumps({"__metadata__": {"format": "pt"}, "a.weight": entry}).encode()
    if reader == "header":
        (folder / "seed").write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    if reader == "json":
        (folder / "seed").write_bytes(text)
    if reader == "gguf":
        writer = gguf.GGUFWriter(folder / "seed", "llama")
        writer.add_block_count(1)
        writer.add_context_length(64)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
        writer.add_tensor("blk.0.attn_q.weight", np.zeros((2, 3), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


if __name__ == "__main__":
    sys.exit(main())
