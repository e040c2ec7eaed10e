"""The same trees on a real Dask cluster and a real Ray, each of two workers on this machine."""

from __future__ import annotations

import gc
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file
from trainers import network

import modelsoup
from modelsoup import RunError, Store, parse_tree
from modelsoup.running.executors import executor_from

SOUP = [sys.executable, "-m", "modelsoup"]
TESTS = str(Path(__file__).parent)
# No word to Ray's makers, and a token of our own: else Ray puts one into the home folder.
RAY = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}  # fmt: skip
# A trainer that lies beside the plan, where a cluster's workers would not look for it.
BESIDE = """
import os
from trainers import Add

class Told(Add):
    def train(self, job):
        (job.work / "pids").write_text(f"{os.getpid()} {os.getppid()}")
        super().train(job)
        job.report(1.0, {"gpu": float(os.environ.get("CUDA_VISIBLE_DEVICES") == "0")})
"""
TREE = """soup: 1
models: {a: a.safetensors, b: b.safetensors, c: c.safetensors, d: d.safetensors}
defaults: {merge: {beta: 0.25}, finetune: {trainer: "beside:Told", add: 1}}
tree: {pair: [a, b, c, d]}
"""
TWO = """soup: 1
models: {a: a.safetensors, b: b.safetensors}
tree: {of: [a, b], finetune: {trainer: "beside:Told"}}
"""
SLOW = TWO.replace('Told"', 'Told", steps: 20, pause: 0.1')


