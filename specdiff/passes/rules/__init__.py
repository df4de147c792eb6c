"""Transfer rules by op family; importing this package registers all of them."""

from specdiff.passes.rules import (
    attention,
    elementwise,
    linear,
    products,
    row_results,
    shape,
    spatial,
    writes,
)
from specdiff.passes.rules.registry import Facts, Link, Part, facts_of

__all__ = [
    "Facts",
    "Link",
    "Part",
    "attention",
    "elementwise",
    "facts_of",
    "linear",
    "products",
    "row_results",
    "shape",
    "spatial",
    "writes",
]
