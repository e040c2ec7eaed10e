"""How fast, how large, how near: what is measured of a model, interleaved and by medians.

Other programs slow a machine down for seconds at a time. So what is compared takes turns, each once
a round, and a ratio is one of medians over the same rounds.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from modelsoup import SoupError

from .versions import load_openvino

Hint = Literal["LATENCY", "THROUGHPUT"]
Arrays = Mapping[Any, np.ndarray]
"""What a model is called with, by the names of its inputs, or their places."""
PEAK = 2.0
"""The range of images in [−1, 1]."""

CPU_INFO = Path("/proc/cpuinfo")

_PEAK_MEMORY = """
import json, sys
from pathlib import Path
from modelsoup_openvino.measure import measured_alone
print(json.dumps(measured_alone(Path(sys.argv[1]))))
"""


@dataclass(frozen=True)
class Speed:
    """Of one model on one machine; times in milliseconds, of one image each.

    Attributes:
        latency: median over rounds, one image at a time, with all cores.
        fastest: the least of them.
        one_thread: median with one thread; None if it was not measured.
        throughput: images a second, as many at a time as OpenVINO wants; None likewise.
    """

    latency: float
    fastest: float
    one_thread: float | None = None
    throughput: float | None = None


def compiled_for(
    model: Any, hint: Hint, *, threads: int | None = None, precision: str = "f32"
) -> Any:
    """A model compiled for this machine's CPU, with OpenVINO's settings for a purpose.

    Args:
        model: an `openvino.Model`, or the path of an IR.
        hint: `LATENCY`, one image at a time; or `THROUGHPUT`, many.
        threads: how many; None is all cores.
        precision: of what is not INT8. OpenVINO would take bfloat16 where the CPU has it, in a
            float32 model too; `f32` makes them comparable.

    Raises:
        VersionError: OpenVINO is missing or of another version.
    """
    ov = load_openvino()
    settings: dict[str, Any] = {"PERFORMANCE_HINT": hint, "INFERENCE_PRECISION_HINT": precision}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    core = ov.Core()
    return core.compile_model(core.read_model(model) if isinstance(model, Path) else model,
                              "CPU", settings)  # fmt: skip


def takes_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call in each round; all calls take turns, the first rounds do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warm_up + rounds):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begun)
    return {name: taken[warm_up:] for name, taken in times.items()}


def speeds(
    models: Mapping[str, Any], example: np.ndarray | Arrays, *, rounds: int = 20,
    others: Mapping[str, Callable[[], object]] | None = None, whole: bool = True,
) -> dict[str, Speed]:  # fmt: skip
    """The speed of several models, all in the same rounds.

    Args:
        models: name → `openvino.Model`, all with inputs of the example's names and shapes.
        example: float32, 1 × channels × height × width; or by name all that they are called with.
        rounds: that count, after two that do not.
        others: name → what else takes turns, such as a forward pass of torch.
        whole: measure one thread and throughput too.
    """
    calls: dict[str, Callable[[], object]] = dict(others or {})
    singles: dict[str, Callable[[], object]] = {}
    for name, model in models.items():
        calls[name] = _one_image(compiled_for(model, "LATENCY"), example)
    taken = takes_turns(calls, rounds)
    if whole:
        for name, model in models.items():
            singles[name] = _one_image(compiled_for(model, "LATENCY", threads=1), example)
    alone = takes_turns(singles, max(3, rounds // 3), warm_up=1) if singles else {}
    found = {}
    for name, times in taken.items():
        found[name] = Speed(
            statistics.median(times) * 1e3,
            min(times) * 1e3,
            statistics.median(alone[name]) * 1e3 if name in alone else None,
            throughput(models[name], example, rounds) if whole and name in models else None,
        )
    return found


def throughput(model: Any, example: np.ndarray | Arrays, images: int) -> float:
    """Images a second, with as many requests at a time as OpenVINO proposes; batches of one."""
    ov = load_openvino()
    compiled = compiled_for(model, "THROUGHPUT")
    queue = ov.AsyncInferQueue(compiled)
    inputs = _inputs(example)
    for _ in range(len(queue)):
        queue.start_async(inputs)
    queue.wait_all()
    begun = time.perf_counter()
    count = max(images, 2 * len(queue))
    for _ in range(count):
        queue.start_async(inputs)
    queue.wait_all()
    return count / (time.perf_counter() - begun)


def psnr(got: np.ndarray, expected: np.ndarray, peak: float = PEAK) -> float:
    """10 · log₁₀(peak² / mean squared error), in dB; infinite where they are equal."""
    error = float(np.mean(np.square(got.astype(np.float64) - expected.astype(np.float64))))
    return math.inf if error == 0 else 10 * math.log10(peak * peak / error)


def ssim(got: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float | None:
    """Mean structural similarity; None for images below 11 pixels.

    Wang, Bovik, Sheikh and Simoncelli, "Image Quality Assessment: From Error Visibility to
    Structural Similarity", IEEE Transactions on Image Processing 13, 2004, equation 13, with its
    Gaussian window of 11 × 11 and σ = 1.5, inside the image only, for each colour. Not
    torchmetrics': that cannot be imported beside a torchvision that does not fit torch.

    Args:
        got: float32, 1 × channels × height × width in [−1, 1] each.
        expected: likewise.
    """
    import torch
    from torch.nn.functional import conv2d

    places = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(places**2) / (2 * 1.5**2))
    line /= line.sum()
    window = torch.outer(line, line)[None, None]
    first, second = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    values = []
    for one, other in zip(got, expected, strict=True):
        if min(one.shape[-2:]) < len(line):
            return None
        x, y = (torch.from_numpy(image).double().transpose(0, 1) for image in (one, other))
        mean_x, mean_y, xx, yy, xy = (
            conv2d(image, window) for image in (x, y, x * x, y * y, x * y)
        )
        luminance = (2 * mean_x * mean_y + first) / (mean_x**2 + mean_y**2 + first)
        structure = (2 * (xy - mean_x * mean_y) + second) / (
            (xx - mean_x**2) + (yy - mean_y**2) + second
        )
        values.append(float((luminance * structure).mean()))
    return statistics.fmean(values)


def mean_psnr(got: Iterable[np.ndarray], expected: Iterable[np.ndarray]) -> float:
    """The mean over images of the PSNR of each; equal images count as 100 dB."""
    values = [min(psnr(a, b), 100.0) for a, b in zip(got, expected, strict=True)]
    return statistics.fmean(values)


def size_on_disk(path: Path) -> int:
    """Bytes of an IR's two files."""
    return path.stat().st_size + path.with_suffix(".bin").stat().st_size


