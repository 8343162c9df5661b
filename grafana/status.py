"""The state of a node by failure, as a number and as a word: what Fleet and Node both show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grafana_foundation_sdk.models import dashboard as models

from grafana.parts import SEVERITY, STATUS

if TYPE_CHECKING:
    from grafana.failures import Failure

__all__ = ["firing_states", "state_of", "status_overrides"]

# What an alert is about besides a workload, in the order in which it reads best. None has all of them.
_WHAT: Final = (
    *("collector", "lost_signal", "netns", "protocol", "server", "mountpoint", "device", "address", "port"),
    *("source", "destination", "destination_port", "backend", "resource", "direction"),
)


def state_of(failure: Failure, selection: str) -> str:
    """Ask for a failure's state on each node: what of its alerts fires, or 0 where all that they need can be read.

    A node that cannot see a failure has no state: to call it well would be a guess.
    """
    firing = f'alertname=~"{"|".join(failure.alerts)}",alertstate="firing",node!="",{selection}'
    signals = "|".join(failure.signals)
    return f"""\
3 * group by (cluster, node) (ALERTS{{severity="critical",{firing}}})
or
2 * group by (cluster, node) (ALERTS{{severity="warning",{firing}}})
or
group by (cluster, node) (ALERTS{{severity="info",{firing}}})
or
0 * (
  sum by (cluster, node) (node:shoal_signal_available:max{{signal=~"{signals}",{selection}}} == 1)
  >= {len(failure.signals)}
)"""


def firing_states(labels: tuple[str, ...], selection: str) -> str:
    """Ask for what fires, as one number for each set of these labels: 3 critical, 2 warning, 1 info."""
    by = ", ".join(("alertname", "severity", *labels, "what"))
    what = ", ".join(f'"{label}"' for label in _WHAT)
    return "\nor\n".join(
        f"{value} * group by ({by}) (label_replace(label_join(\n"
        f'  ALERTS{{alertname=~"Shoal.+",alertstate="firing",severity="{severity}",{selection}}},\n'
        f'  "what", " ", {what}\n'
        # That a network namespace is a pod's is said by the pod.
        '), "what", "$1", "what", " *(?:pod|container|unit) (.*)"))'
        for value, severity in ((3, "critical"), (2, "warning"), (1, "info"))
    )


def status_overrides() -> list[models.DynamicConfigValue]:
    """Show a state as a coloured word, since colour alone is nothing to who cannot see it."""
    steps = [
        models.Threshold(color="transparent"),
        *(models.Threshold(value=value, color=SEVERITY[name]) for value, name in enumerate(SEVERITY, 1)),
    ]
    return [
        models.DynamicConfigValue("mappings", [STATUS]),
        models.DynamicConfigValue(
            "thresholds", models.ThresholdsConfig(mode=models.ThresholdsMode.ABSOLUTE, steps=steps)
        ),
        models.DynamicConfigValue("custom.cellOptions", {"type": "color-background", "mode": "basic"}),
        models.DynamicConfigValue("custom.align", "center"),
    ]
