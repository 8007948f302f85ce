"""The files of a model, spoiled in every way: the rule is in `spoiled`."""

from __future__ import annotations

import pytest

from tests.hostile.spoiled import MODELS, Place, refuse_all


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_spoiled_files_are_refused(place: Place, name: str) -> None:
    refuse_all(place, name)
