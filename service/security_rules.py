"""The sections of the configuration that say how connections are secured, and who may do how much."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerTls(_Section):
    """TLS of the DICOM listener: PEM files, read again when they change.

    ``trusted`` holds the authorities that sign the peers' certificates. Every peer must show one unless
    ``client_certificates`` is ``none``.
    """

    certificate: Path
    key: Path
    trusted: Path | None = None
    client_certificates: Literal["required", "none"] = "required"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.client_certificates == "required" and self.trusted is None:
            raise ValueError("client certificates are required: set trusted, or client_certificates: none")
        return self

    @property
    def clients_signed_by(self) -> Path | None:
        """The authorities of clients' certificates; None where clients need none."""
        return self.trusted if self.client_certificates == "required" else None


class ClientTls(_Section):
    """TLS to a server: the authorities that sign its certificate, the node's own where it asks for one.

    ``server_name`` is the name (or address) that its certificate must have; the host unless given.
    """

    trusted: Path
    certificate: Path | None = None
    key: Path | None = None
    server_name: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together")
        return self


class RateRule(_Section):
    """So many requests a second for long, and so many at once."""

    per_s: float = Field(gt=0)
    burst: int = Field(ge=1)


class RateRules(_Section):
    """How often one address, and one key, may ask the HTTP interface; ``null`` sets no limit."""

    address: RateRule | None = RateRule(per_s=100, burst=400)
    key: RateRule | None = RateRule(per_s=50, burst=200)


class SessionRules(_Section):
    """How long a session at the page lasts: without use, and at all."""

    idle_s: float = Field(default=1800.0, ge=300.0)  # use is noted to the minute
    longest_s: float = Field(default=12 * 3600.0, gt=0)


class OidcRules(_Section):
    """Login of people at an OpenID provider: authorization code with PKCE.

    Parameters
    ----------
    issuer : str
        The provider's address; its ``/.well-known/openid-configuration`` says the rest.
    client_id, client_secret_file
        As the provider knows the node; the secret stands alone in a file. A public client has none.
    redirect_url : str
        Where the provider sends people back: this node's own address and ``/auth/callback``.
    role_claim : str
        The claim of the ID token that says what a person is; dots lead into nested claims.
    admins, operators, uploaders : sequence of str
        Values of that claim that give each role; the highest counts. Whoever has none is not let in.
    trusted : path, optional
        PEM file of the authorities that sign the provider's certificate; the system's unless given.
    """

    issuer: Annotated[str, Field(pattern=r"^https?://[^\s?#]+$")]
    client_id: str = Field(min_length=1)
    client_secret_file: Path | None = None
    redirect_url: Annotated[str, Field(pattern=r"^https?://[^\s?#]+/auth/callback$")]
    scopes: tuple[str, ...] = ("openid", "profile")
    role_claim: str = "groups"
    admins: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    uploaders: tuple[str, ...] = ()
    timeout_s: float = Field(default=10.0, gt=0)
    trusted: Path | None = None
    allow_plain_http: bool = False  # for a provider on this very machine, to try it out

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.allow_plain_http and not (
            self.issuer.startswith("https://") and self.redirect_url.startswith("https://")
        ):
            raise ValueError("issuer and redirect_url must be https://")
        if "openid" not in self.scopes:
            raise ValueError("scopes must have openid among them")
        if not (self.admins or self.operators or self.uploaders):
            raise ValueError("name the values of role_claim that make admins, operators or uploaders")
        return self


class AtnaRules(_Section):
    """Where audit messages go: a repository that takes syslog over TLS (RFC 5425).

    ``tls`` is None only for a repository on this very machine, to try it out.
    """

    host: str
    port: int = Field(default=6514, ge=1, le=65535)
    tls: ClientTls | None
    source_id: str = Field(default="segnode", min_length=1, max_length=64)  # AuditSourceID: this node
    site_id: str = Field(default="", max_length=64)  # AuditEnterpriseSiteID
    timeout_s: float = Field(default=10.0, gt=0)
    interval_s: float = Field(default=5.0, gt=0)
    longest_wait_s: float = Field(default=300.0, gt=0)  # between tries while it cannot be reached

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tls is None and self.host not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError("audit messages leave this machine over TLS alone: set tls")
        return self
