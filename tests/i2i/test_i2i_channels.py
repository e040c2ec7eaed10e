"""Pictures of 16 bits, and of any number of channels: read, trained on, translated and saved."""

from __future__ import annotations

import dataclasses
import io
import struct
import zipfile
import zlib
from pathlib import Path

import modelsoup_i2i
import numpy as np
import pytest
import torch
from i2i_domains import TINY
from modelsoup_i2i.measuring.evaluation import evaluate_model
from modelsoup_i2i.measuring.metrics import evaluate
from modelsoup_i2i.pictures.arrays import in_8_bits
from modelsoup_i2i.pictures.draws import Sampler
from modelsoup_i2i.pictures.images import (
    ImageError,
    read_image,
    resized,
    save_picture,
    to_image,
    to_tensor,
    with_channels,
)
from modelsoup_i2i.trainers.cyclegan import CycleGAN, CycleGANOptions
from modelsoup_i2i.trainers.gan import Gan, GanOptions
from modelsoup_i2i.trainers.pix2pix import Pix2Pix, Pix2PixOptions
from modelsoup_i2i.use.export import export_onnx
from modelsoup_i2i.use.sampling import sample
from modelsoup_i2i.use.translate import translate
from PIL import Image
from test_i2i_images import grey_tiff, tiff16

import modelsoup

torch.set_num_threads(1)


def noise(channels: int, size: int = 20, seed: int = 0, dtype: type = np.uint16) -> np.ndarray:
    most = np.iinfo(dtype).max + 1
    return np.random.default_rng(seed).integers(0, most, (size, size, channels), dtype)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_png_keeps_all_16_bits_and_is_read_as_8_where_those_are_wanted(
    channels: int, tmp_path: Path
):
    picture = noise(channels)
    save_picture(picture, tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", channels, deep=True)
    assert read.dtype == np.uint16 and np.array_equal(read, picture)
    with Image.open(tmp_path / "a.png") as image:
        image.load()  # sound for others, too
    plain = read_image(tmp_path / "a.png", channels)
    assert plain.dtype == np.uint8 and np.array_equal(plain, np.rint(picture / 257))


@pytest.mark.parametrize("interlaced", [False, True])
def test_grey_of_16_bits_with_opacity_keeps_both(interlaced: bool, tmp_path: Path):
    """Which Pillow reads as 8 bits of four channels, and does not write."""
    both = noise(2, size=9)
    starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
              (1, 0, 2, 1))  # fmt: skip
    passes = starts if interlaced else ((0, 0, 1, 1),)
    lines = [b"\0" + line.astype(">u2").tobytes() for top, left, down, across in passes
             for line in both[top::down, left::across]]  # fmt: skip
    head = struct.pack(">IIBBBBB", 9, 9, 16, 4, 0, 0, interlaced)
    packed = zlib.compress(b"".join(lines))
    told = b"".join(
        struct.pack(">I", len(own)) + name + own + struct.pack(">I", zlib.crc32(name + own))
        for name, own in ((b"IHDR", head), (b"IDAT", packed), (b"IEND", b""))
    )
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + told)
    grey, opacity = both[:, :, :1], both[:, :, 1:]
    whole = np.concatenate([grey, grey, grey, opacity], axis=2)
    assert np.array_equal(read_image(tmp_path / "a.png", 4, deep=True), whole)
    assert np.array_equal(read_image(tmp_path / "a.png", 4), np.rint(whole / 257))
    over_white = 65535 - (65535 - grey.astype(int)) * opacity / 65535
    assert np.abs(read_image(tmp_path / "a.png", 1, deep=True) - over_white).max() < 1


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_of_colours_keeps_all_16_bits(big: bool, tmp_path: Path):
    whole = tiff16(noise(3, dtype=np.uint8), big=big)
    values = noise(3).astype(">u2" if big else "<u2").tobytes()
    (tmp_path / "a.tif").write_bytes(whole[:8] + values + whole[8 + len(values) :])
    assert np.array_equal(read_image(tmp_path / "a.tif", deep=True), noise(3))
    grey = grey_tiff(np.array([0, 1, 2, 65535], "<u2").tobytes(), white_is_zero=True)
    (tmp_path / "grey.tif").write_bytes(grey)
    read = read_image(tmp_path / "grey.tif", 1, deep=True)
    assert read[0, :, 0].tolist() == [65535, 65534, 65533, 0]


