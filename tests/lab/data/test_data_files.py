"""Files are found, verified, downloaded whole or not at all, and never written over."""

import io
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from data_files import Server, md5

from multitangent_lab.data import DataError, load_dataset
from multitangent_lab.data._files import Archive, Source, data_directory, read_files

CONTENT = {"one.bin": b"1" * 5000, "two.bin": b"2" * 7000}


def source(*addresses: str) -> Source:
    return Source("set", {name: md5(content) for name, content in CONTENT.items()}, addresses)


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def tree(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Everything below a folder: content and time of the last change, by path."""
    return {
        str(path.relative_to(directory)): (
            path.read_bytes() if path.is_file() else b"",
            path.stat().st_mtime_ns,
        )
        for path in directory.rglob("*")
    }


def test_present_files_are_read_and_nothing_is_written(tmp_path: Path, server: Server) -> None:
    write(tmp_path / "set", CONTENT)
    before = tree(tmp_path)
    assert read_files(source(server.address), tmp_path, download=True) == CONTENT
    assert tree(tmp_path) == before
    assert server.asked == []


def test_missing_files_are_downloaded_once(tmp_path: Path, server: Server) -> None:
    server.files = {f"/{name}": content for name, content in CONTENT.items()}
    for _ in range(2):
        assert read_files(source(server.address), tmp_path, download=True) == CONTENT
    assert server.asked == ["/one.bin", "/two.bin"]
    assert set(tree(tmp_path)) == {"set", "set/one.bin", "set/two.bin"}


@pytest.mark.skipif(sys.platform == "win32", reason="the mode of a file is that of POSIX")
def test_downloaded_files_can_be_read_by_others(tmp_path: Path, server: Server) -> None:
    server.files = {f"/{name}": content for name, content in CONTENT.items()}
    read_files(source(server.address), tmp_path, download=True)
    assert (tmp_path / "set" / "one.bin").stat().st_mode & 0o777 == 0o644


def test_only_the_missing_file_is_downloaded(tmp_path: Path, server: Server) -> None:
    write(tmp_path / "set", {"one.bin": CONTENT["one.bin"]})
    before = tree(tmp_path)["set/one.bin"]
    server.files = {"/two.bin": CONTENT["two.bin"]}
    assert read_files(source(server.address), tmp_path, download=True) == CONTENT
    assert tree(tmp_path)["set/one.bin"] == before


def test_next_address_is_tried(tmp_path: Path, server: Server, unreachable: str) -> None:
    server.files = {f"/good/{name}": content for name, content in CONTENT.items()}
    addresses = (unreachable, server.address + "bad/", server.address + "good/")
    assert read_files(source(*addresses), tmp_path, download=True) == CONTENT


@pytest.mark.parametrize("announce", [True, False], ids=["length known", "length unknown"])
def test_partial_download_is_never_taken_for_a_whole_one(
    tmp_path: Path, server: Server, announce: bool
) -> None:
    server.files = {f"/{name}": content for name, content in CONTENT.items()}
    server.share, server.announce = 0.5, announce
    reason = "IncompleteRead" if announce else "does not match the known hash"
    with pytest.raises(DataError, match=rf"(?s)set/one\.bin' should be there.*{reason}"):
        read_files(source(server.address), tmp_path, download=True)
    assert set(tree(tmp_path)) == {"set"}
    server.share = 1.0
    assert read_files(source(server.address), tmp_path, download=True) == CONTENT


def test_another_content_is_refused(tmp_path: Path, server: Server) -> None:
    server.files = {"/one.bin": b"<html>Please log in to the network</html>"}
    with pytest.raises(DataError, match="does not match the known hash"):
        read_files(source(server.address), tmp_path, download=True)
    assert set(tree(tmp_path)) == {"set"}


def test_damaged_file_is_named_and_left_alone(tmp_path: Path, server: Server) -> None:
    server.files = {f"/{name}": content for name, content in CONTENT.items()}
    write(tmp_path / "set", {**CONTENT, "two.bin": CONTENT["two.bin"][:100]})
    before = tree(tmp_path)
    expected, found = (md5(CONTENT["two.bin"][:n])[4:] for n in (7000, 100))
    message = rf"set/two\.bin' should have the MD5 checksum {expected}\. Found {found} \(100 bytes"
    with pytest.raises(DataError, match=message + ".*Try to remove it.*--data-dir"):
        read_files(source(server.address), tmp_path, download=True)
    assert tree(tmp_path) == before
    assert server.asked == []


def test_without_a_network_the_error_says_what_is_needed(tmp_path: Path, unreachable: str) -> None:
    with pytest.raises(DataError, match=r"should be there.*Found neither") as error:
        read_files(source(unreachable, unreachable + "mirror/"), tmp_path, download=True)
    message = str(error.value)
    assert "http://127.0.0.1:9/one.bin: " in message
    assert "http://127.0.0.1:9/mirror/one.bin: " in message
    assert f"'{tmp_path}/set/one.bin'" in message
    assert "--dataset digits" in message


def test_download_false_asks_nobody(tmp_path: Path, server: Server) -> None:
    address = server.address + "one.bin"
    with pytest.raises(DataError, match=f"{address}: not tried, because download=False"):
        read_files(source(server.address), tmp_path, download=False)
    assert server.asked == []
    assert tree(tmp_path) == {}


def packed(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def archived(archive: bytes, *addresses: str) -> Source:
    return replace(source(*addresses), archive=Archive("set.tar.gz", md5(archive)))


def test_archive_is_downloaded_and_unpacked(tmp_path: Path, server: Server) -> None:
    archive = packed({f"set/{name}": content for name, content in CONTENT.items()})
    server.files = {"/set.tar.gz": archive}
    for _ in range(2):
        found = read_files(archived(archive, server.address), tmp_path, download=True)
        assert found == CONTENT
    assert server.asked == ["/set.tar.gz"]
    assert set(tree(tmp_path)) == {"set", "set/one.bin", "set/two.bin", "set.tar.gz"}


def test_archive_put_there_by_hand_needs_no_network(tmp_path: Path) -> None:
    archive = packed({f"set/{name}": content for name, content in CONTENT.items()})
    write(tmp_path, {"set.tar.gz": archive})
    assert read_files(archived(archive), tmp_path, download=False) == CONTENT


def test_unpacking_leaves_present_files_alone(tmp_path: Path) -> None:
    archive = packed({f"set/{name}": content for name, content in CONTENT.items()})
    write(tmp_path, {"set.tar.gz": archive})
    write(tmp_path / "set", {"one.bin": CONTENT["one.bin"]})
    before = tree(tmp_path)["set/one.bin"]
    assert read_files(archived(archive), tmp_path, download=False) == CONTENT
    assert tree(tmp_path)["set/one.bin"] == before


def test_archive_cannot_write_elsewhere(tmp_path: Path) -> None:
    members = {
        "../evil.bin": b"evil",
        str(tmp_path / "evil.bin"): b"evil",
        "../../one.bin": CONTENT["one.bin"],
        "set/two.bin": CONTENT["two.bin"],
    }
    directory = tmp_path / "data"
    write(directory, {"set.tar.gz": packed(members)})
    assert read_files(archived(packed(members)), directory, download=False) == CONTENT
    assert set(tree(tmp_path)) == {
        "data",
        "data/set",
        "data/set.tar.gz",
        "data/set/one.bin",
        "data/set/two.bin",
    }


def test_unpacked_member_is_verified_before_it_appears(tmp_path: Path) -> None:
    archive = packed({"set/one.bin": CONTENT["one.bin"], "set/two.bin": b"another"})
    write(tmp_path, {"set.tar.gz": archive})
    with pytest.raises(DataError, match=r"set\.tar\.gz/two\.bin' should have the MD5"):
        read_files(archived(archive), tmp_path, download=False)
    assert set(tree(tmp_path)) == {"set", "set/one.bin", "set.tar.gz"}


def test_without_a_network_the_error_names_file_and_archive(
    tmp_path: Path, unreachable: str
) -> None:
    with pytest.raises(DataError, match=r"set/one\.bin' should be there") as error:
        read_files(archived(b"", unreachable), tmp_path, download=True)
    assert "http://127.0.0.1:9/set.tar.gz: " in str(error.value)
    assert f"as '{tmp_path}/set.tar.gz' by hand" in str(error.value)


def test_data_directory_is_argument_then_environment_then_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argument, environment = tmp_path / "argument", tmp_path / "environment"
    argument.mkdir()
    environment.mkdir()
    monkeypatch.setenv("MULTITANGENT_DATA", str(environment))
    assert data_directory(argument) == data_directory(str(argument)) == argument
    assert data_directory() == environment
    monkeypatch.setenv("MULTITANGENT_DATA", "")
    assert data_directory().name == "multitangent"
    monkeypatch.chdir(tmp_path)
    assert data_directory("argument") == argument


@pytest.mark.parametrize(
    ("name", "found"), [("nowhere", "does not exist"), ("file", "is not a folder")]
)
def test_wrong_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, found: str
) -> None:
    write(tmp_path, {"file": b""})
    message = rf"should be a folder\. Found '{tmp_path}/{name}', which {found}\. Try"
    with pytest.raises(DataError, match="`data_dir` " + message):
        load_dataset("mnist", tmp_path / name)
    monkeypatch.setenv("MULTITANGENT_DATA", str(tmp_path / name))
    with pytest.raises(DataError, match=r"`\$MULTITANGENT_DATA` " + message):
        load_dataset("mnist")
    assert len(load_dataset("digits").train) == 1150


@pytest.mark.parametrize(("name", "module"), [("digits", "sklearn"), ("mnist", "pooch")])
def test_missing_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, f"{module}.datasets", None)
    data_dir = None if name == "digits" else tmp_path
    with pytest.raises(ImportError, match=rf"`{module}.* pip install 'multitangent\[lab\]'"):
        load_dataset(name, data_dir)


def test_import_is_light() -> None:
    heavy = "{'sklearn', 'pooch', 'requests', 'pandas', 'lightning'}"
    code = f"import sys, multitangent_lab.data; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr
