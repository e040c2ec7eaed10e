"""Official folders of FUNIT and BalaGAN, made up at small sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL")

import torch
from click.testing import CliRunner
from modelsoup_i2i.networks import funits
from modelsoup_i2i.networks.described import Network
from modelsoup_i2i.use.generators import load_model
from modelsoup_i2i.use.official_funit import import_funit

import modelsoup
from modelsoup import CheckpointError, MismatchError
from modelsoup.terminal.cli import main

G = {"width": 4, "downs": 2, "blocks": 1, "style_downs": 2, "latent": 6, "mlp": 8, "channels": 3}
D = {"classes": 5, "width": 4, "halvings": 2, "most": 12, "heads": 2}
DUMMY = "dec.model.0.model.0.model.0.norm.running_mean"


def weights(network: Network, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tuple(shape), generator=generator)
            for name, shape in network.shapes().items()}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(tmp_path / "official")


def made(folder: Path, step: int = 200, **sizes) -> Path:
    folder.mkdir(exist_ok=True)
    own, average = (weights(Network(funits.GENERATOR, G), n) for n in (step, step + 1))
    for network in (own, average):
        network[DUMMY] = torch.zeros(16)
    judge = weights(Network(funits.DISCRIMINATOR, D | sizes), step + 2)
    torch.save({"gen": own, "gen_test": average}, folder / f"gen_{step:08d}.pt")
    torch.save({"dis": judge}, folder / f"dis_{step:08d}.pt")
    # Nobody reads these: a read would fail.
    for name in (f"optimizer_{step:08d}.pt", "optimizer.pt", f"enc_{step:05d}.pt"):
        (folder / name).write_bytes(b"no pickle")
    return folder


def test_the_last_average_and_the_discriminator_are_written_without_dummies(folder: Path):
    made(folder, 30)
    output, said = folder.parent / "out.safetensors", []
    counts = import_funit(folder, output, "balagan", say=said.append)
    read = modelsoup.open_checkpoint(output)
    wanted = {
        f"{network}.{name}": value
        for network, own in (("G", weights(Network(funits.GENERATOR, G), 201)),
                             ("D", weights(Network(funits.DISCRIMINATOR, D), 202)))
        for name, value in own.items()
    }  # fmt: skip
    assert set(read.tensors) == set(wanted)
    for name, value in wanted.items():
        assert np.array_equal(read[name], value.numpy()), name
    assert counts["G"] == sum(value.numel() for n, value in wanted.items() if n[0] == "G")
    assert said[0] == "G is the average over steps, gen_test of gen_00000200.pt; gen is not read"
    assert "CC BY-NC-SA 4.0: take them as not for commercial use" in said[-1]


def test_what_was_imported_gives_pictures_the_style_of_others(folder: Path):
    import_funit(folder, folder.parent / "out.safetensors", "balagan", say=lambda _: None)
    model = load_model(folder.parent / "out.safetensors")
    pictures = [np.random.default_rng(n).integers(0, 256, (16, 16, 3), np.uint8) for n in (0, 1)]
    style = model.style_of(pictures[1:])
    (out,) = model.made(pictures[:1], model.given(["0"], style=style))
    assert out.shape == (16, 16, 3)


def test_a_step_may_be_chosen_on_the_command_line(folder: Path):
    made(folder, 30)
    output = folder.parent / "out.safetensors"
    run = CliRunner().invoke(
        main, ["i2i", "import", "balagan", str(folder), str(output), "--step", "30"]
    )
    assert run.exit_code == 0, run.output
    assert "gen_test of gen_00000030.pt" in run.output and "D: " in run.output


def refused(error: type[Exception], said: str, folder: Path, *given, **named) -> None:
    output = folder.parent / "refused.safetensors"
    with pytest.raises(error, match=said):
        import_funit(folder, output, *given, say=lambda _: None, **named)
    assert not output.exists()


def test_what_is_no_such_folder_is_refused(folder: Path, tmp_path: Path):
    refused(MismatchError, "two heads: `soup i2i import balagan` reads such", folder, "funit")
    made(tmp_path / "one", heads=1)
    refused(MismatchError, "one head: `soup i2i import funit`", tmp_path / "one", "balagan")
    said = r"no generator of step 7 \(it has those of 200\)"
    refused(CheckpointError, said, folder, "balagan", step=7)
    refused(CheckpointError, "does not exist, where a folder", tmp_path / "nowhere", "funit")
    (tmp_path / "empty").mkdir()
    refused(CheckpointError, "no generator, such as gen_00100000.pt", tmp_path / "empty", "funit")
    torch.save({"other": {"a": torch.zeros(1)}}, folder / "gen_00000300.pt")
    refused(CheckpointError, "has neither gen_test nor gen", folder, "balagan")
    torch.save({"gen": {"a": torch.zeros(1)}}, folder / "gen_00000300.pt")
    refused(MismatchError, r"gen_00000300.pt: the generator has no enc_content", folder, "balagan")


class Code:
    def __reduce__(self):
        return print, ("code was run",)


def test_no_code_of_a_file_is_run(folder: Path, capsys):
    torch.save({"gen": Code()}, folder / "gen_00000300.pt")
    refused(CheckpointError, "gen_00000300", folder, "balagan")
    assert "code was run" not in capsys.readouterr().out
