"""Opening: what is accepted, what is told about it, and one sentence for everything else."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from modelsoup import CheckpointError, ParameterError, TensorInfo, open_checkpoint
from modelsoup.files.dtypes import DTYPES, numpy_dtype
from modelsoup.files.header import MAX_HEADER

INDEX = "model.safetensors.index.json"
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
FOUR = b"\0\0\x80\x3f"  # the bytes of ONE: 1.0

NUMPY = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16,
    "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I32": np.int32, "U32": np.uint32,
    "F32": np.float32, "C64": np.complex64, "F64": np.float64, "I64": np.int64, "U64": np.uint64,
    "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu, "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip


def raw(header: object, data: bytes = b"") -> bytes:
    """A safetensors file whose header says whatever the test wants it to say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refusal(path: Path) -> str:
    """The sentence with which a path is refused."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 600
    assert "((" not in sentence, "pairs are the parser's own and mean nothing to a user"
    return sentence


def sharded(folder: Path, shards: dict[str, list[str]], index: str = INDEX) -> Path:
    """A model folder: shards of 2-element tensors and an index that lists them."""
    folder.mkdir(exist_ok=True)
    for number, (shard, names) in enumerate(shards.items()):
        tensors = {name: np.array([number, i], np.float32) for i, name in enumerate(names)}
        save_file(tensors, folder / shard, {"shard": shard})
    rewrite_index(folder / index, {n: s for s, names in shards.items() for n in names})
    return folder


def rewrite_index(index: Path, weight_map: object) -> None:
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


# What is accepted


def test_one_file_tells_names_dtypes_shapes_places_and_metadata(file: Path) -> None:
    save_file(
        {
            "conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
            "conv.bias": np.arange(2, dtype=np.float16),
            "steps": np.array(7, np.int64),
        },
        file,
        {"format": "pt", "epoch": "3"},
    )
    checkpoint = open_checkpoint(file)
    data = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert checkpoint.tensors == {
        "steps": TensorInfo("steps", "I64", (), file, data, 8),
        "conv.weight": TensorInfo("conv.weight", "F32", (2, 3), file, data + 8, 24),
        "conv.bias": TensorInfo("conv.bias", "F16", (2,), file, data + 32, 4),
    }
    assert list(checkpoint) == ["steps", "conv.weight", "conv.bias"], "names come in file order"
    assert checkpoint.metadata == {"format": "pt", "epoch": "3"}
    assert (checkpoint.path, checkpoint.files, checkpoint.is_folder) == (file, (file,), False)
    assert (len(checkpoint), checkpoint.nbytes, checkpoint.parameters) == (3, 36, 9)
    assert checkpoint.name == "model.safetensors"
    assert checkpoint.tensors["conv.weight"].stop == data + 32
    assert str(file) in repr(checkpoint)
    assert "3 tensors" in repr(checkpoint)


def test_names_come_in_file_order_even_if_the_header_lists_them_otherwise(file: Path) -> None:
    late = {"dtype": "U8", "shape": [3], "data_offsets": [4, 7]}
    file.write_bytes(raw({"late": late, "early": ONE}, FOUR + b"xyz"))
    checkpoint = open_checkpoint(file)
    assert list(checkpoint) == ["early", "late"]
    assert checkpoint["late"].tobytes() == b"xyz"


@pytest.mark.parametrize("dtype", [name for name in DTYPES if DTYPES[name].numpy])
def test_a_tensor_of_every_dtype_is_read_bit_by_bit(file: Path, dtype: str) -> None:
    expected = np.dtype(NUMPY[dtype])
    data = np.random.default_rng(1).bytes(6 * expected.itemsize)
    data = bytes(b & 1 for b in data) if dtype == "BOOL" else data
    entry = {"dtype": dtype, "shape": [3, 2], "data_offsets": [0, len(data)]}
    file.write_bytes(raw({"t": entry}, data))
    checkpoint = open_checkpoint(file)
    array = checkpoint["t"]
    assert (array.dtype, array.shape) == (expected, (3, 2))
    assert array.tobytes() == data
    assert checkpoint.tensors["t"].elements == 6


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"), [("F4", [3, 2], 3), ("F6_E2M3", [4], 3), ("F6_E3M2", [2, 4], 6)]
)
def test_dtypes_below_a_byte_are_listed_and_say_why_they_cannot_be_read(
    file: Path, dtype: str, shape: list[int], nbytes: int
) -> None:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}
    file.write_bytes(raw({"t": entry}, bytes(nbytes)))
    checkpoint = open_checkpoint(file)
    info = checkpoint.tensors["t"]
    assert (info.dtype, info.shape, info.nbytes) == (dtype, tuple(shape), nbytes)
    assert info.elements == np.prod(shape)
    with pytest.raises(ParameterError, match=f"dtype {dtype} is smaller than a byte"):
        checkpoint["t"]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1, 1, 1, 1)])
def test_scalars_and_empty_tensors_keep_their_shape(file: Path, shape: tuple[int, ...]) -> None:
    save_file({"t": np.ones(shape, np.float32), "u": np.ones(1, np.float32)}, file)
    array = open_checkpoint(file)["t"]
    assert array.shape == shape
    assert (array == 1).all()


def test_no_tensors_and_no_metadata_are_fine(file: Path) -> None:
    for header in (b"{}", b" {} \n", b'{"__metadata__":null}', b'{"__metadata__":{}}'):
        file.write_bytes(raw(header))
        checkpoint = open_checkpoint(file)
        assert (dict(checkpoint.tensors), checkpoint.metadata) == ({}, {})


def test_names_and_metadata_may_hold_any_text(file: Path) -> None:
    name, value = 'обучение/"quoted" 🍲\n\x7f', "\u2028 ключ \\"
    save_file({name: np.ones(1, np.float32), "": np.zeros(1, np.float32)}, file, {value: value})
    checkpoint = open_checkpoint(file)
    assert set(checkpoint) == {name, ""}
    assert checkpoint.metadata == {value: value}
    assert checkpoint[name] == 1


def test_a_path_may_be_a_string_and_need_no_suffix(tmp_path: Path) -> None:
    save_file({"t": np.ones(1, np.float32)}, tmp_path / "weights.sft")
    assert list(open_checkpoint(str(tmp_path / "weights.sft"))) == ["t"]


def test_an_unknown_name_is_told_with_the_nearest_one(file: Path) -> None:
    save_file({"conv.weight": np.ones(1, np.float32)}, file)
    with pytest.raises(KeyError, match=r"no tensor 'conv\.wieght'; did you mean 'conv\.weight'\?"):
        open_checkpoint(file)["conv.wieght"]


def test_reading_gives_an_array_that_may_be_changed_without_changing_the_file(file: Path) -> None:
    save_file({"t": np.ones(3, np.float32)}, file)
    before = file.read_bytes()
    checkpoint = open_checkpoint(file)
    checkpoint["t"][:] = 5
    assert checkpoint["t"].tolist() == [1, 1, 1]
    assert file.read_bytes() == before


# Folders


@pytest.mark.parametrize(
    "index",
    [INDEX, "diffusion_pytorch_model.safetensors.index.json", "unet.fp16.safetensors.index.json"],
)
def test_a_sharded_folder_is_opened_by_its_index(tmp_path: Path, index: str) -> None:
    stem = index.removesuffix(".safetensors.index.json")
    first, second = (f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2))
    folder = sharded(tmp_path / "model", {second: ["c"], first: ["b", "a"]}, index)
    for path in (folder, folder / index):
        checkpoint = open_checkpoint(path)
        assert list(checkpoint) == ["a", "b", "c"], "first shard first, file order within"
        assert checkpoint.files == (folder / first, folder / second)
        assert (checkpoint.path, checkpoint.is_folder) == (folder, True)
        assert checkpoint.metadata == {"shard": first}, "metadata is the first file's"
        assert checkpoint["c"].tolist() == [0, 0]
        assert checkpoint["a"].tolist() == [1, 1]
    assert checkpoint.tensors["c"].file == folder / second


def test_model_index_wins_over_other_indexes(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"a.safetensors": ["a"]})
    sharded(folder, {"b.safetensors": ["b"]}, "other.safetensors.index.json")
    assert list(open_checkpoint(folder)) == ["a"]


def test_shards_may_lie_in_subfolders(tmp_path: Path) -> None:
    (tmp_path / "m" / "deep").mkdir(parents=True)
    folder = sharded(tmp_path / "m", {"deep/a.safetensors": ["a"], "b.safetensors": ["b"]})
    assert open_checkpoint(folder)["a"].tolist() == [0, 0]


def test_a_folder_with_one_file_and_no_index(tmp_path: Path) -> None:
    save_file({"t": np.ones(1, np.float32)}, tmp_path / "anything.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint) == ["t"]
    assert checkpoint.is_folder
    assert checkpoint.name == tmp_path.name


def test_shards_without_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    save_file({"b": np.ones(1, np.float32)}, tmp_path / names[1], {"part": "2"})
    save_file({"z": np.ones(1, np.float32)}, tmp_path / names[0], {"part": "1"})
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint) == ["z", "b"]
    assert [f.name for f in checkpoint.files] == names
    assert checkpoint.metadata == {"part": "1"}


def test_a_safetensors_file_is_found_beside_an_index_of_pickles(tmp_path: Path) -> None:
    """Repositories carry the same weights in several formats, each with its own index."""
    save_file({"t": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin.index.json", "flax_model.msgpack.index.json"):
        rewrite_index(tmp_path / name, {"t": "pytorch_model-00001-of-00001.bin"})
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(b"PK\x03\x04" * 9)
    assert list(open_checkpoint(tmp_path)) == ["t"]


def test_links_are_followed_as_the_hugging_face_cache_has_them(tmp_path: Path) -> None:
    names = {"model-00001-of-00002.safetensors": ["a"], "model-00002-of-00002.safetensors": ["b"]}
    origin = sharded(tmp_path / "origin", names)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0f3a"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, source in enumerate(sorted(origin.iterdir())):
        shutil.move(source, blobs / f"{number:064x}")
        (snapshot / source.name).symlink_to(f"../../blobs/{number:064x}")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint["a"].tolist() == [0, 0]
    assert checkpoint["b"].tolist() == [1, 0]
    assert checkpoint.files == tuple(snapshot / name for name in names)

    single = tmp_path / "single.safetensors"
    single.symlink_to(blobs / f"{0:064x}")
    assert list(open_checkpoint(single)) == ["a"]


def test_the_current_folder_is_called_by_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"t": np.ones(1, np.float32)}, tmp_path / "t.safetensors")
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(".").name == tmp_path.name
    monkeypatch.chdir(tmp_path / "inner")
    assert open_checkpoint("..").name == tmp_path.name


# Files that are none


def test_a_missing_file_is_told_with_the_nearest_one_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "no" / "model.safetensors"
    assert refusal(path) == f"{path} does not exist"
    index = tmp_path / INDEX
    assert refusal(index) == f"{index} does not exist"
    (tmp_path / "model.safetensors").touch()
    path = tmp_path / "modle.safetensors"
    assert refusal(path) == f"{path} does not exist; did you mean 'model.safetensors'?"


def test_a_link_that_leads_nowhere_is_told_and_does_not_propose_itself(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.symlink_to("gone")
    assert str(path) in refusal(path)
    assert "did you mean" not in refusal(path)
    path.unlink()
    path.symlink_to(path.name)
    assert refusal(path).startswith(f"cannot read {path}: Too many levels")


AS_NOBODY = """
import os, sys
from modelsoup.errors import CheckpointError
from modelsoup.files.checkpoint import open_checkpoint
if os.getuid() == 0:
    os.setuid(65534)
