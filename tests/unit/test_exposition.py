"""The text that Prometheus reads, checked by the parsers of prometheus_client in both formats."""

from __future__ import annotations

import gc
import math
from typing import TYPE_CHECKING, Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from shoal import exposition
from shoal.exposition import render
from shoal.families import Family, Histogram, Metric
from shoal.server import catalogue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prometheus_client.core import Metric as Parsed

GAUGE = Metric("shoal_length", "gauge", 'The "length" of C:\\net, a\nlong one.', "a test", ("netns", "pod"))
COUNTER = Metric("shoal_drops_total", "counter", "What was dropped.", "a test", ("netns", "pod"))

BOTH = pytest.mark.parametrize("openmetrics", [False, True], ids=["text", "openmetrics"])


def parse(body: bytes, *, openmetrics: bool) -> dict[str, Parsed]:
    """Return the families by name, as prometheus_client reads them; a name twice is an error."""
    if openmetrics:
        # Its parser has no types of its own.
        parse: Callable[[str], Iterable[Parsed]] = cast(Any, parse_openmetrics)
        families = list(parse(body.decode() + "# EOF\n"))
    else:
        families = list(parse_text(body.decode()))
    found = {family.name: family for family in families}
    assert len(found) == len(families)
    return found


def samples(family: Parsed) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Return {(name, labels): value}; a series twice is an error."""
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in family.samples}
    assert len(found) == len(family.samples)
    return found


@BOTH
def test_values_and_labels_arrive_as_they_were(openmetrics: bool) -> None:  # noqa: FBT001
    """Names, types, help texts and whole numbers beyond what a float can hold exactly."""
    families = [
        Family(GAUGE, [(("host", "api"), 1.5), (("pod", "worker"), 2**60)]),
        Family(COUNTER, [(("host", "api"), 0)]),
    ]
    body = render(families, openmetrics=openmetrics)
    found = parse(body, openmetrics=openmetrics)
    assert set(found) == {"shoal_length", "shoal_drops"}
    length, drops = found["shoal_length"], found["shoal_drops"]
    assert (length.type, drops.type) == ("gauge", "counter")
    assert length.documentation == GAUGE.help
    assert samples(length) == {
        ("shoal_length", frozenset({("netns", "host"), ("pod", "api")})): 1.5,
        ("shoal_length", frozenset({("netns", "pod"), ("pod", "worker")})): 2**60,
    }
    assert samples(drops) == {("shoal_drops_total", frozenset({("netns", "host"), ("pod", "api")})): 0}
    assert b" 1152921504606846976\n" in body


@BOTH
@pytest.mark.parametrize(
    "value",
    [
        'say "hi"',
        "C:\\net\\",
        "\\n is no newline",
        "two\nlines\n",
        "\r\n",
        "tab\tand nul-like \x01",
        "# HELP shoal_length x",
        '"} 1\nshoal_forged{pod="',
        "🐟 größer 深い",
        "\u2028\u0085\u00a0",
        " leading and trailing ",
        ",=;{}",
        "x" * 4096,
        '\\"\n' * 1365,
    ],
)
def test_label_values_that_need_care(value: str, openmetrics: bool) -> None:  # noqa: FBT001
    """Whatever a cgroup or a process calls itself comes back as it was, in one line."""
    body = render([Family(GAUGE, [(("host", value), 1)])], openmetrics=openmetrics)
    assert len(body.decode().split("\n")) == 4
    (found,) = parse(body, openmetrics=openmetrics).values()
    assert samples(found) == {("shoal_length", frozenset({("netns", "host"), ("pod", value)})): 1}


@BOTH
def test_bytes_that_are_no_utf8_stay_apart(openmetrics: bool) -> None:  # noqa: FBT001
    """A directory name is bytes; Python shows the ones at fault as lone surrogates, which UTF-8 cannot write."""
    names = [b"caf\xe9".decode(errors="surrogateescape"), b"caf\xe8".decode(errors="surrogateescape"), "\ud800"]
    family = Family(GAUGE, [(("host", name), 1) for name in names])
    (found,) = parse(render([family], openmetrics=openmetrics), openmetrics=openmetrics).values()
    assert {sample.labels["pod"] for sample in found.samples} == {r"caf\udce9", r"caf\udce8", r"\ud800"}


@BOTH
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -0.0, 5e-324, 1.7976931348623157e308, 0.1, 1e22, -7])
def test_numbers_at_the_edge(value: float, openmetrics: bool) -> None:  # noqa: FBT001
    """The formats spell infinity and NaN in their own way; every other float is exact."""
    body = render([Family(GAUGE, [(("host", "api"), value)])], openmetrics=openmetrics)
    (found,) = parse(body, openmetrics=openmetrics).values()
    (number,) = samples(found).values()
    assert math.isnan(number) if math.isnan(value) else number == value
    spelled = {"inf": "+Inf", "-inf": "-Inf", "nan": "NaN"}.get(repr(value), repr(value))
    assert body.split()[-1] == spelled.encode()


@BOTH
def test_empty_labels_are_left_out(openmetrics: bool) -> None:  # noqa: FBT001
    """To Prometheus an empty label is none; a sample of which all are empty has no braces."""
    family = Family(GAUGE, [(("host", ""), 1), (("", ""), 2)])
    body = render([family], openmetrics=openmetrics)
    assert b'shoal_length{netns="host"} 1\n' in body
    assert b"\nshoal_length 2\n" in body
    assert len(parse(body, openmetrics=openmetrics)["shoal_length"].samples) == 2


@BOTH
def test_a_family_without_samples_is_silent(openmetrics: bool) -> None:  # noqa: FBT001
    """What this node does not give is absent, its description too."""
    assert render([GAUGE.family(), COUNTER.family()], openmetrics=openmetrics) == b""


@BOTH
def test_every_declared_metric_is_described(openmetrics: bool) -> None:  # noqa: FBT001
    """One sample of each metric that there is: each has its HELP and TYPE, and the parser takes them all."""
    metrics = catalogue()
    assert {"shoal_build_info", "shoal_scrape_collector_success", "shoal_signal_available"} <= set(metrics)
    families = [sampled(metric) for metric in metrics.values()]
    found = parse(render(families, openmetrics=openmetrics), openmetrics=openmetrics)
    assert len(found) == len(metrics)
    for name, metric in metrics.items():
        family = found[name.removesuffix("_total")]
        assert family.type == metric.type
        assert family.documentation == metric.help
        assert metric.help.endswith(".")
        assert metric.source
        parts = ["_bucket", "_bucket", "_count", "_sum"] if metric.type == "histogram" else [""]
        assert [sample.name for sample in family.samples] == [name + part for part in parts]


def sampled(metric: Metric) -> Family:
    """Return a family with one sample, or one histogram of one bound."""
    family = metric.family()
    if metric.type == "histogram":
        family.add_histogram(["x"] * (len(metric.labels) - 1), Histogram((1.0,)))
    else:
        family.add(["x"] * len(metric.labels), 1)
    return family


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))


@BOTH
@given(
    rows=st.dictionaries(
        st.tuples(texts, texts),
        st.floats() | st.integers(-(2**53), 2**53),
        min_size=1,
        max_size=20,
    )
)
def test_round_trip(rows: dict[tuple[str, str], float], openmetrics: bool) -> None:  # noqa: FBT001
    """Any labels and any numbers come back as they were."""
    body = render([Family(GAUGE, list(rows.items()))], openmetrics=openmetrics)
    (found,) = parse(body, openmetrics=openmetrics).values()
    parsed = {(sample.labels.get("netns", ""), sample.labels.get("pod", "")): sample.value for sample in found.samples}
    assert parsed.keys() == rows.keys()
    for labels, value in rows.items():
        assert parsed[labels] == value or (math.isnan(value) and math.isnan(parsed[labels]))


def test_labels_of_what_is_gone_are_let_go() -> None:
    """A pod that lives for one scrape, again and again, leaves nothing for ever."""
    for number in range(1000):
        render([Family(GAUGE, [(("pod", f"gone-{number}"), 1)])], openmetrics=False)
    assert exposition._fragment.cache_info().currsize < 300


def test_all_garbage_is_collected_after_some_answers() -> None:
    """Python itself is told never to look at what has lived for long."""
    generations: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    gc.disable()
    gc.callbacks.append(note)
    try:
        for _ in range(64):
            render([], openmetrics=False)
    finally:
        gc.callbacks.remove(note)
        gc.enable()
    assert generations == [2, 2]
