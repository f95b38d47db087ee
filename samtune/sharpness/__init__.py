"""Sharpness of a loss around a model's weights: m-sharpness, the Hessian's spectrum, slices of the loss.

The functions take a loss, data and parameters, of any training loop; Lanczos takes only products with vectors.
`samtune.sharpness.run` applies them to checkpoints.
"""

from samtune.sam.perturbation import Perturbation
from samtune.sharpness.directions import random_directions
from samtune.sharpness.hessian import Hessian
from samtune.sharpness.lanczos import Eigenpairs, Lanczos, Spectrum, spectrum, top_eigenpairs
from samtune.sharpness.m_sharpness import GroupSharpness, MSharpness, group_sharpness, mean_over_groups
from samtune.sharpness.slices import filter_normalised_direction, line_to, moved

__all__ = [
    "Eigenpairs",
    "GroupSharpness",
    "Hessian",
    "Lanczos",
    "MSharpness",
    "Perturbation",
    "Spectrum",
    "filter_normalised_direction",
    "group_sharpness",
    "line_to",
    "mean_over_groups",
    "moved",
    "random_directions",
    "spectrum",
    "top_eigenpairs",
]
