"""A model larger than the memory that the operating system allows is calibrated, pruned, merged,
ablated and saved, and stock mlx-lm opens the result.

The one of 30 billion parameters takes an hour of a processor and 60 GB of disk: it is run where
MLXFUN_LARGE names a directory for it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.bench.random_model import Shape, make, write_lines
from tests.documents import ROOT

LARGE = os.environ.get("MLXFUN_LARGE")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not enforce the limit")

SHAPE = Shape(20, 32, 4, 512, 512, 8, 4, 64, 8192, bits=0)
LIMIT = 1 << 30
"""Bytes of data that the process may have: Python and its libraries, and what it computes."""

ALL_OF_IT = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.checkpoint.options import LoadOptions, SaveOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.techniques.ablate.options import AblateOptions
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.prune.options import PruneOptions

root, residence = Path(sys.argv[1]), sys.argv[2]
session = Session.open(root / "model", LoadOptions(resident=residence, scratch=root / "scratch"))
text, one, other = (DatasetOptions(str(root / f"{n}.jsonl")) for n in ("text", "one", "other"))
session.collect(CollectOptions(text))
session.prune(PruneOptions(n_prune=8))
session.apply(ApplyOptions())
session.merge(MergeOptions(text, n_prune=4, max_alignment_tokens=64))
session.apply(ApplyOptions())
session.abliterate(AblateOptions(one, other, answer_tokens=1))
session.apply(ApplyOptions())
report = session.save(SaveOptions(root / "saved"))
print(json.dumps({"peak": mx.get_peak_memory(), "bytes": report.bytes, "gate": report.gate}))
"""


def limited() -> None:
    """In the child, before it begins."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


def run(root: Path, residence: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", ALL_OF_IT, str(root), residence]
    return subprocess.run(words, capture_output=True, text=True, check=False, preexec_fn=limited)


@pytest.mark.slow
@LINUX
def test_two_gigabytes_are_edited_in_one(tmp_path: Path) -> None:
    model = make(SHAPE, tmp_path / "model")
    for seed, (name, lines, length) in enumerate(
        [("text", 4, 128), ("one", 16, 12), ("other", 16, 12)]
    ):
        write_lines(tmp_path / f"{name}.jsonl", lines, length, SHAPE.vocabulary, 1000 * seed)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert size > 1.8 * LIMIT
    assert run(tmp_path, "all").returncode != 0  # the limit is one
    done = run(tmp_path, "none")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["gate"]["logits"] == "identical"
    assert found["peak"] < LIMIT
    assert found["bytes"] < size


def steps(work: Path, *words: str) -> dict[str, dict[str, Any]]:
    """What `capped.py` prints, by step; its last line is under ""."""
    script = str(ROOT / "tests" / "slow" / "capped.py")
    few = ("--samples", "2", "--tokens", "8", "--words", "3")
    done = subprocess.run(
        [sys.executable, script, "--work", str(work), *few, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {row.get("step", ""): row for row in rows}


@pytest.mark.slow
@LINUX
def test_what_is_saved_is_that_of_the_model_in_memory(tmp_path: Path) -> None:
    """Layers of the 30B shape, packed in 4 bits."""
    streamed = steps(tmp_path, "--make", "2", "--cap", "4GiB")
    resident = steps(tmp_path, "--resident", "all")
    assert streamed[""]["sha256"] == resident[""]["sha256"]
    assert streamed[""]["gate"]["logits"] == "identical"


@pytest.mark.slow
@LINUX
@pytest.mark.skipif(LARGE is None, reason="MLXFUN_LARGE names no directory with 60 GB of room")
def test_thirty_billion_parameters_are_edited_in_four_gigabytes() -> None:
    work = Path(str(LARGE))
    found = steps(work, "--make", "48", "--cap", "4GiB")
    assert found[""]["gate"]["logits"] == "identical"
    assert max(row["rss"] for row in found.values() if "rss" in row) < 4 << 30
    answered = steps(work, "--cap", "8GiB", "--answer", "6GiB")
    assert answered["answer"]["rss"] < 8 << 30
    assert answered[""]["text"]
