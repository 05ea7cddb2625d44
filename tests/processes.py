"""Several processes on this machine, forked from the one that runs the tests."""

from __future__ import annotations

import io
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from perta.parallel import lead


def start(size: int, program: Callable[[], object], folder: Path) -> list[int]:
    """Begin a program on so many processes; their output goes to `folder`/RANK.log.

    Returns:
        Their numbers, by rank.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    return [_fork(rank, size, port, program, folder / f"{rank}.log") for rank in range(size)]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _fork(rank: int, size: int, port: int, program: Callable[[], object], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        torch.set_num_threads(1)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = sys.stderr = io.TextIOWrapper(os.fdopen(out, "wb", 0), write_through=True)
        program()
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finish(children: list[int], seconds: float = 60) -> list[int]:
    """Wait for processes; their statuses, negative where a signal ended one."""
    until = time.monotonic() + seconds
    statuses: dict[int, int] = {}
    while len(statuses) < len(children):
        for child in children:
            if child not in statuses and (found := os.waitpid(child, os.WNOHANG))[0]:
                statuses[child] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > until:
            for child in set(children) - statuses.keys():
                os.kill(child, 9)
            raise TimeoutError(f"of {len(children)} processes {len(statuses)} ended: {statuses}")
        time.sleep(0.01)
    return [statuses[child] for child in children]


def ran(size: int, function: Callable[..., Any], *args: Any, folder: Path) -> Any:
    """What a function returns on process 0 of so many; it may return tensors and plain values."""
    file = folder / "found.pt"
    children = start(size, lambda: lead(lambda: torch.save(function(*args), file)), folder)
    statuses = finish(children, 180)
    logs = "".join((folder / f"{rank}.log").read_text() for rank in range(size))
    assert statuses == [0] * size, logs
    assert "works alone" not in logs
    return torch.load(file, weights_only=False)
