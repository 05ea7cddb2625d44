"""Teacher-forced scores and greedy answers from as few computed tokens as possible.

    all sequences  -> their common start (system prompt, in-context pairs)   computed once
    each question  -> a tree of its answers, each shared beginning once      scores
                        `-> greedy generation from the first token where the
                            model departs from the first answer              text

The teacher-forced pass over an answer tells how far greedy generation would follow it, so
generation starts there and not at the question. The results are those of separate passes:
causal attention gives a token the same keys and values whatever comes after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perta.data.batch import IGNORE, Encoded, collate
from perta.data.words import common_prefix
from perta.errors import ConfigError
from perta.evidence import metrics
from perta.evidence.scoring._tree import Segment, grow_tree, path_of
from perta.evidence.scoring.answers import Score, score_logits, score_tokens, token_statistics
from perta.evidence.scoring.cache import Extended, Masking, Prefixes, extend, supports_prefixes
from perta.models.load import generate
from perta.models.loss import answer_logits, token_losses
from perta.parallel import Own, everywhere, gathered, in_company, is_part, share
from perta.temporary import temporarily

_COMPAT_BATCHES = 8  # batches after which compatible runs report what is done


@dataclass(frozen=True)
class _Pass:
    """What one pass of a kind of device may have."""

    logits: int  # new tokens, unless a single answer has more, to bound the memory of logits
    cost: int
    """Tokens that take as long as a pass's fixed costs: reading the weights on CPUs, where little
    runs at once; launching kernels elsewhere."""


_ON_CPU, _ELSEWHERE = _Pass(2048, 16), _Pass(8192, 2048)


@dataclass(frozen=True)
class Item:
    """One question."""

    answers: tuple[Encoded, ...]  # the question with each answer to score, tokenised; at least one
    # Tokens to generate from; None where no answer is to be generated.
    prompt: tuple[int, ...] | None = field(default=None, repr=False)
    # Compute Min-K++ of the first answer, which looks at the whole vocabulary.
    moments: bool = False


@dataclass(frozen=True)
class Outcome:
    """Scores of an item's answers in order, and the generated tokens with their end token."""

    scores: tuple[Score, ...]
    generated: tuple[int, ...] | None = field(repr=False)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Outcome:
        """Inverse of `asdict`, also by way of JSON."""
        generated = value["generated"]
        scores = tuple(Score(**score) for score in value["scores"])
        return Outcome(scores, None if generated is None else tuple(generated))


@dataclass(frozen=True)
class ScoringOptions:
    """How to run."""

    masking: Masking  # which tokens attention sees
    end_ids: frozenset[int] = frozenset()  # tokens that end a generated answer
    batch_size: int = 16  # rows per forward pass
    max_new_tokens: int = 200  # longest generated answer
    longest: int | None = None  # most tokens the model has positions for; generation stops there
    # Ends an answer by its tokens so far, in addition to `end_ids`.
    stop: Callable[[Sequence[int]], bool] | None = None


Done = Callable[[int, Outcome], None]


def run_items(
    model: PreTrainedModel, items: Sequence[Item], options: ScoringOptions, done: Done | None = None
) -> list[Outcome]:
    """Score every answer and generate where a prompt is given: an outcome per item, in order.

    They are equal for every batch size up to rounding. `done` is called with an item's place and
    outcome as soon as it is complete.
    """
    outcomes = everywhere(_run_share, model, items, options, Own(done))
    return [outcomes[i] for i in range(len(items))]


def _run_share(
    model: PreTrainedModel, items: Sequence[Item], options: ScoringOptions, done: Own[Done]
) -> dict[int, Outcome]:
    """This process's share of the items, and on process 0 what the others found."""
    # Neighbours by length go to different processes, so that all have about as much to do.
    places = share(sorted(range(len(items)), key=lambda i: -len(items[i].answers[0].input_ids)))
    outcomes: dict[int, Outcome] = {}

    def finish(place: int, outcome: Outcome) -> None:
        outcomes[place] = outcome
        if done.value:
            done.value(place, outcome)

    def go_along() -> None:
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)

    with _evaluating(model), in_company(model, go_along):
        own = [items[i] for i in places]
        todo = (model, own, options, lambda k, outcome: finish(places[k], outcome))
        if supports_prefixes(model):
            _Run(*todo).all()
        else:
            _run_plainly(*todo)
    for found in gathered(outcomes)[1:]:
        for place, outcome in found.items():
            finish(place, outcome)
    return outcomes


