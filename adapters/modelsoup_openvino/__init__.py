"""INT8 for the edge: quantisation-aware training with NNCF, export to OpenVINO.

The public face; a name is imported when it is first used, and torch only by those that need it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmark import measured
    from .deliver import deliver
    from .deploy import Deployable, Session, deployable
    from .export import about, agreement, converted, executed_operations, integer_operations
    from .export import read as read_model
    from .infer import Translator, translate
    from .measure import psnr, speeds
    from .qat import Candidate, Outcome, quantisation_aware
    from .quantise import Quantisation, load_quantised, quantised, save_quantised
    from .trainer import OpenVinoOptions, OpenVinoQat, quantise_to
    from .versions import VersionError

_HOMES = {
    "benchmark": ("measured",),
    "deliver": ("deliver",),
    "deploy": ("Deployable", "Session", "deployable"),
    "export": ("about", "agreement", "converted", "executed_operations", "integer_operations"),
    "infer": ("Translator", "translate"),
    "measure": ("psnr", "speeds"),
    "qat": ("Candidate", "Outcome", "quantisation_aware"),
    "quantise": ("Quantisation", "load_quantised", "quantised", "save_quantised"),
    "trainer": ("OpenVinoOptions", "OpenVinoQat", "quantise_to"),
    "versions": ("VersionError",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Candidate",
    "Deployable",
    "OpenVinoOptions",
    "OpenVinoQat",
    "Outcome",
    "Quantisation",
    "Session",
    "Translator",
    "VersionError",
    "about",
    "agreement",
    "converted",
    "deliver",
    "deployable",
    "executed_operations",
    "integer_operations",
    "load_quantised",
    "measured",
    "psnr",
    "quantisation_aware",
    "quantise_to",
    "quantised",
    "read_model",
    "save_quantised",
    "speeds",
    "translate",
]


def __getattr__(name: str) -> Any:
    if name == "read_model":
        return import_module(".export", __name__).read
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return __all__
