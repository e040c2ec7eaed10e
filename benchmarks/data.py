"""Checkpoints to measure with, and a check that a merge of two of them is right.

python benchmarks/data.py make DIR llama --members 0 1 2      prints the paths, as JSON
python benchmarks/data.py check MERGED A B                    exits 1 unless MERGED is (A + B) / 2

`merge.py` runs both in processes of their own: Linux counts what a parent held when it started
a child into the child's peak memory, so the process that measures must not load numpy.
The files are written by hand, slice by slice, so that nothing here holds a whole model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

SEED = 20240229
SLICE = 1 << 22  # elements generated, or compared, at a time
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "I64": np.dtype(np.int64),
}

Layout = dict[str, tuple[str, tuple[int, ...]]]  # tensor name -> dtype as in the header, shape

HIDDEN, MLP, LAYERS, VOCABULARY = 2048, 7168, 16, 32000


def llama_shape(scale: float) -> tuple[int, int]:
    """Layers and vocabulary; both grow, so that scale 2 is twice the bytes of scale 1."""
    return max(1, round(LAYERS * scale)), max(1, round(VOCABULARY * scale))


def llama(scale: float) -> Layout:
    """A decoder in bfloat16; scale 1 is 147 tensors and 2.21 GB."""
    layers, vocabulary = llama_shape(scale)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        "lm_head.weight": (vocabulary, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}.self_attn.{projection}.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (MLP, HIDDEN)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (MLP, HIDDEN)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, MLP)
        shapes[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN,)
    return {name: ("BF16", shape) for name, shape in shapes.items()}


def llama_config(scale: float) -> str:
    """The least that LLM tools want beside the weights in order to know the architecture."""
    layers, vocabulary = llama_shape(scale)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return json.dumps(config, indent=2)


def gan(scale: float) -> Layout:
    """The four nets of CycleGAN in float32, with batch norm; scale 1 is 453 MB.

    ResNet-9 generators are twice as wide and the discriminators two layers deeper than in the
    paper, to make it long enough to time.
    """
    width, layout = max(4, round(128 * scale)), Layout()

    def convolution(name: str, shape: tuple[int, ...], bias: int = 0) -> None:
        layout[f"{name}.weight"] = ("F32", shape)
        if bias:
            layout[f"{name}.bias"] = ("F32", (bias,))

    def norm(name: str, channels: int) -> None:
        for statistic in ("weight", "bias", "running_mean", "running_var"):
            layout[f"{name}.{statistic}"] = ("F32", (channels,))
        layout[f"{name}.num_batches_tracked"] = ("I64", ())

    for domain in "AB":
        net = f"G_{domain}.model"
        convolution(f"{net}.1", (width, 3, 7, 7))
        norm(f"{net}.2", width)
        for index, channels in ((4, width), (7, 2 * width)):
            convolution(f"{net}.{index}", (2 * channels, channels, 3, 3))
            norm(f"{net}.{index + 1}", 2 * channels)
        for block in range(10, 19):
            for index in (1, 5):
                part = f"{net}.{block}.conv_block"
                convolution(f"{part}.{index}", (4 * width, 4 * width, 3, 3))
                norm(f"{part}.{index + 1}", 4 * width)
        for index, channels in ((19, 4 * width), (22, 2 * width)):
            convolution(f"{net}.{index}", (channels, channels // 2, 3, 3))
            norm(f"{net}.{index + 1}", channels // 2)
        convolution(f"{net}.26", (3, width, 7, 7), bias=3)

        net, widths = f"D_{domain}.model", [width // 2 * n for n in (1, 2, 4, 8, 8, 8)]
        convolution(f"{net}.0", (widths[0], 3, 4, 4), bias=widths[0])
        for step, (before, after) in enumerate(pairwise(widths)):
            convolution(f"{net}.{2 + 3 * step}", (after, before, 4, 4))
            norm(f"{net}.{3 + 3 * step}", after)
        convolution(f"{net}.{3 * len(widths) - 1}", (1, widths[-1], 4, 4), bias=1)
    return layout


def many(scale: float) -> Layout:
    """100,000 tensors of next to nothing: the work is all in the names."""
    return {
        f"blocks.{index:06d}.weight": ("F32", (4, 4)) for index in range(round(100_000 * scale))
    }


def lora(scale: float) -> Layout:
    """A low-rank adapter of every matrix in the layers of `llama`, of rank 16."""
    adapter: Layout = {}
    for name, (dtype, shape) in llama(scale).items():
        if ".layers." in name and len(shape) == 2:
            module = name.removesuffix(".weight")
            adapter[f"{module}.lora_A.weight"] = (dtype, (16, shape[1]))
            adapter[f"{module}.lora_B.weight"] = (dtype, (shape[0], 16))
    return adapter


def single(scale: float) -> Layout:
    """One tensor of 2.1 GB: no memory that grows with the largest tensor goes unseen."""
    return {"weight": ("BF16", (round(32768 * scale), 32768))}


LAYOUTS: dict[str, Callable[[float], Layout]] = {
    "llama": llama,
    "lora": lora,
    "gan": gan,
    "many": many,
    "single": single,
}


def header(layout: Layout) -> tuple[list[str], bytes]:
    """Tensor names in file order, and everything that comes before the data."""
    # The reference library puts wider dtypes first, then goes by name.
    names = sorted(layout, key=lambda name: (-DTYPES[layout[name][0]].itemsize, name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = layout[name]
        start, end = end, end + DTYPES[dtype].itemsize * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return names, len(text).to_bytes(8, "little") + text


def slices(count: int) -> Iterator[tuple[int, int]]:
    """Start and length of each slice of `count` elements."""
    for start in range(0, count, SLICE):
        yield start, min(SLICE, count - start)


def write(layout: Layout, members: dict[int, Path]) -> None:
    """Write members of one family: 0 is the base, the others are the base plus small noise.

    Each member has random numbers of its own, so its bytes do not depend on who is made with it.
    """
    names, head = header(layout)
    base_stream = np.random.default_rng([SEED, 0])
    streams = {member: np.random.default_rng([SEED, member]) for member in members if member}
    with ExitStack() as stack:
        partial = {member: path.with_suffix(".partial") for member, path in members.items()}
        files = {member: stack.enter_context(path.open("wb")) for member, path in partial.items()}
        for file in files.values():
            file.write(head)
        for name in names:
            dtype, shape = layout[name]
            for _, length in slices(math.prod(shape)):
                # Counters of batches are the same in all: some tools refuse to merge others.
                base = (
                    np.full(length, 1000)
                    if dtype == "I64"
                    else 0.02 * base_stream.standard_normal(length, np.float32)
                )
                for member, file in files.items():
                    values = base
                    if member and dtype != "I64":
                        noise = streams[member].standard_normal(length, np.float32)
                        values = base + 0.002 * noise
                    file.write(values.astype(DTYPES[dtype]).tobytes())
    for member, path in partial.items():
        path.rename(members[member])


def make(directory: Path, kind: str, members: Sequence[int], scale: float) -> list[Path]:
    """The members of a family as files under `directory`; only the missing ones are written."""
    layout = LAYOUTS[kind](scale)
    names, head = header(layout)
    size = len(head) + sum(
        DTYPES[layout[name][0]].itemsize * math.prod(layout[name][1]) for name in names
    )
    folder = directory / f"{kind}-{scale:g}"
    if kind == "llama":
        folders = {member: folder / (f"ft{member}" if member else "base") for member in members}
        paths = {member: folder / "model.safetensors" for member, folder in folders.items()}
    else:
        paths = {member: folder / f"{kind}_{'abc'[member]}.safetensors" for member in members}

    missing = {
        member: path
        for member, path in paths.items()
        if not path.exists() or path.stat().st_size != size
    }
    if missing:
        for path in missing.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        needed, free = size * len(missing), shutil.disk_usage(folder).free
        if needed > free:
            sys.exit(
                f"{folder}: {needed / 1e9:.1f} GB of data are to be made, "
                f"but the disk has {free / 1e9:.1f} GB free"
            )
        write(layout, missing)
    if kind == "llama":
        for path in paths.values():
            path.with_name("config.json").write_text(llama_config(scale))
    return list(paths.values())


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Entries by tensor name, and where the data begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries, 8 + length


def read(path: Path, entry: dict[str, Any], data: int, start: int, length: int) -> NDArray[Any]:
    """`length` elements of one tensor from element `start` on."""
    dtype = DTYPES[entry["dtype"]]
    offset = data + entry["data_offsets"][0] + start * dtype.itemsize
    return np.fromfile(path, dtype, length, offset=offset)


def check(merged: Path, a: Path, b: Path, tensors: int = 8) -> str | None:
    """What is wrong with `merged` as 0.5 a + 0.5 b, looking at `tensors` tensors; None if right.

    For two inputs and halves, the sum in float32 rounded once to the stored dtype is the exact
    sum rounded to nearest even, so every bit must agree.
    """
    files = [(path, *read_header(path)) for path in (merged, a, b)]
    expected_names = set(files[1][1])
    if set(files[0][1]) != expected_names:
        return f"{merged}: its tensors are not those of the inputs"
    names = sorted(expected_names)
    for name in names[:: max(1, len(names) // tensors)]:
        for start, length in slices(math.prod(files[1][1][name]["shape"])):
            got, x, y = (
                read(path, entries[name], data, start, length) for path, entries, data in files
            )
            expected = x
            if x.dtype != np.int64:
                total = x.astype(np.float32) * np.float32(0.5)
                total += y.astype(np.float32) * np.float32(0.5)
                expected = total.astype(x.dtype)
            if got.tobytes() != expected.tobytes():
                return f"{merged}: {name} is not 0.5 a + 0.5 b rounded to nearest even"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("directory", type=Path)
    making.add_argument("kind", choices=LAYOUTS)
    making.add_argument("--members", type=int, nargs="+", choices=range(3), default=[0, 1, 2])
    making.add_argument("--scale", type=float, default=1)
    checking = commands.add_parser("check")
    checking.add_argument("files", type=Path, nargs=3, metavar="FILE")
    options = parser.parse_args()
    if options.command == "make":
        paths = make(options.directory, options.kind, options.members, options.scale)
        print(json.dumps([os.fspath(path.resolve()) for path in paths]))
    else:
        sys.exit(check(*options.files))


if __name__ == "__main__":
    main()
