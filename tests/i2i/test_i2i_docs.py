"""The pages of the adapters: whoever has a clone, and no package index, can follow them."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {
    "i2i.md": {"i2i"}, "i2i_training.md": {"i2i"}, "i2i_trainers.md": {"i2i"},
    "i2i_use.md": {"i2i", "onnx"}, "i2i_classes.md": {"i2i"}, "i2i_modalities.md": {"i2i"},
    "i2i_balagan.md": {"i2i"},
    "i2i_compare.md": {"i2i", "offline"},
    "i2i_metrics.md": {"i2i", "offline", "pretrained"}, "openvino.md": {"openvino"},
    "torch.md": {"torch"},
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_how_to_install_what_it_needs_from_a_clone(page: str):
    text = " ".join((ROOT / "docs" / page).read_text("utf-8").split())
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
        "optional-dependencies"
    ]
    told = [set(group.split(",")) for group in re.findall(r"pip install -e '\.\[([^]]*)\]'", text)]
    assert set().union(*told) == PAGES[page]
    assert PAGES[page] <= extras.keys()
    # The first that is named is what the whole page needs, and stands before its first command.
    assert len(told[0]) == 1
    assert text.index("pip install -e") < text.find("```") % (len(text) + 1)


def test_the_trainer_of_the_docs_is_the_one_that_is_tested():
    page = (ROOT / "docs" / "i2i_trainers.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert block == (ROOT / "tests" / "i2i" / "own_trainer.py").read_text("utf-8")
    assert len(block.splitlines()) <= 60


@pytest.mark.parametrize(("trainer", "lines"), [("cyclegan", 250), ("pix2pix", 150)])
def test_a_trainer_is_a_file_that_reads_like_its_paper(trainer: str, lines: int):
    """Options, losses and turns included; what is the same for all is elsewhere, and names none."""
    rooms = ROOT / "adapters" / "modelsoup_i2i"
    text = (rooms / "trainers" / f"{trainer}.py").read_text("utf-8")
    assert len(text.splitlines()) <= lines
    for source in (rooms / "training").glob("*.py"):
        assert f"trainers.{trainer}" not in source.read_text("utf-8")