try:
    open_checkpoint(sys.argv[1])
except CheckpointError as error:
    print(error)
"""


def refusal_to_nobody(path: Path) -> str:
    """What a process is told that is not root, which may read everything."""
    command = [sys.executable, "-c", AS_NOBODY, path]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.stderr == ""
    return run.stdout


def test_a_file_that_may_not_be_read_is_told(file: Path) -> None:
    save_file({"t": np.ones(1, np.float32)}, file)
    file.chmod(0)
    assert refusal_to_nobody(file) == f"cannot read {file}: Permission denied\n"


def test_a_missing_file_in_a_folder_that_may_not_be_listed_is_told() -> None:
    with tempfile.TemporaryDirectory(prefix="soup-test-") as name:
        folder = Path(name)
        folder.chmod(0o311)
        assert refusal_to_nobody(folder / "x") == f"{folder / 'x'} does not exist\n"
        folder.chmod(0o700)


@pytest.mark.parametrize("content", [b"", b"\x08", b"1234567"])
def test_a_file_shorter_than_eight_bytes_is_told(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert refusal(file) == (
        f"{file} is not a safetensors file: it has {len(content)} bytes, "
        f"fewer than the 8 of a header's length"
    )


@pytest.mark.parametrize(
    ("start", "hint"),
    [
        (b"PK\x03\x04\0\0\x08\x08\0\0", "it looks like a PyTorch pickle: use `soup convert` first"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j", "it looks like a PyTorch pickle: use `soup convert`"),
        (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}", "it looks like a PyTorch pickle: use `soup convert`"),
        (b"\x80\x02}q\0.", "it looks like a PyTorch pickle: use `soup convert` first"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n",
            "it looks like a Git LFS pointer: fetch the file itself first",
        ),
        (
            b"GGUF\x03\0\0\0\x24\x01\0\0\0\0\0\0",
            "it looks like a GGUF file, which is not supported",
        ),
    ],
    ids=["zip", "legacy torch", "pickle 4", "tiny pickle", "LFS pointer", "GGUF"],
)
def test_other_formats_are_recognised(file: Path, start: bytes, hint: str) -> None:
    file.write_bytes(start)
    assert f"{file} is not a safetensors file: " in refusal(file)
    assert f"({hint}" in refusal(file)


@pytest.mark.parametrize("length", [0x80, 0x280, 0x4B50])
def test_a_truncated_file_is_not_called_a_pickle_for_the_length_of_its_header(
    file: Path, length: int
) -> None:
    """These lengths begin with the same bytes as a pickle or a zip archive."""
    header = json.dumps({"t": ONE}).encode().ljust(length)
    file.write_bytes(raw(header, FOUR)[: length // 2])
    assert refusal(file) == (
        f"{file} is truncated or not a safetensors file: its header should have {length} bytes, "
        f"but only {length // 2 - 8} follow"
    )


def test_a_header_longer_than_the_file_is_told(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", MAX_HEADER) + b"{}")
    assert refusal(file) == (
        f"{file} is truncated or not a safetensors file: its header should have 100000000 bytes, "
        f"but only 2 follow"
    )


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 2**63, 2**64 - 1])
def test_a_header_over_the_limit_is_refused_before_it_is_read(file: Path, length: int) -> None:
    file.write_bytes(struct.pack("<Q", length))
    os.truncate(file, 3 * MAX_HEADER)  # a sparse file: the header would fit in
    tracemalloc.start()
    try:
        sentence = refusal(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sentence == (
        f"{file} is not a safetensors file: its first 8 bytes give a header of {length} bytes, "
        f"over the limit of 100000000"
    )
    assert peak < 1_000_000


# Headers that are none


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"", "Expecting value"),
        (b'{"t":', "Expecting value"),
        (b"{'t': 1}", "Expecting property name"),
        (b'{"t":{}} x', "Extra data"),
        (b'{"t":{}}\0', "Extra data"),
        (b'{"\xff":1}', "'utf-8' codec can't decode byte 0xff"),
        (b'{"\xed\xa0\x80":1}', "'utf-8' codec can't decode"),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM"),
        ('{"t":1}'.encode("utf-16"), "'utf-8' codec can't decode"),
        (rb'{"\ud800":1}', "'utf-8' codec can't encode character '\\ud800'"),
        (rb'{"__metadata__":{"k":"\udfff x"}}', "'utf-8' codec can't encode character '\\udfff'"),
        (b'{"a\tb":1}', "Invalid control character"),
        (b'{"t":NaN}', "NaN is not JSON"),
        (b'{"t":-Infinity}', "-Infinity is not JSON"),
    ],
)
def test_a_header_that_is_not_json_is_told(file: Path, header: bytes, why: str) -> None:
    file.write_bytes(raw(header))
    assert refusal(file).startswith(f"{file}: the header is not JSON: {why}")


def with_shape(shape: object) -> dict[str, object]:
    return {"t": {**ONE, "shape": shape}}


def with_offsets(*offsets: object) -> dict[str, object]:
    return {"t": {**ONE, "data_offsets": list(offsets)}}


KEYS = "['dtype', 'shape', 'data_offsets'] were expected"
UNSOUND: dict[str, tuple[object, str]] = {
    "nested lists": (b"[" * 100_000 + b"]" * 100_000, "the header is nested too deeply"),
    "nested objects": (b'{"t":' * 100_000, "the header is nested too deeply"),
    "a number of 5000 digits": (b'{"t":' + b"9" * 5000 + b"}", "the header is not JSON: "),
    "a list": ([], "the header is a JSON list, not an object"),
    "a string": ("t", "the header is a JSON str, not an object"),
    "a name twice": (
        b'{"t":%b,"t":%b}' % ((json.dumps(ONE).encode(),) * 2),
        "the header has the name 't' twice",
    ),
    "a name twice, once by an escape": (
        rb'{"t":1,"\u0074":1}',
        "the header has the name 't' twice",
    ),
    "metadata twice": (
        b'{"__metadata__":{},"__metadata__":{}}',
        "the header has the name '__metadata__' twice",
    ),
    "a metadata key twice": (
        b'{"__metadata__":{"k":"1","k":"2"}}',
        "the header has the name 'k' twice",
    ),
    "a tensor's key twice": (
        b'{"t":{"dtype":"F32","dtype":"F32"}}',
        "the header has the name 'dtype' twice",
    ),
    "metadata numbers": (
        {"__metadata__": {"step": 3}},
        "the header's __metadata__ is not an object of strings",
    ),
    "metadata null": (
        {"__metadata__": {"step": None}},
        "the header's __metadata__ is not an object of strings",
    ),
    "metadata list": ({"__metadata__": []}, "the header's __metadata__ is not an object of"),
    "metadata text": ({"__metadata__": "pt"}, "the header's __metadata__ is not an object of"),
    "an entry that is a number": ({"t": 1}, f"tensor 't' has int where {KEYS}"),
    "an entry that is null": ({"t": None}, f"tensor 't' has NoneType where {KEYS}"),
    "an entry that is a list": ({"t": ["F32", [1], [0, 4]]}, f"tensor 't' has list where {KEYS}"),
    "an entry that is a list of pairs": (
        {"t": [["dtype", "F32"], ["shape", [1]], ["data_offsets", [0, 4]]]},
        f"tensor 't' has list where {KEYS}",
    ),
    "a missing key": (
        {"t": {"dtype": "F32", "shape": [1]}},
        f"tensor 't' has ['dtype', 'shape'] where {KEYS}",
    ),
    "an unknown key": (
        {"t": {**ONE, "strides": [1]}},
        f"tensor 't' has ['data_offsets', 'dtype', 'shape', 'strides'] where {KEYS}",
    ),
    "an unknown dtype": (
        {"t": {**ONE, "dtype": "F63"}},
        "tensor 't' has the unknown dtype 'F63'; did you mean 'F",
    ),
    "a dtype in small letters": (
        {"t": {**ONE, "dtype": "float32"}},
        "tensor 't' has the unknown dtype 'float32'",
    ),
    "a dtype that is a number": (
        {"t": {**ONE, "dtype": 32}},
        "tensor 't' has the unknown dtype 32",
    ),
    "a dtype that is an object": (
        {"t": {**ONE, "dtype": {"F32": None}}},
        "tensor 't' has the unknown dtype ",
    ),
    "a shape that is an object": ({"t": {**ONE, "shape": {"k": 1}}}, "tensor 't' has the shape "),
    "offsets that are an object": (
        {"t": {**ONE, "data_offsets": {"start": 0, "stop": 4}}},
        "tensor 't' has the data_offsets ",
    ),
    "a dtype that is a list": (
        {"t": {**ONE, "dtype": ["F32"]}},
        "tensor 't' has the unknown dtype ['F32']",
    ),
    "a shape that is a number": (with_shape(1), "tensor 't' has the shape 1, not a list of sizes"),
    "a shape with a negative size": (
        with_shape([-1]),
        "tensor 't' has the shape [-1], not a list of sizes",
    ),
    "a shape with minus zero": (
        b'{"t":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}',
        "tensor 't' has the shape [-0",
    ),
    "a negative offset": (
        with_offsets(-4, 0),
        "tensor 't' has the data_offsets [-4, 0], not [start, end]",
    ),
    "a shape with a float": (
        with_shape([1.0]),
        "tensor 't' has the shape [1.0], not a list of sizes",
    ),
    "a shape with a bool": (
        with_shape([True]),
        "tensor 't' has the shape [True], not a list of sizes",
    ),
    "a shape with a text": (
        with_shape(["1"]),
        "tensor 't' has the shape ['1'], not a list of sizes",
    ),
    "a shape with null": (
        with_shape([None]),
        "tensor 't' has the shape [None], not a list of sizes",
    ),
    "a nested shape": (
        with_shape([[1]]),
        "tensor 't' has the shape [[1]], not a list of sizes",
    ),
    "a size of 2^64": (
        with_shape([2**64]),
        "tensor 't' has the shape [18446744073709551616], not a list of sizes",
    ),
    "a size of 10^400": (with_shape([10**400]), f"tensor 't' has the shape [1{'0' * 58}, "),
    "2^63 x 4 elements": (
        with_shape([2**63, 4]),
        "tensor 't' has the shape [9223372036854775808, 4], more than 2^64 bits",
    ),
    "2^63 x 2 elements, 0 modulo 2^64": (
        with_shape([2**63, 2]),
        "tensor 't' has the shape [9223372036854775808, 2], more than 2^64 bits",
    ),
    "2^40 x 2^40 elements": (
        with_shape([2**40, 2**40]),
        "tensor 't' has the shape [1099511627776, 1099511627776], more than 2^64 bits",
    ),
    "bits that overflow": (
        with_shape([2**59 + 1]),
        "tensor 't' has the shape [576460752303423489], more than 2^64 bits",
    ),
    "a long shape": (with_shape([2] * 70), "tensor 't' has the shape [2, 2, 2, 2, 2,"),
    "offsets that are null": (
        {"t": {**ONE, "data_offsets": None}},
        "tensor 't' has the data_offsets None, not [start, end]",
    ),
    "one offset": (with_offsets(0), "tensor 't' has the data_offsets [0], not [start, end]"),
    "three offsets": (
        with_offsets(0, 4, 8),
        "tensor 't' has the data_offsets [0, 4, 8], not [start, end]",
    ),
    "offsets backwards": (
        with_offsets(4, 0),
        "tensor 't' has the data_offsets [4, 0], not [start, end]",
    ),
    "an offset that is a float": (
        with_offsets(0.0, 4),
        "tensor 't' has the data_offsets [0.0, 4], not [start, end]",
    ),
    "an offset that is a bool": (
        with_offsets(False, 4),
        "tensor 't' has the data_offsets [False, 4], not [start, end]",
    ),
    "an offset of 2^64": (
        with_offsets(2**64, 2**64 + 4),
        "tensor 't' has the data_offsets [18446744073709551616, 18446744073709551620], not [start",
    ),
    "offsets that the shape contradicts": (
        with_shape([2]),
        "tensor 't' of dtype F32 and shape [2] needs 8 bytes, but its data_offsets span 4",
    ),
    "half a byte": (
        {"t": {"dtype": "F4", "shape": [7], "data_offsets": [0, 4]}},
        "tensor 't' has 7 elements of F4: no whole bytes",
    ),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_an_unsound_header_is_told_in_a_sentence(file: Path, case: str) -> None:
    header, reason = UNSOUND[case]
    file.write_bytes(raw(header, FOUR))
    assert refusal(file).startswith(f"{file}: {reason}")


def test_an_unknown_dtype_is_told_with_the_nearest_one(file: Path) -> None:
    file.write_bytes(raw({"t": {**ONE, "dtype": "F8_E4M3FN"}}, FOUR))
    sentence = refusal(file)
    assert sentence.startswith(f"{file}: tensor 't' has the unknown dtype 'F8_E4M3FN'; did you")
    assert "'F8_E4M3'" in sentence


@pytest.mark.parametrize(
    ("first", "second", "size", "reason"),
    [
        ((0, 4), (3, 7), 7, "tensor 'b' overlaps the tensor before it: it starts at byte {3}, not"),
        ((0, 4), (0, 4), 4, "tensor 'b' overlaps the tensor before it: it starts at byte {0}, not"),
        ((0, 4), (8, 12), 12, "tensor 'b' leaves a hole: it starts at byte {8}, not {4}"),
        ((4, 8), (8, 12), 12, "tensor 'a' leaves a hole: it starts at byte {4}, not {0}"),
        ((0, 4), (4, 8), 9, "1 bytes at the end of the file belong to no tensor"),
        ((0, 4), (4, 8), 5, "truncated: 3 bytes of tensor data are missing from the end of the"),
        ((0, 4), (2**62, 2**62 + 4), 8, "tensor 'b' leaves a hole: it starts at byte "),
    ],
    ids=["overlap", "same place", "hole", "hole before", "trailing", "truncated", "far away"],
)
def test_tensors_must_cover_the_data_exactly_once(
    file: Path, first: tuple[int, int], second: tuple[int, int], size: int, reason: str
) -> None:
    header = {
        name: {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
        for name, (start, stop) in (("a", first), ("b", second))
    }
    content = raw(header, bytes(size))
    file.write_bytes(content)
    reason = reason.format(*range(len(content) - size, len(content)))  # {n}: byte n of the data
    assert refusal(file).startswith(f"{file}: {reason}")


def test_a_file_cut_anywhere_is_refused(file: Path) -> None:
    save_file({"a": np.ones(5, np.float32), "b": np.ones(3, np.int8)}, file, {"format": "pt"})
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        refusal(file)
    file.write_bytes(whole)
    assert len(open_checkpoint(file)) == 2


@pytest.mark.parametrize(
    "header",
    [
        with_shape([2**40, 2**40]),
        with_shape([2**62]),
        with_shape([2**33]),
        with_offsets(0, 2**62),
        {"t": {"dtype": "U8", "shape": [2**62], "data_offsets": [0, 2**62]}},
    ],
)
def test_a_huge_tensor_in_a_small_file_allocates_nothing(file: Path, header: object) -> None:
    file.write_bytes(raw(header, FOUR))
    tracemalloc.start()
    try:
        refusal(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize("place", ["dtype", "shape", "data_offsets", "entry", "metadata", "other"])
@pytest.mark.parametrize("brackets", [("[", "]"), ('{"k":', "}")])
def test_nesting_of_any_depth_is_refused_in_a_sentence(
    file: Path, place: str, brackets: tuple[str, str]
) -> None:
    """Depths around the interpreter's limit, where the parser gets through and a repr may not."""
    for depth in [*range(2, 60, 7), *range(880, 1010), 3000, 30_000]:
        deep = brackets[0] * depth + "1" + brackets[1] * depth
        entry = {"dtype": '"F32"', "shape": "[1]", "data_offsets": "[0,4]"} | {place: deep}
        entry.pop("entry", None)
        entry.pop("metadata", None)
        pairs = ",".join(f'"{key}":{value}' for key, value in entry.items())
        text = deep if place == "entry" else f"{{{pairs}}}"
        metadata = f'"__metadata__":{{"k":{deep}}},' if place == "metadata" else ""
        file.write_bytes(raw(f'{{{metadata}"t":{text}}}'.encode(), FOUR))
        with pytest.raises(CheckpointError, match="^" + str(file)):
            open_checkpoint(file)


