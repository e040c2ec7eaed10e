"""`files.pickles` and `files.torch_load`: hostile pickles are refused before they take anything."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from modelsoup.errors import CheckpointError
from modelsoup.files.pickles import RATIO, PickleError, Survey
from modelsoup.files.torch_convert import convert
from modelsoup.terminal.cli import main

# --- pickles made by hand ------------------------------------------------------------------------


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def named(name):
    """A class or function."""
    module, _, short = name.rpartition(".")
    return f"c{module}\n{short}\n".encode()


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def list_of(*items):
    return b"](" + b"".join(items) + b"e"


def dict_of(**items):
    return b"}(" + b"".join(text(name) + value for name, value in items.items()) + b"u"


def call(name, *arguments):
    return named(name) + tuple_of(*arguments) + b"R"


def storage(count=1, kind="Float", key="0"):
    named_kind = named(f"torch.{kind}Storage")
    parts = (text("storage"), named_kind, text(key), text("cpu"), number(count))
    return tuple_of(*parts) + b"Q"


def tensor(*shape, stride=0, of=None):
    """A tensor whose elements all lie in one place."""
    sizes = tuple_of(*map(number, shape))
    strides = tuple_of(*[number(stride)] * len(shape))
    hooks = named("collections.OrderedDict") + b")R"
    rebuild = "torch._utils._rebuild_tensor_v2"
    return call(rebuild, of or storage(), number(0), sizes, strides, b"\x89", hooks)


HUGE = tensor(2**40)
EMPTY_DICT = named("collections.OrderedDict") + b")R"
REBUILD = "torch._utils._rebuild_"
LATIN = text("latin1")
PARAMETER = "torch.nn.parameter.Parameter"


def repeated(value, instruction, times):
    """A list that holds what an instruction makes, again and again, of one value."""
    return list_of(value + b"q\x07", *[instruction(b"h\x07")] * times)


def twice(times):
    """A tuple of twice a tuple of twice …"""
    return b")" + b"q\x08h\x08\x86" * times


def encoded_again(times):
    value = text("a" * 64)
    for _ in range(times):
        value = call("_codecs.encode", value, text("hex"))
    return value


def sparse(*parts, layout="torch.sparse_coo"):
    made = call("torch.serialization._get_layout", text(layout))
    return call(REBUILD + "sparse_tensor", made, *parts)


def from_type(function, kind, *arguments):
    name = "torch._tensor._rebuild_from_type_v2"
    return call(name, named(function), named(kind), tuple_of(*arguments), b"N")


MANY = b"(" + b"N" * 100_000

BOMBS = {
    "a byte array of 4 GB": call("builtins.bytearray", number(2**32)),
    "the same, of Python 2": call("__builtin__.bytearray", number(2**32)),
    "the same, made otherwise": named("builtins.bytearray") + tuple_of(number(2**32)) + b"\x81",
    "the same, by another function": from_type("builtins.bytearray", "torch.Tensor", number(2**32)),
    "a tensor of 32 GB": call("torch.Tensor", number(2**33)),
    "the same, of another class": call("torch.cuda.sparse.FloatTensor", number(2**33)),
    "a storage of 8 GB": call("torch.storage.UntypedStorage", number(2**33)),
    "bytes twice as long, 40 times": encoded_again(40),
    "a set of a tensor's elements": call("builtins.set", HUGE),
    "a dict of a tensor's rows": call("collections.OrderedDict", tensor(2**40, 2)),
    "a count of a tensor's elements": call("collections.Counter", HUGE),
    "a shape from a tensor": call("torch.Size", HUGE),
    "a set of a storage's elements": call("builtins.set", storage()),
    "a tensor as a dict's state": EMPTY_DICT + HUGE + b"b",
    "a tensor as an object's state": named("no_such.Config") + b")R" + HUGE + b"b(NNu",
    "a tensor among a dict's pairs": call("collections.OrderedDict", list_of(HUGE)),
    "a tensor among a dict's state's pairs": EMPTY_DICT + tuple_of(HUGE) + b"b",
    "the same, in a list": EMPTY_DICT + list_of(HUGE) + b"b",
    "a tensor within a counter's state": (
        call("collections.Counter", b"}") + tuple_of(list_of(HUGE), b"N") + b"b"
    ),
    "a tensor as a parameter's state": call(PARAMETER, tensor(1)) + HUGE + b"b",
    "a tensor in another dtype": call(
        REBUILD + "device_tensor_from_cpu_tensor",
        HUGE, named("torch.float64"), text("cpu"), b"\x89",
    ),
    "indices to be validated": sparse(
        tuple_of(tensor(1, 2**40), HUGE, tuple_of(number(2)), b"\x89")
    ),
    "a sparse tensor whose parts are a tensor's": sparse(HUGE),
    "a sparse tensor of a list of tensors": sparse(tuple_of(list_of(tensor(9)), tensor(9))),
    "a sparse tensor of a tuple of tensors": sparse(tuple_of(tuple_of(tensor(9)), tensor(9))),
    "a quantised tensor of a list of scales": call(
        REBUILD + "qtensor", storage(kind="QInt8"), number(0), tuple_of(number(1)), b")",
        tuple_of(named("torch.per_channel_affine"), list_of(HUGE), list_of(HUGE), number(0)),
        b"\x89", EMPTY_DICT,
    ),
    "a quantised tensor of many scales": call(
        REBUILD + "qtensor", storage(kind="QInt8"), number(0), tuple_of(number(1)), b")",
        tuple_of(named("torch.per_channel_affine"), tensor(2**30), HUGE, number(0)),
        b"\x89", EMPTY_DICT,
    ),
    "a hash of 2^60 steps": b"}" + twice(60) + b"Ns",
    "the same, of a later key": b"}(K\1N" + twice(60) + b"Nu",
    "a hash that calls itself 1,000,000 times": b"})" + b"\x85" * 1_000_000 + b"Ns",
    "one set, copied": repeated(b"](" + MANY[1:] + b"e", lambda v: call("builtins.set", v), 9000),
    "one dict, copied": repeated(
        b"}(" + b"".join(number(i) + b"N" for i in range(9000)) + b"u",
        lambda value: EMPTY_DICT + value + b"b", 9000,
    ),
    "one tuple, given to many": repeated(
        MANY + b"t", lambda value: named("no_such.Thing") + value + b"\x81", 9000
    ),
    "one text, encoded": repeated(
        text("a" * 90_000), lambda value: call("_codecs.encode", value, LATIN), 9000
    ),
    "classes": list_of(*[named(f"no_such.C{i}") for i in range(9000)]),
    "objects of many classes": list_of(
        *[named(f"no_such.C{i}") for i in range(200)],
        named("no_such.C0") + b"q\x09", *[b"h\x09)R"] * 1_000_000,
    ),
    "a text of 4 GB": b"X" + struct.pack("<I", 2**32 - 1) + b"abc",
    "a name without an end": b"c" + b"a" * 5_000_000,
    "a storage of 2^60 elements": tensor(1, of=storage(2**60)),
    "a storage of less than none": tensor(1, of=storage(-5)),
}  # fmt: skip

LARGE = {  # may be loaded
    "dicts in dicts": b"}" + (text("k") + b"}") * 80_000 + b"s" * 80_000,
    "dicts in dicts under one long key": (
        b"}" + text("k" * 900) + b"q\x0a}" + b"h\x0a}" * 9_000 + b"s" * 9_001
    ),
}


def write_zip(path, content, *, method=zipfile.ZIP_STORED, records=(("data/0", b"\0\0\x80?"),)):
    """A file as torch writes it since 1.6, of a pickle without its first and last instruction."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + content + b".")
        archive.writestr("a/byteorder", "little")
        archive.writestr("a/version", "3\n")
        for name, data in records:
            archive.writestr(f"a/{name}", data)
    return path


LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."


def write_legacy(path, content):
    """A file as torch wrote it before 1.6."""
    # Its storages say whether they are views of others.
    content = content.replace(b"cpu" + number(1) + b"t", b"cpu" + number(1) + b"Nt")
    keys = b"\x80\x02" + list_of(text("0")) + b"."
    path.write_bytes(LEGACY + b"\x80\x02" + content + b"." + keys + struct.pack("<qf", 1, 1.0))
    return path


def refusal(path):
    with pytest.raises(CheckpointError) as refused:
        convert(path, path.with_name("out.safetensors"))
    assert os.listdir(path.parent) == [path.name]
    message = str(refused.value)
    assert str(path) in message and "\n" not in message
    return message


# --- bombs ---------------------------------------------------------------------------------------

CASES = [(name, form) for name in (*BOMBS, *LARGE) for form in ("zip", "legacy")]


def measure(folder):
    """Print of each file of a folder what is said of it, in how many seconds and kilobytes."""
    for path in [folder / "first.pth", *sorted(folder.glob("[0-9]*.pth"))]:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        try:
            said = [str(entry) for entry in convert(path, folder / "out.safetensors").skipped]
            (folder / "out.safetensors").unlink()
        except CheckpointError as error:
            said = str(error)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps([path.stem, said, time.monotonic() - start, grown]))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What a process of its own says of each case, whose memory nobody else has filled."""
    folder = tmp_path_factory.mktemp("bombs")
    write_zip(folder / "first.pth", dict_of(w=tensor(1)))
    for place, (name, form) in enumerate(CASES):
        content = dict_of(w=tensor(1), x={**BOMBS, **LARGE}[name])
        write = write_zip if form == "zip" else write_legacy
        write(folder / f"{place}.pth", content)
    run = "import sys, pathlib, test_pickles; test_pickles.measure(pathlib.Path(sys.argv[1]))"
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", run, folder],
        env={**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines = map(json.loads, done.stdout.splitlines())
    return {place: rest for place, *rest in lines}


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_small_file_takes_no_large_memory_and_no_long_time(measured, name, form):
    said, seconds, kilobytes = measured[str(CASES.index((name, form)))]
    if name in LARGE:
        assert said == ["x"]
    else:
        assert "looks damaged or truncated: " in said or "as it could fill the memory (" in said
    assert seconds < 20  # of which torch's import takes none
    assert kilobytes < 200_000


@pytest.mark.parametrize("record", ["data/1", "data.pkl"])
def test_a_zip_file_that_expands_without_measure_is_refused(tmp_path, record):
    zeros = b"\0" * 150_000_000
    content = dict_of(w=tensor(1)) + (b"N" * 150_000_000 if record == "data.pkl" else b"")
    records = [("data/0", b"\0\0\x80?"), *([("data/1", zeros)] if record == "data/1" else [])]
    write_zip(tmp_path / "in.pth", content, method=zipfile.ZIP_DEFLATED, records=records)
    assert (tmp_path / "in.pth").stat().st_size < 1_000_000
    tracemalloc.start()
    message = refusal(tmp_path / "in.pth")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert "as it could fill the memory (it expands to 150,0" in message


def test_a_tensor_of_which_little_is_there_is_written_up_to_sixteen_times_its_file(tmp_path):
    path = tmp_path / "in.pth"
    torch.save({"w": torch.ones(1).expand(5000, 5000)}, path)
    assert convert(path, tmp_path / "out.safetensors").nbytes == 100_000_000
    (tmp_path / "out.safetensors").unlink()
    torch.save({"few": torch.ones(9), "w": torch.ones(1).expand(5000, 5001)}, path)
    message = refusal(path)
    assert "its tensors would take 100,020,036 bytes" in message
    assert "no more than 100,000,000 are made (the largest is 'w', of 100,020,000)" in message
    torch.save({f"w{i}": t for i, t in enumerate([torch.ones(2_000_000)] * 16)}, path)
    assert convert(path, tmp_path / "out.safetensors").nbytes == 128_000_000


# --- what torch's loader does with what stands in ------------------------------------------------


def test_a_module_that_a_pickle_names_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "unheard_of.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    thing = named("unheard_of.Thing") + b")R" + dict_of(lr=number(1)) + b"b"
    path = write_zip(tmp_path / "in.pth", dict_of(w=tensor(1), x=thing))
    report = convert(path, tmp_path / "out.safetensors")
    assert [str(entry) for entry in report.skipped] == ["x (unheard_of.Thing)"]
    assert "unheard_of" not in sys.modules


@pytest.mark.parametrize(
    "name",
    ["os.system", "posix.system", "nt.system", "sys.exit", "subprocess.Popen", "builtins.eval",
     "__builtin__.eval", "commands.getoutput", "builtins.exec", "importlib.import_module",
     "runpy.run_path", "shutil.rmtree", "socket.socket", "io.open", "webbrowser.open"],
)  # fmt: skip
@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_what_would_run_something_is_refused_though_nothing_would_run(tmp_path, name, write):
    path = write(tmp_path / "in.pth", dict_of(w=tensor(1), x=call(name, text("true"))))
    assert ", which could run code when loaded: if you trust it" in refusal(path)


@pytest.mark.parametrize(
    "use",
    [
        b"N",  # as it is
        b")R",
        b")\x81",
        b")R)b",
        b")R}b",
        b"N\x85R",
        b")R]b",
        b")R" + tensor(2**40) + b"b",
        b")R" + tuple_of(tensor(2**40)) + b"b",
        tuple_of(tensor(2**40)) + b"R",
    ],
)
@pytest.mark.parametrize(
    "name", ["no_such.Thing", "no.such", "_._", "builtins.getattr", ".", "é.é"]
)
def test_a_stand_in_takes_whatever_it_is_given(tmp_path, name, use):
    path = write_zip(tmp_path / "in.pth", dict_of(w=tensor(1), x=list_of(named(name) + use)))
    report = convert(path, tmp_path / "out.safetensors", key=".")
    assert [entry.path for entry in report.skipped] == ["x"]


def test_stand_ins_are_not_kept_and_what_the_user_allowed_is(tmp_path):
    class Mine:
        pass

    path = write_zip(tmp_path / "in.pth", dict_of(w=tensor(1), x=named("no_such.Thing") + b")R"))
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([Mine])
    try:
        convert(path, tmp_path / "out.safetensors")
        now = torch.serialization.get_safe_globals()
        assert set(now) == {*before, Mine}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_conversions_at_once_do_not_lose_each_others_stand_ins(tmp_path):
    def convert_one(number_of):
        made = list_of(*[named(f"no_such.C{number_of}") + b")R"] * 3000)
        path = write_zip(tmp_path / f"{number_of}.pth", dict_of(w=tensor(1), x=made))
        return convert(path, tmp_path / f"{number_of}.safetensors").tensors

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(convert_one, range(24))) == [1] * 24


def test_a_tensor_of_a_class_of_its_own_is_refused_by_name(tmp_path):
    made = from_type(REBUILD + "tensor_v2", "fastai.torch_core.TensorImage")
    message = refusal(write_zip(tmp_path / "in.pth", dict_of(w=made)))
    assert "holds a tensor of the class 'fastai.torch_core.TensorImage': if you trust" in message


def test_what_a_pickle_sets_on_a_dict_does_not_stand_before_its_methods(tmp_path):
    shadows = dict_of(items=number(1), keys=number(2), values=number(3), get=number(4))
    content = EMPTY_DICT + shadows + b"b(" + text("w") + tensor(1) + b"u"
    report = convert(write_zip(tmp_path / "in.pth", content), tmp_path / "out.safetensors")
    assert (report.tensors, report.skipped) == (1, ())


def test_what_a_pickle_says_does_not_drive_the_terminal(tmp_path):
    key = "\x1b[2Jepoch\nw: 1 tensors\x9b\u202e"
    made = named("no_such.\x1b[31mThing\r") + b")R"
    content = (
        b"}(" + text(key) + made + text("w\x07") + tensor(1) + text("e\x07") + tensor(0) + b"u"
    )
    path = write_zip(tmp_path / "in.pth", content)
    result = CliRunner().invoke(main, ["convert", str(path), str(tmp_path / "out.safetensors")])
    assert result.exit_code == 0, result.output
    assert all(c.isprintable() or c == "\n" for c in result.output)
    assert result.output.count("\n") == 3  # the result, what is left out, and what is empty
    assert (
        r"left out: \x1b[2Jepoch\nw: 1 tensors\x9b\u202e (no_such.\x1b[31mThing\r)" in result.output
    )
    message = refusal_of_command(path, tmp_path)
    assert message.count("\n") == 1


def refusal_of_command(path, folder):
    (folder / "out.safetensors").unlink()
    content = dict_of(w=call("os.\x1b[31msystem\x07"))
    write_zip(path, content)
    result = CliRunner().invoke(main, ["convert", str(path), str(folder / "out.safetensors")])
    assert result.exit_code == 1
    assert all(c.isprintable() or c == "\n" for c in result.output)
    return result.output


# --- containers that two readers could take for two things ---------------------------------------


def test_a_storage_that_lacks_bytes_is_told_and_no_others_are_read_in_their_place(tmp_path):
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        content = dict_of(w=tensor(4, stride=1, of=storage(4)))
        records = [("data/0", bytes(12)), ("data/secret", bytes(64))]
        write_zip(tmp_path / "in.pth", content, method=method, records=records)
        assert "it has fewer bytes than its storages 0" in refusal(tmp_path / "in.pth")


@pytest.mark.parametrize("twin", ["a/data.pkl", "a/DATA.pkl", "a/Data/0"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_is_there_twice_is_refused(tmp_path, twin):
    path = write_zip(tmp_path / "in.pth", dict_of(w=tensor(1)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(twin, b"\x80\x02}.")
    assert "two of its entries have one name" in refusal(path)


@pytest.mark.parametrize("name", ["a/constants.pkl", "a/CONSTANTS.pkl", "a/b/constants.pkl"])
def test_code_in_an_archive_is_found_however_it_is_spelt(tmp_path, name):
    path = write_zip(tmp_path / "in.pth", dict_of(w=tensor(1)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"\x80\x02).")
    assert "is a TorchScript archive, which is code" in refusal(path)


def test_an_archive_behind_another_is_not_taken_for_it(tmp_path):
    """zipfile looks for the directory just before its end, torch where the end says it is."""
    inner = write_zip(tmp_path / "inner", dict_of(w=tensor(1))).read_bytes()
    outer = write_zip(tmp_path / "outer", dict_of(w=call("os.system", text("true")))).read_bytes()
    (tmp_path / "inner").unlink()
    (tmp_path / "outer").unlink()
    (tmp_path / "in.pth").write_bytes(outer + inner)
    refusal(tmp_path / "in.pth")


def test_a_tar_file_that_begins_like_a_pickle_is_refused(tmp_path):
    """torch < 2.6 would load all that is in the pickles of one."""
    with tarfile.open(
        tmp_path / "in.pth", "w", format=tarfile.GNU_FORMAT, encoding="latin1"
    ) as tar:
        for name in (LEGACY[:14].decode("latin1"), "storages", "tensors", "pickle"):
            tar.addfile(tarfile.TarInfo(name))
    assert (tmp_path / "in.pth").read_bytes().startswith(LEGACY[:14])
    assert "is a tar file, the oldest of torch's forms" in refusal(tmp_path / "in.pth")


def test_a_pickle_of_something_else_is_told_from_torchs(tmp_path):
    (tmp_path / "in.pth").write_bytes(pickle.dumps({"w": [1.0]}, protocol=2))
    assert "is a pickle, but none that `torch.save` wrote" in refusal(tmp_path / "in.pth")


# --- the survey ----------------------------------------------------------------------------------


def survey(content, size=1000):
    found = Survey(size)
    found.read(io.BytesIO(b"\x80\x02" + content + b"."))
    return found


def test_a_survey_tells_storages_names_and_what_is_filled():
    queue = named("collections.deque") + b")R(K\1e"
    log = named("__builtin__.defaultdict") + b")R(K\1K\2u"
    found = survey(list_of(queue, log, storage(3, "Half", "7"), storage(2, "Double", "8")))
    assert found.storages == {"7": 6, "8": 16}
    assert found.names["__builtin__.defaultdict"] == "builtins.defaultdict"
    assert found.filled["collections.deque"] == "list"
    assert found.filled["builtins.defaultdict"] == "dict"


STORED = [
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
    "complex64", "complex128", "float8_e4m3fn",
]  # fmt: skip


@pytest.mark.parametrize("dtype", STORED)
def test_a_survey_knows_how_many_bytes_a_storage_has(tmp_path, dtype):
    saved = torch.zeros(6, dtype=getattr(torch, dtype))
    torch.save(saved, tmp_path / "in.pth")
    with zipfile.ZipFile(tmp_path / "in.pth") as archive:
        found = Survey(1000)
        found.read(io.BytesIO(archive.read("in/data.pkl")))
    assert found.storages == {"0": saved.nbytes}


def test_what_ordinary_checkpoints_hold_costs_little(tmp_path):
    net = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(100)])
    optimizer = torch.optim.Adam(net.parameters())
    torch.save({"net": net, "optimizer": optimizer}, tmp_path / "in.pth")
    with zipfile.ZipFile(tmp_path / "in.pth") as archive:
        content = archive.read("in/data.pkl")
    found = Survey(len(content))
    found.read(io.BytesIO(content))
    assert found.cost < RATIO / 2 * len(content)


@pytest.mark.parametrize(
    "content", [b"", b"h\x05", b"t", b"(", b"R", b"NR", b"K", b"X\1", b"Q", b"s"]
)
def test_instructions_that_do_not_fit_are_damage(content):
    with pytest.raises(PickleError) as refused:
        survey(content)
    assert refused.value.kind == "damage"
