"""Runs of trees: nothing twice, nothing lost, the same bytes after any interruption."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file, save_file
from trainers import network

import modelsoup
from modelsoup import (
    FineTune,
    Merge,
    Recipe,
    RunError,
    Store,
    Train,
    Training,
    binary_tree,
    parse_tree,
)
from modelsoup.files.placing import remove_stale
from modelsoup.merging.threads import default_workers
from modelsoup.running.processes import ProcessExecutor
from modelsoup.terminal import show_tree
from modelsoup.trees.keys import node_seed
from modelsoup.trees.plan import check

SOUP = [sys.executable, "-m", "modelsoup"]
TESTS = str(Path(__file__).parent)
TUNED = """soup: 1
models: {a: a.safetensors, b: b.safetensors, c: c.safetensors, d: d.safetensors}
defaults: {merge: {beta: 0.25}, finetune: {trainer: "trainers:Add", add: 1}}
tree: {pair: [a, b, c, d]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)
    for number, name in enumerate("abcd"):
        save_file(network(number), tmp_path / f"{name}.safetensors")
    return tmp_path


def run(
    folder: Path, text: str = TUNED, name: str = "out", store_name: str = "store", **more
) -> modelsoup.RunReport:
    tree, _ = parse_tree(text, folder=folder)
    return modelsoup.run(
        tree, folder / f"{name}.safetensors", store=folder / store_name, force=True, **more
    )


