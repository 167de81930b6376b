"""Where the paper, its authors' code and ours differ: ``departures.yaml`` and its table in the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from maml.paper.evidence import Evidence
from maml.paper.markup import Content, Markup, element
from maml.paper.tables import reading_text
from maml.paper.widgets import chip, sort_button
from maml.record.contents import Source


def load_departures(results: Path) -> list[dict[str, Any]]:
    """Reads ``departures.yaml``."""
    entries = OmegaConf.to_container(OmegaConf.load(results / "departures.yaml"))
    assert isinstance(entries, list)
    return entries


def readings_of(measured: Mapping[str, Any]) -> list[tuple[str, Source, int]]:
    """Returns label, source and gradient step of each reading that shows the effect of a departure."""
    readings = []
    for reading in measured["readings"]:
        fields = {"step": measured.get("step"), **measured["source"], **reading}
        label, step, overrides = fields.pop("label"), fields.pop("step"), tuple(fields.pop("overrides", ()))
        readings.append((label, Source(**fields, overrides=overrides), step))
    return readings


def departures_table(results: Path, find: Callable[[Source], Evidence]) -> Markup:
    """Returns where the paper, its authors' code and ours differ, with the effect where both were run.

    Args:
        results: folder of ``departures.yaml``.
        find: returns the runs of a source.
    """
    rows = []
    for number, entry in enumerate(load_departures(results), start=1):
        where = element("ul", [element("li", element("code", place.partition(": ")[0])) for place in entry["where"]])
        rows.append(
            element(
                "tr",
                element("td", str(number), data_sort=number, data_label="#"),
                element("th", entry["topic"], scope="row", data_sort=entry["topic"]),
                element("td", entry["paper"], data_label="paper"),
                element("td", entry["code"], data_label="authors' code"),
                element("td", entry["ours"], where, data_label="here"),
                element("td", _effect(entry.get("measured"), find), data_label="effect"),
            )
        )
    heads = [element("th", sort_button(name), scope="col", aria_sort="none") for name in ("#", "topic")]
    heads += [element("th", name, scope="col") for name in ("paper", "authors' code", "here", "effect")]
    head = element("thead", element("tr", heads))
    lead = (
        "The paper's text and its authors' code differ in these points. We mostly follow the code, because the "
        "published numbers come from it. The effect compares runs with either choice, in the order of their seeds."
    )
    return element(
        "article",
        element("p", lead),
        element("table", head, element("tbody", rows), class_="sortable departures"),
        id="departures",
    )


def _effect(measured: Mapping[str, Any] | None, find: Callable[[Source], Evidence]) -> Content:
    if measured is None:
        return element("span", "effect not measured", class_="muted")
    lines, is_measured = [], True
    for label, source, step in readings_of(measured):
        evidence = find(source)
        is_measured &= evidence.complete
        values = [reading_text(*report.reading(source, step), 2) for _, report in evidence.evaluated]
        text: Content = "; ".join(values)
        if not evidence.complete:
            partial = [text, f" ({evidence.progress}) "] if values else []
            text = [partial, chip(evidence.state), element("code", source.command([]))]
        lines.append(element("li", element("b", label), ": ", text))
    quantity = measured["what"] if is_measured else f"effect not measured; {measured['what']}"
    return [element("span", quantity, class_="muted"), element("ul", lines)]
