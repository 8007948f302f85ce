"""mlxfun: observe, prune, steer and save Mixture-of-Experts models resident in MLX.

The engine is usable as a library: ``from mlxfun import Session``. Importing this package is cheap;
MLX and mlx-lm are imported when the first name that needs them is used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxfun.session.library import generate as generate
    from mlxfun.session.library import stream_generate as stream_generate
    from mlxfun.session.session import Session as Session
    from mlxfun.tracing.model import Model as Model

__version__ = "0.1.0"
__all__ = ["Model", "Session", "__version__", "generate", "stream_generate"]

# On CUDA, MLX multiplies float32 matrices in TF32, with ten bits of mantissa, unless it is told not
# to before the first product. Least squares, KL and norms are computed in float32 for its precision.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

_LAZY = {
    "Model": "mlxfun.tracing.model",
    "Session": "mlxfun.session.session",
    "generate": "mlxfun.session.library",
    "stream_generate": "mlxfun.session.library",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mlxfun' has no attribute {name!r}")
