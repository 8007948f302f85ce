"""The trained model and its data outside the repository: MLXFUN_SHARED, else ../shared."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ("drama", "markdown", "medical", "python", "solidity", "wiki")


@dataclass(frozen=True)
class Shared:
    """What the slow tests are run on."""

    model: Path
    data: Path

    def evaluation(self) -> list[str]:
        """The six evaluation sets."""
        return [str(self.data / f"eval_{name}.jsonl") for name in DOMAINS]

    @property
    def mixed(self) -> str:
        """The calibration set that mixes the three line formats."""
        return str(self.data / "calib_mixed.jsonl")


@pytest.fixture(scope="session")
def shared() -> Shared:
    root = Path(os.environ.get("MLXFUN_SHARED", ROOT.parent / "shared")).resolve()
    found = Shared(root / "models" / "real-qwen3-moe", root / "data")
    if not (found.model / "config.json").is_file() or not Path(found.mixed).is_file():
        pytest.skip(f"no trained model under {root}: set MLXFUN_SHARED to the directory that holds "
                    "models/real-qwen3-moe and data")  # fmt: skip
    return found
