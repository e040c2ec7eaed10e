"""`modelsoup.torch_convert`: PyTorch pickles become safetensors, bit for bit, and run no code."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict
from importlib import metadata
from pathlib import Path

import pytest
import safetensors.torch as safetensors_torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelsoup import open_checkpoint
from modelsoup.errors import CheckpointError, OutputError, ParameterError, SoupError
from modelsoup.torch_convert import convert

DTYPES = [
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
    "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "int64", "int32", "int16", "int8",
    "uint64", "uint32", "uint16", "uint8", "bool", "complex64",
]  # fmt: skip
# torch itself cannot load newer dtypes from the format that it wrote before 1.6.
LEGACY_DTYPES = [
    name
    for name in DTYPES
    if not name.startswith("float8") and name not in ("uint64", "uint32", "uint16")
]


def bits(tensor):
    plain = tensor.detach().resolve_conj().resolve_neg()
    copy = plain.clone(memory_format=torch.contiguous_format)
    return copy.reshape(-1).view(torch.uint8).tolist()


def random_bits(dtype, shape, seed=0):
    """A tensor of any bit pattern of its dtype, NaN and infinity included."""
    dtype = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(shape, dtype=dtype).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    width = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (size * width,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def assert_holds(output, expected):
    """The output loads in safetensors and is `expected`: names, dtypes, shapes and every bit."""
    loaded = safetensors_torch.load_file(output)
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert loaded[name].shape == tensor.shape, name
        assert bits(loaded[name]) == bits(tensor), name


def converted(folder, content, *, legacy=False, **options):
    torch.save(content, folder / "in.pth", _use_new_zipfile_serialization=not legacy)
    return convert(folder / "in.pth", folder / "out.safetensors", **options)


def refusal(folder, content, kind=CheckpointError, **options):
    """The message with which `content` is refused; no output and no temporary may be left."""
    with pytest.raises(kind) as refused:
        converted(folder, content, **options)
    assert sorted(os.listdir(folder)) == ["in.pth"]
    assert "\n" not in str(refused.value)
    return str(refused.value)


def refusal_of_file(path):
    folder = next(parent for parent in path.parents if parent.is_dir())
    before = sorted(os.listdir(folder))
    with pytest.raises(CheckpointError) as refused:
        convert(path, folder / "out.safetensors")
    assert sorted(os.listdir(folder)) == before
    assert "\n" not in str(refused.value)
    return str(refused.value)


class Calls:
    """Pickled, it asks whoever loads it to call a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# --- what comes out is what went in ------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "legacy"),
    [(dtype, False) for dtype in DTYPES] + [(dtype, True) for dtype in LEGACY_DTYPES],
)
def test_every_dtype_that_torch_and_safetensors_share_round_trips_bit_for_bit(
    tmp_path, dtype, legacy
):
    content = {
        "matrix": random_bits(dtype, (7, 5)),
        "scalar": random_bits(dtype, ()),
        "empty": random_bits(dtype, (0, 3)),
    }
    report = converted(tmp_path, content, legacy=legacy)
    assert_holds(report.output, content)
    assert (report.tensors, report.parameters) == (3, 36)
    assert report.nbytes == 36 * content["matrix"].element_size()


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter("__metadata__".__ne__),
        st.tuples(
            st.sampled_from(LEGACY_DTYPES),
            st.lists(st.integers(0, 4), max_size=4),
            st.integers(0, 2**20),
            st.sampled_from(["as it is", "transposed", "every other row", "a row", "repeated"]),
        ),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
)
def test_any_state_dict_round_trips_whatever_its_names_shapes_and_views(described, legacy):
    content = {}
    for name, (dtype, shape, seed, view) in described.items():
        tensor = random_bits(dtype, tuple(shape), seed)
        if view == "transposed" and tensor.dim() > 1:
            tensor = tensor.transpose(0, -1)
        elif view == "every other row" and tensor.dim():
            tensor = tensor[::2]
        elif view == "a row" and tensor.dim() and len(tensor):
            tensor = tensor[-1]
        elif view == "repeated":
            tensor = tensor.expand(2, *tensor.shape)
        content[name] = tensor
    with tempfile.TemporaryDirectory() as folder:
        report = converted(Path(folder), content, legacy=legacy)
        assert_holds(report.output, content)


