"""The node's configuration: one YAML file plus ``SEGNODE_*`` environment variables, checked whole at start.

An environment variable names a nested key with two underscores: ``SEGNODE_DICOM__PORT=11113``. It wins
over the file. Every error in the configuration is reported at once, by its place in the file.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from sqlalchemy.engine import make_url

from service.errors import SettingsError
from service.governance_rules import CommitmentRules, GateRules, ProbationRules, RetentionRules, ShadowRules
from service.profiles import Profile
from service.routes import Identifier, Route, Section
from service.security_rules import AtnaRules, ClientTls, OidcRules, RateRules, ServerTls, SessionRules

GIB = 1024**3
MIB = 1024**2


def _check_ae_title(title: str) -> str:
    # PS3.5 6.2, VR AE: 1 to 16 characters of the default repertoire, no backslash, not spaces alone.
    if not 1 <= len(title.strip()) <= 16 or not re.fullmatch(r"[ -\[\]-~]{1,16}", title):
        raise ValueError("an AE title has 1 to 16 printable ASCII characters and no backslash")
    return title.strip()


def _check_network(address: str) -> str:
    ip_network(address, strict=False)
    return address


AETitle = Annotated[str, AfterValidator(_check_ae_title)]
Network = Annotated[str, AfterValidator(_check_network)]
Port = Annotated[int, Field(ge=0, le=65535)]


class Peer(Section):
    """A calling AE title that may open associations, the addresses it may come from, its certificates.

    Each of ``certificates`` is a name in the peer's certificate (common name or DNS name), or ``sha256:`` and
    the digest of the certificate in 64 hexadecimal digits. Without any, each certificate of a trusted
    authority will do.
    """

    ae_title: AETitle
    addresses: tuple[Network, ...] = Field(default=("127.0.0.0/8", "::1/128"), min_length=1)
    certificates: tuple[str, ...] = ()


class DicomSettings(Section):
    """The DICOM listener."""

    ae_title: AETitle = "SEGNODE"
    host: str = "127.0.0.1"
    port: Port = 11112
    peers: tuple[Peer, ...] = ()
    allow_unknown_peers: bool = False
    maximum_associations: int = Field(default=32, ge=1)
    network_timeout_s: float = Field(default=60.0, gt=0)
    dimse_timeout_s: float = Field(default=60.0, gt=0)
    maximum_object_bytes: int = Field(default=4 * GIB, ge=MIB)
    tls: ServerTls | None = None  # with it, plain text is not answered

    @model_validator(mode="after")
    def _certificates_are_asked_for(self) -> Self:
        asked = self.tls is not None and self.tls.client_certificates == "required"
        named = [peer.ae_title for peer in self.peers if peer.certificates]
        if named and not asked:
            raise ValueError(
                f"the peer {named[0]} has certificates, which only tls with client certificates looks at"
            )
        return self


class HttpSettings(Section):
    """The HTTP listener. Anything but loopback needs TLS, here or at a reverse proxy in front."""

    host: str = "127.0.0.1"
    port: Port = 8080
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    behind_tls_proxy: bool = False
    trusted_proxies: tuple[Network, ...] = ("127.0.0.1/32", "::1/128")  # they say where a request came from
    maximum_upload_bytes: int = Field(default=2 * GIB, ge=1)
    rates: RateRules = RateRules()
    sessions: SessionRules = SessionRules()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together")
        loopback = self.host in ("127.0.0.1", "::1", "localhost")
        if not (loopback or self.tls_certificate or self.behind_tls_proxy):
            raise ValueError(
                f"host {self.host} is not loopback: set tls_certificate and tls_key, "
                "or behind_tls_proxy: true where a reverse proxy ends TLS"
            )
        return self


class StorageSettings(Section):
    """The spool's disk: below ``low_watermark_bytes`` free, nothing new is accepted."""

    low_watermark_bytes: int = Field(default=5 * GIB, ge=0)
    reserve_bytes: int = Field(default=1 * GIB, ge=0)


