"""Merge methods, a family a file; one method is one small function."""

from . import (  # noqa: F401  (importing registers them)
    agreement,
    averages,
    masks,
    pairs,
    post_processing,
    robust,
    sparsified,
    spectral,
    spherical,
    task_vectors,
    weighted,
)
from .asking import Outline, outline
from .listing import describe
from .parameters import Parameter, parameter
from .registry import (
    Method,
    build_parameters,
    check_value,
    code_version,
    get_method,
    method,
    method_names,
    offered_methods,
    registered_methods,
)

__all__ = [
    "Method",
    "Outline",
    "Parameter",
    "build_parameters",
    "check_value",
    "code_version",
    "describe",
    "get_method",
    "method",
    "method_names",
    "offered_methods",
    "outline",
    "parameter",
    "registered_methods",
]