def test_the_output_is_one_that_the_reference_library_would_write(tmp_path):
    content = {"b": torch.ones(3), "a": torch.ones(2, 2), "c": torch.ones(5, dtype=torch.int64)}
    report = converted(tmp_path, content)
    reference = tmp_path / "reference.safetensors"
    safetensors_torch.save_file(content, reference, metadata={"format": "pt"})
    assert report.output.read_bytes() == reference.read_bytes()


def test_the_output_opens_as_a_checkpoint_and_says_that_it_is_pytorchs(tmp_path):
    report = converted(tmp_path, {"w": torch.arange(6.0).reshape(2, 3)})
    checkpoint = open_checkpoint(report.output)
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint["w"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_parameters_and_the_buffers_of_a_module_are_converted(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    report = converted(tmp_path, module.state_dict(keep_vars=True))
    assert_holds(report.output, module.state_dict())


def test_conjugated_and_negated_views_are_written_as_their_values(tmp_path):
    values = random_bits("complex64", (4,))
    content = {
        "conjugated": values.conj(),
        "negated": values.clone().conj().imag,
        "one": values[:1].clone().conj().imag,  # counts as contiguous, whatever its stride
    }
    assert content["conjugated"].is_conj() and content["one"].is_neg()
    report = converted(tmp_path, content)
    assert_holds(report.output, content)
    assert not safetensors_torch.load_file(report.output)["conjugated"].is_conj()


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_that_share_a_storage_are_written_in_full_and_reported(tmp_path, legacy):
    base = torch.arange(12.0)
    content = {
        "embedding": base.reshape(3, 4),
        "alone": torch.ones(3),
        "head": base.reshape(3, 4).t(),
        "empty": torch.empty(0),
        "part": base[2:5],
        "also_empty": torch.empty(0),
    }
    report = converted(tmp_path, content, legacy=legacy)
    assert report.shared == (("embedding", "head", "part"),)
    assert_holds(report.output, content)
    assert report.nbytes == 4 * (12 + 3 + 12 + 3)


def test_a_view_of_a_large_storage_takes_only_its_own_bytes(tmp_path):
    report = converted(tmp_path, {"row": torch.ones(1000, 1000)[3]})
    assert report.nbytes == 4000
    assert report.output.stat().st_size < 5000


def test_a_checkpoint_that_another_tool_has_zipped_again_is_read_right(tmp_path):
    content = {"zeros": torch.zeros(1000), "noise": random_bits("uint8", (1000,))}
    torch.save(content, tmp_path / "saved.pth")
    with (
        zipfile.ZipFile(tmp_path / "saved.pth") as saved,
        zipfile.ZipFile(tmp_path / "again.pth", "w", zipfile.ZIP_DEFLATED) as again,
    ):
        for entry in saved.infolist():
            again.writestr(entry.filename, saved.read(entry))
    assert_holds(convert(tmp_path / "again.pth", tmp_path / "out.safetensors").output, content)


@pytest.mark.needs("offline")
def test_real_weights_of_a_package_are_converted_bit_for_bit(tmp_path):
    files = metadata.files("stlpips-pytorch") or []
    (source,) = (file.locate() for file in files if file.name == "alex_shift_tolerant.pth")
    expected = torch.load(source, map_location="cpu", weights_only=True)
    report = convert(source, tmp_path / "alex.safetensors")
    assert report.tensors == len(expected) > 10
    assert report.parameters > 2_000_000
    assert_holds(report.output, expected)


# --- no code runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_with_its_reason(tmp_path, legacy):
    trace = tmp_path / "ran"
    content = {"w": torch.ones(2), "x": Calls(os.system, f"touch {trace}")}
    message = refusal(tmp_path, content, legacy=legacy)
    assert "asks for the Python object 'posix.system', which could run code" in message
    assert "weights_only" not in message  # torch would advise to switch the protection off
    pickle.loads(pickle.dumps(content["x"]))
    assert trace.exists()  # the pickle does bite: the refusal is what kept it from running


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [(eval, ("1",), "eval"), (Path, (".",), "pathlib.Path"), (slice, (1,), "slice")],
)
def test_the_reason_names_what_the_pickle_asks_for(tmp_path, function, arguments, name):
    content = {"w": torch.ones(2), "deep": [{"x": Calls(function, *arguments)}]}
    assert f"the Python object '{name}'" in refusal(tmp_path, content)


def test_a_pickle_of_no_tensors_that_would_run_code_is_refused_too(tmp_path):
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Calls(os.system, "true"), protocol=2))
    assert "'posix.system'" in refusal_of_file(tmp_path / "bare.pth")


