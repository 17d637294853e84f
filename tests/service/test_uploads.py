"""Uploads: space is promised before the first byte, nothing is left behind, contents tell what a file is."""

from __future__ import annotations

import contextlib
import gzip
import io
import struct
import tracemalloc
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import nibabel
import numpy as np
import pytest
from api_harness import ApiHarness, nifti
from bundle_factory import make_threshold_bundle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from phantom import STUDY_INSTANCE_UID, chiral_image, write_classic_series

from models.bundle import Bundle
from models.errors import ModelUnknownError, ModelWithdrawnError, ReasonCode, Refusal
from service.archive import extract
from service.errors import AttemptError, StorageFullError
from service.records.database import Records
from service.records.jobs import claim_job, fail_attempt
from service.records.tables import ApiKey, Job, JobInput, JobOrigin, JobState, Role
from service.spool import Spool
from service.upload_inputs import take_inputs
from service.uploads import Upload, UploadDesk, UploadTooLargeError, clear_abandoned, find_bundle, submit

pytestmark = pytest.mark.both_engines

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC).replace(tzinfo=None)
MIB = 1 << 20


class FixedSpool(Spool):
    """A spool on a disk whose free space the test decides; what is written does not change it."""

    free = 1000 * MIB

    def free_bytes(self) -> int:
        return self.free


@pytest.fixture
def spool(tmp_path: Path) -> FixedSpool:
    return FixedSpool(tmp_path / "spool", low_watermark_bytes=100 * MIB, reserve_bytes=50 * MIB)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_threshold_bundle(tmp_path / "bundle")


def test_an_upload_over_the_limit_is_refused_before_it_begins(spool: FixedSpool) -> None:
    desk = UploadDesk(spool)
    with pytest.raises(UploadTooLargeError, match="101 bytes; at most 100"):
        desk.begin(101, maximum_bytes=100)
    assert list(spool.uploads_dir.iterdir()) == []
    desk.begin(100, maximum_bytes=100).close()


def test_uploads_side_by_side_cannot_fill_the_disk_together(spool: FixedSpool) -> None:
    desk = UploadDesk(spool)
    with desk.begin(500 * MIB, maximum_bytes=1 << 40) as first:
        with pytest.raises(StorageFullError, match="low watermark"):
            desk.begin(401 * MIB, maximum_bytes=1 << 40)
        desk.begin(400 * MIB, maximum_bytes=1 << 40).close()
        # what the first has written is no longer promised: it shows in the free space itself
        first.account(300 * MIB)
        spool.free -= 300 * MIB
        with pytest.raises(StorageFullError):
            desk.begin(401 * MIB, maximum_bytes=1 << 40)
        desk.begin(400 * MIB, maximum_bytes=1 << 40).close()
    assert desk.promised_bytes == 0
    assert list(spool.uploads_dir.iterdir()) == []


def test_an_upload_of_unknown_length_stops_at_the_limit_and_at_the_watermark(spool: FixedSpool) -> None:
    desk = UploadDesk(spool)
    with desk.begin(None, maximum_bytes=10) as upload:
        upload.account(10)
        with pytest.raises(UploadTooLargeError, match="at most 10"):
            upload.account(1)
    with desk.begin(None, maximum_bytes=1 << 40) as upload, pytest.raises(StorageFullError):
        _fill(upload, spool)
    assert spool.free >= 100 * MIB  # the watermark held
    assert desk.promised_bytes == 0


def _fill(upload: Upload, spool: FixedSpool) -> None:
    while True:
        upload.account(MIB)
        spool.free -= MIB


def test_an_upload_stops_at_the_reserve_when_others_fill_the_disk(spool: FixedSpool) -> None:
    with UploadDesk(spool).begin(200 * MIB, maximum_bytes=1 << 40) as upload:
        upload.account(MIB)
        spool.free = 50 * MIB
        with pytest.raises(StorageFullError, match="reserve"):
            upload.account(MIB)


