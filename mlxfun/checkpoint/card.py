"""The model card (README.md) of a saved model: source, edits, measurements."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlxfun.text import installed_version, readable_bytes, visible

BASE_CARD = "README.base.md"
"""Where the card of the source goes: README.md is the new one."""
_LICENCE_KEYS = ("license", "license_name", "license_link", "language")


def base_card_name(present: Sequence[str]) -> str:
    """Where the card of a source with these files goes: a card that was kept before stays.

    >>> base_card_name(["README.md"]), base_card_name(["README.md", "README.base.md"])
    ('README.base.md', 'README.base-2.md')
    """
    names = (BASE_CARD, *(f"README.base-{n}.md" for n in range(2, len(present) + 3)))
    return next(name for name in names if name not in present)


@dataclass(frozen=True, slots=True)
class Card:
    """Facts for the card. model_id: Hub id or name of the base model.

    recipe: command lines in order. scores: {measure: value}. experts: per layer, as saved.
    """

    name: str
    model_id: str
    checkpoint_id: str
    recipe: Sequence[str]
    scores: Mapping[str, float]
    experts: int
    quantization: str | None
    total_bytes: int
    base_card: Path | None = None

    def render(self) -> str:
        """The whole README.md."""
        sections = [
            self._front_matter(),
            f"# {self.name}",
            self._origin(),
            "## Recipe\n\n" + self._recipe(),
            "## Measured\n\n" + self._measured(),
            "## Use\n\n" + _USE,
        ]
        return visible("\n\n".join(sections)) + "\n"

    def _front_matter(self) -> str:
        lines = [*self._inherited(), "library_name: mlx", "pipeline_tag: text-generation"]
        if "/" in self.model_id:
            # Only a Hub id means something to the Hub's model tree.
            lines.append(f"base_model: {json.dumps(self.model_id)}")
        lines += ["tags:", "- mlx", *(["- mixture-of-experts"] if self.experts else [])]
        return "---\n" + "\n".join(lines) + "\n---"

    def _inherited(self) -> list[str]:
        """The base model's licence and language lines, when its card states them."""
        if self.base_card is None or not self.base_card.exists():
            return []
        text = self.base_card.read_text("utf-8-sig", errors="replace").lstrip()
        match = re.match(r"---[ \t]*\n(.*?)\n---", text, flags=re.DOTALL)
        kept: list[str] = []
        inside = False
        for line in match[1].splitlines() if match else []:
            # A value may go on in lines that are indented, or are items of a list.
            if line[:1] not in (" ", "\t", "-", ""):
                inside = line.split(":")[0] in _LICENCE_KEYS
            if inside and line.strip():
                kept.append(line)
        return kept

    def _origin(self) -> str:
        quantised = f", {self.quantization}" if self.quantization else ""
        experts = f"{self.experts} experts per layer" if self.experts else "no experts"
        name = self.base_card.name if self.base_card else ""
        base = f" Its card is kept as [{name}]({name})." if name else ""
        return (
            f"Made with mlxfun {installed_version('mlxfun')} from `{self.model_id}` (checkpoint "
            f"`{self.checkpoint_id}`): {experts}{quantised}, "
            f"{readable_bytes(self.total_bytes)}. The base model's licence applies.{base}"
        )

    def _recipe(self) -> str:
        if not self.recipe:
            return "None: the weights are those of the base model."
        longest = max((len(run) for run in re.findall(r"`+", "\n".join(self.recipe))), default=0)
        fence = "`" * max(3, longest + 1)
        return f"{fence}\n" + "\n".join(self.recipe) + f"\n{fence}"

    def _measured(self) -> str:
        if not self.scores:
            return "Nothing was measured before saving."
        rows = [f"| {_cell(name)} | {value:.6g} |" for name, value in self.scores.items()]
        return "| measure | value |\n|---|---|\n" + "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_USE = """\
```python
from mlx_lm import generate, load

model, tokenizer = load("path/to/this/directory")
print(generate(model, tokenizer, prompt="Hello", max_tokens=64))
```"""
