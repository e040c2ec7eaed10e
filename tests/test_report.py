"""`soup report`: a page that stands alone, tells what is there, and is fit to be looked at."""

from __future__ import annotations

import json
import math
import os
import random
import shlex
import shutil
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import CANNOT_START
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

import modelsoup
from modelsoup import Job, open_checkpoint, register_trainer
from modelsoup.terminal.cli import main
from modelsoup.terminal.curves import chart, charts
from modelsoup.terminal.report import FIGURES, TEXTS, better, column, lasting
from modelsoup.terminal.shown import png_size, read_curves

LOSSES = ("G_A", "cycle_A", "D_A")


def png(width: int = 8, height: int = 6, *, seed: int = 0) -> bytes:
    """A picture of noise, which does not shrink."""
    noise = random.Random(seed)
    rows = b"".join(b"\0" + noise.randbytes(3 * width) for _ in range(height))
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(rows, 1), b"IEND": b"",
    }  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items()
    )


@dataclass(frozen=True)
class Options:
    rate: float = 0.1
    word: str = "none"
    shown: str = ""
    images: int = 2


class Draws:
    """Writes curves and samples as a training does, in a folder that its record names."""

    name = "draws"
    options = Options

    def train(self, job: Job) -> None:
        o = job.options
        weights = dict(open_checkpoint(job.start)) if job.start else {"w": np.zeros(4, np.float32)}
        save_file({k: v + np.float32(o.rate) for k, v in weights.items()}, job.output)
        if o.shown:
            folder = Path(o.shown) / f"{job.seed}"
            write_shown(folder, images=o.images)
            job.note({"shown": str(folder.absolute())})
        job.note(
            {"device": "a GPU", "images": {"X": {"count": 995}}, "left out": [], "λ": math.inf}
        )
        job.report(1.0, {"fid": 100 * o.rate, "psnr": 20 * o.rate, "G": 1.0})


def write_shown(folder: Path, images: int = 2) -> None:
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    rows = [f"{n},{n / 9},{3 / (n + 1)},{9 / (n + 1)},{0.5}" for n in range(0, 900, 10)]
    (folder / "losses.csv").write_text(
        f"step,seconds,{','.join(LOSSES)}\n" + "\n".join(rows) + "\n"
    )
    (folder / "metrics.csv").write_text(
        "step,epoch,seconds,fid\n300,1,9,50\n600,2,18,inf\n900,3,27,30\n"
    )
    for number in range(1, images + 1):
        (folder / f"samples/step-{number * 300:07}.png").write_bytes(png(64, 48, seed=number))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    register_trainer(Draws())
    return tmp_path


