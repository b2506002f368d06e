"""file:// URIs and plain paths."""

import hashlib
from pathlib import Path

import pytest

from automerge.errors import StorageError
from automerge.storage import download, fetch, list_objects, read_range, upload


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.bin", "a #1?.bin", "sub/c%20.bin"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode())
    return tmp_path / "in"


KEYS = ["a #1?.bin", "b.bin", "sub/c%20.bin"]


def test_plain_paths_and_uris_name_the_same_files(folder: Path) -> None:
    for uri in (str(folder), f"{folder}/", folder.as_uri(), f"file://localhost{folder}"):
        entries = list_objects(uri)
        assert [entry.key for entry in entries] == KEYS
        assert [entry.size for entry in entries] == [len(key) for key in KEYS]
        assert [read_range(entry.uri, 0, 100) for entry in entries] == [key.encode() for key in KEYS]
    (entry,) = list_objects((folder / "sub" / "c%20.bin").as_uri())
    assert entry.key == "c%20.bin"
    assert read_range(entry.uri, 1, 3) == b"ub"
    assert read_range(entry.uri, 100, 103) == b""


def test_the_etag_changes_with_the_content(folder: Path) -> None:
    before = list_objects(str(folder / "b.bin"))
    (folder / "b.bin").write_bytes(b"other")
    assert list_objects(str(folder / "b.bin")) != before


def test_a_folder_is_fetched_as_copies(folder: Path, tmp_path: Path) -> None:
    files = fetch(folder.as_uri(), tmp_path / "out")
    assert [file.path for file in files] == [tmp_path / "out" / key for key in KEYS]
    for key, file in zip(KEYS, files, strict=True):
        assert file.sha256 == hashlib.sha256(key.encode()).hexdigest()
        assert (file.size, file.transferred) == (len(key), len(key))
    # Whoever changes the copy does not change the original.
    (tmp_path / "out" / "b.bin").open("r+b").write(b"X")
    assert (folder / "b.bin").read_bytes() == b"b.bin"


def test_one_file_is_fetched_under_its_own_name(folder: Path, tmp_path: Path) -> None:
    (file,) = fetch(str(folder / "b.bin"), tmp_path / "out")
    assert file.path == tmp_path / "out" / "b.bin"


def test_a_file_onto_itself_stays(folder: Path) -> None:
    got = download(str(folder / "b.bin"), folder / "b.bin")
    assert (got.transferred, got.path.read_bytes()) == (0, b"b.bin")


def test_a_wrong_digest_leaves_the_old_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(StorageError, match="the content has sha256"):
        download(str(folder / "b.bin"), tmp_path / "out", "00")
    assert (tmp_path / "out").read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in", "out"]


def test_upload_is_a_copy_too(folder: Path, tmp_path: Path) -> None:
    assert [entry.key for entry in upload(folder, f"file://{tmp_path}/out")] == KEYS
    assert [entry.key for entry in list_objects(str(tmp_path / "out"))] == KEYS
    upload(folder / "b.bin", f"{tmp_path}/into/")
    assert (tmp_path / "into" / "b.bin").read_bytes() == b"b.bin"
    upload(folder / "b.bin", f"{tmp_path}/named.bin")
    assert (tmp_path / "named.bin").read_bytes() == b"b.bin"


def test_what_goes_wrong_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as error:
        list_objects(str(folder / "b.bim"))
    assert str(error.value) == f"{folder}/b.bim: no such file; did you mean {folder}/b.bin?"
    for uri in (f"{tmp_path}/absent/x", f"file://{tmp_path}/absent/x"):
        with pytest.raises(StorageError, match="no such file"):
            download(uri, tmp_path / "x")
        with pytest.raises(StorageError, match="no such file"):
            read_range(uri, 0, 1)
    with pytest.raises(StorageError, match="of another host"):
        list_objects("file://elsewhere/data")
    with pytest.raises(StorageError, match="cannot be read"):
        read_range(str(folder), 0, 1)
    with pytest.raises(StorageError, match="cannot be copied"):
        download(str(folder / "b.bin"), folder / "a #1?.bin" / "below-a-file")
    with pytest.raises(StorageError, match="no such file or folder"):
        upload(tmp_path / "absent", str(tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match="nothing to upload"):
        upload(tmp_path / "empty", str(tmp_path / "out"))


def test_an_unknown_scheme_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"unknown scheme 's3a://'; did you mean 's3'\?"):
        list_objects("s3a://bucket/key")
    with pytest.raises(StorageError, match=r"unknown scheme 'gs://'; choose one of: file, s3"):
        download("gs://bucket/key", tmp_path / "x")