@pytest.mark.parametrize("shape", [[2**62, 0], [0, 2**62], [2**64 - 1, 0]])
def test_an_empty_tensor_may_have_any_size_that_the_format_allows(
    file: Path, shape: list[int]
) -> None:
    """The reference library opens these too, in either order."""
    file.write_bytes(raw({"t": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}))
    info = open_checkpoint(file).tensors["t"]
    assert (info.shape, info.nbytes, info.elements) == (tuple(shape), 0, 0)


@pytest.mark.parametrize("shape", [[0, 2**62], [0, 2**64 - 1], [1] * 65])
def test_a_shape_that_no_array_can_have_is_told_when_the_tensor_is_read(
    file: Path, shape: list[int]
) -> None:
    size = 0 if 0 in shape else 4
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    file.write_bytes(raw({"t": entry}, FOUR[:size]))
    checkpoint = open_checkpoint(file)
    assert checkpoint.tensors["t"].shape == tuple(shape)
    with pytest.raises(CheckpointError, match=f"^{file}: no array can have the shape "):
        checkpoint["t"]


# Indexes and folders that do not hold together


def test_an_index_that_names_a_missing_shard_is_told_with_the_nearest_file(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"model-00001-of-00002.safetensors": ["a"]})
    rewrite_index(folder / INDEX, {"a": "model-00001-of-00002.safetensors", "b": "model-2.bin"})
    assert refusal(folder).startswith(
        f"{folder / INDEX} names the shard 'model-2.bin', which is not there"
    )
    rewrite_index(folder / INDEX, {"a": "model-00001-of-0002.safetensors"})
    assert refusal(folder) == (
        f"{folder / INDEX} names the shard 'model-00001-of-0002.safetensors', which is not there; "
        f"did you mean 'model-00001-of-00002.safetensors'?"
    )
    (folder / "model-2.bin").mkdir()
    rewrite_index(folder / INDEX, {"b": "model-2.bin"})
    assert "names the shard 'model-2.bin', which is not there" in refusal(folder)


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "sub/../../x.safetensors", "..", "/x.safetensors", "..\\x.safetensors",
     "C:\\x.safetensors", "", ".", "{outside}"],
)  # fmt: skip
def test_an_index_never_leads_out_of_its_folder(tmp_path: Path, shard: str) -> None:
    outside = tmp_path / "x.safetensors"
    save_file({"t": np.ones(1, np.float32)}, outside)
    folder = sharded(tmp_path / "m", {"a.safetensors": ["a"]})
    (folder / "sub").mkdir()
    shard = shard.format(outside=outside)
    rewrite_index(folder / INDEX, {"a": "a.safetensors", "t": shard})
    assert refusal(folder) == (f"{folder / INDEX} names a shard outside its folder: {shard!r}")