def test_a_file_is_written_under_the_nodes_own_name_with_its_digest(spool: FixedSpool) -> None:
    with UploadDesk(spool).begin(6, maximum_bytes=6) as upload:
        for content in (b"abc", b"def"):
            upload.start_file()
            upload.write(content[:1])
            upload.write(content[1:])
            upload.end_file()
        assert [file.path.read_bytes() for file in upload.files] == [b"abc", b"def"]
        assert upload.files[0].sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        assert [file.path.parent.parent for file in upload.files] == [spool.uploads_dir] * 2
    assert list(spool.uploads_dir.iterdir()) == []


def test_clearing_removes_what_nobody_holds_and_no_row_speaks_of(
    records: Records, spool: FixedSpool, bundle: Bundle, tmp_path: Path
) -> None:
    desk = UploadDesk(spool)
    abandoned = spool.uploads_dir / ("a" * 32)
    abandoned.mkdir()
    (abandoned / "0000.part").write_bytes(b"of a process that died")
    alive = desk.begin(10, maximum_bytes=10)
    kept = _submit(desk, records, bundle, nifti(tmp_path))
    assert clear_abandoned(records, spool) == 1
    assert not abandoned.exists()
    assert alive.folder.exists()
    with records.read() as session:
        assert spool.absolute(session.get_one(JobInput, (kept, 0)).path).exists()
    alive.close()


def _submit(
    desk: UploadDesk,
    records: Records,
    bundle: Bundle,
    *contents: bytes,
    key: str = "k",
    version: str | None = None,
) -> str:
    with records.write() as session:
        if session.get(ApiKey, key) is None:
            session.add(ApiKey(key_id=key, name=key, role=Role.UPLOADER, key_hash=key * 64, created_at=NOW))
    with desk.begin(None, maximum_bytes=1 << 30) as upload:
        for content in contents:
            upload.start_file()
            upload.write(content)
            upload.end_file()
        return submit(
            upload, records, desk.spool, bundle, requested_version=version, key_id=key, actor=key, now=NOW
        )


def test_the_same_upload_is_one_job_and_leaves_one_copy(
    records: Records, spool: FixedSpool, bundle: Bundle, tmp_path: Path
) -> None:
    desk, image = UploadDesk(spool), nifti(tmp_path)
    first = _submit(desk, records, bundle, image)
    assert _submit(desk, records, bundle, image) == first
    assert len(list(spool.uploads_dir.iterdir())) == 1
    others = {
        _submit(desk, records, bundle, nifti(tmp_path, seed=1)),  # another image
        _submit(desk, records, bundle, image, key="l"),  # another key: nobody is led to another's job
        _submit(desk, records, bundle, image, version="1.0.0"),  # a version named
        _submit(desk, records, make_threshold_bundle(tmp_path / "b", version="1.1.0"), image),  # a newer one
    }
    assert len(others | {first}) == 5


def test_an_upload_of_what_had_failed_is_queued_again(
    records: Records, spool: FixedSpool, bundle: Bundle, tmp_path: Path
) -> None:
    desk, image = UploadDesk(spool), nifti(tmp_path)
    job_id = _submit(desk, records, bundle, image)
    with records.write() as session:
        job = claim_job(session, owner="w", lease_s=60, now=NOW)
        assert job is not None
        error = AttemptError("CHILD_DIED", "It died.")
        fail_attempt(session, job_id, job.attempt, error, retry_after_s=1, maximum_failures=1, now=NOW)
    assert _submit(desk, records, bundle, image) == job_id
    with records.read() as session:
        assert session.get_one(Job, job_id).state is JobState.QUEUED


