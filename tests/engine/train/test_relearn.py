"""Relearning: the steps are AdamW's on the mean loss of all rows, as an own loop takes them."""

from __future__ import annotations

import torch

from helpers import tiny_llama
from perta.data.batch import IGNORE, Encoded
from perta.engine.train.relearn import general_texts, relearn
from perta.models.loss import losses_of

ROWS = [
    Encoded((5, 6, 7, 8, 9), (IGNORE, IGNORE, IGNORE, 8, 9), 1),
    Encoded((5, 11, 12), (IGNORE, IGNORE, 12), 2),
    Encoded((20, 21, 22, 23), (IGNORE, 21, 22, 23), 3),
]


def test_steps_are_those_of_an_own_loop() -> None:
    model, own = tiny_llama(64), tiny_llama(64)
    seen = []
    curve = []

    def after(step: int) -> None:
        seen.append(step)
        curve.append(losses_of(model, ROWS, batch_size=2, pad=2))

    relearn(model, ROWS, pad=2, steps=3, learning_rate=1e-3, after_step=after)
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(3):
        loss = torch.zeros(())
        for row in ROWS:
            logits = own(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            told = [-logits[t - 1, i] for t, i in enumerate(row.labels) if i != IGNORE]
            loss = loss + torch.stack(told).mean() / len(ROWS)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own.parameters(), 1.0)
        optimizer.step()
        torch.testing.assert_close(
            torch.tensor(curve[step]), torch.tensor(losses_of(own, ROWS, batch_size=3, pad=2))
        )
    assert seen == [1, 2, 3]


def test_general_texts_are_english_and_not_empty() -> None:
    texts = general_texts()
    assert len(texts) == 4
    assert all(len(text) > 500 and " the " in text for text in texts)
