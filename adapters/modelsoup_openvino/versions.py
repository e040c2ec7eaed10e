"""NNCF and OpenVINO: are they here, in a version that works, and made ready to be imported.

NNCF fake-quantises through a small C++ extension, which torch compiles when it is first used: a
minute and more. It is compiled in a folder of the process's own and published whole, so that
processes neither wait for each other nor for a lock that a killed one left behind; where there is
no compiler, NNCF computes with torch's own operations, more slowly, with the same results.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

from modelsoup import SoupError, cache_folder, how_to_install

Say = Callable[[str], None]

RANGES: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None]] = {
    "openvino": ((2025, 4), None),
    "nncf": ((3, 0), (4,)),
    "torch": ((2, 4), None),
}
"""What the extra `modelsoup[openvino]` asks for: from, and below."""

EXTRA = how_to_install("openvino")
_EXTENSION = Path("nncf") / "quantized_functions_cpu"
_SENDER = "openvino_telemetry"
_COMPILERS = ("c++", "g++", "clang++")


class VersionError(SoupError):
    """NNCF, OpenVINO or torch is missing, or has a version that does not work."""


def need(*packages: str) -> None:
    """Check that packages are installed in a version that works, without importing them.

    Raises:
        VersionError: one is not; the sentence says which range and which extra.
    """
    for package in packages:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            raise VersionError(
                f"{package} is not installed, where {described(package)} is needed: {EXTRA}"
            ) from None
        low, high = RANGES[package]
        own = _numbers(version)
        if own < low or (high is not None and own >= high):
            raise VersionError(
                f"{package} {version} is installed, where {described(package)} is needed: {EXTRA}"
            )


def described(package: str) -> str:
    """The range of a package as pip writes it: `nncf>=3.0,<4`."""
    low, high = RANGES[package]
    below = "" if high is None else f",<{'.'.join(map(str, high))}"
    return f"{package}>={'.'.join(map(str, low))}{below}"


def installed() -> dict[str, str]:
    """The versions of what takes part, for reports."""
    return {package: metadata.version(package) for package in RANGES}


def load_openvino() -> Any:
    """The module `openvino`, checked; torch is not imported.

    Raises:
        VersionError: as `need`, or it cannot be imported.
    """
    need("openvino")
    try:
        with untracked():
            import openvino
    except ImportError as error:
        raise VersionError(f"openvino cannot be imported: {error} ({EXTRA})") from error
    return openvino


def load_nncf(say: Say) -> Any:
    """The module `nncf`, checked, silent, and with its extension or its fallback ready.

    Args:
        say: is told once if there is no C++ compiler.

    Raises:
        VersionError: as `need`, or it cannot be imported.
    """
    need("torch", "nncf", "openvino")
    load_openvino()
    try:
        with untracked(), silence():
            import nncf
            import nncf.torch
            from nncf.torch.quantization.extensions import QuantizedFunctionsCPU
    except ImportError as error:
        raise VersionError(f"nncf cannot be imported: {error} ({EXTRA})") from error
    nncf.set_log_level(logging.ERROR)
    if QuantizedFunctionsCPU._loaded_namespace is None:
        with silence(), extension(say):
            QuantizedFunctionsCPU.get("Quantize_forward")
    return nncf


@contextmanager
def untracked() -> Iterator[None]:
    """While NNCF and OpenVINO are imported: both would write into ~/intel and send statistics.

    NNCF has a switch. OpenVINO has none for programs, but does without the package that sends.
    """
    os.environ["NNCF_CI"] = "1"
    blocked = _SENDER not in sys.modules
    if blocked:
        sys.modules[_SENDER] = None  # type: ignore[assignment]  # an import fails, as documented
    try:
        yield
    finally:
        if blocked:
            del sys.modules[_SENDER]


@contextmanager
def silence() -> Iterator[None]:
    """Without the warnings that NNCF and torch's tracer give about their own code.

    The tracer's are about hooks that read a number out of a tensor; what was traced is compared
    with the module by `export`.
    """
    nncf_log = logging.getLogger("nncf")
    level = nncf_log.level
    nncf_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        nncf_log.setLevel(level)


def compiler() -> str | None:
    """The C++ compiler that torch would call, if it runs and ninja is there; else None."""
    named = os.environ.get("CXX")
    for program in [named] if named else _COMPILERS:
        path = shutil.which(program)
        if path is not None and shutil.which("ninja") is not None and _runs(path):
            return path
    return None


@contextmanager
def extension(say: Say) -> Iterator[None]:
    """While NNCF loads its extension: a build folder of this process's own, from and to a cache.

    The cache is `nncf-extension` in `MODELSOUP_CACHE` or in the user's cache folder; a folder in
    it is never written to once it has its name.
    """
    patch = {"NNCF_EXTENSION_LOAD_TIMEOUT": "0"}  # the default of 60 s is too short to compile in
    own = Path(tempfile.mkdtemp(prefix="modelsoup-nncf-"))
    # The loaded library stays mapped, so the folder can go only with the process.
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    patch["TORCH_EXTENSIONS_DIR"] = str(own)
    shared: Path | None = None
    if compiler() is None:
        # torch would look for another compiler and fail in a longer way.
        patch["CXX"] = "/bin/false"
        say(
            "there is no working C++ compiler with ninja: NNCF computes with torch's own "
            "operations, which is slower and gives the same results"
        )
    else:
        shared = cache_folder("nncf-extension") / _build_name()
        if shared.is_dir():
            # Times are kept: ninja compiles again what is newer than its result.
            shutil.copytree(shared, own, dirs_exist_ok=True)
        else:
            say("NNCF compiles its C++ extension, once for this environment: about a minute")
    with _environment(patch):
        yield
    if shared is not None and not shared.is_dir() and any((own / _EXTENSION).rglob("*.so")):
        _publish(own, shared)


def _build_name() -> str:
    """What a build is for. The compiler is told where torch is: elsewhere all is compiled anew."""
    python = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    place = hashlib.sha256(os.fsencode(sys.prefix)).hexdigest()[:8]
    return "-".join([python, *installed().values(), place])


def _publish(built: Path, shared: Path) -> None:
    partial = shared.with_name(f".{uuid4().hex}")
    try:
        shutil.copytree(built, partial, ignore=shutil.ignore_patterns("lock"))
        partial.rename(shared)
    except OSError:  # another process was first, or the cache is not ours to write: not needed
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _runs(path: str) -> bool:
    try:
        command = [path, "--version"]
        done = subprocess.run(  # noqa: S603  # the user's own compiler
            command, capture_output=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) of `2.13.0+cpu`."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