def test_a_whole_pickled_module_is_refused_with_what_to_do(tmp_path):
    message = refusal(tmp_path, torch.nn.Linear(2, 2))
    assert "'torch.nn.modules.linear.Linear'" in message
    assert "`torch.save` its state_dict()" in message


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
def test_a_pickle_instruction_that_torch_does_not_know_is_refused_with_its_number(tmp_path):
    (tmp_path / "new.pth").write_bytes(pickle.dumps({"w": 1}, protocol=4))
    assert "(Unsupported operand 149)" in refusal_of_file(tmp_path / "new.pth")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_archive_is_refused_as_code(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    assert "is a TorchScript archive, which is code" in refusal_of_file(tmp_path / "script.pt")


# --- what is no PyTorch checkpoint -------------------------------------------------------------


def test_a_missing_file_is_answered_with_the_nearest(tmp_path):
    assert refusal_of_file(tmp_path / "absent.pth") == f"{tmp_path / 'absent.pth'} does not exist"
    torch.save({"w": torch.ones(2)}, tmp_path / "net_g.pth")
    assert "does not exist; did you mean 'net_g.pth'" in refusal_of_file(tmp_path / "netg.pth")
    assert "does not exist" in refusal_of_file(tmp_path / "no folder" / "net_g.pth")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a PyTorch checkpoint: it is empty"),
        (b"<!DOCTYPE html><html>", "is not a PyTorch checkpoint: it starts with b'<!DOCTYPE ht'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"GGUF\x03\x00\x00\x00", "is not a PyTorch checkpoint: it starts with b'GGUF"),
        (pickle.dumps({"w": 1}, protocol=0), "is not a PyTorch checkpoint: it starts with"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_it_is(tmp_path, content, reason):
    (tmp_path / "model.pth").write_bytes(content)
    assert reason in refusal_of_file(tmp_path / "model.pth")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_a_file_that_is_safetensors_already_is_told_so_whatever_its_name(tmp_path, name):
    safetensors_torch.save_file({"w": torch.ones(3)}, tmp_path / name)
    message = refusal_of_file(tmp_path / name)
    assert message.endswith("is safetensors already: there is nothing to convert")


def test_a_pickle_that_is_named_safetensors_is_to_be_renamed(tmp_path):
    torch.save({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    assert "named .safetensors: rename it to .pth" in refusal_of_file(
        tmp_path / "model.safetensors"
    )


def test_a_zip_file_of_another_kind_is_told_from_pytorchs(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    assert "is a zip file, but not PyTorch's" in refusal_of_file(tmp_path / "model.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, legacy):
    whole, cut = tmp_path / "whole.pth", tmp_path / "cut.pth"
    content = OrderedDict(w=torch.ones(50), b=torch.nn.Parameter(torch.ones(2)))
    torch.save(content, whole, _use_new_zipfile_serialization=not legacy)
    data = whole.read_bytes()
    for length in range(0, len(data) - 1, 7):
        cut.write_bytes(data[:length])
        assert str(cut) in refusal_of_file(cut)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_bytes_are_refused_by_our_own_errors(tmp_path, legacy):
    source, output = tmp_path / "model.pth", tmp_path / "out.safetensors"
    content = {"model": OrderedDict(w=torch.ones(2, 3).t(), n=torch.arange(3)), "lr": (0.1, {1})}
    torch.save(content, source, _use_new_zipfile_serialization=not legacy)
    data = source.read_bytes()
    chance = random.Random(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 3])):
            damaged[chance.randrange(len(data))] = chance.randrange(256)
        source.write_bytes(damaged)
        try:
            convert(source, output, force=True)
        except SoupError as error:
            assert str(source) in str(error)
            refused += 1
    assert refused > 50


# --- which dict is the model -------------------------------------------------------------------


def test_entries_that_are_no_tensors_are_skipped_and_reported(tmp_path):
    weight = torch.ones(2)
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]}
    content = {"w": weight, "epoch": 3, "optimizer": optimizer, "note": None}
    report = converted(tmp_path, content)
    assert_holds(report.output, {"w": weight})
    assert report.key is None
    assert report.skipped == ("epoch", "optimizer", "note")


def test_the_only_nested_dict_of_tensors_is_taken_and_named(tmp_path):
    content = {"epoch": 3, "model": {"arch": "unet", "state_dict": {"w": torch.ones(2), "v": 1}}}
    report = converted(tmp_path, content)
    assert_holds(report.output, {"w": torch.ones(2)})
    assert report.key == "model.state_dict"
    assert report.skipped == ("epoch", "model.arch", "model.state_dict.v")


def test_an_optimizers_state_is_never_taken_for_a_model(tmp_path):
    state = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    report = converted(tmp_path, {"opt_g": state, "opt_d": state, "net": {"w": torch.ones(2)}})
    assert (report.key, report.skipped) == ("net", ("opt_g", "opt_d"))
    report.output.unlink()
    assert "holds the state of an optimizer" in refusal(tmp_path, state)
    assert "holds no tensors" in refusal(tmp_path, {"optimizer": state})
    message = refusal(
        tmp_path, {"optimizer": state, "w": torch.ones(2)}, ParameterError, key="optimizer"
    )
    assert "no dict of tensors under the key 'optimizer'" in message


@pytest.mark.parametrize("names", [("params", "params_ema"), ("generator", "discriminator")])
def test_several_models_are_refused_by_name_until_one_is_chosen(tmp_path, names):
    content = {name: {"w": torch.full((2,), float(i))} for i, name in enumerate(names)}
    message = refusal(tmp_path, content)
    assert f"under 2 keys, {names[0]}, {names[1]}: choose with --key" in message
    for name, other in (names, names[::-1]):
        report = converted(tmp_path, content, key=name, force=True)
        assert_holds(report.output, content[name])
        assert (report.key, report.skipped) == (name, (other,))


def test_tensors_beside_a_dict_of_tensors_are_not_guessed_about(tmp_path):
    content = {"loss": torch.tensor(0.5), "net": {"w": torch.ones(2)}}
    message = refusal(tmp_path, content)
    assert "., net: choose with --key (. is the top level)" in message
    report = converted(tmp_path, content, key="net")
    assert_holds(report.output, content["net"])
    assert (report.key, report.skipped) == ("net", ("loss",))
    report = converted(tmp_path, content, key=".", force=True)
    assert_holds(report.output, {"loss": torch.tensor(0.5)})
    assert (report.key, report.skipped) == (None, ("net",))


def test_a_key_is_a_dotted_path_or_leads_to_the_only_model_beneath(tmp_path):
    content = {
        "ema": {"state_dict": {"w": torch.zeros(2)}},
        "model": {"state_dict": {"w": torch.ones(2)}},
    }
    for key in ("model.state_dict", "model"):
        report = converted(tmp_path, content, key=key, force=True)
        assert_holds(report.output, {"w": torch.ones(2)})
        assert report.key == "model.state_dict"


def test_an_unknown_key_is_answered_with_the_nearest(tmp_path):
    content = {"params": {"w": torch.ones(2)}, "params_ema": {"w": torch.ones(2)}}
    message = refusal(tmp_path, content, ParameterError, key="param_ema")
    assert "under the key 'param_ema'; did you mean 'params_ema'" in message
    message = refusal(tmp_path, content, ParameterError, key="xyz")
    assert "under the key 'xyz' (it has params, params_ema)" in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"epoch": 3, "args": {"lr": 0.1}}, "holds no tensors"),
        ({}, "holds no tensors"),
        ({"layers": [torch.ones(2)]}, "holds no tensors: no dict in it has one as a value"),
        ([torch.ones(2)], "holds one list, not a dict of tensors by their names"),
        (torch.ones(2), "holds one tensor, not a dict of tensors by their names"),
        (3, "holds one int, not a dict"),
    ],
)
def test_what_holds_no_named_tensors_is_refused(tmp_path, content, reason):
    assert reason in refusal(tmp_path, content)