def run_in_modes(
    model: PreTrainedModel, items: Sequence[Item], options: ScoringOptions, done: Done | None = None
) -> list[Outcome]:
    """`run_items` with the published treatment of hidden tokens.

    Published code counts hidden tokens' positions when scoring and skips them when generating,
    so the two cannot share a pass where the prompt holds one.
    """
    if options.masking.hidden_id is None:
        return run_items(model, items, options, done)
    skipping = replace(options, masking=replace(options.masking, skip_hidden=True))
    outcomes: list[Outcome] = []
    size = _COMPAT_BATCHES * options.batch_size
    for start in range(0, len(items), size):
        part = items[start : start + size]
        scored = run_items(model, [replace(item, prompt=None) for item in part], options)
        generating = [i for i, item in enumerate(part) if item.prompt is not None]
        drafts = [Item(part[i].answers[:1], part[i].prompt) for i in generating]
        texts = dict(zip(generating, run_items(model, drafts, skipping), strict=True))
        for i, outcome in enumerate(scored):
            generated = texts[i].generated if i in texts else None
            outcomes.append(replace(outcome, generated=generated))
            if done:
                done(start + i, outcomes[-1])
    return outcomes


@dataclass
class _Growing:
    """An answer being generated; its last token is not in the cache yet."""

    place: int
    tokens: list[int]


