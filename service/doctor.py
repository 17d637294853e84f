"""``segnode doctor``: looks for what would keep a node from working, and says what to do about it.

Every check looks and changes nothing, but for the C-ECHO that it sends to each destination, and a folder of
its own that comes and goes in a data folder which several hosts may share.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from models.errors import SegnodeError
from models.registry import Registry, shipped_bundles
from models.resources import available_memory_bytes, usable_cores
from models.runtimes import available_runtimes, choose_runtime
from service.diagnosis import Finding, ok, problem, warning
from service.errors import SettingsError
from service.mounts import NETWORK_FILE_SYSTEMS, mount_of
from service.records.database import LARGEST_CLOCK_OFFSET, Records
from service.records.migrate import current_revision, head_revision
from service.records.outage import reason_of
from service.routes import Route
from service.settings import GIB, Destination, Settings
from service.shared_folder import probe_shared_folder
from service.tls import TlsError, check_key, read_certificates

_LITTLE_MEMORY_BYTES = 4 * GIB
_CERTIFICATE_ENDS_SOON = timedelta(days=30)


Echo = Callable[[Destination], str | None]
"""Sends a C-ECHO; None if it was answered, else a sentence that says what went wrong."""


def examine(settings: Settings, registry: Registry, *, echo: Echo) -> Iterator[Finding]:
    """Every finding, one by one, as the checks go on."""
    yield from check_data_dir(settings)
    yield from check_disk(settings)
    opens = _opens(settings.data_dir)  # else what is in it cannot be looked at
    if opens:
        yield from check_database(settings)
    yield check_port("DICOM port", settings.dicom.host, settings.dicom.port)
    yield check_port("HTTP port", settings.http.host, settings.http.port)
    yield check_machine()
    yield check_runtime(settings)
    yield from check_certificates(settings)
    if opens:
        yield from check_models(registry)
        yield from check_configuration(settings, registry)
    for destination in settings.destinations:
        yield check_destination(destination, echo)


def check_configuration(settings: Settings, registry: Registry) -> Iterator[Finding]:
    """What keeps a node that runs from being of any use."""
    if not settings.dicom.peers and not settings.dicom.allow_unknown_peers:
        yield warning(
            "peers",
            "No peer is configured: every DICOM association is rejected.",
            "List the PACS under dicom.peers, with its AE title and address.",
        )
    else:
        known = ", ".join(peer.ae_title for peer in settings.dicom.peers) or "none by name"
        anyone = "; any other is accepted too" if settings.dicom.allow_unknown_peers else ""
        yield ok("peers", f"{known}{anyone}")
    if not settings.routes:
        yield warning(
            "routes",
            "No route is configured: what arrives over DICOM is kept, and nothing follows.",
            "Say under routes which series go to which model, and where its results go.",
        )
    for route in settings.routes:
        yield check_route(route, registry)


def check_route(route: Route, registry: Registry) -> Finding:
    """Whether a route leads from a model that can run to a destination."""
    what = f"route {route.name}"
    active = registry.active_version(route.model)
    version = route.version or active
    if version is None and route.model in _comes_with_serve(registry):
        to = ", ".join(route.destinations) or "no destination"
        return ok(what, f"{route.model}, which segnode serve installs, to {to}")
    if version is None:
        return problem(
            what,
            f"The model {route.model} has no active version here.",
            "Install it: segnode models add BUNDLE --activate.",
        )
    if version not in registry.versions(route.model):
        return problem(what, f"{route.model} {version} is not installed.", "Install it, or name another.")
    if registry.is_withdrawn(route.model, version):
        return problem(what, f"{route.model} {version} is withdrawn.", "Activate another version.")
    try:
        named = [channel.name for channel in registry.get(route.model, version).manifest.channels]
    except SegnodeError as error:
        return problem(what, error.message, error.remedy or "Add the model again.")
    if len(named) > 1 and not route.channels:
        return problem(
            what,
            f"{route.model} {version} has {len(named)} channels, and the route does not tell them apart.",
            f"Give conditions under channels for each of {', '.join(named)}.",
        )
    if route.channels and sorted(route.channels) != sorted(named):
        return problem(
            what,
            f"It names the channels {', '.join(route.channels)}; {route.model} {version} has "
            f"{', '.join(named)}.",
            "Name the channels as the model does.",
        )
    if not route.destinations:
        return warning(
            what, "It has no destination: its results stay in the node.", "Name some under destinations."
        )
    return ok(what, f"{route.model} {version} to {', '.join(route.destinations)}")


def check_data_dir(settings: Settings) -> Iterator[Finding]:
    """Whether the data folder can be used, and lies on a disk of this machine."""
    folder = settings.data_dir.resolve()
    existing = _existing(folder)
    if not folder.is_dir():
        if not _writable(existing):
            yield problem(
                "data folder",
                f"{folder} is not there, and cannot be made in {existing}.",
                "Make it, and give it to the node's user.",
            )
            return
        yield ok("data folder", f"{folder} is not there yet; segnode serve makes it")
    elif not _writable(folder):
        yield problem(
            "data folder", f"{folder} cannot be written to.", "Give it to the node's user (chown), mode 0700."
        )
    elif (mode := folder.stat().st_mode & 0o777) & 0o077:
        yield warning(
            "data folder",
            f"{folder} is open to other users of this machine (mode {mode:04o}), and holds studies with "
            "identity.",
            f"chmod 0700 {folder}",
        )
    else:
        yield ok("data folder", str(folder))
    mount = mount_of(existing)
    if is_sqlite(settings) and mount.kind in NETWORK_FILE_SYSTEMS:
        yield problem(
            "data folder",
            f"{folder} is on a network file system ({mount.kind}), where SQLite can lose what was "
            "acknowledged.",
            "Put data_dir on a local disk, or the records on PostgreSQL (database_url).",
        )
    elif not is_sqlite(settings) and folder.is_dir() and _writable(folder):
        yield from probe_shared_folder(folder, mount)


def is_sqlite(settings: Settings) -> bool:
    """True if the records are a file, so that there is one host; on a server there may be several."""
    return make_url(settings.records_url).get_backend_name() == "sqlite"


def check_disk(settings: Settings) -> Iterator[Finding]:
    """Whether the disk has more free than the watermark."""
    free = shutil.disk_usage(_existing(settings.data_dir.resolve())).free
    watermark = max(settings.storage.low_watermark_bytes, settings.storage.reserve_bytes)
    figures = f"{free / GIB:.1f} GiB free, watermark {watermark / GIB:.1f} GiB"
    if free < watermark:
        yield problem(
            "disk",
            f"{figures}: nothing new is accepted.",
            "Free some space, use a larger disk, or lower storage.low_watermark_bytes.",
        )
    elif free < 2 * watermark:
        yield warning("disk", f"{figures}.", "Plan for a larger disk.")
    else:
        yield ok("disk", figures)


def check_database(settings: Settings) -> Iterator[Finding]:
    """Whether the database answers and has this release's tables."""
    url = make_url(settings.records_url)
    if is_sqlite(settings) and not Path(url.database or "").exists():
        yield ok("database", "there is none yet; segnode serve makes it")
        return
    try:
        present, wanted = current_revision(settings.records_url), head_revision()
    except (SQLAlchemyError, OSError) as error:
        yield problem(
            "database",
            f"{url.render_as_string(hide_password=True)} does not answer "
            f"({reason_of(error) or type(error).__name__}).",
            "Check database_url, the server, and the user's rights.",
        )
        return
    except SettingsError as error:
        yield problem("database", error.message, error.remedy)
        return
    if not is_sqlite(settings):
        yield check_clock(settings)
    if present == wanted:
        yield ok("database", f"{url.get_backend_name()}, revision {present}")
    else:
        yield warning(
            "database",
            f"It is at revision {present or 'none'}; this release works on {wanted}.",
            "Back it up; segnode serve upgrades it at its next start.",
        )


