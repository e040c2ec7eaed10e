"""What is written of adapters is what the real `peft` reads, and what it would make of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

import modelsoup

pytestmark = [
    # Of models that are none of transformers'.
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings(
        "ignore:Adapter .* have invalid shape"
    ),  # of biases, which have one axis
]
State = dict[str, torch.Tensor]


class Network(nn.Module):
    """A layer of each kind that adapters are for."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return Network()


def trained(network: Network, folder: Path, seed: int, **how: Any) -> State:
    """A base with an adapter as PEFT makes, saves and merges it."""
    torch.manual_seed(seed)
    targets = ["embed_tokens", "conv", "layers.0", "layers.1"]
    config = LoraConfig(**{"target_modules": targets, **how})
    model = get_peft_model(copy.deepcopy(network), config)
    for name, value in model.named_parameters():
        if value.requires_grad:
            value.data += torch.rand_like(value) - (0 if "magnitude" in name else 0.5)
    model.save_pretrained(str(folder))
    return model.merge_and_unload().state_dict()


def loaded(network: Network, folder: Path) -> State:
    """A base with what PEFT reads of an adapter."""
    model = PeftModel.from_pretrained(copy.deepcopy(network), str(folder))
    return model.merge_and_unload().state_dict()


def assert_equal(found: State, wanted: State, atol: float = 2e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def adapters(
    network: Network, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[State]]:
    folder = tmp_path_factory.mktemp("adapters")
    patterns = {"rank_pattern": {"layers.1": 4}, "alpha_pattern": {"layers.1": 3}}
    first = trained(network, folder / "a", 1, r=3, lora_alpha=5)
    second = trained(network, folder / "b", 2, r=2, lora_alpha=4, use_rslora=True, **patterns)
    return folder, [first, second]


def test_peft_loads_the_sum_of_two_adapters(network: Network, adapters: Any, tmp_path: Path):
    folder, (first, second) = adapters
    modelsoup.merge_adapters([folder / "a", folder / "b"], tmp_path / "out", weights=[0.7, -0.3])
    base = network.state_dict()
    wanted = {n: v + 0.7 * (first[n] - v) - 0.3 * (second[n] - v) for n, v in base.items()}
    assert_equal(loaded(network, tmp_path / "out"), wanted)


def test_one_adapter_merged_alone_is_to_peft_what_it_was(
    network: Network, adapters: Any, tmp_path: Path
):
    folder, (_, second) = adapters
    modelsoup.merge_adapters([folder / "b"], tmp_path / "out")
    found = loaded(network, tmp_path / "out")
    assert all(torch.equal(found[name], value) for name, value in second.items())


def test_peft_makes_the_tuned_model_of_what_was_extracted_from_it(network: Network, tmp_path: Path):
    torch.manual_seed(3)
    base = network.state_dict()
    tuned = {name: value + 0.1 * torch.randn_like(value) for name, value in base.items()}
    for name, state in (("base", base), ("tuned", tuned)):
        save_file(state, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("tuned", "base")]
    modelsoup.extract_adapter(*paths, tmp_path / "out", rank=8)  # of which none is larger
    assert_equal(loaded(network, tmp_path / "out"), tuned)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"r": 5, "use_rslora": True},
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["head", "norm"]},
        {"lora_bias": True, "target_modules": ["conv", "layers.0"]},
    ],
    ids=["plain", "rank-stabilised", "DoRA", "biases", "modules to save", "biases of factors"],
)
def test_an_adapter_folded_into_its_base_is_what_peft_merges(
    network: Network, tmp_path: Path, how: dict[str, Any]
):
    wanted = trained(network, tmp_path / "adapter", 4, **how)
    save_file(network.state_dict(), tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    modelsoup.merge([tmp_path / "base.safetensors"], out, lora=[tmp_path / "adapter"])
    found = modelsoup.open_checkpoint(out)
    assert_equal({name: torch.from_numpy(found[name].copy()) for name in found}, wanted)