def soup(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: object) -> str:
    result = soup(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


TREE = """soup: 1
models:
  slow: {train: {trainer: draws, rate: 0.25, shown: shown}}
  fast: {train: {trainer: draws, rate: 0.5, word: "</details><script>alert(1)", shown: shown}}
defaults: {finetune: {trainer: draws, rate: 0.1, shown: shown, images: 9}}
tree: {of: [slow, fast]}
"""


def run(tree: str = TREE) -> None:
    Path("tree.yaml").write_text(tree)
    modelsoup.run(modelsoup.read_tree("tree.yaml")[0], "out.safetensors", store=".soup-store")


def reported(*arguments: object) -> Page:
    done = soup("report", *arguments, "-o", "page.html", "--force")
    assert done.exit_code == 0, done.output
    return Page(Path("page.html").read_text("utf-8"))


class Page(HTMLParser):
    """A page, read strictly: whatever begins ends, where it should."""

    VOID = ("meta", "img", "br", "rect", "path", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.marks: list[str] = []
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.all: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[tuple[str, str]] = []  # the element, and its text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert len(found) == len(attributes), f"an attribute of {tag} is there twice"
        self.all.append((tag, found))
        if tag not in self.VOID:
            self.open.append(tag)
        self.marks += filter(None, [found.get("id")])
        self.links += filter(None, [found.get("href")])
        self.pictures += [found["src"]] if tag == "img" else []

    def handle_startendtag(self, tag, attributes):
        assert tag in self.VOID
        self.handle_starttag(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> in line {self.getpos()[0]}"

    def handle_data(self, data):
        if data.strip() and self.open[-1] not in ("style",):
            self.said.append((self.open[-1], data))

    @property
    def text(self) -> str:
        return " ".join(data for _, data in self.said)


def must_stand_alone(page: Page) -> None:
    assert len(set(page.marks)) == len(page.marks)
    assert page.links
    assert {link[1:] for link in page.links} <= set(page.marks)
    assert all(source.startswith("data:image/png;base64,") for source in page.pictures)
    for tag, attributes in page.all:
        assert tag not in ("script", "link", "iframe", "object", "base")
        fetched = {k: v for k, v in attributes.items() if k in ("src", "href", "srcset", "style")}
        assert not any("//" in str(value) for value in fetched.values() if value[:5] != "data:")
    style = page.source.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_a_page_stands_alone_and_every_link_in_it_leads_somewhere():
    run()
    page = reported(".soup-store")
    must_stand_alone(page)
    assert len(page.pictures) == 2 + 2 + 7  # of nine sheets the newest, and six earlier ones
    assert "2 more are in the folder" in page.text
    must_stand_alone(reported("out.safetensors"))


def test_whatever_comes_from_files_is_text():
    nasty = "<script>x"
    run(TREE.replace("slow", json.dumps(nasty)))
    page = reported(".soup-store")
    must_stand_alone(page)
    assert any(text == nasty for tag, text in page.said if tag == "h3")
    assert any(text == nasty for tag, text in page.said if tag == "text")
    assert "</details><script>alert(1)" in page.text


def test_the_tree_shows_the_metrics_of_each_model():
    run()
    for page in (reported(".soup-store"), reported("out.safetensors")):
        boxes = [text for tag, text in page.said if tag == "text"]
        assert {"slow", "fast", "root", "fid 25 ↓", "psnr 5 ↑", "fid 10 ↓"} <= set(boxes)
        assert not any("seed" in text for text in boxes)  # those that the plan did not give


def test_a_seed_that_the_plan_gives_is_in_the_tree():
    run(
        TREE.replace("rate: 0.25", "rate: 0.5, seed: 7").replace(
            "rate: 0.5, word", "seed: 8, rate: 0.5, word"
        )
    )
    boxes = [text for tag, text in reported(".soup-store").said if tag == "text"]
    assert any("seed 7" in text for text in boxes)


def test_the_best_of_each_metric_is_marked_where_it_is_known_which_that_is():
    run()
    source = reported(".soup-store").source
    best = [cell.partition("<")[0] for cell in source.split('<td class="best">')[1:]]
    assert best == ["10", "10"]  # the least FID, of the root; the highest PSNR, of the fast one
    assert "<th>fid ↓</th><th>psnr ↑</th><th>G</th>" in source


LESS = ["fid", "fid-2048", "FID", "kid", "fd-st-alex", "kd-st-alex"]
LESS += ["loss", "loss_G", "val-loss", "losses/G", "error"]
MORE = ["psnr", "ssim", "lpips_pairs", "st-lpips_pairs", "accuracy", "val_accuracy"]
UNKNOWN = ["lpips_to_real", "G_A", "glossy", "steps", "kidney", "diverged"]


@pytest.mark.parametrize(
    ("name", "way"),
    [*((n, -1) for n in LESS), *((n, 1) for n in MORE), *((n, 0) for n in UNKNOWN)],
)
def test_a_metric_has_an_arrow_where_its_name_says_what_is_better(name: str, way: int):
    assert better(name) == way


def test_the_figures_of_a_column_are_aligned_where_four_digits_suffice():
    assert column([0.5, 0.0501234, 0.25]) == ["0.5000", "0.0501", "0.2500"]
    assert column([26.98, 4.5]) == ["26.98", "4.50"]
    assert column([1.0, 20000.0]) == ["1", "20,000"]
    assert column([math.inf, 0.25, 1e-9]) == ["inf", "0.25", "1e-09"]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.25, "0.25 s"), (9.99, "10 s"), (42, "42 s"), (59.7, "1 min"), (725, "12 min 5 s"),
     (3599.6, "1 h"), (12000, "3 h 20 min"), (86390, "1 d"), (183600, "2 d 3 h"),
     (math.inf, "inf s")],
)  # fmt: skip
def test_a_duration_is_told_in_two_units(seconds: float, told: str):
    assert lasting(seconds) == told


