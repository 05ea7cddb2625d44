"""Teacher-forced scores and greedy answers from as few forward passes as possible.

    all sequences  -> their common start (system prompt, in-context pairs)   computed once
    each question  -> its first answer behind that start                     scores
                        |-> its other answers behind the question            scores
                        `-> greedy generation from the first token where the
                            model departs from the first answer              text

The teacher-forced pass over an answer tells how far greedy generation would follow it, so
generation starts there and not at the question. The results are those of separate passes:
causal attention gives a token the same keys and values whatever comes after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from perta import metrics
from perta.batch import IGNORE, Encoded, collate
from perta.errors import ConfigError
from perta.kv_cache import Extended, Masking, Prefixes, extend, supports_prefixes
from perta.objectives import answer_logits, token_losses

_CHUNK = 512
"""Rows of logits turned to log-probabilities at a time, to bound memory."""
_COMPAT_BATCHES = 8
"""Batches after which compatible runs report what is done."""
_MOST_LOGITS = 2048
"""Labelled tokens of one pass, unless a single answer has more; likewise."""


@dataclass(frozen=True)
class Score:
    """What one teacher-forced pass tells about an answer.

    Attributes:
        tokens: labelled tokens, the last (which ends the answer) included.
        loss: mean cross-entropy over them, nats.
        exact_memorization: see `metrics`; None where the last token is the only one.
        extraction_strength: likewise.
        min_k: likewise.
        min_k_plus_plus: likewise; None also where it was not asked for.
    """

    tokens: int
    loss: float
    exact_memorization: float | None
    extraction_strength: float | None
    min_k: float | None
    min_k_plus_plus: float | None

    @property
    def probability(self) -> float:
        """exp(-loss)."""
        return metrics.probability(self.loss)


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        answers: the question with each answer to score, tokenised; at least one.
        prompt: tokens to generate from; None where no answer is to be generated.
        moments: compute Min-K++ of the first answer, which looks at the whole vocabulary.
    """

    answers: tuple[Encoded, ...]
    prompt: tuple[int, ...] | None = None
    moments: bool = False


