"""Options of where a trainer's pictures come from, and how they come to size. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

from modelsoup import ParameterError

from ..pictures.folders import (
    Classes,
    ClassSet,
    Division,
    Domains,
    class_names,
    find_classes,
    find_domains,
    find_halves,
    find_pairs,
    folders_of,
    halves_in,
    in_no_class,
)
from ..pictures.images import left_out, list_images
from ..pictures.picture import Images, Picture
from ..pictures.transforms import Mode, Transform
from .ranges import FREE, Count, Number, Options

if TYPE_CHECKING:
    from ..measuring.class_evaluation import ClassFiles
    from ..measuring.evaluation import Sets

Side = int | tuple[int, ...]


@dataclass(frozen=True)
class Pixels(Options):
    """How pictures become what a network sees.

    Attributes:
        flip: mirror half of them.
        channels: of the images: 3, or 1 for grey, or 4 for colour and opacity; any other number, of
            arrays and of TIFFs with a page or a band for each.
        on_bad_image: `error`, or `skip` to leave damaged ones out, of training and of tests.
        threads: that prepare images; 0 is none beside the training.
        cache_mb: MiB of decoded images that are kept in memory.
    """

    flip: bool = True
    channels: Count = 3
    on_bad_image: Literal["error", "skip"] = "error"
    threads: Annotated[Number, FREE] = 2
    cache_mb: Annotated[Number, FREE] = 2048

    def transform(self) -> Transform:
        """How pictures come to size."""
        raise NotImplementedError


@dataclass(frozen=True)
class Cropped(Pixels):
    """Pictures are resized and cropped, by CycleGAN's words.

    Attributes:
        mode: how pictures come to size: see `modelsoup_i2i.pictures.transforms.Transform`.
        load_size: side, or height and width, to which they are resized.
        crop_size: side, or height and width, of what is cropped out of them at random.
    """

    mode: Mode = "resize_and_crop"
    load_size: Side = 286
    crop_size: Side = 256

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        for name in ("load_size", "crop_size"):
            size = getattr(self, name)
            if not isinstance(size, int) and len(size) != 2:
                raise ValueError(f"{name} is {list(size)}, but must be a side, or [height, width]")
        self.transform()

    def transform(self) -> Transform:
        """How pictures come to size."""
        return Transform(self.mode, _sides(self.load_size), _sides(self.crop_size), self.flip)

    def decisive(self) -> dict[str, Any]:
        """See `Options`; sizes in one form."""
        sizes = {name: list(_sides(getattr(self, name))) for name in ("load_size", "crop_size")}
        return {**super().decisive(), **sizes}


@dataclass(frozen=True)
class Data(Options):
    """Where pictures come from: what the loop asks of each such options.

    Attributes:
        tests_are: what must be given for there to be test images.
        fewest: how many pictures a set of training images must have.
    """

    tests_are: ClassVar[str] = ""
    fewest: ClassVar[int] = 2

    def images(self, part: str = "train") -> Images:
        """The sets of pictures of a part: `train`, or `test`, of which there may be none.

        Raises:
            ParameterError: they are missing, or too few.
        """
        raise NotImplementedError

    def folders(self) -> tuple[Path, ...]:
        """The folders of training images."""
        raise NotImplementedError

    def read(self) -> list[Path]:
        """The folders of pictures that there are, of tests too."""
        raise NotImplementedError

    def has_tests(self) -> bool:
        """Whether test images are named, be they there or not."""
        raise NotImplementedError

    def class_names(self) -> tuple[str, ...]:
        """The classes of the training images, by their indices; none where they have none."""
        return ()

    def left_out(self) -> list[str]:
        """What lies among the training images and is not used."""
        return [said for folder in self.folders() if (said := left_out(folder)) is not None]

    def truth(
        self, pictures: Sequence[Picture], source: str, target: str, part: str
    ) -> list[Picture] | None:
        """What pictures of a set should become in another; None where that is not known of all."""
        return None

    def test_sets(self, transform: Transform) -> Sets | ClassFiles:
        """What the first translator is measured on.

        Raises:
            ParameterError: there are no test images.
            ImageError: a folder is missing.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class TwoDomains(Data):
    """Two folders of unpaired pictures.

    Attributes:
        data: a folder with `trainA` (X) and `trainB` (Y), relative to the plan as all folders are.
        data_a: in its place, the folder of X …
        data_b: … and that of Y.
        test_a: the folder of test images of X; None is `testA` in `data`, where that is.
        test_b: likewise of Y.
        imbalance: percent by which Y is to be smaller than X: a subset is drawn.
        count_b: in its place, how many images of Y are used.
        subset_seed: of the subset, in which smaller ones of the same seed lie.
    """

    # The data decide by their content, wherever they lie.
    data: Annotated[Path | None, FREE] = None
    data_a: Annotated[Path | None, FREE] = None
    data_b: Annotated[Path | None, FREE] = None
    test_a: Annotated[Path | None, FREE] = None
    test_b: Annotated[Path | None, FREE] = None
    imbalance: float | None = None
    count_b: int | None = None
    subset_seed: int = 0

    tests_are = "data, a folder with testA and testB in it, or test_a and test_b"

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if (self.test_a is None) != (self.test_b is None):
            raise ValueError("test_a and test_b, the folders of test images, go together")
        if self.imbalance is not None and self.count_b is not None:
            raise ValueError("imbalance and count_b both say how many images of Y are used")
        if self.imbalance is not None and not 0 <= self.imbalance < 100:
            raise ValueError(f"imbalance is {self.imbalance} %, but must be in [0, 100)")

    def images(self, part: str = "train") -> Images:
        """X and Y."""
        if part == "train":
            domains = self.domains()
            return {"X": domains.a, "Y": domains.b}
        tests = self.tests()
        if tests is None or (self.test_a is None and not all(map(Path.is_dir, tests))):
            return {"X": (), "Y": ()}
        return {name: list_images(folder) for name, folder in zip("XY", tests, strict=True)}

    def truth(
        self, pictures: Sequence[Picture], source: str, target: str, part: str
    ) -> list[Picture] | None:
        """Those of the same names, where all of them have one."""
        from ..measuring.evaluation import paired

        tests = self.tests()
        found = self.folders() if part == "train" or tests is None else tests
        of_set = dict(zip("XY", found, strict=True))
        files = [picture for picture in pictures if isinstance(picture, Path)]
        made = paired(files, of_set[source], of_set[target])
        return None if made is None else [*made]

    def test_sets(self, transform: Transform) -> Sets:
        """See `Data`."""
        from ..measuring.evaluation import find_sets

        folders = self.tests()
        if folders is None:
            raise ParameterError("there are no test images to evaluate on")
        return find_sets(folders, transform=transform)

    def has_tests(self) -> bool:
        """See `Data`."""
        return self.tests() is not None

    def folders(self) -> tuple[Path, Path]:
        """The folders of training images of X and of Y.

        Raises:
            ParameterError: they are not there.
        """
        return folders_of(self.data, self.data_a, self.data_b)

    def domains(self) -> Domains:
        """The training images of both domains.

        Raises:
            ParameterError: the folders are missing, empty, or have too few images.
        """
        return find_domains(
            self.folders(), imbalance=self.imbalance, count_b=self.count_b, seed=self.subset_seed,
            least=self.fewest,
        )  # fmt: skip

    def tests(self) -> tuple[Path, Path] | None:
        """The folders of test images of X and of Y; None where none are named."""
        if self.test_a is not None and self.test_b is not None:
            return self.test_a, self.test_b
        return None if self.data is None else (self.data / "testA", self.data / "testB")

    def read(self) -> list[Path]:
        """See `Options`."""
        named = [self.data_a, self.data_b, *(self.tests() or ())]
        if self.data is not None:
            named += [self.data / "trainA", self.data / "trainB"]
        return [folder for folder in named if folder is not None and folder.exists()]