class _Run:
    """One call of `run_items` on a model whose prefixes can be shared."""

    def __init__(
        self, model: PreTrainedModel, items: Sequence[Item], options: ScoringOptions, finish: Done
    ) -> None:
        self.model, self.items, self.options, self.finish = model, items, options, finish
        self.scores: dict[int, list[Score]] = {i: [] for i in range(len(items))}
        self.bounds = _ON_CPU if model.device.type == "cpu" else _ELSEWHERE
        self.growing: list[_Growing] = []
        self.state: Prefixes | None = None
        self.root: Prefixes | None = None
        self.root_length = 0

    def all(self) -> None:
        """Score and generate everything, longest items first; a batch and more grows at a time."""
        if not self.items:
            return
        self._share_root()
        order = list(range(len(self.items)))
        size = self.options.batch_size
        while order or self.growing:
            if order and len(self.growing) <= size:
                batch, order = order[:size], order[size:]
                self._begin(batch)
            else:
                self._step()

    def _share_root(self) -> None:
        length = _root_length(self.items)
        if length > 0:
            tokens = self.items[0].answers[0].input_ids[:length]
            first = extend(self.model, None, [tokens], [(0, 0)], self.options.masking)
            self.root, self.root_length = first.keep([0], [length]), length

    def _begin(self, batch: Sequence[int]) -> None:
        """Score every answer of some items and start generating."""
        trees = {}
        for i in batch:
            sequences = [
                (k, encoded.input_ids[self.root_length : _last_label(encoded) + 1])
                for k, encoded in enumerate(self.items[i].answers)
            ]
            trees[i] = grow_tree(i, sequences, self.root_length)
        level = [segment for tops in trees.values() for segment in tops]
        while level:
            for part in _rows_that_fit(level, self.options.batch_size, self.bounds):
                self._feed(part)
            level = [child for segment in level for child in segment.children]
        for i, tops in trees.items():
            for k, encoded in enumerate(self.items[i].answers):
                self.scores[i].append(_path_score(path_of(tops, k), encoded))
            if self.items[i].prompt is None:
                self._complete(i, None)
        self._start_answers(trees)

    def _feed(self, segments: Sequence[Segment]) -> None:
        """Forward pass over segments whose parents have been fed."""
        segments, prefixes = self._behind_parents(segments)
        wanted: list[tuple[int, int]] = []
        predicted: list[tuple[Segment, int]] = []
        for row, segment in enumerate(segments):
            for offset in range(len(segment.to_feed)):
                for target in segment.predicted_by(offset):
                    if self._labelled(*target):
                        wanted.append((row, offset))
                        predicted.append(target)
        tokens = [segment.to_feed for segment in segments]
        fed = extend(self.model, prefixes, tokens, wanted, self.options.masking)
        kept = replace(fed, logits=fed.logits.new_empty(0))  # they take the most memory
        for row, segment in enumerate(segments):
            segment.fed, segment.row = kept, row
        self._record(fed.logits, predicted)

    def _behind_parents(self, segments: Sequence[Segment]) -> tuple[list[Segment], Prefixes | None]:
        """Segments grouped by the pass their parents were in, and those parents' prefixes."""
        groups: dict[int, list[Segment]] = {}
        for segment in segments:
            groups.setdefault(id(segment.parent and segment.parent.fed), []).append(segment)
        ordered: list[Segment] = []
        prefixes: Prefixes | None = None
        for group in groups.values():
            ordered += group
            parents = [segment.parent for segment in group if segment.parent]
            if parents and parents[0].fed:
                rows, fed = [p.row for p in parents], [len(p.to_feed) for p in parents]
                more = parents[0].fed.keep(rows, fed)
                prefixes = prefixes.join(more) if prefixes else more
        if prefixes is None and self.root:
            prefixes = self.root.take([0] * len(ordered))
        return ordered, prefixes

    def _labelled(self, segment: Segment, offset: int) -> bool:
        answers = self.items[segment.item].answers
        position = segment.start + offset
        return any(answers[k].labels[position] != IGNORE for k in segment.answers)

    def _record(self, logits: Tensor, predicted: Sequence[tuple[Segment, int]]) -> None:
        """Keep what the passes told about the tokens they predict."""
        if not predicted:
            return
        targets = torch.tensor([s.tokens[offset] for s, offset in predicted])
        log_probs, _, _ = token_statistics(logits, targets, moments=False)
        guesses = logits.argmax(-1).tolist()
        for (segment, offset), value, guess in zip(
            predicted, log_probs.tolist(), guesses, strict=True
        ):
            segment.log_probs[offset], segment.guesses[offset] = value, guess
        asked = [
            j for j, (s, _) in enumerate(predicted) if 0 in s.answers and self.items[s.item].moments
        ]
        if asked:
            index = torch.tensor(asked)
            rows = logits.index_select(0, index.to(logits.device))
            _, means, variances = token_statistics(rows, targets[index], moments=True)
            for j, mean, variance in zip(asked, means.tolist(), variances.tolist(), strict=True):
                segment, offset = predicted[j]
                segment.moments[offset] = (mean, variance)

    def _start_answers(self, trees: Mapping[int, Sequence[Segment]]) -> None:
        """Follow each first answer as far as greedy generation does, and go on from there."""
        starts: dict[int, list[tuple[_Growing, Segment, int]]] = {}
        apart = []
        for i, tops in trees.items():
            prompt = self.items[i].prompt
            if prompt is None:
                continue
            draft = _draft(self.items[i].answers[0], prompt)
            if not draft:
                apart.append(i)
                continue
            path = path_of(tops, 0)
            # The model's choice for each token behind the common start; -1 where nothing asked.
            guesses = [s.guesses.get(offset, -1) for s in path for offset in range(len(s.tokens))]
            answer = _followed(self._cut(draft), guesses[len(prompt) - self.root_length :])
            cached = len(prompt) + len(answer) - 1
            last = next(s for s in path if s.start < cached <= s.start + len(s.to_feed))
            entry = (_Growing(i, answer), last, cached - last.start)
            starts.setdefault(id(last.fed), []).append(entry)
        for group in starts.values():
            fed = group[0][1].fed
            if fed:
                rows = [segment.row for _, segment, _ in group]
                self._add(fed, [g for g, _, _ in group], rows, [n for _, _, n in group])
        if apart:
            self._start_apart(apart)

    def _start_apart(self, apart: Sequence[int]) -> None:
        """Start answers whose prompt is not how their first answer's tokens begin."""
        prompts = [(self.items[i].prompt or ())[self.root_length :] for i in apart]
        root = self.root.take([0] * len(apart)) if self.root else None
        last = [(row, len(prompt) - 1) for row, prompt in enumerate(prompts)]
        fed = extend(self.model, root, prompts, last, self.options.masking)
        firsts = zip(apart, fed.logits.argmax(-1).tolist(), strict=True)
        begun = [_Growing(i, [int(token)]) for i, token in firsts]
        self._add(fed, begun, list(range(len(apart))), [len(prompt) for prompt in prompts])

    def _add(
        self, fed: Extended, begun: Sequence[_Growing], rows: Sequence[int], kept: Sequence[int]
    ) -> None:
        """Take unfinished answers into the growing batch; `kept` counts new tokens in cache."""
        going = self._going(begun)
        if going:
            state = fed.keep([rows[j] for j in going], [kept[j] for j in going])
            self.state = self.state.join(state) if self.state else state
            self.growing.extend(begun[j] for j in going)

    def _step(self) -> None:
        """One token for every growing answer."""
        assert self.state is not None
        tokens = [[answer.tokens[-1]] for answer in self.growing]
        everywhere = [(row, 0) for row in range(len(tokens))]
        # Published code sees every token it has generated; only prompts hide some.
        masking = Masking(self.options.masking.pad_id)
        fed = extend(self.model, self.state, tokens, everywhere, masking)
        for answer, token in zip(self.growing, fed.logits.argmax(-1).tolist(), strict=True):
            answer.tokens.append(int(token))
        going = self._going(self.growing)
        self.growing = [self.growing[row] for row in going]
        grown = Prefixes(
            fed.cache,
            fed.mask,
            tuple(n + 1 for n in self.state.columns),
            tuple(n + 1 for n in self.state.positions),
        )
        self.state = grown.take(going) if going else None

    def _going(self, answers: Sequence[_Growing]) -> list[int]:
        """Places of those that go on; the others are finished."""
        ended = [self._ended(answer) for answer in answers]
        for answer in itertools.compress(answers, ended):
            self._complete(answer.place, answer.tokens)
        return [place for place, over in enumerate(ended) if not over]

    def _cut(self, draft: Sequence[int]) -> list[int]:
        ends = [j for j, token in enumerate(draft) if token in self.options.end_ids]
        stop = ends[0] + 1 if ends else len(draft)
        return list(draft[: min(stop, self.options.max_new_tokens)])

    def _ended(self, answer: _Growing) -> bool:
        room = self.options.max_new_tokens
        if self.options.longest is not None:
            room = min(room, self.options.longest - len(self.items[answer.place].prompt or ()))
        stop = self.options.stop
        return (
            answer.tokens[-1] in self.options.end_ids
            or len(answer.tokens) >= room
            or (stop is not None and stop(answer.tokens))
        )

    def _complete(self, i: int, generated: Sequence[int] | None) -> None:
        answer = None if generated is None else tuple(generated)
        self.finish(i, Outcome(tuple(self.scores.pop(i)), answer))


