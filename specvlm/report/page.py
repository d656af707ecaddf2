"""Render the report as one self-contained HTML file: tables, charts, player and scripts."""

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import altair
import vl_convert
from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from specvlm.errors import UserError, did_you_mean
from specvlm.report.reading import Job
from specvlm.report.seen import Seen
from specvlm.report.statistics import DRAWS
from specvlm.report.table import groups

NOTES = (
    "Figures are means over a job's samples; a speed-up is the target's time over all samples, divided by ours. In brackets: "
    f"95 % bootstrap intervals ({DRAWS} resamples of the samples, percentiles, fixed seed); a single sample has none.",
    "Accepted per round counts guesses, not the target's own token after them. Rounds that a stop token or the token limit "
    "cut short are left out.",
    "A pruner changes what the drafter sees, never what the target sees. Refused guesses are the drafter's best path after "
    "the accepted ones.",
)


def chosen(jobs: Sequence[Job], names: Sequence[str]) -> dict[str, str]:
    """Choose samples to show; returns their titles by id.

    Takes the named samples. Without names, takes the median, worst and best by accepted_per_round (mean over jobs), or
    simply the first three if no more than three samples have that metric.

    Raises:
        UserError: No job has finished a sample of a given name.
    """
    known: dict[str, list[float]] = {row["sample"]: [] for job in jobs for row in job.done}
    for row in (row for job in jobs for row in job.done if row["accepted_per_round"] is not None):
        known[row["sample"]].append(row["accepted_per_round"])
    for name in names:
        if name not in known:
            raise UserError(f"no job has a finished sample {name!r}.{did_you_mean(name, known)}")
    means = {sample: sum(values) / len(values) for sample, values in known.items() if values}
    if names or len(means) <= 3:
        return {name: name for name in names or list(known)[:3]}
    order = sorted(means, key=lambda sample: means[sample])
    picks = {order[len(order) // 2]: "median", order[0]: "least accepted", order[-1]: "most accepted"}
    return {sample: f"{sample} ({why})" for sample, why in picks.items()}


def best(jobs: Sequence[Job]) -> Job:
    """Choose the job to show first: the fastest end to end, or without baselines the one with most accepted per round.

    Chooses among the lossless jobs that dropped video tokens, if there are any, else among all.
    """
    pruned = [job for job in jobs if job.ratio and not job.lossy] or list(jobs)
    return max(pruned, key=lambda job: tuple(job.totals[key] or 0.0 for key in ("speedup_end_to_end", "accepted_per_round")))


def facts(jobs: Sequence[Job]) -> list[str]:
    """List facts about the jobs for the page's header: counts, data sets, models, dtypes, versions."""

    def each(key: str, before: str = "") -> list[str]:
        """List the values of a setting; count them if there are more than three."""
        values = dict.fromkeys(str(job.settings[key]) for job in jobs if job.settings.get(key) is not None)
        return [f"{before}{value}" for value in values] if len(values) <= 3 else [f"{len(values)} × {before}".strip()]

    rows = [row for job in jobs for row in job.done]
    counts = {"job": len(jobs), "sample": len({row["sample"] for row in rows}), "answer": len(rows)}
    sets = dict.fromkeys(" ".join(str(row[key]) for key in ("dataset", "split", "version") if row[key]) for row in rows)
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in (job.summary.get("versions") or {}).items()) for job in jobs)
    return [
        *(f"{count} {what}{'' if count == 1 else 's'}" for what, count in counts.items()),
        *(f"data set {name}" for name in sets if name),
        *each("target.path", "target "),
        *each("draft.path", "draft "),
        *each("dtype", "dtype "),
        *(version for version in versions if version),
    ]


def page(
    jobs: Sequence[Job], looked: Sequence[tuple[str, Seen]], title: str, base: str | None = None, failed: Sequence[str] = ()
) -> str:
    """Render the HTML text of the report.

    Args:
        jobs: Jobs of the report.
        looked: Title and content of each sample to show.
        title: Title of the page.
        base: Name of the job to compare with, see `bases`.
        failed: One line for each job without results.
    """
    style, script = part("look.css") + part("style.css"), part("player.js") + part("page.js")
    library, made = bundle(), groups(jobs, base)
    numbers = {job: number for number, job in enumerate(jobs)}
    # Escape everything that is not marked safe: texts come from models, file names and data sets.
    environment = Environment(loader=PackageLoader("specvlm.report", "template"), autoescape=True, trim_blocks=True)
    environment.filters["breakable"] = breakable
    return environment.get_template("page.html.j2").render(
        title=title,
        facts=facts(jobs),
        failed=failed,
        groups=made,
        notes=NOTES,
        specs={f"{group.name}-{chart.name}": chart.spec for group in made for chart in group.charts},
        data={
            "jobs": [job.label for job in jobs],
            "first": numbers[best(jobs)],
            "samples": [seen.packed(numbers) | {"title": name} for name, seen in looked],
        },
        style=style,
        library=library,
        script=script,
        hashes=" ".join(f"'sha256-{sha(text)}'" for text in (library, script)),
    )


def part(name: str) -> str:
    """Read a file of the page, by its name: one of the report's own, or one shared with the server's page."""
    places = (files("specvlm.report") / "template", files("specvlm.results") / "page")
    return next(place / name for place in places if (place / name).is_file()).read_text(encoding="utf-8")


def breakable(name: str) -> Markup:
    """Escape a long name, and allow line breaks after its punctuation, not within words."""
    return Markup(re.sub(r"([_=/,])", r"\1<wbr>", str(escape(name))))


@cache
def bundle() -> str:
    """One script with Vega, vega-embed and the version of Vega-Lite that Altair writes for."""
    script = vl_convert.javascript_bundle(vl_version=".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2]))
    return script.replace("</script", "<\\/script").replace("\r\n", "\n")  # hash the text as the browser sees it


def sha(script: str) -> str:
    """SHA-256 of a script in base64, as the page's content security policy lists it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
