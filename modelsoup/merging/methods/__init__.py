"""Merge methods, a family a file; one method is one small function."""

from . import averages, spherical, task_vectors  # noqa: F401  (importing registers them)
from .registry import (
    Method,
    Outline,
    Parameter,
    build_parameters,
    code_version,
    describe,
    get_method,
    method,
    method_names,
    offered_methods,
    outline,
    parameter,
    registered_methods,
)

__all__ = [
    "Method",
    "Outline",
    "Parameter",
    "build_parameters",
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