def _path_score(path: Sequence[Segment], encoded: Encoded) -> Score:
    """Scores of an answer from the segments it runs through."""
    tokens = [
        (segment, offset)
        for segment in path
        for offset in range(len(segment.tokens))
        if encoded.labels[segment.start + offset] != IGNORE
    ]
    log_probs = torch.tensor([segment.log_probs[offset] for segment, offset in tokens])
    correct = [segment.guesses[offset] == segment.tokens[offset] for segment, offset in tokens]
    moments = [segment.moments.get(offset, ()) for segment, offset in tokens]
    if not all(moments):
        return score_tokens(log_probs, correct, None)
    means, variances = torch.tensor(moments).unbind(1)
    return score_tokens(log_probs, correct, (means, variances))


def _rows_that_fit(
    segments: Sequence[Segment], batch_size: int, bounds: _Pass
) -> list[list[Segment]]:
    """Batches of segments of similar length, within bounds of rows and logits."""
    todo = sorted((s for s in segments if s.to_feed), key=lambda s: len(s.to_feed))
    batches: list[list[Segment]] = []
    logits = width = 0
    for segment in todo:
        length = len(segment.to_feed)
        logits += length
        rows = len(batches[-1]) if batches else batch_size
        padding = (length - width) * rows
        if rows == batch_size or logits > bounds.logits or padding > bounds.cost:
            batches.append([])
            logits = length
        width = length
        batches[-1].append(segment)
    return batches


