"""Small random diffusion transformers, and inputs for them."""

from tests.models.case import Case, Inputs, builders, randomize
from tests.models.small import MODELS, changed, flux, sd3

__all__ = ["MODELS", "Case", "Inputs", "builders", "changed", "flux", "randomize", "sd3"]
