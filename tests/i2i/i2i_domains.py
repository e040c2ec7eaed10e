"""Two small domains of drawn images for tests: discs on dark grounds, squares on bright ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from modelsoup_i2i.pictures.images import save_png

TINY = {
    "width": 4, "blocks": 1, "d_width": 4, "d_layers": 1, "load_size": 18, "crop_size": 16,
    "epochs": 2, "pool_size": 3, "sheet_every": 0, "threads": 1, "device": "cpu",
}  # fmt: skip


def drawing(kind: str, seed: int, size: int) -> np.ndarray:
    """A disc (A) or a square (B) of a random place and shade, size × size × 3."""
    rng = np.random.default_rng((ord(kind), seed))
    y, x = np.mgrid[:size, :size]
    radius = rng.uniform(0.2, 0.35) * size
    cy, cx = rng.uniform(0.35, 0.65, 2) * size
    if kind == "A":
        inside = (y - cy) ** 2 + (x - cx) ** 2 < radius**2
        ground, shade = (30, 30, 60), (200, rng.integers(80, 160), 60)
    else:
        inside = (abs(y - cy) < radius) & (abs(x - cx) < radius)
        ground, shade = (220, 220, 200), (40, rng.integers(80, 160), 190)
    image = np.empty((size, size, 3), np.uint8)
    image[:] = ground
    image[inside] = shade
    return image


def make_domains(root: Path, count_a: int = 6, count_b: int = 4, size: int = 20) -> Path:
    """`trainA`, `trainB`, `testA`, `testB` under a folder, which is returned."""
    for part in ("train", "test"):
        for kind, count in (("A", count_a), ("B", count_b)):
            folder = root / f"{part}{kind}"
            folder.mkdir(parents=True)
            for n in range(count):
                seed = n if part == "train" else 1000 + n
                save_png(drawing(kind, seed, size), folder / f"{n}.png")
    return root


def make_classes(root: Path, counts: dict[str, int], size: int = 36) -> Path:
    """A folder for each class, with so many pictures: a square of a shade of its own, somewhere."""
    for place, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for n in range(count):
            rng = np.random.default_rng((place, n))
            image = np.full((size, size, 3), 20, np.uint8)
            y, x = rng.integers(2, size // 2, 2)
            image[y : y + size // 3, x : x + size // 3, place % 3] = 120 + rng.integers(120)
            save_png(image, root / name / f"{n}.png")
    return root
