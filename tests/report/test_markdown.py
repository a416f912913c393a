"""Markdown of models: what is shown, and that nothing in it becomes markup of the page."""

from __future__ import annotations

import random
import re

import pytest

from utils.report.markdown import render_markdown


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("plain\nlines", "<p>plain\nlines</p>"),
        ("one\n\ntwo", "<p>one</p><p>two</p>"),
        ("# A *head*", "<p><strong>A <em>head</em></strong></p>"),
        ("#hashtag", "<p>#hashtag</p>"),
        ("**bold**, *it*, `a*b*`", "<p><strong>bold</strong>, <em>it</em>, <code>a*b*</code></p>"),
        ("2 * 3 * 4, a*b*c, ** no **", "<p>2 * 3 * 4, a*b*c, ** no **</p>"),
        ("first:\n- a\n- b", "<p>first:</p><ul><li>a</li><li>b</li></ul>"),
        ("3. c\n4) d", '<ol><li value="3">c</li><li value="4">d</li></ol>'),
        ("```py\nx = '*a*'\n# b\n```\nend", "<pre>x = &#x27;*a*&#x27;\n# b</pre><p>end</p>"),
        ("```\nnever closed", "<pre>never closed</pre>"),
        ("[a](javascript:x) ![b](http://c)", "<p>[a](javascript:x) ![b](http://c)</p>"),
        ("**<b>**", "<p><strong>&lt;b&gt;</strong></p>"),
        ("", ""),
    ],
)
def test_markdown(text, html):
    assert render_markdown(text) == html


def test_no_text_becomes_other_markup_and_none_is_lost():
    draw = random.Random(0)
    pieces = ["*", "**", "`", "```", "\n", "- ", "1. ", "# ", "<script>", "&lt;", '"', "\x07", "word", " "]
    ours = r"</?(?:p|strong|em|code|pre|ul|ol|li)>|<li value=\"1\">"
    for _ in range(500):
        text = "".join(draw.choices(pieces, k=draw.randint(0, 30)))
        html = render_markdown(text)
        assert "<" not in re.sub(ours, "", html), text
        assert html.count("word") >= text.count("word") - text.count("```word"), text  # behind a fence: its language
