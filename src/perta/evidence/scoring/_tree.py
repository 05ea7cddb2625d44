"""Token sequences that share beginnings, as a tree, so that each token is computed once.

The wrong answers to a question commonly repeat its right answer up to a word; a node of the
tree is a run of tokens between two places where sequences part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from perta.data.words import common_prefix
from perta.evidence.scoring.cache import Extended

_WORTH_A_NODE = 4  # tokens that sharing must save; below it, another row costs more than it saves


@dataclass(eq=False)
class Segment:
    """Consecutive tokens shared by some answers of one item."""

    item: int  # place of the item
    start: int  # position of the first token in its sequences
    tokens: tuple[int, ...]  # the tokens, at least one
    answers: tuple[int, ...]  # which of the item's answers run through them
    parent: Segment | None  # what comes before; None after the run's common start
    children: list[Segment] = field(default_factory=list)  # what comes next
    fed: Extended | None = None  # forward pass that held the segment, and its row there
    row: int = 0  # that row
    # Per token, its log-probability given those before it, where it is labelled.
    log_probs: dict[int, float] = field(default_factory=dict)
    # Per token, what the model would have put there, likewise.
    guesses: dict[int, int] = field(default_factory=dict)
    # Per token, mean and variance of log-probabilities, where asked for.
    moments: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def to_feed(self) -> tuple[int, ...]:
        """Tokens the model must see: the last token of a sequence predicts nothing wanted."""
        return self.tokens if self.children else self.tokens[:-1]

    def predicted_by(self, offset: int) -> Iterator[tuple[Segment, int]]:
        """Tokens that the token at `offset` predicts: (segment, offset there)."""
        if offset + 1 < len(self.tokens):
            yield self, offset + 1
        else:
            yield from ((child, 0) for child in self.children)


def grow_tree(
    item: int,
    sequences: Sequence[tuple[int, tuple[int, ...]]],
    start: int,
    parent: Segment | None = None,
) -> list[Segment]:
    """Segments that begin some (answer, tokens from `start` on), with everything that follows."""
    segments = []
    for group in _groups(sequences):
        shared = common_prefix(*(tokens for _, tokens in group))
        segment = Segment(item, start, group[0][1][:shared], tuple(k for k, _ in group), parent)
        rest = [(k, tokens[shared:]) for k, tokens in group if len(tokens) > shared]
        segment.children = grow_tree(item, rest, start + shared, segment)
        segments.append(segment)
    return segments


def path_of(tops: Sequence[Segment], answer: int) -> list[Segment]:
    """Segments of one answer, in order."""
    path: list[Segment] = []
    level: Sequence[Segment] = tops
    while found := [segment for segment in level if answer in segment.answers]:
        path.append(found[0])
        level = found[0].children
    return path


def _groups(
    sequences: Sequence[tuple[int, tuple[int, ...]]],
) -> list[list[tuple[int, tuple[int, ...]]]]:
    """Sequences that begin alike, where sharing the beginning is worth a node."""
    alike: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    for answer, tokens in sequences:
        alike.setdefault(tokens[0], []).append((answer, tokens))
    groups = []
    for group in alike.values():
        saved = common_prefix(*(tokens for _, tokens in group)) * (len(group) - 1)
        groups += [group] if saved >= _WORTH_A_NODE else [[entry] for entry in group]
    return groups
