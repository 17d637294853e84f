"""A bundle opens only when it is whole, plain and understood."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from bundle_factory import make_threshold_bundle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import bundle_files
from models.bundle import Bundle, parse_manifest, seal
from models.bundle_files import format_sums, parse_sums
from models.errors import BundleError
from models.manifest import Precision

repeated_on_one_folder = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_threshold_bundle(tmp_path / "bundle", folds=2, int8=True).folder


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sealed folder for property tests, which put back what they change."""
    return make_threshold_bundle(tmp_path_factory.mktemp("sealed") / "bundle").folder


def test_open_gives_manifest_paths_and_digest(folder: Path) -> None:
    bundle = Bundle.open(folder)
    assert bundle.manifest.name == "threshold"
    assert bundle.digest == hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()
    names = [path.name for path in bundle.weight_paths(Precision.FLOAT32)]
    assert names == ["student.fold0.onnx", "student.fold1.onnx"]
    assert [path.name for path in bundle.weight_paths(Precision.INT8)] == [
        "student.fold0.int8.onnx",
        "student.fold1.int8.onnx",
    ]
    assert all(path.is_file() for path in (*bundle.golden_image_paths, bundle.golden_labelmap_path))


def test_the_factory_is_deterministic_and_its_variants_differ(tmp_path: Path) -> None:
    digests = [
        make_threshold_bundle(tmp_path / str(i), **arguments).digest
        for i, arguments in enumerate(
            [{}, {}, {"version": "1.0.1"}, {"labels": ("a", "b")}, {"channels": 2}, {"head": "sigmoid"}]
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == len(digests) - 1


def test_the_list_of_digests_is_one_that_sha256sum_reads(folder: Path) -> None:
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_sealing_again_changes_nothing_and_drops_a_stale_signature(folder: Path) -> None:
    digest = Bundle.open(folder).digest
    (folder / "SHA256SUMS.sig").write_bytes(bytes(64))
    assert seal(folder).digest == digest
    assert not (folder / "SHA256SUMS.sig").exists()


def test_a_link_to_the_whole_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(folder)
    assert Bundle.open(tmp_path / "current").folder == folder


def _symlink(folder: Path) -> None:
    (folder / "card.md").rename(folder.parent / "card.md")
    (folder / "card.md").symlink_to(folder.parent / "card.md")


def _golden_symlink(folder: Path) -> None:
    (folder / "golden").rename(folder.parent / "golden")
    (folder / "golden").symlink_to(folder.parent / "golden")


def _sums_symlink(folder: Path) -> None:
    (folder / "SHA256SUMS").rename(folder.parent / "SHA256SUMS")
    (folder / "SHA256SUMS").symlink_to(folder.parent / "SHA256SUMS")


def _oversize(folder: Path) -> None:
    with open(folder / "card.md", "r+b") as file:
        file.truncate((1 << 20) + 1)


def _too_many(folder: Path) -> None:
    for i in range(70):
        (folder / f"extra{i}").touch()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "card.md").unlink(), "'card.md'"),
        (lambda f: (f / "SHA256SUMS").unlink(), "'SHA256SUMS' cannot be read"),
        (lambda f: (f / "golden/labelmap.nii.gz").unlink(), "'golden/labelmap.nii.gz'"),
        (lambda f: (f / "extra.txt").touch(), "'extra.txt'"),
        (lambda f: (f / "golden/extra.txt").touch(), "'golden/extra.txt'"),
        (lambda f: (f / ".hidden").touch(), r"'\.hidden' is not a file name"),
        (lambda f: (f / "weights").mkdir(), "sub-folder 'weights'"),
        (lambda f: (f / "golden/deep").mkdir(), "sub-folder 'golden/deep'"),
        (lambda f: os.mkfifo(f / "pipe"), "'pipe' is not a plain file"),
        (lambda f: os.link(f / "card.md", f.parent / "card.md"), "2 hard links"),
        (lambda f: (f / "student.fold0.onnx").write_bytes(b""), "'student.fold0.onnx' was altered"),
        (lambda f: (f / "SHA256SUMS").write_bytes(b""), "Not listed in SHA256SUMS"),
        (_symlink, "'card.md' is a symbolic link"),
        (_golden_symlink, "'golden' is a symbolic link"),
        (_sums_symlink, "'SHA256SUMS' is a symbolic link"),
        (_oversize, "1048577 bytes; at most 1048576"),
        (_too_many, "at most 64"),
    ],
)
def test_a_damaged_folder_is_refused(folder: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(folder)
    with pytest.raises(BundleError, match=says):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["nowhere", "file", "loop"])
def test_what_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(BundleError, match=name):
        Bundle.open(tmp_path / name)


def test_a_file_swapped_for_a_link_after_the_listing_is_not_followed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = bundle_files.list_files(folder)
    _symlink(folder)
    monkeypatch.setattr("models.bundle.list_files", lambda _: listing)
    with pytest.raises(BundleError, match=r"'card.md' cannot be read"):
        Bundle.open(folder)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(folder: Path) -> None:
    (folder / "card.md").unlink()
    os.mkfifo(folder / "card.md")
    with pytest.raises(BundleError, match=r"'card.md' is not a plain file"):
        bundle_files.read_file(folder, "card.md")


