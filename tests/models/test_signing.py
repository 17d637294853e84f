"""Where keys are asked for, only a bundle that one of them signed opens."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from bundle_factory import make_threshold_bundle
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from models.bundle import Bundle, pack_zip, seal, unpack_zip
from models.errors import BundleError, SignatureError
from models.signing import key_id, load_private_key, load_public_key, sign, verify

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_threshold_bundle(tmp_path / "bundle")


def test_a_signed_bundle_opens_with_its_key_and_keeps_its_digest(bundle: Bundle) -> None:
    sign(bundle.folder, KEY)
    keys = [OTHER.public_key(), KEY.public_key()]
    assert Bundle.open(bundle.folder, trusted_keys=keys).digest == bundle.digest
    assert Bundle.open(bundle.folder).digest == bundle.digest


def test_the_signature_survives_packing(bundle: Bundle, tmp_path: Path) -> None:
    sign(bundle.folder, KEY)
    pack_zip(Bundle.open(bundle.folder), tmp_path / "b.zip")
    folder = unpack_zip(tmp_path / "b.zip", tmp_path / "into", limit_bytes=1 << 20)
    assert Bundle.open(folder, trusted_keys=[KEY.public_key()]).digest == bundle.digest


def test_an_unsigned_bundle_is_refused_where_keys_are_asked_for(bundle: Bundle) -> None:
    with pytest.raises(SignatureError, match="not signed"):
        Bundle.open(bundle.folder, trusted_keys=[KEY.public_key()])


def test_a_bundle_signed_by_another_is_refused(bundle: Bundle) -> None:
    sign(bundle.folder, OTHER)
    with pytest.raises(SignatureError, match=key_id(KEY.public_key())):
        Bundle.open(bundle.folder, trusted_keys=[KEY.public_key()])


def test_no_keys_trust_nobody(bundle: Bundle) -> None:
    sign(bundle.folder, KEY)
    with pytest.raises(SignatureError, match="trusted: none"):
        Bundle.open(bundle.folder, trusted_keys=[])


def test_a_signature_of_other_contents_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    sign(bundle.folder, KEY)
    other = make_threshold_bundle(tmp_path / "other", version="1.0.1")
    shutil.copy(bundle.folder / "SHA256SUMS.sig", other.folder)
    with pytest.raises(SignatureError):
        Bundle.open(other.folder, trusted_keys=[KEY.public_key()])


def test_altered_contents_under_a_good_signature_are_refused(bundle: Bundle) -> None:
    sign(bundle.folder, KEY)
    with open(bundle.folder / "card.md", "a") as file:
        file.write("Approved for everything.\n")
    with pytest.raises(BundleError, match="altered"):
        Bundle.open(bundle.folder, trusted_keys=[KEY.public_key()])


def test_sealing_again_takes_the_signature_away(bundle: Bundle) -> None:
    sign(bundle.folder, KEY)
    seal(bundle.folder)
    with pytest.raises(SignatureError, match="not signed"):
        Bundle.open(bundle.folder, trusted_keys=[KEY.public_key()])


@pytest.mark.parametrize("bit", range(0, 512, 37))
def test_any_changed_bit_of_a_signature_is_found(bit: int) -> None:
    signature = bytearray(KEY.sign(b"list"))
    signature[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SignatureError):
        verify(b"list", bytes(signature), [KEY.public_key()])


@pytest.mark.parametrize("signature", [b"", bytes(64), bytes(63), bytes(65), b"x" * 1000])
def test_what_is_no_signature_is_refused(signature: bytes) -> None:
    with pytest.raises(SignatureError):
        verify(b"list", signature, [KEY.public_key()])


def test_a_signature_that_is_a_link_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    sign(bundle.folder, KEY)
    shutil.move(bundle.folder / "SHA256SUMS.sig", tmp_path / "sig")
    (bundle.folder / "SHA256SUMS.sig").symlink_to(tmp_path / "sig")
    with pytest.raises(BundleError, match="symbolic link"):
        Bundle.open(bundle.folder, trusted_keys=[KEY.public_key()])


def test_signing_an_unsealed_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="SHA256SUMS"):
        sign(tmp_path, KEY)


def _write_keys(
    folder: Path, key: Ed25519PrivateKey | X25519PrivateKey, password: bytes | None = None
) -> None:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    (folder / "private.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / "public.pem").write_bytes(public)


@pytest.mark.parametrize("password", [None, b"a long enough password"])
def test_keys_are_read_from_pem(tmp_path: Path, password: bytes | None) -> None:
    _write_keys(tmp_path, KEY, password)
    private = load_private_key(tmp_path / "private.pem", password=password)
    assert key_id(private.public_key()) == key_id(load_public_key(tmp_path / "public.pem"))


def test_what_is_no_ed25519_key_is_refused(tmp_path: Path) -> None:
    _write_keys(tmp_path, X25519PrivateKey.from_private_bytes(bytes(range(32))))
    (tmp_path / "text.pem").write_text("no key")
    for name in ("public.pem", "private.pem", "text.pem", "missing.pem"):
        with pytest.raises(SignatureError, match=name):
            load_public_key(tmp_path / name)
        with pytest.raises(SignatureError, match=name):
            load_private_key(tmp_path / name)


@pytest.mark.parametrize("password", [None, b"a wrong password"])
def test_a_private_key_without_its_password_is_refused(tmp_path: Path, password: bytes | None) -> None:
    _write_keys(tmp_path, KEY, b"a long enough password")
    with pytest.raises(SignatureError, match="check the path and the password"):
        load_private_key(tmp_path / "private.pem", password=password)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")
def test_openssl_makes_and_checks_the_same_signatures(bundle: Bundle, tmp_path: Path) -> None:
    """The commands of the module's documentation, as a hospital without segnode would run them."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=tmp_path, check=True, capture_output=True)

    sums, signature = str(bundle.folder / "SHA256SUMS"), str(bundle.folder / "SHA256SUMS.sig")
    openssl("genpkey", "-algorithm", "ed25519", "-out", "private.pem")
    openssl("pkey", "-in", "private.pem", "-pubout", "-out", "public.pem")
    openssl("pkeyutl", "-sign", "-rawin", "-inkey", "private.pem", "-in", sums, "-out", signature)
    Bundle.open(bundle.folder, trusted_keys=[load_public_key(tmp_path / "public.pem")])

    sign(bundle.folder, load_private_key(tmp_path / "private.pem"))
    check = ["-verify", "-rawin", "-pubin", "-inkey", "public.pem", "-in", sums, "-sigfile", signature]
    openssl("pkeyutl", *check)
