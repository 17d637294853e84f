"""The shipped compose files, as far as they can be judged before tests/compose brings them up."""

from __future__ import annotations

import json
import os
import re
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings, load_settings

REPOSITORY = Path(__file__).resolve().parents[2]
NODE = ("receiver", "api", "worker", "worker-gpu")


def compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    """A compose file with every variable at its default."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    assert "${" not in text, "a variable without a default"
    return dict(yaml.safe_load(text))


def settings_of(service: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Settings:
    """The settings of a node's container: the example for the site, and its environment over it."""
    (tmp_path / "password").write_text("secret")
    for name in [name for name in os.environ if name.startswith("SEGNODE_")]:
        monkeypatch.delenv(name)
    for name, value in compose()["services"][service]["environment"].items():
        if name.startswith("SEGNODE_") and name != "SEGNODE_CONFIG":
            monkeypatch.setenv(name, value if not name.endswith("_FILE") else str(tmp_path / "password"))
    return load_settings(REPOSITORY / "deploy" / "examples" / "compose.yaml")


@pytest.mark.parametrize("service", NODE)
def test_the_environment_and_the_example_are_settings(
    service: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = settings_of(service, monkeypatch, tmp_path)
    assert settings.records_url == "postgresql+psycopg://segnode:secret@postgres:5432/segnode"
    assert settings.models.require_signature
    assert settings.worker.models == ()
    assert settings.worker.runtime == ("onnxruntime-cuda" if service == "worker-gpu" else "auto")


def test_the_proxy_is_believed_and_nobody_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = settings_of("api", monkeypatch, tmp_path)
    file = compose()
    proxy = file["services"]["proxy"]["networks"]["inside"]["ipv4_address"]
    assert settings.http.behind_tls_proxy
    assert settings.http.trusted_proxies == (proxy,)
    assert file["networks"]["inside"]["internal"]
    (inside,) = file["networks"]["inside"]["ipam"]["config"]
    assert ip_address(proxy) in ip_network(inside["subnet"])
    # An address that the engine gives out by itself could be another container's.
    assert ip_address(proxy) not in ip_network(inside["ip_range"])
    shared = set(file["services"]["proxy"]["networks"]) & set(file["services"]["api"]["networks"])
    assert shared == {"inside"}, "by another network it would be seen by another address"
    others = {name: each for name, each in file["services"].items() if name != "proxy"}
    assert not any("ipv4_address" in json.dumps(each["networks"]) for each in others.values())


def test_the_gpu_is_asked_for_by_the_worker_on_it_alone() -> None:
    devices = [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    services = compose()["services"]
    asked = {
        name: each["deploy"]["resources"]["reservations"]["devices"]
        for name, each in services.items()
        if "reservations" in each["deploy"]["resources"]
    }
    assert asked == {"worker-gpu": devices}
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    (name, override), *others = compose("docker-compose.gpu.yml")["services"].items()
    assert (name, others) == ("worker", [])
    assert override["deploy"]["resources"]["reservations"]["devices"] == devices
    for each in (services["worker-gpu"], override):
        assert each["environment"]["SEGNODE_WORKER__RUNTIME"] == "onnxruntime-cuda"
        assert each["build"]["args"]["RUNTIME"] == "gpu"
        assert each["image"] == "segnode-gpu:0.1.0"


def test_every_container_is_closed() -> None:
    for name, each in compose()["services"].items():
        assert each["read_only"], name
        assert each["cap_drop"] == ["ALL"], name
        assert each.get("cap_add", []) == (["NET_BIND_SERVICE"] if name == "proxy" else []), name
        assert each["security_opt"] == ["no-new-privileges:true"], name
        assert each["restart"] == "unless-stopped", name
        assert each["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        assert {"cpus", "memory", "pids"} <= each["deploy"]["resources"]["limits"].keys(), name
        assert name in NODE or not each["user"].startswith(("0", "root")), name
        published = {"receiver", "proxy"}
        ports = each.get("ports", [])
        assert name in published or all(port.startswith("127.0.0.1:") for port in ports), name


def test_the_papers_list_the_images_that_there_are() -> None:
    paper = (REPOSITORY / "deploy" / "hardening.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| ([\w./-]+) \| (v?\d[\w.-]*) \|", paper, flags=re.MULTILINE))
    files = [(REPOSITORY / name).read_text() for name in ("docker-compose.yml", "deploy/Dockerfile")]
    used = set(re.findall(r"docker\.io/(?:library/)?([\w./-]+):(v?\d[\w.-]*)", "\n".join(files)))
    assert listed == used


def test_every_image_names_a_version_and_can_be_replaced() -> None:
    text = (REPOSITORY / "docker-compose.yml").read_text(encoding="utf-8")
    for image in re.findall(r"^ +image: (.+)$", text, flags=re.MULTILINE):
        assert re.fullmatch(r"\$\{[A-Z_]+_IMAGE:-[\w./-]+:v?\d[\w.-]*\}", image), image