def test_a_sealed_file_that_the_manifest_does_not_name_is_refused(folder: Path) -> None:
    (folder / "spare.onnx").write_bytes((folder / "student.fold0.onnx").read_bytes())
    with pytest.raises(BundleError, match=r"Not named by model.json, but in the folder: 'spare.onnx'"):
        seal(folder)


def test_weights_whose_digest_in_the_manifest_is_another_are_refused(folder: Path) -> None:
    with open(folder / "student.fold1.onnx", "ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match=r"different digests of 'student.fold1.onnx'"):
        seal(folder)


def test_every_wrong_key_of_the_manifest_is_named_in_one_sentence(folder: Path) -> None:
    document = json.loads((folder / "model.json").read_text())
    document["pickle"] = "weights.pkl"
    document["channels"][0]["gain"] = 2
    document["inference"]["patch_size"] = "large"
    del document["orientation"]
    (folder / "model.json").write_text(json.dumps(document))
    with pytest.raises(BundleError) as caught:
        seal(folder)
    for key in ("pickle", "channels.0.gain", "inference.patch_size", "orientation"):
        assert f"{key}: " in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff", b'{"schema_version": 2}', b"[" * 100_000]
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match=r"model.json"):
        parse_manifest(data)


digests = st.dictionaries(
    st.builds("{}a{}".format, st.sampled_from(["", "golden/"]), st.text("abcXYZ019._-", max_size=20)),
    st.binary(min_size=32, max_size=32).map(bytes.hex),
    max_size=8,
)


@given(digests)
def test_a_list_of_digests_comes_back(listed: dict[str, str]) -> None:
    assert parse_sums(format_sums(listed)) == listed


@given(st.binary(max_size=300))
def test_a_list_has_one_spelling_only(data: bytes) -> None:
    try:
        parsed = parse_sums(data)
    except BundleError:
        return
    assert format_sums(parsed) == data


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("  ", " ", 1),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.rstrip("\n"),
        lambda text: text + "\n",
        lambda text: text.upper(),
        lambda text: "\n".join(reversed(text.split("\n"))),
        lambda text: text + text.split("\n")[-2] + "\n",
        lambda text: text.replace("card.md", "../card.md"),
        lambda text: text.replace("card.md", "/card.md"),
    ],
)
def test_another_spelling_of_the_list_is_refused(folder: Path, change: Callable[[str], str]) -> None:
    text = (folder / "SHA256SUMS").read_text()
    (folder / "SHA256SUMS").write_text(change(text), newline="")
    with pytest.raises(BundleError):
        Bundle.open(folder)


@repeated_on_one_folder
@given(data=st.data())
def test_any_changed_byte_is_found(sealed: Path, data: st.DataObject) -> None:
    names = sorted(str(p.relative_to(sealed)) for p in sealed.rglob("*") if p.is_file())
    path = sealed / data.draw(st.sampled_from(names))
    before = path.read_bytes()
    position = data.draw(st.integers(0, len(before) - 1))
    changed = bytearray(before)
    changed[position] ^= data.draw(st.integers(1, 255))
    try:
        path.write_bytes(changed)
        with pytest.raises(BundleError):
            Bundle.open(sealed)
    finally:
        path.write_bytes(before)


@repeated_on_one_folder
@given(
    name=st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=40),
    inside_golden=st.booleans(),
)
def test_any_added_file_is_found(sealed: Path, name: str, inside_golden: bool) -> None:
    path = (sealed / "golden" if inside_golden else sealed) / name
    if path.exists() or name == "SHA256SUMS.sig" or len(name.encode()) > 255:
        return
    try:
        path.touch()
        with pytest.raises(BundleError):
            Bundle.open(sealed)
    finally:
        path.unlink()


@repeated_on_one_folder
@given(data=st.data())
def test_any_removed_file_is_found(sealed: Path, data: st.DataObject) -> None:
    names = sorted(str(p.relative_to(sealed)) for p in sealed.rglob("*") if p.is_file())
    path = sealed / data.draw(st.sampled_from(names))
    kept = path.read_bytes()
    try:
        path.unlink()
        with pytest.raises(BundleError):
            Bundle.open(sealed)
    finally:
        path.write_bytes(kept)


def test_a_copy_holds_the_same_bundle_even_of_hard_linked_files(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "linked", copy_function=os.link)
    bundle_files.copy_files(tmp_path / "linked", tmp_path / "copy")
    assert Bundle.open(tmp_path / "copy").manifest.name == "threshold"


def test_copying_follows_no_link(folder: Path, tmp_path: Path) -> None:
    _symlink(folder)
    with pytest.raises(BundleError, match="symbolic link"):
        bundle_files.copy_files(folder, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
