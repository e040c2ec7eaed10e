"""What a report is about: models, what is known of each, and the checkpoints whose trees are shown.

A store's records say most; what it does not have, the lineages of its checkpoints tell.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, SoupError, counted, sized
from ..files.checkpoint import SUFFIX, open_checkpoint
from ..merging.lineage import is_merge, parents, read_lineage
from ..trees.reproduce import reproduction
from ..trees.store import DEFAULT_STORE, Entry, Store, content_digest

SHOWN = "shown"
"""The note of a record that says in which folder curves and samples are."""


@dataclass(frozen=True)
class Model:
    """A model that something made.

    Attributes:
        mark: what links to it: its key in a store, or what a lineage names it by.
        name: what it is called.
        record: what a store knows of it, or as much of that as a lineage says.
    """

    mark: str
    name: str
    record: Mapping[str, Any]

    @property
    def is_trained(self) -> bool:
        """Whether a trainer made it, and not a merge."""
        return self.record.get("operation") != "merge"

    @property
    def metrics(self) -> dict[str, float]:
        """The last figures that its trainer told."""
        found = mapping_of(self.record.get("metrics"))
        return {name: float(value) for name, value in found.items() if is_number(value)}

    @property
    def notes(self) -> Mapping[str, Any]:
        """What else it told."""
        return mapping_of(self.record.get("notes"))


@dataclass(frozen=True)
class Root:
    """A checkpoint whose tree is shown.

    Attributes:
        model: what it is.
        path: where it lies.
        made: its lineage; None where there is none that can be read, which `flaw` then tells.
        names: what stands for the content of a model → what the plan calls it.
        plan: a plan that makes it.
        flaw: why there is none.
        plan_name: what the plan is called that made it, where that is known.
        run: the command that did.
    """

    model: Model
    path: Path
    made: Mapping[str, Any] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    plan: str = ""
    flaw: str = ""
    plan_name: str = ""
    run: str = ""


@dataclass
class Subject:
    """What a page is about.

    Attributes:
        title: its heading.
        told: a line below.
        models: by their marks.
        marks: a key or a digest → the mark of the model that it stands for.
        roots: the newest first.
        remarks: what is to be said beforehand.
        named: marks of the models that have their names from a lineage.
    """

    title: str
    told: str
    models: dict[str, Model] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    roots: list[Root] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    named: set[str] = field(default_factory=set)

    def add_entry(self, entry: Entry) -> None:
        """A finished result of a store."""
        name = str(entry.record.get("node", entry.key[:8]))
        self.models[entry.key] = Model(entry.key, name, entry.record)
        self.marks[entry.key] = self.marks[str(entry.record["digest"])] = entry.key

    def add_root(self, path: Path, mark: str, plan_name: str = "", run: str = "") -> None:
        """A checkpoint, and all that it was made of.

        Raises:
            SoupError: it holds no lineage, or cannot be read.
        """
        opened = open_checkpoint(path)
        again = reproduction(opened)
        made = read_lineage(opened)
        assert made is not None  # of which there is a plan
        for found, step in {**made.get("ancestors", {}), mark: made}.items():
            known, name = self.marks.setdefault(found, found), again.names.get(found)
            if known not in self.models:
                called = opened.name if found == mark else found[:8]
                self.models[known] = Model(known, name or called, _recorded(step))
            elif name is not None and known not in self.named:
                # A record has the name of the use that was made first: `slow#2`, say.
                self.models[known] = replace(self.models[known], name=name)
            self.named.add(known)
        model = self.models[self.marks[mark]]
        self.roots.append(Root(model, path, made, again.names, again.text, "", plan_name, run))


def of_path(path: Path, store: Store | None = None) -> Subject:
    """What there is to report of a store, or of a checkpoint.

    Args:
        path: either.
        store: where records of what a checkpoint was made of may be.

    Raises:
        CheckpointError: it is neither, or cannot be read.
        PlanError: the checkpoint holds no lineage.
        StoreError: the store cannot be read.
    """
    if (path / "objects").is_dir():
        return _of_store(Store(path, create=False))
    is_model = path.is_dir() and any(path.glob(f"*{SUFFIX}"))
    if not is_model and path.suffix != SUFFIX and path.exists():
        raise CheckpointError(
            f"{path} is neither a store, which has a folder objects in it, nor a checkpoint"
        )
    return _of_checkpoint(path, store)


def _of_store(store: Store) -> Subject:
    entries = list(store.entries())
    found = Subject(
        f"The store {store.folder}",
        f"{counted(len(entries), 'result')}, {sized(sum(entry.nbytes for entry in entries))}",
    )
    for entry in sorted(entries, key=_started):
        found.add_entry(entry)
    damaged = store.damaged_records()
    if damaged:
        found.remarks.append(
            f"The records of {counted(len(damaged), 'result')} are damaged and left out: "
            f"{', '.join(damaged)}. A run of the plan makes them again."
        )
    plans = {pin.root: pin.plan for pin in store.pinned()}
    read = {key for entry in entries for key in _keys_read(entry.record)}
    for root in plans.keys() - found.models.keys():
        plan = plans[root] or "a tree that was made in Python"
        found.remarks.append(f"The last result of {plan} is not there: run it again to have it.")
    for entry in sorted(entries, key=_started, reverse=True):
        if entry.key in plans or entry.key not in read:
            plan = plans.get(entry.key, "")
            at = "" if store.folder == Path(DEFAULT_STORE) else f" --store {quoted(store.folder)}"
            is_there = plan and Path(plan).is_file()
            run = f"soup run {quoted(plan)} -o again{entry.path.suffix}{at}" if is_there else ""
            try:
                found.add_root(entry.path, entry.key, plan, run)
            except SoupError as error:
                model = found.models[entry.key]
                flaw = str(error)
                found.roots.append(Root(model, entry.path, flaw=flaw, plan_name=plan, run=run))
    return found


def _of_checkpoint(path: Path, store: Store | None) -> Subject:
    opened = open_checkpoint(path)
    found = Subject(f"The checkpoint {opened.name}", sized(opened.nbytes))
    entries = [] if store is None else list(store.entries())
    made = read_lineage(opened)
    wanted = set() if made is None else set(made.get("ancestors", {}))
    # To know the checkpoint itself again, all of it must be read: only where one is as large.
    nbytes = sum(file.stat().st_size for file in opened.files)
    if any(entry.nbytes >= nbytes for entry in entries):
        wanted.add(content_digest(path))
    mark = "output"
    for entry in sorted(entries, key=_started):
        digest = str(entry.record["digest"])
        if wanted & {entry.key, digest}:
            found.add_entry(entry)
            if digest in wanted and digest not in (made or {}).get("ancestors", {}):
                mark = entry.key
    found.add_root(path, mark)
    if store is not None:
        known = sum("digest" in model.record for model in found.models.values())
        found.told += (
            f"; records of {known} of {counted(len(found.models), 'model')} in {store.folder}"
        )
    else:
        found.told += "; metrics, curves and samples are in the store of the run that made it"
    return found


def _keys_read(record: Mapping[str, Any]) -> Iterator[str]:
    """Keys of what a result was made of, merges on the way looked through."""
    pending = inputs_of(record)
    while pending:
        entry = pending.pop()
        yield str(entry.get("key"))
        pending += inputs_of(entry)


def _recorded(made: Mapping[str, Any]) -> dict[str, Any]:
    """What a lineage says of a model, as a store's record says it."""
    record = {"operation": made.get("operation", "merge"), "inputs": parents(made)}
    if not is_merge(made):
        return {**record, **{name: made[name] for name in ("trainer", "options", "seed")}}
    others = ("format", "version", "operation", "inputs", "base", "ancestors", "nonfinite")
    return {**record, "recipe": {k: v for k, v in made.items() if k not in others}}


def _started(entry: Entry) -> float:
    return begun(entry.record)


def begun(record: Mapping[str, Any]) -> float:
    """When a result was begun, in seconds since 1970; 0 where that is not known."""
    started = record.get("started")
    return float(started or 0) if is_number(started) else 0.0


def inputs_of(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a result was made of."""
    inputs = record.get("inputs")
    return list(map(mapping_of, inputs)) if isinstance(inputs, list) else []


def is_number(value: object) -> bool:
    """Whether a value of a record is a figure, infinities included."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 63)


def mapping_of(value: object) -> Mapping[str, Any]:
    """A value of a record that should be a mapping."""
    return value if isinstance(value, Mapping) else {}


def quoted(path: object) -> str:
    """A path, for a shell."""
    return shlex.quote(str(path))
