"""What writes a file and is no command line of a stub or a demo, for the kills."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

from commands.cli import main
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.checkpoint.save import write
from tests.mlxfun.exports import export_of


def save(force: bool) -> None:
    """Save the model `base` as `out`, with or without --force."""
    write(export_of(Path("base")), SaveOptions(Path("out"), force=force))


def prepare_dataset() -> None:
    """`prepare-dataset`, with a data set of the Hub that is here."""
    module = ModuleType("datasets")
    records = [{"text": f"record {number} " + "word " * 200} for number in range(60)]
    module.load_dataset = lambda *_, **__: iter(records)  # type: ignore[attr-defined]
    sys.modules["datasets"] = module
    words = ["prepare-dataset", "owner/name", "--output", "out.jsonl", "--max-samples", "50"]
    sys.argv = ["mlxfun-shell", "--headless", "-c", " ".join(words)]
    main()