class WorkerSettings(Section):
    """How jobs are run, and when one is given up."""

    runtime: Literal["auto", "openvino", "onnxruntime", "onnxruntime-cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    lease_s: float = Field(default=60.0, gt=0)
    stall_timeout_s: float = Field(default=600.0, gt=0)  # no progress for so long: the child is killed
    job_deadline_s: float = Field(default=3600.0, gt=0)
    maximum_failures: int = Field(default=3, ge=1)
    maximum_lapses: int = Field(default=10, ge=1)
    first_retry_s: float = Field(default=30.0, ge=0)  # after a failure; four times as long after each more
    jobs_per_child: int = Field(default=50, ge=1)
    poll_interval_s: float = Field(default=0.5, gt=0)
    idle_poll_interval_s: float = Field(default=10.0, gt=0)  # while a broker is proven to wake it
    models: tuple[Identifier, ...] = ()  # whose jobs it takes; empty for all
    memory_bytes: int | None = Field(default=None, ge=MIB)  # the most a job may use; measured unless given


class DeliverySettings(Section):
    """Back-off of deliveries to a destination that does not answer."""

    first_retry_s: float = Field(default=15.0, gt=0)
    maximum_retry_s: float = Field(default=900.0, gt=0)
    give_up_after_s: float = Field(default=72 * 3600.0, gt=0)  # parked then, never dropped
    maximum_failure_statuses: int = Field(default=10, ge=1)  # of 0xCxxx, before parking
    lease_s: float = Field(default=300.0, gt=0)


class Destination(Section):
    """A storage SCP that results are sent to; ``profile`` says which objects it gets, and in which form.

    With ``storage_commitment`` it is asked to confirm that it keeps them, and only then they are delivered.
    """

    name: Identifier
    ae_title: AETitle
    host: str
    port: Port
    calling_ae_title: AETitle | None = None  # the node's own where not given
    timeout_s: float = Field(default=30.0, gt=0)
    profile: Profile = Profile()
    tls: ClientTls | None = None
    storage_commitment: bool = False


class ModelSettings(Section):
    """Which bundles the node accepts.

    ``trusted_keys`` are files with one Ed25519 public key each (PEM), and folders of such files ``*.pem``.
    With ``require_gate`` a version is activated only after it has passed the gate.
    """

    require_signature: bool = False
    require_gate: bool = True
    trusted_keys: tuple[Path, ...] = ()
    maximum_bundle_bytes: int = Field(default=2 * GIB, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.require_signature and not self.trusted_keys:
            raise ValueError("require_signature needs at least one of trusted_keys")
        return self


class Settings(BaseSettings):
    """All of it. Frozen: a change of the file takes a restart."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="SEGNODE_", env_nested_delimiter="__"
    )

    data_dir: Path = Path("segnode-data")
    database_url: str | None = None
    database_password_file: Path | None = None
    broker_url: str | None = None  # of Valkey or Redis, which wakes workers; without one they poll
    broker_password_file: Path | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    dicom: DicomSettings = DicomSettings()
    http: HttpSettings = HttpSettings()
    storage: StorageSettings = StorageSettings()
    worker: WorkerSettings = WorkerSettings()
    delivery: DeliverySettings = DeliverySettings()
    oidc: OidcRules | None = None  # with it people log in at the hospital's identity provider
    atna: AtnaRules | None = None  # with it the audit trail goes to a repository too
    models: ModelSettings = ModelSettings()
    gate: GateRules = GateRules()
    probation: ProbationRules = ProbationRules()
    shadow: ShadowRules = ShadowRules()
    retention: RetentionRules = RetentionRules()
    commitment: CommitmentRules = CommitmentRules()
    destinations: tuple[Destination, ...] = ()
    routes: tuple[Route, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for kind, names in (
            ("destination", [d.name for d in self.destinations]),
            ("route", [r.name for r in self.routes]),
        ):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"every {kind} needs a name of its own; twice: {', '.join(twice)}")
        known = {d.name for d in self.destinations}
        for route in self.routes:
            unknown = sorted(set(route.destinations) - known)
            if unknown:
                raise ValueError(
                    f"route {route.name} sends to {', '.join(unknown)}, which is no destination here"
                )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings  # the environment wins over the file

    @property
    def records_url(self) -> str:
        """Database URL of the records; SQLite in the data folder unless another is configured."""
        if self.database_url is None:
            return f"sqlite:///{(self.data_dir / 'segnode.sqlite').resolve()}"
        return with_password(self.database_url, self.database_password_file)

    @property
    def wake_url(self) -> str | None:
        """URL of the broker with its password; None where there is no broker. Never log it."""
        return self.broker_url and with_password(self.broker_url, self.broker_password_file)

    @property
    def spool_dir(self) -> Path:
        return self.data_dir / "spool"

    @property
    def registry_dir(self) -> Path:
        return self.data_dir / "models"

    @property
    def cache_dir(self) -> Path:
        return self.data_dir / "cache"

    def destination(self, name: str) -> Destination | None:
        return next((d for d in self.destinations if d.name == name), None)

    def route(self, name: str) -> Route | None:
        return next((r for r in self.routes if r.name == name), None)

    @property
    def profile_keys(self) -> dict[str, str]:
        """The key of every destination's profile, by the destination's name."""
        return {d.name: d.profile.key for d in self.destinations}

    def route_with_channels(self, model_name: str) -> Route | None:
        """The route whose rules tell the channels of a model apart where nobody else does: the first such."""
        return next((r for r in self.routes if r.model == model_name and r.channels), None)

    def profiles_for(self, model_name: str, destinations: Iterable[str]) -> tuple[Profile, ...]:
        """Every distinct profile that the results of a job may have to be rendered in, the most wanted first.

        Beside those of the job's own destinations they are those of every route to the same model: a second
        route may take the series when the job is already running. Without any, the default.
        """
        of_routes = (name for r in self.routes if r.model == model_name for name in r.destinations)
        known = (self.destination(name) for name in (*destinations, *of_routes))
        return tuple(dict.fromkeys(d.profile for d in known if d is not None)) or (Profile(),)

    @property
    def results_digest(self) -> str:
        """SHA-256 of the settings that can change what a result says; part of every derived UID."""
        relevant = self.model_dump_json(include={"worker": {"runtime"}})
        return hashlib.sha256(relevant.encode()).hexdigest()


def with_password(url: str, path: Path | None) -> str:
    """A URL with the password that stands in a file, as secrets are given to containers.

    Raises
    ------
    SettingsError
        If the file cannot be read or is empty.
    """
    if path is None:
        return url
    try:
        password = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"The password file {path} cannot be read.", remedy="Let the node's user read it."
        ) from error
    if not password:
        raise SettingsError(f"The password file {path} is empty.", remedy="Write the password into it.")
    parsed = make_url(url)
    # Without a user name, as brokers have none, SQLAlchemy would write no password either.
    named = parsed.set(username=parsed.username or "", password=password)
    return named.render_as_string(hide_password=False)


def load_settings(path: Path | None = None) -> Settings:
    """Read the YAML file (if one is given) and the environment.

    Raises
    ------
    SettingsError
        If the file cannot be read, or anything in it or in the environment is wrong; all errors at once.
    """
    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise SettingsError(
                f"The configuration {path} cannot be read: {error.strerror}.",
                remedy="Give the path of a YAML file that the node's user may read.",
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"The configuration {path} is not YAML{_where_and_why(error)}.",
                remedy="Correct the file and start again.",
            ) from error
        if not isinstance(values, dict):
            raise SettingsError(
                f"The configuration {path} holds no mapping.", remedy="Write it as 'key: value' lines."
            )
    try:
        return Settings(**values)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc'])) or 'configuration'}: {_in_plain_words(e)}"
            for e in error.errors()
        ]
        raise SettingsError(
            f"{len(lines)} error(s) in the configuration{f' {path}' if path else ''}:\n" + "\n".join(lines),
            remedy="\nCorrect them and start again.",
        ) from error


def _where_and_why(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return f": {error}"
    mark = error.problem_mark
    where = "" if mark is None else f" from line {mark.line + 1}, column {mark.column + 1} on"
    return f"{where}: {error.problem or error.context}"


def _in_plain_words(error: ErrorDetails) -> str:
    """What is wrong with a value; of a key that does not exist, which existing one is spelt most like it."""
    if error["type"] != "extra_forbidden":
        return error["msg"].removeprefix("Value error, ")
    schema = Settings.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    known = {key for section in sections for key in section.get("properties", {})}
    meant = difflib.get_close_matches(str(error["loc"][-1]), sorted(known), n=1)
    return f"there is no such key{f', did you mean {meant[0]}' if meant else ''}"
