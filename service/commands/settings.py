"""The ``--config`` option, and the settings and the models that a command works on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from models.registry import Registry
    from service.settings import Settings

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar="SEGNODE_CONFIG",
        help="The configuration, a YAML file; SEGNODE_* variables win over it.",
        dir_okay=False,
    ),
]


def load(config: Path | None) -> Settings:
    """The settings of a file and the environment. Raises SettingsError."""
    from service.settings import load_settings

    return load_settings(config)


def cache_dir() -> Path:
    """Where a command without a node keeps what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "segnode"


def models_of_node_or_cache(config: Path | None) -> tuple[Registry, Path]:
    """The models and the cache that ``segnode segment`` uses.

    A node's own where one is named by a configuration or stands in the current folder, so that the file
    gets what a study would get; else the models that ship, in a folder of the user's own.
    """
    from service.node import open_registry

    settings = load(config)
    if config is None and not settings.data_dir.is_dir():
        settings = settings.model_copy(update={"data_dir": cache_dir()})
    registry = open_registry(settings)
    registry.seed()
    return registry, settings.cache_dir
