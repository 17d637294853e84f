"""What every process of a node needs before it can work: the data folder, the records, spool and models."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING

from models.bundle import Bundle
from models.errors import SignatureError
from models.registry import Registry
from models.signing import load_trusted_keys
from service.errors import SettingsError
from service.logs import get_logger
from service.records.database import Records
from service.records.migrate import upgrade
from service.settings import Settings
from service.spool import Spool

if TYPE_CHECKING:
    from service.tasks import Ringer

log = get_logger(__name__)


@dataclass(frozen=True)
class Node:
    """A node's parts, opened. Use it as a context manager: the database is closed at the end."""

    settings: Settings
    records: Records
    spool: Spool
    registry: Registry
    ringer: Ringer | None = None

    def __enter__(self) -> Node:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.ringer is not None:
            self.ringer.close()
        self.records.close()


def open_node(settings: Settings) -> Node:
    """Make what is not there yet, and open the rest. Several processes may do so at once.

    The data folder is made for the node's user alone, the database is brought to this release's tables.

    Raises
    ------
    SettingsError
        If the data folder or the database cannot be used.
    """
    make_data_dir(settings.data_dir)
    upgrade(settings.records_url)
    with ExitStack() as undo:
        records = Records(settings.records_url)
        undo.callback(records.close)
        spool = Spool(
            settings.spool_dir,
            low_watermark_bytes=settings.storage.low_watermark_bytes,
            reserve_bytes=settings.storage.reserve_bytes,
        )
        registry = open_registry(settings)
        ringer = None
        if (url := settings.wake_url) is not None:
            ringer = tasks().Ringer(tasks().make_app(url))
            records.ring = ringer.ring
        node = Node(settings, records, spool, registry, ringer)
        undo.pop_all()
    return node


def tasks() -> ModuleType:
    """:mod:`service.tasks`, which a node without a broker does not need. Raises SettingsError."""
    try:
        return import_module("service.tasks")
    except ImportError as error:
        raise SettingsError(
            f"broker_url needs a package that is not installed here ({error.name}).",
            remedy="Install segnode[scaleout], or leave broker_url out: workers then poll.",
        ) from error


def make_data_dir(path: Path) -> None:
    """Make the data folder, readable by the node's user alone.

    Raises
    ------
    SettingsError
        If it cannot be made or written to.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"The data folder {path} cannot be used: {error.strerror}.",
            remedy="Give data_dir a folder on a local disk that the node's user may write to.",
        ) from error


def open_registry(settings: Settings) -> Registry:
    """The models of a node; with the keys that it trusts, where signatures are required.

    Raises
    ------
    SignatureError
        If a key file cannot be read or holds no Ed25519 public key.
    """
    keys = load_trusted_keys(settings.models.trusted_keys)
    return Registry(settings.registry_dir, trusted_keys=keys if settings.models.require_signature else None)


def seed_models(registry: Registry) -> list[Bundle]:
    """Install the models that ship; what was activated.

    A node that asks for signatures starts without those that no trusted key has signed, and says so: its
    site signs them with a key of its own, and adds them.
    """
    try:
        return registry.seed()
    except SignatureError as error:
        log.error("models.shipped_not_trusted", reason=error.message, remedy=error.remedy)
        return []
