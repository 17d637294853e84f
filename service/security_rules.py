"""The sections of the configuration that say how connections are secured, and who may do how much."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator


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
