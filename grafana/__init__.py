"""The three dashboards, as JSON that Grafana imports, and the program that builds them: `make dashboards`."""
