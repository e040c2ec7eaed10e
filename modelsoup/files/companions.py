"""What lies in a model folder beside the weights and goes along with them, as its config does."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

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
    "num_encoder_layers", "num_decoder_layers", "depth",
)  # fmt: skip
_KINDS_OF_LAYERS = ("encoder", "decoder", "text", "language", "vision", "visual", "audio")
_TOKEN_IDS = ("token_id", "token_ids")
_VOCABULARY_SIZE = "vocab_size"
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


class Renumbered(NamedTuple):
    """Tokens that have other numbers than those which a config speaks of.

    Attributes:
        before, after: how many rows embeddings had, and have.
        ids: number → what it is now; what is not among them is no token any more.
    """

    before: int
    after: int
    ids: Mapping[int, int]


class Stack(NamedTuple):
    """Numbered layers that are no more those that a config describes.

    Attributes:
        before: how many there were.
        layers: for each that there is, the model folder that it comes from, if it comes from one,
            and its number there.
    """

    before: int
    layers: tuple[tuple[Path | None, int], ...]


def adapt_configs(
    folder: Path, parts: Sequence[str], dtypes: Sequence[str], *, quantised: bool,
    stacks: Mapping[str, Stack], tokens: Renumbered | None = None,
) -> None:  # fmt: skip
    """Let the configs of a model folder say what its weights now are.

    Args:
        folder: with the configs, which are changed.
        parts: prefixes of the parts, whose folders have configs of their own.
        dtypes: the safetensors dtypes that the weights were given, one after the other: a config
            that merges on the way changed is written anew though it ends as it began.
        quantised: whether they still are codes that are told apart by a `quantization_config`.
        stacks: what numbered layers are called → which they are now, where these are others.
        tokens: their numbers, where these are others.
    """
    for prefix, path in _configs(folder, parts):
        try:
            content = json.loads(read_small(path, _LARGEST_CONFIG))
            adapted = content if tokens is None else _with_tokens(content, tokens)
            adapted = with_layers(adapted, stacks, prefix)
            is_changed = adapted != content
            for dtype in dtypes:
                before = adapted
                adapted = _adapted(before, numpy_dtype(dtype).name, quantised=quantised)
                is_changed |= adapted != before
            text = json.dumps(adapted, indent=2, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            continue  # not transformers' config; it was copied as it is
        if is_changed:
            path.write_bytes(text + b"\n")


def _configs(folder: Path, parts: Sequence[str] = ()) -> Iterator[tuple[str, Path]]:
    """The configs that a model folder has, each with the prefix of the part that it is of."""
    names = {f"{prefix}config.json": prefix for prefix in ("", *parts)}
    for name, prefix in {**names, "generation_config.json": ""}.items():
        if (folder / name).is_file():
            yield prefix, folder / name


def _with_tokens(content: Any, tokens: Renumbered) -> Any:
    """A config that counts the tokens which there are now, and names them by their numbers."""
    if not isinstance(content, dict):
        return content
    adapted = {}
    for key, value in content.items():
        if key.endswith(_TOKEN_IDS):
            several = isinstance(value, list)
            numbers = [tokens.ids.get(n, n) if type(n) is int else n for n in _listed(value)]
            adapted[key] = numbers if several else numbers[0]
        elif key == _VOCABULARY_SIZE and value == tokens.before:
            adapted[key] = tokens.after
        else:
            adapted[key] = _with_tokens(value, tokens)
    return adapted


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def lost_tokens(folder: Path, tokens: Renumbered) -> Iterator[str]:
    """What configs say of tokens that are no more: `config.json says pad_token_id: 7`."""
    for _, path in _configs(folder):
        try:
            content = json.loads(read_small(path, _LARGEST_CONFIG))
        except (OSError, ValueError, RecursionError):
            continue  # no config that says anything
        for key, value in content.items() if isinstance(content, dict) else ():
            gone = [n for n in _listed(value) if type(n) is int and n >= 0 and n not in tokens.ids]
            if key.endswith(_TOKEN_IDS) and gone:
                yield f"{path.name} says {key}: {value}"


def with_layers(
    content: Any, stacks: Mapping[str, Stack], prefix: str = "", way: tuple[str, ...] = ()
) -> Any:
    """A config that counts the layers which there are now, and has what it says of each of them.

    Args:
        content: the config, or a part of it such as `text_config`.
        stacks: see `adapt_configs`.
        prefix: of the part of the model that it describes.
        way: the keys that lead to this part of it.
    """
    if not isinstance(content, dict) or not stacks:
        return content
    adapted = {
        key: with_layers(value, stacks, prefix, (*way, key)) for key, value in content.items()
    }
    for key, count in content.items():
        if key not in _LAYER_COUNTS or type(count) is not int:
            continue
        stack = _counted_by(stacks, prefix, (*way, key), count)
        if stack is None:
            continue
        adapted[key] = len(stack.layers)
        for name, value in content.items():  # such as layer_types
            if isinstance(value, list) and len(value) == count:
                adapted[name] = [
                    _of_layer(source, prefix, (*way, name), number, value)
                    for source, number in stack.layers
                ]
    return adapted


def _counted_by(
    stacks: Mapping[str, Stack], prefix: str, way: Sequence[str], count: int
) -> Stack | None:
    """The layers that a key of a config counts; None if none are, or nobody can tell which."""
    found = {
        name: stack for name, stack in stacks.items()
        if name.startswith(prefix) and "/" not in name[len(prefix) :] and stack.before == count
    }  # fmt: skip
    said = [word for key in way for word in key.split("_") if word in _KINDS_OF_LAYERS]
    named = {n: s for n, s in found.items() if any(word in n.lower() for word in said)}
    left = list((named or found).values())
    return left[0] if left and all(stack == left[0] for stack in left) else None


def _of_layer(
    source: Path | None, prefix: str, way: Sequence[str], number: int, own: Sequence[Any]
) -> Any:
    """What the config of the model that a layer comes from says of it, or else the first model's.

    Raises:
        ValueError: neither says anything.
    """
    try:
        content = json.loads(
            read_small((source or Path()) / prefix / "config.json", _LARGEST_CONFIG)
        )
        for key in way:
            content = content[key]
        return content[number]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        if number >= len(own):
            raise ValueError(f"nothing says what layer {number} is") from None
        return own[number]


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
    folder: Path, before: Sequence[str], after: Sequence[str], stacks: Mapping[str, Stack]
) -> Iterator[tuple[str, list[str]]]:
    """Layers that a model folder's config counts, and that tensors are no more there for.

    Args:
        folder: with the config.
        before: tensor names of the model that the config describes.
        after: those that are left.
        stacks: the layers whose count is put right, see `adapt_configs`.

    Yields:
        what the config says, and the numbered layers that are gone.
    """
    try:
        content = json.loads(read_small(folder / "config.json", _LARGEST_CONFIG))
        counts, right = (dict(_counts(c)) for c in (content, with_layers(content, stacks)))
    except (OSError, ValueError, RecursionError):
        return  # no config that counts anything
    there, were = _numbered(after), _numbered(before)
    corrected = {right[way] for way, count in counts.items() if right[way] != count}
    for (*_, key), count in counts.items():
        homes = [h for h, numbers in were.items() if len(numbers) == count == max(numbers) + 1]
        homes = [h for h in homes if h not in stacks or len(stacks[h].layers) not in corrected]
        gone = [f"{h}.{n}" for h in homes for n in sorted(were[h] - there.get(h, set()))]
        if gone:
            yield f"config.json says {key}: {count}", gone


def _counts(content: Any, *way: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """How many layers a config and its parts say that there are, by the keys that lead there."""
    for key, value in content.items() if isinstance(content, dict) else ():
        if key in _LAYER_COUNTS and isinstance(value, int):
            yield (*way, key), value
        yield from _counts(value, *way, key)


def _numbered(names: Sequence[str]) -> dict[str, set[int]]:
    """`a.layers` → {0, 1}, of names such as `a.layers.0.weight`."""
    found: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for place, part in enumerate(parts[1:], 1):
            if part.isascii() and part.isdigit() and len(part) < 6:
                found.setdefault(".".join(parts[:place]), set()).add(int(part))
    return found