@pytest.mark.parametrize("name", [0, ("a", "b"), "lone surrogate \ud800", "__metadata__"])
def test_a_tensor_whose_name_safetensors_cannot_hold_is_refused(tmp_path, name):
    assert repr(name) in refusal(tmp_path, {"w": torch.ones(2), name: torch.ones(2)})


def test_dicts_that_contain_themselves_end(tmp_path):
    content = {"net": {"w": torch.ones(2)}}
    content["self"] = content
    report = converted(tmp_path, content, key="net")
    assert_holds(report.output, content["net"])


# --- tensors that safetensors has not ----------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize(
    ("make", "dtype", "kind"),
    [
        (lambda: torch.ones(2, dtype=torch.complex128), "torch.complex128", "torch.strided"),
        (lambda: torch.ones(2, dtype=torch.complex32), "torch.complex32", "torch.strided"),
        (lambda: torch.eye(2).to_sparse(), "torch.float32", "torch.sparse_coo"),
        (lambda: torch.eye(2).to_sparse_csr(), "torch.float32", "torch.sparse_csr"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "torch.qint8",
            "torch.strided",
        ),
        (lambda: torch.nested.nested_tensor([torch.ones(2)]), "torch.float32", "nested"),
        (lambda: torch.ones(2, device="meta"), "torch.float32", "meta"),
    ],
)
def test_a_tensor_that_safetensors_cannot_hold_is_named_with_its_dtype(tmp_path, make, dtype, kind):
    message = refusal(tmp_path, {"fine": torch.ones(2), "odd": make()})
    assert f"tensor 'odd' has the dtype {dtype} and is {kind}" in message


