"""mlxfun: observe, prune, steer and save Mixture-of-Experts models resident in MLX.

The engine is usable as a library: ``from mlxfun import Session``. Importing this package is cheap;
MLX and mlx-lm are imported when the first name that needs them is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxfun.session.session import Session as Session

__version__ = "0.1.0"
__all__ = ["Session", "__version__"]

_LAZY = {"Session": "mlxfun.session.session"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mlxfun' has no attribute {name!r}")
