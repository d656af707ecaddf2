"""Exports hold the page's figures, whatever jobs are called; a suffix that is none of them is refused."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from xml.etree import ElementTree

import pytest
from report_jobs import job, row, scattered, sweep

pytest.importorskip("altair")

from specvlm.report import labels, pictures, tables
from specvlm.report.__main__ import exported
from specvlm.report.__main__ import main as report
from specvlm.report.charts import COLOURS, LOOKS
from specvlm.report.page import page
from specvlm.report.reading import read_jobs
from specvlm.report.table import groups


def scored(rows, metric="accuracy", right=lambda index: index % 2, alone=lambda index: 1.0, **changes):
    """Add scores, a target's own answer and a task to rows."""
    return [
        line
        | {"scores": {metric: float(right(line["index"]))}, "baseline_scores": {metric: alone(line["index"])}}
        | {"baseline_token_ids": [1, 2, 3], "meta": {"task": ("count", "colour")[line["index"] % 2]}}
        | changes
        for line in rows
    ]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Eight jobs: a sweep, one with scores, and a lossy one."""
    tmp_path = tmp_path_factory.mktemp("jobs")
    sweep(tmp_path)
    job(tmp_path / "scored", scored(scattered(7, kept=102)), pruner__name="fastv")
    lossy = scored(scattered(8, kept=102), verdict="lossy", token_ids=[1, 2, 4])
    job(tmp_path / "lossy", lossy, pruner__name="fastv", verifier__name="loose")
    return read_jobs([tmp_path])


@pytest.mark.slow
def test_csv_has_the_plain_totals_of_every_job(jobs):
    rows = list(csv.DictReader(io.StringIO(tables.csv_of(jobs))))
    assert [line["job"] for line in rows] == [job.label for job in jobs]
    for line, one in zip(rows, jobs, strict=True):
        for key in ("accepted_per_round", "speedup_decode", "peak_memory_bytes"):
            assert float(line[key]) == one.totals[key]
        assert (
            float(line["accepted_per_round_low"]) < float(line["accepted_per_round"]) < float(line["accepted_per_round_high"])
        )
        assert line["samples"] == "8"
    fastv = next(line for line in rows if line["job"].startswith("fastv") and line["lossy"] == "False")
    assert float(fastv["score:accuracy"]) == 0.5 and 0 < float(fastv["score:accuracy_low"]) < 0.5
    loose = next(line for line in rows if line["lossy"] == "True")
    assert float(loose["gain:accuracy"]) == -0.5 and loose["verdict:lossy"] == "8" and loose["compared_with"] == ""


def test_csv_has_no_formula(tmp_path):
    job(tmp_path / "a", [row(0)], target__path="=1+1")
    job(tmp_path / "b", [row(0)], target__path="@x")
    text = tables.csv_of(read_jobs([tmp_path]))
    assert not re.search(r'(^|[,"])[=@+]', text, re.M)
    assert tables.formula_free("=1") == "'=1" and tables.formula_free(-1.5) == -1.5


NAMES = ["a|b", "a_b*c*", "<b>x</b>", "[x](http://y)", "![x](y)", "line\nbreak", r"\input{x}", "50 % & #1 ${x}^~"]


@pytest.mark.slow
def test_names_cannot_break_a_table(tmp_path):
    for number, name in enumerate(NAMES):
        job(tmp_path / str(number), [row(0)], target__path=name, pruner__name="uniform")
    found, title = read_jobs([tmp_path]), "\n".join(NAMES)
    text = tables.markdown_of(found, title)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == len(NAMES) + 2 and len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "<b>" not in text and not re.search(r"(?<!\\)\]\(", text) and text.startswith("# a\\|b a\\_b")
    tex = [line for line in tables.latex_of(found, title).splitlines() if not line.startswith("%")]
    assert not any("\\input" in line for line in tex) and tex.count("\\toprule") == tex.count("\\end{tabular}") == 1
    rows = [line for line in tex if line.endswith("\\\\")]
    assert len(rows) == len(NAMES) + 2 and len({len(re.findall(r"(?<!\\)&", line)) for line in rows}) == 1
    assert not any(line.startswith("[") for line in rows)
    assert ElementTree.fromstring(pictures.svg_of(found, title)) is not None


@pytest.mark.slow
def test_tables_have_the_pages_figures(jobs):
    markdown, tex = tables.markdown_of(jobs, "One"), tables.latex_of(jobs, "One")
    for group in groups(jobs):
        for line in group.lines:
            for cell in line.cells:
                assert tables.marked(cell.text) in markdown
                assert cell.key == "verdict" or tables.escaped(cell.text) in tex
    assert "Lossy rules" in markdown and markdown.count("\n| job") == tex.count(r"\toprule") == 2
    assert "8 of 8 differ" in markdown and "accuracy gained vs target alone" in markdown


HARD = {
    "_": r"a\_b", "%": r"a\%b", "&": r"a\&b", "#": r"a\#b", "{": r"a\{b", "}": r"a\}b", "$": r"a\$b",
    "\\": r"a\textbackslash{}b",
    "~": r"a\textasciitilde{}b", "^": r"a\textasciicircum{}b", "\n": "a b", "\u2028": "a b", "\x00": "ab", "\x1b": "ab",
    "é": "aéb", "青": "a青b",
}  # fmt: skip


@pytest.mark.parametrize("sign", HARD)
def test_every_sign_of_a_name_is_a_sign_in_latex(sign):
    assert tables.escaped(f"a{sign}b") == HARD[sign]


def test_latex_says_which_letters_need_more_than_pdflatex(tmp_path):
    job(tmp_path / "a", [row(0)], target__path="naïve – …")
    job(tmp_path / "b", [row(0)], target__path="naïve — x")
    assert "LuaLaTeX" not in tables.latex_of(read_jobs([tmp_path]), "One")
    job(tmp_path / "c", [row(0)], target__path="青い动")
    assert "\n% LuaLaTeX or XeLaTeX, with a font that has い动青\n" in tables.latex_of(read_jobs([tmp_path]), "One")


@pytest.mark.slow
def test_latex_shows_what_a_lossy_rule_gains(jobs):
    (lossy,) = (group for group in groups(jobs) if group.name == "lossy")
    tex = tables.tabular(lossy).splitlines()
    heads = next(line for line in tex if "accuracy gained" in line).split(" & ")
    line = next(line for line in tex if line.startswith("fastv")).split(" & ")
    assert len(line) == len(heads) and line[heads.index("accuracy gained")] == "$-$0.500"
    assert all(cell.strip() for cell in line)


@pytest.mark.parametrize("sign", ["&lt;", "$x$", "&", "$"])
def test_no_name_is_an_entity_or_a_formula_in_markdown(sign):
    assert tables.marked(sign) == sign.replace("&", "\\&").replace("$", "\\$")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(jobs, tmp_path):
    document = (
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}" + tables.latex_of(jobs, "x") + "\\end{document}"
    )
    (tmp_path / "x.tex").write_text(document, encoding="utf-8")
    subprocess.run(["pdflatex", "-halt-on-error", "x.tex"], cwd=tmp_path, check=True, capture_output=True, timeout=120)


@pytest.mark.slow
def test_the_picture_has_every_chart_and_no_variable_of_the_page(jobs):
    text = pictures.svg_of(jobs, "Title & more")
    tree = ElementTree.fromstring(text)
    drawn = [chart.title for group in groups(jobs) for chart in group.charts]
    assert "var(" not in text and "Title &amp; more" in text and all(title in text for title in drawn)
    ids = [part.get("id") for part in tree.iter() if part.get("id")]
    assert len(ids) == len(set(ids)) and float(tree.get("height")) > 250 * len(drawn)
    assert "…" not in text  # no label is cut
    inner = tree.findall(".//{http://www.w3.org/2000/svg}svg")
    assert len(inner) == len(drawn) and {part.get("overflow") for part in inner} == {"visible"}  # nor by a wider font


@pytest.mark.slow
def test_a_pdf_is_written(jobs):
    assert exported(jobs, ".pdf", "x", None).startswith(b"%PDF-")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".csv", ".md", ".tex", ".svg"])
def test_the_suffix_says_what_is_written(suffix, tmp_path, capsys):
    job(tmp_path / "job", [row(0), row(1)])
    out = tmp_path / "new" / f"x{suffix.upper()}"
    assert report([str(tmp_path / "job"), "-o", str(out)]) == 0
    assert out.stat().st_size > 200 and str(out) in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x.txt", "x.png", "x", "x.html.zip"])
def test_another_suffix_is_refused_in_one_line(name, tmp_path, capsys):
    job(tmp_path / "job", [row(0)])
    assert report([str(tmp_path / "job"), "-o", str(tmp_path / name)]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said and ".html, .htm, .csv, .md, .tex, .svg or .pdf" in said and not (tmp_path / name).exists()


# ---- labels and colours ----------------------------------------------------------------------------------------------


def test_twelve_jobs_have_twelve_colours():
    assert len(set(COLOURS)) == 12
    light = pictures.colours()
    assert len({light[name[4:-1]] for name in COLOURS}) == 12


@pytest.mark.parametrize(
    ("label", "count"),
    [
        ("uniform", 1),
        ("x" * 30, 1),
        ("x" * 31, 2),
        ("x" * 100, 4),
        ("two_stage mass=0.2 drafter=dynamic_tree nodes=25", 2),
        ("", 1),
    ],
)
def test_labels_are_broken_not_cut(label, count):
    assert labels.lines(label, labels.AXIS_LINE) == count


@pytest.mark.slow
def test_no_legend_or_axis_of_jobs_cuts_a_label(jobs):
    assert "labelLimit" not in LOOKS["legend"]
    for group in groups(jobs):
        for chart in group.charts:
            text = str(chart.spec)
            limits = re.findall(r"'labelLimit': (\d+)", text)
            assert limits and set(limits) == {"0"}


@pytest.mark.slow
def test_the_page_has_scores_by_task(jobs):
    text = page(jobs, [], "x")
    assert "accuracy by task" in text and "n = 4" in text and "8 of 8 differ" in text
