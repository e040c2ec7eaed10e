"""Writing: the reference library's bytes, and all of a checkpoint or none of it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

import modelsoup.files.writer
from modelsoup import CheckpointError, OutputError, ParameterError, open_checkpoint
from modelsoup.files import placing
from modelsoup.files.dtypes import DTYPES
from modelsoup.files.placing import remove_stale
from modelsoup.files.writer import (
    CheckpointWriter,
    OutputFile,
    OutputTensor,
    copy_companions,
    header_bytes,
    layout,
    parse_size,
)

OURS = {"modelsoup": "{}"}
NOBODY = 65534

# What the reference library calls the dtypes when it writes; it cannot write F6.
PACKED = {"F4": "float4_e2m1fn_x2"}
WRITABLE = [name for name, dtype in DTYPES.items() if dtype.numpy or name in PACKED]

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def random_tensors(seed: int, dtypes: list[str] = WRITABLE, per_dtype: int = 2) -> Tensors:
    """Tensors of the given dtypes in random order, their names in another."""
    rng = random.Random(seed)
    names = [f"block.{n}.weight" for n in range(per_dtype * len(dtypes))]
    rng.shuffle(names)
    tensors = {}
    for name, dtype in zip(names, rng.sample(dtypes * per_dtype, len(names)), strict=True):
        shape = (*(rng.choice([0, 1, 2, 5]) for _ in range(rng.randrange(3))), 4)
        data = rng.randbytes(OutputTensor(name, dtype, shape).nbytes)
        tensors[name] = (dtype, shape, bytes(b & 1 for b in data) if dtype == "BOOL" else data)
    return tensors


def reference(tensors: Tensors, metadata: dict[str, str] | None) -> bytes:
    """What the reference library writes."""
    arrays = []  # alive until the bytes are made
    specs = {}
    for name, (dtype, shape, data) in tensors.items():
        written = PACKED.get(dtype) or DTYPES[dtype].numpy
        # A packed dtype is given as an array of bytes that hold two elements each.
        given_shape = (*shape[:-1], shape[-1] // 2) if dtype in PACKED else shape
        if hasattr(safetensors, "TensorSpec"):
            arrays.append(np.frombuffer(data or b"\0", np.uint8))
            specs[name] = safetensors.TensorSpec(
                dtype=written,
                shape=given_shape,
                data_ptr=arrays[-1].ctypes.data,
                data_len=len(data),
            )
        else:  # before 0.8
            specs[name] = {"dtype": written, "shape": given_shape, "data": data}
    return bytes(safetensors.serialize(specs, metadata))


def described(tensors: Tensors) -> list[OutputTensor]:
    return [OutputTensor(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()]


def fill(
    writer: CheckpointWriter, files: list[OutputFile], tensors: Tensors, seed: int = 0
) -> None:
    """Write all data, in pieces and in random order."""
    pieces = []
    for file in files:
        offset = 0
        for tensor in file.tensors:
            data = memoryview(tensors[tensor.name][2])
            middle = len(data) // 2
            pieces.append((file.name, data[:middle], offset))
            pieces.append((file.name, data[middle:], offset + middle))
            offset += len(data)
    random.Random(seed).shuffle(pieces)
    for piece in pieces:
        writer.write(*piece)


def write(
    output: Path, tensors: Tensors, metadata: dict[str, str] = OURS, *,
    shard_size: int | None = None, force: bool = False, copy_from: Path | None = None,
) -> Path:  # fmt: skip
    """A whole checkpoint, as the engine writes it."""
    name = output.name if output.suffix == ".safetensors" else "model.safetensors"
    files = layout(described(tensors), file_name=name, shard_size=shard_size)
    with CheckpointWriter(output, files, metadata, force=force, copy_from=copy_from) as writer:
        fill(writer, files, tensors)
        writer.commit()
    return output


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Everything that a checkpoint holds, as the reference library reads it."""
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for file in (path.glob("*.safetensors") if path.is_dir() else [path])
        for name, tensor in safetensors.deserialize(file.read_bytes())
    }


def entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


ONE: Tensors = {"t": ("F32", (2,), b"\0\0\x80\x3f" * 2)}
TWO: Tensors = {**ONE, "u": ("U8", (3,), b"new")}
SMALL = [OutputFile("model.safetensors", (OutputTensor("t", "F32", (2,)),))]


