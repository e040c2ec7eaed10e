"""The store: what counts as the same result, what a damage or a kill leaves, what is durable."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from trainers import Add, network

import modelsoup
from modelsoup import (
    FineTune,
    Load,
    Merge,
    ProcessExecutor,
    Recipe,
    Store,
    Train,
    Training,
    check,
    parse_tree,
)
from modelsoup.merging.rules import Rule
from modelsoup.trees.keys import node_key
from modelsoup.trees.operations import Builder, Tree

SOUP = [sys.executable, "-m", "modelsoup"]
TESTS = str(Path(__file__).parent)
TUNED = """soup: 1
models: {a: a.safetensors, b: b.safetensors, c: c.safetensors, d: d.safetensors}
defaults: {merge: {beta: 0.25}, finetune: {trainer: "trainers:Add", add: 1}}
tree: {pair: [a, b, c, d]}
"""
MERGED = """soup: 1
models: {a: a.safetensors, b: b.safetensors, c: c.safetensors}
tree: {of: [{of: [a, b]}, c]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)
    for number, name in enumerate("abcd"):
        save_file(network(number), tmp_path / f"{name}.safetensors")
    return tmp_path


def run(folder: Path, text: str = TUNED, name: str = "out.safetensors", **more: Any) -> Any:
    tree, _ = parse_tree(text, folder=folder)
    given = {"store": folder / "store", "force": True, **more}
    return modelsoup.run(tree, folder / name, **given)


