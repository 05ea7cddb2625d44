"""Chat templates are programs of strangers: they run in a process of their own, with limits.

The template's language has loops, products and recursion, so a template may take forever or all
memory. `render` keeps one such process; this file is also what it runs, as a script.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

_SECONDS = 5.0  # processor time for the templates of one row

_MEMORY = 1 << 30  # bytes of address space

_LONGEST = 10_000_000  # characters of a rendered text, and of a template


class _TooLongError(Exception):
    """A rendered text has more than `_LONGEST` characters."""


class TemplateError(Exception):
    """A template cannot be used at all: it is no template, or goes on for too long."""


def render(
    template: str, variables: Mapping[str, Any], chats: Sequence[Mapping[str, Any]], date: str
) -> list[dict[str, Any]]:
    """Render some chats, each with `messages` and `add_generation_prompt`.

    The template may use `variables`, such as the tokens' names, and is told that it is `date`. Of
    each chat there is its `text`, and `spans`, the parts that the template marks as generated; or
    `error`, the template's own words. TemplateError where it is none, or exceeds the limits.
    """
    if len(template) > _LONGEST:
        raise TemplateError(f"it has more than {_LONGEST:,} characters")
    request = {"template": template, "variables": variables, "chats": chats, "date": date}
    marks = unused(json.dumps(request, ensure_ascii=False), 2)
    answer = _ask(json.dumps({**request, "marks": marks}))
    if answer is None:
        raise TemplateError(
            f"rendering one row took more than {_SECONDS:.0f} s or {_MEMORY >> 30} GiB of memory"
        )
    if "error" in answer:
        raise TemplateError(answer["error"])
    found: list[dict[str, Any]] = answer["chats"]
    return found


def unused(text: str, count: int) -> list[str]:
    """Characters for private use that a text does not have."""
    return list(
        itertools.islice((c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in text), count)
    )


_lock = threading.Lock()
_process: tuple[int, subprocess.Popen[bytes]] | None = None


def _ask(request: str) -> dict[str, Any] | None:
    """The process's answer; None where it did not survive the request."""
    global _process
    with _lock:
        # A fork has its parent's process in common with it: it needs one of its own.
        if _process is None or _process[0] != os.getpid():
            command = [sys.executable, "-P", __file__]
            null = subprocess.DEVNULL
            started = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=null
            )
            _process = (os.getpid(), started)
        process = _process[1]
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request.encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:
            _stop()  # interrupted between question and answer
            raise
        if not line.endswith(b"\n"):
            _stop()
            return None
    answer: dict[str, Any] = json.loads(line)
    return answer


@atexit.register
def _stop() -> None:
    global _process
    if _process and _process[0] == os.getpid():
        _process[1].kill()
        _process[1].communicate()
    _process = None


def _environment() -> Any:
    """The language of templates, as transformers has it, without chance and without today."""
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`: what the assistant writes."""

        tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return _marks[0] + str(caller()) + _marks[1]

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.filters.pop("random")
    environment.globals.pop("lipsum")
    environment.globals["raise_exception"] = refuse
    return environment


_marks = ["", ""]  # characters around what is generated; taken out before anyone sees them


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    compiled = functools.lru_cache(4)(_environment().from_string)
    for line in sys.stdin.buffer:
        _limit_time(_SECONDS)
        answer = _answer(json.loads(line), compiled)
        _limit_time(0)
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(request: Mapping[str, Any], compiled: Any) -> dict[str, Any]:
    import jinja2

    _marks[:] = request["marks"]
    date = datetime.fromisoformat(request["date"])
    variables = {
        "tools": None,
        "documents": None,
        "date_string": f"{date:%d %b %Y}",
        "strftime_now": date.strftime,
        **request["variables"],
    }
    try:
        template = compiled(request["template"])
    except (jinja2.TemplateError, RecursionError, ValueError) as error:
        return {"error": f"it is no template ({error})"}
    try:
        return {"chats": [_rendered(template, {**variables, **chat}) for chat in request["chats"]]}
    except MemoryError:
        return {"error": f"rendering one row took more than {_MEMORY >> 30} GiB of memory"}
    except _TooLongError:
        return {"error": f"it writes more than {_LONGEST:,} characters for one row"}


def _rendered(template: Any, variables: Mapping[str, Any]) -> Any:
    parts, length = [], 0
    try:
        for part in template.generate(variables):
            parts.append(part)
            length += len(part)
            if length > _LONGEST:
                raise _TooLongError
    except (MemoryError, _TooLongError):
        raise
    except Exception as error:  # whatever a stranger's program runs into
        return {"error": f"{type(error).__name__}: {error}"}
    return _without_marks("".join(parts))


def _without_marks(text: str) -> dict[str, Any]:
    pieces, spans, starts, length = [], [], [], 0
    for piece in re.split(f"([{''.join(_marks)}])", text):
        if piece == _marks[0]:
            starts.append(length)
        elif piece == _marks[1]:
            spans.append((starts.pop() if starts else 0, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return {"text": "".join(pieces), "spans": spans}


def _limit_time(seconds: float) -> None:
    """Without a handler the signal ends the process, whatever it is doing."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    _main()
