"""NumPy array types for annotations. Importing this module does not import NumPy.

Legend for shapes in the whole project: L MoE layers (in model order), E experts per layer as
numbered in the checkpoint, T tokens, K top-k, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Mask: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"
"""bool, mostly [L, E]."""
