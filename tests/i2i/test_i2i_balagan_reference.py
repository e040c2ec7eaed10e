"""The plain BalaGAN in `benchmarks/` is the published one, and ours computes what it does."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from i2i_domains import make_domains
from modelsoup_i2i.trainers.balagan import BalaGAN, BalaGANOptions
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
SMALL = {"width": 4, "downs": 2, "style_downs": 2, "latent": 6, "mlp": 8}
OURS = SMALL | {
    "size": 16, "d_halvings": 2, "d_most": 12, "batch": 3, "device": "cpu", "threads": 0,
    "steps": 4, "sheet_every": 0,
}  # fmt: skip
# Biases before an instance norm, which takes them away: RMSprop blows up what rounding leaves.
VOID = re.compile(r"(enc_content|dec\.model\.(0|2|4))\..*bias")


def load_reference():
    path = ROOT / "benchmarks" / "balagan_reference.py"
    spec = importlib.util.spec_from_file_location("balagan_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["balagan_reference"] = module
    spec.loader.exec_module(module)
    return module


reference = load_reference()


def test_the_official_layout_has_as_many_parameters_as_the_authors_networks():
    with torch.device("meta"):
        made = reference.Original(device="meta").networks()
    counts = {n: sum(p.numel() for p in made[n].parameters()) for n in "GD"}
    assert counts == {"G": 29_866_435, "D": 54_214_674}
    told = BalaGAN().networks(BalaGANOptions(k=40))
    for name in "GD":
        plain = {n: tuple(values.shape) for n, values in made[name].state_dict().items()}
        assert plain == told[name].shapes()


@pytest.mark.parametrize("r1", ["funit", "per_sample"])
def test_two_steps_are_the_published_ones(tmp_path: Path, r1: str):
    """In double precision, so that no rounding decides what is rectified."""
    torch.manual_seed(3)
    theirs = reference.Original(2, **SMALL, halvings=2, most=12, r1=r1, lr=1e-3)
    start = tmp_path / "start.safetensors"
    save_file({f"{network}.{name}": values.clone() for network, own in theirs.networks().items()
               for name, values in own.state_dict().items()}, start)  # fmt: skip
    root = make_domains(tmp_path / "data", 4, 3)
    options = BalaGANOptions(data=root, **OURS, r1=r1, lr=1e-3)
    session = BalaGAN().session(options, start, seed=0)
    for network in (*theirs.networks().values(), *session._module.values()):
        network.double()
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        x, y = (2 * torch.rand(3, 3, 16, 16, generator=generator).double() - 1 for _ in "xy")
        c_x, c_y = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 1])
        expected = theirs.step(x, c_x, y, c_y)
        told = session.step(x, c_x, y, c_y)
        for name, value in expected.items():
            assert told[name] == pytest.approx(float(value.detach()), rel=1e-5), name
    for name, network in theirs.networks().items():
        own = session._module[name].state_dict()
        for tensor, value in network.state_dict().items():
            if not VOID.fullmatch(tensor):
                torch.testing.assert_close(own[tensor], value, atol=1e-9, rtol=1e-6)
