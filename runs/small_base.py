"""A small Llama that can answer questions about fictitious people, to compare methods on a laptop.

    python runs/small_base.py --output small-base
    perta bench compare --base small-base --people 20 --questions 5 --forget-people 4 \
        --learning-rate 2e-3 --epochs 40 --output comparison ...

About 1 million parameters, words as tokens, trained from scratch on people of which no comparison
with a seed below 100 has any. It has seen nothing else, so what is found on it need not hold for
language models of a usual size.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from perta.data.rows import write_jsonl
from perta.evidence.people import generate_people
from perta.models.demo.tiny import tiny_llama, tiny_tokenizer
from perta.models.load import save_model
from perta.options import ComputeConfig, DataConfig, TuneConfig
from perta.stages.finetune import finetune_checkpoint
from perta.stages.settings import FinetuneConfig
from perta.store.atomic import atomic_folder

PRETRAINING_SEED = 1000


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--people", type=int, default=300, help="people to train on")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    rows = generate_people(options.people, 5, PRETRAINING_SEED)
    # Words of the people it will be tuned on have to be in the vocabulary.
    others = [row for seed in range(10) for row in generate_people(60, 5, seed)]
    columns = ("question", "answer", "paraphrased_answer")
    texts = [row[name] for row in [*rows, *others] for name in columns]
    texts += [wrong for row in [*rows, *others] for wrong in row["perturbed_answer"]]
    tokenizer = tiny_tokenizer([*texts, DataConfig().system_prompt])
    model = tiny_llama(len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} words")
    with tempfile.TemporaryDirectory() as scratch:
        with atomic_folder(Path(scratch) / "random", overwrite=True) as folder:
            save_model(model, tokenizer, folder, None)
        finetune_checkpoint(
            FinetuneConfig(
                base=str(Path(scratch) / "random"),
                data=str(write_jsonl(rows, Path(scratch) / "people.jsonl")),
                output=options.output,
                tune=TuneConfig(epochs=6, learning_rate=2e-3, batch_size=16),
                compute=ComputeConfig(threads=options.threads),
            )
        )


if __name__ == "__main__":
    main()
