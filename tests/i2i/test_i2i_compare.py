"""`soup i2i compare`: equal budgets, one evaluation, a page that stands alone."""

import dataclasses
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from click.testing import CliRunner, Result
from i2i_domains import make_domains
from modelsoup_i2i.cli_compare import _settings
from modelsoup_i2i.measuring.comparison import compare
from modelsoup_i2i.measuring.comparison_page import Row, best, page
from modelsoup_i2i.measuring.comparison_plan import Asked, scheduled
from modelsoup_i2i.measuring.metrics import Result as Measured
from modelsoup_i2i.pictures.images import read_image, save_png
from modelsoup_i2i.trainers.cyclegan import CycleGAN, CycleGANOptions
from modelsoup_i2i.use.translate import translate
from PIL import Image

from modelsoup.terminal.cli import main

SMALL = [
    word for option in (
        "width=4", "blocks=1", "d_width=4", "d_layers=2", "threads=1", "pool_size=2",
        "munit.d_scales=2", "mlp=8", "style=4",
    ) for word in ("--set", option)
]  # fmt: skip
BALAGAN = [
    word for option in (
        "width=4", "downs=2", "style_downs=2", "latent=6", "mlp=8", "d_halvings=2", "d_most=12",
        "batch=2", "threads=0",
    ) for word in ("--set", option)
]  # fmt: skip
TWO = ["--trainers", "cyclegan,munit", "--size", "24", "--metrics", "psnr,ssim", *SMALL]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_domains(tmp_path / "set", 5, 5, size=28)


def soup(data: Path, *words: str) -> Result:
    own = ["i2i", "compare", str(data / "trainA"), str(data / "trainB"), *words, "-o", "page.html"]
    return CliRunner().invoke(main, own)


def refused(data: Path, *words: str) -> str:
    run = soup(data, *words)
    assert run.exit_code == 1 and not Path("page.html").exists()
    (line,) = run.stderr.splitlines()
    return line


