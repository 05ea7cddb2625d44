"""Where a chat template puts each message.

Templates trim, move and reorder what they are given, and write a turn differently once another
follows. So a message's place is not guessed from renderings of parts: a character that occurs
nowhere else is put into it, shows where it came out, and counts only if the rest of the rendering
is the same and the whole text of the message stands around it.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from perta.data import _renderer
from perta.data._conversation import Message, RowError

Span = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """A rendered conversation."""

    text: str
    own: tuple[Span, ...]  # the parts of the text that are texts of messages, from left to right
    # Of each assistant turn where its answer begins, with all that stands between the generation
    # prompt and it, and where its text begins and ends.
    turns: tuple[tuple[int, int, int], ...]
    prompt: str  # what stands before the last turn, with the generation prompt
    prompt_own: tuple[Span, ...]  # as `own`, of the prompt
    has_template: bool = True  # a template wrote what is not own


def lay_out_plainly(messages: Sequence[Message], *, as_is: bool) -> Layout:
    """A conversation as lines with questions and answers, or `as_is`, without a chat template."""
    text, turns = "", []
    for message in messages:
        if message.role == "assistant":
            # The space belongs to the answer: most tokenizers join it with the first word.
            begin = len(text)
            text += message.content if as_is else f" {message.content}"
            turns.append((begin, begin, len(text)))
        elif as_is:
            text += message.content
        else:
            line = f"Question: {message.content}\nAnswer:"
            text += "\n\n" if text else ""
            text += line if message.role == "user" else message.content
    prompt = text[: turns[-1][0]]
    return Layout(
        text, ((0, len(text)),), tuple(turns), prompt, ((0, len(prompt)),), has_template=False
    )


@functools.lru_cache(4096)  # runs read their rows many times, and each costs a trip to the process
def lay_out(
    messages: tuple[Message, ...], template: str, variables: str, date: str, *, added: bool
) -> Layout:
    """Render a conversation and find its messages there; the first may be `added`.

    `variables` are what the template may use, as JSON.
    """
    missing: RowError | None = None
    for in_parts in (False, True):
        try:
            # One process renders all of it, within limits.
            ask = functools.partial(_renderer.render, template, json.loads(variables), date=date)
            return _Search(messages, in_parts, ask, added, template).layout()
        except RowError as error:
            # Some templates take the content as a list of parts, and write nothing for a text.
            missing = missing or error
    assert missing is not None
    raise missing


_SHARES = (1.0, 0.0, 0.5)
"""Where a mark is tried: some templates look at the beginning of a text, others at its end."""

_Ask = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


class _Search:
    """One conversation, contents as text or in parts."""

    def __init__(
        self, messages: Sequence[Message], in_parts: bool, ask: _Ask, added: bool, template: str
    ) -> None:
        self.messages, self.in_parts, self.ask, self.added = messages, in_parts, ask, added
        self.cores = [message.content.strip() for message in messages]
        self.turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
        self.mark, self.end = _renderer.unused(
            "".join([template, *(m.content for m in messages)]), 2
        )

    def layout(self) -> Layout:
        """The conversation as the template writes it."""
        everything = len(self.messages)
        before = [(turn, True, None) for turn in self.turns]
        parts = [(everything, False, None), (everything, False, _SHARES[0]), *before]
        whole, marked, *rest = self._render(parts)
        if "text" not in whole:
            raise RowError(f"the chat template refuses it ({whole['error']})")
        text = whole["text"]
        prompts = [rendered.get("text") for rendered in rest]
        places = self._places(text, everything, False, marked)
        for turn, prompt in zip(self.turns, prompts, strict=True):
            nothing = not self.cores[turn] and not places[turn]
            if nothing and prompt is not None and text.startswith(prompt):
                places[turn] = [(len(prompt), len(prompt))]
        self._require(places)
        turns = []
        for turn, prompt in zip(self.turns, prompts, strict=True):
            ((start, stop),) = places[turn]
            turns.append((_begin(text, start, prompt, whole["spans"]), start, stop))
        own = sorted(span for found in places for span in found)
        # A template need not render the nothing that stands before a chat the assistant opens.
        last = text[: turns[-1][0]] if prompts[-1] is None else prompts[-1]
        prompt_own = [span for span in own if span[1] <= len(last)]
        if not text.startswith(last):
            found_there = self._places(last, self.turns[-1], True)
            prompt_own = sorted(span for found in found_there for span in found)
        return Layout(text, tuple(own), tuple(turns), last, tuple(prompt_own))

    def _require(self, places: Sequence[Sequence[Span]]) -> None:
        """Stop at a message that is not there, or at an answer that is not there once."""
        for i, (message, found) in enumerate(zip(self.messages, places, strict=True)):
            if message.role == "assistant" and len(found) > 1:
                raise RowError(f"the chat template writes message {i + 1} {len(found)} times")
            needed = self.cores[i] or message.role == "assistant"
            if not found and needed and not (self.added and i == 0):
                raise RowError(
                    f"the chat template leaves out or changes message {i + 1}, the "
                    f"{message.role}'s; use --no-chat-template, or another template"
                )

    def _places(
        self, text: str, stop: int, generate: bool, marked: dict[str, Any] | None = None
    ) -> list[list[Span]]:
        """Where each of the first messages stands in their rendering."""
        best: list[list[Span]] = [[] for _ in range(stop)]
        for share in _SHARES:
            if marked is None:
                (marked,) = self._render([(stop, generate, share)])
            found = self._marks(marked.get("text", ""), text, share)
            best = [new or old for new, old in zip(found, best, strict=False)] or best
            if all(best):
                break
            marked = None
        return best

    def _marks(self, marked: str, text: str, share: float) -> list[list[Span]]:
        """Spans of messages by their marks, if the text without the marks is the same."""
        found: list[list[Span]] = [[] for _ in self.messages]
        pieces = re.split(f"{self.mark}([0-9]+){self.end}", marked)
        if "".join(pieces[::2]) != text:
            return []
        place = 0
        for piece, number in zip(pieces[::2], [*pieces[1::2], None], strict=True):
            place += len(piece)
            if number is not None:
                core = self.cores[int(number)]
                start = place - int(share * len(core))
                if start >= 0 and text.startswith(core, start):
                    found[int(number)].append((start, start + len(core)))
        return found

    def _render(self, parts: Sequence[tuple[int, bool, float | None]]) -> list[dict[str, Any]]:
        """Some first messages each, with a mark at a share of each message's text."""
        chats = [
            {
                "messages": [
                    {"role": m.role, "content": self._marked(i, m.content, share)}
                    for i, m in enumerate(self.messages[:stop])
                ],
                "add_generation_prompt": generate,
            }
            for stop, generate, share in parts
        ]
        return self.ask(chats)

    def _marked(self, number: int, content: str, share: float | None) -> Any:
        if share is not None:
            place = len(content) - len(content.lstrip()) + int(share * len(self.cores[number]))
            content = f"{content[:place]}{self.mark}{number}{self.end}{content[place:]}"
        return [{"type": "text", "text": content}] if self.in_parts else content


def _begin(text: str, start: int, prompt: str | None, generated: Sequence[Span]) -> int:
    """Where what the assistant writes begins, of a turn whose text begins at `start`."""
    marks = [first for first, last in generated if first <= start <= last]
    if marks:
        return max(marks)
    if prompt is not None and len(prompt) <= start and text.startswith(prompt):
        return len(prompt)
    return start
