"""The models that this node has: versions on disk, which one is active, and how that changes.

::

    <root>/<name>/<version>/     an installed bundle, never changed
    <root>/<name>/active.json    what is installed, active, was active, is withdrawn
    <root>/.incoming/            bundles on their way in; whatever an interrupted run left there is removed

A bundle is copied (or unpacked) into ``.incoming``, flushed to the disk, verified there, and renamed into
place; then ``active.json`` is replaced. That last rename is what installs or activates: a process that
dies before it has changed nothing, and a folder without its line in ``active.json`` is not installed.
Several processes may use one registry: changes are made under file locks, and reading needs none.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from models.bundle import Bundle, parse_manifest, unpack_zip
from models.bundle_cache import BundleCache
from models.bundle_files import (
    MANIFEST,
    MAX_BUNDLE_BYTES,
    SIGNATURE,
    copy_files,
    empty_folder,
    fsync_files,
    fsync_folder,
    read_file,
)
from models.changes import meaning_changes, version_key
from models.errors import (
    BundleError,
    ModelChangedError,
    ModelUnknownError,
    ModelWithdrawnError,
    RegistryError,
    SignatureError,
)
from models.golden import check_golden_case_everywhere
from models.manifest import Manifest, is_name
from models.registry_state import ModelState, file_lock, load_state, save_state

CHANGE_TIMEOUT_S = 60.0
ADD_TIMEOUT_S = 900.0

_INCOMING = ".incoming"


class Registry:
    """A folder of installed bundles. Making one reads and writes nothing.

    Parameters
    ----------
    root : Path
        The folder; made at the first :meth:`add`. Nobody but the node should be able to write to it.
    trusted_keys : sequence of Ed25519PublicKey, optional
        Where given, every bundle must be signed by one of them, whenever it is added, activated or read.
    runtimes : sequence of str, optional
        Where golden cases must come out right; by default on every available runtime.
    """

    def __init__(
        self,
        root: Path,
        *,
        trusted_keys: Sequence[Ed25519PublicKey] | None = None,
        runtimes: Sequence[str] | None = None,
    ) -> None:
        self.root = root
        self.trusted_keys = None if trusted_keys is None else tuple(trusted_keys)
        self.runtimes = None if runtimes is None else tuple(runtimes)
        self._opened = BundleCache(self.trusted_keys)

    def names(self) -> list[str]:
        """Every model name with an installed version, sorted."""
        if not self.root.is_dir():
            return []
        return sorted(
            entry.name for entry in self.root.iterdir() if is_name(entry.name) and self.versions(entry.name)
        )

    def versions(self, name: str) -> list[str]:
        """Every installed version of a model, withdrawn ones too, by precedence; empty if unknown."""
        return sorted(self._state(name).installed, key=version_key)

    def get(self, name: str, version: str) -> Bundle:
        """An installed version, verified.

        A file that was altered, removed or added is found out, at the price of a few stat calls (see
        :class:`models.bundle_cache.BundleCache`). What these cannot see, damage below the file system,
        :meth:`verify` does.

        Raises
        ------
        ModelUnknownError
            If it is not installed.
        RegistryError
            If it is no longer what was installed.
        SignatureError
            If no trusted key signed it.
        """
        state = self._state_with(name, version)
        try:
            bundle = self._opened.open(self.root / name / version)
        except SignatureError:
            raise
        except BundleError as error:
            raise _altered(name, version, error.message) from error
        if bundle.digest != state.installed[version]:
            raise _altered(name, version, "its digest differs")
        return bundle

    def verify(self, name: str, version: str, *, check_golden: bool = True) -> Bundle:
        """An installed version, with all its bytes read and its golden case run, whatever is remembered.

        Raises
        ------
        GoldenCaseError
            If its golden case does not come out right; else as :meth:`get` does.
        """
        self._opened.forget(self.root / name / version)
        bundle = self.get(name, version)
        if check_golden:
            check_golden_case_everywhere(bundle, runtimes=self.runtimes)
        return bundle

    def active_version(self, name: str) -> str | None:
        """The active version, even where it is withdrawn; None where there is none."""
        return self._state(name).active

    def active(self, name: str) -> Bundle:
        """The active version, verified as :meth:`get` does.

        Raises
        ------
        ModelUnknownError
            If the model has no active version.
        ModelWithdrawnError
            If the active version is withdrawn.
        """
        version = self.active_version(name)
        if version is None:
            raise ModelUnknownError(
                f"The model {name[:64]!r} has no active version here.",
                remedy=f"Models here: {', '.join(self.names()) or 'none'}. Add a bundle and activate it.",
            )
        if self.is_withdrawn(name, version):
            raise ModelWithdrawnError(
                f"The active version {version} of {name!r} is withdrawn.",
                remedy="Activate another version, or roll back.",
            )
        return self.get(name, version)

    def is_withdrawn(self, name: str, version: str) -> bool:
        """True for a version that was withdrawn: it starts no job and cannot be activated."""
        return version in self._state(name).withdrawn

    def add(self, source: Path, *, check_golden: bool = True) -> Bundle:
        """Install a bundle, without activating it.

        Adding what is installed changes nothing, and repairs it where its files were damaged.

        Parameters
        ----------
        source : Path
            A folder, or a .zip file.
        check_golden : bool
            False leaves the golden case for :meth:`activate`, which never goes without.

        Raises
        ------
        BundleError
            If it is not a bundle, not whole, not safe, not signed, or its golden case does not come out.
        RegistryError
            If the same version is installed with other contents.
        """
        (self.root / _INCOMING).mkdir(parents=True, exist_ok=True)
        with file_lock(self.root / ".add.lock", timeout_s=ADD_TIMEOUT_S), self._incoming_folder() as incoming:
            if source.is_file():
                unpack_zip(source, incoming, limit_bytes=MAX_BUNDLE_BYTES)
            else:
                copy_files(source, incoming)
            bundle = Bundle.open(incoming, trusted_keys=self.trusted_keys)
            if check_golden:
                check_golden_case_everywhere(bundle, runtimes=self.runtimes)
            fsync_files(incoming)
            with self._changing():
                return self._install(bundle, golden_checked=check_golden)

    def activate(self, name: str, version: str, *, accept_changed_labels: bool = False) -> Bundle:
        """Make a version the active one.

        Raises
        ------
        ModelWithdrawnError
            If it is withdrawn.
        ModelChangedError
            If its labels, channels or orientation differ from those of the active version, and
            ``accept_changed_labels`` does not say that this is meant. The message names the differences.
        RegistryError, BundleError
            As :meth:`verify` does; the golden case is run unless it was when the bundle was added.
        """
        checked = version in self._state_with(name, version).golden_checked
        bundle = self.verify(name, version, check_golden=not checked)
        with self._changing():
            state = self._state(name)
            if version in state.withdrawn:
                raise ModelWithdrawnError(
                    f"Version {version} of {name!r} is withdrawn.", remedy="Activate another version."
                )
            if state.active == version:
                return bundle
            if state.active is not None and not accept_changed_labels:
                self._check_unchanged(name, state.active, bundle.manifest)
            save_state(self.root / name, state.with_active(version))
        return bundle

    def rollback(self, name: str, *, only_from: str | None = None) -> Bundle:
        """Go back to the version that was active before, withdrawn ones left out; again: one further.

        Parameters
        ----------
        only_from : str, optional
            Go back only if this version is still the active one.

        Raises
        ------
        RegistryError
            If there is nothing to go back to, or it is no longer what was installed, or another version
            than ``only_from`` is active.
        """
        with self._changing():
            if only_from is not None and self._state(name).active != only_from:
                raise RegistryError(f"Version {only_from} of {name[:64]!r} is not the active one any more.")
            state = self._state(name).rolled_back()
            if state is None or state.active is None:
                raise RegistryError(
                    f"The model {name[:64]!r} has no earlier active version to go back to.",
                    remedy="Activate a version by its number.",
                )
            bundle = self.get(name, state.active)
            save_state(self.root / name, state)
        return bundle

    def withdraw(self, name: str, version: str) -> None:
        """Withdraw a version for good. Its files stay, so that past results can be explained.

        Raises
        ------
        ModelUnknownError
            If it is not installed.
        """
        with self._changing():
            state = self._state_with(name, version)
            save_state(self.root / name, state.with_withdrawn(version))

    def seed(self, shipped: Sequence[Path] | None = None, *, check_golden: bool = True) -> list[Bundle]:
        """Install the bundles that ship, for every name that has no version yet; activate the newest of each.

        Returns what was activated. A name that has a version, active or not, is left alone.

        Raises
        ------
        SignatureError
            If a shipped bundle is not signed by a trusted key; the others are installed all the same.
        BundleError, RegistryError
            As :meth:`add` and :meth:`activate` do.
        """
        by_name: dict[str, dict[str, Path]] = {}
        for folder in shipped_bundles() if shipped is None else shipped:
            manifest = parse_manifest(read_file(folder, MANIFEST, allow_hard_links=True))
            by_name.setdefault(manifest.name, {})[manifest.version] = folder
        seeded = []
        untrusted: SignatureError | None = None
        for name, folders in sorted(by_name.items()):
            # A run that died between adding and activating is taken up again.
            if self.active_version(name) is not None or not folders.keys() >= set(self.versions(name)):
                continue
            try:
                for folder in folders.values():
                    self.add(folder, check_golden=check_golden)
            except SignatureError as error:
                untrusted = SignatureError(f"{name}: {error.message}", remedy=error.remedy)
                continue
            usable = [version for version in folders if not self.is_withdrawn(name, version)]
            if usable:
                seeded.append(self.activate(name, max(usable, key=version_key)))
        if untrusted is not None:
            raise untrusted
        return seeded

    def _state(self, name: str) -> ModelState:
        """What is known of a model; nothing where the name, which may come from outside, cannot be one."""
        return load_state(self.root / name) if is_name(name) else ModelState()

    def _state_with(self, name: str, version: str) -> ModelState:
        """What is known of a model that has this version; an installed version is safe as part of a path."""
        state = self._state(name)
        if version not in state.installed:
            others = sorted(state.installed, key=version_key)
            raise ModelUnknownError(
                f"There is no version {version[:64]!r} of the model {name[:64]!r} here.",
                remedy=f"Installed versions of it: {', '.join(others) or 'none'}.",
            )
        return state

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock that every change of an ``active.json`` is made under; for moments only."""
        self.root.mkdir(parents=True, exist_ok=True)
        with file_lock(self.root / ".lock", timeout_s=CHANGE_TIMEOUT_S):
            yield

    @contextmanager
    def _incoming_folder(self) -> Iterator[Path]:
        """A name for a new folder in ``.incoming``. The caller holds the lock for adding."""
        incoming = self.root / _INCOMING
        empty_folder(incoming)
        try:
            yield incoming / uuid.uuid4().hex
        finally:
            empty_folder(incoming)

    def _install(self, bundle: Bundle, *, golden_checked: bool) -> Bundle:
        """Rename a verified folder from ``.incoming`` into place, and write it into ``active.json``."""
        name, version = bundle.manifest.name, bundle.manifest.version
        home, state = self.root / name, self._state(name)
        if state.installed.get(version, bundle.digest) != bundle.digest:
            raise RegistryError(
                f"Version {version} of {name!r} is installed with other contents"
                f" (digest {state.installed[version][:12]}, not {bundle.digest[:12]}).",
                remedy="A version never changes: export the new model with a higher version.",
            )
        home.mkdir(exist_ok=True)
        fsync_folder(self.root)
        if not self._has_whole(bundle, state):
            if os.path.lexists(home / version):  # damaged, or left by an interrupted run
                os.rename(home / version, self.root / _INCOMING / f"{bundle.folder.name}.replaced")
            os.rename(bundle.folder, home / version)
            fsync_folder(home)
        save_state(home, state.with_installed(version, bundle.digest, golden_checked=golden_checked))
        return replace(bundle, folder=home / version)

    def _has_whole(self, bundle: Bundle, state: ModelState) -> bool:
        """True if this very bundle, with this very signature, is installed and undamaged."""
        name, version = bundle.manifest.name, bundle.manifest.version
        if version not in state.installed:
            return False
        try:
            installed = self.verify(name, version, check_golden=False)
        except (RegistryError, SignatureError):
            return False
        return _signature(installed.folder) == _signature(bundle.folder)

    def _check_unchanged(self, name: str, active_version: str, new: Manifest) -> None:
        try:
            changes = meaning_changes(self.get(name, active_version).manifest, new)
        except (RegistryError, SignatureError) as error:
            raise ModelChangedError(
                f"The active version {active_version} of {name!r} cannot be compared with: {error.message}",
                remedy=f"Confirm the change explicitly, or set the active version right. {error.remedy}",
            ) from error
        if changes:
            raise ModelChangedError(
                f"Version {new.version} of {name!r} differs from the active {active_version}: "
                f"{'; '.join(changes)}.",
                remedy="Tell whoever reads the results, then confirm the change explicitly.",
            )


def shipped_bundles() -> list[Path]:
    """The folders ``models/bundles/<name>/<version>`` of the students that ship with segnode, sorted."""
    return sorted(
        folder for folder in (Path(__file__).parent / "bundles").glob("*/*") if (folder / MANIFEST).is_file()
    )


def _signature(folder: Path) -> bytes:
    return read_file(folder, SIGNATURE) if (folder / SIGNATURE).exists() else b""


def _altered(name: str, version: str, what: str) -> RegistryError:
    return RegistryError(
        f"Version {version} of {name!r} is no longer what was installed: {what}",
        remedy="Find out who changed it; adding the same bundle again repairs it.",
    )