@dataclass(frozen=True)
class PairedImages(Data):
    """Pictures in pairs: two folders with the same names, or two pictures side by side in a file.

    Attributes:
        data: a folder with `trainA` and `trainB`; or with `train`, whose pictures are two side by
            side: A the left half, B the right one.
        data_a: in its place, the folder of A …
        data_b: … and that of B.
        test_a: the folder of test images of A; None is `testA` in `data`, where that is.
        test_b: likewise of B.
        direction: which is X, what is translated: `AtoB` has A, `BtoA` has B.
    """

    data: Annotated[Path | None, FREE] = None
    data_a: Annotated[Path | None, FREE] = None
    data_b: Annotated[Path | None, FREE] = None
    test_a: Annotated[Path | None, FREE] = None
    test_b: Annotated[Path | None, FREE] = None
    direction: Literal["AtoB", "BtoA"] = "AtoB"

    tests_are = (
        "data, a folder with testA and testB in it, or test where two pictures are side by side, "
        "or test_a and test_b"
    )

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if (self.test_a is None) != (self.test_b is None):
            raise ValueError("test_a and test_b, the folders of test images, go together")

    def images(self, part: str = "train") -> Images:
        """X and Y, in one order: what is at the same place in both belongs together."""
        folders = self._of_part(part)
        if folders is None:
            return {"X": (), "Y": ()}
        pairs = find_halves(*folders) if len(folders) == 1 else find_pairs(folders)
        first, second = (pairs.a, pairs.b) if self.direction == "AtoB" else (pairs.b, pairs.a)
        return {"X": first, "Y": second}

    def folders(self) -> tuple[Path] | tuple[Path, Path]:
        """That of pictures side by side, or those of A and of B.

        Raises:
            ParameterError: they are not there.
        """
        only = self.data_a is None and self.data_b is None
        halves = halves_in(self.data) if only else None
        return halves or folders_of(self.data, self.data_a, self.data_b)

    def read(self) -> list[Path]:
        """See `Data`."""
        named = [self.data_a, self.data_b, self.test_a, self.test_b]
        if self.data is not None:
            named += [
                self.data / f"{part}{of}" for part in ("train", "test") for of in ("A", "B", "")
            ]
        return [folder for folder in named if folder is not None and folder.exists()]

    def has_tests(self) -> bool:
        """See `Data`."""
        return self.test_a is not None or self.data is not None

    def truth(
        self, pictures: Sequence[Picture], source: str, target: str, part: str
    ) -> list[Picture] | None:
        """Their partners."""
        found = self.images(part)
        partners = dict(zip(found[source], found[target], strict=True))
        return [partners[picture] for picture in pictures] or None

    def test_sets(self, transform: Transform) -> Sets:
        """See `Data`."""
        from ..measuring.evaluation import Sets

        folders = self._of_part("test")
        if folders is None:
            raise ParameterError(f"there are no test images: they are in {self.tests_are}")
        inputs, truth = (tuple(own) for own in self.images("test").values())
        return Sets(inputs, truth, truth, folders, transform)

    def _of_part(self, part: str) -> tuple[Path] | tuple[Path, Path] | None:
        if part == "train":
            return self.folders()
        if self.test_a is not None and self.test_b is not None:
            return self.test_a, self.test_b
        if self.data is None:
            return None
        both = self.data / f"{part}A", self.data / f"{part}B"
        return halves_in(self.data, part) or (both if all(map(Path.is_dir, both)) else None)


