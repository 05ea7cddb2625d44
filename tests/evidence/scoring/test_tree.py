"""Trees of answers: every token once, every answer whole."""

from __future__ import annotations

import random

import pytest

from perta.evidence.scoring._tree import Segment, grow_tree, path_of


def nodes(tops: list[Segment]) -> list[Segment]:
    return [s for top in tops for s in (top, *nodes(top.children))]


def tokens_of(path: list[Segment]) -> tuple[int, ...]:
    return tuple(token for segment in path for token in segment.tokens)


def test_shared_beginnings_stand_once() -> None:
    answers = [(1, 2, 3, 4, 5, 9), (1, 2, 3, 4, 6, 9), (7, 9)]
    tops = grow_tree(0, list(enumerate(answers)), start=10)
    assert [s.tokens for s in nodes(tops)] == [(1, 2, 3, 4), (5, 9), (6, 9), (7, 9)]
    assert [s.start for s in nodes(tops)] == [10, 14, 14, 10]
    assert tops[0].to_feed == (1, 2, 3, 4)
    assert tops[1].to_feed == (7,)  # the last token predicts nothing
    assert list(tops[0].predicted_by(3)) == [(child, 0) for child in tops[0].children]
    assert list(tops[0].predicted_by(0)) == [(tops[0], 1)]


def test_little_in_common_is_not_shared() -> None:
    tops = grow_tree(0, [(0, (1, 2, 8)), (1, (1, 2, 9))], start=0)
    assert [s.tokens for s in tops] == [(1, 2, 8), (1, 2, 9)]


@pytest.mark.parametrize("seed", range(20))
def test_every_answer_is_whole(seed: int) -> None:
    """Answers that are equal, or begin another, too."""
    rng = random.Random(seed)
    answers = [tuple(rng.randrange(2) for _ in range(rng.randint(1, 12))) for _ in range(9)]
    answers += [answers[0], answers[1][:1], (*answers[2], 3)]
    tops = grow_tree(0, list(enumerate(answers)), start=5)
    for k, answer in enumerate(answers):
        path = path_of(tops, k)
        assert tokens_of(path)[: len(answer)] == answer
        assert tokens_of(path) == answer
        assert [s.start for s in path] == [5 + len(tokens_of(path[:i])) for i in range(len(path))]
    assert sum(len(s.tokens) for s in nodes(tops)) <= sum(map(len, answers))
