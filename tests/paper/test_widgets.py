"""The elements that the parts of the report share."""

from maml.paper.tables import VERDICTS
from maml.paper.widgets import VERDICT_MEANINGS, chip, command, dialog, open_button, scroll_box, slug, sort_button


def test_every_verdict_has_a_sign_and_a_meaning() -> None:
    assert set(VERDICTS) <= set(VERDICT_MEANINGS)
    for verdict, (sign, meaning) in VERDICT_MEANINGS.items():
        assert f'class="chip {slug(verdict)}"' in chip(verdict) and f">{sign}</span> {verdict}" in chip(verdict)
        assert meaning


def test_button_says_what_it_opens_and_its_verdict() -> None:
    button = open_button("a/b", "0.7 < 1", "reduced budget", "3 runs")
    assert button.startswith('<button type="button" data-opens="a/b" data-verdict="reduced-budget">0.7 &lt; 1')
    assert '<span class="spread">3 runs</span>' in button
    assert "spread" not in open_button("a/b", "0.7", "worse")
    panel = dialog("a/b", "MAML", "Table 2", "text")
    assert '<dialog id="a/b" aria-label="MAML">' in panel and 'class="close"' in panel


def test_box_can_be_scrolled_by_keys_and_its_hint_is_hidden_at_first() -> None:
    box = scroll_box(sort_button("ours"), "Runs")
    assert box.index("<p") < box.index('class="scroll" tabindex="0" role="region" aria-label="Runs"')
    assert 'class="hint" hidden' in box


def test_command_is_escaped_and_can_be_copied() -> None:
    assert command("a 'b' & c").startswith('<div class="command"><code>a &#x27;b&#x27; &amp; c</code><button')
