"""Elements that the parts of the report share: chips, buttons, panels, tables that scroll, facts and commands."""

from __future__ import annotations

from collections.abc import Mapping

from maml.paper.markup import Content, Markup, element
from maml.paper.tables import SYMBOLS

# The sign and the meaning of each verdict. The sign makes the verdict readable without colour.
VERDICT_MEANINGS = {
    "reproduced": (
        SYMBOLS["reproduced"],
        "the paper's value lies in our 95 % interval or ours in the paper's, and not beyond all runs",
    ),
    "better": (SYMBOLS["better"], "neither value lies in the other's interval, and ours is better"),
    "worse": (SYMBOLS["worse"], "neither value lies in the other's interval, and the paper's is better"),
    "measured": ("•", "finished, but there is no published number to compare with"),
    "reduced budget": (SYMBOLS["reduced budget"], "training is not complete, so this number is not a reproduction"),
    "quoted": (SYMBOLS["quoted"], "the paper quotes this number from other authors, and we have no experiment for it"),
    "running": ("…", "training is running"),
    "not run": ("-", "nothing was evaluated yet; the cell shows the command"),
    "finished": ("•", "trained to the end and evaluated"),
}


def slug(text: str) -> str:
    """Returns a text as a CSS class or an anchor."""
    return text.lower().replace(" ", "-")


def chip(verdict: str) -> Markup:
    """Returns a verdict with its sign, in its colour."""
    sign = element("span", VERDICT_MEANINGS[verdict][0], aria_hidden="true")
    return element("span", sign, " ", verdict, class_=f"chip {slug(verdict)}")


def sort_button(name: str) -> Markup:
    """Returns the head of a column that sorts the rows."""
    return element("button", name, type="button", class_="sorter")


def open_button(identity: str, label: Content, state: str, note: Content = "") -> Markup:
    """Returns a button that opens a panel.

    Args:
        identity: the panel's identity.
        label: text of the button.
        state: the verdict beside it, by which the page is filtered.
        note: smaller text below the label.
    """
    more = element("span", note, class_="spread") if note else ""
    return element("button", label, more, chip(state), type="button", data_opens=identity, data_verdict=slug(state))


def scroll_box(content: Markup, label: str) -> Markup:
    """Returns content that scrolls sideways where the window is narrow; a hint then says so."""
    box = element("div", content, class_="scroll", tabindex="0", role="region", aria_label=label)
    return element("div", element("p", "Scroll sideways to see all of it →", class_="hint", hidden=True), box)


def dialog(identity: str, name: str, title: str, content: Content) -> Markup:
    """Returns a panel that opens above the page, with the evidence for one number."""
    close = element("button", "Close", type="button", class_="close")
    heading = element("div", element("p", title, class_="eyebrow"), element("h3", name))
    return element("dialog", element("div", heading, close, class_="top"), content, id=identity, aria_label=name)


def fact_list(facts: Mapping[str, Content]) -> Markup:
    """Returns short facts by name, side by side."""
    return element(
        "dl",
        [element("div", element("dt", name), element("dd", value)) for name, value in facts.items()],
        class_="facts",
    )


def command(text: str) -> Markup:
    """Returns a command with a button that copies it."""
    return element("div", element("code", text), element("button", "Copy", type="button"), class_="command")