def test_an_index_that_names_a_tensor_twice_is_told(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"a.safetensors": ["a"]})
    index = folder / INDEX
    index.write_text('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}')
    assert refusal(folder) == f"{index}: tensor 'a' occurs twice in the index"


def test_an_index_that_places_tensors_where_they_are_not_is_told(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"1.safetensors": ["a"], "2.safetensors": ["b"]})
    index = folder / INDEX
    rewrite_index(index, {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"})
    assert refusal(folder) == (f"{index} places 1 tensor in shards that do not hold them: c")
    rewrite_index(index, {"a": "2.safetensors", "b": "1.safetensors"})
    assert refusal(folder) == (f"{index} places 2 tensors in shards that do not hold them: a, b")


def test_a_shard_with_tensors_that_the_index_does_not_list_is_told(tmp_path: Path) -> None:
    names = [f"t{n}" for n in range(9)]
    folder = sharded(tmp_path / "m", {"a.safetensors": names})
    rewrite_index(folder / INDEX, {"t0": "a.safetensors"})
    assert refusal(folder) == (
        f"{folder / INDEX} does not list 8 tensors that its shards hold: t1, t2, t3, t4, t5 and "
        f"3 more (are shards of another checkpoint left in the folder?)"
    )


def test_two_shards_that_hold_the_same_tensor_are_told(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"1.safetensors": ["a", "c"], "2.safetensors": ["b"]})
    save_file({"b": np.ones(1, np.float32), "a": np.ones(1, np.float32)}, folder / "2.safetensors")
    reason = (
        "1 tensor is both in 1.safetensors and in 2.safetensors (a): "
        "is one of them another checkpoint's?"
    )
    assert refusal(folder) == f"{folder}: {reason}"


def test_one_shard_may_be_spelt_in_two_ways(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"1.safetensors": ["a", "b"]})
    rewrite_index(folder / INDEX, {"a": "1.safetensors", "b": "./1.safetensors"})
    assert list(open_checkpoint(folder)) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", " is not JSON: Expecting value"),
        (b'{"weight_map"', " is not JSON: "),
        (b"\xff\xfe\xfd", " is not JSON: "),
        (b"[" * 100_000, " is n"),
        (b"[]", " has no 'weight_map' from tensor names to shard files, as an index has"),
        (b"{}", " has no 'weight_map' from tensor names to shard files, as an index has"),
        (b'{"weight_map": ["a"]}', " has no 'weight_map' from tensor names to shard files"),
        (b'{"weight_map": {"a": 1}}', " has no 'weight_map' from tensor names to shard files"),
        (b'{"weight_map": {}}', " names no tensors"),
    ],
)
def test_an_index_that_is_none_is_told(tmp_path: Path, text: bytes, reason: str) -> None:
    index = tmp_path / INDEX
    index.write_bytes(text)
    assert refusal(index).startswith(f"{index}{reason}")
    assert refusal(tmp_path).startswith(f"{index}{reason}")