class Pictures(HTMLParser):
    """What a page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]


def test_two_trainers_are_compared_on_one_page_and_again_at_no_cost(data: Path):
    run = soup(data, *TWO, "--steps", "3", "--seeds", "2", "--json")
    assert run.exit_code == 0, run.stderr
    rows = json.loads(run.stdout)
    assert [row["name"] for row in rows] == ["cyclegan", "munit"]
    for row in rows:
        assert row["steps"] == row["options"]["steps"] == 3
        assert row["options"]["crop_size"] == 24 and row["options"]["width"] == 4
        assert row["seconds_a_step"] > 0 and row["memory"] > 50e6 and len(row["took"]) == 2
        # Every test picture was translated, and has its truth by its name.
        assert {len(own) for own in row["results"].values()} == {2}
        assert {r["n_fake"] for own in row["results"].values() for r in own} == {5}
        assert row["results"]["psnr"][0]["value"] != row["results"]["psnr"][1]["value"]
    made = read_image("page/translations/munit-1/0.png")
    assert made.shape == (24, 24, 3)

    text = Path("page.html").read_text("utf-8")
    found = Pictures(text)
    assert "script" not in found.tags
    assert len(found.sources) == 5 * (1 + 2 + 1)  # A, both trainers, of B
    assert all(source.startswith("data:image/png;base64,") for source in found.sources)
    for said in ("3 steps of training each, 2 seeds", "5 test pictures translated", "±",
                 "munit: data_a", "--trainers cyclegan,munit --steps 3"):  # fmt: skip
        assert said in text

    # Another page of it costs no training, and a third seed one for each.
    before = Path("page/plan.json").read_text()
    assert "page.html exists" in soup(data, *TWO, "--steps", "3").stderr
    again = soup(data, *TWO, "--steps", "3", "--seeds", "2", "--force", "--json")
    assert json.loads(again.stdout)[0]["results"] == rows[0]["results"]
    assert "running" not in again.stderr and "s a step" not in again.stderr
    assert Path("page/plan.json").read_text() == before
    # Of another comparison it is not taken for one.
    Path("page.html").unlink()
    said = refused(data, *TWO, "--steps", "4")
    assert "page/plan.json is of another comparison, with other steps" in said


def test_references_are_test_pictures_of_b_and_that_there_are_no_modalities_is_said(data: Path):
    """As of `soup i2i evaluate`: those of the training would be of another set."""
    black = np.zeros((28, 28, 3), np.uint8)
    for file in (data / "testB").iterdir():
        save_png(black, file)
    run = soup(data, "--trainers", "balagan", "--steps", "1", "--size", "24", "--metrics", "psnr",
               *BALAGAN)  # fmt: skip
    assert run.exit_code == 0, run.stderr
    said = "balagan: A and B are not split: this is BalaGAN without modalities"
    assert said in run.stderr and said in Path("page.html").read_text("utf-8")
    Path("like").mkdir()
    save_png(black[:24, :24], Path("like/black.png"))
    model = Path("page/models/balagan-0.safetensors")
    for reference, same in ((Path("like"), True), (data / "trainB", False)):
        files = translate(model, "page/inputs", f"by {reference.name}", reference=reference)
        made = [read_image(Path("page/translations/balagan-0") / file.name) for file in files]
        every = zip(files, made, strict=True)
        assert all(np.array_equal(read_image(file), own) for file, own in every) == same


def test_with_one_picture_of_b_it_is_said_what_can_be_measured(data: Path):
    words = ["--trainers", "cyclegan", "--steps", "1", "--size", "24", *SMALL[:8]]
    for file in sorted((data / "testB").iterdir())[1:]:
        file.unlink()
    asked = "kd-st-alex,st-lpips_pairs,st-lpips_to_input"
    said = refused(data, *words, "--metrics", asked)
    assert "kd-st-alex needs at least 2 pictures of each set, not 1: name folders of more" in said
    assert "with --test-a and --test-b, or measure what needs fewer: --metrics" in said
    assert not Path("page").exists()
    told = said[said.rindex("--metrics") :].split()
    assert told == ["--metrics", "st-lpips_pairs,st-lpips_to_input"]
    run = soup(data, *words, *told)
    assert run.exit_code == 0, run.stderr


def test_pictures_of_one_name_but_for_the_suffix_are_measured_apart(data: Path):
    """And pairs stay pairs, though one of the folders has none such."""
    Image.open(data / "testB" / "0.png").save(data / "testB" / "0.bmp")
    words = ["--trainers", "cyclegan", "--steps", "1", "--size", "24", *SMALL[:8]]
    run = soup(data, *words, "--metrics", "psnr", "--json")
    assert run.exit_code == 0, run.stderr
    (row,) = json.loads(run.stdout)
    assert row["results"]["psnr"][0]["n_fake"] == 5
    assert sorted(file.name for file in Path("page/real").iterdir()) == [
        "0.bmp.png", *(f"{n}.png.png" for n in range(5))
    ]  # fmt: skip
    # Translated, they are apart, too.
    Image.open(data / "testA" / "0.png").save(data / "testA" / "0.bmp")
    run = soup(data, *words, "--metrics", "psnr", "--json", "--force")
    assert run.exit_code == 0, run.stderr
    assert json.loads(run.stdout)[0]["results"]["psnr"][0]["n_fake"] == 6


def test_minutes_become_steps_that_a_second_run_keeps(data: Path):
    """Whatever the machine does meanwhile."""
    asked = Asked(
        data / "trainA", data / "trainB", {"one": "cyclegan"}, minutes=0.005, size=24,
        settings={"": {"width": 4, "blocks": 1, "d_width": 4, "d_layers": 2}},
    )  # fmt: skip
    told: list[str] = []
    (row,) = compare(asked, Path("page.html"), metrics=["psnr"], say=told.append)
    assert row.steps == max(1, int(0.3 / row.seconds))
    plan = json.loads(Path("page/plan.json").read_text())
    assert plan["leaves"]["one"]["total"] == row.steps == plan["leaves"]["one"]["options"]["steps"]
    # As after an interruption: what was written down is done.
    Path("page.html").unlink()
    plan["leaves"]["one"]["seconds"] = 7.0
    Path("page/plan.json").write_text(json.dumps(plan))
    (again,) = compare(asked, Path("page.html"), metrics=["psnr"], say=told.append)
    assert again.steps == row.steps and again.seconds == 7.0
    assert again.took == row.took  # of the training that was found in the store
    assert len([line for line in told if "running" in line]) == 1
    assert "0.005 minutes of training each" in Path("page.html").read_text("utf-8")


def test_a_budget_keeps_the_shape_of_a_trainers_schedule():
    falling = {"epochs": 30, "decay_epochs": 10, "halve_every": None}
    assert scheduled("cyclegan", falling, 100) == {
        **falling, "steps": 75, "decay_steps": 25, "decay_epochs": 0,
    }  # fmt: skip
    CycleGANOptions(**scheduled("cyclegan", falling, 1))  # it may be trained
    assert scheduled("munit", {}, 500) == {"steps": 500, "halve_every": 50}
    assert scheduled("munit", {}, 3)["halve_every"] == 1
    for name in ("ugatit", "nice-gan"):
        assert scheduled(name, {}, 10) == {"steps": 5, "decay_steps": 5}
    assert scheduled("cyclegan", {}, 7) == {"steps": 7}


def test_a_probe_tells_what_a_step_takes(data: Path):
    o = CycleGANOptions(
        data=data, width=4, blocks=1, d_width=4, d_layers=2, load_size=24, crop_size=24, steps=9,
        threads=0, device="cpu",
    )  # fmt: skip
    found = CycleGAN().probe(o, seconds=60.0)
    assert found.steps == 7 and 0 < found.seconds < 1 and found.memory > 50e6
    assert CycleGAN().probe(dataclasses.replace(o, steps=2)).steps == 2
    assert CycleGAN().probe(o, seconds=1e-9).steps == 5


def row(name: str, metric: str, *values: float) -> Row:
    of_all = {"extractor": "", "sha256": "", "dimension": 0, "resize": "", "n_fake": 1,
              "n_real": 1, "versions": {}}  # fmt: skip
    made = Row(name, name, {}, (), 1, 1.0, 1, 1)
    made.add(Measured(metric, value, **of_all) for value in values)
    return made


def test_means_spreads_and_the_best_are_those_of_the_seeds():
    rows = [row("a", "fd-st-alex", 1.0, 3.0), row("b", "fd-st-alex", 4.0), row("c", "psnr", 1.0)]
    assert rows[0].mean("fd-st-alex") == 2 and rows[0].spread("fd-st-alex") == pytest.approx(2**0.5)
    assert best(rows, "fd-st-alex") is rows[0]
    assert best(rows, "psnr") is None  # nobody else has one
    higher = [row("a", "ssim", 0.1), row("b", "ssim", 0.4)]
    assert best(higher, "ssim") is higher[1]
    # More or less change is neither better nor worse.
    assert best([row(n, "st-lpips_to_input", v) for n, v in (("a", 1.0), ("b", 2.0))],
                "st-lpips_to_input") is None  # fmt: skip


def test_without_test_pictures_it_is_said_what_was_measured(data: Path):
    def asked(a: Path, **tests: Path) -> Asked:
        return Asked(a, data / "trainB", {"one": "cyclegan"}, steps=1, **tests)

    beside = asked(data / "trainA")
    assert beside.tests == (data / "testA", data / "testB") and not beside.remarks
    named = asked(data / "trainA", test_a=data / "testB", test_b=data / "testA")
    assert named.tests == (data / "testB", data / "testA") and not named.remarks
    none = asked((data / "trainA").rename(data / "apples"))
    assert none.tests == (data / "apples", data / "trainB")
    assert "measured on what they were trained on" in none.remarks[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--trainers", "cyclegan"], "--minutes or --steps: give one of the two"),
        (["--trainers", "cyclegan", "--steps", "1", "--minutes", "1"], "give one of the two"),
        (["--trainers", "cycelgan", "--steps", "1"], "'cycelgan'; did you mean 'cyclegan'"),
        (["--trainers", "classifier", "--steps", "1"], "cyclegan, "),
        (["--trainers", "self-init", "--steps", "1"], "pix2pix, stargan, "),
        (["--trainers", "cyclegan,cyclegan", "--steps", "1"], "as in other=cyclegan"),
        (["--trainers", "a/b=cyclegan", "--steps", "1"], "digits, - and _ are expected"),
        (["--trainers", "cyclegan,", "--steps", "1"], "must be NAME or CALLED=NAME"),
        (["--trainers", "cyclegan", "--steps", "1", "--set", "widht=4"],
         "no trainer that is compared has such an option; did you mean 'width'"),
        (["--trainers", "cyclegan", "--steps", "1", "--set", "cyclgan.width=4"],
         "'cyclgan' is not compared; did you mean 'cyclegan'?"),
        (["--trainers", "cyclegan", "--steps", "1", "--set", "cyclegan.widht=4"],
         "cyclegan: the trainer 'cyclegan' has no option 'widht'; did you mean 'width'"),
        (["--trainers", "cyclegan", "--steps", "1", "--set", "steps=4"], "so that it is one for"),
        (["--trainers", "cyclegan", "--steps", "1", "--set", "width"], "[NAME.]OPTION=VALUE"),
        (["--trainers", "cyclegan", "--steps", "1", "--set", "width=[1"], "--set width:2:1: did"),
        (["--trainers", "cyclegan", "--steps", "1", "--set", "width=0"], "at least 1"),
        (["--trainers", "munit", "--steps", "1", "--size", "24"], "fewer d_layers or d_scales"),
        (["--trainers", "cyclegan", "--steps", "1", "--metrics", "psrn"], "'psrn'"),
        (["--trainers", "cyclegan", "--steps", "1", "--test-a", "x"], "go together"),
        (["--trainers", "cyclegan", "--steps", "1", "--extractor", "no.safetensors"],
         "no.safetensors"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_sentence_before_anything_is_trained(
    data: Path, words: list[str], said: str
):
    assert said in refused(data, "--metrics", "psnr", *words)
    assert not Path("page").exists() and not Path(".soup-store").exists()


def test_a_page_lies_apart_from_pictures_and_from_other_folders(data: Path):
    words = ["--trainers", "cyclegan", "--steps", "1", "--metrics", "psnr"]
    own = ["i2i", "compare", str(data / "trainA"), str(data / "trainB"), *words]
    run = CliRunner().invoke(main, [*own, "-o", str(data / "trainA" / "page.html")])
    assert run.exit_code == 1 and "which is read" in run.stderr
    Path("page").mkdir()
    save_png(read_image(data / "trainA" / "0.png"), Path("page/mine.png"))
    assert "holds something else: name another page" in refused(data, *words)
    run = CliRunner().invoke(main, [*own, "-o", "page.pdf"])
    assert run.exit_code == 1 and "must end in .html" in run.stderr


def test_names_from_files_cannot_write_into_the_page(data: Path):
    name = '"><script>x<'
    for part in ("testA", "testB"):
        (data / part / "0.png").rename(data / part / f"{name}.png")
    made = row(name, "psnr", 1.0)
    made = dataclasses.replace(
        made, took=[1.0], pictures=data / "testA", options={name: name}, given=(name,)
    )
    text = page([made], data / "testA", data / "testB", title=name, budget=name, seeds=1,
                metrics=["psnr"], remarks=[name], command=name)  # fmt: skip
    assert "script" not in Pictures(text).tags and "&lt;script&gt;" in text
    assert len(Pictures(text).sources) == 5 * 3


def test_the_command_on_the_page_asks_for_the_same(data: Path, monkeypatch: pytest.MonkeyPatch):
    asked = Asked(
        data / "trainA", data / "trainB", {"one": "cyclegan", "munit": "munit"}, minutes=2.5,
        size=24, settings={"": {"batch": 2}, "one": {"augment": ["color"]}},
        test_a=data / "testA", test_b=data / "testB",
    )  # fmt: skip
    seen: list[Asked] = []
    monkeypatch.setattr(
        "modelsoup_i2i.measuring.comparison.compare", lambda own, *_, **__: seen.append(own) or []
    )
    words = shlex.split(asked.words(3))
    run = CliRunner().invoke(main, [*words[1:], "-o", "page.html"])
    assert run.exit_code == 0, run.output
    assert seen == [asked] and re.search(r"--seeds 3\b", asked.words(3))


def test_values_are_read_as_in_a_plan():
    told = _settings(["lr=1e-4", "cut.mode=no", "cut.flip=false"], {"cut": "cut"})
    assert told == {"": {"lr": 1e-4}, "cut": {"mode": "no", "flip": False}}
