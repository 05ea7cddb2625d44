"""What the training loop steps with: adapter, optimizer, schedule, and the state to resume from."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from perta.data.batch import Batch
from perta.engine.shard import Whole
from perta.errors import ConfigError, DivergenceError
from perta.models.formats.adapters import refuse_tied
from perta.models.precision import products_in
from perta.options import TrainingRun
from perta.parallel import count, summed
from perta.progress import say, warn
from perta.store.atomic import atomic_file, beside, recover

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


def _add_adapter(model: PreTrainedModel, config: TrainingRun) -> Any:
    """Put a LoRA adapter on a model; only its weights are trained."""
    from peft import get_peft_model

    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    with warnings.catch_warnings():
        # PEFT warns of what is refused here, and of turning the factors of transposed weights.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        adapted = get_peft_model(model, _lora(config))
    refuse_tied(adapted)
    return adapted


def _lora(config: TrainingRun) -> PeftConfig:
    from peft import LoraConfig

    alpha = 2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft takes any number here
        target_modules=list(config.lora_targets) or "all-linear",
        task_type="CAUSAL_LM",
    )


def _set_checkpointing(model: Any, on: bool, products: torch.dtype) -> None:
    """Turn the recomputation of activations in the backward pass on or off."""

    def again() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return products_in(products, model.device), products_in(products, model.device)

    with warnings.catch_warnings():
        # transformers renames these methods between versions; both names work.
        warnings.simplefilter("ignore", FutureWarning)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": again})
        else:
            model.gradient_checkpointing_disable()


def step_groups(batches: Sequence[Batch], accumulation: int) -> Iterator[Sequence[Batch]]:
    """The batches of each optimizer step."""
    for start in range(0, len(batches), accumulation):
        yield batches[start : start + accumulation]


def _trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that training changes."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _add_up_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give every process the sum of all gradients; what none has a gradient of stays without."""
    if count() == 1:
        return
    has = torch.tensor([float(p.grad is not None) for p in parameters])
    for parameter, processes in zip(parameters, summed(has).tolist(), strict=True):
        if processes:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            summed(parameter.grad)


