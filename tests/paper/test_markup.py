"""Elements of a page: text is escaped, markup is not."""

from __future__ import annotations

from maml.paper.markup import Markup, element, join


def test_elements_escape_text_and_attributes_but_no_markup() -> None:
    inner = element("b", "a < b & c", Markup("<i></i>"))
    assert element("p", inner, ["x", inner], title='"<', hidden=True, lang=None) == (
        f'<p title="&quot;&lt;" hidden>{inner}x{inner}</p>'
    )
    assert inner == "<b>a &lt; b &amp; c<i></i></b>"
    assert element("img", src="x", data_of="y", class_="z") == '<img src="x" data-of="y" class="z">'


def test_content_may_be_nested_and_is_escaped_once() -> None:
    assert join("a & b") == join(join("a & b")) == "a &amp; b"
    assert join(["<", [Markup("<br>"), ">"]]) == "&lt;<br>&gt;"
    assert join([]) == ""
