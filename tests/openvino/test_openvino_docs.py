"""What docs/openvino.md shows is understood as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml
from modelsoup_openvino.cli import openvino
from modelsoup_openvino.trainer import OpenVinoQat

import modelsoup

PAGE = (Path(__file__).parents[2] / "docs" / "openvino.md").read_text("utf-8")


def test_the_commands_of_the_page_have_the_options_that_they_show():
    photos = {
        "model": Path("edge/int8.xml"), "source": Path("photos"), "target": Path("translated"),
    }  # fmt: skip
    meant = [
        ("quantize", {"model": Path("tree.safetensors"), "of": "cyclegan", "epochs": 2,
                      "data": "data/apple2orange", "output": Path("edge")}),
        ("run", photos),
        ("bench", {"model": Path("edge/int8.xml"), "against": Path("edge/fp32.xml")}),
        ("quantize", {"model": Path("deepi2i.safetensors"), "of": "deepi2i", "data": "clothes",
                      "training": ("phase1=0",), "output": Path("edge")}),
        ("run", photos | {"of_class": "Boot", "seed": 3}),
        ("run", photos | {"of_class": "Boot", "given": ("z=noise.npy",)}),
    ]  # fmt: skip
    lines = [line for line in PAGE.splitlines() if line.startswith("soup openvino ")]
    assert [line.split()[2] for line in lines] == [name for name, _ in meant]
    for line, (_, own) in zip(lines, meant, strict=True):
        name, *arguments = shlex.split(line)[2:]
        understood = openvino.commands[name].make_context(name, arguments).params
        assert understood.items() >= own.items()


def test_the_options_of_the_page_are_the_commands():
    own = {option for p in openvino.commands["quantize"].params for option in p.opts}
    own |= {option for p in openvino.commands["quantize"].params for option in p.secondary_opts}
    own |= {option for name in ("run", "bench") for p in openvino.commands[name].params
            for option in p.opts}  # fmt: skip
    page = PAGE.partition("## How good")[0]  # what follows has a benchmark's options
    shown = set(re.findall(r"`(?:run )?(--[a-z-]+)", page))
    assert shown
    assert shown <= own


def test_the_plan_of_the_page_has_options_that_there_are():
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
    given = yaml.safe_load(block)["tree"]["finetune"]
    assert given.pop("trainer") == "openvino-qat"
    given["rate"] = float(given["rate"])
    options = modelsoup.build_options(OpenVinoQat(), given)
    assert options.quantisation.ignored_names == ("model.1",)
    assert modelsoup.get_trainer(options.of).name == "cyclegan"
    modelsoup.build_options(modelsoup.get_trainer(options.of), options.training)
