"""Several answers to a prompt: which pairs are made of them. HTML as text."""

from __future__ import annotations

import random

import pytest

from utils.data.html_text import html_to_text
from utils.data.ranking import Answer, Choice, choose_pairs, read_number
from utils.data.turns import BadRow


@pytest.mark.parametrize("seed", range(30))
def test_pairs_of_any_answers(seed):
    draw = random.Random(seed)
    answers = [Answer(f"text {i}", draw.choice([None, 1.0, 2.0, 2.5, 4.0])) for i in range(draw.randint(2, 8))]
    gap, most = draw.choice([None, 0.5, 2.0]), draw.randint(1, 5)
    scored = [a for a in answers if a.score is not None]
    possible = {(a, b) for a in scored for b in scored if a.score > b.score and a.score - b.score >= (gap or 0)}
    choice = Choice(pairs_per_prompt=most, min_score_gap=gap)
    if not possible:
        with pytest.raises(BadRow):
            choose_pairs(answers, choice)
        return
    pairs = choose_pairs(answers, choice)
    assert set(pairs) <= possible
    assert len(set(pairs)) == len(pairs) == min(most, len(possible))
    assert [better.score for better, _ in pairs] == sorted((better.score for better, _ in pairs), reverse=True)
    assert pairs[0][0].score == max(better.score for better, _ in possible)
    assert choose_pairs(answers, choice) == pairs


def test_the_lower_scored_one_is_drawn_by_the_texts():
    def rejected(prompt: int) -> str:
        answers = [Answer(f"best {prompt}", 9.0), *(Answer(f"{word} {prompt}", n) for n, word in enumerate("abc"))]
        return choose_pairs(answers, Choice())[0][1].value[0]

    drawn = [rejected(prompt) for prompt in range(300)]
    assert all(60 < drawn.count(word) < 140 for word in "abc")


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        ("4.5", 4.5),
        ("N/A", None),
        (None, None),
        (True, None),
        (float("nan"), None),
        ("inf", None),
        ([], None),
    ],
)
def test_numbers_however_they_are_written(value, number):
    assert read_number(value) == number


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>a &lt;b&gt; &amp;amp; c</p><p>d</p>", "a <b> &amp; c\n\nd"),
        ("one<br>two<br/>three", "one\ntwo\nthree"),
        ("<pre><code>a  =  1\n\n\n\n  b &lt; c\n</code></pre>", "```\na  =  1\n\n\n\n  b < c\n```"),
        ("<p>x</p>\n\n<pre>y</pre>\n<p>z</p>", "x\n\n```\ny\n```\n\nz"),
        ("<ol><li>a</li><li>b<ul><li>c</li></ul></li></ol>", "1. a\n2. b\n\n- c"),
        ("use <code>f(x)</code>\n   now", "use `f(x)` now"),
        (
            "<table><tr><th>a</th><th>b</th></tr>\n<tr>\n<td>1</td>\n<td>2</td></tr></table>x<table><tr><td>3</table>",
            "a | b\n\n1 | 2\n\nx\n\n3",
        ),
        ("<script>alert(1)</script>text", "text"),
        ("if a < b and c > d", "if a < b and c > d"),
        ("<p>never closed <b>bold", "never closed bold"),
        ("</p></ul></pre>stray", "stray"),
    ],
)
def test_html_as_text(html, text):
    assert html_to_text(html) == text