def test_a_model_tells_what_it_is_of_what_it_took_and_which_options_are_not_the_defaults():
    run()
    page = reported(".soup-store")
    section = page.source.partition("<h3>root</h3>")[2].partition("</section>")[0]
    assert "finetune by draws · " in section
    assert "on a GPU" in section
    assert "<dt>images</dt><dd>X: count 995</dd>" in section
    assert "<dt>left out</dt><dd>none</dd>" in section
    assert "<dt>λ</dt><dd>inf</dd>" in section  # of which JSON has no number
    assert "python 3." in section
    assert "Options that are not the defaults" in section
    assert "<dt>images</dt><dd>9</dd>" in section
    assert "<dt>rate</dt>" not in section  # as the trainer takes it anyway
    merged = page.source.partition("<h2>Merged</h2>")[2]
    assert "linear" in merged
    assert ">slow</a>, " in merged


def test_a_trainer_that_a_record_only_says_the_place_of_is_not_imported(
    here: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(here))
    Path("strange.py").write_text("from test_report import Draws as Strange\n")
    run(TREE.replace("draws", "strange:Strange"))
    monkeypatch.delitem(sys.modules, "strange")
    page = reported("out.safetensors")
    assert "strange" not in sys.modules
    assert "Options that were given" in page.text


def test_a_checkpoint_without_its_store_has_its_tree_and_its_plan():
    run()
    shutil.rmtree(".soup-store")
    page = reported("out.safetensors")
    must_stand_alone(page)
    assert {text for tag, text in page.said if tag == "h3"} == {"out.safetensors", "slow", "fast"}
    assert "in the store of the run that made it" in page.text
    assert "Metrics" not in {text for tag, text in page.said if tag == "h2"}


def test_a_checkpoint_finds_its_records_in_a_store_elsewhere_and_only_its_own(here: Path):
    run()
    Path("other.yaml").write_text(
        "soup: 1\nmodels: {lone: {train: {trainer: draws}}}\ntree: lone\n"
    )
    modelsoup.run(modelsoup.read_tree("other.yaml")[0], "lone.safetensors", store=".soup-store")
    Path(".soup-store").rename("elsewhere")
    page = reported("out.safetensors", "--store", "elsewhere")
    assert "records of 4 of 4 models in elsewhere" in page.text
    assert "lone" not in page.text
    assert len(page.pictures) == 11
    assert "lone" in reported("elsewhere").text


def test_a_model_that_is_read_twice_is_drawn_twice_and_told_once():
    run(TREE.replace("{of: [slow, fast]}", "{of: [{of: [slow, fast], name: mid}, slow]}"))
    page = reported("out.safetensors")
    must_stand_alone(page)
    assert {"slow", "slow#2"} <= {text for tag, text in page.said if tag == "text"}
    told = [text for tag, text in page.said if tag == "h3"]
    assert sorted(told) == ["fast", "mid", "root", "slow"]


def test_a_long_chain_of_merges_is_drawn_and_what_swells_is_not(here: Path):
    for name in "ab":
        save_file({"w": np.zeros(2, np.float32)}, f"{name}.safetensors")
    for _ in range(200):
        modelsoup.merge(["a.safetensors", "b.safetensors"], "c.safetensors", beta=0.5)
        Path("c.safetensors").replace("a.safetensors")
    page = reported("a.safetensors")
    assert page.text.count("linear β 0.5") == 200
    for number in range(12):  # of itself and another, again and again: 2¹² leaves
        modelsoup.merge(["a.safetensors", "a.safetensors"], "c.safetensors", beta=0.5 + number / 99)
        Path("c.safetensors").replace("a.safetensors")
    assert flaws(reported("a.safetensors")) == [
        "The tree is not drawn: it has more than 1,000 nodes."
    ]