# --- prefixes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefixes", list(itertools.permutations(["module.", "_orig_mod.", "_orig_mod.module."]))
)
def test_prefixes_are_stripped_as_often_as_they_stand_there_in_any_order(tmp_path, prefixes):
    content = {
        "_orig_mod.module.conv.weight": torch.ones(1),
        "module._orig_mod.module.module.conv.bias": torch.ones(2),
        "head.module.weight": torch.ones(3),
    }
    report = converted(tmp_path, content, strip_prefixes=prefixes)
    assert {name: len(t) for name, t in safetensors_torch.load_file(report.output).items()} == {
        "conv.weight": 1,
        "conv.bias": 2,
        "head.module.weight": 3,
    }
    assert report.stripped == 2


@pytest.mark.parametrize("prefixes", [["net.", "net.g."], ["net.g.", "net."]])
def test_of_two_prefixes_that_fit_the_longer_is_stripped(tmp_path, prefixes):
    content = {"net.g.w": torch.ones(1), "net.d.w": torch.ones(2)}
    report = converted(tmp_path, content, strip_prefixes=prefixes)
    assert_holds(report.output, {"w": torch.ones(1), "d.w": torch.ones(2)})


def test_a_name_that_is_the_prefix_itself_stays(tmp_path):
    content = {"scale": torch.ones(1), "scale_x": torch.ones(2)}
    report = converted(tmp_path, content, strip_prefixes=["scale"])
    assert_holds(report.output, {"scale": torch.ones(1), "_x": torch.ones(2)})


