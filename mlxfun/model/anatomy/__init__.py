"""Structural discovery of the MoE layers of any mlx-lm model.

All architecture-specific knowledge of the project lives in this package: `facts` holds it as rows
of data, `discover` finds the rest by looking at the modules, `types` describes what was found.
"""

from mlxfun.model.anatomy.discover import discover
from mlxfun.model.anatomy.types import Head, MoELayer, MoEMap, SlicedParameter

__all__ = ["Head", "MoELayer", "MoEMap", "SlicedParameter", "discover"]
