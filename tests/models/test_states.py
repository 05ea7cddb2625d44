"""States between layers, against plain passes and a hand-made last half of a model in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from helpers import tiny_llama
from perta.data.batch import IGNORE, Batch, Encoded, collate
from perta.errors import ConfigError
from perta.models.states import decoded, decoder_layers, exchanged, layer_states


def batch(*labelled: tuple[int, ...]) -> Batch:
    """Rows of five to eight tokens, labelled at the given places."""
    rows = []
    for i, places in enumerate(labelled):
        ids = tuple(torch.randint(3, 60, (5 + i,), generator=torch.Generator().manual_seed(i)))
        tokens = tuple(int(t) for t in ids)
        labels = tuple(t if j in places else IGNORE for j, t in enumerate(tokens))
        rows.append(Encoded(tokens, labels, i + 1))
    return collate(rows, 2)


def gpt2(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=3, n_head=2, initializer_range=0.3
    )
    model: PreTrainedModel = GPT2LMHeadModel(config).eval()
    return model


MODELS = [tiny_llama(64, num_hidden_layers=3).double(), gpt2().double()]


@pytest.mark.parametrize("model", MODELS, ids=["llama", "gpt2"])
def test_states_are_the_hidden_states_of_a_plain_pass(model: PreTrainedModel) -> None:
    rows = batch((2, 4), (5,))
    states = layer_states(model, rows)
    with torch.no_grad():
        output: Any = model(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            output_hidden_states=True,
        )
    for i, (row, place) in enumerate([(0, 1), (0, 3), (1, 4)]):
        # The last of these is behind the final norm.
        for layer in range(2):
            torch.testing.assert_close(
                states[layer, i], output.hidden_states[layer + 1][row, place]
            )


@pytest.mark.parametrize("model", MODELS, ids=["llama", "gpt2"])
def test_states_are_decoded_by_norm_and_head(model: PreTrainedModel) -> None:
    # More states than places, so that they take several passes.
    rows = batch((1, 2, 3, 4), (1, 2, 3, 4, 5))
    states = layer_states(model, rows)
    found = decoded(model, rows, states)
    base: Any = model.base_model
    norm = base.norm if hasattr(base, "norm") else base.ln_f
    labels = rows.labels[:, 1:][rows.labels[:, 1:] != IGNORE]
    with torch.no_grad():
        logits = model.get_output_embeddings()(norm(states))
    expected = logits.log_softmax(-1)[:, range(9), labels]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # The last layer's states are the model's own.
    with torch.no_grad():
        own = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).logits
    targets = rows.labels[:, 1:]
    plain = own[:, :-1].log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(found[-1], plain[targets != IGNORE], rtol=1e-5, atol=1e-5)


def test_exchanged_states_go_through_the_layers_behind_and_no_others() -> None:
    model, other = tiny_llama(64, num_hidden_layers=3), tiny_llama(64, num_hidden_layers=3, seed=1)
    model, other = model.double(), other.double()
    rows = batch((3, 4), (2, 5))
    mine, theirs = layer_states(model, rows), layer_states(other, rows)
    plain = decoded(model, rows, mine)[-1]
    for layer in range(3):
        same = exchanged(model, rows, layer, mine[layer])
        torch.testing.assert_close(same, plain, rtol=1e-5, atol=1e-5)
    # By hand: the layers behind the first, on states of which four positions are the other's.
    with torch.no_grad():
        hidden = model(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            output_hidden_states=True,
        ).hidden_states[1]
        hidden[[0, 0, 1, 1], [2, 3, 1, 4]] = theirs[0]
        expected = []
        for i, length in enumerate((5, 6)):
            part = hidden[i : i + 1, :length]
            at = torch.arange(length)[None]
            turn = model.model.rotary_emb(part, at)
            mask = torch.full((length, length), float("-inf")).double().triu(1)[None, None]
            for layer_module in model.model.layers[1:]:
                part = layer_module(
                    part, attention_mask=mask, position_ids=at, position_embeddings=turn
                )
            logits = model.lm_head(model.model.norm(part))[0].log_softmax(-1)
            expected += [
                float(logits[t - 1, rows.labels[i, t]])
                for t in range(1, length)
                if rows.labels[i, t] != IGNORE
            ]
    found = exchanged(model, rows, 0, theirs[0])
    torch.testing.assert_close(found, torch.tensor(expected).to(found), rtol=1e-4, atol=1e-4)
    # Behind the last layer there is nothing but norm and head.
    last = exchanged(model, rows, 2, theirs[2])
    torch.testing.assert_close(last, decoded(model, rows, theirs)[-1], rtol=1e-5, atol=1e-5)


def test_a_model_whose_layers_cannot_be_found_is_refused() -> None:
    model = tiny_llama(64)
    model.config.num_hidden_layers = 7
    with pytest.raises(ConfigError, match="no list of 7 layers"):
        decoder_layers(model)
