"""Options of pictures each of which may have several of some attributes. Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from modelsoup import ParameterError

from ..pictures.attributes import attribute_names, find_attributed, read_attributes
from ..pictures.folders import Division
from ..pictures.picture import Images
from .data import Data, LabelledImages
from .ranges import FREE, Count


@dataclass(frozen=True)
class AttributedImages(LabelledImages):
    """Pictures of classes; or, with a file that tells them, of attributes, of which each has some.

    Attributes:
        attributes_file: which of the pictures in data, and in `test`, has which: CelebA's list, or
            a CSV, see `modelsoup_i2i.pictures.attributes`. Each picture below these folders has a
            row there, and each row a picture.
        attributes: which of them are used, in this order; all where none are named. In place of
            data, how many there are, for what a checkpoint will hold.
    """

    attributes_file: Annotated[Path | None, FREE] = None
    attributes: tuple[str, ...] | Count = ()

    of_classes: ClassVar[tuple[str, ...]] = (
        "data_a", "data_b", "test_a", "test_b", "classes", "exclude", "per_class", "test_per_class",
    )  # fmt: skip

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if not self.has_attributes:
            return
        if self.attributes_file is None and (self.data or not isinstance(self.attributes, int)):
            raise ValueError(
                "attributes are those of attributes_file, which is missing: CelebA's list, or a CSV"
            )
        if self.attributes_file is not None and isinstance(self.attributes, int):
            raise ValueError(
                f"attributes is {self.attributes}, but beside attributes_file it names those that "
                f"are used"
            )
        for name in self.of_classes:
            if getattr(self, name):
                raise ValueError(
                    f"{name} is of pictures by class, and these have attributes, of which each may "
                    f"have several"
                )

    @property
    def has_attributes(self) -> bool:
        """See `LabelledImages`."""
        return self.attributes_file is not None or bool(self.attributes)

    @property
    def class_count(self) -> int:
        """How many classes there are, or attributes; 0 where nothing says so."""
        if not self.has_attributes:
            return super().class_count
        named = self.attributes
        return named if isinstance(named, int) else len(named or self.class_names())

    def class_names(self) -> tuple[str, ...]:
        """See `Data`; or attributes."""
        if not self.has_attributes:
            return super().class_names()
        return attribute_names(*self._told())

    def images(self, part: str = "train") -> Images:
        """All of them as one set."""
        if not self.has_attributes:
            return super().images(part)
        attributes = read_attributes(*self._told())
        if self.data is None:
            raise ParameterError(f"data is missing: the folder of {attributes.file}'s pictures")
        folders = [folder for folder in (self.data, self.test) if folder is not None]
        train, *tests = find_attributed(folders, attributes)
        if tests and part == "test":
            return {"data": tests[0]}
        division = Division(
            fraction=self.train_fraction, test_share=self.test_share, least=self.fewest,
            seed=self.subset_seed,
        )  # fmt: skip
        if len(train) < self.fewest:
            raise ParameterError(f"{self.data} has one image, where two or more must be")
        places = division.of(len(train), str(self.data))[part]
        return {"data": tuple(train[place] for place in places)}

    def _told(self) -> tuple[Path, tuple[str, ...]]:
        """The file, and which of its attributes are used."""
        if self.attributes_file is None:
            raise ParameterError("data is missing: a folder of pictures, and attributes_file")
        return self.attributes_file, () if isinstance(self.attributes, int) else self.attributes

    def left_out(self) -> list[str]:
        """See `Data`; no picture must lie in a class's folder here."""
        return Data.left_out(self) if self.has_attributes else super().left_out()

    def decisive(self) -> dict[str, Any]:
        """See `Options`; what is as it was before there were attributes is left out."""
        told = super().decisive()
        if not self.has_attributes:
            del told["attributes"]
        return told
