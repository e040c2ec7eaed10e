"""`soup convert`: PyTorch pickles become safetensors, bit for bit, and run no code."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import functools
import itertools
import json
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch as safetensors_torch
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from modelsoup import open_checkpoint
from modelsoup.errors import CheckpointError, OutputError, ParameterError, SoupError
from modelsoup.files.torch_convert import convert
from modelsoup.terminal.cli import main

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


def paths(report):
    return [entry.path for entry in report.skipped]


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
    [
        (eval, ("1",), "builtins.eval"),
        (__import__, ("os",), "builtins.__import__"),
        (open, ("/etc/passwd",), f"{open.__module__}.open"),
        (subprocess.call, (["true"],), "subprocess.call"),
    ],
)
def test_the_reason_names_what_the_pickle_asks_for(tmp_path, function, arguments, name):
    content = {"w": torch.ones(2), "deep": [{"x": Calls(function, *arguments)}]}
    assert f"the Python object '{name}'" in refusal(tmp_path, content)


def test_a_pickle_of_no_tensors_that_would_run_code_is_refused_too(tmp_path):
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Calls(os.system, "true"), protocol=2))
    assert "'posix.system'" in refusal_of_file(tmp_path / "bare.pth")


def test_a_whole_pickled_module_is_refused_with_what_to_do(tmp_path):
    message = refusal(tmp_path, torch.nn.Linear(2, 2))
    assert "holds one torch.nn.modules.linear.Linear, not a dict of tensors" in message
    assert "`torch.save` its state_dict()" in message


def test_a_pickle_instruction_that_torch_does_not_know_is_refused_with_its_number(tmp_path):
    (tmp_path / "new.pth").write_bytes(pickle.dumps({"w": 1}, protocol=4))
    assert "has the instruction 149, unknown to torch's loader" in refusal_of_file(
        tmp_path / "new.pth"
    )


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
    assert paths(report) == ["epoch", "optimizer", "note"]


def test_the_only_nested_dict_of_tensors_is_taken_and_named(tmp_path):
    content = {"epoch": 3, "model": {"arch": "unet", "state_dict": {"w": torch.ones(2), "v": 1}}}
    report = converted(tmp_path, content)
    assert_holds(report.output, {"w": torch.ones(2)})
    assert report.key == "model.state_dict"
    assert paths(report) == ["epoch", "model.arch", "model.state_dict.v"]


def test_an_optimizers_state_is_never_taken_for_a_model(tmp_path):
    state = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    report = converted(tmp_path, {"opt_g": state, "opt_d": state, "net": {"w": torch.ones(2)}})
    assert (report.key, paths(report)) == ("net", ["opt_g", "opt_d"])
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
    assert f"under 2 keys, {names[0]}, {names[1]}: choose with key=…" in message
    for name, other in (names, names[::-1]):
        report = converted(tmp_path, content, key=name, force=True)
        assert_holds(report.output, content[name])
        assert (report.key, paths(report)) == (name, [other])


def test_tensors_beside_a_dict_of_tensors_are_not_guessed_about(tmp_path):
    content = {"mean": torch.ones(3), "net": {"w": torch.ones(2)}}
    message = refusal(tmp_path, content)
    assert "., net: choose with key=… (. is the top level)" in message
    report = converted(tmp_path, content, key="net")
    assert_holds(report.output, content["net"])
    assert (report.key, paths(report)) == ("net", ["mean"])
    report = converted(tmp_path, content, key=".", force=True)
    assert_holds(report.output, {"mean": torch.ones(3)})
    assert (report.key, paths(report)) == (None, ["net"])


def test_numbers_are_no_model_beside_one(tmp_path):
    content = {"best_acc1": torch.tensor(76.2), "state_dict": {"w": torch.ones(2)}}
    report = converted(tmp_path, content)
    assert_holds(report.output, content["state_dict"])
    assert (report.key, paths(report)) == ("state_dict", ["best_acc1"])
    assert report.skipped[0].kind == "tensor"
    content = {"rng": torch.get_rng_state(), "state_dict": {"w": torch.ones(2)}}
    report = converted(tmp_path, content, force=True)
    assert (report.key, paths(report)) == ("state_dict", ["rng"])
    numbers = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    report = converted(tmp_path, {"model": numbers, "step": 3}, force=True)
    assert_holds(report.output, numbers)


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


def test_very_long_names_are_not_told_in_full(tmp_path):
    content = {"k" * 100_000: {"w": torch.ones(2)}, "n" * 100_000: 3}
    report = converted(tmp_path, content)
    assert len(report.key) < 100 and len(paths(report)[0]) < 100
    report.output.unlink()
    assert len(refusal(tmp_path, {"w" * 100_000: torch.ones(2)})) < 300


def test_dicts_that_contain_themselves_end(tmp_path):
    content = {"net": {"w": torch.ones(2)}}
    content["self"] = content
    report = converted(tmp_path, content, key="net")
    assert_holds(report.output, content["net"])


# --- what lies beside the weights --------------------------------------------------------------


class Config(dict):
    """As EasyDict, mmcv's ConfigDict and the like: a dict of a class of its own."""

    def __init__(self, **entries):
        super().__init__(**entries)
        self.__dict__.update(entries)