@pytest.fixture(params=["soup.safetensors", "soup"], ids=["file", "folder"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / "out" / str(request.param)


@pytest.fixture(autouse=True)
def _outputs_have_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()


# The same bytes as the reference library


@pytest.mark.parametrize("seed", range(5))
def test_every_dtype_together_gives_the_reference_librarys_bytes(tmp_path: Path, seed: int) -> None:
    tensors = random_tensors(seed)
    assert {dtype for dtype, _, _ in tensors.values()} == set(WRITABLE)
    output = write(tmp_path / "out" / "m.safetensors", tensors, {"format": "pt"})
    assert output.read_bytes() == reference(tensors, {"format": "pt"})


def test_what_numpy_has_gives_the_bytes_that_its_users_get(tmp_path: Path) -> None:
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(3).astype(ml_dtypes.bfloat16),
        "c": np.array(3, np.int64),
        "d": np.zeros((0, 4), np.float16),
    }
    names = {np.dtype(d.numpy).name: n for n, d in DTYPES.items() if d.kind == "integer"}
    names |= {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    tensors = {n: (names[a.dtype.name], a.shape, a.tobytes()) for n, a in arrays.items()}
    output = write(tmp_path / "out" / "m.safetensors", tensors, {"format": "np"})
    assert output.read_bytes() == save(arrays, {"format": "np"})


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    names=st.lists(TEXT.filter(lambda name: name != "__metadata__"), unique=True, max_size=6),
    metadata=st.dictionaries(TEXT, TEXT, max_size=1),
    data=st.data(),
)
def test_any_names_and_any_metadata_give_the_reference_librarys_header(
    names: list[str], metadata: dict[str, str], data: st.DataObject
) -> None:
    tensors = {}
    for name in names:
        dtype = data.draw(st.sampled_from(WRITABLE))
        shape = (*data.draw(st.lists(st.integers(0, 3), max_size=2)), 2)
        tensors[name] = (dtype, shape, bytes(OutputTensor(name, dtype, shape).nbytes))
    (file,) = layout(described(tensors), file_name="m.safetensors", shard_size=None)
    written = header_bytes(file, metadata) + bytes(sum(t.nbytes for t in file.tensors))
    assert written == reference(tensors, metadata or None)


def test_all_dtypes_of_the_format_are_read_back_by_the_reference_library_and_by_us(
    tmp_path: Path,
) -> None:
    """Those too that the reference library reads and does not write."""
    tensors = random_tensors(9, list(DTYPES))
    output = write(tmp_path / "out" / "m.safetensors", tensors)
    assert stored(output) == tensors
    content, ours = output.read_bytes(), open_checkpoint(output).tensors
    read = {
        n: (info.dtype, info.shape, content[info.start : info.stop]) for n, info in ours.items()
    }
    assert read == tensors


def test_a_file_that_the_reference_library_wrote_is_rewritten_bit_by_bit(tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    rng = np.random.default_rng(0)
    arrays = {f"layer.{n}.w": rng.random((3, n), np.float32) for n in range(12)}
    save_file(arrays, source, {"format": "pt"})
    output = write(tmp_path / "out" / "m.safetensors", stored(source), {"format": "pt"})
    assert output.read_bytes() == source.read_bytes()


def test_the_order_in_which_metadata_is_given_does_not_matter(tmp_path: Path) -> None:
    metadata = {f"key{n}": str(n) for n in range(9)}
    backwards = dict(reversed(metadata.items()))
    first = write(tmp_path / "out" / "a.safetensors", ONE, metadata)
    second = write(tmp_path / "out" / "b.safetensors", ONE, backwards)
    assert first.read_bytes() == second.read_bytes()
    assert open_checkpoint(first).metadata == metadata


def test_threads_may_write_at_once_and_in_any_order(tmp_path: Path) -> None:
    rng = random.Random(3)
    tensors: Tensors = {f"t{n}": ("U8", (50_000,), rng.randbytes(50_000)) for n in range(20)}
    output = tmp_path / "out" / "m.safetensors"
    (file,) = files = layout(described(tensors), file_name=output.name, shard_size=None)
    content = b"".join(tensors[t.name][2] for t in file.tensors)
    places = list(range(0, len(content), 7_919))
    rng.shuffle(places)
    with CheckpointWriter(output, files, {}) as writer, ThreadPoolExecutor(4) as pool:
        view = memoryview(content)
        list(pool.map(lambda at: writer.write(file.name, view[at : at + 7_919], at), places))
        writer.commit()
    assert output.read_bytes() == reference(tensors, None)


# Layout, shards and index


def test_shards_are_named_filled_and_indexed_as_hugging_face_does(tmp_path: Path) -> None:
    tensors: Tensors = {
        "embed": ("F32", (4,), bytes(16)),
        "layer.1": ("F16", (8,), bytes(range(16))),
        "huge": ("U8", (100,), bytes(range(100))),
        "layer.0": ("F16", (2,), b"abcd"),
        "head": ("F32", (1,), b"wxyz"),
    }
    output = write(tmp_path / "out" / "soup", tensors, shard_size=32)
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert entries(output) == [*shards, "model.safetensors.index.json"]
    assert json.loads((output / "model.safetensors.index.json").read_bytes()) == {
        "metadata": {"total_size": 16 + 16 + 100 + 4 + 4},
        "weight_map": {
            "embed": shards[0], "head": shards[2], "huge": shards[1], "layer.0": shards[2],
            "layer.1": shards[0],
        },
    }  # fmt: skip
    checkpoint = open_checkpoint(output)
    assert stored(output) == tensors
    assert [file.name for file in checkpoint.files] == shards
    for shard in shards:
        part = {n: t for n, t in tensors.items() if checkpoint.tensors[n].file.name == shard}
        assert (output / shard).read_bytes() == reference(part, OURS)


def test_a_folder_that_fits_in_one_shard_has_one_file_and_no_index(tmp_path: Path) -> None:
    for shard_size in (None, 11):
        output = write(tmp_path / "out" / f"soup{shard_size}", TWO, shard_size=shard_size)
        assert entries(output) == ["model.safetensors"]
        assert stored(output) == TWO
    assert len(entries(write(tmp_path / "out" / "soup10", TWO, shard_size=10))) == 3


def test_a_diffusion_model_keeps_its_stem(tmp_path: Path) -> None:
    files = layout(described(TWO), file_name="diffusion_pytorch_model.safetensors", shard_size=8)
    with CheckpointWriter(tmp_path / "out" / "unet", files, {}) as writer:
        fill(writer, files, TWO)
        writer.commit()
    assert entries(tmp_path / "out" / "unet") == [
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
    ]
    assert stored(tmp_path / "out" / "unet") == TWO


def test_no_tensors_make_an_empty_checkpoint(output: Path) -> None:
    assert dict(open_checkpoint(write(output, {}))) == {}


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), max_size=30),
    shard_size=st.none() | st.integers(1, 100),
)
def test_a_layout_holds_each_tensor_once_and_fills_shards_in_order(
    sizes: list[int], shard_size: int | None
) -> None:
    tensors = [OutputTensor(f"t{n:02d}", "U8", (size,)) for n, size in enumerate(sizes)]
    files = layout(tensors, file_name="m.safetensors", shard_size=shard_size)
    assert [t for file in files for t in file.tensors] == tensors, "one dtype: in the given order"
    if shard_size is None:
        assert len(files) == 1
    if len(files) == 1:
        assert files[0].name == "m.safetensors"
        return
    total = len(files)
    assert [f.name for f in files] == [
        f"m-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)
    ]
    assert shard_size is not None
    assert all(file.tensors for file in files), "no shard is empty"
    filled = [sum(t.nbytes for t in file.tensors) for file in files]
    for file, size in zip(files, filled, strict=True):
        assert size <= shard_size or len([t for t in file.tensors if t.nbytes]) == 1
    for size, following in zip(filled, files[1:], strict=False):
        assert size + following.tensors[0].nbytes > shard_size, "the next one did not fit"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9), ("250MB", 250 * 10**6), ("1GiB", 2**30), ("1.5 GB", 15 * 10**8),
        ("10kb", 10_000), ("2KiB", 2048), ("1TB", 10**12), ("1TiB", 2**40), (" 3 mib ", 3 * 2**20),
        ("7", 7), ("7B", 7), (7, 7), ("0.5KB", 500), (2**40 + 1, 2**40 + 1),
    ],
)  # fmt: skip
def test_sizes_are_read_as_hugging_face_counts(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5XB", "5 G B x", "5GIB2", "five", "nan", "inf", "1e999GB", "5 GBs", "--5"]
)
def test_what_is_not_a_size_is_told(text: str) -> None:
    with pytest.raises(ParameterError) as caught:
        parse_size(text)
    assert str(caught.value) == f"size {text!r} is not a size such as 5GB, 250MB or 1GiB"