def test_one_value_of_16_bits_that_is_transparent_is_no_other(tmp_path: Path):
    deep = Image.fromarray(np.array([[0, 514, 515]], np.uint16))
    deep.save(tmp_path / "a.png", transparency=514)
    read = read_image(tmp_path / "a.png", 4, deep=True)
    assert read[0].tolist() == [[0, 0, 0, 65535], [514, 514, 514, 0], [515, 515, 515, 65535]]
    assert read_image(tmp_path / "a.png", 1, deep=True)[0, :, 0].tolist() == [0, 65535, 515]
    save_picture(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint16), tmp_path / "rgb.png")
    whole, key = (tmp_path / "rgb.png").read_bytes(), b"tRNS" + struct.pack(">3H", 1, 2, 3)
    chunk = struct.pack(">I", 6) + key + struct.pack(">I", zlib.crc32(key))
    (tmp_path / "rgb.png").write_bytes(whole[:33] + chunk + whole[33:])
    read = read_image(tmp_path / "rgb.png", 4, deep=True)
    assert read[0].tolist() == [[1, 2, 3, 0], [1, 2, 4, 65535]]


@pytest.mark.parametrize("have", [1, 3, 4])
@pytest.mark.parametrize("wanted", [1, 3, 4])
def test_channels_of_16_bits_become_others_as_those_of_8_do(have: int, wanted: int):
    picture = noise(have, dtype=np.uint8)
    deep = with_channels(picture.astype(np.uint16) * 257, wanted)
    plain = with_channels(picture, wanted)
    assert deep.dtype == np.uint16 and deep.shape == plain.shape
    assert np.abs(in_8_bits(deep).astype(int) - plain).max() <= 1