def check_clock(settings: Settings) -> Finding:
    """Whether this host's clock is the database server's, by which leases go."""
    records = Records(settings.records_url)
    try:
        offset_s = records.compare_clocks().total_seconds()
    finally:
        records.close()
    if abs(offset_s) <= LARGEST_CLOCK_OFFSET.total_seconds():
        return ok("clock", f"within {LARGEST_CLOCK_OFFSET.total_seconds():g} s of the database server's")
    return warning(
        "clock",
        f"This host's clock is {abs(offset_s):.0f} s {'behind' if offset_s > 0 else 'ahead of'} the database "
        "server's.",
        "Keep NTP on both.",
    )


def check_port(what: str, host: str, port: int) -> Finding:
    """Whether a port can be listened on."""
    if port == 0:
        return ok(what, "any that is free")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family):
            return ok(what, f"{host}:{port} is free")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return warning(
                what,
                f"Something listens on {host}:{port} already.",
                "Right if this node is running; else stop it or configure another port.",
            )
        return problem(
            what,
            f"{host}:{port} cannot be listened on: {error.strerror}.",
            "Configure another address or port.",
        )


def check_machine() -> Finding:
    """Cores and memory that the node may use."""
    cores, memory = usable_cores(), available_memory_bytes()
    figures = f"{cores} core(s), {memory / GIB:.1f} GiB of memory available"
    if memory < _LITTLE_MEMORY_BYTES:
        return warning("machine", f"{figures}: large volumes will be refused.", "Give the node more memory.")
    return ok("machine", figures)


