"""Signatures, from the key to the node: what no trusted key has signed is refused wherever it turns up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from api_harness import ApiHarness, assert_problem
from bundle_factory import make_threshold_bundle
from command_line import Segnode, command_line

from models.bundle import Bundle, pack_zip, unpack_zip
from models.errors import SignatureError
from models.registry import Registry
from models.signing import load_trusted_keys, make_key
from service.node import seed_models
from service.records.database import Records

TRUSTED, STRANGER = "trusted.pem", "stranger.pem"


@pytest.fixture
def segnode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Segnode]:
    """The command, in a folder with two keys, of which ``node.yaml`` trusts one."""
    with command_line(tmp_path, monkeypatch, capfd) as run:
        for name in (TRUSTED, STRANGER):
            assert run("models", "make-key", name).status == 0
        Path("keys").mkdir()
        Path("trusted.pub.pem").rename("keys/trusted.pub.pem")
        Path("node.yaml").write_text(
            "data_dir: data\nmodels: {require_signature: true, trusted_keys: [keys], require_gate: false}\n"
        )
        yield run


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_threshold_bundle(tmp_path / "bundle")


def test_a_private_key_is_its_owners_alone_and_never_overwritten(segnode: Segnode) -> None:
    assert Path(TRUSTED).stat().st_mode & 0o077 == 0
    before = Path(TRUSTED).read_bytes()
    again = segnode("models", "make-key", TRUSTED)
    assert (again.status, again.err.split(":")[0]) == (1, "BUNDLE_NOT_TRUSTED")
    assert Path(TRUSTED).read_bytes() == before


def test_a_key_with_a_password_takes_it(segnode: Segnode, bundle: Bundle) -> None:
    Path("password").write_text("a long one\n")
    assert segnode("models", "make-key", "locked.pem", "--password-file", "password").status == 0
    assert segnode("models", "sign", bundle.folder, "--key", "locked.pem").status == 1
    signed = segnode("models", "sign", bundle.folder, "--key", "locked.pem", "--password-file", "password")
    assert signed.status == 0, signed.err
    keys = load_trusted_keys([Path("locked.pub.pem")])
    assert Bundle.open(bundle.folder, trusted_keys=keys).digest == bundle.digest


def test_a_bundle_is_signed_added_and_verified(segnode: Segnode, bundle: Bundle) -> None:
    config = ("--config", "node.yaml")
    for key in (None, STRANGER):
        if key:
            assert segnode("models", "sign", bundle.folder, "--key", key).status == 0
        refused = segnode("models", "add", bundle.folder, *config)
        sentence = "No trusted key made the bundle's signature" if key else "The bundle is not signed"
        assert refused.status == 1
        assert refused.err.startswith(f"BUNDLE_NOT_TRUSTED: {sentence}")
    assert segnode("models", "verify", bundle.folder, *config).status == 1
    assert segnode("models", "sign", bundle.folder, "--key", TRUSTED).status == 0
    assert segnode("models", "add", bundle.folder, "--activate", *config).status == 0
    for what in (bundle.folder, "threshold"):
        verified = segnode("models", "verify", what, *config)
        assert verified.status == 0, verified.err
        assert "Signed by the trusted key" in verified.err
    told = segnode("models", "verify", bundle.folder, "--trusted", "stranger.pub.pem", *config)
    assert told.err.startswith("BUNDLE_NOT_TRUSTED")


def test_an_archive_is_signed_in_place_or_into_another(segnode: Segnode, bundle: Bundle) -> None:
    pack_zip(bundle, Path("b.zip"))
    unsigned = Path("b.zip").read_bytes()
    keys = load_trusted_keys([Path("keys")])
    assert segnode("models", "sign", "b.zip", "--key", TRUSTED, "-o", "signed.zip").status == 0
    assert Path("b.zip").read_bytes() == unsigned
    assert segnode("models", "sign", "b.zip", "--key", TRUSTED).status == 0
    for archive in ("b.zip", "signed.zip"):
        folder = unpack_zip(Path(archive), Path(f"{archive}.d"), limit_bytes=1 << 20)
        assert Bundle.open(folder, trusted_keys=keys).digest == bundle.digest


def test_a_model_that_ships_is_signed_for_the_site(segnode: Segnode) -> None:
    assert segnode("models", "sign", "hippocampus@0.2.0", "--key", TRUSTED).status == 2  # not in place
    signed = segnode("models", "sign", "hippocampus@0.2.0", "--key", TRUSTED, "-o", "h.zip")
    assert signed.status == 0, signed.err
    assert segnode("models", "sign", "hippocampus@9.9.9", "--key", TRUSTED, "-o", "i.zip").status == 1
    folder = unpack_zip(Path("h.zip"), Path("h"), limit_bytes=1 << 30)
    Bundle.open(folder, trusted_keys=load_trusted_keys([Path("keys")]))


def test_what_is_altered_is_not_vouched_for(segnode: Segnode, bundle: Bundle) -> None:
    (bundle.folder / "card.md").write_text("changed")
    refused = segnode("models", "sign", bundle.folder, "--key", TRUSTED)
    assert refused.err.startswith("BUNDLE_INVALID: 'card.md' was altered")
    assert not (bundle.folder / "SHA256SUMS.sig").exists()


def test_an_upload_and_an_activation_without_a_trusted_signature_are_refused(
    tmp_path: Path, records: Records
) -> None:
    make_key(tmp_path / "key.pem", tmp_path / "key.pub.pem")
    api = ApiHarness(tmp_path, records, storage={"low_watermark_bytes": 0, "reserve_bytes": 0})
    api.install()
    installed = api.registry
    api.registry.trusted_keys = tuple(load_trusted_keys([tmp_path / "key.pub.pem"]))
    strict = Registry(installed.root, trusted_keys=api.registry.trusted_keys, runtimes=["onnxruntime"])
    bundle = make_threshold_bundle(tmp_path / "newer", version="1.1.0")
    pack_zip(bundle, tmp_path / "newer.zip")
    upload = api.post(
        "/api/v1/models", files=[("bundle", ("newer.zip", (tmp_path / "newer.zip").read_bytes()))]
    )
    assert_problem(upload, 422, "BUNDLE_NOT_TRUSTED")
    # What was installed before signatures were asked for is neither activated, nor loaded for a job.
    with pytest.raises(SignatureError, match="not signed"):
        strict.activate("threshold", "1.0.0")
    with pytest.raises(SignatureError, match="not signed"):
        strict.get("threshold", "1.0.0")
    with pytest.raises(SignatureError, match="not signed"):
        strict.active("threshold")


def test_a_node_that_asks_for_signatures_starts_without_what_ships_unsigned(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "models", trusted_keys=[], runtimes=["onnxruntime"])
    assert seed_models(registry) == []
    assert registry.names() == []