@dataclass(frozen=True)
class Outcome:
    """Scores of an item's answers in order, and the generated tokens with their end token."""

    scores: tuple[Score, ...]
    generated: tuple[int, ...] | None

    def as_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes an equal outcome."""
        generated = None if self.generated is None else list(self.generated)
        return {"scores": [asdict(score) for score in self.scores], "generated": generated}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Outcome:
        """Inverse of `as_json`."""
        generated = value["generated"]
        scores = tuple(Score(**score) for score in value["scores"])
        return Outcome(scores, None if generated is None else tuple(generated))


@dataclass(frozen=True)
class ScoringOptions:
    """How to run.

    Attributes:
        masking: which tokens attention sees.
        end_ids: tokens that end a generated answer.
        batch_size: rows per forward pass.
        max_new_tokens: longest generated answer.
        longest: most tokens the model has positions for; generation stops there.
        stop: ends an answer by its tokens so far, in addition to `end_ids`.
    """

    masking: Masking
    end_ids: frozenset[int] = frozenset()
    batch_size: int = 16
    max_new_tokens: int = 200
    longest: int | None = None
    stop: Callable[[Sequence[int]], bool] | None = None


Done = Callable[[int, Outcome], None]


def run_items(
    model: PreTrainedModel,
    items: Sequence[Item],
    options: ScoringOptions,
    done: Done | None = None,
) -> list[Outcome]:
    """Score every answer and generate where a prompt is given.

    Args:
        model: causal language model.
        items: questions.
        options: batch size, limits, masking.
        done: called with an item's place and outcome as soon as it is complete, in the order
            of completion.

    Returns:
        One outcome per item, in the order of `items`; equal for every batch size up to rounding.
    """
    outcomes: dict[int, Outcome] = {}

    def finish(place: int, outcome: Outcome) -> None:
        outcomes[place] = outcome
        if done:
            done(place, outcome)

    with _evaluating(model):
        if supports_prefixes(model):
            _Run(model, items, options, finish).all()
        else:
            _run_plainly(model, items, options, finish)
    return [outcomes[i] for i in range(len(items))]


def run_in_modes(
    model: PreTrainedModel,
    items: Sequence[Item],
    options: ScoringOptions,
    done: Done | None = None,
) -> list[Outcome]:
    """`run_items` with the published treatment of hidden tokens.

    Published code counts hidden tokens' positions when scoring and skips them when generating,
    so the two cannot share a pass where the prompt holds one.
    """
    hidden = options.masking.hidden_id
    if hidden is None:
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
        self.scores: dict[int, list[Score | None]] = {
            i: [None] * len(item.answers) for i, item in enumerate(items)
        }
        self.growing: list[_Growing] = []
        self.state: Prefixes | None = None
        self.root: Prefixes | None = None
        self.root_length = 0

    def all(self) -> None:
        """Score and generate everything, longest expected answers last."""
        if not self.items:
            return
        self._share_root()
        order = sorted(range(len(self.items)), key=lambda i: _expected_length(self.items[i]))
        size = self.options.batch_size
        while order or self.growing:
            # Refill once half the rows are done: steps with few rows cost nearly as much.
            if order and len(self.growing) <= size // 2:
                taken = _rows_that_fit([self.items[i] for i in order[:size]])
                batch, order = order[:taken], order[taken:]
                self._begin(batch)
            if self.growing and (not order or len(self.growing) > size // 2):
                self._step()

    def _share_root(self) -> None:
        length = _root_length(self.items)
        if length > 0:
            tokens = self.items[0].answers[0].input_ids[:length]
            first = extend(self.model, None, [tokens], [(0, 0)], self.options.masking)
            self.root, self.root_length = first.keep([0], [length]), length

    def _feed(
        self, sequences: Sequence[Sequence[int]], wanted: Sequence[tuple[int, int]]
    ) -> Extended:
        root = self.root.take([0] * len(sequences)) if self.root else None
        tokens = [sequence[self.root_length :] for sequence in sequences]
        places = [(row, position - self.root_length) for row, position in wanted]
        return extend(self.model, root, tokens, places, self.options.masking)

    def _begin(self, batch: Sequence[int]) -> None:
        """Score the first answers, then the others, and start generating."""
        firsts = [self.items[i].answers[0] for i in batch]
        wanted, spans = _wanted(firsts)
        # The last token predicts nothing that is scored.
        fed = self._feed([e.input_ids[: _last_label(e)] for e in firsts], wanted)
        predicted = fed.logits.argmax(-1)
        for i, encoded, span in zip(batch, firsts, spans, strict=True):
            self._store(i, 0, fed.logits[span], encoded)
        self._score_others(batch, fed)
        guesses = [predicted[span].tolist() for span in spans]
        self._start_answers(batch, fed, guesses)
        for i in batch:
            if self.items[i].prompt is None:
                self._complete(i, None)

    def _score_others(self, batch: Sequence[int], fed: Extended) -> None:
        rest = [
            (row, i, k) for row, i in enumerate(batch) for k in range(1, len(self.items[i].answers))
        ]
        rest.sort(key=lambda entry: len(self.items[entry[1]].answers[entry[2]].input_ids))
        for start in range(0, len(rest), self.options.batch_size):
            part = rest[start : start + self.options.batch_size]
            answers = [self.items[i].answers[k] for _, i, k in part]
            shared = [_shared_length(self.items[i].answers) for _, i, _ in part]
            prefixes = (
                fed.keep([row for row, _, _ in part], [n - self.root_length for n in shared])
                if min(shared) > 0
                else None
            )
            if prefixes is None:
                shared = [0] * len(part)
            wanted, spans = _wanted(answers)
            places = [(row, position - shared[row]) for row, position in wanted]
            tokens = [e.input_ids[n : _last_label(e)] for e, n in zip(answers, shared, strict=True)]
            logits = extend(self.model, prefixes, tokens, places, self.options.masking).logits
            for (_, i, k), encoded, span in zip(part, answers, spans, strict=True):
                self._store(i, k, logits[span], encoded)

    def _store(self, i: int, k: int, logits: Tensor, encoded: Encoded) -> None:
        targets = torch.tensor([t for t in encoded.labels[1:] if t != IGNORE])
        moments = self.items[i].moments and k == 0
        self.scores[i][k] = score_logits(logits, targets, moments)

    def _start_answers(
        self, batch: Sequence[int], fed: Extended, guesses: Sequence[Sequence[int]]
    ) -> None:
        """Follow each first answer as far as greedy generation does, and go on from there."""
        rows, kept, apart = [], [], []
        begun: list[_Growing] = []
        for row, i in enumerate(batch):
            prompt = self.items[i].prompt
            if prompt is None:
                continue
            whole = _draft(self.items[i].answers[0], prompt)
            if not whole:
                apart.append(i)
                continue
            draft = self._cut(whole)
            answer = _followed(draft, guesses[row][-_labels_from(self.items[i], prompt) :])
            begun.append(_Growing(i, answer))
            rows.append(row)
            kept.append(len(prompt) + len(answer) - 1 - self.root_length)
        self._add(fed, begun, rows, kept)
        if apart:
            prompts = [self.items[i].prompt or () for i in apart]
            alone = self._feed(prompts, [(r, len(p) - 1) for r, p in enumerate(prompts)])
            begun = [
                _Growing(i, [int(token)])
                for i, token in zip(apart, alone.logits.argmax(-1).tolist(), strict=True)
            ]
            lengths = [len(p) - self.root_length for p in prompts]
            self._add(alone, begun, list(range(len(apart))), lengths)

    def _add(
        self, fed: Extended, begun: Sequence[_Growing], rows: Sequence[int], kept: Sequence[int]
    ) -> None:
        """Take unfinished answers into the growing batch; `kept` counts new tokens in cache."""
        going = [j for j, answer in enumerate(begun) if not self._ended(answer)]
        for answer in begun:
            if self._ended(answer):
                self._complete(answer.place, answer.tokens)
        if going:
            state = fed.keep([rows[j] for j in going], [kept[j] for j in going])
            self.state = self.state.join(state) if self.state else state
            self.growing.extend(begun[j] for j in going)

    def _step(self) -> None:
        """One token for every growing answer."""
        if self.state is None:
            raise RuntimeError("answers are growing without a cache")
        tokens = [[answer.tokens[-1]] for answer in self.growing]
        everywhere = [(row, 0) for row in range(len(tokens))]
        # Published code sees every token it has generated; only prompts hide some.
        masking = Masking(self.options.masking.pad_id)
        fed = extend(self.model, self.state, tokens, everywhere, masking)
        for answer, token in zip(self.growing, fed.logits.argmax(-1).tolist(), strict=True):
            answer.tokens.append(int(token))
        going = [row for row, answer in enumerate(self.growing) if not self._ended(answer)]
        for answer in self.growing:
            if self._ended(answer):
                self._complete(answer.place, answer.tokens)
        self.growing = [self.growing[row] for row in going]
        grown = Prefixes(
            fed.cache,
            fed.mask,
            tuple(n + 1 for n in self.state.columns),
            tuple(n + 1 for n in self.state.positions),
        )
        self.state = grown.take(going) if going else None

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
        scores = tuple(score for score in self.scores.pop(i) if score is not None)
        self.finish(i, Outcome(scores, None if generated is None else tuple(generated)))


def score_logits(logits: Tensor, targets: Tensor, moments: bool) -> Score:
    """Every score of one answer.

    Args:
        logits: (n, V), any float type, row t predicting token t.
        targets: (n,) the labelled tokens.
        moments: compute Min-K++ too.

    Returns:
        The scores; `log_softmax` in float32, sums in float64.
    """
    targets = targets.to(logits.device)
    log_probs, means, variances = _token_statistics(logits, targets, moments)
    correct = (logits.argmax(-1) == targets)[:-1].tolist()
    plus_plus = None
    if moments:
        plus_plus = metrics.min_k_plus_plus(log_probs[:-1], means[:-1], variances[:-1])
    return Score(
        len(targets),
        -float(log_probs.double().mean()),
        metrics.exact_memorization(correct),
        metrics.extraction_strength(correct),
        metrics.min_k(log_probs[:-1]),
        plus_plus,
    )


def _token_statistics(
    logits: Tensor, targets: Tensor, moments: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each target, and mean and variance of them over the vocabulary."""
    log_probs, means, variances = [], [], []
    for start in range(0, len(targets), _CHUNK):
        part = logits[start : start + _CHUNK].float().log_softmax(-1)
        log_probs.append(part.gather(1, targets[start : start + _CHUNK, None])[:, 0].cpu())
        if moments:
            weighted = part.exp() * part
            mean = weighted.sum(-1)
            means.append(mean.cpu())
            variances.append(((weighted * part).sum(-1) - mean.square()).cpu())
    empty = torch.zeros(0)
    return (
        torch.cat(log_probs),
        torch.cat(means) if moments else empty,
        torch.cat(variances) if moments else empty,
    )


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
            moments = item.moments and k == 0
            scores.append(score_logits(answers.logits, answers.targets, moments))
        generated = None
        if item.prompt is not None:
            generated = plain_generation(model, item.prompt, options)
        finish(i, Outcome(tuple(scores), generated))


