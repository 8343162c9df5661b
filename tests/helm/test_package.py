"""The packed chart: the links into rules/ and grafana/ are files in it, and it installs the same as the directory."""

from __future__ import annotations

import json
import shutil
import tarfile
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from tests.helm.engine import CHART, REPOSITORY, VALUES, Refused, notes, objects, pack, render, values

from shoal import __version__

if TYPE_CHECKING:
    from pathlib import Path

# What stays of 1 MiB, the most that a release's Secret can hold, for values and what they make.
LARGEST = 512 * 1024
DASHBOARD = {"uid": "shoal-node", "title": "Node {{ name }}", "panels": [{"legendFormat": "{{pod}} | ' \" \\ é"}]}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack the chart."""
    return pack(CHART, tmp_path_factory.mktemp("packed"))


@pytest.fixture
def with_dashboards(tmp_path: Path) -> Path:
    """Return a copy of the chart whose links are intact and lead to dashboards and other files of ours."""
    (tmp_path / "grafana").mkdir()
    (tmp_path / "grafana" / "shoal_node.json").write_text(json.dumps(DASHBOARD, indent=2), encoding="utf-8")
    (tmp_path / "grafana" / "build.py").write_text("raise SystemExit\n", encoding="utf-8")
    shutil.copytree(REPOSITORY / "rules", tmp_path / "rules")
    return shutil.copytree(CHART, tmp_path / "helm" / "shoal", symlinks=True)


def test_rules_and_dashboards_are_links() -> None:
    """There is one copy of them in the repository."""
    assert (CHART / "rules").readlink().as_posix() == "../../rules"
    assert (CHART / "dashboards").readlink().as_posix() == "../../grafana"


def test_the_archive_has_what_is_installed_and_no_more(archive: Path) -> None:
    """Rule files as they are, without their tests and runbooks: all of it ends up in every release's Secret."""
    with tarfile.open(archive) as packed:
        assert all(member.isfile() for member in packed)
        found = {member.name.removeprefix("shoal/"): packed.extractfile(member) for member in packed}
        content = {name: file.read() for name, file in found.items() if file}
    rules = {name.removeprefix("rules/"): text for name, text in content.items() if name.startswith("rules/")}
    assert rules == {file.name: file.read_bytes() for file in (REPOSITORY / "rules").glob("*.yaml")}
    assert not [name for name in content if name.startswith("ci/")]
    assert {"Chart.yaml", "values.yaml", "values.schema.json", "README.md"} <= content.keys()
    assert archive.stat().st_size < LARGEST


@pytest.mark.parametrize("file", VALUES, ids=lambda file: file.name.removesuffix("-values.yaml"))
def test_the_archive_installs_what_the_directory_does(file: Path, archive: Path) -> None:
    """Rules and all, for every way to install."""
    assert objects(values(file), chart=archive) == objects(values(file))


def test_versions_are_the_exporters() -> None:
    """The image that is pulled by default is the one with the exporter of this repository."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == chart["version"] == __version__


def test_dashboards_as_config_maps(with_dashboards: Path) -> None:
    """For Grafana's sidecar: the file as it is, braces and quotes too, from the directory and from the archive."""
    given = {"dashboards": {"kind": "ConfigMap", "namespace": "grafana", "annotations": {"owner": "a"}}}
    for chart in (with_dashboards, pack(with_dashboards, with_dashboards.parent)):
        (made,) = (each for each in objects(given, chart=chart) if each["kind"] == "ConfigMap")
        assert made["metadata"]["name"] == "shoal-shoal-node"
        assert made["metadata"]["namespace"] == "grafana"
        assert made["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert made["metadata"]["annotations"] == {"grafana_folder": "Shoal", "owner": "a"}
        assert made["data"] == {"shoal_node.json": json.dumps(DASHBOARD, indent=2)}


def test_dashboards_as_objects_of_the_operator(with_dashboards: Path) -> None:
    """For the Grafana Operator, in a folder of the Grafana that is asked for."""
    given = {"dashboards": {"kind": "GrafanaDashboard", "folder": "Nodes", "instanceSelector": {"a": "b"}}}
    (made,) = (each for each in objects(given, chart=with_dashboards) if each["kind"] == "GrafanaDashboard")
    assert made["spec"].keys() == {"allowCrossNamespaceImport", "folder", "instanceSelector", "json"}
    assert json.loads(made["spec"]["json"]) == DASHBOARD
    assert made["spec"]["folder"] == "Nodes"
    assert made["spec"]["instanceSelector"] == {"matchLabels": {"a": "b"}}


def test_dashboards_program_is_not_packed(with_dashboards: Path) -> None:
    """What makes the dashboards stays in the repository."""
    with tarfile.open(pack(with_dashboards, with_dashboards.parent)) as packed:
        names = [name for name in packed.getnames() if "dashboards" in name]
    assert names == ["shoal/templates/dashboards.yaml", "shoal/dashboards/shoal_node.json"]


def test_a_chart_packed_without_its_rules_is_refused(with_dashboards: Path) -> None:
    """As by a tool that drops links: an installation without alerts would be a silent one."""
    (with_dashboards / "rules").unlink()
    with pytest.raises(Refused, match=r"packed without its rules"):
        render(chart=with_dashboards)


def test_part_of_another_chart(tmp_path: Path) -> None:
    """Under a parent's condition and with its globals, the chart's values are still checked."""
    parent = tmp_path / "parent"
    (parent / "templates").mkdir(parents=True)
    dependency = {"name": "shoal", "version": __version__, "repository": "", "condition": "shoal.enabled"}
    chart = {"apiVersion": "v2", "name": "parent", "version": "1.0.0", "dependencies": [dependency]}
    (parent / "Chart.yaml").write_text(yaml.safe_dump(chart), encoding="utf-8")
    shutil.copytree(CHART, parent / "charts" / "shoal")
    given: dict[str, Any] = {"global": {"imageRegistry": "a.example", "other": 1}, "shoal": {"enabled": True}}
    made = objects(given, chart=parent)
    (daemonset,) = (each for each in made if each["kind"] == "DaemonSet")
    image = daemonset["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image == f"a.example/shoal-exporter/shoal:{__version__}"
    given["shoal"]["teir"] = "full"
    with pytest.raises(Refused, match="teir"):
        render(given, chart=parent)


def test_notes_tell_of_dashboards_that_are_not_there() -> None:
    """Whoever asks for dashboards hears of it when the chart has none."""
    there = list((REPOSITORY / "grafana").glob("*.json"))
    assert ("packed without dashboards" in notes({"dashboards": {"kind": "ConfigMap"}})) is not bool(there)
