"""What a user may do wrong and a machine may lack: one sentence each, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from modelsoup_i2i.use.generators import load_generator
from modelsoup_openvino import export, versions
from modelsoup_openvino.quantise import Quantisation, load_quantised, quantised
from modelsoup_openvino.trainer import OpenVinoQat
from safetensors.numpy import save_file

import modelsoup
from modelsoup.terminal.cli import main

from conftest import SHAPE, SIZES  # isort: skip

QUICK = ("--epochs", "0", "--rounds", "0", "--set", "crop_size=32", "--set", "load_size=36")


def quantize(model, data, out, *more):
    arguments = ["quantize", model, "--trainer", "cyclegan", "--data", data, "-o", out, *QUICK]
    return CliRunner().invoke(main, ["openvino", *map(str, arguments), *map(str, more)])


def refused(done, *words):
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.output
    said = " ".join(done.output.split())
    for word in words:
        assert word in said
    return True


def test_the_command_writes_the_folder_and_prints_the_page(start, data, tmp_path):
    out = tmp_path / "out"
    # Widths and blocks come from the checkpoint.
    done = quantize(start, data, out, "--network", "G_B", "--ignore", "model.1", "--pictures")
    assert done.exit_code == 0, done.output
    assert "on these same images" not in done.output  # one candidate, and no choice
    assert "# G_B of start.safetensors in INT8" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    integer = export.integer_operations(export.read(out / "int8.xml"))
    assert integer["Convolution"] == (7, 8)
    folders = {path.name: len(list(path.iterdir())) for path in (out / "pictures").iterdir()}
    assert folders == {"input": 2, "float32": 2, "int8": 2, "int8-0": 2}
    assert refused(quantize(start, data, out), "exists and is not empty (--force replaces it)")


def test_what_is_no_checkpoint_of_the_trainer_is_refused(data, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"linear.weight": np.zeros((2, 2), np.float32)}, other)
    assert refused(quantize(other, data, tmp_path / "out"), "generator", "G_A")
    assert refused(quantize(tmp_path / "none.safetensors", data, tmp_path / "out"), "no checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]


def test_unknown_trainers_networks_and_options_are_told(start, data, tmp_path):
    out = tmp_path / "out"
    command = ["openvino", "quantize", str(start), "-o", str(out), "--trainer"]
    assert refused(CliRunner().invoke(main, [*command, "cyclegam"]), "did you mean 'cyclegan'")
    assert refused(CliRunner().invoke(main, [*command, "command"]), "cannot be quantised")
    assert refused(quantize(start, data, out, "--network", "D_A"), "'D_A'", "G_A, G_B")
    assert refused(quantize(start, data, out, "--set", "crop_sice=3"), "'crop_size'")
    assert refused(quantize(start, data, out, "--set", "lr=1"), "calls 'rate'")
    assert refused(quantize(start, data, out, "--set", "nothing"), "NAME=VALUE")
    assert refused(quantize(start, data, out, "--quality", "fid-63"), "metric 'fid-63'", "'fid-64'")
    assert refused(quantize(start, data, out, "--rate", "-1"), "rate is -1.0")
    assert refused(quantize(start, data, out, "--subset-size", "301"), "from 1 to 300")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_ignored_is_told_and_nothing_is_left(start, data, tmp_path):
    out = tmp_path / "out"
    assert refused(quantize(start, data, out, "--ignore", "modl.1"), "did you mean 'model.1'")
    assert refused(quantize(start, data, out, "--ignore-pattern", "con[v"), "'con[v'", "regular")
    assert refused(quantize(start, data, out, "--ignore-pattern", "fold"), "NNCF refuses", "fold")
    assert list(tmp_path.iterdir()) == []


def test_a_metric_without_weights_is_told_before_anything_is_computed(
    start, data, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    done = quantize(start, data, tmp_path / "out", "--quality", "fid-64")
    assert refused(done, "weights-inception")
    assert "calibrates" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_missing_images_are_told(start, tmp_path):
    assert refused(quantize(start, tmp_path / "nowhere", tmp_path / "out"), "no folder", "nowhere")
    for letter in "AB":
        (tmp_path / f"data/train{letter}").mkdir(parents=True)
    assert refused(quantize(start, tmp_path / "data", tmp_path / "out"), "trainA")
    network = load_generator(start, "x2y")
    with pytest.raises(modelsoup.ParameterError, match="no calibration image"):
        quantised(network, [], Quantisation(), say=print)


def test_pictures_that_no_model_has_are_told_before_anything_is_computed(tmp_path):
    for part in ("trainA", "trainB"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for n in range(2):
            np.save(tmp_path / "data" / part / f"{n}.npy", np.full((36, 36, 5), n, np.uint8))
    given = {"data": str(tmp_path / "data"), **SIZES, **SHAPE, "channels": 5}
    trainer = modelsoup.get_trainer("cyclegan")
    model = tmp_path / "five.safetensors"
    trainer.session(modelsoup.build_options(trainer, given), None, seed=0).save(model)
    done = quantize(model, tmp_path / "data", tmp_path / "out")
    assert refused(done, "pictures of 5 channels", "1, 3 or 4")
    assert "calibrates" not in done.output
    assert {path.name for path in tmp_path.iterdir()} == {"data", "five.safetensors"}
    qat, told = OpenVinoQat(), {"of": "cyclegan", "out": str(tmp_path / "out"), "training": given}
    with pytest.raises(modelsoup.ParameterError, match="pictures of 5 channels"):
        qat.identity(modelsoup.build_options(qat, told))  # as a plan is checked, by no checkpoint


def test_a_layer_to_ignore_that_is_not_there_is_told(start):
    network = load_generator(start, "x2y")
    images = [torch.zeros(1, 3, 32, 32)]
    with pytest.raises(modelsoup.ParameterError, match=r"'modl\.1'.*did you mean 'model\.1'"):
        quantised(network, images, Quantisation(ignored_names=("modl.1",)), say=print)
    with pytest.raises(modelsoup.ParameterError, match="NNCF refuses"):
        quantised(network, images, Quantisation(ignored_types=("fold",)), say=print)


def test_a_user_without_a_home_has_no_cache_and_no_error(monkeypatch, tmp_path) -> None:
    for name in ("MODELSOUP_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    shared = modelsoup.cache_folder("nncf-extension") / "build"
    assert not shared.is_dir()
    versions._publish(tmp_path, shared)  # leaves it at that
    assert not shared.is_dir()


@pytest.mark.parametrize(
    ("package", "version", "said"),
    [
        (
            "nncf",
            None,
            r"nncf is not installed, where nncf>=3\.0,<4 is needed: pip inst.*openv",
        ),
        ("nncf", "2.19.0", r"nncf 2\.19\.0 is installed, where nncf>=3\.0,<4"),
        ("nncf", "4.0.0", r"nncf 4\.0\.0 is installed"),
        ("openvino", None, r"openvino is not installed, where openvino>=2025\.4 is needed"),
        ("openvino", "2024.6.0", r"openvino 2024\.6\.0 is installed, where openvino>=2025\.4"),
    ],
)
def test_missing_and_other_versions_are_told(
    package, version, said, start, data, tmp_path, monkeypatch
):
    real = metadata.version

    def pretend(name):
        if name != package:
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(versions.metadata, "version", pretend)
    with pytest.raises(versions.VersionError, match=said):
        versions.need("torch", "nncf", "openvino")
    assert refused(quantize(start, data, tmp_path / "out"), "'.[openvino]'")


def test_versions_in_the_range_are_taken_and_no_others(monkeypatch):
    def taken(version):
        monkeypatch.setattr(versions.metadata, "version", lambda name: version)
        try:
            versions.need("nncf")
        except versions.VersionError:
            return False
        return True

    every = ("2.99.9", "3.0.0", "3.4.0", "3.4.0.dev1+cpu", "3.10.1", "4.0.0", "10.0")
    assert [version for version in every if taken(version)] == [*every[1:5]]


def test_without_a_compiler_it_is_said_and_torch_computes(tmp_path):
    script = (
        "from modelsoup_openvino.versions import load_nncf\n"
        "load_nncf(print)\n"
        "from nncf.torch.quantization.extensions import QuantizedFunctionsCPU as own\n"
        "print(own._loaded_namespace.__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env={**os.environ, "CXX": "/bin/false", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("there is no working C++ compiler")
    assert second == "ReferenceQuantizedFunctions"
    # Telemetry would have left its folder here.
    assert list(tmp_path.iterdir()) == []


def test_another_environment_has_a_build_of_its_own(monkeypatch):
    """Its compiler's command would be another, and all be compiled at every start."""
    own = versions._build_name()
    assert own == versions._build_name()
    monkeypatch.setattr(sys, "prefix", sys.prefix + "-other")
    assert versions._build_name() != own