def _run_plainly(
    model: PreTrainedModel, items: Sequence[Item], options: ScoringOptions, finish: Done
) -> None:
    """Every answer in its own full pass, for architectures whose prefixes cannot be shared."""
    if options.masking.hidden_id is not None:
        raise ConfigError(
            f"--compat needs a model whose attention takes positions; "
            f"{type(model).__name__} does not. Run without --compat."
        )
    for i, item in enumerate(items):
        scores = []
        for k, encoded in enumerate(item.answers):
            batch = collate([encoded], options.masking.pad_id).to(model.device)
            answers = answer_logits(model, batch)
            scores.append(score_logits(answers.logits, answers.targets, item.moments and k == 0))
        generated = None
        if item.prompt is not None:
            generated = _plain_generation(model, item.prompt, options)
        finish(i, Outcome(tuple(scores), generated))


def _plain_generation(
    model: PreTrainedModel, prompt: Sequence[int], options: ScoringOptions
) -> tuple[int, ...]:
    """Greedy answer to one prompt by the library's own loop."""
    answers = generate(
        model,
        prompt,
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(options.end_ids) or None,
        pad_token_id=options.masking.pad_id,
    )
    return tuple(answers[0].tolist())


def gradient_norm_score(model: PreTrainedModel, encoded: Encoded, masking: Masking) -> float | None:
    """Mean over parameters of the norm of the gradient of an answer's loss, without its last token.

    None for an answer without tokens; the model's own `.grad` fields are not touched.
    """
    labels = list(encoded.labels)
    labels[_last_label(encoded)] = IGNORE
    if all(label == IGNORE for label in labels[1:]):
        return None
    batch = collate([replace(encoded, labels=tuple(labels))], masking.pad_id)
    if masking.hidden_id is not None:
        batch = replace(batch, attention_mask=(batch.input_ids != masking.hidden_id).long())
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        loss = token_losses(answer_logits(model, batch.to(model.device))).mean()
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return metrics.gradient_norm(g for g in gradients if g is not None)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer: those of the generation config, and the tokenizer's eos."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    listed = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    return frozenset(int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and gradients; the model's mode is restored."""
    put = partial(nn.Module.train, model)
    # What a model in parts gathers its weights in is used again by passes of other kinds.
    without = torch.no_grad() if is_part(model) else torch.inference_mode()
    with temporarily(put, False, model.training), without:
        yield


def _last_label(encoded: Encoded) -> int:
    return max(i for i, label in enumerate(encoded.labels) if label != IGNORE)


def _root_length(items: Sequence[Item]) -> int:
    """Leading tokens that everything shares; at least one more follows in each sequence."""
    # One item shares nothing with others; its answers share their prefix anyway.
    if len(items) < 2:
        return 0
    answers = [encoded for item in items for encoded in item.answers]
    prompts = [item.prompt for item in items if item.prompt is not None]
    first = [next(i for i, n in enumerate(e.labels) if i and n != IGNORE) for e in answers]
    limits = [length - 1 for length in (*first, *map(len, prompts))]
    return min(*limits, common_prefix(*(e.input_ids for e in answers), *prompts))


def _draft(encoded: Encoded, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The answer's tokens behind the prompt; empty where tokens straddle the boundary."""
    n = len(prompt)
    if encoded.input_ids[:n] != prompt or n > _last_label(encoded):
        return ()
    draft = encoded.labels[n : _last_label(encoded) + 1]
    return () if IGNORE in draft else draft


def _followed(draft: Sequence[int], predicted: Sequence[int]) -> list[int]:
    """Greedy generation as far as it is known: agreed tokens and the first that differs."""
    for j, (token, guess) in enumerate(zip(draft, predicted, strict=False)):
        if token != guess:
            return [*draft[:j], int(guess)]
    return list(draft)
