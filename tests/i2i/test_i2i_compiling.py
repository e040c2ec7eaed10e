"""`torch.compile`: in another process, for so long and no longer, and taken from its cache."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from i2i_domains import make_domains
from modelsoup_i2i.training import compiling
from modelsoup_i2i.training.losses import gradient_penalty
from modelsoup_i2i.training.session import Session
from modelsoup_i2i.training.stage import Stage
from own_trainer import Toy, ToyOptions
from torch import nn

from modelsoup import cache_folder

SIZES = {"load_size": 18, "crop_size": 16, "device": "cpu", "sheet_every": 0, "threads": 0}
LATE = "not compiled: G, D: that was not done after 1 s (compile_seconds)"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_domains(tmp_path_factory.mktemp("domains"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is compiled."""
    monkeypatch.setenv("MODELSOUP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "torch"))
    return cache_folder("inductor")


def training(data: Path, **options: object) -> Session:
    return Toy().session(ToyOptions(data=data, steps=6, **SIZES, **options), None, seed=3)


def moved(own: Session, steps: int) -> list[dict[str, float]]:
    return [own.optimise(group) for group in islice(own.batches(), steps)]


def weights(own: Session) -> list[torch.Tensor]:
    return [tensor.clone() for network in own.networks.values()
            for tensor in network.state_dict().values()]  # fmt: skip


def test_what_takes_longer_than_it_may_is_left_and_the_training_goes_on_with_the_same_bits(
    data: Path, cache: Path
):
    wide = {"width": 32}  # from which on a CPU has a faster path, of other bits
    own, plain = training(data, compile=True, compile_seconds=1, **wide), training(data, **wide)
    assert moved(own, 4) == moved(plain, 4)
    assert own.networks["G"].winograd and plain.networks["G"].winograd
    assert all(map(torch.equal, weights(own), weights(plain)))
    assert own.compiled == () and list(own.news()) == [LATE]
    moved(own, 1)
    assert list(own.news()) == []


def test_a_training_says_before_its_first_step_what_is_not_compiled(data: Path, cache: Path):
    said: list[str] = []
    training(data, compile=True, compile_seconds=1).run(lambda *_: None, said.append)
    assert said.count(LATE) == 1
    assert not any("steps a second" in line for line in said[: said.index(LATE)])


def test_a_training_that_goes_on_compiles_what_it_had_compiled_and_nothing_else(
    data: Path, cache: Path
):
    begun = training(data, compile=True, compile_seconds=1)
    moved(begun, 2)
    own = training(data, compile=True, compile_seconds=60)
    own.load_state_dict(begun.state_dict())
    moved(own, 2)
    assert own.compiled == () and list(own.news()) == []
    had = begun.state_dict() | {"compiled": ["D"]}
    own = training(data, compile=True, compile_seconds=1)
    own.load_state_dict(had)
    moved(own, 2)
    assert list(own.news()) == [
        LATE.replace("G, D", "D"),
        "compiled before the interruption: D; the bits are others than without it",
    ]


def test_a_training_that_goes_on_without_compiling_says_what_was_compiled(data: Path):
    begun = training(data)
    moved(begun, 2)
    own = training(data)
    own.load_state_dict(begun.state_dict() | {"compiled": ["G"]})
    moved(own, 1)
    said = "compiled before the interruption: G; the bits are others than without it"
    assert list(own.news()) == [said]
    again = training(data)
    again.load_state_dict(own.state_dict())
    moved(again, 1)
    assert list(again.news()) == []


def test_calls_are_looked_at_without_moving_anything(data: Path):
    """Of the first step, a phase of its own, and of the last; one that asks for slopes is not."""
    own, untouched = training(data), training(data)
    for each in (own, untouched):
        each.begin()
    calls = own._called(next(iter(own.batches())))
    images = compiling.Tensor((1, 3, 16, 16), (768, 256, 16, 1), torch.float32, wants=False)
    made = compiling.Tensor(images.shape, images.stride, images.dtype, wants=True)
    assert {name: [call.inputs for call in each] for name, each in calls.items()} == {
        "G": [(images,)], "D": [(images,), (made,)]
    }  # fmt: skip
    assert all(call.gradients and all(call.trained) for each in calls.values() for call in each)
    assert moved(own, 3) == moved(untouched, 3)


class Waiting(Toy):
    """Is compiled for ever, by a process and one that it starts."""

    def session(self, options, start=None, **how):
        begun = subprocess.Popen(["sleep", "600"])
        Path(options, "partial").write_text(f"{os.getpid()} {begun.pid}")
        Path(options, "partial").rename(Path(options, "begun"))
        begun.wait()


class Killed(Toy):
    """Leaves something in the temporary folder, and half a line."""

    def session(self, options, start=None, **how):
        Path(sys.argv[-1]).write_text('["G", null]\n["D", nu')
        Path(tempfile.mkdtemp(), "start").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def is_running(process: str) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_what_compiles_ends_with_a_training_that_is_killed(tmp_path: Path):
    code = (
        "import sys; from modelsoup_i2i.training.compiling import ahead; "
        "from test_i2i_compiling import Waiting; "
        "ahead((Waiting(), sys.argv[1], None, ()), {'G': []}, 600)"
    )
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    parent, begun = subprocess.Popen([sys.executable, "-c", code, tmp_path], env=path), []
    while parent.poll() is None:
        if (tmp_path / "begun").exists():
            begun = (tmp_path / "begun").read_text().split()
            assert all(map(is_running, begun))
            parent.kill()
        time.sleep(0.01)
    ends = time.monotonic() + 5
    while any(map(is_running, begun)) and time.monotonic() < ends:
        time.sleep(0.01)
    assert len(begun) == 2 and not any(map(is_running, begun))


def test_what_compiles_leaves_nothing_in_the_temporary_folder_when_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    refused = compiling.ahead((Killed(), None, None, ()), {"G": [], "D": []}, 60)
    assert refused == {"D": "the process that compiles them ended"}
    assert not any(tmp_path.iterdir())


def test_a_compiled_network_has_gradients_of_gradients(data: Path):
    """A penalty's would be missing without a word."""
    torch.manual_seed(0)
    network, share = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Conv2d(2, 1, 3)), torch.rand(1)
    real, fake = torch.randn(2, 1, 3, 8, 8)
    stage, slopes = Stage(None, {}, {}), []
    for call in (None, compiling.compiled(network, [], training(data), known=True)):
        stage.put("D", network, call)
        loss = gradient_penalty(stage["D"], real, fake, share)
        slopes.append(torch.autograd.grad(loss, network[0].weight)[0])
    assert torch.equal(*slopes) and slopes[0].abs().sum() > 0


