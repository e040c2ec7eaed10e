"""Two domains, of which one or both are split into modalities: whose pictures have which label.

Labels come from folders, from a file, or from a network that the start brings; without torch but
where that is asked. The modalities of A have the labels from 0 on, and those of B follow, which is
one class where it is not split.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from modelsoup import MismatchError, ParameterError, counted, listed, open_checkpoint

from ..pictures.images import ImageError
from ..pictures.modalities import DOMAINS, Modalities, class_names, in_folders, read_modalities
from ..pictures.picture import Images, Picture, labelled, labels_of, read_picture
from ..pictures.transforms import zoomed
from ..use.classes import classes_in
from .modalities import RichAndPoor
from .ranges import FREE, Count

if TYPE_CHECKING:
    from .cast import Cast


@dataclass(frozen=True)
class ModalDomains(RichAndPoor):
    """Two folders of unpaired pictures, and who says which of them is of which modality.

    Attributes:
        modalities: who says to which modality a picture belongs: `start`, the network M of the
            start, which the trainer `modality` makes; `labels`: each folder in that of A is one; a
            file: `modalities.json`, or a table `path,label`; `none`: A is one class. None is
            `start` where k or k_b says that there are several, and `none` where they do not.
        k: how many modalities A has; `auto` is ⌈|A| / |B|⌉, the least that the paper recommends;
            None is 1, or as many as folders or the file say.
    """

    modalities: Annotated[Literal["none", "labels", "start"] | Path | None, FREE] = None
    k: Count | Literal["auto"] | None = None

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if self.found_by == "start" and self.k is None:
            raise ValueError("modalities are the start's, whose M has so many of A: k")
        if self.found_by == "none" and {self.k, self.k_b} - {None, 1}:
            raise ValueError(
                f"k is {self.k} and k_b {self.k_b}, but modalities is none: A and B are one class "
                f"each"
            )

    @property
    def found_by(self) -> Literal["none", "labels", "start"] | Path:
        """Who says to which modality a picture belongs."""
        if self.modalities is not None:
            return self.modalities
        return "start" if {self.k, self.k_b} - {None, 1} else "none"

    @cached_property
    def told(self) -> Modalities:
        """The classes, and the labels of pictures as far as they are known before a training.

        Raises:
            ParameterError: k or k_b is another number than what there is, or the file is damaged.
        """
        by = self.found_by
        if by in ("none", "start"):
            of_a = self.auto() if self.k == "auto" else self.k or 1
            return Modalities(class_names(of_a, self.k_b or 1), of_a, ())
        if by == "labels":
            a, b = self.folders()
            found = in_folders(a)
            if self.k_b is not None:
                found = found.beside(in_folders(b))
        else:
            assert isinstance(by, Path)
            found = read_modalities(by)
        first = found.k_source
        k = self.auto() if self.k == "auto" else self.k
        for name, wanted, there in (("k", k, first), ("k_b", self.k_b, len(found.classes) - first)):
            if wanted not in (None, there):
                where = "there are folders for" if by == "labels" else f"{by} has"
                raise ParameterError(f"{name} is {wanted}, but {where} {there}: leave it out")
        twice = [name for name in found.classes[:first] if name in found.classes[first:]]
        if twice:
            raise ParameterError(f"a modality of A is called {twice[0]!r}, as a class of B is")
        return found

    @property
    def split(self) -> tuple[int, int]:
        """How many classes A has and B, which has none where it is excluded."""
        first = self.told.k_source
        return first, 0 if self.exclude_target else len(self.told.classes) - first

    def class_names(self) -> tuple[str, ...]:
        """`A_00`, `A_01`, … and `B`; or as folders or the file call them."""
        return self.told.classes[: sum(self.split)]

    def images(self, part: str = "train") -> Images:
        """X and Y; of training with their labels, but for those that a network is yet to find."""
        if part != "train":
            return super().images(part)
        domains = self.domains()
        found: dict[str, Sequence[Picture]] = {}
        for name, files, folder, domain, of_set in zip(
            "XY", (domains.a, domains.b), self.folders(), DOMAINS, self.split, strict=True
        ):
            if of_set > len(files):
                raise ParameterError(
                    f"{'k' if name == 'X' else 'k_b'} is {of_set}, but {folder} has "
                    f"{counted(len(files), 'image')}: there cannot be more modalities"
                )
            if not of_set:
                continue
            if self.found_by == "start":
                found[name] = files
                continue
            paths = [file for file in files if isinstance(file, Path)]
            if of_set == 1 and (name == "Y" or self.found_by == "none"):
                labels = [self.split[0] if name == "Y" else 0] * len(files)
            else:
                labels = self.told.labels(paths, folder, domain)
            found[name] = labelled(files, labels)
        return found

    def decisive(self) -> dict[str, Any]:
        """See `Options`; and which picture has which label, where folders or a file say so."""
        told: dict[str, Any] = {**super().decisive(), "k": self.split[0], "modalities": "start"}
        if self.found_by != "start":
            labels = {name: labels_of(own).tolist() for name, own in self.images().items()}
            told["modalities"] = hashlib.sha256(json.dumps(labels).encode()).hexdigest()
        return told


def remarks(names: Sequence[str], sets: Images, batch: int) -> list[str]:
    """What the log should say of modalities before the first step.

    Args:
        names: of all classes.
        sets: of pictures with their labels.
        batch: pictures of a pass.
    """
    counts = np.bincount(
        np.concatenate([labels_of(own) for own in sets.values()]), minlength=len(names)
    )  # fmt: skip
    found = []
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        found.append(f"no picture is of {listed(empty)}: the discriminator never sees them")
    small = [f"{name} {count}" for name, count in zip(names, counts, strict=True)
             if 0 < count < batch and name != "B"]  # fmt: skip
    if small:
        found.append(
            f"modalities of fewer pictures than a batch has, {batch}: {listed(small)} "
            f"(class_balanced draws them as often as others; a smaller k makes them larger)"
        )
    of_a, of_b = (len(sets.get(name, ())) for name in "XY")
    if of_b == 1:
        found.append(
            "B has one image: what is translated can only look like that one, and the "
            "discriminator will know it by heart"
        )
    if of_b > of_a and sum(name == "B" or name.startswith("B_") for name in names) == 1:
        found.append(
            f"B has more images than A, {of_b} beside {of_a}, but A is meant to be the rich "
            f"domain: data_a and data_b may be the wrong way round"
        )
    return found


def split_in(checkpoint: Path) -> dict[str, Any]:
    """How a result's classes are split, as options: by its M, or by names that only such have.

    Nothing where neither tells: folders and files call their modalities whatever they like.

    Raises:
        CheckpointError: it is missing or damaged.
        MismatchError: its metadata give no index to each class.
    """
    opened, names = open_checkpoint(checkpoint), classes_in(checkpoint) or ()
    if "M.belongs" in opened.tensors:
        belongs = opened["M.belongs"].tolist()
        k, k_b = belongs.count(0), belongs.count(1)
        excluded = not k_b and len(names) == k
    else:
        of_all = len(names)
        fit = [k for k in range(1, of_all + 1)
               if names == class_names(k, of_all - k) or names[k:] == ("B",)]  # fmt: skip
        if not fit:
            return {}
        k, k_b, excluded = fit[0], of_all - fit[0], fit[0] == of_all
        k_b = 0 if k_b == 1 else k_b
    found: dict[str, Any] = {"k": k}
    if k_b:
        found["k_b"] = k_b
    if excluded:
        found["exclude_target"] = True
    return found


# Labels that a network finds.


def find_labels(s: Cast) -> dict[str, list[int]]:
    """The labels of the pictures of X and of Y, by the network M: see `networks.modality`.

    A damaged picture that is to be left out has one that nobody will ask for.

    Raises:
        ImageError: a picture is damaged, and is not to be left out.
        MismatchError: M's centroids are none that a training found, but those of a merge, say; or
            are more or fewer of a domain.
        TrainerError: neither a start nor `init_from` has M.
    """
    from ..use.modalities import embedded, must_be_one_models

    s.must_have_begun("M")
    o, labeller = s.options, s.networks["M"]
    must_be_one_models(labeller, "the start")
    belongs = labeller.belongs.tolist()
    there, wanted = (belongs.count(0), belongs.count(1)), (o.split[0], o.k_b or 0)
    if there != wanted:
        raise MismatchError(
            f"M has {there[0]} modalities of A and {there[1]} of B, where k is {wanted[0]} and k_b "
            f"{o.k_b}: say k: {there[0]}{f' and k_b: {there[1]}' if there[1] else ''}"
        )
    transform = zoomed(int(labeller.side))  # as it saw them when it was trained

    def read(picture: Picture) -> np.ndarray | None:
        try:
            return transform.for_test(read_picture(picture, o.channels))
        except ImageError:
            if o.on_bad_image == "error":
                raise
            return None

    found: dict[str, list[int]] = {}
    was, _ = labeller.training, labeller.eval().to(s.device)
    for domain, (name, pictures) in enumerate(s.images.items()):
        seen, own = embedded(labeller, pictures, read, threads=o.threads)
        labels, _ = labeller.nearest(own.to(s.device), domain)
        known = dict(zip(map(str, seen), labels.tolist(), strict=True))
        found[name] = [known.get(str(picture), 0) for picture in pictures]
    labeller.train(was)
    return found
