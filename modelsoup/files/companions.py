"""What lies in a model folder beside the weights and goes along with them, as its config does."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import CheckpointError
from .dtypes import DTYPES, numpy_dtype
from .reading import open_regular, read_small

WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".ot",
    ".pb", ".tflite", ".mlmodel",
)  # fmt: skip
"""Suffixes of weights in any format."""

_NAMES_WEIGHTS = re.compile(r".*\.index(\.[\w-]+)*\.json")
_LARGEST_CONFIG = 10_000_000
_DTYPE_KEYS = ("torch_dtype", "dtype")
_LAYER_COUNTS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
)  # fmt: skip
_QUANTISATION_KEYS = ("quantization_config", "compression_config")
_DTYPE_NAMES = {dtype.numpy for dtype in DTYPES.values() if dtype.kind == "float"}


def companions(source: Path, *, without: Path | None = None) -> Iterator[Path]:
    """The files of a model folder that go along with its weights, subfolders included, in order.

    Left out: weights in any format and what lists them, hidden files, links to folders (which could
    lead round in circles), and the model card (`README.md`), which describes the other model.

    Args:
        source: the model folder.
        without: a folder to leave out: the output, where it lies in the model folder.

    Raises:
        CheckpointError: a folder that cannot be read, what is neither file nor folder, or a link
            that leads nowhere or out of the model: what it leads to is not the model's.
    """

    def refuse(error: OSError) -> NoReturn:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error

    left_out = None if without is None else without.resolve()
    for folder, folders, files in os.walk(source, onerror=refuse):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and Path(folder, name).resolve() != left_out
        )
        for name in sorted(files):
            path = Path(folder, name)
            if (
                name.startswith(".")
                or name.lower() == "readme.md"
                or _NAMES_WEIGHTS.fullmatch(name)
                or path.suffix.lower() in WEIGHTS
            ):
                continue
            _must_belong(path, source)
            yield path


def _must_belong(path: Path, source: Path) -> None:
    if path.is_symlink():
        target = path.resolve()
        if not target.exists():
            raise CheckpointError(f"the link {path} leads nowhere")
        if not any(target.is_relative_to(home) for home in _homes(source)):
            raise CheckpointError(
                f"the link {path} leads out of the model, to {target}: put the file itself there, "
                f"or remove the link"
            )
    if not path.is_file():
        raise CheckpointError(f"{path} is neither a file nor a folder")


def _homes(source: Path) -> list[Path]:
    """Where the files of a model folder may lie.

    In itself, or, in the cache of Hugging Face, among the blobs of its repository:
    `REPOSITORY/snapshots/REVISION` holds links to `REPOSITORY/blobs`.
    """
    homes = [source.resolve()]
    for folder in (homes[0], *homes[0].parents):
        if folder.name == "snapshots":
            homes.append(folder.parent / "blobs")
    return homes


def copy_companions(source: Path, target: Path, *, without: Path | None = None) -> list[str]:
    """Copy a model folder's companions; see `companions`.

    Args:
        source: the model folder.
        target: where the copies go.
        without: a folder to leave out.

    Returns:
        the copied files' paths, relative to `source`.
    """
    copied = []
    for path in companions(source, without=without):
        relative = path.relative_to(source)
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        with open(open_regular(path), "rb") as original, (target / relative).open("xb") as copy:
            shutil.copyfileobj(original, copy, 1 << 20)
        copied.append(str(relative))
    return copied


def adapt_configs(folder: Path, parts: Sequence[str], dtype: str, *, quantised: bool) -> None:
    """Let the configs of a model folder say what its weights now are.

    Args:
        folder: with the configs, which are changed.
        parts: prefixes of the parts, whose folders have configs of their own.
        dtype: the safetensors dtype of the weights.
        quantised: whether they still are codes that are told apart by a `quantization_config`.
    """
    for prefix in dict.fromkeys(("", *parts)):
        path = folder / prefix / "config.json"
        if not path.is_file():
            continue
        try:
            content = json.loads(read_small(path, _LARGEST_CONFIG))
            adapted = _adapted(content, numpy_dtype(dtype).name, quantised=quantised)
            text = json.dumps(adapted, indent=2, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            continue  # not transformers' config; it was copied as it is
        if adapted != content:
            path.write_bytes(text + b"\n")


def _adapted(content: Any, dtype: str, *, quantised: bool) -> Any:
    """A config, and those of its parts such as `text_config`, with another dtype."""
    if not isinstance(content, dict):
        return content
    adapted = {}
    for key, value in content.items():
        if key in _QUANTISATION_KEYS and not quantised:
            continue
        if key in _DTYPE_KEYS and (value is None or str(value) in _DTYPE_NAMES):
            adapted[key] = dtype
        else:
            adapted[key] = _adapted(value, dtype, quantised=quantised)
    return adapted


def missing_layers(
    folder: Path, before: Sequence[str], after: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Layers that a model folder's config counts, and that tensors are no more there for.

    Args:
        folder: with the config.
        before: tensor names of the model that the config describes.
        after: those that are left.

    Yields:
        what the config says, and the numbered layers that are gone.
    """
    try:
        content = json.loads(read_small(folder / "config.json", _LARGEST_CONFIG))
        counts = dict(_counts(content))
    except (OSError, ValueError, RecursionError):
        return  # no config that counts anything
    there, were = _numbered(after), _numbered(before)
    for key, count in counts.items():
        homes = [h for h, numbers in were.items() if len(numbers) == count == max(numbers) + 1]
        gone = [f"{h}.{n}" for h in homes for n in sorted(were[h] - there.get(h, set()))]
        if gone:
            yield f"config.json says {key}: {count}", gone


def _counts(content: Any) -> Iterator[tuple[str, int]]:
    """How many layers a config and its parts say that there are."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if key in _LAYER_COUNTS and isinstance(value, int):
            yield key, value
        yield from _counts(value)


def _numbered(names: Sequence[str]) -> dict[str, set[int]]:
    """`a.layers` → {0, 1}, of names such as `a.layers.0.weight`."""
    found: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for place, part in enumerate(parts[1:], 1):
            if part.isascii() and part.isdigit() and len(part) < 6:
                found.setdefault(".".join(parts[:place]), set()).add(int(part))
    return found