def test_a_job_reads_its_channels_in_the_order_of_the_files(
    records: Records, spool: FixedSpool, tmp_path: Path
) -> None:
    two = make_threshold_bundle(tmp_path / "two", channels=2)
    first, second = nifti(tmp_path, seed=1), gzip.decompress(nifti(tmp_path, seed=2))
    job_id = _submit(UploadDesk(spool), records, two, first, second)
    with records.read() as session:
        job = session.get_one(Job, job_id)
        assert job.origin is JobOrigin.UPLOAD
        assert [each.channel for each in job.inputs] == [0, 1]
        paths = [spool.absolute(each.path) for each in job.inputs]
    assert [path.read_bytes() for path in paths] == [first, second]
    assert [path.name for path in paths] == ["0000.nii.gz", "0001.nii"]


def test_the_model_is_the_one_that_was_asked_for(api: ApiHarness) -> None:
    api.install()
    api.install(version="1.1.0", activate=False)
    assert find_bundle(api.registry, "threshold", None).manifest.version == "1.0.0"
    assert find_bundle(api.registry, "threshold", "1.1.0").manifest.version == "1.1.0"
    for name, version in (("nothing", None), ("threshold", "9.9.9"), ("../x", None), ("threshold", "../x")):
        with pytest.raises(ModelUnknownError):
            find_bundle(api.registry, name, version)
    api.registry.withdraw("threshold", "1.1.0")
    with pytest.raises(ModelWithdrawnError, match=r"1\.1\.0"):
        find_bundle(api.registry, "threshold", "1.1.0")


def _zip(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def _encrypted() -> bytes:
    data = bytearray(_zip(("a.dcm", b"secret")))
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def _directory_bomb() -> bytes:
    data = bytearray(_zip(("a.dcm", b"x")))
    struct.pack_into("<HHI", data, data.rindex(b"PK\x05\x06") + 8, 60_000, 60_000, 2**31)
    return bytes(data)


def _header(**fields: object) -> bytes:
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header["magic"], header["vox_offset"] = b"n+1", 352
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + bytes(4)


BAD = {
    "empty": (b"", ReasonCode.UNREADABLE),
    "text": (b"This is not an image.", ReasonCode.UNREADABLE),
    "text in gzip": (gzip.compress(b"This is not an image." * 50), ReasonCode.UNREADABLE),
    "cut gzip": (gzip.compress(_header())[:40], ReasonCode.UNREADABLE),
    "damaged gzip": (b"\x1f\x8b" + b"\xff" * 400, ReasonCode.UNREADABLE),
    "4D": (gzip.compress(_header(dim=[4, 8, 8, 8, 20, 1, 1, 1])), ReasonCode.NOT_A_VOLUME),
    "2D": (gzip.compress(_header(dim=[2, 8, 8, 1, 1, 1, 1, 1])), ReasonCode.NOT_A_VOLUME),
    "no voxels": (gzip.compress(_header(dim=[3, 8, 0, 8, 1, 1, 1, 1])), ReasonCode.NOT_A_VOLUME),
    "cut": (_header(dim=[3, 8, 8, 8, 1, 1, 1, 1]) + bytes(1000), ReasonCode.UNREADABLE),
    "far larger than it is": (_header(dim=[3, 32000, 32000, 32000, 1, 1, 1, 1]), ReasonCode.UNREADABLE),
    "unknown voxel type": (gzip.compress(_header(datatype=9999)), ReasonCode.UNREADABLE),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), ReasonCode.UNREADABLE),
    "cut zip": (_zip(("a.dcm", bytes(1000)))[:-10], ReasonCode.UNREADABLE),
    "empty zip": (_zip(), ReasonCode.UNREADABLE),
    "encrypted zip": (_encrypted(), ReasonCode.UNREADABLE),
    "directory bomb": (_directory_bomb(), ReasonCode.TOO_LARGE),
    "zip of garbage": (b"PK\x03\x04" + b"\xff" * 2000, ReasonCode.UNREADABLE),
    "lzma zip": (_zip(("a.dcm", bytes(1000)), method=zipfile.ZIP_LZMA), ReasonCode.UNREADABLE),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_with_a_reason(bundle: Bundle, tmp_path: Path, case: str) -> None:
    content, reason = BAD[case]
    path = tmp_path / "0000.part"
    path.write_bytes(content)
    with pytest.raises(Refusal) as refused:
        take_inputs([path], bundle.manifest)
    assert refused.value.reason is reason
    assert refused.value.remedy


