"""An uploaded archive is unpacked only when nothing in it can hurt."""

from __future__ import annotations

import io
import shutil
import stat
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from bundle_factory import make_threshold_bundle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.bundle import Bundle, pack_zip, unpack_zip
from models.errors import BundleError

LIMIT_BYTES = 8 << 20

repeated_in_one_folder = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_threshold_bundle(tmp_path_factory.mktemp("zip") / "bundle")


@pytest.fixture(scope="module")
def packed(bundle: Bundle) -> bytes:
    path = bundle.folder.parent / "bundle.zip"
    pack_zip(bundle, path)
    return path.read_bytes()


def _archive(path: Path, bundle: Bundle, *, top: str = "", extra: Callable[[zipfile.ZipFile], None]) -> Path:
    """The bundle's files with something more."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(p for p in bundle.folder.rglob("*") if p.is_file()):
            archive.write(file, top + str(file.relative_to(bundle.folder)))
        extra(archive)
    return path


def test_packing_is_deterministic_and_unpacking_gives_the_same_bundle(
    bundle: Bundle, packed: bytes, tmp_path: Path
) -> None:
    pack_zip(bundle, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == packed
    folder = unpack_zip(tmp_path / "again.zip", tmp_path / "into", limit_bytes=LIMIT_BYTES)
    assert folder == tmp_path / "into"
    assert Bundle.open(folder).digest == bundle.digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.zip", "into"]


def test_a_folder_around_everything_is_accepted(bundle: Bundle, tmp_path: Path) -> None:
    path = _archive(
        tmp_path / "b.zip", bundle, top="threshold-1.0.0/", extra=lambda a: a.mkdir("threshold-1.0.0/")
    )
    folder = unpack_zip(path, tmp_path / "into", limit_bytes=LIMIT_BYTES)
    assert Bundle.open(folder).digest == bundle.digest


def test_what_python_and_shell_tools_zip_is_accepted(bundle: Bundle, tmp_path: Path) -> None:
    subprocess.run(
        ["python3", "-m", "zipfile", "-c", str(tmp_path / "b.zip"), bundle.folder.name],
        cwd=bundle.folder.parent,
        check=True,
    )
    folder = unpack_zip(tmp_path / "b.zip", tmp_path / "into", limit_bytes=LIMIT_BYTES)
    assert Bundle.open(folder).digest == bundle.digest


def _symlink(archive: zipfile.ZipFile) -> None:
    entry = zipfile.ZipInfo("link.onnx")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(entry, "/etc/passwd")


def _device(archive: zipfile.ZipFile) -> None:
    entry = zipfile.ZipInfo("device.onnx")
    entry.external_attr = (stat.S_IFCHR | 0o666) << 16
    archive.writestr(entry, "")


def _duplicate(archive: zipfile.ZipFile) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("card.md", "another")


def _bzip2(archive: zipfile.ZipFile) -> None:
    archive.writestr("more.onnx", "x", compress_type=zipfile.ZIP_BZIP2)


def _bomb(archive: zipfile.ZipFile) -> None:
    archive.writestr("zeros.onnx", bytes(4 << 20))


def _large(archive: zipfile.ZipFile) -> None:
    archive.writestr("stored.onnx", bytes(LIMIT_BYTES), compress_type=zipfile.ZIP_STORED)


def _many(archive: zipfile.ZipFile) -> None:
    for i in range(80):
        archive.writestr(f"f{i}.onnx", "")


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (lambda a: a.writestr("../slip.onnx", "x"), r"'\.\./slip.onnx'"),
        (lambda a: a.writestr("golden/../../slip.onnx", "x"), r"slip.onnx"),
        (lambda a: a.writestr("/absolute.onnx", "x"), r"'/absolute.onnx'"),
        (lambda a: a.writestr("C:\\absolute.onnx", "x"), r"absolute.onnx"),
        (lambda a: a.writestr("a\\b.onnx", "x"), r"b.onnx"),
        (lambda a: a.writestr("other/deep.onnx", "x"), r"'other/deep.onnx'"),
        (lambda a: a.writestr(".hidden", "x"), r"'\.hidden'"),
        (lambda a: a.writestr("two\nlines", "x"), r"two\\nlines"),
        (lambda a: a.mkdir("other/"), r"'other/'"),
        (lambda a: a.writestr("CARD.MD", "x"), r"'CARD.MD' more than once"),
        (_duplicate, r"'card.md' more than once"),
        (_symlink, r"'link.onnx' in the archive is a link"),
        (_device, r"'device.onnx' in the archive is a link or not a plain file"),
        (_bzip2, r"compressed by method 12"),
        (_bomb, r"'zeros.onnx' in the archive grows from \d+ to 4194304 bytes"),
        (_large, r"at most 8388608 are allowed"),
        (_many, r"The archive has 8\d entries"),
    ],
)
def test_a_bad_entry_is_refused_and_leaves_nothing(
    bundle: Bundle, tmp_path: Path, extra: Callable[[zipfile.ZipFile], None], says: str
) -> None:
    path = _archive(tmp_path / "bad.zip", bundle, extra=extra)
    with pytest.raises(BundleError, match=says):
        unpack_zip(path, tmp_path / "into", limit_bytes=LIMIT_BYTES)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.zip"]


def test_an_entry_without_a_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "data")
    path.write_bytes(path.read_bytes().replace(struct.pack("<H", 1) + b"\0\0x", b"\0\0\0\0x"))
    with pytest.raises(BundleError):
        unpack_zip(path, tmp_path / "into", limit_bytes=LIMIT_BYTES)


def _first_directory_entry(data: bytes) -> int:
    return data.index(b"PK\x01\x02")


def test_an_entry_that_is_larger_than_it_says_is_refused(packed: bytes, tmp_path: Path) -> None:
    """The declared size is lowered where zipfile believes it: in the central directory."""
    data = bytearray(packed)
    start = _first_directory_entry(packed)
    (declared,) = struct.unpack_from("<L", data, start + 24)
    struct.pack_into("<L", data, start + 24, declared - 1)
    (tmp_path / "lie.zip").write_bytes(data)
    with pytest.raises(BundleError, match="damaged"):
        unpack_zip(tmp_path / "lie.zip", tmp_path / "into", limit_bytes=LIMIT_BYTES)


def test_a_bomb_that_declares_a_small_size_writes_no_more_than_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.onnx", bytes(64 << 20))
    data = bytearray(path.read_bytes())
    struct.pack_into("<L", data, data.index(b"PK\x01\x02") + 24, 1000)
    path.write_bytes(data)
    written: list[int] = []
    monkeypatch.setattr(
        shutil, "rmtree", lambda folder: written.append((folder / "zeros.onnx").stat().st_size)
    )
    with pytest.raises(BundleError):
        unpack_zip(path, tmp_path / "into", limit_bytes=LIMIT_BYTES)
    assert len(written) == 1
    assert written[0] <= 1000


def test_an_entry_that_is_smaller_than_it_says_is_refused(packed: bytes, tmp_path: Path) -> None:
    data = bytearray(packed)
    start = _first_directory_entry(packed)
    (declared,) = struct.unpack_from("<L", data, start + 24)
    struct.pack_into("<L", data, start + 24, declared + 1)
    (tmp_path / "lie.zip").write_bytes(data)
    with pytest.raises(BundleError, match="shorter"):
        unpack_zip(tmp_path / "lie.zip", tmp_path / "into", limit_bytes=LIMIT_BYTES)


def test_an_encrypted_entry_is_refused(packed: bytes, tmp_path: Path) -> None:
    data = bytearray(packed)
    for flags in (6, _first_directory_entry(packed) + 8):
        data[flags] |= 1
    (tmp_path / "secret.zip").write_bytes(data)
    with pytest.raises(BundleError, match="is encrypted"):
        unpack_zip(tmp_path / "secret.zip", tmp_path / "into", limit_bytes=LIMIT_BYTES)


def test_a_huge_directory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(1000):
            archive.writestr(f"f{i}", "")
    (tmp_path / "many.zip").write_bytes(buffer.getvalue())

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the directory was read")

    monkeypatch.setattr(zipfile, "ZipFile", never)
    with pytest.raises(BundleError, match="1000 entries"):
        unpack_zip(tmp_path / "many.zip", tmp_path / "into", limit_bytes=LIMIT_BYTES)


def test_zip64_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("f", "")
    data = buffer.getvalue()
    end = data.rindex(b"PK\x05\x06")
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 1)
    (tmp_path / "z64.zip").write_bytes(data[:end] + locator + data[end:])
    with pytest.raises(BundleError, match="ZIP64"):
        unpack_zip(tmp_path / "z64.zip", tmp_path / "into", limit_bytes=LIMIT_BYTES)


@pytest.mark.parametrize("data", [b"", b"PK", b"not a zip" * 100, b"PK\x05\x06", b"\x1f\x8b" + bytes(100)])
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "no.zip").write_bytes(data)
    with pytest.raises(BundleError):
        unpack_zip(tmp_path / "no.zip", tmp_path / "into", limit_bytes=LIMIT_BYTES)
    assert not (tmp_path / "into").exists()


@pytest.mark.parametrize("kept", [1, 30, 1000, -1, -22])
def test_a_truncated_archive_is_refused(packed: bytes, tmp_path: Path, kept: int) -> None:
    (tmp_path / "cut.zip").write_bytes(packed[:kept])
    with pytest.raises(BundleError):
        unpack_zip(tmp_path / "cut.zip", tmp_path / "into", limit_bytes=LIMIT_BYTES)


def test_the_folder_to_unpack_into_must_be_new(packed: bytes, tmp_path: Path) -> None:
    (tmp_path / "b.zip").write_bytes(packed)
    (tmp_path / "into").mkdir()
    (tmp_path / "into" / "mine").touch()
    with pytest.raises(FileExistsError):
        unpack_zip(tmp_path / "b.zip", tmp_path / "into", limit_bytes=LIMIT_BYTES)
    assert (tmp_path / "into" / "mine").exists()


def _outside(folder: Path) -> set[str]:
    return {str(p) for p in folder.rglob("*") if "into" not in p.relative_to(folder).parts}


@repeated_in_one_folder
@given(data=st.data())
def test_a_changed_byte_gives_the_same_bundle_or_an_error(
    bundle: Bundle, packed: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Most bytes near the ends are structure, so these are changed more often than the weights between."""
    end = len(packed) - 1
    position = data.draw(
        st.one_of(st.integers(0, end), st.integers(0, 100), st.integers(end - 700, end)), label="position"
    )
    changed = bytearray(packed)
    changed[position] ^= data.draw(st.integers(1, 255), label="mask")
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "b.zip").write_bytes(changed)
    try:
        unpacked = unpack_zip(folder / "b.zip", folder / "into", limit_bytes=LIMIT_BYTES)
        assert Bundle.open(unpacked).digest == bundle.digest
    except BundleError:
        pass
    assert _outside(folder) == {str(folder / "b.zip")}


names = st.one_of(
    st.text(max_size=20),
    st.from_regex(r"(\.\./|/|golden/|x/|\\){0,3}[a-c.]{0,3}", fullmatch=True),
)


@repeated_in_one_folder
@given(listed=st.lists(names, max_size=5))
def test_no_name_ever_leads_out_of_the_folder(
    tmp_path_factory: pytest.TempPathFactory, listed: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("names")
    with zipfile.ZipFile(folder / "b.zip", "w") as archive:
        for name in dict.fromkeys(listed):
            entry = zipfile.ZipInfo("x")
            entry.filename = name
            try:
                archive.writestr(entry, b"data")
            except (ValueError, IndexError):  # a name that not even zipfile can write
                continue
    try:
        unpack_zip(folder / "b.zip", folder / "into", limit_bytes=LIMIT_BYTES)
    except BundleError:
        assert not (folder / "into").exists()
    else:
        files = [p.relative_to(folder / "into") for p in (folder / "into").rglob("*") if p.is_file()]
        assert all(len(p.parts) == 1 or (len(p.parts) == 2 and p.parts[0] == "golden") for p in files)
    assert _outside(folder) == {str(folder / "b.zip")}