def test_what_the_page_says_makes_the_checkpoint_again(here: Path):
    """By commands, whose nodes run in processes that know the trainers of a module only."""
    Path("tree.yaml").write_text(
        'soup: 1\ndefaults: {train: {trainer: "trainers:Add"}}\n'
        "models: {a: {train: {add: 1}}, b: {train: {add: 3}}}\ntree: {of: [a, b]}\n"
    )
    assert soup("run", "tree.yaml", "-o", "out.safetensors", "-q").exit_code == 0
    said = [text for tag, text in reported("out.safetensors").said if tag == "code"]
    assert modelsoup.plan_text("out.safetensors") in said
    commands = next(text for text in said if text.startswith("soup plan --from"))
    first, second = commands.splitlines()
    words, target = first.split(" > ")
    Path(target).write_text(soup(*shlex.split(words)[1:]).stdout)
    known = next(text for tag, text in reported(".soup-store").said if text.startswith("soup run"))
    for command in (second, known.splitlines()[0]):
        shutil.rmtree(".soup-store")
        assert soup(*shlex.split(command)[1:], "-q").exit_code == 0
        made = Path("again.safetensors")
        assert made.read_bytes() == Path("out.safetensors").read_bytes()
        made.unlink()


def shown_of(node: str) -> Path:
    entry = next(e for e in modelsoup.Store(".soup-store").entries() if e.record["node"] == node)
    return Path(entry.record["notes"]["shown"])


def flaws(page: Page) -> list[str]:
    pieces = page.source.split('<p class="flaw">')[1:]
    return [piece.partition("</p>")[0] for piece in pieces]


NEWEST = "samples/step-0000600.png"


def as_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def clip(file: Path, nbytes: int) -> None:
    file.write_bytes(file.read_bytes()[:nbytes])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (shutil.rmtree, "Its curves and samples are no longer in"),
        (lambda f: (f / "losses.csv").unlink(), "losses.csv"),
        (lambda f: shutil.rmtree(f / "samples"), ": samples."),
        (lambda f: (f / "losses.csv").write_text("a,b\n1,2\n"), "whose first column is step"),
        (lambda f: (f / "losses.csv").write_bytes(b""), "losses.csv is no table"),
        (lambda f: (f / "losses.csv").write_text("step,a\n1,x\n2,2\n3\n"), "2 lines are not"),
        (lambda f: (f / "metrics.csv").write_bytes(os.urandom(5000)), "metrics.csv is no table"),
        (lambda f: as_pipe(f / "losses.csv"), "not a regular file"),
        (lambda f: clip(f / NEWEST, 200), "step-0000600.png is not shown: it is damaged"),
        (lambda f: (f / NEWEST).write_text("?"), "it is no PNG picture"),
        (lambda f: (f / NEWEST).write_bytes(bytes(9 << 20)), "8,388,608 bytes"),
    ],
)  # fmt: skip
def test_what_is_missing_or_damaged_is_told_in_one_line(damage, told: str):
    run()
    damage(shown_of("slow"))
    page = reported(".soup-store")
    must_stand_alone(page)
    (line,) = flaws(page)
    assert told in line


def test_a_record_that_names_no_folder_or_no_figures_is_told_and_no_error():
    run()
    store = modelsoup.Store(".soup-store")
    for entry in store.entries():
        record = entry.path.parent / "record.json"
        if entry.record["node"] == "fast":
            record.write_text("{")
        if entry.record["node"] == "slow":
            notes = {"shown": "near", "deep": {"a": {"b": {"c": [1, {"d": 2}]}}}}
            changed = {"metrics": {"fid": "low", "big": 10**400, "ok": True}, "notes": notes,
                       "seconds": "long", "started": None, "inputs": 5, "frozen": 3}  # fmt: skip
            record.write_text(json.dumps({**entry.record, **changed}))
    first, second = flaws(reported(".soup-store"))
    assert "1 result are damaged and left out" in first
    assert "names no folder of curves and samples by its whole path" in second


def test_an_unfinished_run_shows_what_there_is():
    run()
    store = modelsoup.Store(".soup-store")
    root = next(entry for entry in store.entries() if entry.record["node"] == "root")
    store.drop(root.key)
    page = reported(".soup-store")
    assert "The last result of tree.yaml is not there" in page.text
    assert [text for tag, text in page.said if tag == "figcaption"].count("step 600") == 2
    must_stand_alone(page)