def soup(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*SOUP, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def wait_for(what: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return found


def of_node(store: Store, node: str) -> modelsoup.trees.store.Entry:
    (found,) = (entry for entry in store.entries() if entry.record["node"] == node)
    return found


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"xyz")


# --- what is damaged ---------------------------------------------------------------------------


def test_a_damaged_result_that_nothing_needs_any_more_is_made_again(folder: Path) -> None:
    (folder / "tree.yaml").write_text(TUNED)
    command = ["run", "tree.yaml", "-o", "out.safetensors", "--store", "store"]
    soup(folder, *command)
    store = Store(folder / "store")
    merged = of_node(store, "root.2-1.merge")
    made = merged.path.read_bytes()
    damage(merged.path)
    said = soup(folder, "store", "verify", "--store", "store", code=1).stderr
    assert f"1 result is damaged: root.2-1.merge ({merged.key})" in said
    done = soup(folder, *command)
    assert "waiting  root.2-1.merge  its result was damaged: it is made again" in done.stderr
    assert "kept     root.2-1.merge" not in done.stderr
    assert done.stdout.endswith("1 node computed, 5 reused\n")
    assert merged.path.read_bytes() == made
    assert soup(folder, "store", "verify", "--store", "store").stdout == "6 results are intact\n"


def test_a_record_that_cannot_be_read_is_made_again_though_nothing_needs_it(folder: Path) -> None:
    run(folder)
    store = Store(folder / "store")
    key = of_node(store, "root.2-1").key
    (store.folder_of(key) / "record.json").write_text("{")
    assert run(folder).computed == ("root.2-1",)
    assert store.damaged_records() == []


def test_damage_that_no_time_of_a_file_shows_is_made_again_once_verify_has_seen_it(
    folder: Path,
) -> None:
    run(folder)
    store = Store(folder / "store")
    entry = of_node(store, "root.merge")
    damage(entry.path)
    record = json.loads((store.folder_of(entry.key) / "record.json").read_text())
    file = entry.path.stat()
    record["state"] = [
        [entry.path.name, file.st_size, file.st_mtime_ns, file.st_ctime_ns, file.st_ino]
    ]
    (store.folder_of(entry.key) / "record.json").write_text(json.dumps(record))
    assert run(folder).computed == ()  # as a disk that loses bits would have it
    assert not store.intact(entry.key)
    assert run(folder).computed == ("root.merge",)
    assert store.intact(entry.key)


def test_a_store_that_was_copied_is_as_good(folder: Path) -> None:
    run(folder)
    shutil.copytree(folder / "store", folder / "copy")
    assert run(folder, store=folder / "copy").computed == ()


def test_keep_root_removes_what_is_damaged_and_makes_it_no_more(folder: Path) -> None:
    run(folder)
    store = Store(folder / "store")
    damage(of_node(store, "root.2-1").path)
    assert run(folder, keep="root").computed == ()
    assert "root.2-1" not in {entry.record["node"] for entry in store.entries()}


# --- two runs on one store ---------------------------------------------------------------------


def test_a_node_is_counted_by_the_run_that_made_it_and_waited_for_by_the_other(
    folder: Path,
) -> None:
    text = TUNED.replace("add: 1", "add: 1, steps: 12, pause: 0.1")
    reports, events = {}, {}

    def go(number: int) -> None:
        events[number] = []
        reports[number] = run(
            folder, text, f"out-{number}.safetensors", executor=ProcessExecutor(1),
            watch=events[number].append,
        )  # fmt: skip

    threads = [threading.Thread(target=go, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    computed = [node for report in reports.values() for node in report.computed]
    assert sorted(computed) == sorted(reports[0].records)  # each of the six once
    for number, others in ((0, reports[1].computed), (1, reports[0].computed)):
        waited = {e.node for e in events[number] if e.message == "another run is at it"}
        assert waited <= set(others)
        assert not {e.node for e in events[number] if e.state == "running"} - set(
            reports[number].computed
        )
        assert {e.node for e in events[number] if e.message == "another run made it"} <= set(others)
    assert any(e.message == "another run is at it" for e in [*events[0], *events[1]])
    assert all(
        e.state == "waiting" for e in [*events[0], *events[1]]
        if e.message == "another run is at it"
    )  # fmt: skip


def test_a_waiting_node_takes_a_result_though_its_lock_is_still_held(folder: Path) -> None:
    """As by something that the one who made it left behind."""
    key = run(folder).records["root"]["key"]
    store = Store(folder / "store")
    shutil.move(store.folder_of(key), folder / "aside")
    reports = []
    with store.lock(key) as held:
        assert held
        thread = threading.Thread(target=lambda: reports.append(run(folder)))
        thread.start()
        time.sleep(1)
        assert thread.is_alive()
        shutil.move(folder / "aside", store.folder_of(key))
        thread.join(10)
        assert not thread.is_alive()
    assert reports[0].computed == ()


def test_gc_leaves_alone_what_is_worked_on(folder: Path) -> None:
    run(folder)
    store = Store(folder / "store")
    key = of_node(store, "root.2-1").key
    store.work(key).mkdir()
    (store.work(key) / "state").write_bytes(b"12345")
    with store.lock(key):
        cleaned = store.gc(keep="none")
        assert key not in cleaned.keys and len(cleaned.keys) == 5
        assert store.intact(key)
        assert (store.work(key) / "state").read_bytes() == b"12345"
    assert store.gc(keep="none").keys == (key,)
    assert not store.work(key).exists()


# --- what kills leave --------------------------------------------------------------------------


def test_what_kills_left_half_written_is_removed_and_what_is_being_written_is_not(
    folder: Path,
) -> None:
    run(folder)
    store = Store(folder / "store")
    key = of_node(store, "root").key
    (store.folder_of(key) / "record.json").unlink()
    strays = [
        store.folder_of(key) / ".record.json.0a1b2c3d",
        *(store.folder / f / ".x.json.89abcdef" for f in ("digests", "roots", "logs")),
    ]
    in_use = store.folder / "digests" / ".y.json.01234567"
    for path in (*strays, in_use):
        path.write_bytes(b"{")
    import fcntl

    with in_use.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        run(folder)
        assert not [path for path in strays if path.exists()]
        assert in_use.exists()
    store.gc()
    assert not in_use.exists()


def test_gc_removes_all_that_there_is_of_a_result(folder: Path) -> None:
    run(folder, executor=ProcessExecutor(1))
    store = Store(folder / "store")
    assert len(list((store.folder / "logs").glob("*.log"))) == 6
    store.work("f" * 32).mkdir()  # of a training that was given up
    assert len(store.gc(keep="none").keys) == 7
    for name in ("objects", "work", "logs"):
        assert not list((store.folder / name).iterdir())


def test_a_result_is_found_by_the_beginning_of_its_key_if_only_one_has_it(folder: Path) -> None:
    run(folder)
    store = Store(folder / "store")
    keys = [entry.key for entry in store.entries()]
    assert [store.find(key[:20]).key for key in keys] == keys
    with pytest.raises(modelsoup.StoreError, match="6 results begin with ''"):
        store.find("")
    with pytest.raises(modelsoup.StoreError, match=f"no result begins with '{keys[2][:-1]}z'; did"):
        store.find(f"{keys[2][:-1]}z")


def test_a_leaf_that_changes_while_it_is_digested_is_told_and_not_noted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, path = Store(folder / "store"), folder / "a.safetensors"
    exact = os.preadv

    def meanwhile(descriptor: int, buffers: Any, offset: int) -> int:
        done = exact(descriptor, buffers, offset)
        monkeypatch.setattr(os, "preadv", exact)
        damage(path)
        return done

    store.digest_now(folder / "b.safetensors")
    monkeypatch.setattr(os, "preadv", meanwhile)
    with pytest.raises(modelsoup.CheckpointError, match=r"a\.safetensors changed while it"):
        store.digest_now(path)
    assert store.digest(path) is None


def test_a_digest_that_is_wrong_though_no_time_shows_it_is_found_and_run_again_helps(
    folder: Path,
) -> None:
    run(folder, MERGED, executor=None)
    store = Store(folder / "store")
    for note in (store.folder / "digests").iterdir():
        content = json.loads(note.read_text())
        if content["path"].endswith("b.safetensors"):
            note.write_text(json.dumps({**content, "digest": "0" * 32}))
    with pytest.raises(modelsoup.RunError, match=r"b\.safetensors changed while .*: run again"):
        run(folder, MERGED)
    assert run(folder, MERGED).computed == ()


def test_a_link_that_leads_elsewhere_is_another_leaf(folder: Path) -> None:
    link = folder / "link.safetensors"
    link.symlink_to("a.safetensors")
    text = MERGED.replace("a: a.saf", "a: link.saf")
    assert len(run(folder, text).computed) == 2
    link.unlink()
    link.symlink_to("d.safetensors")
    assert len(run(folder, text).computed) == 2
    assert len(run(folder, MERGED.replace("a: a.saf", "a: d.saf")).computed) == 0


def test_gc_forgets_the_digests_of_files_that_are_gone(folder: Path) -> None:
    run(folder, MERGED)
    store = Store(folder / "store")
    assert len(list((store.folder / "digests").iterdir())) == 3
    (folder / "c.safetensors").unlink()
    store.gc()
    assert len(list((store.folder / "digests").iterdir())) == 2


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b"{}", b'{"path": 3}', b'{"path": "a\\u0000"}'])
def test_gc_removes_notes_of_digests_that_nobody_can_read(folder: Path, note: bytes) -> None:
    run(folder, MERGED)
    store = Store(folder / "store")
    (store.folder / "digests" / "odd.json").write_bytes(note)
    store.gc()
    assert len(list((store.folder / "digests").iterdir())) == 3


# --- what is on the disk when ------------------------------------------------------------------


class Disk:
    """The order of `fsync`, `replace` and `rename`; files are known by their inodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, look: Callable[[], None]) -> None:
        self.done: list[tuple[str, int, str]] = []
        exact = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}

        def fsync(descriptor: int) -> None:
            exact["fsync"](descriptor)
            self.done.append(("fsync", os.fstat(descriptor).st_ino, ""))
            look()

        def moves(name: str) -> Callable[..., None]:
            def call(source: Any, target: Any, **more: Any) -> None:
                inode = os.stat(source).st_ino
                exact[name](source, target, **more)
                self.done.append(("move", inode, str(target)))
                look()

            return call

        monkeypatch.setattr(os, "fsync", fsync)
        for name in ("replace", "rename"):
            monkeypatch.setattr(os, name, moves(name))

    def place(self, target: Path) -> int:
        """When something got its name."""
        (found,) = (n for n, (what, _, to) in enumerate(self.done) if to == str(target))
        return found

    def flushed(self, path: Path) -> list[int]:
        """When a file or folder was flushed."""
        inode = path.stat().st_ino
        return [
            n for n, (what, which, _) in enumerate(self.done) if (what, which) == ("fsync", inode)
        ]


def test_records_have_their_names_once_they_and_their_checkpoints_are_on_the_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(folder / "store")
    seen = []

    def look() -> None:
        """At every moment, what has a record is whole."""
        for record in (store.folder / "objects").glob("*/record.json"):
            assert store.entry(record.parent.name).path.exists()
            seen.append(record)

    disk = Disk(monkeypatch, look)
    report = run(folder)
    assert len(set(seen)) == 6
    for entry in store.entries():
        record = store.folder_of(entry.key) / "record.json"
        named = disk.place(entry.path.absolute())
        assert min(disk.flushed(entry.path)) < named
        assert named < min(disk.flushed(record))
        assert max(disk.flushed(record)) < disk.place(record.absolute())
        assert any(named < n < min(disk.flushed(record)) for n in disk.flushed(entry.path.parent))
    out = disk.place(report.output)
    assert min(disk.flushed(report.output)) < out < max(disk.flushed(folder))


def test_an_exported_folder_is_on_the_disk_with_all_that_is_in_it_before_it_has_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (folder / name / "deep").mkdir(parents=True)
        shutil.move(folder / f"{name}.safetensors", folder / name / "model.safetensors")
        (folder / name / "deep" / "tokenizer.json").write_text("{}")
    text = "soup: 1\nmodels: {a: a, b: b}\ntree: {of: [a, b]}\n"
    run(folder, text, "out")
    shutil.rmtree(folder / "out")
    disk = Disk(monkeypatch, lambda: None)
    report = run(folder, text, "out")
    named = disk.place(report.output)
    for path in (report.output, *report.output.rglob("*")):
        assert min(disk.flushed(path)) < named, path
    assert max(disk.flushed(folder)) > named


# --- what is hashed ----------------------------------------------------------------------------


def test_what_goes_along_with_a_model_folder_is_read_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (folder / name).mkdir()
        shutil.move(folder / f"{name}.safetensors", folder / name / "model.safetensors")
        (folder / name / "tokenizer.json").write_text("{}" * 1000)
    (folder / "tree.yaml").write_text("soup: 1\nmodels: {a: a, b: b}\ntree: {of: [a, b]}\n")
    tree, _ = modelsoup.read_tree(folder / "tree.yaml")
    opened = []
    exact = os.open

    def watched(path: Any, *arguments: Any, **more: Any) -> int:
        opened.append(str(path))
        return exact(path, *arguments, **more)

    monkeypatch.setattr(os, "open", watched)
    assert check(tree).nodes["root"].key is None  # headers only
    assert not [path for path in opened if path.endswith("tokenizer.json")]
    store = folder / "store"
    modelsoup.run(tree, folder / "out", store=store)
    opened.clear()
    assert modelsoup.run(tree, None, store=store).computed == ()
    known = Store(store)
    plan = check(tree, done=known.has, digest=known.digest, companions=known.companions)
    assert plan.nodes["root"].done
    assert not [path for path in opened if path.endswith("tokenizer.json")]
    (folder / "a" / "tokenizer.json").write_text("[]" * 1000)
    again = modelsoup.run(tree, folder / "out", store=store, force=True)
    assert again.computed == ("root",)
    assert (again.output / "tokenizer.json").read_text() == "[]" * 1000


def test_files_that_a_command_names_are_read_by_a_run_once_and_by_no_plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modelsoup.files.digest._remembered.cache_clear()
    (folder / "train.py").write_text(
        "import shutil, sys\nshutil.copyfile(sys.argv[1], sys.argv[2])\n"
    )
    (folder / "data.csv").write_text("1,2\n" * 1000)
    command = '["{python}", train.py, "{start}", "{output}"]'
    (folder / "tree.yaml").write_text(
        f"soup: 1\nmodels: {{a: a.safetensors}}\n"
        f"tree: {{of: [a], finetune: {{command: {command}, files: [data.csv]}}}}\n"
    )
    tree, _ = modelsoup.read_tree(folder / "tree.yaml")
    opened = []
    exact = os.open

    def watched(path: Any, *arguments: Any, **more: Any) -> int:
        opened.append(Path(os.fsdecode(path)).name if not isinstance(path, int) else "")
        return exact(path, *arguments, **more)

    def read() -> int:
        modelsoup.files.digest._remembered.cache_clear()  # as in another process
        times = opened.count("data.csv")
        opened.clear()
        return times

    monkeypatch.setattr(os, "open", watched)
    store = Store(folder / "store")
    known = {"done": store.has, "digest": store.digest, "companions": store.companions}
    assert check(tree).nodes["root"].key is None
    store.digest_now(folder / "a.safetensors")
    assert check(tree, **known, contents=store.contents).nodes["root"].key is None
    assert read() == 0
    assert modelsoup.run(tree, folder / "out.safetensors", store=store.folder).computed == ("root",)
    assert read() == 1
    assert check(tree, **known, contents=store.contents).nodes["root"].done
    assert modelsoup.run(tree, None, store=store.folder).computed == ()
    assert read() == 0
    (folder / "data.csv").write_text("3,4\n" * 1000)
    assert check(tree, **known, contents=store.contents).nodes["root"].key is None
    assert modelsoup.run(tree, None, store=store.folder).computed == ("root",)
    assert read() == 1


def test_a_run_looks_at_a_tree_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    tensors = Add.tensors
    monkeypatch.setattr(Add, "tensors", lambda self, o: asked.append(o) or tensors(self, o))
    text = TUNED.replace("pair: [a, b, c, d]", "of: [a, b], finetune: {}")
    run(folder, text)
    made_by = len(asked)
    asked.clear()
    run(folder, text)
    assert len(asked) == 1  # by the plan
    assert made_by == 2  # and by what looks at the result


# --- keys --------------------------------------------------------------------------------------

COMMAND = modelsoup.trees.trainer.CommandOptions

OTHERWISE: dict[tuple[type, str], Any] = {
    (Load, "path"): "other/a.safetensors",
    (Load, "digest"): "0" * 32,
    (Train, "training"): Training("trainers:Add", {"add": 2}),
    (Train, "start"): "b.safetensors",
    (Merge, "recipe"): Recipe(beta=0.5),
    (Merge, "base"): "b.safetensors",
    (Merge, "lora"): [("adapter", 1.0)],
    (Merge, "aux"): [("fisher", ["b.safetensors"])],
    (FineTune, "training"): Training("trainers:Add", {"add": 2}),
    (Training, "trainer"): "trainers:Plain",
    (Training, "options"): {"add": 2},
    (Training, "resources"): {"gpus": 1},
    (Training, "seed"): 6,
    (Training, "folder"): "other",
    (Recipe, "method"): "slerp",
    (Recipe, "beta"): 0.25,
    (Recipe, "weights"): [1, 2, 3],
    (Recipe, "parameters"): {"normalize": False},
    (Recipe, "layers"): "D.*",
    (Recipe, "rest"): "drop",
    (Recipe, "groups"): {"g": ["D.*"]},
    (Recipe, "low_level"): 0.5,
    (Recipe, "dtype"): "bf16",
    (Recipe, "seed"): 6,
    (Recipe, "on_integer"): "first",
    (Recipe, "allow_nonfinite"): ["D.*"],
    (Recipe, "renames"): ["D.*=E.*"],
    (Recipe, "slices"): "1[0:1]",
    (Recipe, "files_from"): "second",
    (Recipe, "tokenizer_from"): "second",
    (Recipe, "estimates"): ["D.*"],
    (Recipe, "chat_template"): "{{ messages }}",
    (Rule, "pattern"): "G.*",
    (Rule, "action"): "drop",
    (Rule, "source"): 1,
    (Rule, "low_level"): True,
    (Rule, "frozen"): True,
    (Rule, "method"): "slerp",
    (Rule, "parameters"): {"normalize": False},
    (COMMAND, "command"): ["{python}", "train.py", "{output}", "--more"],
    (COMMAND, "env"): {"RATE": "2"},
    (COMMAND, "folder"): "other",
    (COMMAND, "timeout"): 9.0,
    (COMMAND, "files"): ["data.csv"],
}
NO_PART_OF_A_KEY = {
    (Load, "path"), (Load, "digest"),  # its content is
    (Training, "resources"), (Training, "folder"), (COMMAND, "folder"), (COMMAND, "timeout"),
}  # fmt: skip


ADDS = Training("trainers:Add", {"add": 1})
RUNS = {"command": ["{python}", "train.py", "{output}"], "env": {"RATE": "1"}, "folder": "."}


def operation_of(kind: type, where: Path, **changed: Any) -> Any:
    """An operation, with some fields otherwise: its own, or those of what it holds."""
    if kind is Rule and "source" in changed:
        changed["action"] = "keep"  # else it has no meaning
    if kind is COMMAND:
        options = {**RUNS, **changed}
        options["folder"] = str(where / options["folder"])
        return FineTune(Training("command", options, seed=5))
    for name in {"path", "base", "start", "folder"} & changed.keys():
        changed[name] = where / changed[name]
    if "lora" in changed:
        changed["lora"] = tuple((where / path, weight) for path, weight in changed["lora"])
    if "aux" in changed:
        changed["aux"] = tuple((n, tuple(where / p for p in of)) for n, of in changed["aux"])
    leaf = where / "a.safetensors"
    if kind in (Load, Train, Merge, FineTune):
        usual = {
            Load: Load(leaf), Train: Train(ADDS, leaf), Merge: Merge(Recipe(), leaf),
            FineTune: FineTune(ADDS),
        }[kind]  # fmt: skip
        return replace(usual, **changed)
    if kind is Training:
        return FineTune(replace(ADDS, **{"seed": 5, "folder": where, **changed}))
    if kind is Rule:
        return Merge(Recipe(layers=[replace(Rule("D.*"), **changed)]))
    return Merge(replace(Recipe(), **changed))


def key_of(
    folder: Path, operation: Any, *, inputs: tuple[str, ...] = ("1", "2"), name: str = "node",
    seed: int = 0,
) -> str | None:  # fmt: skip
    builder = Builder(seed)
    builder.add(name, operation)
    tree: Tree = builder.tree(name)
    return node_key(tree, name, inputs, modelsoup.trees.store.content_digest)


@pytest.fixture
def keyed(folder: Path) -> Path:
    for place in (folder, folder / "other"):
        place.mkdir(exist_ok=True)
        shutil.copy(folder / "a.safetensors", place / "copy.safetensors")
        (place / "train.py").write_text("import sys\n")
        (place / "data.csv").write_text("1,2\n")
    (folder / "other" / "copy.safetensors").rename(folder / "other" / "a.safetensors")
    (folder / "adapter").mkdir()
    factors = {f"base_model.model.D.lora_{side}.weight": np.ones((1, 1)) for side in "AB"}
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1}')
    return folder


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, field.name)
        for kind in (Load, Train, Merge, FineTune, Training, Recipe, Rule, COMMAND)
        for field in dataclasses.fields(kind)
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_field_of_an_operation_counts_in_its_key_or_is_listed(
    keyed: Path, kind: type, name: str
) -> None:
    usual = {"source": 0} if (kind, name) == (Rule, "source") else {}
    before = key_of(keyed, operation_of(kind, keyed, **usual))
    after = key_of(keyed, operation_of(kind, keyed, **{name: OTHERWISE[kind, name]}))
    assert before is not None and after is not None
    assert (before == after) == ((kind, name) in NO_PART_OF_A_KEY)


class Versioned(Add):
    """A trainer with a version."""

    name = "versioned"
    version = "1"


def changes_a_leaf(folder: Path) -> None:
    save_file(network(9), folder / "a.safetensors")


def changes_what_a_command_runs(folder: Path) -> None:
    (folder / "train.py").write_text("import os\n")


ALSO = {
    "the content of a leaf": (Load, changes_a_leaf),
    "the content of a start": (Train, changes_a_leaf),
    "the content of a base": (Merge, changes_a_leaf),
    "the content of a command's script": (COMMAND, changes_what_a_command_runs),
}


@pytest.mark.parametrize("what", ALSO)
def test_what_an_operation_reads_counts_in_its_key(keyed: Path, what: str) -> None:
    kind, change = ALSO[what]
    operation = operation_of(kind, keyed)
    before = key_of(keyed, operation)
    change(keyed)
    assert key_of(keyed, operation) != before


def test_a_trainers_version_counts_in_a_key(keyed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modelsoup.register_trainer(Versioned())
    operation = FineTune(Training("versioned", seed=1))
    before = key_of(keyed, operation)
    monkeypatch.setattr(Versioned, "version", "2")
    assert key_of(keyed, operation) != before


def test_inputs_and_their_order_count_in_a_key(keyed: Path) -> None:
    merge = Merge(Recipe())
    keys = [key_of(keyed, merge, inputs=i) for i in (("1", "2", "3"), ("1", "3", "2"), ("1", "2"))]
    assert len(set(keys)) == 3


def test_the_plans_seed_and_a_models_name_count_where_a_node_has_no_seed_of_its_own(
    keyed: Path,
) -> None:
    plain = FineTune(Training("trainers:Add"))
    seeded = FineTune(Training("trainers:Add", seed=3))
    for made, counts in ((plain, True), (seeded, False), (Merge(Recipe()), False)):
        before = key_of(keyed, made)
        assert (key_of(keyed, made, seed=1) != before) == counts
        assert (key_of(keyed, made, name="other") != before) == counts


def test_what_goes_along_with_a_model_folder_counts_in_its_key(keyed: Path) -> None:
    model = keyed / "model"
    model.mkdir()
    shutil.copy(keyed / "a.safetensors", model / "model.safetensors")
    (model / "config.json").write_text("{}")
    for operation in (Load(model), Train(Training("trainers:Add"), model)):
        (model / "config.json").write_text("{}")
        before = key_of(keyed, operation)
        (model / "config.json").write_text("[]")
        assert key_of(keyed, operation) != before
    alone = key_of(keyed, Load(keyed / "a.safetensors"))
    assert key_of(keyed, Load(model)) != alone