@pytest.mark.parametrize("case", [case for case, (content, _) in BAD.items() if content[:2] == b"PK"])
def test_a_job_judges_an_archive_as_its_upload_did(tmp_path: Path, case: str) -> None:
    content, reason = BAD[case]
    path, into = tmp_path / "a.zip", tmp_path / "into"
    path.write_bytes(content)
    into.mkdir()
    with pytest.raises(Refusal) as refused:
        extract(path, into, limit_bytes=2**20)
    assert refused.value.reason is reason
    assert refused.value.remedy


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.integers(0, 351),
    change=st.binary(min_size=1, max_size=8),
    zipped=st.sampled_from([None, "header", "archive"]),
)
def test_whatever_is_changed_in_a_file_it_is_taken_or_refused(
    bundle: Bundle, tmp_path: Path, at: int, change: bytes, zipped: str | None
) -> None:
    whole = _header(dim=[3, 4, 4, 4, 1, 1, 1, 1]) + bytes(128)
    if zipped == "archive":
        whole = _zip(("a.dcm", bytes(128) + b"DICM" + whole), ("b.dcm", whole))
    content = whole[:at] + change + whole[at + len(change) :]
    path = tmp_path / "0000.part"
    path.write_bytes(gzip.compress(content) if zipped == "header" else content)
    with contextlib.suppress(Refusal):
        take_inputs([path], bundle.manifest)


def test_a_gzip_bomb_is_not_inflated_to_be_judged(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "0000.part"
    bomb = _header(dim=[3, 8, 8, 8, 1, 1, 1, 1]) + bytes(200 * MIB)
    path.write_bytes(gzip.compress(bomb, compresslevel=1))
    tracemalloc.start()
    take_inputs([path], bundle.manifest)  # its first 8x8x8 voxels are an image; no reader goes further
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 20 * MIB


@pytest.mark.parametrize("given", [0, 1, 3])
def test_another_number_of_files_than_channels_is_refused(tmp_path: Path, given: int) -> None:
    two = make_threshold_bundle(tmp_path / "two", channels=2).manifest
    paths = [tmp_path / f"{i}" for i in range(given)]
    with pytest.raises(Refusal, match=rf"{given} file\(s\) were sent, but .* takes 2: channel 0, channel 1"):
        take_inputs(paths, two)


def test_a_mixture_of_nifti_and_dicom_is_refused(tmp_path: Path) -> None:
    two = make_threshold_bundle(tmp_path / "two", channels=2).manifest
    paths = [tmp_path / "0000.part", tmp_path / "0001.part"]
    paths[0].write_bytes(nifti(tmp_path))
    paths[1].write_bytes(_zip(("a", b"b")))
    with pytest.raises(Refusal, match="1 of 2 files") as refused:
        take_inputs(paths, two)
    assert refused.value.reason is ReasonCode.CHANNEL_GRIDS_DIFFER


def test_a_zipped_series_tells_its_study(bundle: Bundle, tmp_path: Path) -> None:
    files = write_classic_series(tmp_path / "series", chiral_image(), np.eye(4))
    path = tmp_path / "0000.part"
    path.write_bytes(
        _zip(("README.txt", b"hello"), *((f"../../{i}.dcm", f.read_bytes()) for i, f in enumerate(files)))
    )
    paths, study_instance_uid = take_inputs([path], bundle.manifest)
    assert study_instance_uid == STUDY_INSTANCE_UID
    assert [p.name for p in paths] == ["0000.zip"]
    assert not (tmp_path / "probe").exists()


def test_a_zip_without_dicom_is_left_to_the_job(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "0000.part"
    path.write_bytes(_zip(("a.txt", b"x" * 500), ("b.dcm", bytes(128) + b"DICM" + b"\xff" * 50)))
    assert take_inputs([path], bundle.manifest)[1] is None
