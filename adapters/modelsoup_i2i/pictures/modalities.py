"""Which picture is of which modality: one format, whoever found it; without torch.

`modalities.json` is an object: `version`, `classes` (names by their labels), `k_source` and
`k_target` (how many of them are A's, and B's after those), `seed`, `encoder` (its SHA-256),
`embedding`, `normalised`, `centroids`, and `items`, each a `path` below its domain's folder,
`domain`, `label` and `score`, the cosine to the centroid. A table has the columns `path`, `label`,
a name, and perhaps `domain`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from modelsoup import ParameterError, counted, listed

from .images import list_images, natural

Domain = Literal["A", "B"]
DOMAINS: tuple[Domain, Domain] = get_args(Domain)
VERSION = 1
MOST = 1 << 28  # bytes of a file of labels


@dataclass(frozen=True)
class Item:
    """A picture and its modality.

    Attributes:
        path: below the folder of its domain, with slashes.
        domain: `A` or `B`.
        label: the index of its class.
        score: the cosine of its embedding to the centroid, if it was found by one.
    """

    path: str
    domain: Domain
    label: int
    score: float | None = None


@dataclass(frozen=True)
class Modalities:
    """The modalities of some pictures.

    Attributes:
        classes: their names, those of A before those of B.
        k_source: how many A has.
        items: the pictures.
        found: how they were found, as the file tells it; nothing where they were known.
    """

    classes: tuple[str, ...]
    k_source: int
    items: tuple[Item, ...]
    found: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """How many pictures each class has."""
        found = [0] * len(self.classes)
        for item in self.items:
            found[item.label] += 1
        return found

    def of(self, domain: Domain) -> dict[str, Item]:
        """The pictures of a domain, by their paths."""
        return {item.path: item for item in self.items if item.domain == domain}

    def labels(self, files: Sequence[Path], folder: Path, domain: Domain) -> list[int]:
        """The label of each picture of a domain's folder.

        Raises:
            ParameterError: a picture has none.
        """
        own = self.of(domain)
        paths = [file.relative_to(folder).as_posix() for file in files]
        lacking = [path for path in paths if path not in own]
        if lacking:
            raise ParameterError(
                f"{len(lacking)} of {counted(len(files), 'picture')} of {folder} have no modality, "
                f"such as {listed(lacking, 3)}"
            )
        return [own[path].label for path in paths]

    def names(self, files: Sequence[Path], folder: Path) -> dict[str, str]:
        """The names of the classes of those pictures of A's folder that are here, by their paths.

        Raises:
            ParameterError: none is.
        """
        own = self.of("A")
        paths = [file.relative_to(folder).as_posix() for file in files]
        found = {path: self.classes[own[path].label] for path in paths if path in own}
        if not found:
            raise ParameterError(
                f"of no picture of {folder} a class is known: {listed(list(own), 3)} are not in it"
            )
        return found

    def beside(self, other: Modalities) -> Modalities:
        """These of A; and in the place of B as one class those that another one has of its A.

        Where both have a name, all say whose they are: `A_name` and `B_name`.
        """
        first, more = self.k_source, other.k_source
        items = [replace(i, domain="B", label=first + i.label) for i in other.items]
        own = [item for item in self.items if item.domain == "A"]
        of_each = self.classes[:first], other.classes[:more]
        whose = [f"{own}_" for own in DOMAINS] if {*of_each[0]} & {*of_each[1]} else ["", ""]
        names = [own + name for own, these in zip(whose, of_each, strict=True) for name in these]
        return Modalities(tuple(names), first, (*own, *items), self.found)

    def as_json(self) -> str:
        """See the module's text."""
        told = {
            "version": VERSION, "classes": self.classes, "k_source": self.k_source,
            "k_target": len(self.classes) - self.k_source,
            **{name: self.found.get(name) for name in FOUND},
        }  # fmt: skip
        lines = [
            json.dumps({"path": i.path, "domain": i.domain, "label": i.label, "score": i.score})
            for i in self.items
        ]
        items = "[\n" + ",\n".join(f"  {line}" for line in lines) + "\n ]"
        head = "".join(f" {json.dumps(name)}: {json.dumps(own)},\n" for name, own in told.items())
        return f'{{\n{head} "items": {items}\n}}\n'

    def as_csv(self) -> str:
        """A table of paths, classes' names and domains."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("path", "label", "domain"))
        rows.writerows((i.path, self.classes[i.label], i.domain) for i in self.items)
        return text.getvalue()


FOUND = ("seed", "encoder", "embedding", "normalised", "centroids")


def class_names(k_source: int, k_target: int) -> tuple[str, ...]:
    """`A_00`, `A_01`, …, and `B`, or `B_00`, … where that has several."""
    of_a = [f"A_{n:02d}" for n in range(k_source)]
    return (*of_a, *(["B"] if k_target == 1 else [f"B_{n:02d}" for n in range(k_target)]))


def known(rows: Iterable[tuple[str, Domain, str]]) -> Modalities:
    """Modalities of pictures whose classes have names, which are numbered in natural order.

    Args:
        rows: path, domain and name of each. Where no picture is of B, it is a class all the same.
    """
    every = list(rows)
    of_each = {
        domain: sorted({name for _, own, name in every if own == domain}, key=natural)
        for domain in DOMAINS
    }
    numbers = {
        (domain, name): place
        for place, (domain, name) in enumerate(
            (domain, name) for domain in DOMAINS for name in of_each[domain]
        )
    }
    items = tuple(Item(path, domain, numbers[domain, name]) for path, domain, name in every)
    classes = (*of_each["A"], *(of_each["B"] or ["B"]))
    return Modalities(classes, len(of_each["A"]), items)


def in_folders(folder: Path) -> Modalities:
    """Of a folder of folders, each of which is a modality of A with all that lies below it.

    Raises:
        ParameterError: there is none, or one without pictures.
        ImageError: the folder is missing.
    """
    files = list_images(folder)
    rows = [file.relative_to(folder) for file in files]
    names = {row.parts[0] for row in rows if len(row.parts) > 1}
    there = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if not there:
        raise ParameterError(f"{folder} has no folders, of which each would be a modality")
    for name in there:
        if name not in names:
            raise ParameterError(f"the modality {name!r} of {folder} is empty: it has no pictures")
    return known((row.as_posix(), "A", row.parts[0]) for row in rows if len(row.parts) > 1)


def read_modalities(path: Path) -> Modalities:
    """What a `modalities.json`, a table or a folder of folders says.

    Raises:
        ParameterError: it is none of these; the message says what is wrong.
        ImageError: a folder cannot be read.
    """
    if path.is_dir():
        return in_folders(path)
    if not path.is_file():
        what = "is no regular file" if path.exists() else "does not exist"
        raise ParameterError(f"{path} {what}, where a file of modalities is expected")
    if path.stat().st_size > MOST:
        raise ParameterError(f"{path} is larger than {MOST >> 20} MiB: it is no file of modalities")
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path} cannot be read as text: {error}") from error
    made = _from_json(text, path) if path.suffix.lower() == ".json" else _from_csv(text, path)
    if not made.items:
        raise ParameterError(f"{path} names no pictures")
    seen: set[tuple[str, Domain]] = set()
    for item in made.items:
        if (item.path, item.domain) in seen:
            raise ParameterError(f"{path} has the picture {item.path} of {item.domain} twice")
        seen.add((item.path, item.domain))
    return made


def _from_csv(text: str, path: Path) -> Modalities:
    rows = csv.DictReader(io.StringIO(text))
    named = list(rows.fieldnames or ())
    if not {"path", "label"} <= {*named}:
        raise ParameterError(
            f"{path} has the columns {listed(named) or 'none'}, where path and label are expected "
            f"in its first line, and perhaps domain"
        )
    found: list[tuple[str, Domain, str]] = []
    try:
        for row in rows:
            domain = row.get("domain") or "A"
            if domain not in DOMAINS:
                raise ParameterError(
                    f"{path}, line {rows.line_num}: the domain is {domain!r}, but must be A or B"
                )
            if not row["path"] or not row["label"]:
                raise ParameterError(f"{path}, line {rows.line_num} lacks a path or a label")
            found.append((row["path"], DOMAINS[DOMAINS.index(domain)], row["label"]))
    except csv.Error as error:
        raise ParameterError(f"{path}, line {rows.line_num}: {error}") from error
    return known(found)


def _from_json(text: str, path: Path) -> Modalities:
    def must(holds: object, said: str) -> None:
        if not holds:
            raise ParameterError(f"{path} is no modalities.json: {said}")

    try:
        told = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ParameterError(f"{path} is no modalities.json: {error}") from error
    must(isinstance(told, dict), "it is no object")
    must(told.get("version") == VERSION, f"its version is {told.get('version')!r}, not {VERSION}")
    classes, first, items = (told.get(name) for name in ("classes", "k_source", "items"))
    must(
        isinstance(classes, list) and all(isinstance(name, str) and name for name in classes)
        and len({*classes}) == len(classes), "classes are no list of different names",
    )  # fmt: skip
    must(type(first) is int and 1 <= first <= len(classes), f"k_source is {first!r}")
    must(isinstance(items, list), "items are no list")
    found = []
    for place, item in enumerate(items):
        where = f"item {place}"
        must(isinstance(item, dict), f"{where} is no object")
        own, domain, label, score = (item.get(n) for n in ("path", "domain", "label", "score"))
        must(isinstance(own, str) and own, f"{where} has no path")
        must(domain in DOMAINS, f"the domain of {where} is {domain!r}, not A or B")
        must(type(label) is int and 0 <= label < len(classes), f"the label of {where} is {label!r}")
        must(
            (label < first) == (domain == "A"), f"the label {label} of {where} is none of {domain}"
        )
        must(score is None or type(score) in (int, float), f"the score of {where} is {score!r}")
        found.append(Item(own, domain, label, score))
    return Modalities(tuple(classes), first, tuple(found), {name: told.get(name) for name in FOUND})