def plain_generation(
    model: PreTrainedModel, prompt: Sequence[int], options: ScoringOptions
) -> tuple[int, ...]:
    """Greedy answer to one prompt by the library's own loop."""
    ids = torch.tensor([list(prompt)], device=model.device)
    settings = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(options.end_ids) or None,
        pad_token_id=options.masking.pad_id,
    )
    # The library fills gaps from the model's own settings: a repetition penalty is not greedy.
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        output = model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
    finally:
        model.generation_config = own
    return tuple(output[0, len(prompt) :].tolist())


def gradient_norm_score(model: PreTrainedModel, encoded: Encoded, masking: Masking) -> float | None:
    """Mean norm of the gradient of an answer's loss, its last token left out.

    Args:
        model: causal language model; its own `.grad` fields are not touched.
        encoded: prompt and answer.
        masking: which tokens attention sees.

    Returns:
        The mean over parameters of each one's gradient norm; None for an answer without tokens.
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
    eos = tokenizer.eos_token_id
    return frozenset(int(i) for i in [*listed, eos] if i is not None)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout and gradients; the model's mode is restored."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        nn.Module.train(model, training)


def _first_label(encoded: Encoded) -> int:
    return next(i for i, label in enumerate(encoded.labels) if i and label != IGNORE)


def _last_label(encoded: Encoded) -> int:
    return max(i for i, label in enumerate(encoded.labels) if label != IGNORE)


def _wanted(answers: Sequence[Encoded]) -> tuple[list[tuple[int, int]], list[slice]]:
    """(row, position) that predicts each labelled token, and each row's part of that list."""
    wanted: list[tuple[int, int]] = []
    spans = []
    for row, encoded in enumerate(answers):
        start = len(wanted)
        wanted += [(row, t - 1) for t, y in enumerate(encoded.labels) if t and y != IGNORE]
        spans.append(slice(start, len(wanted)))
    return wanted, spans


