"""Renders and packs the chart with Helm's own engine: the `helm` on the path, or else the one in helm-python-sdk.

Both say the same in the same words; what only the program prints around it is taken off here.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import helm_python
import yaml
from helm_python import _native

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "CHART",
    "CUSTOM",
    "KUBERNETES",
    "REPOSITORY",
    "VALUES",
    "Refused",
    "lint",
    "notes",
    "objects",
    "pack",
    "render",
    "values",
]

REPOSITORY: Final = Path(__file__).parents[2]
CHART: Final = REPOSITORY / "helm" / "shoal"
VALUES: Final = sorted((CHART / "ci").glob("*-values.yaml"))
"""One file for each way to install."""

KUBERNETES: Final = ("1.30", "1.37")
"""The oldest version that the chart supports and the newest that is checked against."""

CUSTOM: Final = (
    "monitoring.coreos.com/v1/PodMonitor",
    "monitoring.coreos.com/v1/ServiceMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
    "grafana.integreatly.org/v1beta1/GrafanaDashboard",
    "autoscaling.k8s.io/v1/VerticalPodAutoscaler",
)
"""The custom resources that the chart may make: group, version and kind."""

_HELM: Final = shutil.which("helm")
_NAMESPACE: Final = "monitoring"


class Refused(Exception):  # noqa: N818  (what Helm does, not what went wrong)
    """Helm refuses to render. `str()` is what it says."""


def values(file: Path) -> dict[str, Any]:
    """Return the content of a values file."""
    content: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return content


def render(
    given: Mapping[str, Any] | None = None,
    *,
    chart: Path = CHART,
    release: str = "shoal",
    kubernetes: str = KUBERNETES[-1],
    apis: Sequence[str] = CUSTOM,
) -> str:
    """Return what the chart makes of these values, as YAML documents. Raises `Refused`."""
    if _HELM:
        return _render_with_program(dict(given or {}), chart, release, kubernetes, apis)
    made = _render_with_library(dict(given or {}), chart, release, kubernetes, apis)
    return "\n---\n".join(text for name, text in made.items() if not name.endswith("NOTES.txt"))


def notes(given: Mapping[str, Any]) -> str:
    """Return what Helm says after an installation with these values."""
    made = _render_with_library(given, CHART, "shoal", KUBERNETES[-1], CUSTOM)
    return next(text for name, text in made.items() if name.endswith("NOTES.txt"))


def _render_with_library(
    given: Mapping[str, Any], chart: Path, release: str, kubernetes: str, apis: Sequence[str]
) -> dict[str, str]:
    options = {"name": release, "namespace": _NAMESPACE, "kube_version": f"v{kubernetes}.0", "api_versions": [*apis]}
    try:
        with helm_python.Chart.load(chart) as loaded:
            # Chart.render has no parameter for what the cluster knows, though the library takes it.
            answer = _native.call_string("helm_render", loaded._raw(), json.dumps(given), json.dumps(options))
    except helm_python.HelmError as error:
        raise Refused(str(error)) from None
    made: dict[str, str] = json.loads(answer)
    return made


def _render_with_program(
    given: Mapping[str, Any], chart: Path, release: str, kubernetes: str, apis: Sequence[str]
) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        json.dump(given, file)
        file.flush()
        command = ["helm", "template", release, str(chart), "--namespace", _NAMESPACE, "--values", file.name]
        command += ["--kube-version", kubernetes, *(f"--api-versions={api}" for api in apis)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(done.stderr)
    return done.stdout


def objects(given: Mapping[str, Any] | None = None, **options: Any) -> list[dict[str, Any]]:
    """Return the objects that the chart makes of these values; `options` are those of `render`."""
    return [one for one in yaml.safe_load_all(render(given, **options)) if one]


def lint(given: Mapping[str, Any]) -> list[str]:
    """Return what `helm lint --strict` has to say beyond the want of an icon."""
    report = helm_python.lint(CHART, dict(given), strict=True)
    messages = [str(message["error"]) for message in report["messages"] if message["error"] != "icon is recommended"]
    return messages + [str(error) for error in report["errors"]]


def pack(chart: Path, destination: Path) -> Path:
    """Pack the chart as `helm package` does, and return the archive."""
    return Path(helm_python.package(chart, destination=destination))