def test_16_bits_survive_a_resize_and_the_way_to_a_tensor_and_back():
    ramp = np.repeat(np.arange(1000, 1040, dtype=np.uint16)[None, :, None], 40, 0)
    half = resized(ramp, (20, 20))  # forty steps, of which 8 bits know one
    assert half.dtype == np.uint16 and len(np.unique(half)) == 20
    assert np.abs(half[0, 2:-2, 0] - np.arange(1004.5, 1036, 2)).max() <= 1
    every = np.arange(1 << 16, dtype=np.uint16).reshape(128, 128, 4)
    tensor = to_tensor(every)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert np.array_equal(to_image(tensor, deep=True), every)
    five = noise(5, dtype=np.uint8)
    assert np.array_equal(resized(five, (9, 7))[:, :, 1:4], resized(five[:, :, 1:4], (9, 7)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", [".npy", ".npz", ".tif"])
def test_any_number_of_channels_is_saved_and_read(suffix: str, dtype: type, tmp_path: Path):
    picture, file = noise(5, dtype=dtype), tmp_path / f"a{suffix}"
    save_picture(picture, file)
    read = read_image(file, 5, deep=True)
    assert read.dtype == dtype and np.array_equal(read, picture)
    assert np.array_equal(read_image(file, 5), in_8_bits(picture))
    with pytest.raises(ImageError, match=r"7 .*are expected"):
        read_image(file, 7)
    with pytest.raises(modelsoup.OutputError, match=r"must end in \.npy or \.npz or \.tif"):
        save_picture(picture, tmp_path / "b.png")
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_arrays_have_their_channels_first_or_last(tmp_path: Path):
    for name, values in (
        ("last", noise(5)), ("first", np.moveaxis(noise(5), 2, 0)), ("columns", noise(5)),
        ("big", noise(5).astype(">u2")),
    ):  # fmt: skip
        np.save(tmp_path / name, np.asfortranarray(values) if name == "columns" else values)
        assert np.array_equal(read_image(tmp_path / f"{name}.npy", 5, deep=True), noise(5))
    np.save(tmp_path / "grey.npy", noise(1)[:, :, 0])
    assert np.array_equal(read_image(tmp_path / "grey.npy", 3, deep=True)[:, :, 2:], noise(1))
    np.savez(tmp_path / "two.npz", image=noise(5), mask=noise(2))
    assert np.array_equal(read_image(tmp_path / "two.npz", 5, deep=True), noise(5))


def written(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def archive(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, data in members.items():
            made.writestr(f"{name}.npy", data)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (written(np.zeros((4, 4, 5), np.float32)), "float32, where uint8 or uint16 are expected"),
        (written(noise(5))[:-1], "its header claims .*20, 20, 5. of uint16, and 3999 bytes"),
        (written(noise(5)).replace(b"(20, 20, 5)", b"(99, 99, 9)"), "its header claims"),
        (written(noise(6)), r"shape \[20, 20, 6\], where 5 channels are expected, first or last"),
        (written(np.array([{}], object)), "its values are object, where uint8"),
        (archive(a=b"", b=b""), "it has 2 arrays, none of which is called image"),
        (archive(image=written(noise(5)))[:-30], "it is no whole archive"),
        (b"\x93NUMPY", "cannot be read"),
    ],
)
def test_an_array_that_is_no_picture_is_named(data: bytes, said: str, tmp_path: Path):
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(ImageError, match=rf"a\.npy cannot be read as an image: .*{said}|{said}"):
        read_image(tmp_path / "a.npy", 5)


def test_a_picture_of_other_channels_than_a_model_is_named(tmp_path: Path):
    save_picture(noise(3), tmp_path / "a.png")
    with pytest.raises(ImageError, match="PNG of 3 channels, where 5 are expected, which arrays"):
        read_image(tmp_path / "a.png", 5)
    pages = [Image.fromarray(noise(1, size)[:, :, 0]) for size in (8, 9)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(ImageError, match="its pages differ in size or depth"):
        read_image(tmp_path / "a.tif", 2)


@pytest.mark.needs("tiff")
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_of_many_bands_is_read(dtype: type, tmp_path: Path):
    import tifffile

    tifffile.imwrite(tmp_path / "a.tif", noise(6, dtype=dtype), photometric="minisblack",
                     planarconfig="contig")  # fmt: skip
    tifffile.imwrite(tmp_path / "b.tif", np.moveaxis(noise(6, dtype=dtype), 2, 0),
                     photometric="minisblack", planarconfig="separate")  # fmt: skip
    for name in ("a.tif", "b.tif"):
        read = read_image(tmp_path / name, 6, deep=True)
        assert read.dtype == dtype and np.array_equal(read, noise(6, dtype=dtype))
        with pytest.raises(ImageError, match="where 7 channels are expected"):
            read_image(tmp_path / name, 7)


def domains(root: Path, suffix: str, channels: int, dtype: type = np.uint16) -> Path:
    """Folders of pairs: B is A, dimmed."""
    for part in ("train", "test"):
        for kind in "AB":
            (root / f"{part}{kind}").mkdir(parents=True)
            for n in range(3):
                picture = noise(channels, 24, n + 10 * (part == "test"), dtype)
                made = picture if kind == "A" else picture // 2
                save_picture(made, root / f"{part}{kind}" / f"{n}{suffix}")
    return root


def test_a_training_sees_all_16_bits_also_beside_pictures_of_8(tmp_path: Path):
    data = domains(tmp_path / "data", ".png", 1)
    save_picture(noise(1, 24, 9, np.uint8), data / "trainA" / "0.png")
    options = CycleGANOptions(
        data=data, **(TINY | {"channels": 1, "mode": "crop", "flip": False, "crop_size": 24})
    )
    session = CycleGAN().session(options, None, seed=1)
    sampler = Sampler(session.pictures, CycleGAN().draws(options), 1, 3)
    batch = sampler.batch_at(0, 0, sampler.order(0))["a"]
    levels = (batch + 1) * 127.5
    between = ((levels - levels.round()).abs() > 0.01).float().mean((1, 2, 3)).sort().values
    assert between[0] == 0 and between[1] > 0.9  # of 8 bits all are whole
    wanted = {read_image(f, 1, deep=True).tobytes() for f in (data / "trainA").iterdir()}
    assert {to_image(one, deep=deep).tobytes() for one in batch for deep in (False, True)} > wanted


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_a_model_of_five_channels_is_trained_used_and_exported(suffix: str, tmp_path: Path):
    data = domains(tmp_path / "data", suffix, 5)
    options = CycleGANOptions(data=data, **(TINY | {"channels": 5, "epochs": 1, "sheet_every": 3}))
    work, model = tmp_path / "work", tmp_path / "m.safetensors"
    work.mkdir()
    job = modelsoup.Job(None, model, work, (), 1, options, lambda *_: None, lambda _: None)
    CycleGAN().train(job)
    assert CycleGAN().options_of(model)["channels"] == 5
    assert (work / "samples" / "step-0000003.png").is_file()  # its first three, as colours
    (first, *_) = translate(model, data / "testA", tmp_path / "out", device="cpu")
    assert first == tmp_path / "out" / f"0{suffix}"
    made = read_image(first, 5, deep=True)
    assert made.dtype == np.uint16 and made.shape == (24, 24, 5)
    with torch.no_grad():
        seen = to_tensor(read_image(data / "testA" / f"0{suffix}", 5, deep=True))[None]
        wanted = to_image(modelsoup_i2i.load_generator(model)(seen)[0], deep=True)
    assert np.abs(made.astype(int) - wanted).max() <= 1
    assert translate(model, data / "testA" / f"1{suffix}", tmp_path / f"x{suffix}", device="cpu")
    with pytest.raises(modelsoup.OutputError, match=rf"must end in \{suffix} "):
        translate(model, data / "testA" / f"1{suffix}", tmp_path / "x.png", device="cpu")
    with pytest.raises(
        modelsoup.ParameterError,
        match="fd-st-alex looks at colours, and pictures of 5 channels have none: psnr and ssim",
    ):
        evaluate_model(model, data, metrics=["psnr", "fd-st-alex"])
    assert [found.name for found in evaluate_model(model, data)] == ["psnr", "ssim"]


def test_what_a_gan_of_five_channels_makes_is_an_array(tmp_path: Path):
    options = GanOptions(
        size="32s", ch=8, chunk=4, shared=8, attention=0, channels=5, classes=2, device="cpu"
    )
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir()
        for n in range(2):
            save_picture(noise(5, 32, n), tmp_path / "data" / name / f"{n}.npy")
    session = Gan().session(
        dataclasses.replace(options, classes=(), data=tmp_path / "data"), None, seed=1
    )
    session.save(tmp_path / "m.safetensors")
    made = sample(tmp_path / "m.safetensors", tmp_path / "out", classes="b", count=2, device="cpu")
    assert [path.name for path in made] == ["1.npy", "2.npy"]
    assert read_image(made[1], 5).shape == (32, 32, 5)


@pytest.mark.needs("onnx")
def test_an_export_has_the_channels_of_the_model(tmp_path: Path):
    import onnx

    data = domains(tmp_path / "data", ".npy", 5, np.uint8)
    options = CycleGANOptions(data=data, **(TINY | {"channels": 5}))
    CycleGAN().session(options, None, seed=1).save(tmp_path / "m.safetensors")
    export_onnx(tmp_path / "m.safetensors", tmp_path / "m.onnx", size=16)
    (seen,) = onnx.load(tmp_path / "m.onnx").graph.input
    assert [side.dim_value for side in seen.type.tensor_type.shape.dim][1:] == [5, 16, 16]


def test_pairs_of_two_channels_are_trained_on_and_measured(tmp_path: Path):
    data = domains(tmp_path / "data", ".npz", 2, np.uint8)
    given = {
        "data": data, "channels": 2, "load_size": 16, "crop_size": 16, "width": 4, "d_width": 4,
        "patch": 16, "epochs": 1, "sheet_every": 0, "threads": 0, "device": "cpu",
        "evaluate": ["psnr", "ssim"],
    }  # fmt: skip
    (tmp_path / "work").mkdir()
    figures: dict[str, float] = {}
    model = tmp_path / "m.safetensors"
    job = modelsoup.Job(
        None, model, tmp_path / "work", (), 1, Pix2PixOptions(**given),
        lambda _, told: figures.update(told), print,
    )  # fmt: skip
    Pix2Pix().train(job)
    translate(model, data / "testA", tmp_path / "out", device="cpu")
    made, truth = (
        [resized(read_image(folder / f"{n}.npz", 2), (16, 16)) for n in range(3)]
        for folder in (data / "testA", data / "testB")
    )
    assert figures["psnr"] > 0 and -1 < figures["ssim"] < 1
    (of_inputs,) = evaluate(made, truth, truth=truth, metrics=["psnr"])
    error = [((a.astype(float) - b) ** 2).mean() for a, b in zip(made, truth, strict=True)]
    by_hand = np.mean(10 * np.log10(255**2 / np.array(error)))
    assert of_inputs.value == pytest.approx(by_hand)  # of both channels
    with pytest.raises(modelsoup.TrainerError, match="fid-64 looks at colours"):
        modelsoup.build_options(Pix2Pix(), given | {"data": str(data), "evaluate": ["fid-64"]})
