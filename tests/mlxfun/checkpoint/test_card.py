"""The model card, word for word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mlxfun import __version__
from mlxfun.checkpoint.card import Card

CARD = Card(
    name="out",
    model_id="some/base",
    checkpoint_id="00ff",
    recipe=("collect --dataset demo:mixed", "prune --n-prune 4"),
    scores={"perplexity all": 24.5, "KL": 0.0312345678},
    experts=12,
    quantization=None,
    total_bytes=5 << 20,
)

EXPECTED = f"""---
library_name: mlx
pipeline_tag: text-generation
base_model: "some/base"
tags:
- mlx
- mixture-of-experts
---

# out

Made with mlxfun {__version__} from `some/base` (checkpoint `00ff`): 12 experts per layer, 5.0 MiB. \
The base model's licence applies.

## Recipe

```
collect --dataset demo:mixed
prune --n-prune 4
```

## Measured

| measure | value |
|---|---|
| perplexity all | 24.5 |
| KL | 0.0312346 |

## Use

```python
from mlx_lm import generate, load

model, tokenizer = load("path/to/this/directory")
print(generate(model, tokenizer, prompt="Hello", max_tokens=64))
```
"""


def test_the_card_says_where_the_model_comes_from_and_what_was_done() -> None:
    assert CARD.render() == EXPECTED


def test_an_untouched_model_says_so() -> None:
    card = replace(CARD, recipe=(), scores={}).render()
    assert "None: the weights are those of the base model." in card
    assert "Nothing was measured before saving." in card


def test_a_local_base_is_not_passed_off_as_a_hub_model() -> None:
    assert "base_model" not in replace(CARD, model_id="my-dir").render()


def test_the_licence_of_the_base_card_is_inherited(tmp_path: Path) -> None:
    base = tmp_path / "README.base.md"
    base.write_text(
        "---\nlicense: other\nlicense_name: nice\nlanguage:\n- en\ntags:\n- x\n---\n# B\n"
    )
    card = replace(CARD, base_card=base).render()
    head = "---\nlicense: other\nlicense_name: nice\nlanguage:\n- en\nlibrary_name: mlx\n"
    assert card.startswith(head)
    assert "[README.base.md](README.base.md)" in card
    base.write_bytes(b"no front matter \xff")
    assert replace(CARD, base_card=base).render().startswith("---\nlibrary_name: mlx\n")


def test_a_recipe_or_a_measure_cannot_break_out_of_the_markup() -> None:
    card = replace(CARD, recipe=("chat '```'",), scores={"a|b": 1.0}).render()
    assert "````\nchat '```'\n````" in card
    assert "| a\\|b | 1 |" in card
