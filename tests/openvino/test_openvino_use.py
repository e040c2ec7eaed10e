"""Using what was exported: `soup openvino run` and `bench`, and what may be wrong with files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from modelsoup_i2i.pictures.images import ImageError, read_image, save_png
from modelsoup_openvino.infer import Translator, translate

import modelsoup
from modelsoup.terminal.cli import main


def soup(*arguments):
    return CliRunner().invoke(main, ["openvino", *map(str, arguments)])


def picture(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_a_model_runs_without_torch(made, data, tmp_path):
    out = tmp_path / "translated"
    script = (
        "import sys\n"
        "from modelsoup.terminal.cli import main\n"
        f"main(['openvino', 'run', {str(made.out / 'int8.xml')!r}, {str(data / 'testA')!r}, "
        f"{str(out)!r}], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'nncf' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == ["0.png", "1.png"]
    assert done.stdout.split() == [str(out / "0.png"), str(out / "1.png")]


def test_a_translation_is_that_of_torch_but_for_rounding(made, start, data):
    import torch
    from modelsoup_i2i.pictures.images import to_image, to_tensor
    from modelsoup_i2i.use.generators import load_generator

    image = read_image(data / "testA" / "0.png")
    with torch.no_grad():
        expected = to_image(load_generator(start, "x2y")(to_tensor(image)[None])[0])
    got = Translator(made.out / "fp32.xml")(image)
    assert np.abs(got.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(32, 32), (37, 51), (64, 20), (3, 9)])
def test_an_image_of_any_size_keeps_its_size(made, height, width):
    got = Translator(made.out / "int8.xml")(picture(height, width))
    assert got.shape == (height, width, 3)
    assert got.dtype == np.uint8
    assert got.std() > 0


@pytest.mark.parametrize(("height", "width"), [(40, 40), (39, 38), (33, 9), (3, 5)])
def test_sides_are_continued_and_cut_back_as_in_the_training(made, start, height, width):
    import torch
    from modelsoup_i2i.networks.layers import at_any_size
    from modelsoup_i2i.pictures.images import to_image, to_tensor
    from modelsoup_i2i.use.generators import load_generator

    image = picture(height, width)
    with torch.no_grad():
        expected = at_any_size(load_generator(start, "x2y"), to_tensor(image)[None])
    got = Translator(made.out / "fp32.xml")(image)
    assert np.abs(got.astype(int) - to_image(expected[0])).max() <= 1


@pytest.mark.parametrize(
    "array", [picture(32, 32) * np.uint16(257), picture(32, 32) / 255, picture(32, 32)[..., 0]]
)
def test_what_is_no_picture_of_8_bits_is_refused(made, array):
    with pytest.raises(modelsoup.ParameterError) as refused:
        Translator(made.out / "int8.xml")(array)
    assert str(refused.value) == (
        f"the picture is an array of {array.dtype} and the shape {list(array.shape)}, where the "
        f"model translates uint8 of the shape height × width × channels"
    )


def test_a_picture_of_16_bits_is_read_and_written_with_8(made, tmp_path):
    shallow, deep = tmp_path / "shallow.png", tmp_path / "deep.png"
    save_png(picture(32, 32), shallow)
    save_png(picture(32, 32) * np.uint16(257), deep)
    (tmp_path / "out").mkdir()
    for path in (shallow, deep):
        translate(made.out / "int8.xml", path, tmp_path / "out" / path.name)
    made_of = [read_image(tmp_path / "out" / path.name, deep=True) for path in (shallow, deep)]
    assert made_of[1].dtype == np.uint8
    assert np.array_equal(*made_of)


def test_one_image_becomes_one_file(made, tmp_path):
    save_png(picture(20, 24), tmp_path / "in.png")
    done = soup("run", made.out / "int8.xml", tmp_path / "in.png", tmp_path / "out.png")
    assert done.exit_code == 0, done.output
    assert read_image(tmp_path / "out.png").shape == (20, 24, 3)
    again = soup("run", made.out / "int8.xml", tmp_path / "in.png", tmp_path / "out.png")
    assert again.exit_code == 1
    assert "exists (--force replaces it)" in again.output
    forced = soup(
        "run", made.out / "int8.xml", tmp_path / "in.png", tmp_path / "out.png", "--force"
    )
    assert forced.exit_code == 0


def test_a_model_of_images_alone_takes_neither_class_nor_seed_nor_arrays(made, data, tmp_path):
    np.save(tmp_path / "z.npy", np.zeros(4))
    for option, said in (
        (("--class", "dog"), "takes no name of a class"),
        (("--z-seed", "1"), "takes no noise"),
        (("--given", f"z={tmp_path / 'z.npy'}"), "takes no 'z' (it takes images alone)"),
    ):
        done = soup("run", made.out / "int8.xml", data / "testA", tmp_path / "out", *option)
        assert done.exit_code == 1
        assert said in done.output
        assert not (tmp_path / "out").exists()


def test_a_name_that_would_drive_the_terminal_is_spelt_out(made, tmp_path):
    (tmp_path / "in").mkdir()
    save_png(picture(8, 8), tmp_path / "in" / "a\x1b[2J\nb.png")
    (tmp_path / "in" / "later.gif").touch()
    done = soup("run", made.out / "int8.xml", tmp_path / "in", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stdout == rf"{tmp_path}/out/a\x1b[2J\nb.png" + "\n"
    assert done.stderr.startswith("left out: 1 of ") and "later.gif" in done.stderr


def test_two_images_never_become_one_file(made, tmp_path):
    save_png(picture(8, 8), tmp_path / "a.png")
    shutil.copyfile(tmp_path / "a.png", tmp_path / "a.jpg")
    with pytest.raises(modelsoup.OutputError, match=r"would both become .*a\.png"):
        translate(made.out / "int8.xml", tmp_path, tmp_path / "out")


def test_an_image_is_never_replaced_by_its_own_translation(made, tmp_path):
    for name in ("a.png", "sub/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_png(picture(8, 8), tmp_path / name)
    files = [tmp_path / "a.png", tmp_path / "sub" / "a.png"]
    before = [file.read_bytes() for file in files]
    # A folder into itself, a file into itself and into its folder, and one over another's source.
    for source, target in (
        (tmp_path, tmp_path), (files[0], files[0]), (files[0], tmp_path / "sub" / ".."),
        (tmp_path, tmp_path / "sub"),
    ):  # fmt: skip
        done = soup("run", made.out / "int8.xml", source, target, "--force")
        assert done.exit_code == 1, done.output
        assert "would replace its own input" in done.output
    assert [file.read_bytes() for file in files] == before


def test_a_damaged_image_is_named_and_nothing_is_left_of_it(made, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"bad\.png"):
        translate(made.out / "int8.xml", tmp_path / "bad.png", tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_a_damaged_image_among_others_leaves_none_of_them(made, tmp_path):
    (tmp_path / "in").mkdir()
    save_png(picture(8, 8), tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"b\.png"):
        translate(made.out / "int8.xml", tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    (tmp_path / "file").touch()
    with pytest.raises(modelsoup.OutputError, match="file is a file, where a folder is expected"):
        translate(made.out / "int8.xml", tmp_path / "in", tmp_path / "file")


def test_an_empty_folder_and_a_missing_one_are_told(made, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(modelsoup.ParameterError, match="empty holds no image"):
        translate(made.out / "int8.xml", tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ImageError, match="nowhere does not exist"):
        translate(made.out / "int8.xml", tmp_path / "nowhere", tmp_path / "out")


def test_a_model_without_its_weights_is_told(made, tmp_path):
    shutil.copyfile(made.out / "int8.xml", tmp_path / "alone.xml")
    with pytest.raises(modelsoup.CheckpointError, match=r"no file .*alone\.bin .*alone\.xml"):
        Translator(tmp_path / "alone.xml")
    done = soup("bench", tmp_path / "alone.xml")
    assert done.exit_code == 1
    assert "alone.bin" in done.output
    assert "Traceback" not in done.output


def test_damaged_models_are_told(made, tmp_path):
    for name in ("int8.xml", "int8.bin"):
        shutil.copyfile(made.out / name, tmp_path / name)
    text = (tmp_path / "int8.xml").read_text()
    (tmp_path / "int8.xml").write_text(text[: len(text) // 2])
    with pytest.raises(modelsoup.CheckpointError, match=r"int8\.xml is damaged"):
        Translator(tmp_path / "int8.xml")
    (tmp_path / "int8.xml").write_text(text)
    (tmp_path / "int8.bin").write_bytes(b"\0" * 100)
    with pytest.raises(modelsoup.CheckpointError, match=r"int8\.xml is damaged"):
        Translator(tmp_path / "int8.xml")
    with pytest.raises(modelsoup.CheckpointError, match=r"its \.xml file is expected"):
        Translator(tmp_path / "int8.bin")


def test_a_model_of_something_else_is_refused(tmp_path):
    import openvino as ov
    from openvino import opset13 as op

    flat = op.parameter([1, 5], ov.Type.f32)
    ov.save_model(ov.Model([op.relu(flat)], [flat]), tmp_path / "flat.xml")
    with pytest.raises(modelsoup.ParameterError, match="one image in and one out"):
        Translator(tmp_path / "flat.xml")


def test_bench_lets_two_models_take_turns(made):
    xml, other = made.out / "int8.xml", made.out / "fp32.xml"
    done = soup("bench", xml, "--against", other, "--rounds", 2, "--size", 16, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert told["image"] == [1, 3, 16, 16]
    assert told["operations"][str(xml)]["Convolution"] == [8, 8]
    assert told["operations"][str(other)]["Convolution"] == [0, 8]
    for name in (str(xml), str(other)):
        speed = told["models"][name]
        assert min(speed["latency"], speed["one_thread"], speed["throughput"]) > 0
        assert speed["fastest"] <= speed["latency"]
        assert 0 < told["memory_mib"][name]["loaded"] <= told["memory_mib"][name]["peak"]
    page = soup("bench", xml, "--rounds", 1, "--size", 16).output
    assert "medians of 1 round, " in page
    (row,) = [line for line in page.splitlines() if line.startswith("|") and "int8.xml" in line]
    assert re.search(r"(?:\| [\d.]+ ){5}\| (\d+) of \1 \|$", row)
    again = soup("bench", xml, "--against", made.out / ".." / made.out.name / xml.name)
    assert again.exit_code == 1 and f"{xml} is given twice: name another" in again.output
    assert "at least 1" in soup("bench", xml, "--rounds", 0).output