@dataclass(frozen=True)
class LabelledImages(Data):
    """Pictures of classes: a folder of folders, an HDF5 file, or two folders.

    Attributes:
        data: a folder in which each folder is a class; or a file `.h5`, with `imgs` and `labels`.
        data_a: in its place, the folder of the class `A` …
        data_b: … and that of `B`.
        test: like data, of test images.
        test_a: in its place, the folder of test images of `A` …
        test_b: … and of `B`.
        classes: which of the classes are used; all where none are named. In place of data, how many
            there are, for what a checkpoint will hold.
        exclude: classes that are not, neither as sources nor as targets.
        per_class: how many pictures of each are trained on: a subset is drawn.
        train_fraction: in its place, the share of each class that is, rounded up.
        test_share: without `test`, the share of each class of `data` that is held out to test on,
            one picture at least.
        test_per_class: in its place, how many pictures of each class are, or what is left by
            `per_class`, if that is fewer; with `test`, how many of each are used.
        subset_seed: of what is drawn: smaller subsets lie in larger ones, and tests stay whatever
            is trained on.
    """

    data: Annotated[Path | None, FREE] = None
    data_a: Annotated[Path | None, FREE] = None
    data_b: Annotated[Path | None, FREE] = None
    test: Annotated[Path | None, FREE] = None
    test_a: Annotated[Path | None, FREE] = None
    test_b: Annotated[Path | None, FREE] = None
    classes: tuple[str, ...] | Count = ()
    exclude: tuple[str, ...] = ()
    per_class: Annotated[int, Ge(2)] | None = None
    train_fraction: Annotated[float, Gt(0), Le(1)] | None = None
    test_share: Annotated[float, Gt(0), Lt(1)] | None = None
    test_per_class: Count | None = None
    subset_seed: int = 0

    tests_are = (
        "test, a folder of classes or an HDF5 file, or test_a and test_b, or test_share or "
        "test_per_class, which hold some of data out"
    )

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        for whole, first, second in (("data", "data_a", "data_b"), ("test", "test_a", "test_b")):
            given = [name for name in (first, second) if getattr(self, name) is not None]
            if len(given) == 1:
                raise ValueError(f"{first} and {second}, the folders of A and of B, go together")
            if given and getattr(self, whole) is not None:
                raise ValueError(f"{whole} and {first} both say where the pictures are")
        if self.per_class is not None and self.train_fraction is not None:
            raise ValueError("per_class and train_fraction both say how many are trained on")
        if self.test_share is not None and self.test_per_class is not None:
            raise ValueError("test_share and test_per_class both say how many are held out")
        if self.test_share is not None and self._tests is not None:
            raise ValueError("test_share holds out some of data, but test names other test images")
        both = [name for name in self.exclude if name in self._named]
        if both:
            raise ValueError(f"the class {both[0]!r} is among both classes and exclude")

    @property
    def class_count(self) -> int:
        """How many classes there are; 0 where nothing says so."""
        if isinstance(self.classes, int):
            return self.classes
        return len(self.classes) or (0 if self._data is None else len(self.class_names()))

    @property
    def has_attributes(self) -> bool:
        """Whether a picture may have several of `class_names`, which are attributes then."""
        return False

    @property
    def _named(self) -> tuple[str, ...]:
        return () if isinstance(self.classes, int) else self.classes

    @property
    def _data(self) -> Classes | None:
        return self.data or _two(self.data_a, self.data_b)

    @property
    def _tests(self) -> Classes | None:
        return self.test or _two(self.test_a, self.test_b)

    def _root(self) -> Classes:
        if self._data is None:
            raise ParameterError(
                "data is missing: a folder of classes or an HDF5 file; or data_a and data_b"
            )
        if isinstance(self.classes, int):
            raise ParameterError(
                f"classes is {self.classes}, but beside data it names those that are used"
            )
        return self._data

    def class_set(self, part: str = "train", only: tuple[str, ...] = ()) -> ClassSet | None:
        """The classes and pictures of a part; None of tests that there are none of.

        Args:
            part: `train` or `test`.
            only: of these classes; all that are used where none are named.

        Raises:
            ParameterError: they are not there, a class has too few, or is not one of training.
        """
        if part == "test" and not self.has_tests():
            return None
        if part == "test" and self._tests is not None:
            whole = self.test_per_class is None
            division = Division(
                test_per_class=self.test_per_class, least=1 if whole else 0, seed=self.subset_seed
            )
            found = find_classes(
                self._tests, only=only or self.class_names(), division=division,
                part="train" if whole else "test", channels=getattr(self, "channels", None),
            )  # fmt: skip
            return found.in_order(only or self.class_names())
        division = Division(
            self.per_class, self.train_fraction,
            None if self._tests is not None else self.test_per_class, self.test_share,
            seed=self.subset_seed,
        )  # fmt: skip
        return find_classes(
            self._root(),
            only=only or self._named,
            exclude=self.exclude,
            division=division,
            part=part,
            channels=getattr(self, "channels", None),
        )

    def images(self, part: str = "train") -> Images:
        """All of them as one set."""
        found = self.class_set(part)
        return {"data": () if found is None else found.pictures}

    def class_names(self) -> tuple[str, ...]:
        """See `Data`."""
        return class_names(self._root(), self._named, self.exclude)

    def folders(self) -> tuple[Path, ...]:
        """The folder, if it is one; or both."""
        return _folders(self._data)

    def left_out(self) -> list[str]:
        """See `Data`; and pictures that are of no class."""
        beside = [] if self.data is None else in_no_class(self.data)
        said = [
            f"{len(beside)} of {self.data}, in no class's folder, such as {file.name}"
            for file in beside[:1]
        ]
        return [*super().left_out(), *said]

    def read(self) -> list[Path]:
        """See `Data`."""
        return [*_folders(self._data), *_folders(self._tests)]

    def has_tests(self) -> bool:
        """See `Data`."""
        given = (self._tests, self.test_share, self.test_per_class)
        return any(own is not None for own in given)

    def test_sets(self, transform: Transform) -> ClassFiles:
        """See `Data`: those of each class, and those of training."""
        from ..measuring.class_evaluation import ClassFiles

        tests, train = self.class_set("test"), self.class_set()
        if tests is None or train is None:
            raise ParameterError(f"there are no test images: they are {self.tests_are}")
        folders = _folders(self._tests or self._root())
        return ClassFiles(tests.of_each(), train.of_each(), folders, transform)


def _two(a: Path | None, b: Path | None) -> dict[str, Path] | None:
    """Two folders as classes."""
    return None if a is None or b is None else {"A": a, "B": b}


def _folders(place: Classes | None) -> tuple[Path, ...]:
    """Those that there are of where classes are."""
    own = (place,) if isinstance(place, Path) else tuple((place or {}).values())
    return tuple(folder for folder in own if folder.is_dir())


def _sides(size: Side) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