@pytest.mark.parametrize("what", ["plan.yaml", "empty", "absent", "bare.safetensors"])
def test_what_is_neither_a_store_nor_a_checkpoint_with_a_lineage_is_refused(what: str, here: Path):
    Path("plan.yaml").write_text(TREE)
    Path("empty").mkdir()
    save_file({"w": np.zeros(2, np.float32)}, "bare.safetensors")
    said = refused("report", what, "-o", "page.html")
    expected = {"absent": "does not exist", "bare.safetensors": "holds no lineage"}
    assert expected.get(what, "is neither a store, which has a folder objects in it, nor") in said
    assert what in said
    assert not (here / "page.html").exists()


def test_a_page_is_put_only_where_it_harms_nothing():
    run()
    Path("page.html").write_text("mine")
    assert "--force replaces it" in refused("report", ".soup-store", "-o", "page.html")
    assert Path("page.html").read_text() == "mine"
    for store in (
        [".soup-store"],
        ["out.safetensors"],
        ["out.safetensors", "--store", ".soup-store"],
    ):
        said = refused("report", *store, "-o", ".soup-store/page.html")
        assert "would lie in .soup-store, which is read" in said
    assert "must end in .html" in refused("report", ".soup-store", "-o", "page.svg")
    assert "does not exist" in refused("report", ".soup-store", "-o", "no/page.html")
    assert "no store at nowhere" in refused("report", "out.safetensors", "--store", "nowhere")
    assert soup("report", ".soup-store", "--store", ".soup-store").exit_code == 2


def large_store(models: int) -> None:
    """A store as a run leaves it, made from one result."""
    run("soup: 1\nmodels: {one: {train: {trainer: draws, shown: shown, images: 3}}}\ntree: one\n")
    (made,) = modelsoup.Store(".soup-store").entries()
    for number in range(1, models):
        folder = made.path.parent.with_name(f"{number:032x}")
        shutil.copytree(made.path.parent, folder)
        digest = f"{number:032x}"
        record = {**made.record, "node": f"node-{number}", "key": folder.name, "digest": digest}
        (folder / "record.json").write_text(json.dumps(record))


def test_a_store_of_two_hundred_models_is_told_within_seconds():
    large_store(200)
    begun = time.process_time()
    page = reported(".soup-store")
    assert time.process_time() - begun < 20
    assert len(page.pictures) == 600
    assert Path("page.html").stat().st_size < FIGURES + TEXTS + 2_000_000
    must_stand_alone(page)


def test_what_has_no_place_in_a_page_is_left_out_and_counted_the_newest_samples_last():
    large_store(6)
    folder = shown_of("one")
    for number in (1, 2, 3):
        (folder / f"samples/step-{number * 300:07}.png").write_bytes(png(1000, 1000, seed=number))
    page = reported(".soup-store")
    assert len(page.pictures) == 5  # of 4 MB each, as text
    assert "13 figures left out: all figures of a page may have 24 MB" in " ".join(flaws(page))
    assert [text for tag, text in page.said if tag == "figcaption"].count("step 900") == 5
    assert Path("page.html").stat().st_size < FIGURES + TEXTS


def test_of_a_step_that_is_there_twice_the_later_line_counts(tmp_path: Path):
    file = tmp_path / "losses.csv"
    file.write_text("step,seconds,G\n10,1,5\n20,2,4\n30,3,3\n20,2,7\n30,3,\n40,4,2\n50,5")
    found = read_curves(file)
    assert list(found.steps) == [10, 20, 30, 40]  # the last line is being written
    np.testing.assert_equal(found.columns["G"], [5, 7, math.nan, 2])
    assert found.flaw == ""


def test_of_a_long_training_the_whole_is_drawn(tmp_path: Path):
    file = tmp_path / "losses.csv"
    file.write_text("step,G\n" + "".join(f"{n},{n}\n" for n in range(100_001)))
    found = read_curves(file)
    assert len(found.steps) <= 4001
    assert found.steps[-1] == 100_000
    assert found.steps[0] < 100
    assert len(chart(found, ["G"])) < 10_000


