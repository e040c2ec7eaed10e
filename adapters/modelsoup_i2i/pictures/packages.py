"""Packages of public registries that happen to ship pictures: fetch one, check it, read its files.

Nothing is fetched unless a command was asked to, and it says what and from where. Each package is
one version, known by its SHA-256: whatever mirror it came from, the content is the same or refused.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from modelsoup import OutputError, ParameterError, SoupError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Package:
    """One version of one package.

    `url` is where it lies on the registry's public host, for those who have no client of it.
    """

    registry: Literal["npm", "debian"]
    name: str
    version: str
    file: str
    size: int
    sha256: str
    url: str
    page: str


def npm(name: str, version: str, size: int, sha256: str) -> Package:
    """A package of the npm registry."""
    file = f"{name}-{version}.tgz"
    return Package(
        "npm", name, version, file, size, sha256,
        f"https://registry.npmjs.org/{name}/-/{file}",
        f"https://www.npmjs.com/package/{name}/v/{version}",
    )  # fmt: skip


def debian(source: str, name: str, version: str, size: int, sha256: str) -> Package:
    """A package of Debian for all architectures."""
    file = f"{name}_{version}_all.deb"
    return Package(
        "debian", name, version, file, size, sha256,
        f"https://deb.debian.org/debian/pool/main/{source[0]}/{source}/{file}",
        f"https://packages.debian.org/{name}",
    )  # fmt: skip


def obtain(
    packages: Sequence[Package], given: Iterable[Path], folder: Path, say: Say
) -> dict[str, Path]:
    """A checked file for each package: one of those given, or else fetched into a folder.

    With any file given, all must be: a command that was told where the files are fetches nothing.

    Raises:
        ParameterError: a given file is none of the packages, or one of them was not given.
        SoupError: one cannot be fetched, or is not what its digest says.
    """
    given = list(given)
    if not given:
        return {package.name: _fetch(package, folder, say) for package in packages}
    found: dict[str, Path] = {}
    for file in given:
        if not file.is_file():
            raise ParameterError(f"there is no package file {file}")
        digest = _sha256(file)
        fits = next((package for package in packages if package.sha256 == digest), None)
        if fits is None:
            wanted = " or ".join(f"{package.file} ({package.sha256[:12]}…)" for package in packages)
            raise ParameterError(
                f"{file} has the SHA-256 {digest[:12]}…, where {wanted} is expected"
            )
        found[fits.name] = file
    missing = [package.file for package in packages if package.name not in found]
    if missing:
        raise ParameterError(f"with --from all package files must be given: add {missing[0]}")
    return found


def read_files(
    archive: Path, wanted: Callable[[PurePosixPath], bool]
) -> Mapping[PurePosixPath, bytes]:
    """The plain files of a `.tgz` or `.deb` that a predicate wants, by their paths.

    Nothing is written to disk, so no path in it can lead anywhere.
    """
    try:
        data = archive.read_bytes()
        if archive.suffix == ".deb":
            data = _member_of_deb(data, "data.tar")
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as tar:
            found = {}
            for member in tar:
                path = PurePosixPath(member.name.removeprefix("./"))
                if member.isfile() and wanted(path):
                    file = tar.extractfile(member)
                    assert file is not None
                    found[path] = file.read()
            return found
    except (OSError, EOFError, tarfile.TarError, ValueError) as error:
        raise SoupError(f"{archive} cannot be read as a package: {error}") from error


def _member_of_deb(data: bytes, start: str) -> bytes:
    """A member of an `ar` archive: 60 bytes of header each, even offsets (man 5 deb)."""
    if not data.startswith(b"!<arch>\n"):
        raise ValueError("it is no Debian package")
    at = 8
    while at + 60 <= len(data):
        name, size = data[at : at + 16].decode("ascii").strip(" /"), int(data[at + 48 : at + 58])
        if name.startswith(start):
            return data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise ValueError(f"it has no {start}")


def _fetch(package: Package, folder: Path, say: Say) -> Path:
    """By the registry's own client where there is one, so that its configured mirror is asked."""
    file = folder / package.file
    size = f"{package.size / 1e6:.1f} MB"
    clients = {
        "npm": ("npm", ["npm", "pack", f"{package.name}@{package.version}", "--silent"]),
        "debian": ("apt-get", ["apt-get", "download", f"{package.name}={package.version}"]),
    }
    client, command = clients[package.registry]
    if shutil.which(client):
        say(f"fetching {package.file} ({size}) with `{' '.join(command)}`")
        done = subprocess.run(  # noqa: S603 (the names above)
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=1800
        )
        if done.returncode == 0 and file.is_file():
            return _checked(file, package)
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        say(f"{client} could not: {said}")
    say(f"fetching {package.file} ({size}) from {package.url}")
    _download(package, file)
    return _checked(file, package)


def _download(package: Package, file: Path) -> None:
    from urllib.request import urlopen

    try:
        with urlopen(package.url, timeout=60) as answer, file.open("wb") as out:  # noqa: S310 (https)
            shutil.copyfileobj(answer, out)
    except OSError as error:
        raise SoupError(
            f"{package.url} cannot be fetched ({getattr(error, 'reason', None) or error}): fetch "
            f"it elsewhere and give the file with --from"
        ) from error


def _checked(file: Path, package: Package) -> Path:
    digest = _sha256(file)
    if digest != package.sha256:
        raise SoupError(
            f"{package.file} has the SHA-256 {digest}, where {package.sha256} is expected: it is "
            f"not used"
        )
    return file


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise OutputError(f"{file} cannot be read: {error.strerror or error}") from error
