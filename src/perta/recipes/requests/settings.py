"""Options of the steps of `perta requests`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from perta.evidence.settings import Level
from perta.options import (
    ComputeConfig,
    DataConfig,
    Flat,
    Paths,
    Repeated,
    TuneConfig,
    WeightingConfig,
    require_day,
)
from perta.report.settings import Wanted


@Flat
@dataclass(frozen=True, kw_only=True)
class LedgerConfig(Paths):
    """What every step of `perta requests` that writes to the ledger has."""

    folder: Path
    """Folder of the ledger."""
    operator: str | None = None
    """Who does it, for the ledger."""
    key: Path | None = None
    """File with an Ed25519 private key (PEM) to sign the entry with."""


@Flat
@dataclass(frozen=True, kw_only=True)
class RequestsInitConfig(LedgerConfig):
    """`perta requests init`."""

    base: str
    """Model before it saw the data: folder, GGUF file, LoRA adapter folder or hub id."""
    full: str
    """Checkpoint that requests are applied to: the base model tuned on all of the data."""
    retain: str
    """All of the data, or what is to be kept of it: rows of requests are taken out."""
    holdout: str | None = None
    """Examples the model has never seen."""
    data_config: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


@Flat
@dataclass(frozen=True, kw_only=True)
class RequestsAddConfig(LedgerConfig):
    """`perta requests add`."""

    forget: str
    """Rows of the request."""
    name: str
    """Name of the request, such as a ticket number."""
    received: str | None = None
    """Day it came in, as in 2026-11-27."""
    data_config: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_day("received", self.received, "2026-11-27")


@Flat
@dataclass(frozen=True, kw_only=True)
class RequestsApplyConfig(LedgerConfig):
    """`perta requests apply`."""

    again: Annotated[tuple[str, ...], Repeated] = ()
    """Forget this request once more, beside those that wait."""
    retain_budget: float = 0.1
    """Largest rise of the mean loss on a sample of the data to keep, in nats per token."""
    fail_unless: Wanted | None = None
    """Leave the ledger as it is unless forgetting and retention are met, or at least partly."""
    model_key: Path | None = None
    """File with a private key of the curve P-256, P-384 or P-521 (PEM) to sign the cleaned
    checkpoint with, as OpenSSF model signing has it."""
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    data_config: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


@Flat
@dataclass(frozen=True, kw_only=True)
class RequestsRecheckConfig(LedgerConfig):
    """`perta requests recheck`."""

    level: Level = "quick"
    """How much the audit of each request's rows looks at."""
    data_config: DataConfig = field(default_factory=DataConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
