"""Passwords that stand in files, as secrets are given to containers."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import SettingsError
from service.settings import with_password


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://broker:6379/0", "redis://:s%40t@broker:6379/0"),
        ("redis://default@broker/0", "redis://default:s%40t@broker/0"),
        (
            "postgresql+psycopg://segnode@postgres/segnode",
            "postgresql+psycopg://segnode:s%40t@postgres/segnode",
        ),
    ],
)
def test_a_password_file_goes_into_urls_with_and_without_a_user(
    tmp_path: Path, url: str, expected: str
) -> None:
    secret = tmp_path / "password"
    secret.write_text("s@t\n")
    assert with_password(url, secret) == expected
    assert with_password(url, None) == url


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_password_file_that_is_missing_or_empty_is_refused(tmp_path: Path, content: str | None) -> None:
    secret = tmp_path / "password"
    if content is not None:
        secret.write_text(content)
    with pytest.raises(SettingsError, match=r"password file .* (cannot be read|is empty)"):
        with_password("redis://broker/0", secret)
