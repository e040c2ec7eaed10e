"""Merge methods, a family a file; one method is one small function."""

from ..methods import averages, spherical, task_vectors  # noqa: F401  (importing registers them)
from .registry import (
    Method,
    build_parameters,
    code_version,
    describe,
    get_method,
    method,
    method_names,
    offered_methods,
    parameter,
    registered_methods,
)

__all__ = [
    "Method",
    "build_parameters",
    "code_version",
    "describe",
    "get_method",
    "method",
    "method_names",
    "offered_methods",
    "parameter",
    "registered_methods",
]
