"""Options of measurements."""

from __future__ import annotations

from dataclasses import dataclass

from mlxfun.data.options import DatasetOptions


@dataclass(frozen=True, slots=True)
class RefusalOptions:
    """Prompts whose answers are judged. tokens: how much of an answer is."""

    harmful: DatasetOptions
    harmless: DatasetOptions
    tokens: int = 100


PROBE_TOKENS = 512


DOSSIER_TOKENS = 2048
TOPIC_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class ProbeOptions:
    """A quick look, at the staged plan or at one expert. data None: the held-out part of the calibration set."""

    data: DatasetOptions | None = None
    tokens: int = PROBE_TOKENS


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What to measure. datasets empty: the held-out split of the calibration set.

    samples: answers that are shown, of at most sample_tokens. answers: how many answers, of at most
    answer_tokens, are judged for loops and natural ends, and compared with the checkpoint's.
    """

    datasets: tuple[DatasetOptions, ...] = ()
    kl: bool = True
    samples: int = 0
    sample_tokens: int = 48
    answers: int = 0
    answer_tokens: int = 256