def test_a_damaged_shard_is_told_by_its_own_path(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"1.safetensors": ["a"], "2.safetensors": ["b"]})
    os.truncate(folder / "2.safetensors", (folder / "2.safetensors").stat().st_size - 3)
    assert refusal(folder) == (
        f"{folder / '2.safetensors'}: truncated: 3 bytes of tensor data are missing from the end "
        f"of the file"
    )


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "weights"])
def test_a_folder_with_a_whole_file_and_an_index_is_ambiguous(tmp_path: Path, stem: str) -> None:
    index = f"{stem}.safetensors.index.json"
    folder = sharded(tmp_path / "m", {"1.safetensors": ["a"]}, index)
    save_file({"b": np.ones(1, np.float32)}, folder / f"{stem}.safetensors")
    assert refusal(folder) == (
        f"{folder} holds two checkpoints, {stem}.safetensors and {index}: "
        f"give the path of the one to use"
    )
    assert list(open_checkpoint(folder / index)) == ["a"]
    assert list(open_checkpoint(folder / f"{stem}.safetensors")) == ["b"]


def test_a_folder_with_several_indexes_is_ambiguous(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m", {"a.safetensors": ["a"]}, "y.safetensors.index.json")
    sharded(folder, {"b.safetensors": ["b"]}, "x.safetensors.index.json")
    assert refusal(folder) == (
        f"{folder} holds 4 checkpoints, x, y, a, b: give the path of the one to use"
    )
    assert list(open_checkpoint(folder / "x.safetensors.index.json")) == ["b"]


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path) == f"{tmp_path} holds no .safetensors file and no index"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "G.pth"])
def test_a_folder_with_only_a_pickle_is_told_how_to_convert_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    assert refusal(tmp_path) == (
        f"{tmp_path} holds no .safetensors file and no index "
        f"(convert {name} with `soup convert` first)"
    )


