"""The trainer: whole trainings, resume after kill -9, trees, options, and what the core is told."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from i2i_domains import TINY, make_domains
from modelsoup_i2i.measuring.evaluation import evaluate_model, find_sets
from modelsoup_i2i.pictures.images import save_png
from modelsoup_i2i.trainers.cyclegan import CycleGAN, CycleGANOptions
from modelsoup_i2i.training import processes

import modelsoup
from modelsoup.files.digest import content_of

HERE = Path(__file__).parent
torch.set_num_threads(1)  # a tiny network has nothing for a second one; bits depend on how many


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_domains(tmp_path_factory.mktemp("domains"))


class Told:
    """What a trainer reports and logs."""

    def __init__(self) -> None:
        self.done: list[float | None] = []
        self.metrics: dict[str, float] = {}
        self.lines: list[str] = []
        self.notes: dict[str, object] = {}

    def report(self, done, metrics) -> None:
        self.done.append(done)
        self.metrics |= metrics


def train(
    folder: Path, data: Path | None, *, start=None, seed=5, frozen=(), log=None, **options
) -> Told:
    """Train in a folder; `out.safetensors` is the result. `log` is called with each line."""
    told = Told()
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)

    def take(line: str) -> None:
        told.lines.append(line)
        if log is not None:
            log(line)

    CycleGAN().train(
        modelsoup.Job(
            start, folder / "out.safetensors", work, tuple(frozen), seed,
            CycleGANOptions(data=data, **(TINY | options)), told.report, take, told.notes.update,
        )
    )  # fmt: skip
    return told


def result(folder: Path) -> dict[str, np.ndarray]:
    opened = modelsoup.open_checkpoint(folder / "out.safetensors")
    return {name: opened[name] for name in opened}


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(values, second[name]) for name, values in first.items()
    )


def test_a_training_writes_all_four_networks_and_tells_how_it_goes(data: Path, tmp_path: Path):
    told = train(tmp_path, data, sheet_every=5, tensorboard=True)
    options = CycleGANOptions(data=data, **TINY)
    told_of = CycleGAN().tensors(options)
    made = modelsoup.open_checkpoint(tmp_path / "out.safetensors")
    assert {n: (i.dtype, i.shape) for n, i in made.tensors.items()} == told_of
    assert told.done[-1] == 1 and told.metrics["diverged"] == 0 and told.metrics["steps"] == 12
    assert told.metrics["cycle_a"] > 0 and told.metrics["seconds_left"] == 0
    assert "initialised all" in told.lines[0]
    assert any(line.startswith("epoch 2 of 2: ") for line in told.lines)
    sheets = sorted(path.name for path in (tmp_path / "work" / "samples").iterdir())
    assert sheets == ["step-0000005.png", "step-0000010.png", "step-0000012.png"]
    assert list((tmp_path / "work" / "tensorboard").glob("events.*"))


def test_samples_and_events_stay_in_a_folder_that_is_named(data: Path, tmp_path: Path):
    shown = tmp_path / "shown"
    train(tmp_path, data, sheet_every=12, tensorboard=True, samples=shown)
    assert (shown / "work" / "samples" / "step-0000012.png").is_file()
    assert list((shown / "work" / "tensorboard").glob("events.*"))
    assert not (tmp_path / "work" / "samples").exists()
    elsewhere, plain = (CycleGANOptions(data=data, samples=place) for place in (shown, None))
    assert CycleGAN().identity(elsewhere) == CycleGAN().identity(plain)


@pytest.mark.parametrize("part", ["trainA", "trainB/pages", "testA", "testB"])
def test_samples_never_lie_among_the_pictures(part: str, data: Path, tmp_path: Path):
    """They would be trained on, or the key would be another, at the next run."""
    (tmp_path / "link").symlink_to(data)
    for folders in (
        {"data": data},
        {"data_a": data / "trainA", "data_b": data / "trainB", "test_a": data / "testA",
         "test_b": data / "testB"},
    ):  # fmt: skip
        for samples in (data / part, tmp_path / "link" / part):
            with pytest.raises(ValueError, match="is taken for pictures"):
                CycleGANOptions(**folders, samples=samples)
        assert CycleGANOptions(**folders, samples=data / "pages").samples == data / "pages"


def test_the_same_seed_gives_the_same_weights_and_another_others(data: Path, tmp_path: Path):
    for name, options in (("a", {}), ("b", {"threads": 3, "cache_mb": 0}), ("c", {"seed": 6})):
        train(tmp_path / name, data, **options)
    first = result(tmp_path / "a")
    assert same(first, result(tmp_path / "b"))
    assert not same(first, result(tmp_path / "c"))


STEPS = 40  # in 2 epochs of 20

KILLED = """
import os, sys
sys.path.insert(0, {here!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from modelsoup_i2i.training import state
from test_i2i_cyclegan import train
if {at}:
    whole = state.State.take
    def take(self, group):
        if self.steps == {at}:
            os.kill(os.getpid(), 9)
        return whole(self, group)
    state.State.take = take
train(Path({folder!r}), Path({data!r}), **{options!r})
"""


def in_a_process(folder: Path, data: Path, at: int, options: dict) -> int:
    script = KILLED.format(
        here=str(HERE), at=at, folder=str(folder), data=str(data), options=options
    )
    return subprocess.run([sys.executable, "-c", script], check=False).returncode


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path):
    """Killed before there is a state, begun again, killed between two states, and resumed."""
    data = make_domains(tmp_path / "domains", count_a=STEPS // 2)
    options = {"checkpoint_every": 7, "decay_epochs": 1, "epochs": 1}
    whole = train(tmp_path / "whole", data, **options)
    for at in (3, 17):
        assert in_a_process(tmp_path / "killed", data, at, options) == -signal.SIGKILL
        assert not (tmp_path / "killed" / "out.safetensors").exists()
        assert (tmp_path / "killed" / "work" / "state.pt").exists() == (at > 7)
    told = train(tmp_path / "killed", data, **options)
    assert told.lines[0] == f"goes on after step 14 of {STEPS}"
    assert same(result(tmp_path / "whole"), result(tmp_path / "killed"))
    assert told.metrics == whole.metrics
    # Killed after the last state, before the node was done: there is nothing left to train.
    assert train(tmp_path / "killed", data, **options).metrics == whole.metrics


def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(data: Path, tmp_path: Path):
    """By the clock, so that it may be hit while it writes its state."""
    options = {"checkpoint_every": 1, "epochs": 8}
    train(tmp_path / "whole", data, **options)
    script = KILLED.format(
        here=str(HERE), at=0, folder=str(tmp_path / "hit"), data=str(data), options=options
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    state = tmp_path / "hit" / "work" / "state.pt"
    while not state.exists() and process.poll() is None:
        time.sleep(0.005)
    time.sleep(0.05)
    process.kill()
    process.wait()
    told = train(tmp_path / "hit", data, **options)
    assert told.lines[0].startswith("goes on after step")
    assert same(result(tmp_path / "whole"), result(tmp_path / "hit"))


def test_going_on_with_other_options_is_refused_by_name(data: Path, tmp_path: Path):
    train(tmp_path, data)
    with pytest.raises(modelsoup.TrainerError, match=r"other options.*: blocks 1 → 2, lr 0.0002 →"):
        train(tmp_path, data, lr=1e-3, blocks=2)
    with pytest.raises(modelsoup.TrainerError, match="seed 5 → 6"):
        train(tmp_path, data, seed=6)
    train(tmp_path, data, threads=0, checkpoint_every=3)  # these change nothing
    other = make_domains(tmp_path / "others", count_a=5)
    with pytest.raises(modelsoup.TrainerError, match="images of X '"):
        train(tmp_path, other)
    same_names = make_domains(tmp_path / "same")
    (same_names / "trainB" / "0.png").write_bytes((data / "trainB" / "1.png").read_bytes())
    with pytest.raises(
        modelsoup.TrainerError, match=r"with other options.*: images of Y '\w+' → '\w+'$"
    ):
        train(tmp_path, same_names)
    with pytest.raises(modelsoup.TrainerError, match=r"options.*: start '\w+' → '\w+'$"):
        train(tmp_path, data, start=tmp_path / "out.safetensors")


def test_a_damaged_state_is_told(data: Path, tmp_path: Path):
    train(tmp_path, data)
    state = tmp_path / "work" / "state.pt"
    state.write_bytes(state.read_bytes()[:-500])
    with pytest.raises(modelsoup.TrainerError, match=r"state\.pt is damaged"):
        train(tmp_path, data)


def test_a_training_that_diverges_keeps_finite_weights_and_is_marked(data: Path, tmp_path: Path):
    """The first step, at such a rate, makes weights whose pictures are none."""
    told = train(tmp_path, data, lr=1e37)
    assert told.metrics["diverged"] == 1 and told.metrics["diverged_at"] == 1
    assert any("diverged: " in line and "step 2 of 12" in line for line in told.lines)
    assert all(np.isfinite(values).all() for values in result(tmp_path).values())


def test_a_start_without_discriminators_is_completed_and_that_is_said(data: Path, tmp_path: Path):
    from safetensors.numpy import save_file

    train(tmp_path / "first", data)
    start = tmp_path / "generators.safetensors"
    save_file({n: v for n, v in result(tmp_path / "first").items() if n[0] == "G"}, start)
    told = train(tmp_path / "second", data, start=start)
    assert "initialised 12 of 44 tensors, which generators.safetensors lacks" in told.lines[0]
    assert "all of D_A, D_B" in told.lines[0]
    with pytest.raises(modelsoup.MismatchError, match=r"tensor 'G_A.model.1.weight'.*\[8, 3, 7, 7"):
        train(tmp_path / "third", data, start=start, width=8)


def test_bad_images_are_named_in_the_log(tmp_path: Path):
    data = make_domains(tmp_path / "domains")
    (data / "trainA" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(modelsoup.SoupError, match=r"trainA/1\.png"):
        train(tmp_path / "refused", data)
    told = train(tmp_path / "skipped", data, on_bad_image="skip")
    assert any(line.startswith("left out: ") and "1.png" in line for line in told.lines)


def test_metrics_that_are_asked_for_come_into_the_record_at_the_size_of_training(tmp_path: Path):
    data = make_domains(tmp_path / "domains", 3, 3)
    told = train(tmp_path, data, evaluate=["psnr"], epochs=1)
    transform = CycleGANOptions(data=data, **TINY).transform()
    own, whole = (
        evaluate_model(tmp_path / "out.safetensors", data, metrics=["psnr"], transform=how)[0].value
        for how in (transform, None)
    )
    assert told.metrics["psnr"] == own != whole
    with pytest.raises(ValueError, match="no metric 'psnx'; did you mean 'psnr'"):
        CycleGANOptions(data=data, evaluate=["psnx"])


def test_what_metrics_need_is_looked_for_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Weights, truth, folders; that test pictures can be decoded, are enough and large enough."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    data = make_domains(tmp_path / "domains")
    for metric, fault in (
        ("fid-64", "weights-inception.*nothing is downloaded"),
        ("psnr", "psnr needs the truth: a picture"),
        ("st-lpips_pairs", "st-lpips_pairs needs .* 21 pixels a side.* is 16 × 16"),
    ):
        if metric.startswith("st") and find_spec("stlpips_pytorch") is None:
            continue
        with pytest.raises(modelsoup.SoupError, match=fault):
            train(tmp_path / metric, data, evaluate=[metric])
    picture = data / "testB" / "1.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:60])
    with pytest.raises(modelsoup.SoupError, match=r"testB/1\.png"):
        train(tmp_path / "damaged", data, evaluate=["kd-st-alex"])
    for file in (data / "testB").iterdir():
        file.write_bytes(whole[:60])
    with pytest.raises(modelsoup.SoupError, match="no test image of the target domain"):
        train(tmp_path / "all", data, evaluate=["kd-st-alex"], on_bad_image="skip")
    (data / "testB").rename(data / "other")
    with pytest.raises(modelsoup.SoupError, match="testB does not exist"):
        train(tmp_path / "folder", data, evaluate=["psnr"])
    assert [path for path in tmp_path.rglob("*") if path.parent.name == "work"] == []


def test_every_test_picture_is_looked_at_before_the_first_step(tmp_path: Path):
    """One is so wide that at the training's size a window does not fit into its height."""
    data = make_domains(tmp_path / "domains", 3, 3)
    for part in ("testA", "testB"):
        save_png(np.full((16, 64, 3), 99, np.uint8), data / part / "2.png")
    with pytest.raises(modelsoup.ParameterError, match=r"ssim needs .*testA/2\.png is 4 × 16"):
        train(tmp_path, data, evaluate=["ssim"], mode="scale_width_and_crop")
    assert not list((tmp_path / "work").iterdir())


def test_a_finished_training_is_kept_when_its_evaluation_fails(tmp_path: Path):
    """A test picture that was there before the first step is not after the last."""
    data = make_domains(tmp_path / "domains", 3, 3)

    def spoil(line: str) -> None:
        if line.startswith("epoch 1 of 1"):
            (data / "testA" / "2.png").write_bytes(b"\x89PNG")

    told = train(tmp_path, data, evaluate=["psnr"], epochs=1, log=spoil)
    assert set(result(tmp_path)) == set(CycleGAN().tensors(CycleGANOptions(data=data, **TINY)))
    assert "psnr" not in told.metrics and told.metrics["steps"] == 3
    assert told.metrics["not_evaluated"] == 1  # what a terminal shows beside `done`
    assert "testA/2.png is not a PNG" in str(told.notes["not evaluated"])
    assert told.lines[-1].startswith("not evaluated: ") and "2.png" in told.lines[-1]
    # Had the node not been done, it would go on from there, and only measure.
    (data / "testA" / "2.png").write_bytes((data / "testA" / "1.png").read_bytes())
    again = train(tmp_path, data, evaluate=["psnr"], epochs=1)
    assert again.metrics["psnr"] > 0 and again.lines[0] == "goes on after step 3 of 3"


def test_a_result_is_measured_where_it_was_trained(data: Path, tmp_path: Path):
    """Here is no such device, and that is what is said of it."""
    told = train(tmp_path, data, epochs=1)
    job = modelsoup.Job(
        None, tmp_path / "out.safetensors", tmp_path / "work", (), 5,
        CycleGANOptions(data=data, evaluate=["kd-st-alex"], **TINY), told.report,
        told.lines.append, told.notes.update,
    )  # fmt: skip
    sets = find_sets((data / "testA", data / "testB"))
    CycleGAN()._evaluate(job, sets, "cuda:99")
    assert "the device cuda:99 is asked for" in str(told.notes["not evaluated"])


def test_damaged_test_pictures_may_be_left_out_as_those_of_the_training(tmp_path: Path):
    data = make_domains(tmp_path / "domains", 4, 4)
    (data / "testB" / "1.png").write_bytes(b"nothing")
    told = train(tmp_path, data, evaluate=["psnr"], epochs=1, on_bad_image="skip")
    assert any("left out of the test images: " in line and "1.png" in line for line in told.lines)
    (made,) = told.notes["evaluated"]
    assert (made["name"], made["n_fake"], made["n_real"]) == ("psnr", 3, 3)
    (data / "testA" / "1.png").unlink()
    (data / "testB" / "1.png").unlink()
    others = train(tmp_path / "others", data, evaluate=["psnr"], epochs=1)
    assert others.metrics["psnr"] == told.metrics["psnr"]


def test_two_folders_have_test_images_too(tmp_path: Path):
    data = make_domains(tmp_path / "domains", 3, 3)
    (data / "testA").rename(tmp_path / "x")
    (data / "testB").rename(tmp_path / "y")
    folders = {
        "data_a": data / "trainA", "data_b": data / "trainB", "test_a": tmp_path / "x",
        "test_b": tmp_path / "y", "evaluate": ["psnr"],
    }  # fmt: skip
    told = train(tmp_path, None, epochs=1, **folders)
    (tmp_path / "x").rename(data / "testA")
    (tmp_path / "y").rename(data / "testB")
    assert told.metrics == train(tmp_path / "one", data, evaluate=["psnr"], epochs=1).metrics
    with pytest.raises(ValueError, match="test_a and test_b, the folders of test images, go toge"):
        CycleGANOptions(data=data, test_a=tmp_path / "x")


def test_a_diverged_training_is_not_evaluated_but_kept_and_marked(tmp_path: Path):
    """Weights that are finite, and too large for what they make."""
    from safetensors.numpy import save_file

    data = make_domains(tmp_path / "domains", 3, 3, size=16)
    train(tmp_path / "first", data, epochs=1)
    large = {n: v + np.float32(3e38) * (n == "G_A.model.1.weight")
             for n, v in result(tmp_path / "first").items()}  # fmt: skip
    save_file(large, tmp_path / "large.safetensors")
    told = train(tmp_path, data, start=tmp_path / "large.safetensors", evaluate=["psnr"])
    assert told.metrics["diverged"] == 1 and "psnr" not in told.metrics
    assert "not evaluated: it diverged" in told.lines
    assert all(np.isfinite(values).all() for values in result(tmp_path).values())


def test_a_last_step_that_breaks_the_networks_is_marked_too(tmp_path: Path):
    """No loss tells it: the weights were looked through for the last time before that step."""
    data = make_domains(tmp_path / "domains", 2, 2, size=16)
    options = {"lr": 1e37, "epochs": 1, "batch": 2}
    for evaluate in ([], ["psnr"]):
        folder = tmp_path / f"{len(evaluate)}"
        told = train(folder, data, sheet_every=1, evaluate=evaluate, **options)
        assert told.metrics["steps"] == 1
        assert told.metrics["diverged"] == 1 and "psnr" not in told.metrics
        assert "no page of samples at step 1: they hold NaN or infinity" in told.lines
        assert any(line.startswith("diverged: the translation of a train") for line in told.lines)
        assert ("not evaluated: it diverged" in told.lines) == bool(evaluate)
        assert (folder / "out.safetensors").exists()


def test_a_generator_of_nearly_one_picture_is_marked_without_any_metric(data: Path, tmp_path: Path):
    from safetensors.numpy import save_file

    plain = train(tmp_path / "first", data)
    assert plain.metrics["constant"] == 0
    start = result(tmp_path / "first")
    for share in (0.0, 0.01):  # of what differs: the second leaves less than a level
        start["G_B.model.18.weight"] *= np.float32(share)
        save_file(start, tmp_path / f"{share}.safetensors")
        told = train(tmp_path / f"{share}", data, start=tmp_path / f"{share}.safetensors", lr=1e-8)
        assert told.metrics["constant"] == 1 and told.metrics["diverged"] == 0
        assert "G_B gives nearly one picture for all inputs" in told.lines
        start = result(tmp_path / "first")
    # Where the inputs are one picture, so may be what is made of them.
    alike = make_domains(tmp_path / "alike")
    for file in (alike / "trainB").iterdir():
        file.write_bytes((data / "trainB" / "0.png").read_bytes())
    told = train(tmp_path / "same", alike, start=tmp_path / "0.0.safetensors", lr=1e-8)
    assert told.metrics["constant"] == 0


def test_the_record_of_a_node_says_what_was_trained_on_and_measured_with(tmp_path: Path):
    data = make_domains(tmp_path / "domains", 6, 4)
    for name in ("4.png", "5.png"):  # the others have their truth in testB
        (data / "testA" / name).unlink()
    (data / "trainA" / "later.heic").write_bytes(b"")
    text = plan(data, "all", loss="tree-paper", balance="auto", evaluate="[psnr]")
    tree, _ = modelsoup.parse_tree(text)
    report = modelsoup.run(tree, tmp_path / "root.safetensors", store=tmp_path / "store")
    notes = report.records["slow"]["notes"]
    assert notes["balance"] == pytest.approx(2 / 6)
    assert notes["loss weights"]["cycle_a"] == pytest.approx(5 * 2 / 6)
    assert notes["loss weights"]["identity_b"] == pytest.approx(10 * 2 / 6)
    files = {name: sorted((data / f"train{letter}").glob("*.png"))
             for name, letter in (("X", "A"), ("Y", "B"))}  # fmt: skip
    for name, own in files.items():
        assert notes["images"][name] == {
            "count": len(own), "xxh3_128": modelsoup.digest_files(own),
        }  # fmt: skip
    (left_out,) = notes["left out"]
    assert "1 of " in left_out and "(.heic)" in left_out
    assert notes["device"].startswith("cpu, ") and notes["device"].endswith(" threads")
    assert notes["versions"]["torch"] == torch.__version__
    (measured,) = notes["evaluated"]
    assert measured["name"] == "psnr"
    assert measured["value"] == report.records["slow"]["metrics"]["psnr"]
    assert measured["n_fake"] == 4 and "torchmetrics" in measured["versions"]


@pytest.mark.needs("offline")
def test_metrics_of_few_pictures_are_warned_of_in_a_nodes_record_and_log(tmp_path: Path):
    data = make_domains(tmp_path / "domains", 3, 3, size=28)
    sizes = {"load_size": 28, "crop_size": 24}
    told = train(tmp_path, data, evaluate=["fd-st-alex"], epochs=1, **sizes)
    (measured,) = told.notes["evaluated"]
    from modelsoup_i2i.measuring.extractors import ST_SHA256

    assert (measured["extractor"], measured["sha256"]) == ("st-alex", ST_SHA256)
    assert "3 pictures with 256 features is biased" in measured["note"]
    assert f"warning: {measured['note']}" in told.lines


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_of_other_channels_are_trained_on_measured_and_shown(
    channels: int, data: Path, tmp_path: Path
):
    for part in ("trainA", "trainB", "testA", "testB"):
        (tmp_path / part).mkdir()
        for file in sorted((data / part).iterdir())[:4]:
            (tmp_path / part / file.name).symlink_to(file)
    told = train(tmp_path, tmp_path, channels=channels, epochs=1, sheet_every=4, evaluate=["psnr"])
    assert told.metrics["diverged"] == 0 and told.metrics["psnr"] > 0
    assert (tmp_path / "work" / "samples" / "step-0000004.png").is_file()
    weights = result(tmp_path)
    for name in ("G_A.model.1.weight", "D_B.model.0.weight"):
        assert weights[name].shape[1] == channels
    from modelsoup_i2i.measuring.evaluation import evaluate_model

    transform = CycleGANOptions(data=tmp_path, **TINY).transform()
    (again,) = evaluate_model(
        tmp_path / "out.safetensors", tmp_path, metrics=["psnr"], transform=transform
    )
    assert again.value == told.metrics["psnr"]
    with pytest.raises(modelsoup.MismatchError, match=r"with width 4, blocks 1, channels 3"):
        train(tmp_path / "colour", tmp_path, start=tmp_path / "out.safetensors")


def test_the_subset_is_recorded(data: Path, tmp_path: Path):
    told = train(tmp_path, data, count_b=2, subset_seed=1)
    (line,) = [line for line in told.lines if line.startswith("images of Y: ")]
    options = CycleGANOptions(data=data, count_b=2, subset_seed=1, **TINY)
    assert line == "images of Y: " + ", ".join(path.name for path in options.domains().b)


def test_two_processes_train_what_one_with_twice_the_batch_does(data: Path, tmp_path: Path):
    once = {"pool_size": 0, "epochs": 1}
    train(tmp_path / "one", data, batch=2, **once)
    train(tmp_path / "two", data, processes=2, **once)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    from modelsoup_i2i.use.generators import load_generator

    with torch.no_grad():
        made = [
            load_generator(tmp_path / name / "out.safetensors")(image) for name in ("one", "two")
        ]
    assert (made[0] - made[1]).abs().max() < 0.02 * made[0].abs().max()


@pytest.mark.needs("offline")
def test_two_processes_end_together_where_one_has_found_a_collapse(data: Path, tmp_path: Path):
    told = train(
        tmp_path, data, processes=2, lr=1e-12, load_size=24, crop_size=24, evaluate_every=1,
        evaluate=["kd-st-alex"], stop_on_collapse=1,
    )  # fmt: skip
    assert told.metrics["collapsed_at"] == told.metrics["steps"] == 1
    assert (tmp_path / "out.safetensors").is_file()


def test_a_process_that_dies_before_it_joins_is_told_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its interpreter is one that only complains."""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no more memory\nexit 7\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    begun = time.monotonic()
    with pytest.raises(modelsoup.TrainerError, match="process 1 of the training failed: no more"):
        train(tmp_path, data, processes=2)
    assert time.monotonic() - begun < 60
    assert not (tmp_path / "out.safetensors").exists()


def test_a_process_that_cannot_join_is_told_at_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All is ready; but it looks for the others on a network that is not there."""
    alone = tmp_path / "python"
    alone.write_text(f'#!/bin/sh\nGLOO_SOCKET_IFNAME=nowhere exec {sys.executable} "$@"\n')
    alone.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(alone))
    monkeypatch.setattr(processes, "JOINING", timedelta(seconds=3))
    begun = time.monotonic()
    with pytest.raises(modelsoup.TrainerError, match=r"process 1 of the .* failed: .*nowhere"):
        train(tmp_path, data, processes=2)
    assert time.monotonic() - begun < 60
    assert not (tmp_path / "out.safetensors").exists()


def test_a_process_that_dies_in_the_training_is_told(data: Path, tmp_path: Path):
    def kill(line: str) -> None:
        if line.startswith("epoch 1 of 50"):
            mine = Path(f"/proc/{os.getpid()}/task").glob("*/children")
            for child in {int(pid) for file in mine for pid in file.read_text().split()}:
                if "modelsoup_i2i.training.processes" in Path(f"/proc/{child}/cmdline").read_text():
                    os.kill(child, signal.SIGKILL)

    with pytest.raises(modelsoup.TrainerError, match="process 1 of the training failed"):
        train(tmp_path, data, processes=2, epochs=50, log=kill)


def test_more_processes_than_gpus_are_told_before_any_is_started(data: Path, tmp_path: Path):
    count = torch.cuda.device_count()
    with pytest.raises(modelsoup.TrainerError, match=rf"a GPU each, but there \w+ {count} here"):
        train(tmp_path, data, processes=count + 2, device="cuda")
    assert list((tmp_path / "work").iterdir()) == []


def test_a_tiny_training_learns_to_come_back(tmp_path: Path):
    """On real pictures the cycle losses fall clearly, and the translations are no constant."""
    emoji, data = HERE.parents[1] / "examples" / "emoji", tmp_path / "domains"
    for part in ("trainA", "trainB", "testA"):
        (data / part).mkdir(parents=True)
        for file in sorted((emoji / part).iterdir())[:12]:
            (data / part / file.name).symlink_to(file)
    told = train(
        tmp_path, data, width=16, d_width=8, load_size=16, epochs=20, lr=1e-3, flip=False, seed=1
    )
    lines = [line for line in told.lines if line.startswith("epoch ")]

    def cycle(line: str) -> float:
        words = line.replace(";", " ").split()
        return sum(float(words[words.index(f"cycle_{side}") + 1]) for side in "ab")

    assert cycle(lines[-1]) < 0.6 * cycle(lines[0])
    from modelsoup_i2i.pictures.images import list_images, read_image, to_tensor
    from modelsoup_i2i.use.generators import load_generator

    generator = load_generator(tmp_path / "out.safetensors")
    with torch.no_grad():
        made = torch.stack(
            [generator(to_tensor(read_image(f))[None])[0] for f in list_images(data / "testA")]
        )
    assert made.std(dim=(2, 3)).mean() > 0.1  # within an image
    assert made.std(dim=0).mean() > 0.02  # between images


PLAN = """
soup: 1
seed: 3
models:
  slow: {{train: {{lr: 5.0e-5}}}}
  fast: {{train: {{lr: 1.5e-3}}}}
defaults:
  train: {common}
  finetune: {common}
  merge: {{layers: {layers}}}
tree: {{of: [slow, fast]}}
"""
STRATEGIES = {
    "S1": "all",
    "S2-A": "{low-level: merge, rest: drop}",
    "S2-B": "{frozen: merge, rest: drop}",
    "S3": '{"group:discriminator": all, "group:generator": drop}',
}


def plan(data: Path, layers: str, **options) -> str:
    common = {"trainer": "cyclegan", "data": str(data), **(TINY | {"epochs": 1} | options)}
    text = ", ".join(f"{name}: {str(value).lower() if isinstance(value, bool) else value}"
                     for name, value in common.items())  # fmt: skip
    return PLAN.format(common="{" + text + "}", layers=layers)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_tree_of_each_strategy_runs(strategy: str, data: Path, tmp_path: Path):
    tree, _ = modelsoup.parse_tree(plan(data, STRATEGIES[strategy]))
    report = modelsoup.run(tree, tmp_path / "root.safetensors", store=tmp_path / "store")
    assert len(report.records) == 4  # two leaves, a merge and a fine-tuning
    trained = [r for r in report.records.values() if r["operation"] in ("train", "finetune")]
    assert len(trained) == 3 and all(r["metrics"]["diverged"] == 0 for r in trained)
    (root,) = [r for r in trained if r["operation"] == "finetune"]
    frozen = set(root["frozen"])
    assert bool(frozen) == (strategy == "S2-B")
    if frozen:
        groups = CycleGAN().groups(CycleGANOptions(data=data, **TINY))
        from fnmatch import fnmatchcase

        names = modelsoup.open_checkpoint(tmp_path / "root.safetensors").tensors
        assert frozen == {n for n in names if any(fnmatchcase(n, p) for p in groups["low-level"])}


def key(data: Path | None, *, trainer: str = "cyclegan", seed: int = 3, **options) -> str:
    """What the result of one training is named by."""
    given = {"trainer": trainer, **TINY, "count_b": 3, **options}
    if data is not None:
        given["data"] = str(data)
    train = {name: value for name, value in given.items() if value is not None}
    text = json.dumps({"soup": 1, "seed": seed, "models": {"a": {"train": train}}, "tree": "a"})
    checked = modelsoup.check(modelsoup.parse_tree(text)[0], contents=content_of)
    assert checked.problems == ()
    found = checked.nodes["a"].key
    assert found is not None
    return found


DECIDE = {
    "imbalance": 50, "count_b": 2, "subset_seed": 1, "mode": "crop", "load_size": 19,
    "crop_size": 12, "flip": False, "batch": 2, "accumulate": 2, "lr": 1e-3, "epochs": 3,
    "decay_epochs": 1, "loss": "tree-paper", "lambda_gan": 2.0, "lambda_cycle": 2.0,
    "lambda_identity": 2.0, "balance": 0.75, "balance_invert": True,
    "balance_identity": "by_generator", "balance_discriminators": True, "balance_doubled": True,
    "channels": 1, "width": 8, "blocks": 2, "d_width": 8, "d_layers": 2, "init": 1,
    "pool_size": 4, "processes": 2, "precision": "bf16", "on_bad_image": "skip",
    "keep": {"best": "psnr"}, "steps": 5, "repair": 2, "decay": "cosine",
    "stop_on_collapse": 2, "decay_steps": 2, "halve_every": 2,
}  # fmt: skip
DO_NOT = {
    "device": "auto", "channels_last": True, "compile": True, "compile_seconds": 9, "graphs": False,
    "checkpoint_every": 3,
    "sheet_every": 7, "tensorboard": True, "samples": "shown", "threads": 3, "cache_mb": 1,
    "evaluate": ["psnr"], "evaluate_every": 3, "evaluate_n": 3, "log_every": 3,
}  # fmt: skip
BY_CONTENT = {"data", "data_a", "data_b", "test_a", "test_b", "init_from"}


def test_every_option_is_known_to_decide_the_key_or_not_to():
    fields = {field.name for field in dataclasses.fields(CycleGANOptions)}
    assert fields == {*DECIDE, *DO_NOT, *BY_CONTENT}
    assert not DECIDE.keys() & DO_NOT.keys()


@pytest.mark.parametrize("option", DECIDE)
def test_an_option_that_decides_the_result_changes_its_key(option: str, data: Path):
    other = {option: DECIDE[option]}
    if option == "imbalance":
        other["count_b"] = None
    if option == "keep":
        other |= {"evaluate": ["psnr"], "evaluate_every": 1}
    also: dict[str, object] = {"decay_epochs": 2} if option == "decay" else {}
    if option == "decay_steps":
        also = {"steps": 5}
    if option == "stop_on_collapse":
        also = {"evaluate": ["fd-st-alex"], "evaluate_every": 1}
    assert key(data, **also, **other) != key(data, **also)


@pytest.mark.parametrize("option", DO_NOT)
def test_an_option_that_does_not_decide_the_result_leaves_its_key(option: str, data: Path):
    also = {"evaluate": ["psnr"]} if option == "evaluate_every" else {}
    assert key(data, **also, **{option: DO_NOT[option]}) == key(data)


def test_the_key_depends_on_the_images_content_and_not_on_where_they_lie(tmp_path: Path):
    data = make_domains(tmp_path / "domains")
    first = key(data)
    moved = data.rename(tmp_path / "moved")
    assert key(moved) == first
    folders = {"data_a": moved / "trainA", "data_b": moved / "trainB",
               "test_a": moved / "testA", "test_b": moved / "testB"}  # fmt: skip
    assert key(None, **{name: str(folder) for name, folder in folders.items()}) == first
    used = CycleGANOptions(data=moved, count_b=3, **TINY).domains().b
    (unused,) = {*(moved / "trainB").iterdir()} - {*used}
    for image in (moved / "trainA" / "0.png", used[0], unused):
        before = image.read_bytes()
        image.write_bytes((moved / "trainA" / "1.png").read_bytes())
        assert (key(moved) == first) == (image == unused)
        image.write_bytes(before)
    assert key(moved) == first


class Versioned(CycleGAN):
    """A trainer of its own name, whose code may change."""

    name = "versioned-cyclegan"
    version = "1"


def test_the_key_depends_on_the_seed_and_on_the_trainers_name_and_version(
    data: Path, monkeypatch: pytest.MonkeyPatch
):
    modelsoup.register_trainer(Versioned())
    assert key(data, seed=4) != key(data)
    first = key(data, trainer="versioned-cyclegan")
    assert first != key(data)
    monkeypatch.setattr(Versioned, "version", "2")
    assert key(data, trainer="versioned-cyclegan") != first


def test_a_plan_is_checked_without_torch(data: Path, tmp_path: Path):
    (tmp_path / "tree.yaml").write_text(plan(data, "{low-level: merge, rest: drop}"))
    script = (
        "import sys, modelsoup; tree, _ = modelsoup.read_tree('tree.yaml'); "
        "plan = modelsoup.check(tree); assert len(plan.steps) == 4, plan.steps; "
        "assert not {'torch', 'PIL', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_without_torch_a_training_says_what_to_install(data: Path, tmp_path: Path):
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "import modelsoup\n"
        "from modelsoup_i2i.trainers.cyclegan import CycleGAN, CycleGANOptions\n"
        f"data = Path({str(data)!r})\n"
        "options = CycleGANOptions(data=data, load_size=16, crop_size=16, d_layers=1)\n"
        "try: CycleGAN().session(options, None, seed=0)\n"
        "except modelsoup.SoupError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "pip install -e '.[i2i]'" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"balance": 1.5}, r"not in \[0, 1\]"),
        ({"balance": "some"}, "balance"),
        ({"lr": 0}, "option 'lr' .* is 0, but must be more than 0"),
        ({"batch": 0}, "option 'batch' .* is 0, but must be at least 1"),
        ({"epochs": 0}, "nothing to train"),
        ({"load_size": [36]}, r"load_size is \[36\], but must be a side, or \[height, width\]"),
        ({"crop_size": [1, 2, 3]}, r"crop_size is \[1, 2, 3\], but must be a side, or"),
        ({"loss": "pix2pix"}, "loss"),
        ({"imbalance": 100}, r"must be in \[0, 100\)"),
        ({"imbalance": 50, "count_b": 2}, "both say how many"),
        ({"load_size": 10}, "smaller than crop_size"),
        ({"d_layers": 5}, "crop_size 16 is too small for discriminators of 5 layers"),
        ({"mode": "none", "batch": 2}, "batch must be 1"),
        ({"device": "gpu"}, "device is 'gpu', but must be auto, cpu, cuda or cuda:N"),
        ({"device": "cuda:1", "processes": 2}, "one GPU"),
        ({"precision": 16}, "precision"),
        ({"channels": 0}, "'channels' .* must be at least 1"),
        ({"lambda_cycle": -1}, "'lambda_cycle' .* is -1, but must be at least 0"),
        ({"epoch": 3}, "no option 'epoch'; did you mean 'epochs'"),
    ],
)
def test_an_option_out_of_range_is_named(data: Path, options: dict, said: str):
    with pytest.raises(modelsoup.SoupError, match=said):
        tree, _ = modelsoup.parse_tree(plan(data, "all", **options))
        modelsoup.check(tree)