class Stage(enum.Enum):
    TRAIN = "train"
    VALIDATE = "validate"


class Trainer:
    """As a callback or a metric: a class of the training's own code."""

    def __init__(self, **state):
        self.__dict__.update(state)


WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}

NEIGHBOURS = {
    "a numpy scalar": (np.float64(0.5), "numpy.*multiarray.scalar"),
    "a numpy array": (np.arange(4), "numpy.ndarray"),
    "objects in a numpy array": (np.array([{"lr": 1}], dtype=object), "numpy.ndarray"),
    "arguments": (argparse.Namespace(lr=0.1, out=Path("runs")), "argparse.Namespace"),
    "a path": (Path("/runs/7"), "pathlib.*PosixPath"),
    "a time": (datetime.datetime(2026, 1, 2), "datetime.datetime"),
    "a log": (collections.defaultdict(list, loss=[0.5, 0.4]), "dict"),
    "a queue": (collections.deque([1, 2], maxlen=3), "list"),
    "a queue of one": (collections.deque([1]), "list"),
    "a config": (Config(lr=0.1, net=Config(depth=3)), "dict"),
    "a choice": (Stage.VALIDATE, "test_convert.Stage"),
    "a class": (Trainer, "test_convert.Trainer"),
    "an object": (Trainer(step=3, best=None), "test_convert.Trainer"),
    "a function": (functools.partial(max, 1), "functools.partial"),
    "a generator": (random.getstate(), "tuple"),
    "numpy's generator": (np.random.RandomState(0).get_state(), "tuple"),
    "bytes": (b"\xff\0", "bytes|_codecs.encode"),  # as torch 2.4 has it
    "a byte array": (bytearray(b"\xff\0"), "bytearray"),
    "a counter": (collections.Counter("aab"), "dict"),
    "a set": ({1, "a"}, "set"),
    "a dtype": (torch.bfloat16, "torch.dtype"),
    "a shape": (torch.Size([2, 3]), "torch.Size"),
    "a slice": (slice(1, 2), "slice"),
    "choices as keys": ({Stage.TRAIN: 1, Stage.VALIDATE: 2, Trainer: 3, (1, "a"): 4}, "dict"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_what_lies_beside_the_weights_is_left_out_and_named_with_its_class(tmp_path, name, legacy):
    neighbour, kind = NEIGHBOURS[name]
    content = {"state_dict": WEIGHTS, name: neighbour, "deep": {"x": [neighbour]}}
    report = converted(tmp_path, content, legacy=legacy)
    assert_holds(report.output, WEIGHTS)
    assert report.key == "state_dict"
    (left_out, deep) = report.skipped
    assert (left_out.path, left_out.tensors, deep.path) == (name, 0, "deep")
    assert re.fullmatch(kind.replace("*", ".*"), left_out.kind)


def test_weights_in_a_dict_of_a_class_of_its_own_are_converted(tmp_path):
    report = converted(tmp_path, Config(model=Config(**WEIGHTS), epoch=3))
    assert_holds(report.output, WEIGHTS)
    assert (report.key, paths(report)) == ("model", ["epoch"])


CALLED = []


def record():
    CALLED.append(1)


def test_a_function_that_a_pickle_names_is_not_called(tmp_path):
    pickle.loads(pickle.dumps(Calls(record)))
    assert CALLED.pop() == 1  # the pickle does bite
    report = converted(tmp_path, {"w": torch.ones(2), "x": Calls(record)})
    assert CALLED == []
    assert [str(entry) for entry in report.skipped] == ["x (test_convert.record)"]


def trained():
    """A network and the optimizer that trained it."""
    net = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return net, optimizer


def test_tensors_within_objects_that_are_left_out_are_counted(tmp_path):
    net, optimizer = trained()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, float)
    content = {"model": net.state_dict(), "optimizer": optimizer, "plan": [scheduler], "net": net}
    report = converted(tmp_path, content)
    assert_holds(report.output, net.state_dict())
    assert [str(entry) for entry in report.skipped] == [
        "optimizer (torch.optim.adam.Adam, 8 tensors)",
        "plan",  # which holds the optimizer again
        "net (torch.nn.modules.linear.Linear, 2 tensors)",
    ]


def test_a_network_saved_whole_is_refused_with_its_class_and_what_to_do(tmp_path):
    net, _ = trained()
    remedy = "if you trust it, load it yourself and `torch.save` its state_dict()"
    said = "model (torch.nn.modules.linear.Linear, 2 tensors)"
    message = refusal(tmp_path, {"model": net, "epoch": 3})
    assert "holds no tensors but in Python objects, which are not built" in message
    assert said in message and message.endswith(remedy)
    # A number is no model, where there is one that is not read.
    message = refusal(tmp_path, {"model": net, "loss": torch.tensor(0.5)})
    assert f"holds more in {said} than in the tensors under .: to take these" in message
    assert message.endswith(remedy)
    report = converted(tmp_path, {"model": net, "loss": torch.tensor(0.5)}, key=".")
    assert_holds(report.output, {"loss": torch.tensor(0.5)})
    assert [str(entry) for entry in report.skipped] == [said]


def test_weights_that_are_numpy_arrays_are_refused_by_name(tmp_path):
    message = refusal(tmp_path, {"state_dict": {"w": np.ones(3)}})
    assert message.endswith("(it has state_dict.w (numpy.ndarray))")


@pytest.mark.parametrize("mark", ["pytorch-lightning_version", "callbacks"])
def test_a_lightning_files_state_dict_is_the_model_whatever_a_callback_holds(tmp_path, mark):
    net, optimizer = trained()
    content = {
        "state_dict": net.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": {"net": net, "lr": np.float32(0.1)},
        "pytorch-lightning_version": "2.4.0",
        "callbacks": {"Best{'monitor': 'loss'}": {"best": torch.ones(9), "path": Path("x")}},
        "loops": {"fit_loop": {"best": {"k": torch.ones(9)}}},
    }
    content = {n: v for n, v in content.items() if n == mark or n not in ("callbacks", "loops")}
    report = converted(tmp_path, content)
    assert_holds(report.output, net.state_dict())
    assert report.key == "state_dict"
    assert set(paths(report)) == content.keys() - {"state_dict"}
    if mark == "callbacks":
        assert converted(tmp_path, content, key="callbacks", force=True).parameters == 9


def test_arguments_of_a_training_are_told_from_a_model(tmp_path):
    message = refusal(tmp_path, Trainer(learning_rate=0.1))
    assert message.endswith("holds one test_convert.Trainer, not a dict of tensors by their names")


def test_attributes_that_a_pickle_sets_do_not_stand_before_methods(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    weight.detach = weight.numel = weight.contiguous = "of no use"
    report = converted(tmp_path, {"w": weight})
    assert_holds(report.output, {"w": torch.ones(2)})


def test_tensors_among_the_attributes_of_a_dict_are_told_of(tmp_path):
    content = OrderedDict(w=torch.ones(2), epoch=3)
    content.averages = [torch.ones(2)]
    content._metadata = {"version": 2}
    report = converted(tmp_path, content)
    said = ["epoch", "attribute averages (list, 1 tensor)"]
    assert [str(entry) for entry in report.skipped] == said


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


def test_tensors_without_elements_are_converted_and_named(tmp_path):
    content = {"w": torch.ones(2), "shard": torch.empty(0), "none": torch.empty(0, 3)}
    report = converted(tmp_path, content)
    assert_holds(report.output, content)
    assert report.empty == ("shard", "none")


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


def test_a_prefix_without_its_dot_is_refused_and_the_one_that_is_named_takes_both_off(tmp_path):
    """It once made `.w`, and exited with 0, where `soup merge` refused it."""
    content = {"module.w": torch.ones(1), "module.module.v": torch.ones(1)}
    message = refusal(tmp_path, content, ParameterError, strip_prefixes=["module"])
    assert message == (
        "without the prefix 'module', 'module.w' would be '.w', which is no name ('module.' takes "
        "the dot off too)"
    )
    report = converted(tmp_path, content, strip_prefixes=["module."])
    assert safetensors_torch.load_file(report.output).keys() == {"w", "v"}
    content = {"module..w": torch.ones(1)}  # it was none before
    report = converted(tmp_path, content, strip_prefixes=["module."], force=True)
    assert safetensors_torch.load_file(report.output).keys() == {".w"}


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


def test_one_shard_is_half_a_model_and_not_converted(tmp_path, shards):
    folder = sharded(tmp_path / "model", shards)
    for name in shards:
        with pytest.raises(CheckpointError) as caught:
            convert(folder / name, tmp_path / "out.safetensors")
        assert f"{name} is one of 2 shards, not a whole checkpoint: give its folder" in str(
            caught.value
        )
    assert not (tmp_path / "out.safetensors").exists()
    torch.save({"w": torch.ones(1)}, tmp_path / "model-00001-of-00001.bin")
    assert convert(tmp_path / "model-00001-of-00001.bin", tmp_path / "one.safetensors").tensors == 1


def test_shards_may_nest_their_tensors_under_the_same_key(tmp_path, shards):
    weight_map = {name: file for file, content in shards.items() for name in content}
    nested = {file: {"net": content, "step": 1} for file, content in shards.items()}
    report = convert(sharded(tmp_path / "model", nested, weight_map), tmp_path / "out.safetensors")
    assert (report.tensors, report.key, paths(report)) == (3, "net", ["step"])


def test_a_folder_that_holds_both_is_ambiguous(tmp_path, shards):
    folder = sharded(tmp_path / "model", shards)
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model.bin")
    said = "holds 2 checkpoints, pytorch_model.bin, pytorch_model.bin.index.json: give the path"
    assert said in refusal_of_file(folder)


def test_a_folder_without_a_checkpoint_names_the_files_it_has(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    message = refusal_of_file(folder)
    assert message.endswith("neither pytorch_model.bin nor pytorch_model.bin.index.json")
    torch.save({"w": torch.ones(2)}, folder / "net_g.pth")
    assert refusal_of_file(folder).endswith(f"(give the path of a file: {folder / 'net_g.pth'})")
    safetensors_torch.save_file({"w": torch.ones(3)}, folder / "model.safetensors")
    assert refusal_of_file(folder).endswith("(it holds safetensors already)")


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
    assert f"does not place 1 tensor where its shards hold them: {wrong} " in message


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


# --- folders to folders ------------------------------------------------------------------------


def model_folder(folder, name="pytorch_model.bin", content=None):
    """A model folder as people have them: weights, a config, a tokenizer in a folder, a card."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 2}')
    (folder / "tokenizer" / "vocab.txt").write_text("a b c")
    (folder / "README.md").write_text("the card of the original")
    (folder / "optimizer.pt").write_bytes(b"large")
    torch.save(WEIGHTS if content is None else content, folder / name)
    return folder


def files_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("name", "converted_name"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"),
        ("adapter_model.bin", "adapter_model.safetensors"),
        ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
        ("pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors"),
        ("pytorch_model.fp16.bin", "model.fp16.safetensors"),
    ],
)
def test_a_folder_becomes_a_folder_with_config_and_tokenizer(tmp_path, name, converted_name):
    source = model_folder(tmp_path / "in", name)
    before = {path: (source / path).read_bytes() for path in files_in(source)}
    report = convert(source, tmp_path / "out")
    assert (report.output, report.source) == (tmp_path / "out", source / name)
    assert files_in(tmp_path / "out") == sorted(
        ["config.json", "tokenizer/vocab.txt", converted_name]
    )
    assert (tmp_path / "out" / "config.json").read_text() == '{"hidden_size": 2}'
    assert_holds(tmp_path / "out" / converted_name, WEIGHTS)
    assert open_checkpoint(tmp_path / "out").metadata["format"] == "pt"
    assert before == {path: (source / path).read_bytes() for path in files_in(source)}


def test_a_folders_weights_are_divided(tmp_path, shards):
    source = sharded(tmp_path / "in", shards)
    report = convert(source, tmp_path / "out", shard_size=12)
    shard_names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert files_in(tmp_path / "out") == [*shard_names, "model.safetensors.index.json"]
    read = open_checkpoint(tmp_path / "out")
    assert {name: list(read[name]) for name in read} == {
        name: values for content in TWO_SHARDS.values() for name, values in content.items()
    }
    assert report.nbytes == 24
    for size, wrong in ((0, "must be positive"), ("much", "is not a size")):
        with pytest.raises(ParameterError, match=wrong):
            convert(source, tmp_path / "other", shard_size=size)
    with pytest.raises(ParameterError, match=r"divides a folder, and .* is one file"):
        convert(source, tmp_path / "other.safetensors", shard_size=12)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_a_converted_folder_is_replaced_when_forced_and_no_other_is(tmp_path):
    source = model_folder(tmp_path / "in")
    convert(source, tmp_path / "out")
    torch.save({"w": torch.zeros(1)}, source / "pytorch_model.bin")
    with pytest.raises(OutputError, match="exists and is not empty"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", force=True)
    assert_holds(tmp_path / "out" / "model.safetensors", {"w": torch.zeros(1)})
    theirs = model_folder(tmp_path / "theirs")
    with pytest.raises(OutputError, match="was not written by modelsoup"):
        convert(source, theirs, force=True)
    for output in (source, source / ".." / "in", tmp_path):
        with pytest.raises(OutputError, match=r"not written by modelsoup|what is converted"):
            convert(source, output, force=True)
    inside = convert(source, source / "out")
    assert files_in(inside.output) == ["config.json", "model.safetensors", "tokenizer/vocab.txt"]


def test_a_variant_is_taken_only_where_there_is_nothing_plain(tmp_path):
    source = model_folder(tmp_path / "in")
    half = {"w": torch.zeros(2, dtype=torch.float16)}
    torch.save(half, source / "pytorch_model.fp16.bin")
    report = convert(source, tmp_path / "out.safetensors")
    assert report.source.name == "pytorch_model.bin"
    assert_holds(report.output, WEIGHTS)
    torch.save(half, source / "pytorch_model.ema.bin")
    (source / "pytorch_model.bin").unlink()
    report.output.unlink()
    message = refusal_of_file(source)
    assert "holds 2 checkpoints, pytorch_model.ema.bin, pytorch_model.fp16.bin: give" in message


def test_the_index_of_a_variant_is_taken_where_there_is_nothing_plain(tmp_path, shards):
    source = sharded(tmp_path / "in", shards)
    index = source / "pytorch_model.bin.index.json"
    index.rename(source / "pytorch_model.bin.index.fp16.json")
    report = convert(source, tmp_path / "out")
    assert report.tensors == 3
    assert (tmp_path / "out" / "model.fp16.safetensors").exists()


def test_two_families_in_a_folder_are_not_guessed_about(tmp_path):
    source = model_folder(tmp_path / "in")
    torch.save(WEIGHTS, source / "adapter_model.bin")
    assert "holds 2 checkpoints, adapter_model.bin, pytorch_model.bin" in refusal_of_file(source)


def test_weights_in_sub_folders_are_told_of(tmp_path):
    source = model_folder(tmp_path / "in")
    (source / "2_Dense").mkdir()
    torch.save(WEIGHTS, source / "2_Dense" / "pytorch_model.bin")
    assert convert(source, tmp_path / "out").parts == ("2_Dense",)
    assert convert(source, tmp_path / "one.safetensors").parts == ("2_Dense",)
    # As the command advises:
    assert_holds(convert(source / "2_Dense", tmp_path / "dense.safetensors").output, WEIGHTS)
    (source / "pytorch_model.bin").unlink()
    (source / "optimizer.pt").unlink()
    assert refusal_of_file(source).endswith(
        f"(parts of it do: give the path of {source / '2_Dense'})"
    )


def test_a_folder_of_another_suffix_is_no_folder(tmp_path):
    source = model_folder(tmp_path / "in")
    for name in ("out.bin", "out.ckpt"):
        with pytest.raises(OutputError, match=r"must end in \.safetensors, or name a folder"):
            convert(source, tmp_path / name)
    assert os.listdir(tmp_path) == ["in"]


# --- what the command says ---------------------------------------------------------------------


def said(*arguments, code=0):
    result = CliRunner().invoke(main, ["convert", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output.splitlines()


def test_the_command_says_what_was_taken_and_what_was_not(tmp_path):
    tied = torch.ones(2)
    weights = {"w": tied, "v": tied, "e": torch.empty(0)}
    content = {"state_dict": weights, "args": argparse.Namespace(lr=1), "epoch": 3}
    source = model_folder(tmp_path / "in", content=content)
    model_folder(source / "part")
    output = tmp_path / "out"
    first, *notes = said(source, output)
    assert first == f"{output}: 3 tensors, 16 bytes"
    assert notes[:3] == [
        f"note: read {source / 'pytorch_model.bin'}",
        "note: took the state dict under 'state_dict'",
        "warning: left out: args (argparse.Namespace), epoch",
    ]
    assert notes[3].startswith("warning: without elements: e (")
    assert notes[4].startswith("warning: not converted: the weights in part; ")
    assert notes[5:] == ["note: share memory, and are written as copies: w, v"]
    one_file = said(source, tmp_path / "out.safetensors")
    assert "note: config and tokenizer were not copied; with a folder as OUT they are" in one_file
    many = {f"k{i}": i for i in range(9)}
    torch.save({**many, "w": tied}, tmp_path / "in.pth")
    lines = said(tmp_path / "in.pth", tmp_path / "many.safetensors")
    assert lines[1:] == ["warning: left out: k0, k1, k2, k3, k4 and 4 more"]


def test_the_commands_hints_can_be_followed_to_the_letter(tmp_path):
    content = {"params": {"w": torch.zeros(2)}, "params_ema": {"w": torch.ones(2)}}
    torch.save(content, tmp_path / "in.pth")
    output = tmp_path / "out.safetensors"
    (line,) = said(tmp_path / "in.pth", output, code=1)
    assert line.endswith("under 2 keys, params, params_ema: choose with --key KEY")
    said(tmp_path / "in.pth", output, "--key", "params_ema")
    assert_holds(output, content["params_ema"])
    (line,) = said(tmp_path / "in.pth", output, "--key", "params", code=1)
    assert line.endswith("(--force replaces it)")
    said(tmp_path / "in.pth", output, "--key", "params", "--force")
    assert_holds(output, content["params"])
    (line,) = said(tmp_path, tmp_path / "o.safetensors", "--shard-size", "1GB", code=1)
    assert (
        line
        == f"Error: --shard-size SIZE divides a folder, and {tmp_path}/o.safetensors is one file"
    )


# --- files that are none -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a pipe", "a link to a pipe", "a device", "a socket"])
def test_only_regular_files_are_opened(tmp_path, kind):
    path = tmp_path / "in.pth"
    if "pipe" in kind:
        os.mkfifo(tmp_path / "pipe")
    if kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a socket":
        bound = socket.socket(socket.AF_UNIX)
        bound.bind(os.path.relpath(path))  # a socket's path must be short
        bound.close()
    else:
        path.symlink_to(tmp_path / "pipe")
    message = refusal_of_file(tmp_path / "pipe" if kind == "a pipe" else path)
    assert message.startswith("cannot read ")
    if kind != "a socket":  # which cannot even be opened
        assert message.endswith("it is not a regular file")


@pytest.mark.parametrize("change", ["written to", "replaced", "removed"])
def test_a_file_that_is_changed_while_it_is_converted_makes_no_output(tmp_path, change):
    source, output = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save(slow_to_write(), source)
    with ThreadPoolExecutor() as pool:
        converting = pool.submit(convert, source, output)
        while not list(tmp_path.glob(".out.safetensors.*")):
            assert not converting.done() or converting.exception() is None
        if change == "written to":
            with source.open("ab") as file:
                file.write(b"more")
        elif change == "replaced":
            torch.save({"w": torch.ones(1)}, tmp_path / "new.pth")
            os.replace(tmp_path / "new.pth", source)
        else:
            source.unlink()
        error = converting.exception()
    assert isinstance(error, CheckpointError)
    assert str(error) == f"{source} was changed while it was converted: do it again"
    assert not output.exists() and not list(tmp_path.glob(".out*"))


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


def slow_to_write():
    """A GB to write, out of a file of 64 MB, so that something can happen in the middle."""
    shared = torch.ones(2**24)
    return {f"w{i}": shared for i in range(16)}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_midway_leaves_no_output(tmp_path, stop):
    torch.save(slow_to_write(), tmp_path / "in.pth")
    run = "import sys; from modelsoup.files.torch_convert import convert; convert(*sys.argv[1:])"
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


@pytest.mark.skipif(sys.platform != "linux", reason="platform: the limit holds on Linux")
def test_want_of_memory_is_told_and_leaves_no_output(tmp_path):
    torch.save({"large": torch.ones(5000, 10_000).t()}, tmp_path / "in.pth")
    run = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from modelsoup.errors import SoupError\n"
        "from modelsoup.files.torch_convert import convert\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0])\n"
        "limit = pages * resource.getpagesize() + 300_000_000\n"  # the file fits, a copy does not
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try: convert('in.pth', 'out.safetensors')\n"
        "except SoupError as error: print(error)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", run],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == "there is not enough memory to write the tensor 'large'\n"
    assert os.listdir(tmp_path) == ["in.pth"]


def test_without_pytorch_the_extra_to_install_is_named(tmp_path):
    run = (
        "import sys; sys.modules['torch'] = None\n"  # as Python marks a module that is not there
        "from modelsoup.errors import SoupError\n"
        "from modelsoup.files.torch_convert import convert\n"
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
    assert answer.stdout == (
        "soup convert needs PyTorch: pip install -e '.[torch]' in a clone of modelsoup\n"
    )