def test_shared_names_are_reported_without_their_prefixes(tmp_path):
    tied = torch.ones(3)
    content = {"module.head": tied, "module.embedding": tied}
    report = converted(tmp_path, content, strip_prefixes=["module."])
    assert report.shared == (("head", "embedding"),)


def test_names_that_collide_without_their_prefixes_are_named(tmp_path):
    content = {"module.w": torch.ones(1), "w": torch.ones(1), "module.v": torch.ones(1)}
    message = refusal(tmp_path, content, ParameterError, strip_prefixes=["module."])
    assert message == "without their prefixes, module.w, w would all be named 'w'"


def test_a_prefix_that_no_name_has_is_refused_with_the_nearest(tmp_path):
    content = {"module.w": torch.ones(1), "module.v": torch.ones(1)}
    message = refusal(tmp_path, content, ParameterError, strip_prefixes=["module.", "modul."])
    assert message == ("no tensor's name has the prefix 'modul.' to strip; did you mean 'module.'?")
    message = refusal(tmp_path, content, ParameterError, strip_prefixes=["xyz"])
    assert "(they start with module.)" in message
    assert "is empty" in refusal(tmp_path, content, ParameterError, strip_prefixes=[""])


# --- folders -----------------------------------------------------------------------------------


def sharded(folder, shards, weight_map=None):
    folder.mkdir()
    for file_name, content in shards.items():
        torch.save(content, folder / file_name)
    found = {name: file for file, content in shards.items() for name in content}
    index = {"metadata": {}, "weight_map": found if weight_map is None else weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


TWO_SHARDS = {
    "pytorch_model-00001-of-00002.bin": {"a": [1.0, 2.0], "b": [3.0]},
    "pytorch_model-00002-of-00002.bin": {"c": [4.0, 5.0, 6.0]},
}


@pytest.fixture
def shards():
    return {
        file: {name: torch.tensor(values) for name, values in content.items()}
        for file, content in TWO_SHARDS.items()
    }


def test_a_folder_with_one_file_is_converted(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    report = convert(tmp_path, tmp_path / "out.safetensors")
    assert_holds(report.output, {"w": torch.ones(2)})


def test_a_folder_of_shards_becomes_one_file(tmp_path, shards):
    folder = sharded(tmp_path / "model", shards)
    expected = {name: tensor for content in shards.values() for name, tensor in content.items()}
    for source in (folder, folder / "pytorch_model.bin.index.json"):
        report = convert(source, tmp_path / "out.safetensors", force=True)
        assert_holds(report.output, expected)
        assert report.tensors == 3


def test_shards_may_nest_their_tensors_under_the_same_key(tmp_path, shards):
    weight_map = {name: file for file, content in shards.items() for name in content}
    nested = {file: {"net": content, "step": 1} for file, content in shards.items()}
    report = convert(sharded(tmp_path / "model", nested, weight_map), tmp_path / "out.safetensors")
    assert (report.tensors, report.key, report.skipped) == (3, "net", ("step",))


def test_a_folder_that_holds_both_is_ambiguous(tmp_path, shards):
    folder = sharded(tmp_path / "model", shards)
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model.bin")
    assert "holds two checkpoints" in refusal_of_file(folder)


def test_a_folder_without_a_checkpoint_names_the_files_it_has(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    message = refusal_of_file(folder)
    assert message.endswith("neither pytorch_model.bin nor pytorch_model.bin.index.json")
    torch.save({"w": torch.ones(2)}, folder / "net_g.pth")
    assert refusal_of_file(folder).endswith("(give the path of a file: net_g.pth)")


@pytest.mark.parametrize("shard", ["../outside.bin", "/outside.bin", "..\\outside.bin", "", "."])
def test_a_shard_outside_the_folder_is_refused(tmp_path, shard):
    torch.save({"w": torch.ones(2)}, tmp_path / "outside.bin")
    folder = sharded(tmp_path / "model", {}, {"w": shard.replace("/out", f"{tmp_path}/out", 1)})
    message = refusal_of_file(folder)
    assert "names a shard outside its folder" in message


def test_a_shard_that_is_a_link_inside_the_folder_is_followed(tmp_path, shards):
    folder = sharded(tmp_path / "model", shards)
    for file in list(folder.glob("*.bin")):
        moved = file.rename(tmp_path / file.name)
        file.symlink_to(moved)
    assert convert(folder, tmp_path / "out.safetensors").tensors == 3


def test_a_missing_shard_is_answered_with_the_nearest(tmp_path, shards):
    weight_map = {"a": "pytorch_model-00001-of-00003.bin"}
    message = refusal_of_file(sharded(tmp_path / "model", shards, weight_map))
    assert "names the shard 'pytorch_model-00001-of-00003.bin', which is not there; did" in message


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"c": None}, "c"),
        ({"d": "pytorch_model-00001-of-00002.bin"}, "d"),
        ({"b": "pytorch_model-00002-of-00002.bin"}, "b"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, shards, change, wrong):
    weight_map = {name: file for file, content in shards.items() for name in content}
    weight_map = {n: s for n, s in (weight_map | change).items() if s is not None}
    if wrong == "c":
        shards["pytorch_model-00001-of-00002.bin"]["c"] = torch.ones(1)
    message = refusal_of_file(sharded(tmp_path / "model", shards, weight_map))
    assert f"does not place 1 tensors where its shards hold them: {wrong} " in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "has no 'weight_map'"),
        ('{"weight_map": {}}', "names no tensors"),
        ('{"weight_map": {"w": 1}}', "has no 'weight_map'"),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, text, reason):
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    assert reason in refusal_of_file(tmp_path)