def test_a_compiler_that_does_not_run_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert versions.compiler() is None
    monkeypatch.setenv("CXX", "/bin/false")
    assert versions.compiler() is None


def test_nothing_is_sent_and_other_programs_may_still_import_the_sender(monkeypatch):
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    with versions.untracked():
        assert os.environ["NNCF_CI"]
        with pytest.raises(ImportError):
            __import__("openvino_telemetry")
    assert "openvino_telemetry" not in sys.modules


def test_damaged_quantised_checkpoints_are_told(made, start, tmp_path):
    network = load_generator(start, "x2y")
    good = made.out / "quantised.safetensors"
    with pytest.raises(modelsoup.CheckpointError, match="there is no quantised checkpoint"):
        load_quantised(network, tmp_path / "none.safetensors", say=print)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:5000])
    with pytest.raises(modelsoup.CheckpointError, match=r"cut\.safetensors is damaged"):
        load_quantised(network, cut, say=print)
    with pytest.raises(modelsoup.CheckpointError, match="is no quantised checkpoint"):
        load_quantised(network, start, say=print)


def test_a_quantised_checkpoint_of_another_network_is_told(made):
    from modelsoup_i2i.networks.resnet import ResnetGenerator

    wider = ResnetGenerator(16, 2)
    with pytest.raises(modelsoup.MismatchError, match="does not fit the network"):
        load_quantised(wider, made.out / "quantised.safetensors", say=print)


