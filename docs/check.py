"""Writes docs/check.md from what the fault lab heard `check` say: run it after `make lab` and `make lab-vm`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

HEAD = """# What check says in each of the fourteen failures

Made by `docs/check.py` from a run of the fault lab (`make lab`, `make lab-vm`): each failure was caused on a real
kernel, and this is what `shoal-exporter check --from` said of it over five seconds while it went on, of 5 and 11 since
it began: a kill is one moment, and a neighbour is asked once a minute, so for these `--interval 60` sees more. Lines
with `$` prove it, lines with `#` are the first step's; both come from the alert's runbook, with the culprit put in
where the runbook has an example.

Each line is a failure: ok, warning, critical, or cannot tell, with the reason. The exit status is that of monitoring
plugins: 0 nothing is wrong, 1 a warning, 2 critical, 3 nothing can be told or a node did not answer. What cannot be
told does not raise the status as long as something can: no kernel has every signal. `Not seen:` names a part that was
not looked at, such as other network namespaces, and what would give it. Where that part is known to matter, as when a
pod that may not be entered has a hundred sockets, the failure is not ok but cannot be told.

## JSON

`--json` prints one object; its `version` rises when a key changes its sense or goes. With `--watch` each is one line.

| key | what it is |
|---|---|
| `version` | 1 |
| `nodes` | a list, one object a node |
| `nodes[].node` | the host's name, or the address that was given |
| `nodes[].status` | the worst of all: `ok`, `warning`, `critical` or `cannot tell` |
| `nodes[].seconds` | the time between the two reads |
| `nodes[].failures` | the fourteen, worst first: `number`, `name`, `title`, `status`, and `why` if it cannot be told |
| `nodes[].failures[].unseen` | sentences: what was not looked at, why not, and what would help |
| `nodes[].failures[].findings` | `alert`, `status`, `culprit` (labels), `evidence`, and the four below |
| `confirm`, `first_commands` | commands, a line each, that prove it and that the first step wants |
| `first_step`, `runbook_url` | the safest step in words, and the page with the others |
| `failed` | {address: sentence} of the nodes that did not answer |
"""


def main() -> int:
    """Write the page; say what is missing if the lab has not caused all fourteen."""
    found: dict[int, tuple[str, str, str]] = {}
    for file in sorted((ROOT / ".lab").glob("*.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        for fault in report["faults"]:
            if fault["checked"] and fault["number"] not in found:
                found[fault["number"]] = (fault["title"], report["kernel"], fault["checked"])
    missing = sorted(set(range(1, 15)) - found.keys())
    if missing:
        sys.stderr.write(f"the lab has not caused {missing}: run make lab and make lab-vm first\n")
        return 1
    parts = [HEAD]
    for number, (title, kernel, said) in sorted(found.items()):
        body = "\n".join(f"    {line}".rstrip() for line in said.strip().splitlines()[1:-2])
        parts.append(f"## {number}. {title}\n\nKernel {kernel}.\n\n{body}\n")
    (ROOT / "docs" / "check.md").write_text("\n".join(parts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
