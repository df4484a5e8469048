"""The report: whole, self-contained, the same for the same runs."""

import base64
import json
import re
import sys
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from bitfit_fast import cli
from bitfit_fast.study import collect, expand, read_study, report, write_report
from bitfit_fast.study.analysis import Spread, average, pareto_front, spread
from bitfit_fast.study.published import PUBLISHED, published
from bitfit_fast.study.style import _apart, looks
from bitfit_fast.study.worker import fail


class Page(HTMLParser):
    """Tables, links and sources of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.cells, self.images, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[key] for key in ("src", "href", "action") if key in attributes]
        if tag == "img":
            self.images.append(attributes)
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.cells[-1] += data


METHODS = """
  - {name: full, method: full, lr: 1e-4}
  - {name: BitFit, method: bitfit}
  - {name: BitFit <m2>, method: b_m2}
  - {name: frozen, method: frozen}
"""


@pytest.fixture
def reported(study_file, made_up, tmp_path):
    """A study with a grid of methods, sizes and a search; one run failed, one is missing."""
    path = study_file(
        "grids:",
        "  - {title: Methods, seeds: 3}",
        "  - {title: Sizes, sizes: [8, 0.2, 20, 1], methods: [full, bitfit]}",  # 0.2 is 8, too
        "  - title: Searched",
        "    methods: [{method: bitfit, name: searched, lr: [1e-3, 2e-3]}]",
        methods=METHODS,
    )
    plan = expand(read_study(path), {str(_train(path)): 40})
    output = tmp_path / "out"
    broken, missing = list(plan.runs)[1], list(plan.runs)[2]
    made_up(plan, output, leave=(broken, missing))
    fail(output / "runs" / broken, "the loss is nan at step 3", "Traceback")
    return plan, output, broken, missing


def _train(path):
    return re.search(r"train_file: (\S+)", path.read_text())[1]


def test_the_page_needs_nothing_else_holds_every_number_and_is_always_the_same(
    reported, monkeypatch
):
    monkeypatch.setattr(report, "GLUE", {None})  # as if the files were one of its tasks
    plan, output, broken, missing = reported
    collected = collect(plan, output)
    html, markdown = write_report(collected, output, "bitfit-fast study tiny.yaml")
    text, plain = html.read_text(), markdown.read_text()
    page = Page(text)
    assert not page.open
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in page.links)
    assert not re.search(r"url\(|@import|<script|<link", text)
    for image in page.images:
        data = base64.b64decode(image["src"].partition(",")[2])
        assert data.startswith(b"<?xml")
        assert image["alt"]
    cells = {re.sub(r"\s+", " ", cell).strip() for cell in page.cells}
    for cell in plan.cells:
        results = collected.of(cell)
        found = spread([result.score for result in results])
        small = f" ± {found.deviation:.1f}" if found.deviation is not None else ""
        assert f"{found.mean:.1f}{small}" in cells, cell
        assert f"{found.mean:.1f}" in plain
    for name, why in ((broken, "the loss is nan at step 3"), (missing, "not done")):
        assert name in cells and name in plain
        assert why in cells and why in plain
    total = len(plan.runs)
    assert f"{total - 2} of {total} runs finished, 1 failed, 1 not done" in text
    # what the paper reports for the same methods, and a name that is no tag
    assert "82.3" in cells and "82.4" in cells and "81.2 / 81.8" in cells
    assert "BitFit <m2>" in cells and "<m2>" not in text
    assert "few steps" in cells
    assert "commit 0123abcd" in text
    for figure in re.findall(r"\((figures/[^)]+)\)", plain):
        assert (output / figure).stat().st_size > 1000
    assert len(page.images) == plain.count("![")
    titles = [image["alt"] for image in page.images]
    for part in ("Quality against cost", "Stability", "gap", "Change of the biases", "by size"):
        assert any(part in title for title in titles), part

    # the same runs give the same bytes
    files = [*(output / "figures").iterdir(), html, markdown]
    first = {file: file.read_bytes() for file in files}
    (output / "figures" / "old.png").write_bytes(b"of an earlier study")
    write_report(collect(plan, output), output, "bitfit-fast study tiny.yaml")
    assert {file: file.read_bytes() for file in files} == first
    assert not (output / "figures" / "old.png").exists()


def test_averages_over_glue_stand_beside_its_tasks_alone(reported):
    plan, output, *_ = reported
    _, markdown = write_report(collect(plan, output), output, "some")
    assert "paper: BERT" not in markdown.read_text()


def test_a_study_without_results_has_a_report(study_file, tmp_path):
    path = study_file()
    plan = expand(read_study(path), {str(_train(path)): 40})
    html, _ = write_report(collect(plan, tmp_path / "out"), tmp_path / "out", "some")
    assert "0 of 3 runs finished, 3 not done" in html.read_text()


def test_models_are_compared_in_a_table(study_file, made_up, bert_folder, roberta_folder, tmp_path):
    path = study_file(methods="[full, bitfit]")
    path.write_text(
        path.read_text().replace(str(bert_folder), f"[{bert_folder}, {roberta_folder}]")
    )
    plan = expand(read_study(path), {str(_train(path)): 40})
    made_up(plan, tmp_path / "out")
    collected = collect(plan, tmp_path / "out")
    _, markdown = write_report(collected, tmp_path / "out", "some")
    text = markdown.read_text()
    assert "### Across architectures" in text
    scores = [result.score for result in collected.results.values()]
    row = next(line for line in text.splitlines() if line.startswith(f"| {roberta_folder} "))
    assert f"{scores[2]:.1f}" in row and f"{scores[3]:.1f}" in row


def test_the_command_line_does_a_study_and_reports_it(study_file, tmp_path, monkeypatch, capsys):
    path, output = study_file(methods="[frozen]"), tmp_path / "out"

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["bitfit-fast", "study", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as stop:
            return stop.code or 0, capsys.readouterr()
        return 0, capsys.readouterr()

    code, said = call(path, "--output", output)
    assert code == 0, said.err
    assert "report.html" in said.out.replace("\n", "")
    (run,) = (output / "runs").iterdir()
    score = 100 * json.loads((run / "summary.json").read_text())["final"]["validation"]["accuracy"]
    assert f"| {score:.1f} |" in (output / "report.md").read_text()
    code, said = call(path, "--output", output, "--report-only")
    assert code == 0, said.err
    # a failed run is seen in the exit code
    (run / "summary.json").unlink()
    fail(run, "it broke", "")
    code, said = call(path, "--output", output, "--report-only")
    assert code == 1
    assert "it broke" in said.err
    for arguments, told in (
        ((path, "--task", "rte"), "or options (--task), not both"),
        ((), "give a study's file, or --output with --task and --method"),
        ((path, "--output", output, "--jobs", 0), "jobs must be at least 1, not 0"),
        (("--output", output, "--task", "rte", "--method", "half"), "--method: unknown method"),
    ):
        code, said = call(*arguments)
        assert code == 2
        assert told in said.err


def test_statistics_over_seeds():
    assert spread([]) is None
    assert spread([3.0]) == Spread(3.0, None, 3.0, 3.0, 3.0, 1)
    found = spread([1.0, 2.0, 6.0])
    assert (found.mean, found.median, found.count) == (3.0, 2.0, 3)
    assert found.deviation == pytest.approx(7**0.5)
    # an average over fewer tasks would not compare
    assert average([found, spread([5.0])]) == 4.0
    assert average([found, None]) is None


def test_the_front_is_what_no_other_point_beats():
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 7.0), (3.0, 7.0), (4.0, 9.0), (0.5, 1.0)]
    assert pareto_front(points) == [5, 0, 2, 4]


def test_published_averages_by_method_and_terms():
    assert published("bitfit", "all")["BERT-base", "dev"] == (82.4,)
    assert published("bitfit", "m2,query")["BERT-base", "dev"] == (81.1,)
    assert published("full", "all")["BERT-large", "test"] == (81.2, 81.8)
    assert published("bitfit", "value") == {}
    assert len(PUBLISHED) == 18


def test_a_method_looks_the_same_everywhere_and_like_no_other():
    entries = [("full", "full"), ("frozen", "frozen"), *((f"m{i}", "bitfit") for i in range(25))]
    found = looks(entries)
    assert len(set(found.values())) == len(entries)
    assert looks(entries[:5])["m2"] == found["m2"]


def test_labels_keep_apart_and_near_their_lines():
    heights = [0.1, 0.11, 0.12, 0.5, 0.9, 0.905]
    placed = _apart(heights, 0.05)
    assert placed == sorted(placed)
    assert all(b - a >= 0.05 - 1e-9 for a, b in pairwise(placed))
    assert placed[3] == 0.5
    assert sum(placed[:3]) == pytest.approx(sum(heights[:3]))
