"""Label pictures by modality: with an encoder and its centroids, or by what is known of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from modelsoup import MismatchError, OutputError, ParameterError, open_checkpoint, placed

from ..networks.devices import chosen_device
from ..networks.modalities import labeller_in
from ..networks.modality import Labeller
from ..pictures.images import list_images, natural, read_image, to_tensor
from ..pictures.modalities import DOMAINS, Domain, Item, Modalities, class_names, read_modalities
from ..pictures.sheets import grid
from ..pictures.transforms import Transform, zoomed
from .generators import load_network
from .places import pictures_in

FORMATS = ("json", "csv", "folders")
Format = Literal["json", "csv", "folders"]
AT_ONCE = 64  # pictures that are embedded in one pass
THREADS = 2  # that decode
T = TypeVar("T")


def load_labeller(checkpoint: str | Path) -> Labeller:
    """The network `M` of a training of modalities: in eval mode, on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged.
        MismatchError: it holds none, or centroids of several models.
    """
    shapes = {name: info.shape for name, info in open_checkpoint(checkpoint).tensors.items()}
    try:
        told = labeller_in(shapes)
    except MismatchError as error:
        raise MismatchError(f"{checkpoint}: {error}") from None
    made: Labeller = load_network(checkpoint, "M", told)
    must_be_one_models(made, str(checkpoint))
    return made


def must_be_one_models(labeller: Labeller, origin: str) -> None:
    """Check that the centroids are of this very encoder, as far as that can be seen.

    Those that a training finds have length 1; their means with others have not.

    Raises:
        MismatchError: they are not.
    """
    lengths = labeller.centroids.norm(dim=1)
    own = sorted({*labeller.belongs.tolist()})
    if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-2) or own not in ([0], [0, 1]):
        raise MismatchError(
            f"{origin}: M.centroids are none that a training found, which have length 1: so they "
            f"are after a merge, or where it diverged (soup train modality with --start, that "
            f"checkpoint, and its encoder finds them anew with recluster: true and steps: 1)"
        )


def embedded(
    labeller: Labeller, pictures: Sequence[T], read: Callable[[T], np.ndarray | None], *,
    threads: int = THREADS,
) -> tuple[list[T], torch.Tensor]:  # fmt: skip
    """The pictures that could be read, and their embeddings, float32, N × d, on the CPU.

    Args:
        labeller: in eval mode.
        pictures: in order.
        read: gives a picture at the labeller's size, or None for one that is left out.
        threads: that read.
    """
    device = labeller.centroids.device
    kept: list[T] = []
    made: list[torch.Tensor] = [torch.empty(0, labeller.centroids.shape[1])]
    with ThreadPoolExecutor(max(threads, 1)) as pool, torch.inference_mode():
        for first in range(0, len(pictures), AT_ONCE):
            own = pictures[first : first + AT_ONCE]
            read_ones = zip(own, pool.map(read, own), strict=True)
            seen = [(one, to_tensor(image)) for one, image in read_ones if image is not None]
            if seen:
                kept += [one for one, _ in seen]
                images = torch.stack([image for _, image in seen])
                made.append(labeller.embedded(images.to(device)).float().cpu())
    return kept, torch.cat(made)


def labelled(
    labeller: Labeller, embeddings: torch.Tensor, paths: Sequence[str], domain: Domain
) -> list[Item]:
    """Pictures of a domain, by the centroids nearest to their embeddings."""
    place = embeddings.to(labeller.centroids.device)
    labels, scores = labeller.nearest(place, DOMAINS.index(domain))
    return [
        Item(path, domain, label, None if np.isnan(score) else round(score, 6))
        for path, label, score in zip(paths, labels.tolist(), scores.tolist(), strict=True)
    ]


def found_by(labeller: Labeller, **how: Any) -> tuple[tuple[str, ...], int, dict[str, Any]]:
    """Names of the classes, how many are A's, and what `modalities.json` tells of the encoder."""
    belongs = labeller.belongs.tolist()
    k_source, k_target = belongs.count(0), belongs.count(1)
    digest = sha256()
    for name, tensor in sorted(labeller.encoder.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    told = {
        **how, "encoder": digest.hexdigest(), "embedding": labeller.embedding,
        "centroids": [[round(x, 7) for x in row] for row in labeller.centroids.tolist()],
    }  # fmt: skip
    return class_names(k_source, max(k_target, 1)), k_source, told


def modalities_of(
    model: Path, a: Path, b: Path | None = None, *, device: str = "auto"
) -> Modalities:
    """The modalities of all pictures of a folder of A, and of one of B.

    Args:
        model: a checkpoint of the trainer `modality`; or what already says them: a
            `modalities.json`, a table, or a folder of folders.
        a: the folder.
        b: another one, of B.
        device: where a checkpoint's encoder runs.

    Raises:
        ImageError: a folder is missing, or a picture damaged.
        ParameterError: there are no pictures, or the file lacks some of them.
        CheckpointError, MismatchError: see `load_labeller`.
    """
    folders: dict[Domain, Path] = {"A": a} if b is None else {"A": a, "B": b}
    files = {domain: list_images(folder) for domain, folder in folders.items()}
    for domain, own in files.items():
        if not own:
            raise ParameterError(f"the folder {folders[domain]} holds no images")
    paths = {
        domain: [file.relative_to(folders[domain]).as_posix() for file in own]
        for domain, own in files.items()
    }
    if model.is_dir() or model.suffix.lower() in (".json", ".csv"):
        given = read_modalities(model)
        items = []
        for domain, own in files.items():
            if domain == "B" and not given.of("B") and len(given.classes) == given.k_source + 1:
                items += [Item(path, domain, given.k_source) for path in paths[domain]]
                continue
            given.labels(own, folders[domain], domain)  # each has one
            items += [given.of(domain)[path] for path in paths[domain]]
        made = Modalities(given.classes, given.k_source, tuple(items), given.found)
        sizes = made.sizes
        for label in range(made.k_source):
            if not sizes[label] and given.sizes[label]:
                raise ParameterError(
                    f"the modality {made.classes[label]!r} of {model} is empty: none of its "
                    f"pictures is in {a}"
                )
        return made
    labeller = load_labeller(model)
    where = chosen_device(device)
    transform = zoomed(int(labeller.side))
    found: list[Item] = []
    for domain, own in files.items():
        _, embeddings = embedded(
            labeller.to(where), own,
            lambda file: transform.for_test(read_image(file, labeller.channels)),
        )  # fmt: skip
        found += labelled(labeller, embeddings, paths[domain], domain)
    classes, first, told = found_by(labeller)
    return Modalities(classes, first, tuple(found), told)


def montage(own: Modalities, read: Callable[[Domain, str], np.ndarray], columns: int = 10) -> Any:
    """A page with a row for each modality, from its centroid outwards; what lacks is blank.

    Args:
        own: of pictures.
        read: a picture, by its domain and path.
        columns: pictures of a row; of more, some that are as far apart as they lie.

    Raises:
        ParameterError: columns are fewer than 1.
    """
    if columns < 1:
        raise ParameterError(f"columns is {columns}, where at least 1 is expected")
    of_each: list[list[Item]] = [[] for _ in own.classes]
    for item in own.items:
        of_each[item.label].append(item)
    sizes = own.sizes
    rows: list[list[np.ndarray]] = []
    for items in of_each:
        # Those that were not found by a centroid come by their names.
        items.sort(key=lambda item: (-(item.score or 0.0), natural(item.path)))
        chosen = [items[len(items) * n // columns] for n in range(columns)] if (
            len(items) > columns
        ) else items  # fmt: skip
        rows.append([read(item.domain, item.path) for item in chosen])
    some = next(picture for row in rows for picture in row)
    blank = np.full_like(some, 255)
    there = [n for n, row in enumerate(rows) if row or n < own.k_source]
    full = [rows[n] + [blank] * (columns - len(rows[n])) for n in there]
    return grid(full, None, [f"{own.classes[n]}: {sizes[n]}" for n in there])


def shown_at(folders: Mapping[Domain, Path], side: int) -> Callable[[Domain, str], np.ndarray]:
    """What reads pictures of folders as a montage shows them."""
    transform = Transform("centre_crop", (side, side), (side, side))
    return lambda domain, path: transform.for_test(read_image(folders[domain] / path))


def write(
    own: Modalities, output: Path, kind: Format, folders: Mapping[Domain, Path], *,
    copy: bool = False, force: bool = False,
) -> None:  # fmt: skip
    """Write modalities as a file, or as a folder for each class, for a trainer of classes.

    Args:
        own: of the pictures of the folders.
        output: the file, or the folder of folders.
        kind: `json`, `csv` or `folders`.
        folders: of each domain.
        copy: of `folders`: copies of the pictures, not links.
        force: replace what is there.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    if kind != "folders":
        with placed(output, force=force) as partial:
            partial.write_text(own.as_json() if kind == "json" else own.as_csv(), "utf-8")
        return
    for folder in folders.values():
        if output.resolve().is_relative_to(folder.resolve()):
            raise OutputError(f"the output {output} lies in {folder}, whose pictures are labelled")
    sources = [folders[item.domain] / item.path for item in own.items]
    names = [Path(own.classes[item.label]) / item.path for item in own.items]
    with pictures_in(output, names, force=force) as partials:
        for source, partial in zip(sources, partials, strict=True):
            if copy:
                shutil.copyfile(source, partial)
            else:
                partial.symlink_to(source.resolve())