def test_networks_with_modules_of_others_are_not_compiled(data: Path):
    own = training(data, compile=True)
    own.as_used("G")
    moved(own, 1)
    assert list(own.news()) == ["not compiled: G has modules of others in it"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("c++") is None, reason="platform: no C++ compiler")
def test_a_compiled_training_tells_what_an_uncompiled_one_tells_and_goes_on_to_the_same_bits(
    data: Path, cache: Path
):
    options = {"compile": True, "compile_seconds": 600}
    own, plain = training(data, **options), training(data)
    told, wanted = moved(own, 6), moved(plain, 6)
    (said,) = own.news()
    assert re.fullmatch(r"compiled in \d+ s: G, D", said) and own.compiled == ("G", "D")
    for one, other in zip(told, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert not all(map(torch.equal, weights(own), weights(plain)))
    libraries = sorted(cache.rglob("*.so"))
    named = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert libraries and named != cache and not [*named.rglob("*.so")]
    begun = training(data, **options)
    again = moved(begun, 3)
    later = training(data, **options)
    later.load_state_dict(begun.state_dict())
    assert again + moved(later, 3) == told
    assert all(map(torch.equal, weights(later), weights(own)))
    assert sorted(cache.rglob("*.so")) == libraries  # two processes more, and nothing was compiled
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    images = torch.zeros(1, 3, 24, 24)
    assert torch.equal(
        later["G"](images), later.networks["G"](images)
    )  # another shape goes without
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_without_a_compiler_it_is_said_once_and_torch_computes(
    data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    own, plain = training(data, compile=True, compile_seconds=600), training(data)
    assert moved(own, 2) == moved(plain, 2)
    (said,) = own.news()
    assert said.startswith("not compiled: G, D: InvalidCxxCompiler: No working C++ compiler found")