# --- clusters ----------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.needs(name)) for name in ("dask", "ray")],
)
def where(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[str]:
    """What `--executor` is given; both clusters have two workers, and one GPU by their own word."""
    if request.param == "dask":
        yield from dask_cluster(tmp_path_factory.mktemp("dask"))
    else:
        yield from local_ray()


def dask_cluster(folder: Path) -> Iterator[str]:
    """A scheduler and two workers, in a folder that is not the plan's."""
    address = f"127.0.0.1:{free_port()}"
    dask = [sys.executable, "-m", "dask"]
    port = address.partition(":")[2]
    worker = ["worker", address, "--nthreads", "1", "--no-dashboard"]
    without = {"CUDA_VISIBLE_DEVICES": ""}
    started = [
        started_in(folder, [*dask, "scheduler", "--port", port, "--no-dashboard"], without),
        started_in(folder, [*dask, *worker], without),
        started_in(folder, [*dask, *worker, "--resources", "GPU=1"], {"CUDA_VISIBLE_DEVICES": "0"}),
    ]
    try:
        wait_for(lambda: answers(address))
        yield f"dask://{address}"
    finally:
        end(started)


def local_ray() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY.items():
            patch.setenv(name, value)
        import ray  # reads them when it is imported

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what will change in Ray
            ray.init(
                num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False,
                logging_level="error",
            )  # fmt: skip
        yield "ray"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # Ray does not wait for its processes
            ray.shutdown()
            gc.collect()


def started_in(folder: Path, command: list[str], more: dict[str, str]) -> subprocess.Popen[bytes]:
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=folder, env={**os.environ, **more}, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in reversed(processes):
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def answers(address: str) -> bool:
    host, _, port = address.partition(":")
    try:
        socket.create_connection((host, int(port)), 1).close()
    except OSError:
        return False
    return True


def wait_for(what: Any, seconds: float = 150) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


# --- trees -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for number, name in enumerate("abcd"):
        save_file(network(number), tmp_path / f"{name}.safetensors")
    (tmp_path / "beside.py").write_text(BESIDE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", TESTS, prepend=os.pathsep)
    for name, value in RAY.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def run(folder: Path, where: str, text: str = TREE, **more: Any) -> modelsoup.RunReport:
    tree, _ = parse_tree(text, folder=folder)
    with executor_from(where) as executor:
        return modelsoup.run(
            tree, folder / "out.safetensors", store=folder / "store", executor=executor,
            force=True, **more,
        )  # fmt: skip


def in_threads(folder: Path, text: str = TREE) -> bytes:
    """What the tree gives without a cluster, in a store of its own."""
    tree, _ = parse_tree(text, folder=folder)
    report = modelsoup.run(tree, folder / "threads.safetensors", store=folder / "threads")
    return report.output.read_bytes()


def soup(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*SOUP, *arguments], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def is_sound(folder: Path) -> bool:
    store = Store(folder)
    return all(store.intact(entry.key) for entry in store.entries())


def test_a_cluster_gives_the_same_bytes_as_threads(folder: Path, where: str) -> None:
    states = []
    report = run(folder, where, watch=lambda event: states.append(event.state))
    assert report.output.read_bytes() == in_threads(folder)
    assert len(report.computed) == 6
    assert "done" in states
    assert run(folder, where).computed == ()


def test_resources_of_a_plan_are_honoured(folder: Path, where: str) -> None:
    report = run(folder, where, TREE.replace("add: 1", "add: 1, resources: {gpus: 1}"))
    trained = [record for record in report.records.values() if record["operation"] == "finetune"]
    assert [record["metrics"]["gpu"] for record in trained] == [1.0] * 3


def test_a_node_that_wants_what_no_worker_has_is_told(folder: Path, where: str) -> None:
    begin = time.monotonic()
    what = {"dask": "worker of the cluster offers GPU", "ray": "node of the cluster has gpus"}
    said = f"root: no {what[where[:4].rstrip(':')]}: 2$"
    with pytest.raises(RunError, match=said):
        run(folder, where, TWO.replace('Told"', 'Told", resources: {gpus: 2}'))
    assert time.monotonic() - begin < 40
    assert [e.record["operation"] for e in Store(folder / "store").entries()] == ["merge"]


def test_a_trainers_error_is_its_own_sentence(folder: Path, where: str) -> None:
    text = TWO.replace("beside:Told", "trainers:Fails")
    with pytest.raises(RunError) as caught:
        run(folder, where, text)
    (line,) = str(caught.value).splitlines()
    said = r"root: the trainer 'writes' failed: RuntimeError: the learning rate is a poem \(log: .*"
    assert re.fullmatch(said, line)
    assert [e.record["operation"] for e in Store(folder / "store").entries()] == ["merge"]
    assert is_sound(folder / "store")
    assert run(folder, where, TWO).computed == ("root",)


def test_a_worker_killed_in_the_middle_is_survived(folder: Path, where: str) -> None:
    killed = []

    def kill(event: modelsoup.running.runner.Event) -> None:
        if event.metrics.get("step", 0) >= 3 and not killed:
            (pids,) = (folder / "store" / "work").glob("*/pids")
            itself, above = map(int, pids.read_text().split())
            killed.append(above if where.startswith("dask") else itself)
            os.kill(killed[0], signal.SIGKILL)

    report = run(folder, where, SLOW, watch=kill)
    assert killed
    assert report.output.read_bytes() == in_threads(folder, SLOW)
    log = Store(folder / "store").log(report.records["root"]["key"]).read_text()
    assert "resumed at" in log  # what it had done was not done again


def test_a_node_that_kills_its_workers_is_given_up(folder: Path, where: str) -> None:
    text = TWO.replace("beside:Told", "trainers:Dies")
    with pytest.raises(RunError, match="root: its worker was lost 3 times: "):
        run(folder, where, text.replace('Dies"', 'Dies", add: 9'))
    assert is_sound(folder / "store")
    assert run(folder, where, text).computed == ("root",)  # dies once


def test_the_command_line_runs_on_a_cluster_and_goes_on_after_ctrl_c(folder, where) -> None:
    (folder / "tree.yaml").write_text(SLOW)
    command = ("run", "tree.yaml", "--executor", where, "--store", "store", "--workers", "2")
    process = subprocess.Popen(
        [*SOUP, *command], cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: any(map(steps, (folder / "store" / "logs").glob("*.progress.json"))))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "the same command goes on" in stderr
    assert "Traceback" not in stderr
    soup(folder, "store", "verify", "--store", "store")
    done = soup(folder, *command)
    assert "reused" in done.stdout
    assert (folder / "soup.safetensors").read_bytes() == in_threads(folder, SLOW)


def steps(progress: Path) -> float:
    return json.loads(progress.read_bytes() or b"{}").get("metrics", {}).get("step", 0)


# --- addresses ---------------------------------------------------------------------------------


@pytest.mark.needs("ray")
@pytest.mark.slow
def test_the_address_of_a_running_ray_will_do(folder: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    ray = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
    head = [
        ray, "start", "--head", "--block", "--num-cpus", "2", f"--port={free_port()}",
        f"--ray-client-server-port={address.partition(':')[2]}", "--include-dashboard=false",
    ]  # fmt: skip
    temporary = Path(tempfile.mkdtemp(prefix="soup-ray-"))  # pytest's are too long for sockets
    started = started_in(temporary, [*head, f"--temp-dir={temporary}"], {})
    # Ray's client gives up after 30 s, which a busy machine may need before it serves the first.
    asks = [sys.executable, "-c", f"import ray; ray.init('ray://{address}')"]
    try:
        wait_for(lambda: answers(address))
        wait_for(lambda: subprocess.run(asks, check=False, capture_output=True).returncode == 0)
        (folder / "tree.yaml").write_text(TREE)
        soup(folder, "run", "tree.yaml", "--executor", f"ray://{address}")
    finally:
        end([started])
        shutil.rmtree(temporary)
    assert (folder / "soup.safetensors").read_bytes() == in_threads(folder)


@pytest.mark.parametrize(
    ("executor", "said"),
    [
        pytest.param(executor, said, marks=pytest.mark.needs(executor.partition(":")[0]))
        for executor, said in (
            ("dask://127.0.0.1:1", "no Dask scheduler answers at 127.0.0.1:1"),
            ("dask://127.0.0.1", "is no address of a Dask scheduler"),
            ("ray://127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
            ("ray://127.0.0.1:x", "is no address of a Ray cluster"),
        )
    ],
)
def test_no_cluster_at_an_address_is_one_sentence(folder, executor, said) -> None:
    (folder / "tree.yaml").write_text(TWO)
    (line,) = soup(folder, "run", "tree.yaml", "--executor", executor, code=1).stderr.splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("package", "executor", "extra"),
    [("distributed", "dask://127.0.0.1:1", "dask"), ("ray", "ray", "ray"),
     ("ray", "ray://127.0.0.1:1", "ray")],
)  # fmt: skip
def test_a_missing_extra_is_one_sentence(folder, package, executor, extra) -> None:
    (folder / "tree.yaml").write_text(TWO)
    without = (
        f"import sys; sys.modules[{package!r}] = None; "
        "from modelsoup.terminal.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", without, "run", "tree.yaml", "--executor", executor],
        cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert f"pip install -e '.[{extra}]' in a clone" in line
    assert done.returncode == 1


@pytest.mark.needs("ray")
def test_a_local_ray_says_at_once_what_it_will_never_have(folder: Path) -> None:
    (folder / "tree.yaml").write_text(TWO.replace('Told"', 'Told", resources: {gpus: 99}'))
    stderr = soup(folder, "run", "tree.yaml", "--executor", "ray", code=1).stderr
    assert "root: the Ray that was started here has no gpus: 99" in stderr


@pytest.mark.parametrize(
    ("wait", "cancel", "waits"),
    [(True, False, True), (True, True, False), (False, False, False), (False, True, False)],
)
def test_what_is_cancelled_is_not_waited_for(wait: bool, cancel: bool, waits: bool) -> None:
    """As one asks Dask's own executor, which has no word for it."""
    from modelsoup.running.executors import DaskExecutor

    class Client:
        asked: list[bool] = []  # noqa: RUF012

        def get_executor(self, **_: object) -> Client:
            return self

        def shutdown(self, wait: bool) -> None:
            self.asked.append(wait)

    DaskExecutor(Client()).shutdown(wait, cancel_futures=cancel)
    assert Client.asked == [waits]
