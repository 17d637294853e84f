"""Versions on disk, the active pointer, and that nothing short of a decision changes either."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bundle_factory import make_threshold_bundle
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from models import bundle_cache, golden, registry
from models.bundle import Bundle, pack_zip, seal
from models.errors import (
    BundleError,
    GoldenCaseError,
    ModelChangedError,
    ModelUnknownError,
    ModelWithdrawnError,
    RegistryBusyError,
    RegistryError,
    SignatureError,
)
from models.registry import Registry, shipped_bundles
from models.registry_state import MAX_HISTORY, ModelState, file_lock
from models.signing import sign

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a bundle of a version and returns its folder."""

    def make(version: str = "1.0.0", **arguments: object) -> Path:
        folder = tmp_path / f"bundle-{version}-{len(list(tmp_path.iterdir()))}"
        return make_threshold_bundle(folder, version=version, **arguments).folder

    return make


@pytest.fixture
def models(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture(autouse=True)
def golden_ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The versions whose golden case would have been run: most tests are about files, not networks."""
    ran: list[str] = []
    monkeypatch.setattr(
        registry, "check_golden_case_everywhere", lambda bundle, **_: ran.append(bundle.manifest.version)
    )
    return ran


@pytest.fixture
def real_golden_cases(golden_ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden cases run after all."""
    monkeypatch.setattr(registry, "check_golden_case_everywhere", golden.check_golden_case_everywhere)


def _add_and_activate(models: Registry, *folders: Path) -> None:
    for folder in folders:
        bundle = models.add(folder, check_golden=False)
        models.activate(bundle.manifest.name, bundle.manifest.version)


# Installing


def test_making_a_registry_touches_nothing(models: Registry) -> None:
    assert models.names() == []
    assert models.versions("threshold") == []
    assert models.active_version("threshold") is None
    assert not models.is_withdrawn("threshold", "1.0.0")
    assert not models.root.exists()


@pytest.mark.usefixtures("real_golden_cases")
def test_a_folder_is_installed_but_not_activated(models: Registry, make: Make) -> None:
    source = make()
    bundle = models.add(source)
    assert bundle.folder == models.root / "threshold" / "1.0.0"
    assert bundle.digest == Bundle.open(source).digest
    assert models.names() == ["threshold"]
    assert models.versions("threshold") == ["1.0.0"]
    assert models.active_version("threshold") is None
    assert models.get("threshold", "1.0.0") == bundle
    with pytest.raises(ModelUnknownError, match="no active version"):
        models.active("threshold")


def test_a_zip_is_installed(models: Registry, make: Make, tmp_path: Path) -> None:
    bundle = Bundle.open(make())
    pack_zip(bundle, tmp_path / "bundle.zip")
    assert models.add(tmp_path / "bundle.zip").digest == bundle.digest


def test_hard_linked_sources_are_copied(models: Registry, make: Make, tmp_path: Path) -> None:
    """Package installers link files from their cache; the copy stands alone."""
    shutil.copytree(make(), tmp_path / "linked", copy_function=os.link)
    folder = models.add(tmp_path / "linked").folder
    assert {path.stat().st_nlink for path in folder.rglob("*") if path.is_file()} == {1}


def test_versions_are_listed_by_precedence(models: Registry, make: Make) -> None:
    for version in ("1.10.0", "1.9.0", "1.10.0-rc.1"):
        models.add(make(version), check_golden=False)
    assert models.versions("threshold") == ["1.9.0", "1.10.0-rc.1", "1.10.0"]


def _nothing_installed(models: Registry) -> bool:
    return models.names() == [] and list((models.root / ".incoming").iterdir()) == []


def test_a_bad_bundle_leaves_nothing(models: Registry, make: Make, tmp_path: Path) -> None:
    source = make()
    (source / "card.md").write_text("altered")
    with pytest.raises(BundleError, match="altered"):
        models.add(source)
    (tmp_path / "no.zip").write_bytes(b"no zip")
    with pytest.raises(BundleError, match=r"not a .zip"):
        models.add(tmp_path / "no.zip")
    with pytest.raises(BundleError, match="cannot be read"):
        models.add(tmp_path / "nowhere")
    assert _nothing_installed(models)


@pytest.mark.usefixtures("real_golden_cases")
def test_a_golden_case_that_disagrees_is_not_installed(models: Registry, make: Make) -> None:
    with pytest.raises(GoldenCaseError):
        models.add(make(golden="wrong"))
    assert _nothing_installed(models)


@pytest.mark.usefixtures("real_golden_cases")
def test_a_golden_case_left_out_when_adding_is_run_when_activating(models: Registry, make: Make) -> None:
    models.add(make(golden="wrong"), check_golden=False)
    with pytest.raises(GoldenCaseError):
        models.activate("threshold", "1.0.0")
    assert models.active_version("threshold") is None


def test_the_golden_case_is_run_once(models: Registry, make: Make, golden_ran: list[str]) -> None:
    models.add(make("1.0.0"))
    models.activate("threshold", "1.0.0")
    assert golden_ran == ["1.0.0"]
    models.add(make("1.1.0"), check_golden=False)
    models.activate("threshold", "1.1.0")
    models.activate("threshold", "1.0.0")
    models.activate("threshold", "1.1.0")
    assert golden_ran == ["1.0.0", "1.1.0"]


def test_adding_twice_changes_nothing(models: Registry, make: Make) -> None:
    source = make()
    first = models.add(source)
    inodes = {path.stat().st_ino for path in first.folder.rglob("*")}
    assert models.add(source) == first
    assert {path.stat().st_ino for path in first.folder.rglob("*")} == inodes


def test_a_version_never_changes(models: Registry, make: Make) -> None:
    first = models.add(make("1.0.0"), check_golden=False)
    with pytest.raises(
        RegistryError, match=r"Version 1\.0\.0 of 'threshold' is installed with other contents"
    ):
        models.add(make("1.0.0", thresholds=(90.5, 300.5)), check_golden=False)
    assert models.get("threshold", "1.0.0") == first


def test_a_folder_that_was_put_there_by_hand_is_not_installed(models: Registry, make: Make) -> None:
    models.add(make("1.0.0"), check_golden=False)
    shutil.copytree(make("1.1.0"), models.root / "threshold" / "1.1.0")
    assert models.versions("threshold") == ["1.0.0"]
    with pytest.raises(ModelUnknownError):
        models.get("threshold", "1.1.0")
    models.add(make("1.1.0"), check_golden=False)
    assert models.versions("threshold") == ["1.0.0", "1.1.0"]


def test_what_an_interrupted_run_left_is_removed(models: Registry, make: Make) -> None:
    incoming = models.root / ".incoming"
    shutil.copytree(make(), incoming / "old")
    (incoming / "link").symlink_to(incoming / "old")
    models.add(make(), check_golden=False)
    assert list(incoming.iterdir()) == []


# Finding out what was altered


def _alter(folder: Path) -> None:
    (folder / "card.md").write_text("altered")


def _flip_in_place_and_hide_the_time(folder: Path) -> None:
    path = folder / "student.onnx"
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(20)
        byte = file.read(1)[0]
        file.seek(20)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_size == before.st_size


def _replace_whole(folder: Path) -> None:
    shutil.rmtree(folder)
    make_threshold_bundle(folder, thresholds=(90.5, 300.5))


def _reseal(folder: Path) -> None:
    (folder / "card.md").write_text("altered, and sealed again")
    seal(folder)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(
    "damage",
    [
        _alter,
        _flip_in_place_and_hide_the_time,
        _replace_whole,
        _reseal,
        shutil.rmtree,
        lambda folder: (folder / "golden" / "labelmap.nii.gz").unlink(),
        lambda folder: (folder / "extra.onnx").touch(),
        lambda folder: os.link(folder / "card.md", folder.parent / "linked"),
    ],
)
def test_a_changed_version_is_found_and_adding_it_again_repairs_it(
    models: Registry,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    warm: bool,
) -> None:
    monkeypatch.setattr(bundle_cache, "_SETTLED_NS", 0)
    source = make()
    _add_and_activate(models, source)
    if warm:
        models.active("threshold")
    damage(models.root / "threshold" / "1.0.0")
    for find in (models.active, lambda name: models.get(name, "1.0.0"), models.rollback):
        with pytest.raises(RegistryError):
            find("threshold")
    with pytest.raises(RegistryError, match="no longer what was installed"):
        models.activate("threshold", "1.0.0")
    models.add(source, check_golden=False)
    assert models.active("threshold").digest == Bundle.open(source).digest


def test_an_unchanged_version_is_read_once(
    models: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    _add_and_activate(models, make())
    monkeypatch.setattr(bundle_cache, "_SETTLED_NS", 0)
    opened: list[Path] = []

    class Counted(Bundle):
        @staticmethod
        def open(folder: Path, **arguments: object) -> Bundle:
            opened.append(folder)
            return Bundle.open(folder, **arguments)

    monkeypatch.setattr(bundle_cache, "Bundle", Counted)
    models.verify("threshold", "1.0.0", check_golden=False)
    assert models.active("threshold") is models.active("threshold")
    assert len(opened) == 1
    models.verify("threshold", "1.0.0", check_golden=False)
    assert len(opened) == 2


def test_a_file_that_changed_a_moment_ago_is_not_trusted_by_its_stat(
    models: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one tick of its clock, a file system shows no second change; as if every change were so."""
    monkeypatch.setattr(bundle_cache, "_SETTLED_NS", 3600 * 10**9)
    real = bundle_cache._fingerprint
    frozen: dict[Path, tuple[object, ...]] = {}
    monkeypatch.setattr(bundle_cache, "_fingerprint", lambda f: frozen.setdefault(f, real(f)))
    _add_and_activate(models, make())
    models.active("threshold")
    _alter(models.root / "threshold" / "1.0.0")
    with pytest.raises(RegistryError):
        models.active("threshold")


def test_damage_that_no_stat_shows_is_found_by_verify(
    models: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_cache, "_SETTLED_NS", 0)
    real = bundle_cache._fingerprint
    frozen: dict[Path, tuple[object, ...]] = {}
    monkeypatch.setattr(bundle_cache, "_fingerprint", lambda f: frozen.setdefault(f, real(f)))
    _add_and_activate(models, make())
    models.active("threshold")
    _alter(models.root / "threshold" / "1.0.0")
    models.active("threshold")  # the stated limit of the quick look
    with pytest.raises(RegistryError, match="altered"):
        models.verify("threshold", "1.0.0")


# Activating, rolling back, withdrawing


def test_activate_and_roll_back(models: Registry, make: Make) -> None:
    _add_and_activate(models, make("1.0.0"), make("1.1.0"), make("1.2.0"))
    assert models.active("threshold").manifest.version == "1.2.0"
    assert models.rollback("threshold").manifest.version == "1.1.0"
    assert models.rollback("threshold").manifest.version == "1.0.0"
    with pytest.raises(RegistryError, match="no earlier active version"):
        models.rollback("threshold")
    assert models.active_version("threshold") == "1.0.0"


def test_activating_the_active_version_again_adds_no_step_back(models: Registry, make: Make) -> None:
    _add_and_activate(models, make("1.0.0"), make("1.1.0"))
    models.activate("threshold", "1.1.0")
    document = json.loads((models.root / "threshold" / "active.json").read_text())
    assert document["history"] == ["1.0.0", "1.1.0"]
    assert models.rollback("threshold").manifest.version == "1.0.0"


def test_rolling_back_skips_what_is_active_anyway(models: Registry, make: Make) -> None:
    _add_and_activate(models, make("1.0.0"), make("1.1.0"), make("1.2.0"))
    models.activate("threshold", "1.1.0")
    models.withdraw("threshold", "1.2.0")
    assert models.rollback("threshold").manifest.version == "1.0.0"


def test_another_process_sees_what_is_active(models: Registry, make: Make) -> None:
    other = Registry(models.root)
    _add_and_activate(models, make("1.0.0"))
    assert other.active("threshold").manifest.version == "1.0.0"
    _add_and_activate(models, make("1.1.0"))
    assert other.active("threshold").manifest.version == "1.1.0"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"labels": ("low", "middle")}, r"label 2 is 'middle' .*, not 'high' "),
        ({"labels": ("low",), "thresholds": (100.5,)}, r"label 2 \('high' .*\) is gone"),
        ({"labels": ("low", "high", "top"), "thresholds": (1.5, 2.5, 3.5)}, r"label 3 \('top' .*\) is new"),
        ({"channels": 2}, r"the channels are 'channel 0', 'channel 1', not 'channel 0'"),
        ({"modality": "CT"}, r"the channels are 'channel 0' \[CT\], not 'channel 0'"),
        ({"orientation": "LPS"}, r"the orientation is LPS, not any"),
    ],
)
def test_a_version_that_means_something_else_needs_a_confirmation(
    models: Registry, make: Make, arguments: dict[str, object], says: str
) -> None:
    _add_and_activate(models, make("1.0.0"))
    models.add(make("2.0.0", **arguments), check_golden=False)
    with pytest.raises(ModelChangedError, match=says):
        models.activate("threshold", "2.0.0")
    assert models.active_version("threshold") == "1.0.0"
    models.activate("threshold", "2.0.0", accept_changed_labels=True)
    assert models.active_version("threshold") == "2.0.0"
    assert models.rollback("threshold").manifest.version == "1.0.0"


@pytest.mark.parametrize(
    "arguments", [{"thresholds": (90.5, 200.5)}, {"title": "Other"}, {"head": "sigmoid"}, {"folds": 2}]
)
def test_other_weights_need_no_confirmation(
    models: Registry, make: Make, arguments: dict[str, object]
) -> None:
    _add_and_activate(models, make("1.0.0"), make("1.1.0", **arguments))
    assert models.active_version("threshold") == "1.1.0"


def test_a_damaged_active_version_can_be_left_with_a_confirmation_only(models: Registry, make: Make) -> None:
    _add_and_activate(models, make("1.0.0"))
    models.add(make("1.1.0"), check_golden=False)
    _alter(models.root / "threshold" / "1.0.0")
    with pytest.raises(ModelChangedError, match="cannot be compared"):
        models.activate("threshold", "1.1.0")
    assert models.activate("threshold", "1.1.0", accept_changed_labels=True).manifest.version == "1.1.0"


def test_an_active_version_that_is_not_trusted_now_is_not_to_be_repaired(
    models: Registry, make: Make
) -> None:
    _add_and_activate(models, make("1.0.0"))
    models.add(make("1.1.0"), check_golden=False)
    sign(models.root / "threshold" / "1.1.0", KEY)
    strict = Registry(models.root, trusted_keys=[KEY.public_key()])
    with pytest.raises(
        ModelChangedError, match=r"1\.0\.0 .* cannot be compared with: .* not signed"
    ) as caught:
        strict.activate("threshold", "1.1.0")
    assert "trust its maker's key" in caught.value.remedy
    assert "repair" not in caught.value.remedy


def test_a_withdrawn_version_cannot_be_activated_nor_rolled_back_to(models: Registry, make: Make) -> None:
    _add_and_activate(models, make("1.0.0"), make("1.1.0"), make("1.2.0"))
    models.withdraw("threshold", "1.1.0")
    assert models.is_withdrawn("threshold", "1.1.0")
    with pytest.raises(ModelWithdrawnError):
        models.activate("threshold", "1.1.0")
    assert models.rollback("threshold").manifest.version == "1.0.0"


def test_a_withdrawn_active_version_runs_no_more_but_can_be_read(models: Registry, make: Make) -> None:
    _add_and_activate(models, make("1.0.0"), make("1.1.0"))
    models.withdraw("threshold", "1.1.0")
    with pytest.raises(ModelWithdrawnError, match="Activate another version, or roll back"):
        models.active("threshold")
    assert models.get("threshold", "1.1.0").manifest.version == "1.1.0"
    assert models.active_version("threshold") == "1.1.0"
    assert models.rollback("threshold").manifest.version == "1.0.0"
    assert models.active("threshold").manifest.version == "1.0.0"


def test_adding_a_withdrawn_version_again_does_not_bring_it_back(models: Registry, make: Make) -> None:
    source = make("1.0.0")
    models.add(source, check_golden=False)
    models.withdraw("threshold", "1.0.0")
    models.add(source, check_golden=False)
    assert models.is_withdrawn("threshold", "1.0.0")


def test_withdrawing_while_the_golden_case_runs_wins(
    models: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.add(make("1.0.0"), check_golden=False)
    monkeypatch.setattr(
        registry,
        "check_golden_case_everywhere",
        lambda *_, **__: Registry(models.root).withdraw("threshold", "1.0.0"),
    )
    with pytest.raises(ModelWithdrawnError):
        models.activate("threshold", "1.0.0")
    assert models.active_version("threshold") is None


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("threshold", "9.9.9"),
        ("nothing", "1.0.0"),
        ("threshold", "../../outside"),
        ("threshold", "1.0.0/../1.0.0"),
        ("threshold", ""),
        ("threshold", "1.0.0\n"),
        ("..", "1.0.0"),
        ("../registry/threshold", "1.0.0"),
        ("", "threshold/1.0.0"),
        (".incoming", "1.0.0"),
        ("a\0b", "1.0.0"),
        ("x" * 5000, "1.0.0"),
    ],
)
def test_names_and_versions_from_outside_lead_nowhere(
    models: Registry, make: Make, name: str, version: str
) -> None:
    models.add(make("1.0.0"), check_golden=False)
    for ask in (models.get, models.verify, models.activate, models.withdraw):
        with pytest.raises(ModelUnknownError) as caught:
            ask(name, version)
        assert len(str(caught.value)) < 500
    assert not models.is_withdrawn(name, version)
    if name != "threshold":
        assert models.versions(name) == []
        assert models.active_version(name) is None
        with pytest.raises(ModelUnknownError):
            models.active(name)
        with pytest.raises(RegistryError):
            models.rollback(name)
    assert not (models.root.parent / "outside").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 2}', '{"history": ["1.0.0"]}', "\0"])
def test_a_damaged_pointer_file_is_said(models: Registry, make: Make, text: str) -> None:
    _add_and_activate(models, make())
    (models.root / "threshold" / "active.json").write_text(text)
    with pytest.raises(RegistryError, match=r"active.json of the model 'threshold'"):
        models.active("threshold")
    with pytest.raises(RegistryError):
        models.add(make(), check_golden=False)


def test_the_pointer_file_is_plain_json(models: Registry, make: Make) -> None:
    _add_and_activate(models, make("1.0.0"), make("1.1.0"))
    models.withdraw("threshold", "1.0.0")
    document = json.loads((models.root / "threshold" / "active.json").read_text())
    assert document["history"] == ["1.0.0", "1.1.0"]
    assert document["withdrawn"] == ["1.0.0"]
    assert document["installed"]["1.1.0"] == models.active("threshold").digest


def test_the_history_is_bounded() -> None:
    state = ModelState(installed={"1.0.0": "0" * 64, "1.1.0": "1" * 64})
    for i in range(MAX_HISTORY + 11):
        state = state.with_active(f"1.{i % 2}.0")
    assert len(state.history) == MAX_HISTORY
    assert state.active == "1.0.0"


# Signatures


def test_with_trusted_keys_only_signed_bundles_get_in(tmp_path: Path, make: Make) -> None:
    models = Registry(tmp_path / "registry", trusted_keys=[KEY.public_key()])
    source = make()
    with pytest.raises(SignatureError):
        models.add(source)
    assert _nothing_installed(models)
    sign(source, KEY)
    models.add(source)
    assert models.activate("threshold", "1.0.0").manifest.version == "1.0.0"


def test_an_unsigned_version_from_before_is_not_run_until_it_is_added_signed(
    models: Registry, make: Make
) -> None:
    source = make()
    _add_and_activate(models, source)
    strict = Registry(models.root, trusted_keys=[KEY.public_key()])
    with pytest.raises(SignatureError):
        strict.active("threshold")
    sign(source, KEY)
    strict.add(source, check_golden=False)
    assert strict.active("threshold").digest == Bundle.open(source).digest


def test_a_signature_that_comes_later_is_kept(models: Registry, make: Make) -> None:
    source = make()
    models.add(source)
    sign(source, KEY)
    folder = models.add(source).folder
    assert (folder / "SHA256SUMS.sig").read_bytes() == (source / "SHA256SUMS.sig").read_bytes()


def test_runtimes_are_those_that_are_asked_for(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(registry, "check_golden_case_everywhere", lambda _, runtimes: asked.append(runtimes))
    Registry(tmp_path / "one", runtimes=["onnxruntime"]).add(make())
    Registry(tmp_path / "two").add(make())
    assert asked == [("onnxruntime",), None]


# Several at once


def test_several_at_once_lose_nothing(models: Registry, make: Make) -> None:
    sources = [make(f"1.{i}.0") for i in range(6)]

    def work(source: Path) -> None:
        mine = Registry(models.root)
        version = mine.add(source, check_golden=False).manifest.version
        mine.activate("threshold", version)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, sources))
    assert models.versions("threshold") == [f"1.{i}.0" for i in range(6)]
    history = json.loads((models.root / "threshold" / "active.json").read_text())["history"]
    assert sorted(history) == models.versions("threshold")


def test_a_registry_that_is_held_says_so(
    models: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.add(make(), check_golden=False)
    monkeypatch.setattr(registry, "CHANGE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(registry, "ADD_TIMEOUT_S", 0.05)
    with file_lock(models.root / ".lock", timeout_s=1):
        assert models.get("threshold", "1.0.0").manifest.version == "1.0.0"  # reading needs no lock
        with pytest.raises(RegistryBusyError) as caught:
            models.withdraw("threshold", "1.0.0")
    assert caught.value.retryable
    with file_lock(models.root / ".add.lock", timeout_s=1), pytest.raises(RegistryBusyError):
        models.add(make(), check_golden=False)
    models.withdraw("threshold", "1.0.0")


# What ships


def test_seeding_installs_and_activates_the_newest_of_each_name_once(models: Registry, make: Make) -> None:
    shipped = [make("1.10.0"), make("1.9.0"), make("1.0.0", name="other")]
    assert {b.manifest.name: b.manifest.version for b in models.seed(shipped)} == {
        "threshold": "1.10.0",
        "other": "1.0.0",
    }
    assert models.versions("threshold") == ["1.9.0", "1.10.0"]
    models.activate("threshold", "1.9.0")
    assert models.seed([*shipped, make("1.11.0")]) == []
    assert models.active_version("threshold") == "1.9.0"
    assert "1.11.0" not in models.versions("threshold")


def test_seeding_leaves_a_name_alone_that_has_a_version_of_its_own(models: Registry, make: Make) -> None:
    models.add(make("3.0.0"), check_golden=False)
    assert models.seed([make("1.0.0")]) == []
    assert models.active_version("threshold") is None


def test_seeding_takes_up_what_an_interrupted_run_left(models: Registry, make: Make) -> None:
    first, second = make("1.0.0"), make("1.1.0")
    models.add(first, check_golden=False)
    assert [bundle.manifest.version for bundle in models.seed([first, second])] == ["1.1.0"]


def test_seeding_never_activates_what_was_withdrawn(models: Registry, make: Make) -> None:
    first, second = make("1.0.0"), make("1.1.0")
    models.add(second, check_golden=False)
    models.withdraw("threshold", "1.1.0")
    assert [bundle.manifest.version for bundle in models.seed([first, second])] == ["1.0.0"]


def test_shipped_bundles_are_the_folders_by_name_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = tmp_path / "bundles"
    for version in ("1.0.0", "1.1.0"):
        make_threshold_bundle(bundles / "threshold" / version, version=version)
    (bundles / "threshold" / "notes").mkdir()
    (bundles / "README.md").touch()
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "registry.py"))
    assert shipped_bundles() == [bundles / "threshold" / "1.0.0", bundles / "threshold" / "1.1.0"]


def test_every_shipped_bundle_opens_and_lies_where_its_name_says() -> None:
    assert shipped_bundles()
    for folder in shipped_bundles():
        manifest = Bundle.open(folder).manifest
        assert (manifest.name, manifest.version) == (folder.parent.name, folder.name)