def check_runtime(settings: Settings) -> Finding:
    """Whether the runtime that is configured is installed."""
    try:
        chosen = choose_runtime(settings.worker.runtime)
    except SegnodeError as error:
        return problem("runtime", error.message, error.remedy)
    return ok("runtime", f"{chosen} (installed: {', '.join(available_runtimes())})")


def check_certificates(settings: Settings, now: datetime | None = None) -> Iterator[Finding]:
    """Whether each certificate that is configured can be used, belongs to its key, and lasts a while."""
    now = now or datetime.now(UTC).replace(tzinfo=None)
    http, dicom = settings.http, settings.dicom.tls
    pairs: list[tuple[str, Path | None, Path | None]] = [("HTTPS", http.tls_certificate, http.tls_key)]
    authorities: list[tuple[str, Path | None]] = []
    if dicom is not None:
        pairs.append(("DICOM TLS", dicom.certificate, dicom.key))
        authorities.append(("DICOM TLS, trusted", dicom.clients_signed_by))
    for destination in settings.destinations:
        if destination.tls is not None:
            what = f"TLS to {destination.name}"
            pairs.append((what, destination.tls.certificate, destination.tls.key))
            authorities.append((f"{what}, trusted", destination.tls.trusted))
    for what, certificate, key in pairs:
        if certificate is not None and key is not None:
            yield _check_certificate(what, certificate, key, now)
    for what, certificate in authorities:
        if certificate is not None:
            yield _check_certificate(what, certificate, None, now)


def _check_certificate(what: str, path: Path, key: Path | None, now: datetime) -> Finding:
    try:
        certificates = read_certificates(path)
        if key is not None:
            check_key(path, key)
    except TlsError as error:
        return problem(what, error.message, error.remedy or "Give other files.")
    # Of the node's own file every one must be good; an authority that is over may stand beside its heir.
    strictest, latest = (max, min) if key is not None else (min, max)
    begins_at = strictest(each.begins_at for each in certificates)
    ends_at = latest(each.ends_at for each in certificates)
    renew = "Renew it: put the new files in the place of the old; the node takes them without a restart."
    if ends_at <= now:
        return problem(what, f"{path} has expired, on {ends_at:%Y-%m-%d %H:%M} UTC.", renew)
    if begins_at > now:
        return problem(what, f"{path} is good from {begins_at:%Y-%m-%d %H:%M} UTC on, and not yet.", renew)
    if ends_at - now < _CERTIFICATE_ENDS_SOON:
        return warning(what, f"{path} expires in {(ends_at - now).days} days, on {ends_at:%Y-%m-%d}.", renew)
    return ok(what, f"{certificates[0].subject}, until {ends_at:%Y-%m-%d}")


def check_models(registry: Registry) -> Iterator[Finding]:
    """Whether every installed version is still what was installed."""
    names = registry.names()
    coming = _comes_with_serve(registry)
    if coming and not names:
        yield ok("models", f"none yet; segnode serve installs those that ship ({', '.join(coming)})")
    elif not names:
        yield warning(
            "models",
            "No model is installed, and those that ship are not signed by a key that this node trusts.",
            "Sign them with a key of the site (segnode models sign), and add them (segnode models add).",
        )
    for name in names:
        active = registry.active_version(name)
        for version in registry.versions(name):
            what = f"model {name} {version}"
            try:
                bundle = registry.get(name, version)
            except SegnodeError as error:
                yield problem(what, error.message, error.remedy)
                continue
            marks = ["active"] if version == active else []
            marks += ["withdrawn"] if registry.is_withdrawn(name, version) else []
            yield ok(what, " ".join([*marks, f"digest {bundle.digest[:12]}…"]))


def check_destination(destination: Destination, echo: Echo) -> Finding:
    """Whether a destination answers a C-ECHO."""
    what = f"destination {destination.name}"
    peer = f"{destination.ae_title}@{destination.host}:{destination.port}"
    wrong = echo(destination)
    if wrong is None:
        return ok(what, f"{peer} answers")
    return problem(
        what,
        wrong if wrong.startswith(peer) else f"{peer}: {wrong}",
        "Check host and port, that the PACS knows this node's AE title and address, and its firewall.",
    )


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above that exists."""
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _comes_with_serve(registry: Registry) -> list[str]:
    """The models that ship and that ``segnode serve`` installs: no version of them is here."""
    if registry.trusted_keys is not None:
        return []
    return sorted({folder.parent.name for folder in shipped_bundles()} - set(registry.names()))


def _opens(folder: Path) -> bool:
    """False for a folder that is there, and whose files this user may not look at."""
    return not folder.is_dir() or os.access(folder, os.R_OK | os.X_OK)


def _writable(folder: Path) -> bool:
    probe = folder / ".segnode-doctor"
    try:
        probe.touch()
        probe.unlink()
    except OSError:
        return False
    return True