# Changes after opening


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 100)


def replaced(file: Path) -> None:
    """A sound file of other values under the same name: its own header would give other bytes."""
    other = file.with_name("other")
    save_file({"b": np.zeros(1000, np.float32), "a": np.zeros(1000, np.float32)}, other, {"k": "v"})
    os.replace(other, file)


def changed_in_place(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")


@pytest.mark.parametrize("change", [truncated, replaced, changed_in_place])
def test_a_file_that_changed_after_it_was_opened_is_told_when_it_is_read(
    file: Path, change: Callable[[Path], None]
) -> None:
    save_file({"a": np.ones(1000, np.float32), "b": np.ones(1000, np.float32)}, file)
    checkpoint = open_checkpoint(file)
    assert checkpoint["a"].sum() == 1000
    change(file)
    for name in ("a", "b"):
        with pytest.raises(CheckpointError) as caught:
            checkpoint[name]
        assert str(caught.value) == f"{file} changed while it was read: begin again"


def test_opening_reads_the_header_alone(file: Path) -> None:
    """A terabyte of weights opens in an instant: nothing but its header is there to be read."""
    nbytes = 2**40
    header = raw({"t": {"dtype": "BF16", "shape": [2**19, 2**20], "data_offsets": [0, nbytes]}})
    file.write_bytes(header)
    os.truncate(file, len(header) + nbytes)
    tracemalloc.start()
    try:
        checkpoint = open_checkpoint(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert checkpoint.parameters == 2**39
    assert peak < 1_000_000
    assert numpy_dtype(checkpoint.tensors["t"].dtype) == ml_dtypes.bfloat16


# Headers that are large on purpose

MILLIONS = 17 << 20  # bytes: above what is parsed without a look at its form
FLOODS = {
    "lists": (b'{"a":[', b"[],", b"[]]}"),
    "lists in lists": (b'{"a":', b"[", b""),
    "a shape of many sizes": (
        b'{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[',
        b"1,",
        b"1]}}",
    ),
    "many keys of a tensor": (b'{"a":{', b'"k":{},', b'"z":1}}'),
    "members that are no tensors": (b"{", b'"k":1,', b'"z":1}'),
    "an endless string": (b'{"', b"a", b""),
    "escapes": (b'{"', b"\\", b""),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_of_objects_is_refused_before_they_are_made(file: Path, flood: str) -> None:
    """Parsed first, such a header takes thirty times its size, and seconds."""
    start, piece, end = FLOODS[flood]
    header = start + piece * (MILLIONS // len(piece)) + end
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    tracemalloc.start()
    try:
        sentence = refusal(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "the header is no object of tensors" in sentence
    assert peak < 4 * len(header)


def test_a_large_header_is_read_as_a_small_one(file: Path) -> None:
    metadata = {"lineage": json.dumps({"a": [{}] * 100_000}) * 60, "k": 'v\u2028\\"'}
    tensors = {"__metadata__": metadata, "x": ONE}
    header = json.dumps(tensors, indent=3).encode()
    assert len(header) > MILLIONS
    file.write_bytes(struct.pack("<Q", len(header)) + header + FOUR)
    checkpoint = open_checkpoint(file)
    assert checkpoint["x"].tolist() == [1.0]
    assert checkpoint.metadata == metadata