@pytest.mark.parametrize(
    ("name", "least"),
    [
        *((name, 1) for name in ("batch", "accumulate", "width", "blocks", "d_width", "d_layers",
                                 "processes")),
        *((name, 0) for name in ("epochs", "decay_epochs", "init", "pool_size", "checkpoint_every",
                                 "sheet_every", "threads", "cache_mb")),
    ],
)  # fmt: skip
def test_what_is_counted_has_a_least_value(name: str, least: int):
    usual = {"data": Path("x"), "epochs": 1, "decay_epochs": 1}
    assert getattr(CycleGANOptions(**usual | {name: least}), name) == least
    with pytest.raises(ValueError, match=f"{name} is {least - 1}, but must be at least {least}$"):
        CycleGANOptions(**usual | {name: least - 1})


def test_measuring_needs_test_images():
    with pytest.raises(
        ValueError, match=r"evaluate needs test images: data, .*or test_a and test_b"
    ):
        CycleGANOptions(data_a=Path("x"), data_b=Path("y"), evaluate=["psnr"])


def test_data_that_are_not_there_are_told_before_anything_runs(tmp_path: Path):
    tree, _ = modelsoup.parse_tree(plan(tmp_path / "nowhere", "all"))
    checked = modelsoup.check(tree)
    assert any("there is no folder" in fault for fault in checked.problems)
    with pytest.raises(modelsoup.SoupError, match="there is no folder"):
        modelsoup.run(tree, tmp_path / "root.safetensors", store=tmp_path / "store")


def test_the_plan_of_the_docs_is_a_plan(tmp_path: Path):
    import re

    make_domains(tmp_path / "apple2orange", count_a=40, count_b=4)
    page = (HERE.parent.parent / "docs" / "i2i_training.md").read_text("utf-8")
    block, *_ = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    tree, _ = modelsoup.parse_tree(block, folder=tmp_path)
    checked = modelsoup.check(tree)
    assert checked.problems == () and len(checked.steps) == 4