@pytest.mark.parametrize(
    "values",
    [[0.0], [5.0, 5.0], [-1e99, 1e99], [1e-300, 2e-300], [math.inf, 1.0, math.nan, 2.0],
     [1e9, 1e9 + 1e-6], [*range(1000)]],
)  # fmt: skip
def test_a_chart_lies_within_its_box(values: list[float], tmp_path: Path):
    file = tmp_path / "losses.csv"
    file.write_text("step,G\n" + "".join(f"{n},{v}\n" for n, v in enumerate(values)))
    found = read_curves(file)
    assert charts(found) == [["G"]]
    picture = Page(chart(found, ["G"]))
    (points,) = [found["points"] for tag, found in picture.all if tag == "polyline"]
    for x, y in (map(float, point.split(",")) for point in points.split()):
        assert 50 <= x <= 350
        assert 8 - 0.1 <= y <= 164 + 0.1
    assert [text for tag, text in picture.said if tag == "text"]


def test_losses_of_one_size_share_a_chart_and_others_do_not(tmp_path: Path):
    file = tmp_path / "losses.csv"
    file.write_text("step,a,b,c,d\n" + "".join(f"{n},1,2,500,nan\n" for n in range(5)))
    found = read_curves(file)
    assert charts(found) == [["a", "b"], ["c"]]  # of d there is nothing to draw
    assert charts(found, each=True) == [["a"], ["b"], ["c"]]


def test_a_smoothed_curve_is_the_mean_of_what_it_has_seen(tmp_path: Path):
    file = tmp_path / "losses.csv"
    file.write_text("step,G\n" + "".join(f"{n},{n % 2}\n" for n in range(2000)))
    found = read_curves(file)
    lines = {smooth: chart(found, ["G"], smooth=smooth) for smooth in (True, False)}
    heights = {
        smooth: [
            float(p.split(",")[1]) for p in line.partition('points="')[2].partition('"')[0].split()
        ]
        for smooth, line in lines.items()
    }
    assert np.ptp(heights[True][20:]) < 0.05 * np.ptp(heights[False])
    assert np.mean(heights[True][20:]) == pytest.approx((8 + 164) / 2, abs=2)


def test_a_picture_is_known_by_its_bytes():
    assert png_size(png(31, 17)) == (31, 17)
    whole = png()
    for nbytes in range(len(whole)):
        with pytest.raises(ValueError, match=r"damaged|no PNG"):
            png_size(whole[:nbytes])
    for place in range(len(whole) - 12):  # but for the end, of which nothing is shown
        changed = bytearray(whole)
        changed[place] ^= 1
        with pytest.raises(ValueError, match=r"damaged|no PNG"):
            png_size(bytes(changed))
    huge = b"IHDR" + struct.pack(">IIBBBBB", 1 << 20, 1 << 20, 8, 2, 0, 0, 0)
    large = whole[:12] + huge + struct.pack(">I", zlib.crc32(huge)) + whole[33:]
    with pytest.raises(ValueError, match="1,048,576 × 1,048,576 pixels"):
        png_size(large)


def looked_at(page: str, width: int, scheme: str, home: Path) -> dict:
    """What Chromium finds in a page: tests/browser.py."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("browser.py"), page, str(width), scheme],
        check=False, capture_output=True, text=True, timeout=120,
        env={**os.environ, "HOME": str(home)},
    )  # fmt: skip
    if done.returncode == CANNOT_START:
        pytest.skip(f"platform: Chromium lacks a library of the system: {done.stdout.strip()}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.needs("browser")
def test_a_browser_shows_the_page_whole_on_narrow_and_wide_screens_by_day_and_by_night(here: Path):
    name = "a-name-" + 40 * "long"
    run(TREE.replace("slow", name).replace("alert(1)", 300 * "b"))
    reported(".soup-store")
    grounds = set()
    for width, scheme in ((400, "light"), (400, "dark"), (1400, "light"), (1400, "dark")):
        found = looked_at("page.html", width, scheme, here)
        assert found["said"] == []
        assert len(found["pictures"]) == 11
        assert min(found["pictures"]) > 0
        assert found["wide"] <= found["room"] <= width
        assert found["small"] >= 9.5  # pixels of the smallest letters
        assert found["ground"] != found["ink"]
        grounds.add(found["ground"])
    assert len(grounds) == 2