def _shared_length(answers: Sequence[Encoded]) -> int:
    """Leading tokens that all answers share, short of the token that predicts the first label."""
    limit = min(_first_label(encoded) - 1 for encoded in answers)
    return _common_length([encoded.input_ids for encoded in answers], limit)


def _root_length(items: Sequence[Item]) -> int:
    """Leading tokens that everything shares; at least one more follows in each sequence."""
    answers = [encoded for item in items for encoded in item.answers]
    prompts = [item.prompt for item in items if item.prompt is not None]
    limits = [_first_label(encoded) - 1 for encoded in answers]
    limits += [len(prompt) - 1 for prompt in prompts]
    # One item shares nothing with others; its answers share their prefix anyway.
    if len(items) < 2:
        return 0
    return _common_length([*(e.input_ids for e in answers), *prompts], min(limits))


def _common_length(sequences: Sequence[Sequence[int]], limit: int) -> int:
    first = list(sequences[0])
    length = max(0, limit)
    for sequence in sequences[1:]:
        while list(sequence[:length]) != first[:length]:
            length -= 1
    return length


def _draft(encoded: Encoded, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The answer's tokens behind the prompt; empty where tokens straddle the boundary."""
    n = len(prompt)
    if encoded.input_ids[:n] != prompt or n > _last_label(encoded):
        return ()
    draft = encoded.labels[n : _last_label(encoded) + 1]
    return () if IGNORE in draft else draft


def _labels_from(item: Item, prompt: tuple[int, ...]) -> int:
    """Labelled tokens of the first answer behind the prompt."""
    return _last_label(item.answers[0]) + 1 - len(prompt)


def _followed(draft: Sequence[int], predicted: Sequence[int]) -> list[int]:
    """Greedy generation as far as it is known: agreed tokens and the first that differs."""
    for j, (token, guess) in enumerate(zip(draft, predicted, strict=False)):
        if token != guess:
            return [*draft[:j], int(guess)]
    return list(draft)


def _rows_that_fit(items: Sequence[Item]) -> int:
    """How many of the first items keep the logits of a pass within `_MOST_LOGITS` rows."""
    total = 0
    for row, item in enumerate(items):
        total += sum(label != IGNORE for label in item.answers[0].labels)
        if total > _MOST_LOGITS:
            return max(1, row)
    return len(items)


def _expected_length(item: Item) -> int:
    return len(item.answers[0].input_ids)