def soup(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*SOUP, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def expected(folder: Path) -> dict[str, np.ndarray]:
    """The tree of `TUNED`, evaluated by hand."""
    beta, one = np.float32(0.25), np.float32(1)
    rest = np.float32(0.75)
    a, b, c, d = (load_file(folder / f"{n}.safetensors") for n in "abcd")

    def up(x, y):
        return {n: beta * x[n] + rest * y[n] + one for n in x}

    return up(up(a, b), up(c, d))


# --- what comes out ----------------------------------------------------------------------------


def test_a_tree_is_merged_and_fine_tuned_from_the_leaves_to_the_root(folder: Path) -> None:
    report = run(folder)
    made = load_file(report.output)
    for name, values in expected(folder).items():
        np.testing.assert_array_equal(made[name], values, name)
    assert len(report.computed) == 6
    assert report.computed[-1] == "root"


def test_done_is_never_done_again(folder: Path) -> None:
    first = run(folder)
    before = (folder / "out.safetensors").read_bytes()
    again = run(folder)
    assert again.computed == ()
    assert again.records.keys() == first.records.keys()
    assert (folder / "out.safetensors").read_bytes() == before


def test_a_changed_leaf_redoes_exactly_what_is_above_it(folder: Path) -> None:
    run(folder)
    save_file(network(77), folder / "c.safetensors")
    assert set(run(folder).computed) == {"root.2-2.merge", "root.2-2", "root.merge", "root"}


def test_a_changed_option_redoes_exactly_what_is_above_it(folder: Path) -> None:
    text = """soup: 1
models: {a: a.safetensors, b: b.safetensors, c: c.safetensors}
tree: {of: [{of: [a, b], finetune: {trainer: "trainers:Add", add: 1}}, c]}
"""
    assert len(run(folder, text).computed) == 3
    assert set(run(folder, text.replace("add: 1", "add: 2")).computed) == {"root.1", "root"}
    assert run(folder, text).computed == ()  # the old results are still there


def test_a_renamed_leaf_with_the_same_content_is_the_same(folder: Path) -> None:
    text = "soup: 1\nmodels: {a: a.safetensors, b: b.safetensors}\ntree: {of: [a, b]}\n"
    run(folder, text)
    (folder / "a.safetensors").rename(folder / "z.safetensors")
    assert run(folder, text.replace("a.safetensors", "z.safetensors")).computed == ()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("processes", [False, True])
def test_workers_and_processes_do_not_change_a_byte(folder, workers, processes) -> None:
    reference = run(folder, name="reference").output.read_bytes()
    shutil.rmtree(folder / "store")
    executor = ProcessExecutor(workers) if processes else None
    assert run(folder, executor=executor, workers=workers).output.read_bytes() == reference


def test_any_executor_will_do(folder: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        assert len(run(folder, executor=pool).computed) == 6


def test_the_plan_predicts_the_bytes_that_are_read_and_written(folder: Path) -> None:
    tree, _ = parse_tree(TUNED, folder=folder)
    plan = check(tree)
    report = run(folder)
    assert plan.bytes_read == report.bytes_read > 0
    assert plan.bytes_written == report.bytes_written > 0
    files = [Store(folder / "store").entry(r["key"]).path for r in report.records.values()]
    tensors = sum(modelsoup.open_checkpoint(file).nbytes for file in files)
    assert tensors == plan.bytes_written


def test_a_plan_prices_a_tensor_that_is_seen_whole_once_for_each_thread(
    folder: Path, own_methods
) -> None:
    @modelsoup.method("sees_all")
    def sees_all(x):
        return modelsoup.Whole(lambda arrays: arrays[0])

    def memory(sizes: list[int], method: str) -> int:
        tensors = {f"w{n}": np.zeros(size, np.float16) for n, size in enumerate(sizes)}
        for name in "ab":
            save_file(tensors, folder / f"{name}.safetensors")
        text = "soup: 1\nmodels: {a: a.safetensors, b: b.safetensors}\n"
        text += f"tree: {{of: [a, b], merge: {{method: {method}}}}}\n"
        return check(parse_tree(text, folder=folder)[0]).memory

    threads = default_workers()
    sizes = [1000 * n for n in range(1, threads + 3)]
    of_buffers = memory(sizes, "linear")
    held = sum(sizes[-threads:]) * 3 * 4  # two models and the result, in float32
    assert memory(sizes, "sees_all") == of_buffers + held


@pytest.mark.parametrize("method", ["slerp", "ties", "linear"])
def test_predicted_bytes_hold_for_methods_with_more_passes(folder: Path, method: str) -> None:
    options = {
        "slerp": "t: 0.4", "ties": "base: d.safetensors, density: 0.5, weight: 0.5", "linear": "",
    }[method]  # fmt: skip
    text = (
        "soup: 1\nmodels: {a: a.safetensors, b: b.safetensors}\n"
        f"tree: {{of: [a, b], merge: {{method: {method}, {options}}}}}\n"
    )
    tree, _ = parse_tree(text, folder=folder)
    assert check(tree).bytes_read == run(folder, text).bytes_read


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="platform: /proc counts")
@pytest.mark.parametrize("merge", [
    "{method: linear, beta: 0.3}", "{method: slerp, t: 0.4}",
    "{method: ties, base: d.safetensors, density: 0.5, weight: 0.5}",
    "{layers: {w: merge, rest: drop}}",
])  # fmt: skip
def test_the_kernel_counts_the_bytes_that_the_plan_predicts(folder: Path, merge: str) -> None:
    for seed, name in enumerate("abd"):
        values = np.random.default_rng(seed).normal(size=(2, 2_000_000)).astype(np.float32)
        save_file({"w": values[0], "v": values[1]}, folder / f"{name}.safetensors")
    text = f"""soup: 1
models: {{a: a.safetensors, b: b.safetensors}}
tree: {{of: [a, b], merge: {merge}}}
"""
    tree, _ = parse_tree(text, folder=folder)
    plan = check(tree)
    store = Store(folder / "store")
    for name in "abd":
        store.digest_now(folder / f"{name}.safetensors")  # which a run would read them for
    before = counted()
    report = modelsoup.run(tree, None, store=folder / "store")
    read, written = (after - then for after, then in zip(counted(), before, strict=True))
    file = store.entry(report.records["root"]["key"]).path.stat().st_size
    assert written == pytest.approx(plan.bytes_written, rel=0.01)
    assert read == pytest.approx(plan.bytes_read + file, rel=0.01)  # once more for its digest


def counted() -> tuple[int, int]:
    """Bytes that this process has read and written."""
    lines = Path("/proc/self/io").read_text().splitlines()
    count = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return count["rchar"], count["wchar"]


def test_keep_root_leaves_one_result(folder: Path) -> None:
    report = run(folder, keep="root")
    assert [entry.record["node"] for entry in Store(folder / "store").entries()] == ["root"]
    assert len(report.records) == 6
    assert run(folder).computed == ()


def test_a_trained_leaf_and_dropped_layers_are_initialised_by_the_trainer(folder: Path) -> None:
    text = """soup: 1
models:
  a: a.safetensors
  t: {train: {trainer: "trainers:Add", add: 0}}
tree:
  of: [a, t]
  merge: {layers: {frozen: merge, rest: drop}}
  finetune: {trainer: "trainers:Add", add: 3}
"""
    tree, _ = parse_tree(text, folder=folder)
    plan = check(tree)
    assert set(plan.nodes["root"].frozen) == {"D.low.w", "G.low.w"}
    assert set(plan.nodes["root.merge"].dropped) == {"D.high.w", "G.high.w"}
    report = run(folder, text)
    store = Store(folder / "store")
    merged = load_file(store.entry(report.records["root.merge"]["key"]).path)
    made = load_file(report.output)
    assert merged.keys() == {"D.low.w", "G.low.w"}
    assert made.keys() == {"D.low.w", "D.high.w", "G.low.w", "G.high.w"}
    np.testing.assert_array_equal(made["D.low.w"], merged["D.low.w"])
    fresh = network(report.records["root"]["seed"] % 1000)
    np.testing.assert_array_equal(made["G.high.w"], fresh["G.high.w"] + np.float32(3))


def test_the_roots_lineage_holds_the_whole_tree_and_makes_it_again(folder: Path) -> None:
    first = run(folder)
    graph = modelsoup.lineage_graph(modelsoup.open_checkpoint(first.output))
    assert len(graph) == 10
    assert {data["name"] for _, data in graph.nodes(data=True)} >= {
        f"{n}.safetensors" for n in "abcd"
    }
    text = modelsoup.plan_text(modelsoup.open_checkpoint(first.output))
    (folder / "again.yaml").write_text(text)
    again = run(folder, text, "again")
    assert again.output.read_bytes() == first.output.read_bytes()


def test_rules_and_subtrees_come_back_from_a_lineage(folder: Path) -> None:
    text = """soup: 1
models: {a: a.safetensors, b: b.safetensors, c: c.safetensors}
tree:
  of: [{of: [a, b], merge: {layers: {"D.*": 0.3, "re:G.low.*": second, "G.*": first}}}, c]
  merge: {method: ties, base: d.safetensors, density: 0.5, weights: [0.4, 0.6], dtype: bf16}
"""
    first = run(folder, text)
    again = run(folder, modelsoup.plan_text(modelsoup.open_checkpoint(first.output)), "again")
    assert again.output.read_bytes() == first.output.read_bytes()


def test_a_plan_from_a_lineage_takes_no_other_leaves(folder: Path) -> None:
    (folder / "other").mkdir()
    shutil.move(folder / "b.safetensors", folder / "other" / "a.safetensors")
    text = "soup: 1\nmodels: {a: a.safetensors, b: other/a.safetensors}\ntree: {of: [a, b]}\n"
    first = run(folder, text)
    made = modelsoup.plan_text(modelsoup.open_checkpoint(first.output))
    assert "# Different files are called a.safetensors: give each a path of its own." in made
    with pytest.raises(modelsoup.PlanError, match=r"b: .*a\.safetensors is another file than the"):
        run(folder, made, "again")
    second = made.rpartition("path: a.safetensors")
    again = run(folder, second[0] + "path: other/a.safetensors" + second[2], "again")
    assert again.output.read_bytes() == first.output.read_bytes()
    with pytest.raises(
        modelsoup.PlanError, match=r"2:35: models\.a\.xxh3_128 is 'f00', but must be 32 hex"
    ):
        run(folder, text.replace("a: a.safetensors", "a: {path: a.safetensors, xxh3_128: f00}"))


def test_model_folders_stay_model_folders(folder: Path) -> None:
    for name in "ab":
        (folder / name).mkdir()
        shutil.move(folder / f"{name}.safetensors", folder / name / "model.safetensors")
        (folder / name / "config.json").write_text('{"kind": "test"}')
    text = """soup: 1
models: {a: a, b: b}
tree: {of: [a, b], finetune: {trainer: "trainers:Add"}}
"""
    tree, _ = parse_tree(text, folder=folder)
    with pytest.raises(modelsoup.OutputError, match="must be a folder"):
        modelsoup.run(tree, folder / "x.safetensors", store=folder / "store")
    report = modelsoup.run(tree, folder / "out", store=folder / "store")
    assert json.loads((report.output / "config.json").read_text()) == {"kind": "test"}
    assert len(modelsoup.open_checkpoint(report.output)) == 4
    modelsoup.run(tree, folder / "out", store=folder / "store", force=True)  # replaces its own
    assert json.loads((folder / "out" / "config.json").read_text()) == {"kind": "test"}
    assert not [p for p in folder.iterdir() if ".soup-" in p.name]


# --- what goes wrong ---------------------------------------------------------------------------

WRONG = [
    ("Nothing", "wrote nothing"),
    ("Garbage", "wrote no sound checkpoint"),
    ("Forgets", "left out 3 tensors of its start: D.high.w"),
    ("Infinite", "made NaN or infinity in 4 tensors"),
    ("Fails", "failed: RuntimeError: the learning rate is a poem"),
]


@pytest.mark.parametrize(("trainer", "said"), WRONG)
def test_a_trainer_that_does_wrong_is_told_and_leaves_nothing(folder, trainer, said) -> None:
    text = TUNED.replace("trainers:Add", f"trainers:{trainer}").replace(", add: 1", "")
    with pytest.raises(RunError, match=said):
        run(folder, text)
    assert not (folder / "out.safetensors").exists()
    assert {e.record["operation"] for e in Store(folder / "store").entries()} == {"merge"}


def test_a_trainer_that_changes_a_frozen_tensor_is_found(folder: Path) -> None:
    text = """soup: 1
models: {a: a.safetensors, b: b.safetensors}
tree:
  of: [a, b]
  merge: {layers: {"D.*": freeze, "*": merge}}
  finetune: {trainer: "trainers:Thaws"}
"""
    with pytest.raises(RunError, match=r"changed 2 frozen tensors: D\.high\.w, D\.low\.w"):
        run(folder, text)


def test_what_does_not_need_a_failed_node_is_finished(folder: Path) -> None:
    gate = folder / "gate"
    text = f"""soup: 1
models: {{a: a.safetensors, b: b.safetensors, c: c.safetensors, d: d.safetensors}}
tree:
  of:
    - {{of: [a, b], finetune: {{trainer: "trainers:FailsOnce", note: {gate}}}}}
    - {{of: [c, d], finetune: {{trainer: "trainers:Add"}}}}
"""
    with pytest.raises(RunError, match=r"root\.1: .* not yet"):
        run(folder, text)
    gate.touch()
    assert set(run(folder, text).computed) == {"root.1", "root"}


def test_a_lost_worker_is_replaced_and_then_given_up(folder: Path) -> None:
    text = TUNED.replace("trainers:Add", "trainers:Dies")
    with pytest.raises(RunError, match=r"its worker was lost 3 times: .*SIGKILL"):
        run(folder, text.replace("add: 1", "add: 9"), executor=ProcessExecutor(2))
    report = run(folder, text, executor=ProcessExecutor(2))
    assert "root" in report.computed


def test_a_corrupted_result_is_found_by_its_digest_and_made_again(folder: Path) -> None:
    reference = run(folder).output.read_bytes()
    store = Store(folder / "store")
    by_node = {entry.record["node"]: entry for entry in store.entries()}
    for name in ("root.2-1", "root.merge"):
        with by_node[name].path.open("r+b") as file:
            file.seek(-3, os.SEEK_END)
            file.write(b"xyz")
    assert not store.intact(by_node["root.2-1"].key)
    store.drop(by_node["root"].key)
    report = run(folder)
    assert report.output.read_bytes() == reference
    assert report.computed == ("root.2-1", "root.merge", "root")


@pytest.mark.parametrize("cut", [0, 5, 200])
def test_a_truncated_root_is_made_again(folder: Path, cut: int) -> None:
    reference = run(folder).output.read_bytes()
    store = Store(folder / "store")
    (root,) = (e for e in store.entries() if e.record["node"] == "root")
    os.truncate(root.path, cut)
    report = run(folder)
    assert report.computed == ("root",)
    assert report.output.read_bytes() == reference


@pytest.mark.parametrize("executor", [None, ProcessExecutor], ids=["threads", "processes"])
def test_a_trainers_traceback_is_in_the_log_and_in_the_cause(folder: Path, executor) -> None:
    text = TUNED.replace("trainers:Add", "trainers:FailsAtLength").replace("add: 1", "note: xyz")
    text = text.replace("pair: [a, b, c, d]", "of: [a, b]").replace(", c: c.safetensors", "")
    with pytest.raises(RunError) as caught:
        run(folder, text, executor=executor and executor(1))
    store = Store(folder / "store")
    (log,) = (file for file in store.folder.glob("logs/*.log") if file.stat().st_size)
    assert str(caught.value).splitlines() == [
        f"root: the trainer 'writes' failed: ValueError: no such layer (log: {log})",
        "    xyz",
        "  look at its name",
    ]
    for told in (log.read_text(), "".join(traceback.format_exception(caught.value))):
        assert "in deeper" in told
        assert 'raise ValueError(f"no such layer' in told
    assert log.read_text().startswith("so far, so good\n")


@pytest.mark.parametrize("kind", ["FileNotFoundError", "CheckpointError", "CancelledError"])
@pytest.mark.parametrize("executor", [None, ProcessExecutor], ids=["threads", "processes"])
def test_whatever_kind_of_error_a_trainer_raises_its_traceback_is_in_the_log(
    folder: Path, executor, kind: str
) -> None:
    """Those of the system, ours, and those that are no `Exception`; and it is not tried again."""
    text = "soup: 1\nmodels: {a: a.safetensors}\n"
    text += f'tree: {{of: [a, a], finetune: {{trainer: "trainers:Raises", note: {kind}}}}}\n'
    with pytest.raises(RunError, match=r"root: .*nothing of the kind.* \(log: .*\)") as caught:
        run(folder, text, executor=executor and executor(1))
    assert "lost" not in str(caught.value)
    logs = [file.read_text() for file in (folder / "store" / "logs").glob("*.log")]
    (log,) = filter(None, logs)
    assert log.count("in raised_deep_down") == 1


def test_an_error_that_cannot_be_sent_to_another_process_is_told_as_it_is(folder: Path) -> None:
    text = TUNED.replace("trainers:Add", "trainers:WontTravel").replace(", add: 1", "")
    with pytest.raises(RunError, match=r"root\.2-1: the trainer 'writes' failed: Stuck: stuck"):
        run(folder, text, executor=ProcessExecutor(1))


def test_an_error_in_a_merge_method_is_told_as_that(folder: Path, own_methods) -> None:
    @modelsoup.method("sulks")
    def sulks(x):
        def sulking(b):
            raise ValueError("not today")

        return sulking

    events = []
    text = TUNED.replace("{beta: 0.25}", "{method: sulks}")
    said = r"root\.2-1\.merge: the merge failed: ValueError: not today \(log: "
    with pytest.raises(RunError, match=said) as caught:
        run(folder, text, watch=events.append)
    assert [e.state for e in events if e.node == "root.2-1.merge"][-1] == "failed"
    assert isinstance(caught.value.__cause__.__cause__, ValueError)
    (log, _) = sorted(Store(folder / "store").folder.glob("logs/*.log"))
    assert "in sulking" in log.read_text()


def test_each_failure_is_printed_once(folder: Path) -> None:
    (folder / "tree.yaml").write_text(TUNED.replace("trainers:Add", "trainers:Fails"))
    said = soup(folder, "run", "tree.yaml", code=1).stderr
    assert said.count("the learning rate is a poem") == 2  # of two nodes
    assert len(re.findall(r"s  failed   root\.2-[12]$", said, re.M)) == 2
    assert len(re.findall(r"^(Error: )?root\.2-[12]: the trainer 'writes' failed", said, re.M)) == 2


THREE = """soup: 1
models: {a: a.safetensors, b: b.safetensors, c: c.safetensors, d: d.safetensors}
tree: {of: [{of: [a, b]}, {of: [a, c]}, {of: [b, c]}], merge: {method: ties, base: d.safetensors,
       weights: [0.2, 0.3, 0.5]}}
"""


@pytest.mark.parametrize("which", [1, 2, 3])
def test_each_input_is_compared_with_what_it_was(folder: Path, which: int) -> None:
    """Its last byte changes once the root's merge is all that is left."""
    reference = run(folder, THREE, "reference").output.read_bytes()
    shutil.rmtree(folder / "store")
    store, states = Store(folder / "store"), []

    def watch(event: modelsoup.Event) -> None:
        states.append((event.node, event.state))
        inner = [s for s in states if s in [(f"root.{n}", "done") for n in (1, 2, 3)]]
        if len(inner) == 3 and event.node == inner[-1][0] and event.state == "done":
            (path,) = (e.path for e in store.entries() if e.record["node"] == f"root.{which}")
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    report = run(folder, THREE, watch=watch)
    assert report.output.read_bytes() == reference
    assert report.computed.count(f"root.{which}") == 2
    assert len(report.computed) == 5


@pytest.mark.parametrize("name", "abd")
def test_a_file_of_the_users_that_changes_during_a_run_is_told(folder: Path, name: str) -> None:
    path = folder / f"{name}.safetensors"
    text = """soup: 1
models:
  t: {train: {trainer: "trainers:Add"}}
  s: {train: {trainer: "trainers:Add"}, start: b.safetensors}
  a: a.safetensors
tree: {of: [t, {of: [s, a], merge: {method: ties, base: d.safetensors, weights: [1, 1]}}]}
"""

    def change(_: modelsoup.Plan) -> None:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    said = rf"{name}\.safetensors changed while the run read it: run again"
    with pytest.raises(RunError, match=said):
        run(folder, text, planned=change)
    assert not (folder / "out.safetensors").exists()
    assert "root" in run(folder, text).computed


def test_a_record_says_what_a_result_was_made_of_and_by_what(folder: Path) -> None:
    begin = time.time()
    report = run(folder)
    store = Store(folder / "store")
    root, merge = report.records["root"], report.records["root.merge"]
    assert root["inputs"] == [
        {"node": "root.merge", "key": merge["key"], "digest": merge["digest"]}
    ]
    assert [given["node"] for given in merge["inputs"]] == ["root.2-1", "root.2-2"]
    assert root["digest"] == xxhash.xxh3_128(report.output.read_bytes()).hexdigest()
    assert begin <= merge["started"] <= root["started"] <= time.time()
    assert root["host"] == socket.gethostname()
    assert root["versions"]["modelsoup"] == modelsoup.__version__
    assert (root["trainer"], root["options"]) == ("trainers:Add", {"add": 1})
    tree, _ = parse_tree(TUNED, folder=folder)
    assert root["seed"] == node_seed(tree, "root")
    assert not list((store.folder / "work").iterdir())  # it is done, and so its state is gone
    leaf = report.records["root.2-1.merge"]["inputs"][0]
    assert (leaf["node"], leaf["key"]) == ("a", None)
    assert leaf["digest"] == xxhash.xxh3_128((folder / "a.safetensors").read_bytes()).hexdigest()


def test_what_a_node_prints_is_in_its_log_and_what_is_no_figure_is_not_in_its_record(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text = TALKS.replace("Talks", "Prints").replace(", add: 6", "")
    report = run(folder, text, executor=ProcessExecutor(1))
    log = Store(folder / "store").log(report.records["root"]["key"]).read_text()
    lines = ["from Python", "to stderr", "from a program", "in the log"]
    assert sorted(log.splitlines()) == sorted(lines)
    assert capfd.readouterr() == ("", "")
    assert report.records["root"]["metrics"] == {"loss": 1.0, "steps": 3.0}


def test_problems_are_told_all_at_once_and_nothing_is_started(folder: Path) -> None:
    (folder / "b.safetensors").unlink()
    (folder / "c.safetensors").write_bytes(b"?")
    tree, _ = parse_tree(TUNED, folder=folder)
    problems = check(tree).problems
    assert len(problems) == 2
    assert problems[0].startswith("the plan:2:28: b: ")
    assert problems[1].startswith("the plan:2:46: c: ")
    with pytest.raises(modelsoup.PlanError) as caught:
        run(folder)
    assert str(caught.value).splitlines() == list(problems)
    assert not (folder / "store").exists()


def test_models_that_do_not_fit_after_drops_are_told_at_plan_time(folder: Path) -> None:
    text = """soup: 1
models: {a: a.safetensors, b: b.safetensors, c: c.safetensors}
tree: {of: [{of: [a, b], merge: {layers: {"D.*": merge, rest: drop}}}, c]}
"""
    tree, _ = parse_tree(text, folder=folder)
    (problem,) = check(tree).problems
    assert problem.startswith(
        "the plan:3:1: root: the models do not fit together: 2 tensors are missing from"
    )


def test_an_output_that_exists_or_is_an_input_is_refused_first(folder: Path) -> None:
    tree, _ = parse_tree(TUNED, folder=folder)
    with pytest.raises(modelsoup.OutputError, match=r"would replace .*, which is read"):
        modelsoup.run(tree, folder / "a.safetensors", store=folder / "store", force=True)
    (folder / "out.safetensors").write_bytes(b"mine")
    with pytest.raises(modelsoup.OutputError, match="exists"):
        modelsoup.run(tree, folder / "out.safetensors", store=folder / "store")
    assert (folder / "out.safetensors").read_bytes() == b"mine"
    assert not list((folder / "store" / "objects").iterdir())


FOLDERS = "soup: 1\nmodels: {a: out/a, b: b}\ntree: {of: [a, b]}\n"


def model_folders(folder: Path) -> Path:
    """An output that a merge wrote, in which a leaf lies, as a folder; and one beside."""
    modelsoup.merge([folder / "a.safetensors", folder / "b.safetensors"], folder / "out")
    for leaf, name in ((folder / "out" / "a", "a"), (folder / "b", "b")):
        leaf.mkdir()
        shutil.copy(folder / f"{name}.safetensors", leaf / "model.safetensors")
    return folder / "out"


@pytest.mark.parametrize("name", ["out", "link", "around/out"])
@pytest.mark.parametrize("leaf", ["a: out/a", "a: around/out/a", "a: link/a"])
def test_an_output_that_holds_a_leaf_is_refused_by_whatever_name(
    folder: Path, name: str, leaf: str
) -> None:
    out = model_folders(folder)
    (folder / "link").symlink_to(out)
    (folder / "around").symlink_to(folder)
    tree, _ = parse_tree(FOLDERS.replace("a: out/a", leaf), folder=folder)
    with pytest.raises(modelsoup.OutputError, match=r"the output .* holds .*/a, which is read$"):
        modelsoup.run(tree, folder / name, store=folder / "store", force=True)
    assert load_file(out / "a" / "model.safetensors")["D.low.w"].shape == (4, 3)


def soup_where_mounted(folder: Path, *arguments: str) -> tuple[int, str]:
    """The code and the errors of a command to whom the folder `mounted` is the folder out/a."""
    (folder / "mounted").mkdir()
    unshare = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-m", "-U", "-r"]
    mount = "mount --bind out/a mounted"
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*unshare, "sh", "-c", mount], cwd=folder, check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("platform: mounting is not allowed here")
    done = subprocess.run(
        [*unshare, "sh", "-c", f'{mount} && "$@"', "-", *SOUP, *arguments], cwd=folder,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_an_output_that_holds_a_leaf_through_a_bind_mount_is_refused(folder: Path) -> None:
    model_folders(folder)
    (folder / "tree.yaml").write_text(FOLDERS.replace("out/a", "mounted"))
    told = soup_where_mounted(folder, "run", "tree.yaml", "-o", "out", "--force")
    assert told == (1, "Error: the output out holds mounted, which is read\n")
    assert (folder / "out" / "a" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("the input", "soup: 1\nmodels: {a: a, b: b}\ntree: {of: [a, b], merge: {method: ties, "
                      "base: out/a, weights: [1, 1]}}\n"),
        ("the input", 'soup: 1\nmodels: {a: {train: {trainer: "trainers:Add"}, start: out/a}}\n'
                      "tree: {of: [a]}\n"),
        ("the store", "soup: 1\nmodels: {a: a, b: b}\ntree: {of: [a, b]}\n"),
        ("the input", "soup: 1\nmodels: {a: a, b: b}\ntree: {of: [a, b], finetune: {command: "
                      "[sh, out/train.sh, '{start}', '{output}']}}\n"),
    ],
)  # fmt: skip
def test_an_output_that_holds_anything_that_is_read_is_refused(folder, kind, text) -> None:
    model_folders(folder)
    shutil.copytree(folder / "b", folder / "a")
    (folder / "out" / "train.sh").write_text("cp $1/* $2\n")
    tree, _ = parse_tree(text, folder=folder)
    store = folder / "out" / "store" if kind == "the store" else folder / "store"
    with pytest.raises(modelsoup.OutputError, match=r"/out holds .*/out/.*, which is read$"):
        modelsoup.run(tree, folder / "out", store=store, force=True)
    assert (folder / "out" / "train.sh").exists()


def test_an_output_that_holds_the_plan_or_a_trainers_module_is_refused(folder: Path) -> None:
    model_folders(folder)
    for name in "ab":
        shutil.copytree(folder / "out" / "a", folder / name, dirs_exist_ok=True)
    (folder / "out" / "plan.yaml").write_text("soup: 1\nmodels: {a: ../a}\ntree: {of: [a, a]}\n")
    said = soup(folder, "run", "out/plan.yaml", "-o", "out", "--force", code=1).stderr
    assert said == "Error: the output out holds out/plan.yaml, which is read\n"
    code = "from trainers import Add\n\n\nclass Mine(Add):\n    pass\n"
    (folder / "out" / "mine.py").write_text(code)
    (folder / "t.yaml").write_text(
        'soup: 1\nmodels: {a: a, b: b}\ntree: {of: [a, b], finetune: {trainer: "mine:Mine"}}\n'
    )
    path = os.pathsep.join([str(folder / "out"), str(Path(__file__).parent)])
    done = subprocess.run(
        [*SOUP, "run", "t.yaml", "-o", "out", "--force"], cwd=folder, capture_output=True,
        text=True, env={**os.environ, "PYTHONPATH": path}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("mine.py, which is read")) == (1, 1), done.stderr


def test_an_output_within_what_is_read_or_the_store_is_refused(folder: Path) -> None:
    """A folder within a model folder would be a part of the model the next time."""
    model_folders(folder)
    tree, _ = parse_tree("soup: 1\nmodels: {a: out/a}\ntree: {of: [a, a]}\n", folder=folder)
    store = folder / "store"
    for output in (folder / "out" / "a" / "new", store / "new"):
        with pytest.raises(modelsoup.OutputError, match=r"/new would lie in .*, which is read$"):
            modelsoup.run(tree, output, store=store)
    with pytest.raises(modelsoup.OutputError, match=r"would lie in .*, which is read"):
        modelsoup.merge([folder / "out" / "a"] * 2, folder / "out" / "a" / "new")


def test_an_output_that_a_trainer_writes_too_is_refused(folder: Path) -> None:
    text = BESIDE.replace("INNER", "x").replace("OTHER", "a")
    text = text.replace("note: edge", f"note: {folder / 'o.safetensors'}")
    tree, _ = parse_tree(text, folder=folder)
    with pytest.raises(modelsoup.OutputError, match="root writes, are in one place"):
        modelsoup.run(tree, folder / "o.safetensors", store=folder / "store")


def test_an_output_that_is_a_trees_only_leaf_is_success_the_second_time(folder: Path) -> None:
    for text in ("tree: a", "tree: {of: [a]}"):
        tree, _ = parse_tree(f"soup: 1\nmodels: {{a: a.safetensors}}\n{text}\n", folder=folder)
        output = folder / f"{len(text)}.safetensors"
        runs = [modelsoup.run(tree, output, store=folder / "store") for _ in range(2)]
        assert [report.was_there for report in runs] == [False, True]
    shutil.copy(folder / "b.safetensors", output)
    with pytest.raises(modelsoup.OutputError, match="exists"):
        modelsoup.run(tree, output, store=folder / "store")


def test_an_output_that_holds_the_file_that_a_model_folder_links_to_is_refused(
    folder: Path,
) -> None:
    out = model_folders(folder)
    (folder / "a").mkdir()
    (folder / "a" / "model.safetensors").symlink_to(out / "a" / "model.safetensors")
    tree, _ = parse_tree(FOLDERS.replace("out/a", "a"), folder=folder)
    said = r"the output .*/out holds .*/a/model\.safetensors, which is read$"
    with pytest.raises(modelsoup.OutputError, match=said):
        modelsoup.run(tree, out, store=folder / "store", force=True)


@pytest.mark.parametrize("output", [".", "..", "/", "../here"])
@pytest.mark.parametrize("command", ["run", "merge"])
def test_an_output_that_no_folder_can_replace_is_refused(
    folder: Path, command: str, output: str
) -> None:
    here = folder / "here"
    here.mkdir()
    for name in "ab":
        (folder / name).mkdir()
        shutil.copy(folder / f"{name}.safetensors", folder / name / "model.safetensors")
    (folder / "tree.yaml").write_text("soup: 1\nmodels: {a: a, b: b}\ntree: {of: [a, b]}\n")
    given = {"run": ["../tree.yaml", "--store", "../store"], "merge": ["../a", "../b"]}[command]
    said = soup(here, command, *given, "-o", output, code=1).stderr
    why = "is the current folder|has no name of its own|holds .*, which is read"
    assert re.fullmatch(rf"Error: the output {re.escape(output)} ({why}).*\n", said)
    assert not list(here.iterdir())


def test_an_output_that_already_is_the_result_is_success(folder: Path) -> None:
    (folder / "tree.yaml").write_text(TUNED)
    command = ("run", "tree.yaml", "-o", "out.safetensors")
    soup(folder, *command)
    before = (folder / "out.safetensors").stat()
    done = soup(folder, *command)
    assert done.stdout == ("out.safetensors was this result already: 0 nodes computed, 6 reused\n")
    after = (folder / "out.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert json.loads(soup(folder, *command, "--json").stdout)["was_there"] is True
    (folder / "tree.yaml").write_text(TUNED.replace("add: 1", "add: 2"))
    assert soup(folder, *command, code=1).stderr == (
        "Error: out.safetensors exists (--force replaces it)\n"
    )
    assert (folder / "out.safetensors").stat().st_ino == before.st_ino
    assert "4 nodes computed, 2 reused" in soup(folder, *command, "--force").stdout


@pytest.mark.parametrize(
    "change",
    [
        lambda out: (out / "config.json").write_text("{}"),
        lambda out: (out / "more.txt").write_text(""),
        lambda out: (out / "config.json").unlink(),
        lambda out: save_file(network(5), out / "model.safetensors", {"modelsoup": "{}"}),
    ],
)
def test_an_output_folder_is_the_result_only_if_all_of_it_is(folder: Path, change) -> None:
    for name in "ab":
        (folder / name).mkdir()
        shutil.move(folder / f"{name}.safetensors", folder / name / "model.safetensors")
        (folder / name / "config.json").write_text('{"kind": "test"}')
    tree, _ = parse_tree("soup: 1\nmodels: {a: a, b: b}\ntree: {of: [a, b]}\n", folder=folder)
    assert not modelsoup.run(tree, folder / "out", store=folder / "store").was_there
    assert modelsoup.run(tree, folder / "out", store=folder / "store").was_there
    change(folder / "out")
    with pytest.raises(modelsoup.OutputError, match="exists and is not empty"):
        modelsoup.run(tree, folder / "out", store=folder / "store")
    assert not modelsoup.run(tree, folder / "out", store=folder / "store", force=True).was_there
    assert modelsoup.run(tree, folder / "out", store=folder / "store").was_there


def test_an_output_that_appears_during_a_run_is_not_overwritten(folder: Path) -> None:
    tree, _ = parse_tree(TUNED, folder=folder)
    out = folder / "out.safetensors"

    def appears(event: modelsoup.Event) -> None:
        if (event.node, event.state) == ("root", "done"):
            out.write_bytes(b"somebody else's")

    with pytest.raises(modelsoup.OutputError, match=r"out\.safetensors exists"):
        modelsoup.run(tree, out, store=folder / "store", watch=appears)
    assert out.read_bytes() == b"somebody else's"
    assert not [path for path in folder.iterdir() if ".soup-" in path.name]


def test_what_is_being_exported_is_locked_against_the_clean_up_of_other_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = folder / "out.safetensors"
    exact, cleaned = os.fsync, []

    def cleans_up(descriptor: int) -> None:
        """What another run with the same output does first, at the latest moment."""
        if list(folder.glob(".out.safetensors.*.soup-partial")):
            cleaned.append(remove_stale(out))
        exact(descriptor)

    monkeypatch.setattr(os, "fsync", cleans_up)
    report = run(folder)
    assert len(report.computed) == 6
    assert cleaned and not any(cleaned)
    assert (
        out.read_bytes()
        == Store(folder / "store").find(report.records["root"]["key"]).path.read_bytes()
    )


# --- how many at the same time ---------------------------------------------------------------


class Watched(ThreadPoolExecutor):
    """Notes what it is given, and how many calls run at the same time."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.tasks: list[modelsoup.running.node.Task] = []
        self.now, self.most = 0, 0

    def submit(self, fn, task):
        self.tasks.append(task)
        self.now += 1
        self.most = max(self.most, self.now)
        future = super().submit(fn, task)
        future.add_done_callback(lambda _: setattr(self, "now", self.now - 1))
        return future


WIDE = """soup: 1
models: {a: a.safetensors, b: b.safetensors, c: c.safetensors}
tree: {of: [{of: [a, b]}, {of: [a, c]}, {of: [b, c]}, {of: [b, a]}, {of: [c, a]}]}
"""


def test_processes_share_the_cores_among_their_merges(folder: Path) -> None:
    for count in (1, 8):
        executor = Watched(1)
        executor.workers = count  # as a ProcessExecutor says it
        with executor:
            run(folder, WIDE, store_name=f"store-{count}", executor=executor)
        threads = {task.workers for task in executor.tasks}
        assert threads == {max(1, default_workers() // count)}
    assert ProcessExecutor(8).workers == 8


def test_workers_limits_any_executor(folder: Path) -> None:
    with Watched(5) as executor:
        run(folder, WIDE, executor=executor, workers=2)
    assert executor.most == 2
    with Watched(5) as executor:
        run(folder, WIDE, store_name="other", executor=executor)
    assert executor.most == 5


def test_two_numbers_of_processes_are_refused(folder: Path) -> None:
    (folder / "tree.yaml").write_text(TUNED)
    command = ("run", "tree.yaml", "--executor", "processes:3", "--workers")
    assert soup(folder, *command, "2", code=1).stderr == (
        "Error: processes:3 runs 3 nodes at the same time, --workers 2 another number: give one\n"
    )
    soup(folder, *command, "3")


# --- interruptions -----------------------------------------------------------------------------

SLOW = TUNED.replace("add: 1", "add: 1, steps: 4, pause: 0.1")


def slow_reference(folder: Path) -> bytes:
    bytes_ = run(folder, SLOW, "reference").output.read_bytes()
    shutil.rmtree(folder / "store")
    return bytes_


def killed_again_and_again(folder: Path, moments: int, seed: int) -> None:
    reference = slow_reference(folder)
    (folder / "tree.yaml").write_text(SLOW)
    chance = random.Random(seed)
    command = [*SOUP, "run", "tree.yaml", "-o", "out.safetensors", "--store", "store", "-q"]
    for _ in range(moments):
        process = subprocess.Popen([*command, "--workers", "2", "--force"], cwd=folder)
        try:
            process.wait(chance.uniform(0.1, 2.5))
            shutil.rmtree(folder / "store")  # it was quicker: start over
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if (folder / "out.safetensors").exists():
            assert (folder / "out.safetensors").read_bytes() == reference
            (folder / "out.safetensors").unlink()
    soup(folder, "run", "tree.yaml", "-o", "out.safetensors", "--store", "store", "-q")
    assert (folder / "out.safetensors").read_bytes() == reference
    assert not [p for p in folder.iterdir() if p.name.endswith(".soup-partial")]


def test_kill_9_at_random_moments_and_resume_gives_the_same_bytes(folder: Path) -> None:
    killed_again_and_again(folder, 6, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_9_at_a_hundred_moments(folder: Path) -> None:
    killed_again_and_again(folder, 100, seed=2)


def test_ctrl_c_ends_within_five_seconds_and_says_what_is_kept(folder: Path) -> None:
    (folder / "tree.yaml").write_text(SLOW.replace("pause: 0.1", "pause: 5"))
    process = subprocess.Popen(
        [*SOUP, "run", "tree.yaml", "-o", "out.safetensors", "--workers", "2"],
        cwd=folder, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    records = folder / ".soup-store" / "objects"
    deadline = time.monotonic() + 60
    while len(list(records.glob("*/record.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)  # both trainers are at work now
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - start < 5
    assert process.returncode == 130
    assert (
        "Interrupted. 2 finished results are kept in .soup-store; the same command goes on" in said
    )
    assert "Traceback" not in said
    assert not (folder / "out.safetensors").exists()


def test_a_trainer_goes_on_from_its_own_last_state(folder: Path) -> None:
    (folder / "tree.yaml").write_text(SLOW.replace("pause: 0.1", "pause: 0.7"))
    command = [*SOUP, "run", "tree.yaml", "-o", "out.safetensors", "--store", "store", "-q"]
    process = subprocess.Popen(command, cwd=folder)
    states = folder / "store" / "work"
    deadline = time.monotonic() + 60
    while not list(states.glob("*/state.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    (state,) = states.glob("*/state.safetensors")
    soup(folder, *command[3:])
    log = folder / "store" / "logs" / f"{state.parent.name}.log"
    assert "resumed at " in log.read_text()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="platform: /proc knows orphans")
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_command_left_behind_is_ended_by_the_next_run(folder: Path, sign) -> None:
    command = ["sh", "-c", "[ -e ready ] || sleep 60; cp $0 $1", "{start}", "{output}"]
    text = json.dumps(
        {
            "soup": 1, "models": {"a": "a.safetensors"},
            "tree": {"of": ["a"], "finetune": {"command": command}},
        }
    )  # fmt: skip
    (folder / "tree.yaml").write_text(text)
    arguments = [*SOUP, "run", "tree.yaml", "-o", "out.safetensors", "-q"]
    process = subprocess.Popen(arguments, cwd=folder)
    work = folder / ".soup-store" / "work"
    deadline = time.monotonic() + 30
    while not list(work.glob("*/frozen.txt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(sign)
    process.wait()
    (folder / "ready").touch()
    begin = time.monotonic()
    soup(folder, *arguments[3:])
    assert time.monotonic() - begin < 20


def test_a_command_may_leave_a_child_behind_that_holds_its_output_open(folder: Path) -> None:
    command = ["sh", "-c", "cp $0 $1; sleep 60 & exit 0", "{start}", "{output}"]
    text = json.dumps(
        {
            "soup": 1, "models": {"a": "a.safetensors"},
            "tree": {"of": ["a"], "finetune": {"command": command}},
        }
    )  # fmt: skip
    begin = time.monotonic()
    assert run(folder, text).computed == ("root",)
    assert time.monotonic() - begin < 20


def test_a_tree_that_keeps_its_root_only_leaves_other_trees_alone(folder: Path) -> None:
    twice = """soup: 1
models: {a: a.safetensors, b: b.safetensors, c: c.safetensors}
tree: {of: [{of: [a, b]}, {of: [{of: [a, b]}, c]}]}
"""
    assert len(run(folder, twice).computed) == 3  # what occurs twice is made once
    other = twice.replace("{of: [{of: [a, b]}, c]}", "c, c")
    run(folder, other, "other", keep="root")
    assert run(folder, twice).computed == ()
    store = Store(folder / "store")
    shared = run(folder, twice).records["root.1"]["key"]
    for key in (shared, run(folder, other, "other").records["root"]["key"]):
        store.drop(key)
    assert run(folder, other, "other", keep="root").computed == ("root.1", "root")
    assert store.has(shared)  # this run made it, and the first tree wants it too
    assert len(run(folder, twice, store_name="alone", keep="root").computed) == 3


def test_a_file_and_a_folder_with_the_same_weights_are_not_the_same(folder: Path) -> None:
    for name in "ab":
        (folder / f"F{name}").mkdir()
        shutil.copy(folder / f"{name}.safetensors", folder / f"F{name}" / "model.safetensors")
        (folder / f"F{name}" / "config.json").write_text("{}")
    text = "soup: 1\nmodels: {a: Fa, b: Fb}\ntree: {of: [a, b]}\n"
    tree, _ = parse_tree(text, folder=folder)
    out = modelsoup.run(tree, folder / "FF", store=folder / "store").output
    assert out.is_dir()
    files = text.replace("Fa", "a.safetensors").replace("Fb", "b.safetensors")
    assert run(folder, files).output.is_file()
    (folder / "Fa" / "config.json").write_text('{"v": 2}')
    tree, _ = parse_tree(text, folder=folder)
    out = modelsoup.run(tree, folder / "F2", store=folder / "store").output
    assert (out / "config.json").read_text() == '{"v": 2}'


def test_a_damaged_record_is_made_again(folder: Path) -> None:
    run(folder)
    store = Store(folder / "store")
    root = next(e for e in store.entries() if e.record["node"] == "root")
    elsewhere = '{"output": "../../../a.safetensors", "digest": "x"}'
    for content in ("", "[]", '{"output": "x"}', "\0", elsewhere):
        (store.folder_of(root.key) / "record.json").write_text(content)
        (folder / "tree.yaml").write_text(TUNED)
        assert "its record" in soup(folder, "store", "verify", "--store", "store", code=1).stderr
        assert run(folder).computed == ("root",)


def test_a_store_that_cannot_be_read_is_told_as_that(folder: Path) -> None:
    report = run(folder)
    record = Store(folder / "store").folder_of(report.records["root"]["key"]) / "record.json"
    record.unlink()
    record.mkdir()
    with pytest.raises(modelsoup.PlanError, match=r"cannot read .*record\.json: Is a directory$"):
        run(folder)


def test_a_disk_that_does_not_keep_what_is_written_is_told(folder: Path) -> None:
    store = Store(folder / "store")

    def damage(event: modelsoup.Event) -> None:
        if (event.node, event.state) == ("root.2-1.merge", "done"):
            (path,) = (e.path for e in store.entries() if e.record["node"] == event.node)
            path.write_bytes(path.read_bytes()[:-1] + b"?")

    with pytest.raises(modelsoup.StoreError, match="does not keep what is written: the result"):
        run(folder, watch=damage)


def test_a_leaf_that_changed_behind_its_time_is_found_once(folder: Path) -> None:
    run(folder)
    path = folder / "a.safetensors"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "root" in run(folder).computed


def test_reading_a_store_makes_none(folder: Path) -> None:
    (folder / "project").mkdir()
    said = soup(folder, "store", "list", "--store", "project", code=1).stderr
    assert said == "Error: there is no store at project\n"
    (folder / "tree.yaml").write_text(TUNED)
    soup(folder, "plan", "tree.yaml", "--store", "project")
    assert not list((folder / "project").iterdir())


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ("trainers:Exits", "failed: SystemExit: 2"),
        (":Add", "could not be imported: ValueError"),
        ("..x:Y", "could not be imported: TypeError"),
        ("trainers:Needy", "could not be imported: TypeError"),
        ("trainers:BadTensors", "tells the dtype 'float32' of w"),
        ("trainers:BadGroups", "cannot tell its groups: RuntimeError: no groups today"),
    ],
)
def test_a_strange_trainer_is_told_in_a_sentence(folder: Path, trainer: str, said: str) -> None:
    text = TUNED.replace("trainers:Add", trainer).replace(", add: 1", "")
    text = text.replace("{beta: 0.25}", "{layers: {low-level: merge}, low_level: 0.5}")
    with pytest.raises(modelsoup.SoupError, match=said):
        run(folder, text, executor=ProcessExecutor(2))


def test_two_runs_on_one_store_share_the_work(folder: Path) -> None:
    reference = slow_reference(folder)
    reports: list[modelsoup.RunReport] = []
    threads = [
        threading.Thread(
            target=lambda n=n: reports.append(
                run(folder, SLOW, f"out-{n}", executor=ProcessExecutor(2))
            )
        )
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [report.output.read_bytes() for report in reports] == [reference] * 2
    starts = [r["started"] for report in reports for r in report.records.values()]
    assert len(set(starts)) == 6  # each node was made once, by either


# --- the store ---------------------------------------------------------------------------------


def test_gc_keeps_what_the_trees_need(folder: Path) -> None:
    run(folder)
    other = TUNED.replace("add: 1", "add: 2")
    run(folder, other, "other")
    store = Store(folder / "store")
    assert len(list(store.entries())) == 6 + 4  # the lower merges are shared
    assert store.gc().keys == ()
    assert store.gc(older_than=1).keys == ()
    root = run(folder, other, "other").records["root"]["key"]
    os.utime(store.folder / "roots" / f"{root}.json", (0, 0))
    assert len(store.gc(older_than=1, dry_run=True).keys) == 4
    assert store.gc().keys == ()  # it was not forgotten yet
    assert (
        "4 results" in soup(folder, "store", "gc", "--older-than", "1", "--store", "store").stdout
    )
    assert len(store.pinned()) == 1
    assert run(folder).computed == ()
    assert len(store.gc(keep="roots").keys) == 5
    assert [entry.record["node"] for entry in store.entries()] == ["root"]
    with pytest.raises(modelsoup.StoreError, match="did you mean 'roots'"):
        store.gc(keep="root")


def test_a_key_is_locked_for_one_holder_and_let_go(folder: Path) -> None:
    store = Store(folder / "store")
    with store.lock("0" * 32) as held, Store(folder / "store").lock("0" * 32, wait=False) as other:
        assert (held, other) == (True, False)
    with store.lock("0" * 32, wait=False) as free:
        assert free


def test_digests_of_leaves_are_computed_again_when_the_file_changes(folder: Path) -> None:
    store = Store(folder / "store")
    path = folder / "a.safetensors"
    assert store.digest(path) is None
    first = store.digest_now(path)
    assert store.digest(path) == first
    save_file(network(5), path)
    os.utime(path, ns=(0, 0))
    assert store.digest(path) is None
    assert store.digest_now(path) != first


def test_a_leaf_that_changes_within_a_tick_of_the_clock_is_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = os.stat

    def in_seconds(path, **more) -> os.stat_result:
        """What a file system says whose clock ticks once a second."""
        found = exact(path, **more)
        times = {f"st_{of}time_ns": found.st_mtime_ns // 10**9 * 10**9 for of in "mc"}
        return os.stat_result(tuple(found), times)

    monkeypatch.setattr(os, "stat", in_seconds)
    store, path = Store(folder / "store"), folder / "a.safetensors"
    first = store.digest_now(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:  # the same file, as long as it was, and at once
        file.write(content)
    assert store.digest_now(path) != first


def test_a_read_only_store_is_told(folder: Path) -> None:
    (folder / "file").write_bytes(b"")
    with pytest.raises(modelsoup.StoreError, match=r"cannot write to the store .*file/store"):
        Store(folder / "file" / "store")


def test_a_full_disk_under_the_store_is_told_and_leaves_no_half_result(folder: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("platform: mounting a small disk needs unshare")
    for name in "abcd":
        save_file({"w": np.ones(200_000, np.float32)}, folder / f"{name}.safetensors")
    text = "soup: 1\nmodels: {a: a.safetensors, b: b.safetensors, c: c.safetensors}\n"
    (folder / "tree.yaml").write_text(text + "tree: {of: [{of: [a, b]}, c]}\n")
    (folder / "store").mkdir()
    unshare = ["unshare", "-m"] if os.getuid() == 0 else ["unshare", "-m", "-U", "-r"]
    mount = "mount -t tmpfs -o size=1m tmpfs store"
    if subprocess.run([*unshare, "sh", "-c", mount], cwd=folder, check=False).returncode:
        pytest.skip("platform: mounting is not allowed here")
    command = [*SOUP, "run", "tree.yaml", "--store", "store", "-q"]
    done = subprocess.run(
        [*unshare, "sh", "-c", f'{mount} && "$@"; code=$?; ls store/objects/*; exit $code', "-",
         *command],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "kB free" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout.count("record.json") == 1  # the first merge fitted, and is whole
    assert not (folder / "soup.safetensors").exists()


def test_a_store_that_may_not_be_written_to_is_told(folder: Path) -> None:
    (folder / "tree.yaml").write_text(TUNED)
    if os.getuid() == 0:
        pytest.skip("platform: root may write everywhere")
    (folder / "store").mkdir(mode=0o555)
    said = soup(folder, "run", "tree.yaml", "--store", "store", code=1).stderr
    assert said.startswith("Error: cannot write to the store store: Permission denied")


# --- the commands ------------------------------------------------------------------------------


def test_the_commands_work_on_a_tree(folder: Path) -> None:
    (folder / "tree.yaml").write_text(TUNED)
    planned = soup(folder, "plan", "tree.yaml").stdout
    assert "7 models in 3 levels; 6 steps to do" in planned
    assert not (folder / ".soup-store").exists()
    soup(folder, "run", "tree.yaml", "--workers", "2")
    assert "0 steps to do" in soup(folder, "plan", "tree.yaml").stdout
    assert "0 nodes computed, 6 reused" in soup(folder, "run", "tree.yaml", "--force").stdout
    report = json.loads(soup(folder, "run", "tree.yaml", "--force", "--json").stdout)
    assert report["computed"] == []
    lines = soup(folder, "store", "list").stdout
    assert lines.count("finetune") == 3
    key = lines.splitlines()[1].split()[0]
    assert json.loads(soup(folder, "store", "show", key).stdout)["operation"] == "merge"
    assert soup(folder, "store", "verify").stdout == "6 results are intact\n"
    assert soup(folder, "store", "gc").stdout.startswith("0 results")
    assert (
        "finetune trainers:Add" in soup(folder, "inspect", "--lineage", "soup.safetensors").stdout
    )
    (folder / "made.yaml").write_text(soup(folder, "plan", "--from", "soup.safetensors").stdout)
    soup(folder, "run", "made.yaml", "-o", "again.safetensors")
    assert (folder / "again.safetensors").read_bytes() == (folder / "soup.safetensors").read_bytes()
    soup(folder, "verify", "soup.safetensors")


TALKS = """soup: 1
models: {a: a.safetensors}
tree: {of: [a], finetune: {trainer: "trainers:Talks", add: 6}}
"""


def test_on_a_terminal_the_time_left_is_seen_whatever_else_is_reported(folder: Path) -> None:
    (folder / "tree.yaml").write_text(TALKS)
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [*SOUP, "run", "tree.yaml"], cwd=folder, stdout=subprocess.DEVNULL, stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # that is how a terminal ends
        while part := os.read(ours, 1 << 16):
            shown += part
    os.close(ours)
    assert process.wait() == 0
    lines = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode().splitlines()
    told = [line for line in lines if "running" in line and "left" in line]
    assert told and all(re.search(r"▶ running  \d+% 3:[12]\d left ", line) for line in told)
    assert all(len(line) <= 120 for line in lines)


def test_the_time_left_is_no_metric(folder: Path) -> None:
    events = []
    report = run(folder, TALKS, watch=events.append)
    assert set(report.records["root"]["metrics"]) == {
        f"cycle_consistency_loss_{number}" for number in range(12)
    }
    running = [event for event in events if event.state == "running" and event.seconds_left]
    assert running and all(194 < event.seconds_left <= 200 for event in running)
    assert not any("seconds_left" in event.metrics for event in events)


def test_what_runs_is_told_again_each_minute(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [1000.0]
    monkeypatch.setattr(show_tree.time, "monotonic", lambda: now[0])
    with show_tree.watching() as view:
        for seconds in (0, 20, 40, 61, 100, 122):
            now[0] = 1000.0 + seconds
            view(modelsoup.Event("root", "running", seconds / 200, {"loss": 0.5}, "", 90.0))
        view(modelsoup.Event("root", "done", 1.0, {"loss": 0.25}))
    assert capsys.readouterr().err == (
        "    0.0 s  running  root  0% 1:30 left loss 0.5\n"
        "   61.0 s  running  root  30% 1:30 left loss 0.5\n"
        "  122.0 s  running  root  61% 1:30 left loss 0.5\n"
        "  122.0 s  done     root  loss 0.25\n"
    )


def test_a_node_that_reports_nothing_is_told_again_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelsoup.running.runner, "HEARTBEAT", 0.5)
    text = TALKS.replace("Talks", "Sees").replace("add: 6", "note: gate").replace(
        "gate", str(folder / "gate")
    )  # fmt: skip
    told = []

    def watch(event: modelsoup.Event) -> None:
        told.append(event)
        if told.count(modelsoup.Event("root", "running")) == 3:
            (folder / "gate").touch()

    assert run(folder, text, watch=watch).computed == ("root",)
    assert told.count(modelsoup.Event("root", "running")) == 3


def test_a_merge_tells_how_far_it_is(folder: Path, own_methods) -> None:
    @modelsoup.method("naps")
    def naps(x):
        def napping(b):
            time.sleep(0.05)
            return b.model(0)

        return napping

    for name in "ab":
        save_file({"w": np.ones(4_000_000, np.float32)}, folder / f"{name}.safetensors")
    text = "soup: 1\nmodels: {a: a.safetensors, b: b.safetensors}\n"
    events = []
    run(folder, f"{text}tree: {{of: [a, b], merge: {{method: naps}}}}\n", watch=events.append)
    shares = [event.done for event in events if event.state == "running" and event.done]
    assert shares and shares == sorted(shares) and 0 < shares[0] < 1


def test_a_list_of_results_says_what_made_them_when_and_for_which_plan(folder: Path) -> None:
    text = TUNED.replace("{beta: 0.25}", "{method: slerp, t: 0.25, dtype: bf16}")
    (folder / "slerp.yaml").write_text(text)
    (folder / "also.yaml").write_text(text.replace("add: 1", "add: 2, note: some words"))
    for name in ("slerp", "also"):
        soup(folder, "run", f"{name}.yaml", "-o", f"{name}.safetensors", "-q")
    head, *rows, total = soup(folder, "store", "list").stdout.splitlines()
    assert head.split()[:5] == ["key", "plan", "node", "operation", "date"]
    assert len(rows) == 10
    today = time.strftime("%Y-%m-%d ")
    assert all(today in row for row in rows)
    (merged,) = (row for row in rows if " root.2-1.merge " in row)
    assert "merge slerp t=0.25 dtype=BF16 " in merged
    assert set(re.findall(r"\w+\.yaml", merged)) == {"also.yaml", "slerp.yaml"}
    words = "finetune trainers:Add add=2 note=some words"
    assert sum(words in row and "also.yaml" in row for row in rows) == 3
    removed = soup(folder, "store", "gc", "--keep", "none", "--dry-run").stdout
    assert re.fullmatch(r"10 results, \d\d\.\d kB", total)
    assert re.fullmatch(r"10 results, \d\d\.\d kB would be removed\n", removed)


def test_options_that_came_later_and_do_not_count_are_told(folder: Path) -> None:
    text = "soup: 1\nmodels: {a: a.safetensors}\ntree: {of: [a], finetune: {trainer: 'trainers:L"
    (folder / "tree.yaml").write_text(f"{text}ooks', add: 1, note: fid}}}}\n")
    command = ("run", "tree.yaml", "-o", "out.safetensors")
    assert "kept, which" not in soup(folder, *command).stderr
    (folder / "tree.yaml").write_text(f"{text}ooks', add: 1, note: kid}}}}\n")
    said = (
        "warning: root: its result is kept, which these options do not change: note is 'kid', and "
        "was 'fid'; what they ask for is not done again\n"
    )
    done = soup(folder, *command)
    assert said in done.stderr and "0 nodes computed" in done.stdout
    assert said in soup(folder, "plan", "tree.yaml").stderr
    (folder / "tree.yaml").write_text(f"{text}ooks', add: 2, note: kid}}}}\n")
    assert "kept, which" not in soup(folder, "plan", "tree.yaml").stderr
    # Nor of what nothing needs, because what was made of it is there.
    inner = "{of: [a], finetune: {trainer: 'trainers:Looks', add: 1, note: NOTE}}"
    text = f"soup: 1\nmodels: {{a: a.safetensors}}\ntree: {{of: [{inner}, a]}}\n"
    for note in ("fid", "kid"):
        (folder / "tree.yaml").write_text(text.replace("NOTE", note))
        assert "kept, which" not in soup(folder, *command, "--force").stderr


def test_a_run_tells_the_warnings_of_its_plan(folder: Path) -> None:
    save_file({n: v for n, v in network(0).items() if n != "G.low.w"}, folder / "b.safetensors")
    text = """soup: 1
models: {a: a.safetensors, b: b.safetensors}
tree: {of: [a, b], merge: {layers: {"G.low.w": first, "*": merge}}}
"""
    (folder / "tree.yaml").write_text(text)
    told = re.findall("^(?:warning|note): .*", soup(folder, "plan", "tree.yaml").stderr, re.M)
    assert told == re.findall(
        "^(?:warning|note): .*", soup(folder, "run", "tree.yaml").stderr, re.M
    )
    assert "warning" not in soup(folder, "run", "tree.yaml", "-q").stderr


def test_pictures_of_a_plan(folder: Path) -> None:
    from xml.etree import ElementTree

    (folder / "tree.yaml").write_text(TUNED)
    soup(folder, "plan", "tree.yaml", "--svg", "tree.svg")
    root = ElementTree.parse(folder / "tree.svg").getroot()
    boxes = root.findall("{http://www.w3.org/2000/svg}g")
    assert len(boxes) == 7
    dot = soup(folder, "plan", "tree.yaml", "--dot").stdout
    assert dot.count("->") == 9
    assert '"root.merge" -> "root";' in dot
    assert soup(folder, "plan", "tree.yaml", "--mermaid").stdout.count("-->") == 9
    schema = json.loads(soup(folder, "plan", "--schema").stdout)
    assert schema["title"] == "modelsoup plan"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan", "no.yaml"), "no.yaml does not exist"),
        (("run", "tree.yaml", "--executor", "locl"), "did you mean 'local'"),
        (("run", "tree.yaml", "--executor", "processes:x"), "needs a number of processes"),
        (("run", "tree.yaml", "--keep", "rot"), "did you mean 'root'"),
        (("run", "tree.yaml", "-o", "no/out.safetensors"), "does not exist"),
        (("store", "list"), "there is no store at .soup-store"),
        (("plan", "--from", "a.safetensors"), "holds no lineage"),
    ],
)
def test_a_mistake_is_one_sentence(folder: Path, arguments: tuple[str, ...], said: str) -> None:
    (folder / "tree.yaml").write_text(TUNED)
    stderr = soup(folder, *arguments, code=1).stderr
    assert said in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_a_plan_with_problems_shows_them_and_ends_with_1(folder: Path) -> None:
    (folder / "a.safetensors").unlink()
    (folder / "tree.yaml").write_text(TUNED)
    assert "tree.yaml:2:10: a: " in soup(folder, "plan", "tree.yaml", code=1).stderr
    said = soup(folder, "plan", "tre.yaml", code=1).stderr
    assert "tre.yaml does not exist; did you mean 'tree.yaml'" in said


def _omp() -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with ProcessExecutor(max(2, os.cpu_count() or 2)) as executor:
        assert executor.submit(_omp).result() == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with ProcessExecutor(1) as executor:
        assert executor.submit(_omp).result() == "5"


def test_a_program_that_is_not_here_is_a_warning_of_the_plan(folder: Path) -> None:
    commands = ("no-such-program", "{python}", str(Path(sys.executable)))
    for command, wanted in zip(commands, (1, 0, 0), strict=True):
        text = TUNED.replace(
            '{trainer: "trainers:Add", add: 1}', f"{{command: ['{command}', '{{output}}']}}"
        )
        warnings = check(parse_tree(text, folder=folder)[0]).warnings
        assert len(warnings) == wanted
        for warning in warnings:
            assert warning.startswith("root.2-1 (and root.2-2, root): the program 'no-such-p")


def test_what_is_wrong_with_many_nodes_is_told_once(folder: Path) -> None:
    text = TUNED.replace("a: a.safetensors", "a: lost.safetensors")
    text = text.replace("b: b.safetensors", "b: lost.safetensors")
    (problem,) = check(parse_tree(text, folder=folder)[0]).problems
    assert problem.startswith("the plan:2:10: a (and b): ")
    assert "lost.safetensors does not exist" in problem


BESIDE = """soup: 1
models:
  a: a.safetensors
  b: b.safetensors
  inner: {of: [a, b], finetune: {trainer: "trainers:Beside", note: INNER}}
tree: {of: [inner, OTHER, b], finetune: {trainer: "trainers:Beside", note: edge}}
"""


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        ("edge", "root: it would write edge, and inner the same"),
        ("edge/in/it", "root: it would write edge, and inner .*/edge/in/it: the later"),
        ("x/..", "root: it would write edge, and inner "),
        ("edges", None),
    ],
)
def test_two_nodes_that_would_write_to_one_place_are_a_problem(
    folder: Path, inner: str, said: str | None
) -> None:
    tree, _ = parse_tree(BESIDE.replace("INNER", inner).replace("OTHER", "a"), folder=folder)
    problems = check(tree).problems
    if said is None:
        assert problems == ()
    else:
        assert re.search(said, problems[-1])


def test_what_a_trainer_cannot_write_is_a_problem_beside_others(folder: Path) -> None:
    text = BESIDE.replace("INNER", "y" * 300).replace("OTHER", "a").replace("b: b.", "b: nothing.")
    problems = check(parse_tree(text, folder=folder)[0]).problems
    assert any(re.search(r"inner: cannot write y{300}: File name too long", p) for p in problems)
    assert any("nothing.safetensors does not exist" in problem for problem in problems)


@pytest.mark.parametrize("where", [".", "link"])
def test_what_a_plan_reads_is_not_written_over(folder: Path, where: str) -> None:
    (folder / "link").symlink_to(folder)
    (folder / "edge").mkdir()
    (folder / "a.safetensors").rename(folder / "edge" / "a.safetensors")
    text = BESIDE.replace("a: a.saf", "a: edge/a.saf").replace("OTHER", "a").replace("INNER", "x")
    text = text.replace("note: edge", f"note: {folder / where / 'edge'}")
    (problem,) = check(parse_tree(text, folder=folder)[0]).problems
    assert re.search("root: it would write .*edge in the place of .*edge/a.safetensors", problem)


def test_what_a_plan_reads_through_a_bind_mount_is_not_written_over(folder: Path) -> None:
    (folder / "out" / "a").mkdir(parents=True)
    (folder / "a.safetensors").rename(folder / "out" / "a" / "a.safetensors")
    text = BESIDE.replace("a: a.saf", "a: mounted/a.saf").replace("OTHER", "a")
    (folder / "tree.yaml").write_text(text.replace("INNER", "x").replace("note: edge", "note: out"))
    code, said = soup_where_mounted(folder, "plan", "tree.yaml")
    assert code == 1
    assert "it would write out in the place of mounted/a.safetensors, which is read" in said


def test_a_node_that_is_used_twice_writes_its_place_once(folder: Path) -> None:
    text = BESIDE.replace("INNER", "inside")
    for other in ("inner", "{of: [inner, a]}"):
        assert check(parse_tree(text.replace("OTHER", other), folder=folder)[0]).problems == ()
    tuned = '{of: [b, a], finetune: {trainer: "trainers:Beside", note: inside}}'
    (problem,) = check(parse_tree(text.replace("OTHER", tuned), folder=folder)[0]).problems
    assert "root.2: it would write inside, and inner the same" in problem


@pytest.mark.parametrize(
    "deep",
    [
        "{of: [{of: [a, b], TUNED}, a]}",
        "{of: [{of: [a, b], TUNED, name: stage}, a]}",
        "{pair: [a, b, c], odd: b, TUNED}",
    ],
)
def test_a_subtree_that_is_used_twice_is_trained_once(folder: Path, deep: str) -> None:
    deep = deep.replace("TUNED", 'finetune: {trainer: "trainers:Add", steps: 2}')
    text = f"""soup: 1
models: {{a: a.safetensors, b: b.safetensors, c: c.safetensors, deep: {deep}}}
tree: {{of: [deep, {{of: [b, deep]}}]}}
"""
    tree, _ = parse_tree(text, folder=folder)
    tuned = [name for name, made in tree.operations() if isinstance(made, FineTune)]
    report = run(folder, text)
    assert report.records["deep#2"]["key"] == report.records["deep"]["key"]
    assert 2 * len(set(tuned) & set(report.computed)) == len(tuned) > 0


def test_a_number_in_a_models_own_name_makes_it_another_model(folder: Path) -> None:
    leaf = '{train: {trainer: "trainers:Add"}}'
    text = f"""soup: 1
models: {{"run": {leaf}, "run#2": {leaf}, "run#3.1": {leaf}}}
tree: {{of: [run, {{of: ["run#2", "run#3.1"]}}, {{of: [run, "run#2"]}}]}}
"""
    tree, _ = parse_tree(text, folder=folder)
    seeds = {
        name: node_seed(tree, name) for name, made in tree.operations() if isinstance(made, Train)
    }
    assert seeds["run#3"] == seeds["run"] and seeds["run#2#2"] == seeds["run#2"]
    assert len(seeds) == 5 and len(set(seeds.values())) == 3


def test_a_library_tree_runs_as_a_written_one(folder: Path) -> None:
    tree = binary_tree(
        {n: folder / f"{n}.safetensors" for n in "abcd"}, merge=Merge(Recipe(beta=0.25)),
        finetune=FineTune(Training("trainers:Add", {"add": 1})),
    )  # fmt: skip
    report = modelsoup.run(tree, folder / "library.safetensors", store=folder / "store")
    assert run(folder).computed == ()
    assert report.output.read_bytes() == (folder / "out.safetensors").read_bytes()


def test_a_plan_over_64_leaves_of_10000_tensors_is_quick(tmp_path: Path) -> None:
    tensors = {f"layer.{n}.w": np.zeros(1, np.float32) for n in range(10_000)}
    save_file(tensors, tmp_path / "0.safetensors")
    for n in range(1, 64):
        shutil.copy(tmp_path / "0.safetensors", tmp_path / f"{n}.safetensors")
    tree = binary_tree([tmp_path / f"{n}.safetensors" for n in range(64)])
    start = time.monotonic()
    assert check(tree).problems == ()
    assert time.monotonic() - start < 4  # 0.5 s on a machine that does nothing else