@pytest.mark.parametrize("text", ["0", "0GB", "-5GB", -1, 0, "0.1B"])
def test_a_size_must_be_positive(text: str | int) -> None:
    with pytest.raises(ParameterError) as caught:
        parse_size(text)
    assert str(caught.value) == f"size {text!r} must be positive"


# All of it or none


def test_nothing_is_under_the_final_name_before_the_commit(output: Path) -> None:
    files = layout(described(TWO), file_name="model.safetensors", shard_size=None)
    with CheckpointWriter(output, files, OURS) as writer:
        fill(writer, files, TWO)
        (partial,) = entries(output.parent)
        assert re.fullmatch(rf"\.{re.escape(output.name)}\.[0-9a-f]{{8}}\.soup-partial", partial)
        with pytest.raises(CheckpointError):
            open_checkpoint(output)
        writer.commit()
        assert entries(output.parent) == [output.name]
    assert entries(output.parent) == [output.name]
    assert stored(output) == TWO


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing_behind(output: Path, error: type[BaseException]) -> None:
    files = layout(described(TWO), file_name="model.safetensors", shard_size=8)
    files = files if output.suffix == "" else SMALL
    with (
        pytest.raises(error),
        CheckpointWriter(output, files, OURS) as writer,
    ):
        writer.write(files[0].name, memoryview(b"1234"), 0)
        assert len(entries(output.parent)) == 1
        raise error
    assert entries(output.parent) == []


def test_without_a_commit_nothing_is_left(output: Path) -> None:
    with CheckpointWriter(output, SMALL, OURS) as writer:
        fill(writer, SMALL, ONE)
    assert entries(output.parent) == []


