"""Use of a model: files, folders, any size, ONNX."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from modelsoup_i2i.networks.layers import at_any_size
from modelsoup_i2i.networks.resnet import ResnetGenerator
from modelsoup_i2i.pictures.images import read_image, save_png, to_image, to_tensor
from modelsoup_i2i.use.export import export_onnx
from modelsoup_i2i.use.generators import load_generator
from modelsoup_i2i.use.translate import translate, translated_arrays
from safetensors.torch import save_file

import modelsoup


@pytest.fixture
def model(tmp_path: Path) -> Path:
    state = {}
    for seed, name in enumerate(("G_A", "G_B")):
        torch.manual_seed(seed)
        network = ResnetGenerator(4, 1).state_dict()
        state |= {f"{name}.{key}": values for key, values in network.items()}
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    sizes = {"a.png": (16, 20), "b.png": (16, 20), "sub/c.png": (17, 23), "sub/d.png": (16, 20)}
    for name, size in sizes.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(rng.integers(0, 256, (*size, 3), np.uint8), tmp_path / "photos" / name)
    return tmp_path / "photos"


def expected(model: Path, file: Path, direction: str) -> np.ndarray:
    with torch.no_grad():
        image = to_tensor(read_image(file))[None]
        return to_image(at_any_size(load_generator(model, direction), image)[0])


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("direction", ["x2y", "y2x"])
def test_a_folder_keeps_names_sizes_and_sub_folders(model, photos, tmp_path, direction):
    told = []
    written = translate(
        model, photos, tmp_path / "out", direction=direction, batch=2, device="cpu",
        progress=lambda done, of: told.append((done, of)),
    )  # fmt: skip
    assert files(tmp_path / "out") == files(photos)
    assert told == [(n, 4) for n in range(1, 5)]
    for file in written:
        own = expected(model, photos / file.relative_to(tmp_path / "out"), direction)
        # A batch may round otherwise than a single picture.
        assert np.abs(read_image(file).astype(int) - own).max() <= 1


def of_channels(folder: Path, channels: int) -> Path:
    torch.manual_seed(channels)
    state = ResnetGenerator(4, 1, channels).state_dict()
    save_file({f"G_A.{k}": v for k, v in state.items()}, folder / f"{channels}.safetensors")
    return folder / f"{channels}.safetensors"


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_have_as_many_channels_as_the_model(photos, tmp_path, channels):
    model = of_channels(tmp_path, channels)
    translate(model, photos, tmp_path / "out", device="cpu")
    network = load_generator(model)
    for name in files(photos):
        image = to_tensor(read_image(photos / name, channels))[None]
        with torch.no_grad():
            own = to_image(at_any_size(network, image)[0])
        made = read_image(tmp_path / "out" / name, channels)
        assert made.shape == own.shape and np.abs(made.astype(int) - own).max() <= 1
    with pytest.raises(modelsoup.ParameterError, match=f"has 3 channels.* such of {channels}"):
        list(translated_arrays(model, [np.zeros((8, 8, 3), np.uint8)], device="cpu"))


def test_pictures_of_other_channels_than_the_model_s_are_told(photos, tmp_path):
    with pytest.raises(modelsoup.SoupError, match=r"PNG of 3 channels, where 2 are expected"):
        translate(of_channels(tmp_path, 2), photos, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_name_that_would_drive_the_terminal_is_spelt_out(model, photos, tmp_path):
    from click.testing import CliRunner

    from modelsoup.terminal.cli import main

    (photos / "a\x1b[2J\n4 written.gif").touch()
    asked = ["i2i", "translate", str(model), str(photos), str(tmp_path / "out"), "--device", "cpu"]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 0 and done.stdout == f"4 written to {tmp_path / 'out'}\n"
    assert len(done.stderr.splitlines()) == 1 and "\x1b" not in done.stderr
    assert r"such as a\x1b[2J\n4 written.gif" in done.stderr


def test_how_far_it_is_is_told_on_stderr(model, photos, tmp_path, monkeypatch):
    """In place on a terminal, elsewhere once a minute."""
    from types import SimpleNamespace

    from click.testing import CliRunner

    from modelsoup.terminal.cli import main

    def asked(output: str, *, is_terminal: bool):
        stream = SimpleNamespace(isatty=lambda: is_terminal)
        monkeypatch.setattr("modelsoup_i2i.cli.sys", SimpleNamespace(stderr=stream))
        given = [str(model), str(photos), str(tmp_path / output), "--device", "cpu", "--batch", "1"]
        return CliRunner().invoke(main, ["i2i", "translate", *given])

    on_a_terminal = asked("one", is_terminal=True)
    assert on_a_terminal.stderr == "\r1/4\r2/4\r3/4\r4/4\n"
    assert on_a_terminal.stdout == f"4 written to {tmp_path / 'one'}\n"
    assert asked("two", is_terminal=False).stderr == ""
    minutes = iter(range(0, 10_000, 40))  # each second time is over a minute later
    clock = SimpleNamespace(monotonic=lambda: next(minutes))
    monkeypatch.setattr("modelsoup_i2i.cli.time", clock)
    assert asked("three", is_terminal=False).stderr == "2/4\n4/4\n"


def test_pictures_that_are_not_read_are_named(model, photos, tmp_path):
    (photos / "e.gif").touch()
    said = []
    translate(model, photos, tmp_path / "out", device="cpu", say=said.append)
    assert files(tmp_path / "out") == [name for name in files(photos) if name != "e.gif"]
    assert len(said) == 1 and said[0].startswith("left out: 1 of ") and "e.gif" in said[0]


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (4, 4), (5, 4), (4, 40), (7, 9)])
def test_the_smallest_pictures_are_translated_too(model, tmp_path, size):
    dot = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    save_png(dot, tmp_path / "dot.png")
    translate(model, tmp_path / "dot.png", tmp_path / "made.png", device="cpu")
    assert read_image(tmp_path / "made.png").shape == dot.shape


def test_a_picture_goes_into_a_folder_that_is_there_under_its_name(model, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (written,) = translate(model, photos / "sub/c.png", tmp_path / "out", device="cpu")
    assert written == tmp_path / "out" / "c.png"
    with pytest.raises(modelsoup.OutputError, match="would replace its own input"):
        translate(model, photos / "sub/c.png", photos / "sub", device="cpu", force=True)
    with pytest.raises(modelsoup.OutputError, match=r"nowhere must end in \.png"):
        translate(model, photos / "sub/c.png", tmp_path / "nowhere", device="cpu")


def test_one_picture(model, photos, tmp_path):
    translate(model, photos / "sub/c.png", tmp_path / "c.png", device="cpu")
    own = expected(model, photos / "sub/c.png", "x2y")
    assert (read_image(tmp_path / "c.png") == own).all()


@pytest.mark.parametrize("there", [False, True])
def test_a_corrupt_picture_is_named_and_leaves_nothing(model, photos, tmp_path, there):
    (photos / "sub/d.png").write_bytes(b"no picture")
    with pytest.raises(modelsoup.SoupError, match=r"d\.png"):
        translate(model, photos, tmp_path / "new" / "deep" / "out", batch=1, device="cpu")
    assert not (tmp_path / "new").exists()
    if there:
        (tmp_path / "out").mkdir()
    before = files(tmp_path)
    with pytest.raises(modelsoup.SoupError, match=r"d\.png"):
        translate(model, photos, tmp_path / "out", batch=1, device="cpu")
    assert files(tmp_path) == before
    assert (tmp_path / "out").exists() == there


def test_what_is_there_is_refused_and_replaced_with_force(model, photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is fine
    translate(model, photos, out, device="cpu")
    (out / "a.png").write_bytes(b"old")
    (out / "mine.txt").write_text("mine")
    with pytest.raises(modelsoup.OutputError, match="exists"):
        translate(model, photos, out, device="cpu")
    assert (out / "a.png").read_bytes() == b"old"
    translate(model, photos, out, device="cpu", force=True)
    assert read_image(out / "a.png").shape == (16, 20, 3)
    assert files(out) == sorted([*files(photos), "mine.txt"])


@pytest.mark.parametrize("source", [".", "a.png"])
def test_what_appears_meanwhile_is_left_alone(model, photos, tmp_path, source):
    out = tmp_path / ("out" if source == "." else "out.png")

    def meanwhile(*_: int) -> None:
        if not out.exists():
            (out if source != "." else out.mkdir() or out / "a.png").write_text("somebody's")

    with pytest.raises(modelsoup.OutputError, match="appeared while it was made"):
        translate(model, photos / source, out, device="cpu", progress=meanwhile)
    assert (out / "a.png" if source == "." else out).read_text() == "somebody's"
    assert not [name for name in files(tmp_path) if "soup-partial" in name]


def test_no_picture_takes_the_place_of_a_folder_nor_a_folder_that_of_a_file(
    model, photos, tmp_path
):
    """And that is known before anything is put in place."""
    out = tmp_path / "out"
    (out / "a.png").mkdir(parents=True)
    with pytest.raises(modelsoup.OutputError, match=r"a\.png is a folder, where a file is to be"):
        translate(model, photos, out, device="cpu", force=True)
    (out / "a.png").rmdir()
    (out / "sub").write_text("mine")
    with pytest.raises(modelsoup.OutputError, match="sub is a file, where a folder is expected"):
        translate(model, photos, out, device="cpu", force=True)
    assert files(out) == ["sub"]


def test_where_an_onnx_model_cannot_be_is_told_before_it_is_made(model, tmp_path):
    (tmp_path / "link.onnx").symlink_to("nowhere")
    for name, said in (("link.onnx", "exists"), ("nodir/x.onnx", "nodir of the output x.onnx")):
        with pytest.raises(modelsoup.OutputError, match=said):
            export_onnx(model, tmp_path / name)
    assert os.readlink(tmp_path / "link.onnx") == "nowhere"


def test_wrong_words_are_refused(model, photos, tmp_path):
    for words, fault in (
        ({"batch": 0}, "batch is 0"), ({"device": "gpu"}, "'gpu', but must be auto"),
        ({"direction": "z"}, "'z'"),
    ):  # fmt: skip
        with pytest.raises(modelsoup.ParameterError, match=fault):
            translate(model, photos, tmp_path / "out", **{"device": "cpu", **words})
    (tmp_path / "empty").mkdir()
    with pytest.raises(modelsoup.ParameterError, match="no images"):
        translate(model, tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_there_is_named(model, tmp_path):
    with pytest.raises(modelsoup.SoupError, match=r"nowhere does not exist"):
        translate(model, tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arrays_are_read_one_batch_ahead_at_most(model):
    read = []

    def pictures():
        for n in range(6):
            read.append(n)
            yield np.full((16, 16, 3), n, np.uint8)

    made = translated_arrays(model, pictures(), batch=2, device="cpu")
    next(made)
    assert len(read) <= 3
    assert len(list(made)) == 5


@pytest.mark.needs("onnx")
@pytest.mark.timeout(60)
def test_an_onnx_model_of_grey_pictures_has_one_channel(tmp_path):
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = of_channels(tmp_path, 1)
    evaluator = ReferenceEvaluator(onnx.load(export_onnx(model, tmp_path / "grey.onnx", size=16)))
    images = torch.rand(1, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        own = load_generator(model)(images).numpy()
    (result,) = evaluator.run(None, {"image": images.numpy()})
    np.testing.assert_allclose(result, own, atol=1e-5)


@pytest.mark.timeout(60)
def test_an_onnx_model_gives_what_torch_gives_at_any_size(model, tmp_path):
    import onnx
    from onnx.reference import ReferenceEvaluator

    out = export_onnx(model, tmp_path / "model.onnx", direction="y2x")
    written = onnx.load(out)
    metadata = {p.key: p.value for p in written.metadata_props}
    assert metadata["modelsoup.xxh3_128"] == modelsoup.digest_file(model).xxh3_128
    assert metadata["modelsoup.direction"] == "y2x"
    evaluator, network = ReferenceEvaluator(written), load_generator(model, "y2x")
    for shape in ((1, 3, 20, 36), (3, 3, 32, 16)):
        images = torch.rand(shape) * 2 - 1
        with torch.no_grad():
            own = network(images).numpy()
        (result,) = evaluator.run(None, {"image": images.numpy()})
        np.testing.assert_allclose(result, own, atol=1e-5)
    with pytest.raises(modelsoup.OutputError, match="exists"):
        export_onnx(model, out)
    assert files(tmp_path) == ["model.onnx", "model.safetensors"]


@pytest.mark.needs("onnx")
def test_a_missing_onnx_is_a_sentence(model, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(modelsoup.SoupError, match=r"pip install -e '\.\[onnx\]'"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