def peak_memory(path: Path) -> dict[str, int]:
    """MiB that a process needs to load a model and translate one image with it, and before.

    A process of its own, without torch: `loaded` is its peak when OpenVINO was imported, `peak`
    after one image.

    Raises:
        SoupError: that process failed.
    """
    command = [sys.executable, "-c", _PEAK_MEMORY, str(path.absolute())]
    done = subprocess.run(  # noqa: S603  # this interpreter, and a path
        command, capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise SoupError(f"the memory of {path} could not be measured: {last}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured_alone(path: Path) -> dict[str, int]:
    """What `peak_memory` runs in its process."""
    load_openvino()
    loaded = _most_memory()
    compiled = compiled_for(path, "LATENCY")
    compiled([np.zeros(port.shape, port.element_type.to_dtype()) for port in compiled.inputs])
    return {"loaded": loaded, "peak": _most_memory()}


def machine() -> dict[str, str]:
    """What a figure depends on: processor, cores, load, Python."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
    }


def as_json(found: Mapping[str, Speed]) -> dict[str, dict[str, float | None]]:
    """For reports, rounded to what can be meant."""
    return {
        name: {key: None if value is None else round(value, 3) for key, value in asdict(s).items()}
        for name, s in found.items()
    }


def _one_image(compiled: Any, example: np.ndarray | Arrays) -> Callable[[], object]:
    request, inputs = compiled.create_infer_request(), _inputs(example)
    return lambda: request.infer(inputs)


def _inputs(example: np.ndarray | Arrays) -> dict[Any, np.ndarray]:
    """An image alone is the only input there is."""
    return {0: example} if isinstance(example, np.ndarray) else dict(example)


def _most_memory() -> int:
    """MiB that this process has had at most since it began."""
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return round(next(int(v.split()[1]) for v in lines if v.startswith("VmHWM")) / 1024)
    except (OSError, StopIteration):
        import resource  # on Linux this would count the parent's memory too

        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(kib / (1 << 20 if sys.platform == "darwin" else 1 << 10))


def saturates() -> bool:
    """Whether this processor may cut off sums in INT8: an x86 without VNNI adds in 16 bits."""
    flags = _flags()
    return "avx2" in flags and not any("vnni" in flag for flag in flags)


def _processor() -> str:
    """The vector extensions that decide how fast INT8 is; a model name is often only a family."""
    known = [flag for flag in ("avx2", "avx512_vnni", "avx_vnni", "amx_int8") if flag in _flags()]
    model = _cpu_info().get("model name", platform.processor() or platform.machine())
    return f"{model} ({', '.join(known)})"


def _flags() -> list[str]:
    return _cpu_info().get("flags", "").split()


def _cpu_info() -> dict[str, str]:
    """What Linux tells of a processor; nothing elsewhere."""
    try:
        text = CPU_INFO.read_text("utf-8")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
