"""Where `out` points: an earlier run's folder is replaced, and nobody else's."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner
from modelsoup_openvino.place import must_be_free
from modelsoup_openvino.trainer import OpenVinoQat

import modelsoup
from modelsoup.terminal.cli import main

from conftest import device_plan  # isort: skip


def folder_with(folder, name="holiday.jpg", text="a photo"):
    folder.mkdir()
    (folder / name).write_text(text)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def quantize(start, data, out, *more):
    return CliRunner().invoke(
        main,
        ["openvino", "quantize", str(start), "--trainer", "cyclegan", "--data", str(data), "-o",
         str(out), "--epochs", "0", "--rounds", "0", *more],
    )  # fmt: skip


def test_force_never_replaces_a_folder_of_something_else(start, data, tmp_path):
    photos = folder_with(tmp_path / "photos")
    before = contents(photos)
    for more in ((), ("--force",)):
        done = quantize(start, data, photos, *more)
        assert done.exit_code == 1
        assert "photos is a folder of something else" in done.output
        assert "calibrates" not in done.output
        assert "Traceback" not in done.output
    assert contents(photos) == before
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    "report", ["", "[]", "{}", '{"origin": "Rome"}', '{"origin": {"trainer": "me"}}']
)
def test_another_programs_report_does_not_make_a_folder_ours(report, tmp_path):
    photos = folder_with(tmp_path / "photos", "report.json", report)
    with pytest.raises(modelsoup.OutputError, match="something else"):
        must_be_free(photos, force=True)
    assert contents(photos) == {"report.json": report.encode()}


def test_a_trainers_out_is_looked_at_before_anything_is_computed(quantise, tmp_path):
    folder_with(tmp_path / "out")
    with pytest.raises(modelsoup.OutputError, match="out is a folder of something else"):
        quantise(tmp_path, epochs=0)
    assert contents(tmp_path / "out") == {"holiday.jpg": b"a photo"}
    assert list((tmp_path / "work").iterdir()) == []


def test_a_plan_whose_out_is_somebodys_folder_is_refused(data, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = folder_with(tmp_path / "photos")
    plan = device_plan(tmp_path / "tree.yaml", start, data, out="photos", epochs=0, rounds=0)
    tree, _ = modelsoup.read_tree(plan)
    (problem,) = modelsoup.check(tree).problems
    assert "photos is a folder of something else" in problem
    with pytest.raises(modelsoup.SoupError, match="photos is a folder of something else"):
        modelsoup.run(tree, "device.safetensors", store="store")
    assert contents(photos) == {"holiday.jpg": b"a photo"}
    photos.rename("elsewhere")
    assert OpenVinoQat().notices(tree_options(tmp_path)) == []


def test_two_nodes_of_a_plan_do_not_share_a_folder(data, start, tmp_path):
    path = device_plan(tmp_path / "tree.yaml", start, data, out="edge", epochs=0, rounds=0)
    plan = json.loads(path.read_text("utf-8"))
    plan["tree"] = {"of": [plan["tree"]], "finetune": plan["tree"]["finetune"]}
    path.write_text(json.dumps(plan), "utf-8")
    (problem,) = modelsoup.check(modelsoup.read_tree(path)[0]).problems
    assert f"root: it would write {tmp_path / 'edge'}, and root.1 the same" in problem


def tree_options(folder):
    given = {"of": "cyclegan", "out": "photos"}
    return modelsoup.build_options(OpenVinoQat(), given, folder)


def test_an_earlier_runs_folder_and_an_empty_one_are_replaced(made, quantise, tmp_path):
    for name in ("edge", "empty"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "edge":
            shutil.copytree(made.out, folder / "out")
            (folder / "out" / "earlier").touch()
        else:
            (folder / "out").mkdir()
        quantise(folder, epochs=0)
        assert set(contents(folder / "out")) == set(contents(made.out))
        assert sorted(path.name for path in folder.iterdir()) == ["out", "work"]


@pytest.mark.parametrize("theirs", ["notes", "a run's"])
def test_what_was_put_there_meanwhile_stays(theirs, made, quantise, tmp_path):
    """Somebody's folder in any case, another run's without force."""
    out = tmp_path / "out"

    def meanwhile(line):
        if line == "converts and compares":
            if theirs == "notes":
                out.mkdir()
            else:
                shutil.copytree(made.out, out)
            (out / "notes.txt").write_text("theirs")

    force = theirs == "notes"
    said = "something else" if force else "appeared while it was made|exists and is not empty"
    with pytest.raises(modelsoup.OutputError, match=said):
        quantise(tmp_path, epochs=0, force=force, say=meanwhile)
    assert (out / "notes.txt").read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "work"]


def test_a_folder_is_not_replaced_by_what_is_made_from_it(made, data, tmp_path):
    out = tmp_path / "edge"
    shutil.copytree(made.out, out)
    before = contents(out)
    done = quantize(out / "float.safetensors", data, out, "--force")
    assert done.exit_code == 1
    assert "edge holds" in done.output
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["edge"]
