"""Charts and links as markup: where marks, bars, dots and strips stand, when there is a legend, where pages lead."""

from __future__ import annotations

import re

from utils.report import links
from utils.report.charts import (
    LEFT,
    MOST_STRIPS,
    PLOT_WIDTH,
    RIGHT,
    WIDTH,
    Bar,
    draw_bars,
    draw_histogram,
    draw_lines,
    draw_reliability,
)
from utils.report.links import address_of, link_pages, refresh_report


def find(pattern: str, text: str) -> list[str]:
    return re.findall(pattern, text)


def test_a_mark_stands_at_its_value_within_the_bins():
    def places(value: float) -> list[str]:
        chart = draw_histogram("t", [0, 1, 2, 6], {"a": [1, 2, 5]}, "u", mark=(value, "here"))
        assert ("here" in chart) is bool(find('class="mark"', chart))
        return find('class="mark" x1="([^"]+)"', chart)

    step = PLOT_WIDTH / 3
    expected = {0: LEFT, 0.5: LEFT + step / 2, 1: LEFT + step, 4: LEFT + 2.5 * step}
    assert {value: places(value) for value in expected} == {v: [f"{x:.1f}"] for v, x in expected.items()}
    assert places(-0.1) == places(6) == []


def test_few_counts_have_a_line_each():
    def counts(most: int) -> list[str]:
        return find(f'<text x="{LEFT - 10}"[^>]*>([^<]+)<', draw_histogram("t", [0, 1], {"a": [most]}, "u"))

    assert counts(5) == ["0", "1", "2", "3", "4", "5"]
    assert counts(6) == ["0", "2", "4", "6"]
    assert counts(0) == ["0", "1"]


def test_a_bar_at_the_start_counts_as_above_it():
    bars = [Bar("a", 0.4, "40%"), Bar("b", 0.5, "50%"), Bar("c", 0.6, "60%")]
    assert find('class="bar (s.)"', draw_bars("t", bars, start=0.5)) == ["s2", "s1", "s1"]


def test_a_long_line_has_as_many_strips_as_can_be_pointed_at_and_they_fill_the_chart():
    for count, strips in ((1, 1), (MOST_STRIPS, MOST_STRIPS), (MOST_STRIPS + 1, MOST_STRIPS // 2 + 1)):
        chart = draw_lines("t", {"a": [(x, float(x)) for x in range(count)]}, "step")
        found = find('class="strip" x="([^"]+)" y="[^"]+" width="([^"]+)"', chart)
        assert len(found) == strips
        assert float(found[0][0]) == LEFT
        assert abs(sum(float(width) for _, width in found) - PLOT_WIDTH) < 0.1 * strips
        assert abs(sum(map(float, found[-1])) - (WIDTH - RIGHT)) < 0.2


def test_one_point_stands_in_the_middle():
    chart = draw_lines("t", {}, "step", {"a": [(3.0, 0.5)]})
    assert set(find('<circle class="dot s1" cx="([^"]+)"', chart)) == {f"{LEFT + PLOT_WIDTH / 2:.1f}"}
    assert draw_lines("t", {"a": []}, "step") == ""


def test_one_line_needs_no_legend_and_two_have_their_names():
    line = [(0.0, 1.0), (1.0, 2.0)]
    assert "legend" not in draw_lines("t", {"a": line}, "step")
    assert "legend" not in draw_lines("t", {"a": line}, "step", {"a": []})
    assert find("</i>([^<]+)</li>", draw_lines("t", {"a": line, "b": line}, "step")) == ["a", "b"]
    assert find("</i>([^<]+)</li>", draw_lines("t", {"a": line}, "step", {"a": line})) == ["training", "held out"]


def test_the_area_of_a_dot_is_its_weight():
    points = [(0.6, 0.5, 0.4, 0.6, 25.0), (0.9, 0.8, 0.7, 0.9, 100.0)]
    radii = [float(radius) for radius in find('<circle[^>]* r="([^"]+)"', draw_reliability("t", points, ("p", "f")))]
    assert radii == [2.5 + 6 / 2, 2.5 + 6]


def test_a_page_leads_to_the_others_of_its_run_that_are_there(tmp_path):
    run, names = tmp_path / "run", ("evaluation", "evaluation-checkpoint-5", "comparison", "evaluation-x")
    for name in names:
        (run / name).mkdir(parents=True)
    report, page = run / "report.html", run / "evaluation" / "evaluation.html"
    assert link_pages(None, report) == link_pages(run, report) == ""
    report.write_text("")
    assert link_pages(run, report) == ""
    # The page itself is still to be written.
    assert find('href="([^"]+)"', link_pages(run, page)) == ["../report.html"]
    assert find('aria-current="page">([^<]+)<', link_pages(run, page)) == ["Evaluation"]
    page = run / "evaluation-checkpoint-5" / "evaluation.html"
    assert find('aria-current="page">([^<]+)<', link_pages(run, page)) == ["Evaluation of checkpoint-5"]
    for name in names:
        kind = name.partition("-")[0]
        (run / name / f"{kind}.html").write_text("")
    addresses = ["evaluation/evaluation.html", "comparison/comparison.html"]
    addresses.append("evaluation-checkpoint-5/evaluation.html")
    assert find('href="([^"]+)"', link_pages(run, report)) == addresses
    elsewhere = tmp_path / "a #1?" / "my page.html"
    assert find('href="([^"]+)"', link_pages(run, elsewhere))[0] == "../run/report.html"
    assert address_of(elsewhere, run) == "../a%20%231%3F/my%20page.html"


def test_only_the_report_of_a_run_that_is_over_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.report.run_page.make_run_page", lambda run: "new")
    report = tmp_path / "report.html"
    refresh_report(None)
    refresh_report(tmp_path)
    assert not report.exists()
    for status, text in (("running", "old"), ("finished", "new")):
        monkeypatch.setattr(links, "read_record", lambda run, status=status: {"status": status})
        report.write_text("old")
        refresh_report(tmp_path)
        assert report.read_text() == text
