"""An adapter, written with the names that its readers know: PEFT's, kohya's or diffusers'."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import NonfiniteError, OutputError
from .adapters import CONFIG, WEIGHTS, Naming
from .checkpoint import SUFFIX, StrPath
from .dtypes import has_nonfinite, narrow, numpy_dtype
from .low_rank import PEFT_PREFIX
from .placing import check_apart, check_free, check_place
from .writer import CheckpointWriter, OutputTensor, layout

_ENDS = {"peft": ("lora_B", "lora_A"), "kohya": ("lora_up", "lora_down"),
         "diffusers": ("lora_B", "lora_A")}  # fmt: skip


class Module(NamedTuple):
    """A module with factors, as it is written.

    Attributes:
        name: as adapters call it.
        up, down: shapes of the factors.
        dtype: of the factors.
        scale: of their product.
        is_embedding: whether it is an embedding's.
    """

    name: str
    up: tuple[int, ...]
    down: tuple[int, ...]
    dtype: str
    scale: float = 1.0
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        """How many columns `up` has."""
        return self.up[1]

    @property
    def alpha(self) -> float:
        """What over the rank is the scale."""
        return self.scale * self.rank


def tensors_of(module: Module, naming: Naming) -> list[OutputTensor]:
    """What is written of a module: up, down, and alpha where that has a tensor."""
    ends: tuple[str, ...] = tuple(f"{end}.weight" for end in _ENDS[naming])
    if module.is_embedding:
        ends = ("lora_embedding_B", "lora_embedding_A")
    home = prefixed(module.name, naming)
    tensors = [
        OutputTensor(f"{home}.{end}", module.dtype, shape)
        for end, shape in zip(ends, (module.up, module.down), strict=True)
    ]
    return [*tensors, *([OutputTensor(f"{home}.alpha", "F32", ())] if naming == "kohya" else [])]


def prefixed(name: str, naming: Naming) -> str:
    """A name as it stands in a file."""
    return f"{PEFT_PREFIX}{name}" if naming == "peft" else name


class Written:
    """An adapter that is being written.

    Args:
        writer: of the file.
        naming: whose names it has.
        places: where each tensor begins.
        file: the file's name.
    """

    def __init__(
        self, writer: CheckpointWriter, naming: Naming, places: Mapping[str, int], file: str
    ) -> None:
        self._writer = writer
        self._naming = naming
        self._places = places
        self._file = file

    def put(self, tensor: OutputTensor, values: np.ndarray) -> np.ndarray:
        """Round values to a tensor's dtype, once, and write them.

        Returns:
            what was written.

        Raises:
            NonfiniteError: NaN or infinity is among it.
        """
        stored = np.empty(tensor.shape, numpy_dtype(tensor.dtype))
        if values.dtype == stored.dtype:
            stored[...] = values.reshape(tensor.shape)
        else:
            narrow(values.reshape(tensor.shape), stored)
        if stored.dtype.kind not in "iub" and has_nonfinite(stored.reshape(-1), tensor.dtype):
            raise NonfiniteError(
                f"NaN or infinity in {tensor.name}: in a factor, or in what was made of it as "
                f"{tensor.dtype}"
            )
        data = stored.reshape(-1).view(np.uint8).data
        self._writer.write(self._file, data, self._places[tensor.name])
        return stored

    def factors(self, module: Module, up: np.ndarray, down: np.ndarray) -> list[np.ndarray]:
        """Write a module's factors, and the alpha that goes with them.

        Returns:
            what was written of them, as float32 matrices.
        """
        tensors = tensors_of(module, self._naming)
        if len(tensors) > 2:
            self.put(tensors[2], np.array(module.alpha))
        stored = [
            self.put(tensor, values)
            for tensor, values in zip(tensors, (up, down), strict=False)
        ]  # fmt: skip
        return [one.astype(np.float32).reshape(len(one), -1) for one in stored]

    def config(self, content: Mapping[str, Any]) -> None:
        """Write PEFT's config."""
        text = json.dumps(content, indent=2, ensure_ascii=False)
        self._writer.path(CONFIG).write_text(f"{text}\n", "utf-8")


def config_of(modules: Sequence[Module], **others: Any) -> dict[str, Any]:
    """PEFT's config of some modules, with what else it is to say."""
    ranks = Counter(module.rank for module in modules)
    alphas = Counter(module.alpha for module in modules)
    rank = ranks.most_common(1)[0][0] if ranks else 8
    alpha = alphas.most_common(1)[0][0] if alphas else 8
    # A name's end is enough for PEFT, and the first that fits decides: longer ones come first.
    by_length = sorted(modules, key=lambda module: -len(module.name))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        **others,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {m.name: m.rank for m in by_length if m.rank != rank},
        "alpha_pattern": {m.name: _plain(m.alpha) for m in by_length if m.alpha != alpha},
        "target_modules": sorted(module.name for module in modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


@contextmanager
def writing(
    output: StrPath, naming: Naming, tensors: Sequence[OutputTensor], metadata: Mapping[str, str],
    *, read: Sequence[Path], force: bool, fsync: bool,
) -> Iterator[Written]:  # fmt: skip
    """Write an adapter, which takes its place when the block ends, all of it or nothing.

    Args:
        output: a folder for PEFT's, a `.safetensors` file for others.
        naming: whose names it has.
        tensors: all that is written.
        metadata: of the file.
        read: what it must not replace.
        force: replace an existing output.
        fsync: flush to the disk before.

    Raises:
        OutputError: it cannot be written there.
    """
    output = Path(output)
    if (output.suffix == SUFFIX) == (naming == "peft"):
        wanted = "a folder" if naming == "peft" else f"one file, whose name ends in {SUFFIX}"
        raise OutputError(f"the output {output} is an adapter with {naming}'s names: name {wanted}")
    check_place(output)
    check_apart(output, read)
    check_free(output, force=force)
    files = layout(tensors, file_name=WEIGHTS if naming == "peft" else output.name, shard_size=None)
    places, offset = {}, 0
    for tensor in files[0].tensors:
        places[tensor.name] = offset
        offset += tensor.nbytes
    with CheckpointWriter(output, files, metadata, force=force, fsync=fsync) as writer:
        yield Written(writer, naming, places, files[0].name)
        writer.commit()
