"""The trainer `cyclegan`: its options, and what it tells the core. Importable without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modelsoup import Job, ParameterError, SoupError, how_to_install

from .data import Domains, Mode, Transform, find_domains, folders_of
from .losses import PRESETS, Grouping, LossWeights, Preset, imbalance_degree, loss_weights
from .metric_names import METRICS, must_be_known
from .shapes import MULTIPLE, DiscriminatorShape, GeneratorShape, Shape, layer_groups, model_tensors

if TYPE_CHECKING:
    import numpy as np
    import torch

    from .evaluation import Sets
    from .session import Session

_INDIFFERENT = frozenset({
    "data", "data_a", "data_b", "test_a", "test_b", "device", "channels_last", "compile",
    "threads", "cache_mb", "checkpoint_every", "sheet_every", "tensorboard", "samples", "evaluate",
})  # fmt: skip
"""Options that do not decide the result, but for the rounding of another device or layout. The
data do by their content, wherever they lie."""


@dataclass(frozen=True)
class CycleGANOptions:
    """What a plan may say to the trainer.

    Attributes:
        data: a folder with `trainA` (X) and `trainB` (Y), relative to the plan as all folders are.
        data_a: in its place, the folder of X …
        data_b: … and that of Y.
        test_a: the folder of test images of X; None is `testA` in `data`, where that is.
        test_b: likewise of Y.
        imbalance: percent by which Y is to be smaller than X: a subset is drawn.
        count_b: in its place, how many images of Y are used.
        subset_seed: of the subset, in which smaller ones of the same seed lie.
        mode: how pictures come to size: see `modelsoup_i2i.data.Transform`.
        load_size: side, or height and width, to which they are resized.
        crop_size: side, or height and width, of what is cropped out of them at random.
        flip: mirror half of them.
        batch: images of each domain in a pass.
        accumulate: passes whose gradients make one step.
        lr: Adam's learning rate.
        epochs: epochs, as long as the larger domain, at this rate.
        decay_epochs: further ones, in which it falls to nearly 0 in a line.
        loss: weights of GAN, cycle and identity loss: `cyclegan` 1, 10, 5; `tree-paper` 1, 5, 10.
        lambda_gan: in place of the preset's weight, as the next two.
        lambda_cycle: of the cycle loss.
        lambda_identity: of the identity loss.
        balance: λ of the imbalance-aware loss (eq. 3 of the tree paper) in [0, 1]; `auto` is (|X| −
            |Y|) / |X|; None leaves both directions equal.
        balance_invert: give λ to Y→X.
        balance_identity: which identity loss belongs to X→Y: that on images of X, or that of its
            generator.
        balance_discriminators: weigh the discriminators' losses too.
        balance_doubled: weights 2λ and 2(1 − λ).
        channels: of the images: 3, or 1 for grey, or 4 for colour and opacity.
        width: channels after the generators' first layer.
        blocks: residual blocks.
        d_width: channels after the discriminators' first layer.
        d_layers: their layers of stride 2.
        init: the seed of what the start lacks: one for all leaves, or they do not average.
        pool_size: images that are kept for each discriminator; 0 for none.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        processes: how many train together, a GPU each; their gradients are averaged.
        precision: 32, or `bf16` for autocast.
        channels_last: the memory layout.
        compile: let `torch.compile` make the networks.
        checkpoint_every: steps between states that a crash leaves; 0 is an epoch.
        sheet_every: steps between pages of samples; 0 for none.
        tensorboard: write events.
        samples: the folder in which pages and events stay, in one of the node's key; None is the
            node's work folder, which goes when the node is done.
        on_bad_image: `error`, or `skip` to leave damaged ones out, of training and of tests.
        threads: that prepare images; 0 is none beside the training.
        cache_mb: MiB of decoded images that are kept in memory.
        evaluate: metrics of X to Y on the test images, for the node's record.
    """

    data: Path | None = None
    data_a: Path | None = None
    data_b: Path | None = None
    test_a: Path | None = None
    test_b: Path | None = None
    imbalance: float | None = None
    count_b: int | None = None
    subset_seed: int = 0
    mode: Mode = "resize_and_crop"
    load_size: int | tuple[int, ...] = 286
    crop_size: int | tuple[int, ...] = 256
    flip: bool = True
    batch: int = 1
    accumulate: int = 1
    lr: float = 2e-4
    epochs: int = 50
    decay_epochs: int = 0
    loss: Preset = "cyclegan"
    lambda_gan: float | None = None
    lambda_cycle: float | None = None
    lambda_identity: float | None = None
    balance: float | Literal["auto"] | None = None
    balance_invert: bool = False
    balance_identity: Grouping = "by_image"
    balance_discriminators: bool = False
    balance_doubled: bool = False
    channels: Literal[1, 3, 4] = 3
    width: int = 64
    blocks: int = 9
    d_width: int = 64
    d_layers: int = 3
    init: int = 0
    pool_size: int = 50
    device: str = "auto"
    processes: int = 1
    precision: Literal[32, "bf16"] = 32
    channels_last: bool = False
    compile: bool = False
    checkpoint_every: int = 0
    sheet_every: int = 1000
    tensorboard: bool = False
    samples: Path | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    threads: int = 2
    cache_mb: int = 2048
    evaluate: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        least = {
            "batch": 1, "accumulate": 1, "decay_epochs": 0, "epochs": 0, "width": 1, "blocks": 1,
            "d_width": 1, "d_layers": 1, "init": 0, "pool_size": 0, "processes": 1,
            "checkpoint_every": 0, "sheet_every": 0, "threads": 0, "cache_mb": 0,
        }  # fmt: skip
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {low}")
        for name in ("load_size", "crop_size"):
            size = getattr(self, name)
            if not isinstance(size, int) and len(size) != 2:
                raise ValueError(f"{name} is {list(size)}, but must be a side, or [height, width]")
        if self.epochs + self.decay_epochs < 1:
            raise ValueError("epochs and decay_epochs are both 0: there is nothing to train")
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr is {self.lr}, but must be positive")
        kind, _, number = self.device.partition(":")
        known = kind in ("auto", "cpu", "cuda")
        if not known or (":" in self.device and (kind != "cuda" or not number.isdigit())):
            raise ValueError(f"device is {self.device!r}, but must be auto, cpu, cuda or cuda:N")
        if self.processes > 1 and number:
            raise ValueError(f"device {self.device} is one GPU, but there are to be processes")
        if (self.test_a is None) != (self.test_b is None):
            raise ValueError("test_a and test_b, the folders of test images, go together")
        if self.evaluate and self.data is None and self.test_a is None:
            raise ValueError(
                "evaluate needs test images: data, a folder with testA and testB in it, or test_a "
                "and test_b"
            )
        for folder in self._read():
            above = () if self.samples is None else (self.samples, *self.samples.absolute().parents)
            if any(place.exists() and place.samefile(folder) for place in above):
                raise ValueError(
                    f"samples is {self.samples}, but what lies in {folder} is taken for pictures "
                    f"to train or to test on"
                )
        if self.imbalance is not None and self.count_b is not None:
            raise ValueError("imbalance and count_b both say how many images of Y are used")
        if self.imbalance is not None and not 0 <= self.imbalance < 100:
            raise ValueError(f"imbalance is {self.imbalance} %, but must be in [0, 100)")
        try:
            must_be_known(self.evaluate)
            transform = self.transform()
            if self.balance != "auto":
                self._weights(self.balance)
        except ParameterError as error:
            raise ValueError(str(error)) from None
        if not transform.crops and self.batch > 1:
            raise ValueError(f"mode {self.mode} leaves images of many sizes, so batch must be 1")
        small = min(transform.crop)
        if transform.crops and self.discriminator().output_size(small) < 1:
            raise ValueError(
                f"crop_size {small} is too small for discriminators of {self.d_layers} layers "
                f"(fewer d_layers see smaller images)"
            )

    def generator(self) -> GeneratorShape:
        """The generators' shape."""
        return GeneratorShape(self.width, self.blocks, self.channels)

    def discriminator(self) -> DiscriminatorShape:
        """The discriminators' shape."""
        return DiscriminatorShape(self.d_width, self.d_layers, self.channels)

    def transform(self) -> Transform:
        """How pictures come to size."""
        return Transform(self.mode, _sides(self.load_size), _sides(self.crop_size), self.flip)

    def domains(self) -> Domains:
        """The images of both domains.

        Raises:
            ParameterError: the folders are missing, empty, or have too few images.
        """
        folders = folders_of(self.data, self.data_a, self.data_b)
        return find_domains(
            folders, imbalance=self.imbalance, count_b=self.count_b, seed=self.subset_seed
        )

    def tests(self) -> tuple[Path, Path] | None:
        """The folders of test images of X and of Y; None where none are named."""
        if self.test_a is not None and self.test_b is not None:
            return self.test_a, self.test_b
        return None if self.data is None else (self.data / "testA", self.data / "testB")

    def _read(self) -> list[Path]:
        """The folders of pictures that there are."""
        named = [self.data_a, self.data_b, *(self.tests() or ())]
        if self.data is not None:
            named += [self.data / "trainA", self.data / "trainB"]
        return [folder for folder in named if folder is not None and folder.exists()]

    def degree(self, domains: Domains) -> float | None:
        """λ of the imbalance-aware loss; with `balance: auto` from how many images there are."""
        if self.balance == "auto":
            return imbalance_degree(len(domains.a), len(domains.b))
        return self.balance

    def weights(self, domains: Domains) -> LossWeights:
        """The weights of all losses."""
        return self._weights(self.degree(domains))

    def decisive(self) -> dict[str, Any]:
        """The options that decide the result, as plain data."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values |= {"load_size": list(_sides(self.load_size))}
        values |= {"crop_size": list(_sides(self.crop_size))}
        return {name: value for name, value in values.items() if name not in _INDIFFERENT}

    def _weights(self, balance: float | None) -> LossWeights:
        gan, cycle, identity = PRESETS[self.loss]
        return loss_weights(
            gan if self.lambda_gan is None else self.lambda_gan,
            cycle if self.lambda_cycle is None else self.lambda_cycle,
            identity if self.lambda_identity is None else self.lambda_identity,
            balance=balance, invert=self.balance_invert, grouping=self.balance_identity,
            discriminators=self.balance_discriminators, doubled=self.balance_doubled,
        )  # fmt: skip


class CycleGAN:
    """Trains four networks on two folders of unpaired images (Zhu et al. 2017)."""

    name = "cyclegan"
    options = CycleGANOptions
    version = "1"
    multiple = MULTIPLE  # of which the generators want heights and widths

    def groups(self, options: CycleGANOptions) -> dict[str, list[str]]:
        """Layer groups for rules."""
        return layer_groups(options.generator(), options.discriminator())

    def tensors(self, options: CycleGANOptions) -> dict[str, tuple[str, Shape]]:
        """What is written."""
        return model_tensors(options.generator(), options.discriminator())

    def identity(self, options: CycleGANOptions) -> dict[str, Any]:
        """What decides the result, beside the images' content."""
        domains = options.domains()
        return {**options.decisive(), "images": [len(domains.a), len(domains.b)]}

    def files(self, options: CycleGANOptions) -> list[Path]:
        """The images that are used, whose content is part of a result's key."""
        domains = options.domains()
        return [*domains.a, *domains.b]

    def session(
        self, options: CycleGANOptions, start: Path | None, *, seed: int,
        frozen: Sequence[str] = (), work: Path | None = None,
    ) -> Session:  # fmt: skip
        """A training that has not begun, for those who make its steps themselves."""
        return _session()(options, start, seed=seed, frozen=frozen, work=work)

    def inputs(
        self, options: CycleGANOptions, network: str, part: str = "train"
    ) -> Iterator[torch.Tensor]:
        """What a generator sees in use: images of `train` or `test`, 1 × C × H × W in [−1, 1]."""
        from .deployment import inputs

        return inputs(options, network, part)

    def tested_on(self, options: CycleGANOptions) -> list[Path]:
        """The test images, by which somebody else may choose among networks."""
        from .deployment import tested_on

        return tested_on(options)

    def quality(
        self, options: CycleGANOptions, network: str, images: Sequence[np.ndarray],
        names: Sequence[str], *, part: str, first: int,
    ) -> dict[str, float]:  # fmt: skip
        """Metrics of a generator's translations of some of `inputs`, by their names."""
        from .deployment import quality

        return quality(options, network, images, names, part=part, first=first)

    def metric_names(self) -> tuple[str, ...]:
        """The names that `quality` knows."""
        return METRICS

    def options_of(self, checkpoint: Path) -> dict[str, Any]:
        """The options that a checkpoint decides, such as width and blocks, and its size."""
        from .deployment import options_of

        return options_of(checkpoint)

    def train(self, job: Job) -> None:
        """Train to the end, or go on from what a crash left in the work folder."""
        options: CycleGANOptions = job.options
        make = _session()
        sets = self._sets(job) if options.evaluate else None  # before hours of training, not after
        if options.processes == 1:
            session = make(options, job.start, seed=job.seed, frozen=job.frozen, work=job.work)
            figures = self._trained(session, job)
        else:
            from .processes import together

            arguments = (options, job.start, job.seed, job.frozen)
            with together(options.processes, options.device, job.work, arguments) as place:
                session = make(
                    options, job.start, seed=job.seed, frozen=job.frozen, work=job.work,
                    place=place,
                )  # fmt: skip
                figures = self._trained(session, job)
        session.save(job.output)
        device = str(session.device)
        del session  # a GPU's memory is wanted for measuring
        if sets is not None and figures["diverged"]:
            job.log("not evaluated: it diverged")
        elif sets is not None:
            self._evaluate(job, sets, device)

    def _trained(self, session: Session, job: Job) -> dict[str, float]:
        """Carry a training out, look at what it makes, and tell the record what it was."""
        from .images import NonfiniteImageError

        job.note(session.told())
        figures = session.run(job.report, job.log)
        if figures["diverged"]:
            return figures
        try:
            constant = session.constant()
        except NonfiniteImageError:
            # Its last step was too large: every weight is finite, and what they make is not.
            job.log("diverged: the translation of a training image holds NaN or infinity")
            figures["diverged"] = 1.0
        else:
            for name in constant:
                job.log(f"{name} gives nearly one picture for all inputs")
            figures["constant"] = float(len(constant))
        job.report(1.0, figures)
        return figures

    def _sets(self, job: Job) -> Sets:
        """The test images, all of which can be measured with the metrics that are asked for."""
        from .evaluation import find_sets
        from .images import left_out

        options: CycleGANOptions = job.options
        folders = options.tests()
        assert folders is not None
        sets, bad = find_sets(folders, transform=options.transform()).must_allow(
            options.evaluate, skip=options.on_bad_image == "skip"
        )
        rest = [said for folder in sets.folders if (said := left_out(folder)) is not None]
        for fault in (*bad, *rest):
            job.log(f"left out of the test images: {fault}")
        return sets

    def _evaluate(self, job: Job, sets: Sets, device: str) -> None:
        """Metrics of a result, for its record. What fails here costs no training."""
        import traceback

        from .evaluation import evaluate_model
        from .images import NonfiniteImageError

        try:
            results = evaluate_model(job.output, sets, metrics=job.options.evaluate, device=device)
        except NonfiniteImageError:
            job.log("diverged: the translation of a test image holds NaN or infinity")
            job.report(1.0, {"diverged": 1.0})
        except Exception as error:  # noqa: BLE001  # a disk, a GPU's memory, a library: all of it
            if not isinstance(error, SoupError):
                job.log(traceback.format_exc())
            job.log(f"not evaluated: {error} (soup i2i evaluate measures the result)")
            job.note({"not evaluated": str(error)})
            job.report(1.0, {"not_evaluated": 1.0})
        else:
            for result in results:
                if result.note:
                    job.log(f"warning: {result.note}")
            job.note({"evaluated": [result.as_json() for result in results]})
            job.report(1.0, {result.name: result.value for result in results})


def _session() -> type[Session]:
    try:
        from .session import Session
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "PIL"):
            raise
        raise SoupError(
            f"training needs {error.name}, which is not installed: {how_to_install('i2i')}"
        ) from None
    return Session


def _sides(size: int | tuple[int, ...]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
