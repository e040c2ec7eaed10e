"""Official checkpoints of BigGAN, StyleGAN and DeepI2I, made up at small sizes."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL")

import torch
from click.testing import CliRunner
from modelsoup_i2i.networks import biggans, stylegans
from modelsoup_i2i.networks.described import Network
from modelsoup_i2i.use.official_gan import import_biggan, import_deepi2i, import_stylegan

import modelsoup
from modelsoup.terminal.cli import main

SIZES = {"arch": "32s", "ch": 8, "classes": 7, "chunk": 4, "shared": 6, "attention": 16}
D_SIZES = {name: SIZES[name] for name in ("arch", "ch", "classes", "attention")}
E_SIZES = {name: SIZES[name] for name in ("arch", "ch", "attention")}
A_SIZES = {"arch": "32s", "ch": 8}
DEAD = {"linear.weight": (1, 64), "linear.bias": (1,), "linear.u0": (1, 1), "linear.sv0": (1,),
        "embed.weight": (7, 64), "embed.u0": (1, 7), "embed.sv0": (1,)}  # fmt: skip
STYLE = {"width": 16, "code": 8, "depth": 2}
State = dict[str, torch.Tensor]


def weights(shapes, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tuple(shape), generator=generator) for name, shape in shapes.items()}


def biggan(**changed) -> dict[str, State]:
    sizes = SIZES | changed
    d_sizes = {name: sizes[name] for name in D_SIZES}
    made = {
        "G": weights(Network(biggans.GENERATOR, sizes).shapes(), 1),
        "D": weights(Network(biggans.DISCRIMINATOR, d_sizes).shapes(), 2),
    }
    return made | {"G_ema": weights(Network(biggans.GENERATOR, sizes).shapes(), 3)}


def save(folder: Path, networks: dict[str, State], suffix: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    for name, own in networks.items():
        torch.save(own, folder / f"{name}{suffix}.pth")
    # Nobody reads these: a read would fail.
    for name in ("G_optim", "D_optim", "state_dict"):
        (folder / f"{name}{suffix}.pth").write_bytes(b"no pickle")
    return folder


def check(output: Path, networks: dict[str, State]) -> None:
    read = modelsoup.open_checkpoint(output)
    wanted = {f"{n}.{name}": value for n, own in networks.items() for name, value in own.items()}
    assert set(read.tensors) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(torch.from_numpy(np.array(read[name])), value), name


def alive(own: State) -> State:
    return {n: v for n, v in own.items() if not n.startswith(("linear.", "embed."))}


def test_a_biggan_is_its_average_and_its_discriminator_is_the_encoder_too(tmp_path: Path):
    made, said = biggan(), []
    output = tmp_path / "out.safetensors"
    counts = import_biggan(save(tmp_path / "run", made), output, say=said.append)
    check(output, {"G": made["G_ema"], "D": made["D"], "E": alive(made["D"])})
    networks = {
        "G": Network(biggans.GENERATOR, SIZES), "D": Network(biggans.DISCRIMINATOR, D_SIZES),
        "E": Network(biggans.ENCODER, E_SIZES),
    }  # fmt: skip
    assert counts == {
        n: sum(p.numel() for p in own.build().parameters()) for n, own in networks.items()
    }
    assert said[0] == "G is the average over steps, G_ema.pth; G.pth is not read"
    assert "ImageNet" in said[1] and "not commercial" in said[1] and len(said) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "run"]


def test_files_of_a_suffix_are_taken_when_asked_for(tmp_path: Path):
    best = {name: {n: v + 1 for n, v in own.items()} for name, own in biggan().items()}
    folder = save(tmp_path / "run", best, "_best0")
    output = tmp_path / "out.safetensors"
    with pytest.raises(modelsoup.CheckpointError, match=r"no generator, G\.pth .*suffix best0"):
        import_biggan(folder, output, say=len)
    with pytest.raises(modelsoup.CheckpointError, match=r"G_best\.pth.*did you mean 'best0'"):
        import_biggan(folder, output, suffix="best", say=len)
    save(folder, biggan())
    save(folder, {"G": biggan()["G"]}, "_copy1")
    import_biggan(folder, output, suffix="best0", say=len)
    check(output, {"G": best["G_ema"], "D": best["D"], "E": alive(best["D"])})
    said = []
    import_biggan(folder, output, suffix="copy1", force=True, say=said.append)
    check(output, {"G": biggan()["G"]})
    assert said[0] == f"{folder} has no D: a training that starts from this makes one anew"


def test_wrappers_are_taken_off(tmp_path: Path):
    made = biggan()
    wrapped = {n: {f"module.{name}": v for name, v in own.items()} for n, own in made.items()}
    import_biggan(save(tmp_path / "run", wrapped), tmp_path / "out.safetensors", say=len)
    check(tmp_path / "out.safetensors", {"G": made["G_ema"], "D": made["D"], "E": alive(made["D"])})


def test_rows_of_other_classes_are_drawn_as_those_were_spread(tmp_path: Path):
    made = biggan(classes=400)
    made["D"]["embed.weight"] = made["D"]["embed.weight"] * 3 + torch.arange(64.0)
    made["G_ema"]["shared.weight"] = made["G_ema"]["shared.weight"] / 2 - 5
    folder = save(tmp_path / "run", made)
    outputs = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for output, seed in zip(outputs, (0, 0, 1), strict=True):
        import_biggan(folder, output, class_rows="resize", classes=300, seed=seed, say=len)
    assert outputs[0].read_bytes() == outputs[1].read_bytes() != outputs[2].read_bytes()
    read = modelsoup.open_checkpoint(outputs[0])
    for name, old in (
        ("D.embed", made["D"]["embed.weight"]), ("G.shared", made["G_ema"]["shared.weight"])
    ):  # fmt: skip
        new = torch.from_numpy(np.array(read[f"{name}.weight"]))
        assert new.shape == (300, old.shape[1])
        torch.testing.assert_close(new.mean(0), old.mean(0), atol=1.0, rtol=0.05)
        torch.testing.assert_close(new.std(0), old.std(0), atol=0.05, rtol=0.3)
    embed = torch.from_numpy(np.array(read["D.embed.weight"]))
    assert read["D.embed.u0"].shape == (1, 300)
    largest = torch.linalg.matrix_norm(embed, 2).item()
    assert read["D.embed.sv0"].tolist() == pytest.approx([largest], rel=1e-3)
    # Whatever else there is, is as it was.
    assert torch.equal(torch.from_numpy(np.array(read["D.linear.u0"])), made["D"]["linear.u0"])
    shapes = {name: info.shape for name, info in read.tensors.items()}
    found = biggans.generator_in(shapes, "G.")
    assert found == SIZES | {"classes": 300, "channels": 3, "least": 4}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"classes": 5}, "both are given or none"),
        ({"class_rows": "resize"}, "both are given or none"),
        ({"class_rows": "resize", "classes": 0}, "classes is 0, but must be at least 1"),
        ({"seed": -1}, "seed is -1, but must be at least 0"),
        ({"class_rows": "some"}, "class_rows is 'some', but must be keep or resize"),
    ],
)
def test_options_for_classes_that_do_not_fit_are_refused(tmp_path: Path, given, said):
    folder = save(tmp_path / "run", biggan())
    with pytest.raises(modelsoup.ParameterError, match=said):
        import_biggan(folder, tmp_path / "out.safetensors", say=len, **given)
    assert not (tmp_path / "out.safetensors").exists()


def test_networks_of_a_biggan_that_do_not_belong_together_are_told(tmp_path: Path):
    output = tmp_path / "out.safetensors"
    for changed, said in (
        ({"ch": 16}, r"D\.pth: the networks .* one model: ch is 8 in G and 16 in D"),
        ({"classes": 9}, r"D\.pth: the networks .* one model: classes is 7 in G and 9 in D"),
        ({"arch": "64s"}, r"D\.pth: the networks .* one model: arch is 32s in G and 64s in D"),
    ):
        folder = save(tmp_path / "run", biggan() | {"D": biggan(**changed)["D"]})
        with pytest.raises(modelsoup.MismatchError, match=said):
            import_biggan(folder, output, say=len)
    few = {name: v for name, v in biggan()["G"].items() if not name.startswith("blocks.1.")}
    folder = save(tmp_path / "other", {"G": few})
    with pytest.raises(modelsoup.MismatchError, match=r"G\.pth: .*generator.* as none of 32, 32s"):
        import_biggan(folder, output, say=len)
    lacking = {name: v for name, v in biggan()["G"].items() if name != "output_layer.0.gain"}
    folder = save(tmp_path / "other", {"G": lacking})
    with pytest.raises(modelsoup.MismatchError, match=r"G\.pth: .* lacks output_layer\.0\.gain"):
        import_biggan(folder, output, say=len)
    save(tmp_path / "styled", {"G": stylegan()["g_running"]})
    with pytest.raises(modelsoup.MismatchError, match=r"StyleGAN, .*`soup i2i import stylegan`"):
        import_biggan(tmp_path / "styled", output, say=len)
    assert not output.exists()


@pytest.mark.parametrize("import_", [import_biggan, import_deepi2i])
def test_what_is_no_such_folder_is_told(tmp_path: Path, import_):
    output = tmp_path / "out.safetensors"
    with pytest.raises(modelsoup.CheckpointError, match="nowhere does not exist"):
        import_(tmp_path / "nowhere", output, say=len)
    with pytest.raises(modelsoup.CheckpointError, match=r"such as G_ema\.pth"):
        import_(tmp_path, output, say=len)
    with pytest.raises(modelsoup.OutputError, match=r"must end in \.safetensors"):
        import_(tmp_path, tmp_path / "out.pth", say=len)
    damaged = save(tmp_path / "run", {})
    (damaged / "G.pth").write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(modelsoup.CheckpointError, match=r"G\.pth"):
        import_(damaged, output, say=len)
    assert not output.exists()


@pytest.mark.parametrize(
    ("from_scratch", "strength"), [(False, [0.1, 0.1]), (True, [0.1, 1.0])]
)  # fmt: skip
def test_deepi2is_networks_are_four_without_what_is_dead(tmp_path: Path, from_scratch, strength):
    made, said = biggan(), []
    del made["G_ema"]
    made["E1"] = weights(Network(biggans.DISCRIMINATOR, D_SIZES).shapes(), 4)
    told = Network(biggans.ADAPTOR, A_SIZES).shapes()
    del told["strength"]
    made["A1"] = weights(told | DEAD, 5)
    output = tmp_path / "out.safetensors"
    folder = save(tmp_path / "run", made)
    counts = import_deepi2i(folder, output, from_scratch=from_scratch, say=said.append)
    adaptor = alive(made["A1"]) | {"strength": torch.tensor(strength)}
    check(output, {"E": alive(made["E1"]), "A": adaptor, "G": made["G"], "D": made["D"]})
    assert list(counts) == ["E", "A", "G", "D"] and counts["A"] == 121_152
    assert len(said) == 1 and "DeepI2I's repository has none" in said[0]
    import_deepi2i(folder, output, force=True, class_rows="resize", classes=2, say=len)
    read = modelsoup.open_checkpoint(output)
    assert read["G.shared.weight"].shape == (2, 6) and read["D.embed.u0"].shape == (1, 2)
    assert "E.embed.weight" not in read.tensors


def stylegan(side: int = 128, seed: int = 0) -> dict[str, State]:
    """All layers up to 1024, of which those up to a side were trained."""
    full = {"official_layout": True}
    generator = Network(stylegans.GENERATOR, STYLE | full).shapes()
    judge = Network(stylegans.DISCRIMINATOR, {"width": 16} | full).shapes()
    adaptor = Network(stylegans.ADAPTOR, {"width": 16, "kind": "deepi2i"} | full).shapes()
    del adaptor["strength"]
    made = {
        "generator": weights(generator, seed), "discriminator": weights(judge, seed + 1),
        "g_running": weights(generator, seed + 2), "encoder": weights(judge, seed + 3),
        "align": weights(adaptor, seed + 4),
    }  # fmt: skip
    last = int(stylegans.draws(side))
    for network in ("generator", "g_running"):
        for name, tensor in made[network].items():
            if ".noise" in name and int(name.split(".")[2]) > last:
                tensor.zero_()
    return made


def of_size(own: State, side: int, *, judge: bool = True) -> State:
    network = stylegans.GENERATOR if "style.1.linear.bias" in own else (
        stylegans.DISCRIMINATOR if judge else stylegans.ENCODER
    )  # fmt: skip
    sizes = STYLE if network == stylegans.GENERATOR else {"width": 16}
    return {n: own[n] for n in Network(network, sizes | {"size": side}).shapes()}


def saved(path: Path, networks: dict, without: str = "encoder align") -> Path:
    torch.save({n: own for n, own in networks.items() if n not in without.split()}, path)
    return path


def test_a_stylegan_is_what_pictures_of_its_size_go_through(tmp_path: Path):
    made, said = stylegan(), []
    optimiser = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}
    file = saved(tmp_path / "a.model", made | {"g_optimizer": optimiser, "d_optimizer": optimiser})
    output = tmp_path / "out.safetensors"
    counts = import_stylegan(file, output, say=said.append)
    check(output, {
        "G": of_size(made["g_running"], 128), "D": of_size(made["discriminator"], 128),
        "E": of_size(made["discriminator"], 128, judge=False),
    })  # fmt: skip
    built = Network(stylegans.GENERATOR, STYLE | {"size": 128}).build()
    assert counts["G"] == sum(p.numel() for p in built.parameters())
    assert said[:2] == [
        "G is the average over steps, g_running; generator is not read",
        "its pictures are 128 × 128: larger layers were not trained",
    ]
    assert "FFHQ" in said[2] and "CC BY-NC-SA 4.0" in said[2] and len(said) == 3
    shapes = {n: info.shape for n, info in modelsoup.open_checkpoint(output).tensors.items()}
    assert stylegans.generator_in(shapes, "G.") == STYLE | {"size": 128, "channels": 3}


def test_a_stylegan_of_a_smaller_size_is_taken_when_asked_for(tmp_path: Path):
    file, output = saved(tmp_path / "a.model", stylegan()), tmp_path / "out.safetensors"
    import_stylegan(file, output, size=64, say=len)
    shapes = {n: info.shape for n, info in modelsoup.open_checkpoint(output).tensors.items()}
    assert stylegans.generator_in(shapes, "G.")["size"] == 64
    with pytest.raises(modelsoup.ParameterError, match=r"size is 256, but .* trained up to 128"):
        import_stylegan(file, output, size=256, force=True, say=len)
    with pytest.raises(modelsoup.ParameterError, match="size is 100, but a StyleGAN's is 64, 128"):
        import_stylegan(file, output, size=100, force=True, say=len)


def test_a_generator_alone_is_enough_and_what_lacks_is_said(tmp_path: Path):
    made, output = stylegan(256), tmp_path / "out.safetensors"
    for name, networks in (
        ("running", {"g_running": made["g_running"]}), ("plain", {"generator": made["g_running"]}),
        ("bare", made["g_running"]),
    ):  # fmt: skip
        said: list[str] = []
        file = tmp_path / f"{name}.model"
        torch.save(networks, file)
        import_stylegan(file, output, force=True, say=said.append)
        check(output, {"G": of_size(made["g_running"], 256)})
        assert f"{file} has no discriminator: a training that starts from this" in " ".join(said)


def test_what_is_no_stylegan_is_told(tmp_path: Path):
    output = tmp_path / "out.safetensors"
    with pytest.raises(modelsoup.CheckpointError, match="is no file, in which a StyleGAN's"):
        import_stylegan(tmp_path, output, say=len)
    big = tmp_path / "G.pth"
    torch.save(biggan()["G"], big)
    with pytest.raises(modelsoup.MismatchError, match=r"BigGAN, .*`soup i2i import biggan`"):
        import_stylegan(big, output, say=len)
    untrained = stylegan(64)
    for name, tensor in untrained["g_running"].items():
        if ".noise" in name:
            tensor.zero_()
    file = saved(tmp_path / "a.model", untrained)
    with pytest.raises(modelsoup.ParameterError, match="does not tell the size of its pictures"):
        import_stylegan(file, output, say=len)
    import_stylegan(file, output, size=512, say=len)
    judge = Network(stylegans.DISCRIMINATOR, {"width": 32, "official_layout": True}).shapes()
    saved(file, stylegan() | {"discriminator": weights(judge, 0)})
    with pytest.raises(modelsoup.MismatchError, match="G has the width 16, and D 32"):
        import_stylegan(file, output, force=True, say=len)
    lacking = stylegan()
    del lacking["g_running"]["generator.progression.3.adain2.style.linear.bias"]
    with pytest.raises(
        modelsoup.MismatchError, match=r"a\.model: .*lacks generator\.progression\.3"
    ):
        import_stylegan(saved(file, lacking), output, force=True, say=len)
    with pytest.raises(modelsoup.CheckpointError):
        import_stylegan(save(tmp_path / "x", {}) / "G_optim.pth", output, force=True, say=len)


def test_deepi2is_stylegan_has_its_own_encoder_and_adaptor(tmp_path: Path):
    made, output, said = stylegan(), tmp_path / "out.safetensors", []
    file = saved(tmp_path / "a.model", made, "")
    counts = import_deepi2i(file, output, say=said.append)
    adaptor = {n: v for n, v in made["align"].items() if not n.startswith("progression.0.")}
    check(output, {
        "E": of_size(made["encoder"], 128, judge=False),
        "A": adaptor | {"strength": torch.full((4,), 0.1)},
        "G": of_size(made["g_running"], 128), "D": of_size(made["discriminator"], 128),
    })  # fmt: skip
    assert counts["A"] == 4 * 2 * (16 * 16 * 9 + 16) and "has none" in said[-1]
    with pytest.raises(modelsoup.ParameterError, match="it has no classes, no suffix"):
        import_deepi2i(file, output, force=True, class_rows="resize", classes=2, say=len)
    with pytest.raises(modelsoup.ParameterError, match="is no file of StyleGAN"):
        import_deepi2i(save(tmp_path / "run", biggan()), output, force=True, size=128, say=len)


def soup(*words: str | Path):
    return CliRunner().invoke(main, ["i2i", "import", *map(str, words)])


def test_the_command_takes_a_kind(tmp_path: Path):
    folder, output = save(tmp_path / "run", biggan()), tmp_path / "out.safetensors"
    made = soup("biggan", folder, output, "--class-rows", "resize", "--classes", "3")
    assert made.exit_code == 0 and "G: 218" not in made.output and "D: " in made.stdout
    assert "licence: " in made.stderr and "licence: " not in made.stdout
    assert modelsoup.open_checkpoint(output)["G.shared.weight"].shape == (3, 6)
    refused = soup("biggan", folder, output)
    assert refused.exit_code == 1 and "exists" in refused.output
    file = saved(tmp_path / "a.model", stylegan(), "")
    for words in (("stylegan", file), ("deepi2i", file, "--size", 64)):
        made = soup(*words, output, "--force")
        assert made.exit_code == 0 and "E: " in made.stdout


def test_without_a_kind_it_is_a_cyclegan_and_a_mistyped_kind_is_told(tmp_path: Path):
    output = tmp_path / "out.safetensors"
    for words in ((), ("cyclegan",), ("pix2pix",)):
        refused = soup(*words, tmp_path, output)
        assert refused.exit_code == 1 and "such as latest_net_G_A.pth" in refused.output
    save(tmp_path / "run", biggan())
    refused = soup(tmp_path / "run", output)
    assert refused.exit_code == 1 and "`soup i2i import biggan` reads G.pth" in refused.output
    refused = soup("bigan", tmp_path, output)
    assert refused.exit_code != 0
    assert "there is no kind 'bigan'; did you mean 'biggan'" in refused.output
    assert "cyclegan" in soup("--help").output