@dataclass
class Trainer:
    """A model in training: what an optimizer step needs, and all that it changes.

    Products of matrices are in the type `products`; weights and sums are float32.
    """

    model: Any
    settings: TrainingRun
    epochs: int
    products: torch.dtype
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator
    whole: Whole | None = None  # where the model is divided

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        config: TrainingRun,
        examples: int,
        products: torch.dtype,
        whole: Whole | None = None,
    ) -> Trainer:
        """A trainer at its first step over so many examples an epoch; random numbers are seeded.

        With a `whole` model `model` is its outline, and is divided.
        """
        if config.epochs is None or config.learning_rate is None:
            raise ConfigError("Training needs a number of epochs and a learning rate.")
        torch.manual_seed(config.seed)
        if whole is not None and whole.model is not None and config.tunes_adapter:
            whole = replace(whole, model=_add_adapter(whole.model, config))
        trained: Any = _add_adapter(model, config) if config.tunes_adapter else model
        if config.gradient_checkpointing:
            _set_checkpointing(trained, True, products)
        if whole is not None:
            whole.divide(trained)
        optimizer = torch.optim.AdamW(
            list(_trained_parameters(trained).values()),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        batches = math.ceil(examples / config.batch_size)
        steps = math.ceil(batches / config.accumulation) * config.epochs
        warmup = math.ceil(config.warmup_ratio * steps)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            left = (steps - step) / max(1, steps - warmup)
            if config.schedule == "linear":
                return max(0.0, left)
            if config.schedule == "cosine":
                return 0.5 * (1 + math.cos(math.pi * (1 - left)))
            return 1.0

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        generator = torch.Generator().manual_seed(config.seed)
        run = (trained, config, config.epochs, products, optimizer, scheduler, generator)
        return cls(*run, whole)

    @property
    def gpus(self) -> list[torch.device]:
        """The GPU of this process, if it trains on one; others are no concern of ours."""
        return [self.model.device] if self.model.device.type == "cuda" else []

    @property
    def steps(self) -> int:
        """Steps taken so far."""
        return self.scheduler.last_epoch

    def step(self) -> None:
        """Apply the gradients that have gathered on all processes."""
        parameters = [*_trained_parameters(self.model).values()]
        if self.whole is None:  # of a divided model each has its part of them
            _add_up_gradients(parameters)
        if most := self.settings.max_grad_norm:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            norm = norm if self.whole is None else norm.full_tensor()  # type: ignore[attr-defined]
            if not norm + 1e-6 <= most:  # below it PyTorch would multiply all by one
                nn.utils.clip_grads_with_norm_(parameters, most, norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def uphill(self, radius: float, add_gradient: Callable[[], object]) -> Iterator[None]:
        """Weights a step of length `radius` along a gradient, taken for that alone; back after.

        Source: Foret et al., arXiv 2010.01412. What has gathered of the step stays.
        """
        parameters = [*_trained_parameters(self.model).values()]
        before = [(p.detach().clone(), p.grad) for p in parameters]
        self.optimizer.zero_grad(set_to_none=True)
        add_gradient()
        _add_up_gradients(parameters)
        norm = float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        with torch.no_grad():
            for parameter, (_, gathered) in zip(parameters, before, strict=True):
                if parameter.grad is not None and norm:
                    parameter.add_(parameter.grad, alpha=radius / norm)
                parameter.grad = gathered
        yield
        with torch.no_grad():
            for parameter, (value, _) in zip(parameters, before, strict=True):
                parameter.copy_(value)

    def finish(self, merges: bool = True) -> Any:
        """The trained model in evaluation mode, an adapter merged or left on it.

        Of a divided one process 0 has it, and the others their part.
        """
        model = self.model if self.whole is None else self.whole.gather(self.model)
        if self.settings.gradient_checkpointing:
            _set_checkpointing(model, False, self.products)
        is_whole = self.whole is None or self.whole.model is not None
        merges &= self.settings.tunes_adapter and is_whole
        return (model.merge_and_unload() if merges else model).eval()

    def state(self) -> dict[str, Any]:
        """All that steps have changed, as plain values and tensors."""
        return {
            "weights": {name: p.detach() for name, p in _trained_parameters(self.model).items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "order": self.generator.get_state(),
            "rng": torch.get_rng_state(),
            "cuda_rng": [torch.cuda.get_rng_state(device) for device in self.gpus],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        with torch.no_grad():
            for name, parameter in _trained_parameters(self.model).items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["order"])
        torch.set_rng_state(state["rng"])
        for device, numbers in zip(self.gpus, state["cuda_rng"], strict=True):
            torch.cuda.set_rng_state(numbers, device)


@dataclass(frozen=True)
class Resume:
    """Where an unfinished training run keeps its state, so that a killed one goes on from it."""

    folder: Path  # the place, `OUTPUT.resume`
    key: str  # hash of all that decides the result; a state with another key is not used
    every: int  # epochs between two states; 0 saves none

    @property
    def file(self) -> Path:
        """The state: weights, optimizer, schedule, random numbers and history."""
        return self.folder / "state.pt"

    def save(self, trainer: Trainer, epoch: int, history: Mapping[str, Any]) -> None:
        """Keep the state after an epoch (from 1), if it is one of those to be kept."""
        if not self.every or epoch % self.every:
            return
        with atomic_file(self.file, overwrite=True, private=True) as partial:
            state = {"key": self.key, "epoch": epoch, "history": dict(history)}
            torch.save({**state, **trainer.state()}, partial)

    def load(self, trainer: Trainer) -> tuple[int, dict[str, Any]] | None:
        """Put a saved state, if there is one, into a trainer: epochs done and their history."""
        if not self.file.exists():
            return None
        try:
            with zipfile.ZipFile(self.file) as parts:
                damaged = parts.testzip()  # torch does not look at the checksums it writes
            # No pickled code is run: tensors and plain values only.
            state = torch.load(self.file, map_location="cpu", weights_only=True)
            same = damaged is None and state["key"] == self.key
        except Exception:  # a damaged file makes torch raise a dozen unrelated classes
            same = False
        if not same:
            warn(
                f"{self.file} is damaged or of a run with other inputs or settings; it is not "
                "used, and training starts over."
            )
            return None
        trainer.restore(state)
        say(f"Going on after epoch {state['epoch']}, from {self.folder}")
        return state["epoch"], state["history"]

    def discard(self) -> None:
        """Remove the state; the folder goes with it unless somebody else put files there."""
        recover(self.file)
        self.file.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


@contextmanager
def resumable(output: Path, key: str, every: int) -> Iterator[Resume]:
    """Keep the state of a run beside its output until the output is there.

    It is kept when the block is interrupted, but not after a DivergenceError, since it leads there
    again. `key` and `every` are those of `Resume`.
    """
    resume = Resume(beside(output, ".resume"), key, every)
    try:
        yield resume
    except DivergenceError:
        resume.discard()
        raise
    resume.discard()
