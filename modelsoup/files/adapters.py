"""Low-rank adapters: what a file of factors says, by the names of PEFT, kohya and diffusers.

An adapter adds `scale · up · down` to a weight. What scale is, and which weight, is told by names
and by a config, which three families of tools have in three ways; here they become one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import CheckpointError, MismatchError, counted, listed, nearest, said
from .checkpoint import SUFFIX, Checkpoint, StrPath, TensorInfo, open_checkpoint
from .dtypes import DTYPES
from .low_rank import KINDS, PEFT_PREFIX, Role, role_of
from .reading import FileState, open_regular, read_small, state_of

CONFIG = "adapter_config.json"
WEIGHTS = f"adapter_model{SUFFIX}"
_LARGEST_CONFIG = 10_000_000
_OF_DIFFUSERS = "lora_adapter_metadata"  # the configs of its parts, in the file's metadata

Naming = Literal["peft", "kohya", "diffusers"]
# Settings of PEFT by which the product of the factors is not what is added to the base's weights.
_OTHERWISE = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication",
    "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora",
    "use_qalora",
)  # fmt: skip
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PLAIN_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")
# What kohya begins modules of a part with, and where that part is: a folder, or what a single file
# begins its names with.
_PARTS_OF_KOHYA = (
    ("lora_te1_", ("text_encoder/", "conditioner.embedders.0.", "cond_stage_model.")),
    ("lora_te2_", ("text_encoder_2/", "conditioner.embedders.1.")),
    ("lora_te3_", ("text_encoder_3/",)),
    ("lora_te_", ("text_encoder/", "cond_stage_model.", "conditioner.embedders.0.")),
    ("lora_unet_", ("unet/", "transformer/", "model.diffusion_model.")),
    ("lora_transformer_", ("transformer/",)),
    ("lycoris_", ()),
    ("lora_", ()),
)  # fmt: skip
# A first word that a model may have in its names or not, by which class it was saved.
_HEADS = ("model", "transformer", "module", "unet", "diffusion_model", "base_model", "text_encoder",
          "text_encoder_2", "text_encoder_3", "prior")  # fmt: skip


class Update(NamedTuple):
    """What is added to one module's weight: `scale · up · down`.

    Attributes:
        module: the module, as the adapter calls it.
        up, down: the factors, m × r and r × n; of a convolution m × r × 1 × 1 and r × c × h × w; of
            an embedding d × r and r × words, of which the product is added transposed.
        mid: of a convolution with three factors, what is between them: r × r × h × w.
        scale: alpha over the rank, or over its root.
        magnitude: DoRA's: the lengths that the rows of the new weight are given.
        is_embedding: whether it is an embedding's.
        is_transposed: whether the weight is stored with inputs first.
    """

    module: str
    up: TensorInfo
    down: TensorInfo
    mid: TensorInfo | None
    scale: float
    magnitude: TensorInfo | None
    is_embedding: bool = False
    is_transposed: bool = False

    @property
    def rank(self) -> int:
        """How many columns `up` has."""
        return self.up.shape[1]

    @property
    def rows(self) -> int:
        """How many rows the product has, as the factors stand."""
        return self.up.shape[0]

    @property
    def columns(self) -> int:
        """How many columns the product has, as the factors stand."""
        inner = math.prod(self.down.shape[1:])
        return inner if self.mid is None else inner * math.prod(self.mid.shape[2:])


class Added(NamedTuple):
    """A tensor that is added as it is: `scale` times what is stored."""

    info: TensorInfo
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter, opened.

    Attributes:
        checkpoint: its files: the factors, and PEFT's config, by which they are scaled.
        naming: whose names it has.
        updates: module → what is added to its weight.
        added: tensor → what else is added, such as biases.
        whole: tensor → what stands in its place, such as a new head.
        config: PEFT's, if there is one.
    """

    checkpoint: Checkpoint
    naming: Naming
    updates: Mapping[str, Update]
    added: Mapping[str, Added]
    whole: Mapping[str, TensorInfo]
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """What was opened."""
        return self.checkpoint.path