def test_a_failure_at_the_start_leaves_nothing_behind(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").symlink_to("gone")
    output = tmp_path / "out" / "soup"
    with pytest.raises(CheckpointError, match=rf"^the link {model}/config.json leads nowhere$"):
        write(output, ONE, copy_from=model)
    assert entries(output.parent) == []


def test_flushing_to_the_disk_may_be_left_out(output: Path) -> None:
    with CheckpointWriter(output, SMALL, OURS, fsync=False) as writer:
        fill(writer, SMALL, ONE)
        writer.commit()
    assert stored(output) == ONE


def test_outputs_have_the_permissions_that_the_user_gives_new_files(output: Path) -> None:
    before = os.umask(0o027)
    try:
        write(output, ONE)
    finally:
        os.umask(before)
    file = output if output.is_file() else output / "model.safetensors"
    assert file.stat().st_mode & 0o777 == 0o640
    assert output.stat().st_mode & 0o007 == 0


CHILD = """
import os, sys
from modelsoup.errors import OutputError
from modelsoup.files.writer import CheckpointWriter, OutputTensor, layout

output, rounds = sys.argv[1], int(sys.argv[2])
tensors = [OutputTensor(f"t{n}", "U8", (1 << 16,)) for n in range(4)]
one = output.endswith(".safetensors")
files = layout(tensors, file_name="model.safetensors", shard_size=None if one else 1 << 17)

def write_all(writer, byte):
    for file in files:
        for n, _ in enumerate(file.tensors):
            writer.write(file.name, memoryview(bytes([byte]) * (1 << 16)), n << 16)

if rounds == 0:  # stop in the middle, until told to go on
    with CheckpointWriter(output, files, {"modelsoup": "{}"}) as writer:
        writer.write(files[0].name, memoryview(bytes(1 << 16)), 0)
        print("writing", flush=True)
        sys.stdin.readline()
        write_all(writer, 1)
        try:
            writer.commit()
        except OutputError as error:
            print(error, flush=True)
for number in range(rounds):  # until killed
    with CheckpointWriter(output, files, {"modelsoup": "{}"}, force=True, fsync=False) as writer:
        write_all(writer, number % 256)
        writer.commit()
    if number == 0:
        print("writing", flush=True)
"""


def start_child(output: Path, rounds: int = 0) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, output, str(rounds)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    return child


def kill(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


def test_a_killed_run_leaves_only_a_temporary_which_the_next_run_removes(output: Path) -> None:
    kill(start_child(output))
    (partial,) = entries(output.parent)
    assert re.fullmatch(rf"\.{re.escape(output.name)}\.[0-9a-f]{{8}}\.soup-partial", partial)
    other = write(output.with_name("other.safetensors"), ONE)
    assert entries(output.parent) == sorted([partial, other.name]), "another output's is not ours"
    write(output, ONE)
    assert entries(output.parent) == sorted([output.name, other.name])
    assert stored(output) == ONE


def test_the_temporary_of_a_process_that_lives_is_left_alone(output: Path) -> None:
    child = start_child(output)
    try:
        (partial,) = entries(output.parent)
        write(output, ONE)
        assert entries(output.parent) == sorted([partial, output.name])
        said, _ = child.communicate("go on\n", timeout=60)
    finally:
        child.kill()
    exists = f"{output} exists" if output.is_file() else f"the folder {output} exists"
    assert said.startswith(exists), "the later one does not overwrite the earlier one"
    assert child.returncode == 0
    assert entries(output.parent) == [output.name]
    assert stored(output) == ONE


def test_a_kill_at_any_moment_leaves_the_old_output_or_the_new_one(output: Path) -> None:
    rng = random.Random(11)
    write(output, ONE)
    for _ in range(6):
        child = start_child(output, rounds=1_000_000)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(timeout=rng.uniform(0, 0.05))
        kill(child)
        # A folder is replaced in two steps; in between the old one is whole under this name.
        whole = output
        if not output.suffix and not output.exists():
            (whole,) = output.parent.glob(".soup.*.soup-replaced")
        contents = {data for _, _, data in stored(whole).values()}
        assert len(stored(whole)) == 4
        assert len(contents) == 1, "parts of two outputs in one"
    write(output, ONE, force=True)
    assert entries(output.parent) == [output.name]


# What may be replaced


def test_an_existing_output_is_refused_without_force(output: Path) -> None:
    write(output, ONE)
    before = stored(output)
    for _ in range(2):
        with pytest.raises(OutputError) as caught:
            write(output, TWO)
        assert str(caught.value) == (
            f"{output} exists (force=True replaces it)"
            if output.suffix
            else f"the folder {output} exists and is not empty (force=True replaces it)"
        )
    assert stored(output) == before
    assert entries(output.parent) == [output.name]


def test_an_existing_output_is_replaced_with_force(output: Path) -> None:
    write(output, TWO, shard_size=None if output.suffix else 8)
    write(output, ONE, force=True)
    assert stored(output) == ONE
    assert entries(output.parent) == [output.name]
    if not output.suffix:
        assert entries(output) == ["model.safetensors"], "nothing of the old folder stays"


def test_an_output_that_appears_meanwhile_is_not_overwritten(output: Path) -> None:
    with CheckpointWriter(output, SMALL, OURS) as writer:
        fill(writer, SMALL, ONE)
        write(output, TWO)
        with pytest.raises(OutputError, match="exists"):
            writer.commit()
    assert stored(output) == TWO
    assert entries(output.parent) == [output.name]


def test_a_folder_that_modelsoup_did_not_write_is_never_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out" / "soup"
    output.mkdir()
    for name, content in (("notes.txt", b"mine"), ("model.safetensors", save({}))):
        (output / name).write_bytes(content)
        for force in (False, True):  # so that nobody is told to force it first
            with pytest.raises(OutputError) as caught:
                write(output, ONE, force=force)
            assert str(caught.value) == (
                f"the folder {output} is not empty, and was not written by modelsoup, so it is not "
                f"replaced: remove it yourself or name another output"
            )
            assert (output / name).read_bytes() == content
    assert entries(output.parent) == ["soup"]


def test_an_empty_folder_is_filled_without_force(tmp_path: Path) -> None:
    output = tmp_path / "out" / "soup"
    output.mkdir()
    assert stored(write(output, ONE)) == ONE
    assert entries(output.parent) == ["soup"]


def test_a_link_to_an_output_is_replaced_and_not_followed(output: Path) -> None:
    target = write(output.with_name("real" + output.suffix), TWO)
    output.symlink_to(target.name)
    write(output, ONE, force=True)
    assert stored(output) == ONE
    assert not output.is_symlink()
    assert stored(target) == TWO
    assert entries(output.parent) == sorted([output.name, target.name])


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_where_a_file_is_meant_is_told_and_the_other_way_round(
    output: Path, force: bool
) -> None:
    if output.suffix:
        output.mkdir()
    else:
        output.write_bytes(b"mine")
    with pytest.raises(OutputError) as caught:
        write(output, ONE, force=force)
    assert str(caught.value) == (
        f"{output} is a {'folder' if output.suffix else 'file'}: "
        f"an output that ends in .safetensors is a file, any other a folder"
    )
    assert entries(output.parent) == [output.name]


@pytest.mark.parametrize("parent", ["missing", "a-file"])
def test_a_missing_folder_of_the_output_is_told(output: Path, parent: str) -> None:
    (output.parent / "a-file").write_bytes(b"")
    target = output.parent / parent / output.name
    with pytest.raises(OutputError) as caught:
        write(target, ONE)
    assert str(caught.value) == (
        f"the folder {target.parent} of the output {output.name} does not exist"
    )


AS_NOBODY = """
import os, sys
from pathlib import Path
from modelsoup.errors import OutputError
from modelsoup.files.writer import CheckpointWriter, OutputFile, OutputTensor
files = [OutputFile("model.safetensors", (OutputTensor("t", "F32", (1,)),))]
if os.getuid() == 0:
    os.setuid(65534)
try:
    with CheckpointWriter(sys.argv[1], files, {}) as writer:
        writer.write(files[0].name, memoryview(b"1234"), 0)
        writer.commit()
    print("written")
except OutputError as error:
    print(error)
"""


def as_nobody(output: Path) -> str:
    """What a run says that is not root's, to whom everything is allowed."""
    command = [sys.executable, "-c", AS_NOBODY, output]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stderr == ""
    return run.stdout


@pytest.mark.parametrize("name", ["soup", "soup.safetensors"])
def test_a_folder_that_may_not_be_written_to_is_told(public: Path, name: str) -> None:
    if os.getuid() != 0:
        public.chmod(0o555)
    output = public / name
    assert as_nobody(output) == f"the folder {public} of the output {name} is not writable\n"
    assert entries(public) == []
    public.chmod(0o777)
    assert as_nobody(output) == "written\n"


@pytest.mark.skipif(os.getuid() != 0, reason="platform: only root gives files away")
@pytest.mark.parametrize("name", ["soup", "soup.safetensors"])
def test_another_users_temporary_that_may_not_be_removed_is_passed_over(
    public: Path, name: str
) -> None:
    """As in /tmp, where only its owner may remove a file."""
    public.chmod(0o1777)
    stale = public / f".{name}.01234567.soup-partial"
    if name == "soup":
        stale.mkdir()
    stale = stale / "model.safetensors" if name == "soup" else stale
    stale.write_bytes(b"root's")
    assert as_nobody(public / name) == "written\n"
    assert stale.read_bytes() == b"root's"


# Temporaries that are not this output's


@pytest.mark.parametrize("name", ["run [1]*?.safetensors", "[!a]", "a*", "a?b.safetensors", "[["])
def test_a_name_with_glob_characters_means_itself(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "out"
    output = folder / name
    kill(start_child(output))
    (partial,) = entries(folder)
    others = [
        f".{other}.01234567.soup-partial"
        for other in ("run 1xy.safetensors", "b", "axx", "axb.safetensors", "[")
    ]
    for other in others:
        (folder / other).write_bytes(b"")
    assert remove_stale(output) == [folder / partial]
    write(output, ONE)
    assert stored(output) == ONE
    assert entries(folder) == sorted([name, *others])


@pytest.mark.parametrize("suffix", ["soup-partial", "soup-replaced"])
@pytest.mark.parametrize("other", ["model.v2", "model.safetensors", "model.01234567"])
def test_what_belongs_to_an_output_with_a_longer_name_is_left_alone(
    tmp_path: Path, other: str, suffix: str
) -> None:
    """`model` and `model.v2` side by side: the only copy of one may lie under such a name."""
    folder = tmp_path / "out"
    output = write(folder / "model", ONE)
    theirs = write(folder / "theirs", TWO).rename(folder / f".{other}.89abcdef.{suffix}")
    assert remove_stale(output) == []
    write(output, TWO, force=True)
    assert stored(theirs) == TWO


def test_a_replaced_folder_is_kept_until_a_new_one_stands_in_its_place(tmp_path: Path) -> None:
    """As a kill between the two renames leaves it."""
    output = tmp_path / "out" / "soup"
    old = write(output, TWO).rename(output.with_name(".soup.01234567.soup-replaced"))
    assert remove_stale(output) == []
    assert stored(old) == TWO
    with pytest.raises(ValueError), CheckpointWriter(output, SMALL, OURS):
        raise ValueError
    assert stored(old) == TWO
    write(output, ONE)
    assert entries(output.parent) == ["soup"]
    assert stored(output) == ONE


def test_a_temporary_that_another_run_removes_before_it_is_locked_is_made_again(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not taken:
            taken.extend(remove_stale(output))
        lock(descriptor, operation)

    def now(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        late(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", now)
    write(output, ONE)
    assert len(taken) == 1
    assert stored(output) == ONE
    assert entries(output.parent) == [output.name]


# A full disk


def test_space_is_checked_before_anything_is_written(output: Path) -> None:
    files = [OutputFile("model.safetensors", (OutputTensor("t", "U8", (2**60,)),))]
    with pytest.raises(OutputError) as caught, CheckpointWriter(output, files, OURS):
        pass
    assert re.fullmatch(
        rf"{re.escape(str(output))} needs 1\.15e\+06 TB, but the disk has only \d\S+ \wB free",
        str(caught.value),
    )
    assert entries(output.parent) == []


LIMITED = """
import os, resource, sys
from modelsoup.errors import OutputError
from modelsoup.files.writer import CheckpointWriter, OutputFile, OutputTensor, layout

output, when = sys.argv[1:3]
tensors = [OutputTensor(f"t{n}", "U8", (1 << 20,)) for n in range(3)]
one = output.endswith(".safetensors")
files = layout(tensors, file_name="model.safetensors", shard_size=None if one else 1 << 20)

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

try:
    if when == "start":
        limit(1000)
    with CheckpointWriter(output, files, {"modelsoup": "{}"}) as writer:
        print(len(os.listdir(os.path.dirname(output))))
        if when == "data":
            limit(500_000)
        for file in files:
            for n, _ in enumerate(file.tensors):
                writer.write(file.name, memoryview(bytes(1 << 20)), n << 20)
        if when == "index":
            limit(100)
        writer.commit()
    print("written")
except OutputError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "when"),
    [
        ("soup", "start"), ("soup", "data"), ("soup", "index"),
        ("soup.safetensors", "start"), ("soup.safetensors", "data"),
    ],
)  # fmt: skip
def test_a_limit_that_is_met_in_the_middle_leaves_nothing_behind(
    tmp_path: Path, name: str, when: str
) -> None:
    output = tmp_path / "out" / name
    command = [sys.executable, "-c", LIMITED, output, when]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stderr == ""
    assert run.stdout.splitlines() == [
        *(["1"] if when != "start" else []),
        f"{output} is larger than a file may be here: not written",
    ]
    assert entries(output.parent) == []


FULL = """
import os, sys
from pathlib import Path
from modelsoup.errors import OutputError
from modelsoup.files.writer import CheckpointWriter, OutputTensor, layout

output, case, model = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
size = 5 << 20 if case == "more than free" else 3 << 20
files = layout([OutputTensor("t", "U8", (size,))], file_name="model.safetensors", shard_size=None)
copy_from = Path(model) if case == "companions" else None
try:
    with CheckpointWriter(output, files, {"modelsoup": "{}"}, copy_from=copy_from) as writer:
        (output.parent / "somebody-elses").write_bytes(bytes(2 << 20))
        written = 0
        for offset in range(0, size, 1 << 16):
            writer.write(files[0].name, memoryview(bytes(1 << 16)), offset)
            print(offset)
        writer.commit()
    print("written")
except OutputError as error:
    print(error)
print(sorted(os.listdir(output.parent)))
"""


def on_a_small_disk(folder: Path, name: str, case: str, model: Path) -> list[str]:
    """Run `FULL` with `folder` as a disk of 4 MiB, which nobody else sees."""
    if shutil.which("unshare") is None:
        pytest.skip("platform: mounting a small disk needs unshare")
    unshare = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-m", "-U", "-r"]
    mount = 'mount -t tmpfs -o size=4m tmpfs "$0"'
    probe = [*unshare, "sh", "-c", mount, folder]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("platform: mounting is not allowed here")
    command = f'{mount} && exec "$@"'
    run = subprocess.run(
        [*unshare, "sh", "-c", command, folder, sys.executable, "-c", FULL, folder / name, case,
         model],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.stderr == ""
    return run.stdout.splitlines()


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing_behind(
    output: Path, tmp_path: Path
) -> None:
    *written, sentence, left = on_a_small_disk(output.parent, output.name, "middle", tmp_path)
    assert len(written) > 10, "it was in the middle"
    assert sentence == f"the disk is full: {output} was not written"
    assert left == "['somebody-elses']"


def test_companions_that_do_not_fit_leave_nothing_behind(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "a.json").write_bytes(bytes(3 << 20))
    (model / "b.json").write_bytes(bytes(3 << 20))
    output = tmp_path / "out" / "soup"
    assert on_a_small_disk(output.parent, "soup", "companions", model) == [
        f"the disk is full: {output} was not written", "[]"
    ]  # fmt: skip


def test_an_output_larger_than_the_free_space_is_not_begun(output: Path, tmp_path: Path) -> None:
    said = on_a_small_disk(output.parent, output.name, "more than free", tmp_path)
    assert said == [f"{output} needs 5.24 MB, but the disk has only 4.19 MB free", "[]"]


# Metadata


def test_metadata_may_be_replaced_by_other_of_the_same_length(output: Path) -> None:
    with CheckpointWriter(output, SMALL, {"modelsoup": "0000", "k": "v"}) as writer:
        fill(writer, SMALL, ONE)
        writer.update_metadata({"modelsoup": "abcd", "k": "v"})
        writer.commit()
    assert open_checkpoint(output).metadata == {"modelsoup": "abcd", "k": "v"}
    assert stored(output) == ONE
    file = output if output.is_file() else output / "model.safetensors"
    whole = file.read_bytes()
    assert len(whole) == len(header_bytes(SMALL[0], {"modelsoup": "abcd", "k": "v"})) + 8


def test_shorter_metadata_leaves_the_header_as_long(output: Path) -> None:
    with CheckpointWriter(output, SMALL, {"modelsoup": "0" * 32}) as writer:
        fill(writer, SMALL, ONE)
        writer.update_metadata({"modelsoup": "short"})
        writer.commit()
    assert open_checkpoint(output).metadata == {"modelsoup": "short"}
    assert stored(output) == ONE


def test_longer_metadata_moves_what_is_written(output: Path) -> None:
    """Over several pieces of what is moved at a time, and twice."""
    big = {f"t{n}": ("U8", (3_000_001,), random.Random(n).randbytes(3_000_001)) for n in range(4)}
    files = layout(described(big), file_name="model.safetensors", shard_size=None)
    with CheckpointWriter(output, files, {"modelsoup": "0"}) as writer:
        fill(writer, files, big)
        for length in (64, 5_000):
            writer.update_metadata({"modelsoup": "1" * length})
        writer.commit()
    assert open_checkpoint(output).metadata == {"modelsoup": "1" * 5_000}
    assert stored(output) == big
    file = output if output.is_file() else output / "model.safetensors"
    assert file.read_bytes() == reference(big, {"modelsoup": "1" * 5_000})


@pytest.mark.parametrize("when", ["at first", "later"])
def test_a_header_that_no_reader_would_take_is_not_written(
    output: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelsoup.files.writer.MAX_HEADER", 1_000)
    long = {"modelsoup": "0" * 1_000}
    with (
        pytest.raises(OutputError, match=r"bytes, more than the 1,000 that a reader takes$"),
        CheckpointWriter(output, SMALL, long if when == "at first" else OURS) as writer,
    ):
        fill(writer, SMALL, ONE)
        writer.update_metadata(long)
    assert entries(output.parent) == []


@pytest.mark.parametrize("keys", [100_000, 100_001])
def test_what_the_reader_refuses_above_16_mb_is_not_written(keys: int, output: Path) -> None:
    metadata = {f"{n:0170}": "" for n in range(keys)}
    if keys == 100_000:
        write(output, ONE, metadata)
        assert open_checkpoint(output).metadata == metadata
        return
    with pytest.raises(
        OutputError, match=r"and 100,001 keys of metadata, more than a reader takes"
    ):
        write(output, ONE, metadata)
    assert entries(output.parent) == []


def test_every_shard_carries_the_metadata(tmp_path: Path) -> None:
    output = write(tmp_path / "out" / "soup", TWO, {"modelsoup": "x"}, shard_size=8)
    shards = sorted(output.glob("*.safetensors"))
    assert len(shards) == 2
    found = [open_checkpoint(shard, shard=True).metadata for shard in shards]
    assert found == [{"modelsoup": "x"}] * 2


# Companions


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder as one is downloaded."""
    folder = tmp_path / "model"
    kept = ["config.json", "tokenizer.json", "merges.txt", "LICENSE", "vae/config.json",
            "vae/deep/scheduler_config.json", "modeling_custom.py", "spiece.model"]  # fmt: skip
    left = ["README.md", "vae/readme.md", ".gitattributes", ".git/config", ".cache/x/config.json",
            "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json",
            "flax_model.msgpack.index.json", "vae/diffusion_pytorch_model.safetensors",
            "model.SafeTensors"]  # fmt: skip
    formats = ["bin", "pt", "pth", "ckpt", "h5", "msgpack", "gguf", "onnx", "ot", "pb", "tflite"]
    left += [f"weights.{suffix}" for suffix in formats]
    for name in kept + left:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{'kept' if name in kept else 'left'}: {name}")
    return folder


def copied(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(f.relative_to(folder)): f.read_text() for f in files if f.suffix != ".safetensors"}


def test_configs_and_tokenizers_go_along_and_weights_do_not(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    names = copy_companions(model, target)
    assert sorted(names) == [
        "LICENSE", "config.json", "merges.txt", "modeling_custom.py", "spiece.model",
        "tokenizer.json", "vae/config.json", "vae/deep/scheduler_config.json",
    ]  # fmt: skip
    assert copied(target) == {name: f"kept: {name}" for name in names}
    assert {p.name for p in target.rglob("*") if p.is_dir()} == {"vae", "deep"}


def test_an_output_folder_appears_with_its_companions(model: Path, tmp_path: Path) -> None:
    output = write(tmp_path / "out" / "soup", ONE, copy_from=model)
    assert len(copied(output)) == 8
    assert stored(output) == ONE


def test_companions_behind_links_are_copied_as_files(model: Path, tmp_path: Path) -> None:
    """The Hugging Face cache is made of links, which would lead nowhere from another place."""
    snapshot = tmp_path / "models--x" / "snapshots" / "0f3a"
    snapshot.mkdir(parents=True)
    model.rename(tmp_path / "models--x" / "blobs")
    (snapshot / "config.json").symlink_to("../../blobs/config.json")
    output = write(tmp_path / "out" / "soup", ONE, copy_from=snapshot)
    assert copied(output) == {"config.json": "kept: config.json"}
    assert not (output / "config.json").is_symlink()


def test_links_to_folders_are_left_out(model: Path, tmp_path: Path) -> None:
    (model / "round").symlink_to(model)
    assert len(copy_companions(model, tmp_path / "target")) == 8


def test_an_output_inside_a_model_folder_that_is_named_otherwise(model: Path) -> None:
    """As `model/../model/soup`, or by way of a link."""
    write(model / "soup", ONE, copy_from=model)
    link = model.with_name("link")
    link.symlink_to(model)
    output = write(link / "soup", TWO, copy_from=model, force=True)
    assert "soup/config.json" not in copied(output)


def test_an_output_inside_the_model_folder_does_not_swallow_itself(model: Path) -> None:
    output = write(model / "soup", ONE, copy_from=model)
    assert len(copied(output)) == 8
    write(output, TWO, copy_from=model, force=True)
    assert "soup/config.json" not in copied(output)
    assert stored(output) == TWO


def test_a_link_out_of_the_model_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    """Else somebody's secret would be in the output, and then in a repository."""
    (tmp_path / "secret").write_text("secret")
    for target in (tmp_path / "secret", Path("../../secret")):
        (model / "vae" / "tokens.json").symlink_to(target)
        with pytest.raises(CheckpointError) as caught:
            write(tmp_path / "out" / "soup", ONE, copy_from=model)
        assert str(caught.value).startswith(f"the link {model}/vae/tokens.json leads out of the")
        (model / "vae" / "tokens.json").unlink()
    assert entries(tmp_path / "out") == []
    (model / "vae" / "same.json").symlink_to("../config.json")
    assert "vae/same.json" in copied(write(tmp_path / "out" / "soup", ONE, copy_from=model))


def test_what_is_neither_file_nor_folder_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    os.mkfifo(model / "vae" / "pipe.json")
    with pytest.raises(CheckpointError, match=rf"^{model}/vae/pipe.json is neither a file nor"):
        write(tmp_path / "out" / "soup", ONE, copy_from=model)
    assert entries(tmp_path / "out") == []


def test_nothing_is_copied_that_lists_weights(model: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors.index.fp16.json", "tf_model.h5.index.json"):
        (model / name).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    (model / "model_index.json").write_text("{}")
    names = copied(write(tmp_path / "out" / "soup", ONE, copy_from=model))
    assert "model_index.json" in names, "which lists the parts of a pipeline"
    assert not [name for name in names if ".index." in name]


# The last step


def test_what_appears_in_the_last_moment_is_not_overwritten(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look and the rename; the rename itself must refuse."""
    check = modelsoup.files.writer.check_output

    def late(path: Path, *, force: bool) -> None:
        check(path, force=force)
        if path.suffix:
            path.write_bytes(b"precious")
        else:
            (path / "notes").mkdir(parents=True)

    with CheckpointWriter(output, SMALL, OURS) as writer:
        fill(writer, SMALL, ONE)
        monkeypatch.setattr("modelsoup.files.writer.check_output", late)
        with pytest.raises(OutputError, match="appeared while it was made"):
            writer.commit()
    assert entries(output.parent) == [output.name]
    assert output.read_bytes() == b"precious" if output.suffix else entries(output) == ["notes"]


@pytest.mark.parametrize(
    "way", ["rename with conditions", "no such flag", "hard link", "plain rename"]
)
def test_a_file_is_put_in_place_on_any_file_system(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    if way == "no such flag":  # as a file system answers that does not know it
        unknown = dict.fromkeys(placing._RENAMES["linux"][2], 1 << 14)
        monkeypatch.setitem(placing._RENAMES, "linux", ("renameat2", (-100,), unknown))
    elif way != "rename with conditions":
        monkeypatch.setattr("modelsoup.files.placing._renamed", lambda *_: False)
    if way == "plain rename":
        monkeypatch.setattr(os, "link", refused)
    output = tmp_path / "out" / "soup.safetensors"
    assert stored(write(output, ONE)) == ONE
    with pytest.raises(OutputError, match="exists"):
        write(output, TWO)
    assert stored(write(output, TWO, force=True)) == TWO
    assert entries(output.parent) == [output.name]


def test_a_folder_is_replaced_in_one_step_where_the_system_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that at no moment it is absent."""
    output = write(tmp_path / "out" / "soup", ONE)
    renames = []
    monkeypatch.setattr(os, "rename", lambda *paths: renames.append(paths))
    assert stored(write(output, TWO, force=True)) == TWO
    assert renames == []
    assert entries(output.parent) == ["soup"]


def test_a_folder_whose_successor_cannot_be_renamed_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = write(tmp_path / "out" / "soup", ONE)
    rename, calls = os.rename, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append((source, target))
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr("modelsoup.files.placing._renamed", lambda *_: False)
    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OutputError, match="Input/output error"):
        write(output, TWO, force=True)
    assert len(calls) == 3
    assert stored(output) == ONE
    assert entries(output.parent) == ["soup"]


def test_a_mount_point_is_not_replaced(tmp_path: Path) -> None:
    script = tmp_path / "check.py"
    script.write_text(
        textwrap.dedent(f"""
        from pathlib import Path
        from modelsoup.files.placing import check_output
        from modelsoup import OutputError
        try:
            check_output(Path({str(tmp_path / "mounted")!r}), force=True)
        except OutputError as error:
            print(error)
    """)
    )
    (tmp_path / "mounted").mkdir()
    command = f"mount -t tmpfs none {tmp_path / 'mounted'} && {sys.executable} {script}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], capture_output=True, text=True, check=False
    )
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"platform: nothing can be mounted here: {done.stderr.strip()}")
    assert "is a mount point" in done.stdout


def test_everything_is_on_the_disk_before_it_has_its_name(
    model: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file and folder of the output is flushed, then it is renamed, then its folder."""
    done: list[tuple[str, str]] = []
    fsync = os.fsync

    def flushed(descriptor: int) -> None:
        done.append(("flush", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(source: Path, target: Path, how: str) -> bool:
        done.append(("place", str(target)))
        return False

    rename = os.rename

    def folder_renamed(source: Path, target: Path) -> None:
        done.append(("place", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr("modelsoup.files.placing._renamed", renamed)
    monkeypatch.setattr(os, "rename", folder_renamed)
    shards = 8 if not output.suffix else None
    write(output, TWO, shard_size=shards, copy_from=model if shards else None)
    assert done[-1] == ("flush", str(output.parent))
    assert done[-2] == ("place", str(output))
    assert {what for what, _ in done[:-2]} == {"flush"}
    partial = Path(done[0][1])
    while partial.parent != output.parent:
        partial = partial.parent
    found = {str(Path(path).relative_to(partial)) for _, path in done[:-2]}
    everything = {str(p.relative_to(output)) for p in output.rglob("*")} if shards else set()
    assert found == {".", *everything}
