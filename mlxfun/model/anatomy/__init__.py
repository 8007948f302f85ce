"""Structural discovery: decoder layers, their parts and names, and the experts of any mlx-lm model.

All architecture-specific knowledge of the project lives in this package: `facts` holds it as rows
of data, the other modules find the rest by looking at a model's modules, `types` describes what
was found. `mlxfun.model.model_map` puts it together.
"""

from mlxfun.model.anatomy.discover import discover
from mlxfun.model.anatomy.types import Head, MoELayer, MoEMap, SlicedParameter

__all__ = ["Head", "MoELayer", "MoEMap", "SlicedParameter", "discover"]
