"""Writes helm/shoal/README.md from the comments in its values.yaml: `make docs`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator

CHART = Path(__file__).with_name("shoal")

HEAD = """\
# The Helm chart

Made from values.yaml by `make docs`.

    helm install shoal helm/shoal --namespace shoal --create-namespace

puts the exporter on every node, in the least privileged way that gives all fourteen failures at node level. Beside the
Prometheus Operator and Grafana's sidecar, with the alerts and dashboards:

    helm install shoal helm/shoal --namespace shoal --create-namespace \\
        --set monitor.kind=PodMonitor --set rules.enabled=true --set dashboards.kind=ConfigMap \\
        --set monitor.labels.release=kube-prometheus-stack --set rules.labels.release=kube-prometheus-stack

The namespace has to allow pods that look at the node: where Pod Security Admission is in force, label it
`pod-security.kubernetes.io/enforce=privileged`. On OpenShift, bind the service account to the SCC `privileged`. No
image is published yet: `make image` builds it, `image.registry` and `image.repository` say where you have pushed it.

`rules` and `dashboards` in the chart are links to the repository's directories, which Helm follows when it installs
from a checkout and when it packs (`make chart`). A tool that copies the chart without following links loses them; the
chart then refuses to be installed.

docs/fleet.md in the repository has the arithmetic for 1, 100 and 5,000 nodes, and ci/ here values for each way to
install.

## Rules

An override names an alert, or an alert and its severity, and changes what it names of it:

```yaml
rules:
  enabled: true
  overrides:
    ShoalConntrackNearlyFull:
      for: 1h
      expr: netns:shoal_conntrack_entries_per_limit:ratio > 0.95
    ShoalOOMKill/warning:
      severity: info
      labels: {team: memory}
    ShoalNodeIoPressure:
      disabled: true
```

## Values

| value | default | what it is |
|---|---|---|
"""


def page() -> str:
    """Return the whole page as it should stand in the repository. Raises `ValueError` for a value without a comment."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise TypeError("values.yaml is no mapping")
    rows = _values(root, text.splitlines(), "")
    return HEAD + "".join(f"| `{path}` | `{default}` | {comment} |\n" for path, default, comment in rows)


def _values(node: yaml.MappingNode, lines: list[str], parent: str) -> Iterator[tuple[str, str, str]]:
    """Yield each value's path, default and comment; a mapping whose first key has a comment is divided into its own."""
    for key, value in node.value:
        comment, path = _comment(lines, key.start_mark.line), f"{parent}{key.value}"
        if isinstance(value, yaml.MappingNode) and value.value and _comment(lines, value.value[0][0].start_mark.line):
            yield from _values(value, lines, f"{path}.")
        elif comment:
            yield path, json.dumps(yaml.safe_load(yaml.serialize(value))), comment.replace("|", "\\|")
        else:
            raise ValueError(f"{path} has no comment in values.yaml")


def _comment(lines: list[str], line: int) -> str:
    """Return the comment right above a line, as one text."""
    found: list[str] = []
    while line and (above := lines[line - 1].strip()).startswith("#"):
        found.insert(0, above.removeprefix("#").strip())
        line -= 1
    return " ".join(found)


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        sys.stdout.write(page())
    else:
        (CHART / "README.md").write_text(page(), encoding="utf-8")