# --- the output --------------------------------------------------------------------------------


def test_an_existing_output_is_kept_unless_forced(tmp_path):
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists"):
        converted(tmp_path, {"w": torch.ones(2)})
    assert output.read_bytes() == b"precious"
    converted(tmp_path, {"w": torch.ones(2)}, force=True)
    assert_holds(output, {"w": torch.ones(2)})


def test_an_existing_output_is_told_before_the_source_is_read(tmp_path):
    (tmp_path / "out.safetensors").write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists"):
        convert(tmp_path / "absent.pth", tmp_path / "out.safetensors")


def test_an_output_of_another_suffix_is_refused(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "in.pth")
    with pytest.raises(OutputError, match=r"out\.bin must end in \.safetensors"):
        convert(tmp_path / "in.pth", tmp_path / "out.bin")


def test_a_tensor_larger_than_the_disk_is_refused_before_it_is_made(tmp_path):
    message = refusal(tmp_path, {"w": torch.ones(1).expand(2**45)}, OutputError)
    assert "the disk has only" in message


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_midway_leaves_no_output(tmp_path, stop):
    # 4 GB to write, out of a file of some kilobytes, so that the signal comes in the middle.
    large = {f"w{i}": torch.ones(1).expand(2**24) for i in range(64)}
    torch.save(large, tmp_path / "in.pth")
    run = "import sys; from modelsoup.torch_convert import convert; convert(*sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", run, "in.pth", "out.safetensors"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.DEVNULL,
    ) as process:
        while not list(tmp_path.glob(".out.safetensors.*")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(stop)
    assert process.returncode == -stop
    assert not (tmp_path / "out.safetensors").exists()
    if stop == signal.SIGKILL:  # nothing can clean up after it but the next run
        converted(tmp_path, {"w": torch.ones(2)})
        (tmp_path / "out.safetensors").unlink()
    assert os.listdir(tmp_path) == ["in.pth"]


def test_without_pytorch_the_extra_to_install_is_named(tmp_path):
    run = (
        "import sys; sys.modules['torch'] = None\n"  # as Python marks a module that is not there
        "from modelsoup.errors import SoupError\n"
        "from modelsoup.torch_convert import convert\n"
        "try: convert('in.pth', 'out.safetensors')\n"
        "except SoupError as error: print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", run],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == "soup convert needs PyTorch: install modelsoup[torch]\n"