def open_adapter(path: StrPath) -> Adapter:
    """Open an adapter, reading headers, its config, and what scales it.

    Args:
        path: a folder as PEFT writes it, or a file of factors.

    Raises:
        CheckpointError: missing, damaged, no adapter, or of a kind that is no sum of a base and
            products of two factors.
    """
    path = Path(path)
    inside = path / WEIGHTS
    checkpoint = open_checkpoint(inside if inside.is_file() else path)
    is_peft = checkpoint.files[0].name == WEIGHTS
    folder = path if path.is_dir() else path.parent
    config, states = _config(folder) if is_peft else ({}, {})
    if states:  # the config is as much of the adapter as the factors, whichever was named
        path = folder
    if path.is_dir() and not checkpoint.is_folder:  # other adapters may lie in folders within
        checkpoint = Checkpoint(
            path, (*checkpoint.files, *states), checkpoint.tensors, checkpoint.metadata,
            is_folder=True, parts=checkpoint.parts, states={**checkpoint.states, **states},
        )  # fmt: skip
    _must_be_known(checkpoint, config)
    found: dict[Role, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        role, module = role_of(name)
        if ".original_module." in name:  # PEFT's copy of what it replaces
            continue
        known = found.setdefault(role, {})
        if module in known:
            raise CheckpointError(
                f"{path} holds two adapters of {module!r}, {known[module].name} and {name}"
            )
        known[module] = info
    return _adapter(checkpoint, config, found)


def _config(folder: Path) -> tuple[dict[str, Any], dict[Path, FileState]]:
    """PEFT's config, and its file with the state that it was read in; empty where there is none.

    Raises:
        CheckpointError: it is none.
    """
    file = folder / CONFIG
    try:
        with open(open_regular(file), "rb") as opened:
            state = state_of(opened.fileno())
        content = json.loads(read_small(file, _LARGEST_CONFIG))
    except FileNotFoundError:
        return {}, {}
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is {said(content)}, not a config")
    kind = content.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(
            f"{file} is of the kind {said(kind)}, which is no product of two factors: only LORA is "
            f"merged"
        )
    for key in _OTHERWISE:
        if content.get(key):
            raise CheckpointError(
                f"{file} has {key}, by which an adapter is more than products that are added to "
                f"weights: it cannot be merged"
            )
    begun = content.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(_CHANGES_THE_BASE):
        raise CheckpointError(
            f"{file} has init_lora_weights {said(begun)}, which took the factors' beginning out of "
            f"the base: convert it with PEFT's path_initial_model_for_weight_conversion first"
        )
    return content, {file: state}


def _must_be_known(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    path = checkpoint.path
    for kind, pattern in KINDS:
        of_kind = [name for name in checkpoint if pattern.fullmatch(name)]
        if of_kind:
            raise CheckpointError(
                f"{path} is of the kind {kind} ({listed(of_kind, 1)}), which is not "
                f"known to be a product of two factors: it cannot be merged"
            )
    is_peft = any(name.startswith(PEFT_PREFIX) for name in checkpoint)
    if is_peft and not config:
        raise CheckpointError(
            f"{path} has PEFT's names, but there is no {CONFIG} beside it, which says "
            f"how the products are scaled"
        )


def _adapter(
    checkpoint: Checkpoint, config: Mapping[str, Any],
    found: Mapping[Role, Mapping[str, TensorInfo]],
) -> Adapter:  # fmt: skip
    path, naming = checkpoint.path, _naming(checkpoint, found)
    scales = _Scales(checkpoint, config, found.get("alpha", {}))
    magnitudes, mids = found.get("magnitude", {}), found.get("mid", {})
    updates: dict[str, Update] = {}
    for kind in ("", "embedding "):
        ups: Mapping[str, TensorInfo] = found.get(f"{kind}up", {})  # type: ignore[call-overload]
        downs: Mapping[str, TensorInfo] = found.get(f"{kind}down", {})  # type: ignore[call-overload]
        for module in dict.fromkeys((*downs, *ups)):
            if module not in ups or module not in downs:
                there = (ups.get(module) or downs[module]).name
                raise CheckpointError(f"{path} has {there!r} without the factor that goes with it")
            up, down, mid = ups[module], downs[module], mids.get(module)
            _must_fit(path, up, down, mid)
            updates[module] = Update(
                module, up, down, mid, scales.of(module, up.shape[1]), magnitudes.get(module),
                is_embedding=bool(kind),
                is_transposed=bool(kind) or bool(config.get("fan_in_fan_out")),
            )  # fmt: skip
    _must_not_be_left(path, updates, found)
    added = {f"{m}.weight": Added(info, 1.0) for m, info in found.get("added", {}).items()}
    added |= {f"{m}.bias": Added(info, 1.0) for m, info in found.get("added bias", {}).items()}
    added |= {
        f"{m}.bias": Added(info, updates[m].scale)
        for m, info in found.get("bias", {}).items() if m in updates
    }  # fmt: skip
    # With an embedding PEFT saves the weights that it was added to, which are the base's own.
    whole = {
        name: info for name, info in found.get("whole", {}).items()
        if name.removesuffix(".weight") not in updates
    }  # fmt: skip
    if not updates and not added:
        raise CheckpointError(
            f"{path} holds no low-rank adapter: of its {counted(len(checkpoint), 'tensor')} none "
            f"is called as factors are, such as q_proj.lora_A.weight or to_q.lora_up.weight"
        )
    return Adapter(checkpoint, naming, updates, added, whole, config)


def _naming(checkpoint: Checkpoint, found: Mapping[Role, Mapping[str, TensorInfo]]) -> Naming:
    if any(name.startswith(PEFT_PREFIX) for name in checkpoint):
        return "peft"
    modules = [*found.get("up", {}), *found.get("added", {})]
    is_kohya = modules and all(module.startswith(("lora_", "lycoris_")) for module in modules)
    return "kohya" if is_kohya else "diffusers"


def _must_fit(path: Path, up: TensorInfo, down: TensorInfo, mid: TensorInfo | None) -> None:
    """Whether two factors can be multiplied to something, by way of a third if there is one."""
    between = () if mid is None else (mid,)
    for info in (up, down, *between):
        if DTYPES[info.dtype].kind != "float":
            raise CheckpointError(f"{path}: the factor {info.name!r} has the dtype {info.dtype}")
    one = all(length == 1 for length in up.shape[2:])
    fits = len(up.shape) >= 2 and len(down.shape) >= 2 and one and up.elements and down.elements
    if mid is None:
        fits = fits and up.shape[1] == down.shape[0]
    else:
        ones = all(length == 1 for length in down.shape[2:])
        fits = fits and ones and len(mid.shape) >= 2
        fits = fits and mid.shape[:2] == (up.shape[1], down.shape[0])
    if not fits:
        shapes = " and ".join(f"{i.name} {list(i.shape)}" for i in (up, *between, down))
        raise CheckpointError(f"{path}: factors that cannot be multiplied: {shapes}")


def _must_not_be_left(
    path: Path, updates: Mapping[str, Update], found: Mapping[Role, Mapping[str, TensorInfo]]
) -> None:
    """Whether everything that goes with factors has some."""
    roles: tuple[Role, ...] = ("mid", "magnitude", "bias")
    for role in roles:
        for module, info in found.get(role, {}).items():
            if module not in updates:
                raise CheckpointError(f"{path} has {info.name!r}, but no factors of {module!r}")


class _Scales:
    """How the products of an adapter are scaled."""

    def __init__(
        self, checkpoint: Checkpoint, config: Mapping[str, Any], alphas: Mapping[str, TensorInfo]
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.alphas = alphas
        self.of_parts = _configs_of_parts(checkpoint)

    def of(self, module: str, rank: int) -> float:
        """Alpha over the rank, or its root; where nothing is said, alpha is the rank."""
        if module in self.alphas:
            stored = self.checkpoint[self.alphas[module].name].astype(np.float64)
            if stored.size == 1 and np.isfinite(stored).all():
                return stored.item() / rank
            raise CheckpointError(
                f"{self.checkpoint.path}: {self.alphas[module].name!r} is no finite number"
            )
        config, inside = self.config, module
        if not config and self.of_parts:
            part, _, inside = module.partition(".")
            config = self.of_parts.get(part, {})
        if not config:
            return 1.0
        alpha = self._alpha(config, inside)
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _alpha(self, config: Mapping[str, Any], module: str) -> float:
        patterns = config.get("alpha_pattern") or {}
        alpha = config.get("lora_alpha", 8)
        for pattern in patterns if isinstance(patterns, Mapping) else ():
            if not _PLAIN_PATTERN.fullmatch(pattern):
                raise CheckpointError(
                    f"{self.checkpoint.path}: alpha_pattern has the regular expression {pattern!r}:"
                    f" only names of modules, or their ends, are read there"
                )
            end = pattern.replace("\\", "").strip("^$")
            if module == end or module.endswith(f".{end}"):
                alpha = patterns[pattern]
                break
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not math.isfinite(alpha):
            raise CheckpointError(f"{self.checkpoint.path}: alpha is {said(alpha)}, not a number")
        return float(alpha)


def _configs_of_parts(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """What diffusers keeps of PEFT's config in a file's metadata, for each part of a pipeline."""
    try:
        content = json.loads(checkpoint.metadata.get(_OF_DIFFUSERS, "{}"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{checkpoint.path}: {_OF_DIFFUSERS} in its metadata is not JSON")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        part, _, name = key.partition(".")
        configs.setdefault(part, {})[name] = value
    return configs


Change = Update | Added | TensorInfo
"""What is done to a tensor: a product is added, a tensor is added, or it is replaced."""


def _fitted(adapter: Adapter, change: Change, own: TensorInfo) -> Change:
    """A change, with a product turned as the tensor is stored, if it fits the tensor's shape."""
    shape = own.shape
    if isinstance(change, Update):
        turned = change.is_transposed and shape == (change.columns, change.rows)
        straight = not change.is_embedding and len(shape) > 1
        if turned or (
            straight and (shape[0], math.prod(shape[1:])) == (change.rows, change.columns)
        ):
            _must_be_of_outputs(adapter, change)
            return change._replace(is_transposed=turned)
        made = [change.rows, change.columns]
        made = made[::-1] if change.is_embedding else made
    else:
        info = change.info if isinstance(change, Added) else change
        if info.shape == shape:
            return change
        made = list(info.shape)
    raise MismatchError(
        f"{adapter.path} is for another base: what it has for {own.name!r} is {made}, and the "
        f"base's is {list(shape)}"
    )


def _must_be_of_outputs(adapter: Adapter, update: Update) -> None:
    """Whether DoRA's magnitudes are those of a weight's outputs, as they are everywhere else."""
    info = update.magnitude
    if info is None:
        return
    of_inputs = adapter.naming == "kohya" and len(info.shape) > 1 and info.shape[0] == 1
    if info.elements != update.rows or (of_inputs and update.rows > 1):
        raise MismatchError(
            f"{adapter.path} has the magnitudes {info.name!r} of the shape {list(info.shape)}, "
            f"which are not one for each of {update.rows} outputs: they cannot be folded"
        )


def factors(
    adapter: Adapter, update: Update, dtype: np.dtype[Any] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The two factors of an update as matrices, the scale not in them.

    Args:
        adapter: whose update it is.
        update: one of its updates.
        dtype: of the arithmetic; None is float64 if a factor is, else float32.

    Returns:
        up, m × r, and down, r × n, with the inputs of a convolution flattened.
    """
    infos = (update.up, update.down, *(() if update.mid is None else (update.mid,)))
    wanted = dtype or np.dtype("float64" if "F64" in [i.dtype for i in infos] else "float32")
    return as_matrices(*(adapter.checkpoint[info.name].astype(wanted) for info in infos))


def as_matrices(
    up: np.ndarray, down: np.ndarray, mid: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Two factors as matrices, or three (Tucker's decomposition of a convolution) as two.

    Of three, Δ[o, c, h, w] is Σ up[o, i] · mid[i, j, h, w] · down[j, c].
    """
    up = up.reshape(up.shape[0], up.shape[1])
    if mid is not None:
        inner = down.reshape(down.shape[0], down.shape[1])
        down = np.moveaxis(np.tensordot(mid, inner, ((1,), (0,))), -1, 1)
    return up, down.reshape(down.shape[0], -1)


def stored_factors(
    adapter: Adapter, update: Update, dtype: np.dtype[Any] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As `factors`, for the weight as it is stored: turned round where its inputs come first."""
    up, down = factors(adapter, update, dtype)
    return (down.T, up.T) if update.is_transposed else (up, down)


class Base:
    """The tensors of a base checkpoint, found by what adapters call them.

    Args:
        tensors: the base's.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self.names = tensors
        self._by_end: dict[str, list[str]] = {}
        self._flat: dict[str, list[str]] | None = None
        for name in self.names:
            pieces = re.split(r"(?<=[./])", name)
            for start in range(len(pieces)):
                self._by_end.setdefault("".join(pieces[start:]), []).append(name)

    def changes(self, adapter: Adapter) -> dict[str, Change]:
        """What an adapter changes: name of a tensor of the base → how.

        Raises:
            MismatchError: the base has no such tensor, or one of another shape.
        """
        found: dict[str, Change] = {}
        changes: list[tuple[str, Change]] = [
            *((f"{module}.weight", update) for module, update in adapter.updates.items()),
            *adapter.added.items(), *adapter.whole.items(),
        ]  # fmt: skip
        for name, change in changes:
            own = self.tensor(adapter, name)
            if own in found:
                raise MismatchError(f"{adapter.path} changes {own!r} of the base twice")
            found[own] = _fitted(adapter, change, self.names[own])
        return found

    def tensor(self, adapter: Adapter, name: str) -> str:
        """What the base calls a tensor that an adapter is for, such as `MODULE.weight`.

        Raises:
            MismatchError: there is none, or there are several that it may be.
        """
        if adapter.naming == "kohya":
            module, _, last = name.rpartition(".")
            found = self._of_kohya(module, last)
        else:
            found = self._of_dots(name)
        if len(found) == 1:
            return found[0]
        module = name.rpartition(".")[0]
        where = f"{adapter.path} is for {module!r}"
        if found:
            raise MismatchError(f"{where}, which may be any of {listed(found)} of the base")
        raise MismatchError(f"{where}, which the base does not have{self._hint(adapter, module)}")

    def _of_dots(self, name: str) -> list[str]:
        first, _, rest = name.partition(".")
        in_part = f"{first}/{rest}"
        for exact in (name, in_part):
            if exact in self.names:
                return [exact]
        if found := self._by_end.get(name):
            return found
        return [rest] if first in _HEADS and rest in self.names else []

    def _of_kohya(self, module: str, last: str) -> list[str]:
        """By names in which every dot has become an underscore."""
        if self._flat is None:
            self._flat = {}
            for end, names in self._by_end.items():
                self._flat.setdefault(_flat(end), []).extend(names)
        prefix, parts = next(
            ((p, parts) for p, parts in _PARTS_OF_KOHYA if module.startswith(p)), ("", ())
        )
        found = list(dict.fromkeys(self._flat.get(_flat(f"{module[len(prefix) :]}.{last}"), ())))
        there = [name for name in found if name.startswith(parts)] if parts else []
        return there or found

    def _hint(self, adapter: Adapter, module: str) -> str:
        """The modules that are called nearly so; where underscores stand for dots, the same way."""
        written = _flat if adapter.naming == "kohya" else str
        modules = {written(home): home for name in self.names if (home := name.rpartition(".")[0])}
        close = nearest(written(module), modules)
        return re.sub(r"'([^']*)'", lambda match: repr(modules.get(match[1], match[1])), close)


def _flat(name: str) -> str:
    return name.replace(".", "_").replace("/", "_")
