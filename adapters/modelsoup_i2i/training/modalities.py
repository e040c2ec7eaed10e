"""Into how many modalities two domains are split, and how these are found after the last step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from modelsoup import ParameterError, counted

from ..pictures.images import ImageError, list_images
from ..pictures.modalities import DOMAINS, Domain, Modalities, read_modalities
from ..pictures.picture import Picture, read_picture
from ..pictures.transforms import zoomed
from .data import TwoDomains
from .ranges import FREE, Count, Number

if TYPE_CHECKING:
    import numpy as np

    from .session import Session


@dataclass(frozen=True)
class RichAndPoor(TwoDomains):
    """Two folders of unpaired pictures, the first or both of which are split into modalities.

    Attributes:
        k_b: modalities of B; None leaves it one class.
        exclude_target: B is looked at by nobody in training.
    """

    k_b: Count | None = None
    exclude_target: bool = False

    fewest: ClassVar[int] = 1

    def must_fit(self) -> None:
        """See `Options`."""
        super().must_fit()
        if self.k_b is not None and self.exclude_target:
            raise ValueError("k_b splits B, which exclude_target leaves out")

    @cached_property
    def counts(self) -> tuple[int, int] | None:
        """The pictures of A and of B; None where no folders are named."""
        if self.data is None and self.data_a is None and self.data_b is None:
            return None
        domains = self.domains()
        return len(domains.a), len(domains.b)

    def auto(self) -> int:
        """⌈|A| / |B|⌉: so many modalities of A have no more pictures than B each.

        Raises:
            ParameterError: there are no data, or B is the larger domain.
        """
        if self.counts is None:
            raise ParameterError("k is auto, ⌈|A| / |B|⌉, but there are no data: say k")
        a, b = self.counts
        if b > a:
            raise ParameterError(
                f"k is auto, ⌈|A| / |B|⌉, but B has {b} pictures and A {a}: A is the rich domain, "
                f"which is split (exchange data_a and data_b, or say k, and for B k_b)"
            )
        return -(-a // b)


@dataclass(frozen=True)
class Split(RichAndPoor):
    """How modalities are found, and into how many.

    Attributes:
        k: modalities of A; `auto` is ⌈|A| / |B|⌉, as each is to have no more pictures than B.
        embedding: what is clustered: `h`, the encoder's result, or `z`, what the head makes of it.
        normalise: a centroid is the mean of directions, or else of embeddings as they are.
        restarts: of k-means, of which the closest clusters count.
        cluster_seed: of k-means.
        labels: classes of A's pictures that are known, to tell how well modalities agree with them:
            a table `path,label`; None takes A's folders, where it has such.
        columns: pictures of each modality on the page beside the result.
    """

    k: Count | Literal["auto"] = "auto"
    embedding: Literal["h", "z"] = "h"
    normalise: bool = True
    restarts: Count = 1
    cluster_seed: Number = 1234
    labels: Annotated[Path | None, FREE] = None
    columns: Annotated[Count, FREE] = 10

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets of pictures that are looked at."""
        return ("X",) if self.exclude_target else ("X", "Y")

    def clusters(self) -> tuple[int, int]:
        """How many modalities A has, and B; 0 where that is one class.

        Raises:
            ParameterError: there are fewer pictures, or `auto` has nothing to go by.
        """
        if self.k != "auto":
            wanted = (self.k, self.k_b or 0)
            for name, of, k, there in zip(
                ("k", "k_b"), DOMAINS, wanted, self.counts or wanted, strict=True
            ):
                if k > there:
                    raise ParameterError(f"{name} is {k}, but {of} has {counted(there, 'picture')}")
            return wanted
        return self.auto(), self.k_b or 0

    def known(self) -> dict[str, str]:
        """The classes of A's pictures that are known, by their paths.

        Raises:
            ParameterError: `labels` is no table of such, or has none of them.
        """
        folder = self.folders()[0]
        files = list_images(folder)
        if self.labels is not None:
            return read_modalities(self.labels).names(files, folder)
        paths = [file.relative_to(folder) for file in files]
        return {path.as_posix(): path.parts[0] for path in paths if len(path.parts) > 1}

    def split_told(self) -> list[str]:
        """What a log should say of it; and that the domains may be the wrong way round."""
        assert self.counts is not None
        (of_a, of_b), (a, b) = self.clusters(), self.counts
        into = f"A is to have {of_a} modalities, B {of_b or 'is one class'}"
        if b <= a or of_b:
            return [into]
        return [
            into,
            f"warning: B, which stays one class, has {b} pictures and A {a}: A is meant to be the "
            f"rich domain (exchange data_a and data_b, or split B too, by k_b)",
        ]


def find_modalities(s: Session, log: Callable[[str], None]) -> dict[str, float]:
    """Cluster what the network `M` makes of all pictures; centroids stay in it.

    What was found lies beside the samples: `modalities.json`, and a page, `modalities.png`.

    Returns:
        figures: see `measuring.modalities.figures`.
    """
    import torch

    from ..measuring.clusters import spherical_kmeans
    from ..measuring.modalities import figures, told, warnings
    from ..pictures.sheets import save
    from ..use import modalities as use

    o, labeller = s.options, s.networks["M"].eval()
    side = int(labeller.side)  # another than size where an encoder is clustered anew
    transform = zoomed(side)

    def read(picture: Picture) -> np.ndarray | None:
        try:
            prepared = side == o.size
            return transform.for_test(
                s.pictures[picture] if prepared else read_picture(picture, o.channels)
            )
        except ImageError:
            if o.on_bad_image == "error":
                raise
            return None

    folders: dict[Domain, Path] = dict(zip(DOMAINS, o.folders(), strict=True))
    embedded: dict[Domain, tuple[list[str], torch.Tensor]] = {}
    rows, belongs = [], []
    for place, (name, domain, k) in enumerate(zip(o.sets, DOMAINS, o.clusters(), strict=False)):
        files, own = use.embedded(labeller, s.pictures.sets[name], read, threads=o.threads)
        paths = [file.relative_to(folders[domain]).as_posix() for file in files
                 if isinstance(file, Path)]  # fmt: skip
        embedded[domain] = paths, own
        if k:
            clusters = spherical_kmeans(
                own.numpy(), k, restarts=o.restarts, seed=o.cluster_seed, normalise=o.normalise
            )
            rows.append(torch.from_numpy(clusters.centroids))
            belongs += [place] * k
    labeller.centroids.copy_(torch.cat(rows))
    labeller.belongs.copy_(torch.tensor(belongs))
    items = [
        item for domain, (paths, own) in embedded.items()
        for item in use.labelled(labeller, own, paths, domain)
    ]  # fmt: skip
    classes, first, how = use.found_by(labeller, seed=o.cluster_seed, normalised=o.normalise)
    made = Modalities(classes, first, tuple(items), how)
    for line in (*told(made), *(f"warning: {said}" for said in warnings(made, o.counts[1]))):
        log(line)
    if s.shown is not None:
        s.shown.mkdir(parents=True, exist_ok=True)
        use.write(made, s.shown / "modalities.json", "json", {}, force=True)
        page = use.montage(made, use.shown_at(folders, o.size), o.columns)
        save(page, s.shown / "modalities.png")
    return figures(made, o.known())
