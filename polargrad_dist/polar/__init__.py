"""The polar decomposition A = U·H of batches of matrices: pure functions of tensors, importable on their own."""

from .api import Polar, PolarInfo, polar
from .cost import choose_method, cost, root_cost
from .gram import RowFactor, apply_rows, gram_matrix
from .homogenize import Homogenized, homogenize
from .polynomial import polar_express_coefficients
from .qdwh import gram_qdwh, norm_bound, norm_parts
from .root import InverseSqrt, inverse_sqrt
from .rows import CompressedRows, compress_rows, expand_rows
from .spectrum import homogenized_spectrum

__all__ = [
    "CompressedRows",
    "Homogenized",
    "InverseSqrt",
    "Polar",
    "PolarInfo",
    "RowFactor",
    "apply_rows",
    "choose_method",
    "compress_rows",
    "cost",
    "expand_rows",
    "gram_matrix",
    "gram_qdwh",
    "homogenize",
    "homogenized_spectrum",
    "inverse_sqrt",
    "norm_bound",
    "norm_parts",
    "polar",
    "polar_express_coefficients",
    "root_cost",
]