def test_an_export_that_computes_something_else_is_refused(made, start):
    network = load_generator(start, "x2y")
    other = export.read(made.out / "int8.xml")
    example = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        network.model[-2].bias += 1
    with pytest.raises(modelsoup.SoupError, match="does not compute what the network does"):
        export.agreement(network, other, example)


def test_a_leaf_has_nothing_to_quantise(data, tmp_path):
    options = modelsoup.build_options(OpenVinoQat(), {"of": "cyclegan", "out": str(tmp_path)})
    job = modelsoup.Job(
        None, tmp_path / "a.safetensors", tmp_path, (), 0, options, lambda d, m: None, print
    )
    with pytest.raises(modelsoup.TrainerError, match="quantises a checkpoint"):
        OpenVinoQat().train(job)


def test_plans_are_checked_without_torch(data, start):
    script = (
        "import sys, modelsoup\n"
        "from modelsoup_openvino.trainer import OpenVinoQat\n"
        "trainer = modelsoup.get_trainer('openvino-qat')\n"
        "options = modelsoup.build_options(trainer, {'of': 'cyclegan', 'out': 'edge',\n"
        f"  'training': {{'data': {str(data)!r}}}}})\n"
        "assert 'low-level' in trainer.groups(options)\n"
        "assert len(trainer.files(options)) == 7 + 4  # what is trained on, and tested on\n"
        "assert trainer.identity(options)['out'] == 'edge'\n"
        "assert not {'torch', 'nncf', 'openvino'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Nothing:
    """Options of a trainer that tells nothing of what is deployed."""


class Plain:
    name = "plain-for-openvino"
    options = Nothing

    def train(self, job):
        raise AssertionError


def test_a_trainer_that_deploys_nothing_is_told():
    from modelsoup_openvino.deploy import deployable

    modelsoup.register_trainer(Plain())
    with pytest.raises(modelsoup.TrainerError, match="does not tell session, inputs"):
        deployable("plain-for-openvino")


@pytest.mark.needs("offline")
def test_metrics_are_told_of_float_calibrated_and_kept_networks(start, data, tmp_path):
    done = quantize(start, data, tmp_path / "out", "--quality", "st-lpips_to_input", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out/report.json").read_text())
    values = told["quality"]["st-lpips_to_input"]
    assert set(values) == {"float", "calibrated", "kept"}
    assert values["calibrated"] == values["kept"] != values["float"]
    assert "| st-lpips_to_input |" in (tmp_path / "out/report.md").read_text()


def test_a_set_option_is_read_as_a_plans_value():
    from modelsoup_openvino.cli import _training

    given = ("width=8", "flip=false", "load_size=[18, 20]", "mode=none", "loss=tree-paper", "x=")
    given += ("attributes=[Bald, Young]", "lr=1e-3")
    assert _training("pictures", given) == {
        "data": "pictures", "width": 8, "flip": False, "load_size": [18, 20], "mode": "none",
        "loss": "tree-paper", "x": None, "attributes": ["Bald", "Young"], "lr": 1e-3,
    }  # fmt: skip
    for pair in ("width", "=8"):
        with pytest.raises(modelsoup.ParameterError, match=f"--set {pair} must be NAME=VALUE"):
            _training(None, (pair,))
