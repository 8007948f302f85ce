"""The bundled demo model and sample data, addressed as "demo" and "demo:NAME"."""

from __future__ import annotations

from pathlib import Path

from mlxfun.errors import DatasetError

DATASETS = {
    "mixed": "all domains of the model, in all three line formats: for calibration",
    "solidity": "smart contracts",
    "medical": "medical questions and answers",
    "python": "Python modules",
    "harmful": "requests that a safety-tuned model refuses, kept mild",
    "harmless": "everyday requests that any model should answer",
    "eval": "all domains, none of it in `mixed`: for evaluation",
}

_HERE = Path(__file__).resolve().parent


def model_path() -> Path:
    """The directory of the bundled Qwen3-MoE checkpoint (3.2 M parameters, 6 layers, 16 experts)."""
    return _HERE / "model"


def dataset_path(name: str) -> Path:
    """The JSONL file of sample set `name`, one of `DATASETS`.

    Raises DatasetError for an unknown name, listing the valid ones.
    """
    if name not in DATASETS:
        valid = ", ".join(f"demo:{known}" for known in DATASETS)
        raise DatasetError(f"there is no sample set demo:{name}; choose one of {valid}")
    return _HERE / "data" / f"{name}.jsonl"
