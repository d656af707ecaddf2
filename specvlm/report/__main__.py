"""Report runs as one file: python -m specvlm.report FOLDER... [-o report.html]

    python -m specvlm -m pruner=two_stage,uniform ratio=0.5,0.9 dataset=synthetic record=true hydra.sweep.dir=sweep
    python -m specvlm.report sweep -o report.html
    python -m specvlm.report sweep --samples scene-0003,scene-0007 --baseline "uniform, drops 90 %"
    python -m specvlm.report sweep --video saw.mp4 --job "two_stage, drops 90 %"

-o: the file to write; its suffix is the format. `.html`: the page. `.csv`, `.md`, `.tex`: the summary table. `.svg`,
`.pdf`: the charts.

FOLDER: the folder of a run or a job, or one that contains such folders at any depth. For runs with record=true, the
report also shows the target's attention to the video as a heat map.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specvlm.app.cli import print_lines
from specvlm.errors import UserError
from specvlm.parsing.bounds import Within

if TYPE_CHECKING:
    from specvlm.report.reading import Job

FRAMES, MOST_FRAMES = 48, 1024  # default and limit of --frames
PAGES, TABLES, PICTURES = (".html", ".htm"), (".csv", ".md", ".tex"), (".svg", ".pdf")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (see `errors.ExitCode`)."""
    parser = argparse.ArgumentParser("python -m specvlm.report", description="A report of runs as one file.")
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="folders of runs, jobs or sweeps",
    )
    parser.add_argument("-o", "--out", type=Path, help="the file to write, .html, .csv, .md, .tex, .svg or .pdf (report.html)")
    parser.add_argument("--title", default="specvlm report")
    parser.add_argument("--samples", default="", help="samples to show, as A,B,C (worst, median and best)")
    parser.add_argument(
        "--baseline", metavar="JOB", help="the job to compare with (uniform at the same ratio, or the first job)"
    )
    parser.add_argument("--frames", type=int, default=FRAMES, help=f"most frames to show per sample ({FRAMES})")
    parser.add_argument("--video", type=Path, help="write a film of what the drafter saw of one sample, .mp4 or .gif")
    parser.add_argument("--job", help="the job whose view the film shows (the fastest end to end that prunes)")
    return print_lines(parser, words, written)


def written(asked: argparse.Namespace) -> list[str]:
    """Write the file of --out (page, table or charts), the film of --video, or both. Returns one line per file.

    Raises UserError if an option is wrong, a folder has nothing to report, or a file in it is damaged.
    """
    try:
        from specvlm.report.page import best, chosen, page
        from specvlm.report.statistics import called
    except ModuleNotFoundError as error:
        raise UserError(f"a report needs {error.name}: pip install 'specvlm[report]'") from None
    from specvlm.report.film import film, kind_of
    from specvlm.report.reading import failures, read_jobs
    from specvlm.report.seen import see

    if asked.frames not in Within(1, MOST_FRAMES):
        raise UserError(f"--frames {asked.frames}: expected {Within(1, MOST_FRAMES)}")
    suffixes = (*PAGES, *TABLES, *PICTURES)
    if asked.out and asked.out.suffix.lower() not in suffixes:
        raise UserError(f"-o {asked.out}: give a name that ends in {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    if asked.video:
        kind_of(asked.video)
    jobs = read_jobs(asked.folders)
    samples = chosen(jobs, [name.strip() for name in asked.samples.split(",") if name.strip()])
    lines = []
    if asked.out or not asked.video:
        out = asked.out or Path("report.html")
        if out.suffix.lower() in PAGES:
            looked = [(title, see(name, jobs, asked.frames)) for name, title in samples.items()]
            content = page(jobs, looked, asked.title, asked.baseline, failures(asked.folders)).encode()
        else:
            content = exported(jobs, out.suffix.lower(), asked.title, asked.baseline)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(content)
        size = f"{len(content) / 2**20:.1f} MiB" if len(content) >= 2**19 else f"{len(content) / 2**10:.1f} KiB"
        lines.append(f"written: {out} ({size})")
    if asked.video:
        job = called(asked.job, jobs)[0] if asked.job else best(jobs)
        film(see(next(iter(samples)), [job], asked.frames), asked.video)
        lines.append(f"written: {asked.video} ({job.label}, {next(iter(samples))})")
    return lines


def exported(jobs: "Sequence[Job]", suffix: str, title: str, base: str | None) -> bytes:
    """Make the content of a file with a suffix of TABLES or PICTURES."""
    from specvlm.report import pictures, tables

    if suffix == ".pdf":
        return pictures.pdf_of(jobs, title, base)
    texts = {
        ".csv": lambda: tables.csv_of(jobs, base),
        ".md": lambda: tables.markdown_of(jobs, title, base),
        ".tex": lambda: tables.latex_of(jobs, title, base),
        ".svg": lambda: pictures.svg_of(jobs, title, base),
    }
    return texts[suffix]().encode()


if __name__ == "__main__":
    sys.exit(main())
