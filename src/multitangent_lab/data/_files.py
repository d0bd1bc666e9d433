"""The files of a data set: found in the data directory, else downloaded, always verified.

A file appears under its own name only when it is whole: downloads and unpacked members are
written under a temporary name, checked, and moved. A file that is already there is only read.
"""

import hashlib
import io
import os
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from multitangent_lab._errors import DataError
from multitangent_lab.data._lab import import_lab


@dataclass(frozen=True)
class Archive:
    """A tar archive in the data directory: missing files are unpacked from it, and it stays."""

    name: str
    checksum: str


@dataclass(frozen=True)
class Source:
    """Where the files of a data set belong, what they contain and where to get them.

    Checksums read `"md5:<hex>"` or `"sha1:<hex>"`. Each address ends in `/` and is followed by
    the name of the file, or of the archive if there is one.
    """

    folder: str
    checksums: Mapping[str, str]
    addresses: tuple[str, ...]
    archive: Archive | None = None


def data_directory(data_dir: str | Path | None = None) -> Path:
    """Returns `data_dir`, else `$MULTITANGENT_DATA`, else the user's cache folder.

    Raises:
        DataError: The folder asked for does not exist or is a file. (Only the cache folder is
            created by us, on the first download: a typing error should not cost one.)
    """
    origin = "data_dir" if data_dir else "$MULTITANGENT_DATA"
    chosen = data_dir or os.environ.get("MULTITANGENT_DATA")
    if not chosen:
        return Path(import_lab("pooch").os_cache("multitangent"))
    path = Path(chosen).expanduser().absolute()
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "does not exist"
        raise DataError(
            f"`{origin}` should be a folder. Found '{path}', which {problem}. Try to create it "
            "(missing files are downloaded into it), or leave --data-dir and $MULTITANGENT_DATA "
            "out to use the cache folder, or use --dataset digits, which needs no files."
        )
    return path


def read_files(source: Source, directory: Path, *, download: bool) -> dict[str, bytes]:
    """Returns the verified content of every file of `source`, by name.

    Args:
        source: The files.
        directory: The data directory.
        download: Whether missing files may be downloaded.

    Raises:
        DataError: A file is damaged, or missing and cannot be downloaded.
    """
    folder = directory / source.folder
    missing = {n: c for n, c in source.checksums.items() if not (folder / n).is_file()}
    if missing and source.archive:
        archive = directory / source.archive.name
        if not archive.is_file():
            _download(archive, source.archive.checksum, source, download, folder / min(missing))
        _unpack(archive, source.archive.checksum, missing, folder)
    else:
        for name, checksum in missing.items():
            _download(folder / name, checksum, source, download, folder / name)
    return {name: _read(folder / name, checksum) for name, checksum in source.checksums.items()}


def _read(path: Path, checksum: str) -> bytes:
    return _verified(path.read_bytes(), checksum, path)


def _verified(content: bytes, checksum: str, path: Path) -> bytes:
    algorithm, _, expected = checksum.partition(":")
    digest = hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()
    if digest != expected:
        raise DataError(
            f"'{path}' should have the {algorithm.upper()} checksum {expected}. Found {digest} "
            f"({len(content)} bytes): it is damaged. Try to remove it to download it again, or "
            "point --data-dir elsewhere."
        )
    return content


def _download(path: Path, checksum: str, source: Source, download: bool, wanted: Path) -> None:
    """Downloads `path` from the first address that has it, for the sake of the file `wanted`."""
    reasons = []
    for address in (base + path.name for base in source.addresses):
        try:
            if download:
                return _retrieve(address, checksum, path)
            reasons.append(f"{address}: not tried, because download=False")
        except (OSError, ValueError) as error:  # network and disk; pooch's checksum
            reasons.append(f"{address}: {error}")
    raise DataError(
        f"'{wanted}' should be there, or a network to download it. Found neither:\n  "
        + "\n  ".join(reasons)
        + f"\nTry to save what is at this address as '{path}' by hand, or to point --data-dir to a "
        "folder that holds it, or to use --dataset digits, which needs neither files nor a network."
    )


def _retrieve(address: str, checksum: str, path: Path) -> None:
    # pooch writes to a temporary file, checks it, and moves it to `path`. A server must not offer,
    # and requests not undo, a compression of its own: the checksum is that of the .gz file.
    pooch = import_lab("pooch")
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(),
        chunk_size=2**16,
        headers={"Accept-Encoding": "identity"},
    )
    pooch.retrieve(address, checksum, fname=path.name, path=path.parent, downloader=downloader)
    path.chmod(0o644)  # pooch leaves it to its owner alone; a data directory is often shared


def _unpack(archive: Path, checksum: str, wanted: Mapping[str, str], folder: Path) -> None:
    """Writes the members named in `wanted` (with their checksums) into `folder`, one by one.

    Members are found by the last part of their name, and nothing in the archive says where a
    file is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tarfile.open(fileobj=io.BytesIO(_read(archive, checksum))) as members,
        TemporaryDirectory(dir=folder, prefix=".unpacking-") as temporary,
    ):
        for member in members:
            name = PurePosixPath(member.name).name
            file = members.extractfile(member) if name in wanted else None
            if file:
                partial = Path(temporary, name)
                partial.write_bytes(_verified(file.read(), wanted[name], archive / name))
                os.replace(partial, folder / name)
