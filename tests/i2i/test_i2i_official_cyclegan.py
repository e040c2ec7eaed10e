"""Checkpoints of the official layout, made up with what old versions and wrappers leave in them."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from modelsoup_i2i.networks import patch, resnet
from modelsoup_i2i.networks.described import Network
from modelsoup_i2i.use.generators import load_generator
from modelsoup_i2i.use.official_cyclegan import import_folder

import modelsoup

OFFICIAL = json.loads((Path(__file__).parent / "data" / "official_names.json").read_text())
G = Network(resnet.MADE_BY, {"width": 4, "blocks": 2})
D = Network(patch.MADE_BY, {"width": 4, "layers": 2})


def weights(shapes: dict, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tuple(shape), generator=generator) for name, shape in shapes.items()}


def make_folder(folder: Path, when: str = "latest", networks: str = "G_A G_B D_A D_B") -> dict:
    """Files of the layout; the weights that are in them."""
    folder.mkdir(exist_ok=True)
    made = {}
    for seed, network in enumerate(networks.split()):
        shapes = (G if network.startswith("G") else D).shapes()
        made[network] = weights(shapes, seed)
        torch.save(made[network], folder / f"{when}_net_{network}.pth")
    return made


def check(output: Path, made: dict, names: dict | None = None) -> None:
    read = modelsoup.open_checkpoint(output)
    wanted = {
        f"{(names or {}).get(network, network)}.{name}": tensor
        for network, tensors in made.items() for name, tensor in tensors.items()
    }  # fmt: skip
    assert set(read.tensors) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(torch.from_numpy(read[name]), tensor), name


def test_a_folder_becomes_one_file(tmp_path: Path):
    made = make_folder(tmp_path / "run")
    make_folder(tmp_path / "run", "20")
    counts = import_folder(tmp_path / "run", tmp_path / "out.safetensors")
    check(tmp_path / "out.safetensors", made)
    assert counts == {n: sum(t.numel() for t in own.values()) for n, own in made.items()}
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["out.safetensors"]


def test_wrappers_and_stale_statistics_are_taken_off(tmp_path: Path):
    folder = tmp_path / "run"
    made = make_folder(folder)
    for network, prefix in (
        ("G_A", "module."),
        ("G_B", "_orig_mod."),
        ("D_A", "module._orig_mod."),
    ):
        stale = dict(made[network])
        norms = ("model.2", "model.10.conv_block.2") if network[0] == "G" else ("model.3",)
        for layer in norms:
            stale[f"{layer}.running_mean"] = torch.zeros(4)
            stale[f"{layer}.running_var"] = torch.ones(4)
            stale[f"{layer}.num_batches_tracked"] = torch.tensor(7)
        torch.save(
            {prefix + name: t for name, t in stale.items()}, folder / f"latest_net_{network}.pth"
        )
    import_folder(folder, tmp_path / "out.safetensors")
    check(tmp_path / "out.safetensors", made)


def test_the_networks_of_an_epoch_are_taken_when_asked_for(tmp_path: Path):
    folder = tmp_path / "run"
    make_folder(folder)
    for when in ("20", "iter_500"):
        (tmp_path / when).mkdir()
        made = {n: {k: t + 1 for k, t in own.items()} for n, own in make_folder(folder).items()}
        for network, own in made.items():
            torch.save(own, folder / f"{when}_net_{network}.pth")
        output = tmp_path / f"{when}.safetensors"
        import_folder(folder, output, epoch=when)
        check(output, made)
    with pytest.raises(modelsoup.CheckpointError, match=r"of '30' .it has 20, iter_500, l"):
        import_folder(folder, tmp_path / "out.safetensors", epoch="30")


@pytest.mark.parametrize(("direction", "network"), [("x2y", "G_A"), ("y2x", "G_B")])
def test_a_model_for_one_direction_has_one_generator(tmp_path: Path, direction: str, network: str):
    made = make_folder(tmp_path / "run", networks="G")
    output = tmp_path / "out.safetensors"
    import_folder(tmp_path / "run", output, direction=direction)
    check(output, made, {"G": network})
    alone = tmp_path / "horse2zebra.pth"
    alone.write_bytes((tmp_path / "run" / "latest_net_G.pth").read_bytes())
    import_folder(alone, output, direction=direction, force=True)
    check(output, made, {"G": network})
    loaded = load_generator(output, direction)
    own = G.build()
    own.load_state_dict(made["G"])
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(image), own.eval()(image))


@pytest.mark.parametrize(
    ("kind", "said"), [("G9_dropout", "has dropout"), ("G9_batch", "has batch normalisation")]
)
def test_other_kinds_of_generator_are_refused(tmp_path: Path, kind: str, said: str):
    file = tmp_path / "latest_net_G.pth"
    torch.save({name: torch.zeros(shape) for name, shape in OFFICIAL[kind].items()}, file)
    with pytest.raises(modelsoup.MismatchError, match=rf"latest_net_G\.pth: .*{said}"):
        import_folder(file, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_networks_that_do_not_belong_together_are_refused(tmp_path: Path):
    folder = tmp_path / "run"
    make_folder(folder)
    other = weights(Network(resnet.MADE_BY, {"width": 8, "blocks": 2}).shapes(), 0)
    torch.save(other, folder / "latest_net_G_B.pth")
    with pytest.raises(modelsoup.MismatchError, match="do not belong to one model"):
        import_folder(folder, tmp_path / "out.safetensors")


def test_what_is_no_official_checkpoint_is_told(tmp_path: Path):
    output = tmp_path / "out.safetensors"
    with pytest.raises(modelsoup.CheckpointError, match="nowhere does not exist"):
        import_folder(tmp_path / "nowhere", output)
    with pytest.raises(modelsoup.CheckpointError, match="official layout"):
        import_folder(tmp_path, output)
    make_folder(tmp_path / "judges", networks="D_A D_B")
    with pytest.raises(modelsoup.CheckpointError, match="has no generator"):
        import_folder(tmp_path / "judges", output)
    make_folder(tmp_path / "both", networks="G G_A")
    with pytest.raises(modelsoup.CheckpointError, match=r"both latest_net_G\.pth"):
        import_folder(tmp_path / "both", output)
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(modelsoup.CheckpointError, match=r"damaged\.pth"):
        import_folder(damaged, output)


def test_an_output_is_replaced_only_when_asked(tmp_path: Path):
    make_folder(tmp_path / "run")
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"mine")
    with pytest.raises(modelsoup.OutputError, match=r"out\.safetensors exists \("):
        import_folder(tmp_path / "run", output)
    assert output.read_bytes() == b"mine"
    import_folder(tmp_path / "run", output, force=True)
    with pytest.raises(modelsoup.OutputError, match=r"must end in \.safetensors"):
        import_folder(tmp_path / "run", tmp_path / "out.pth")
    with pytest.raises(modelsoup.ParameterError, match="x2y or y2x"):
        import_folder(tmp_path / "run", output, force=True, direction="forth")


def test_what_is_imported_is_readable_as_any_file_and_on_the_disk(tmp_path: Path, monkeypatch):
    make_folder(tmp_path / "run")
    flushed = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda at: (flushed.append(os.fstat(at).st_ino), fsync(at)))
    before = os.umask(0o027)
    try:
        import_folder(tmp_path / "run", tmp_path / "out.safetensors")
    finally:
        os.umask(before)
    status = (tmp_path / "out.safetensors").stat()
    assert stat.S_IMODE(status.st_mode) == 0o640 and status.st_ino in flushed


def test_a_link_is_something_though_it_leads_nowhere(tmp_path: Path):
    make_folder(tmp_path / "run")
    (tmp_path / "out.safetensors").symlink_to("nowhere")
    with pytest.raises(modelsoup.OutputError, match="exists"):
        import_folder(tmp_path / "run", tmp_path / "out.safetensors")
    assert os.readlink(tmp_path / "out.safetensors") == "nowhere"


def test_a_file_that_appears_during_an_import_is_left_alone(tmp_path: Path, monkeypatch):
    make_folder(tmp_path / "run")
    output = tmp_path / "out.safetensors"
    fsync = os.fsync

    def meanwhile(descriptor: int) -> None:
        if list(tmp_path.glob(".out.*")):  # it is made, and not yet in its place
            output.write_text("somebody's")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    with pytest.raises(modelsoup.OutputError, match="appeared while it was made"):
        import_folder(tmp_path / "run", output)
    assert output.read_text() == "somebody's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "run"]


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path):
    import pickle

    class Bad:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    file = tmp_path / "latest_net_G.pth"
    file.write_bytes(pickle.dumps({"model.1.weight": Bad()}, protocol=2))
    with pytest.raises(modelsoup.CheckpointError):
        import_folder(file, tmp_path / "out.safetensors")
    assert not (tmp_path / "ran").exists()


def test_the_command_takes_an_epoch(tmp_path: Path):
    from click.testing import CliRunner

    from modelsoup.terminal.cli import main

    made = make_folder(tmp_path / "run", "20")
    output = tmp_path / "out.safetensors"
    arguments = ["i2i", "import", str(tmp_path / "run"), str(output)]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == 1 and "has no networks of 'latest' (it has 20)" in refused.output
    assert not output.exists()
    result = CliRunner().invoke(main, [*arguments, "--epoch", "20"])
    assert result.exit_code == 0 and "D_B: " in result.output
    check(output, made)
