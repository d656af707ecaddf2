"""Terminal output of runs and sweeps: plans, answers, progress, rows and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from specvlm.app.terminal import Stream, Terminal, styled
from specvlm.strategies.registry import described
from specvlm.types import Step

if TYPE_CHECKING:
    from specvlm.app.prepare import Prepared

SPEEDUPS = (("decode", "speedup_decode"), ("end to end", "speedup_end_to_end"))
MOST_REASONS = 5  # most failures shown per job; summary.json has all
# Colour of a verdict, by how it begins.
COLOURS = {"identical": "green", "numeric tie": "yellow", "tie": "yellow", "MISMATCH": "bold red"}


def two_digits(value: float) -> str:
    """Format a speed with two significant digits; files keep all digits.

    Ten repeats of one run of 109 tokens on a busy CPU gave speed-ups of 0.94 to 1.63, a standard deviation of 16 %. A
    third digit is noise even in a job of hundreds of samples.
    """
    return f"{float(f'{value:.2g}'):.0f}" if value >= 10 else f"{value:#.2g}"


def times(speedup: float) -> str:
    """Format a speed-up, such as `1.6 x`."""
    return f"{two_digits(speedup)} x"


def seconds(value: float) -> str:
    """Format a number of seconds in s or ms."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def size(count: int) -> str:
    """Format a number of bytes in GiB or MiB."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


# Columns with a number in the table of a sweep: heading, key of summary.json, format.
NUMBERS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("kept", "kept_tokens", "{:.0f}".format),
    ("accepted", "accepted_per_round", "{:.2f}".format),
    *((head, key, times) for head, key in SPEEDUPS),
    ("file to\nfirst", "file_to_first_token_s", seconds),
    ("file to\nlast", "file_to_last_token_s", seconds),
)
COLUMNS = ("job", "done", *(head for head, _, _ in NUMBERS), "scores", "verdicts", "failed", "skipped")
LEFT = ("job", "scores", "verdicts")  # columns of texts


class RunConsole:
    """Prints plans, answers, rows and tables; plain text, without colours or bars, if the output is not a terminal.

    Creating one also silences Hugging Face's logs and, if the output is not a terminal, its progress bars.

    Args:
        console: Where to print; standard output by default.
        quiet: Show no bars or spinners.
    """

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Terminal()
        self.live = self.console.is_terminal and not quiet
        set_verbosity_error()  # our own one-line errors replace Hugging Face's logs
        if not self.console.is_terminal:
            self.console.width = 120
            disable_progress_bar()  # Hugging Face's own bars for loading weights

    def plan(self, request: Prepared) -> None:
        """Print the question, the memory plan, and what the drafter will see."""
        say = partial(self.console.print, soft_wrap=not self.console.is_terminal)
        say(styled((request.clip, "bold"), f": {request.question}"))
        for device, plan in request.plans.items():
            parts = ", ".join(f"{name} {size(count)}" for name, count in plan.parts.items())
            say(styled(("memory plan:", "dim"), f" {size(plan.total)} on {device} ({parts})"))
        if how := spread(request):
            say(styled(("target:", "dim"), f" {how}"))
        if quantised := ", ".join(f"{side} {kind}" for side, kind in request.kinds.items() if kind):
            say(styled(("quantised:", "dim"), f" {quantised} (text layers and head)"))
        say(styled(("drafter:", "dim"), f" {described(request.drafter)}"))
        if request.drafter.model is None:
            say(styled(("pruner:", "dim"), " not used, since this drafter does not look at the video"))
            return
        total = len(request.prompt.video_index)
        share = f"drops {1 - request.kept / max(total, 1):.0%}: keeps {request.kept} of {total} video tokens"
        say(styled(("pruner:", "dim"), f" {described(request.pruner)} {share}"))

    def note(self, line: str) -> None:
        """Print a note, unless it is empty."""
        if line:
            self.console.print(styled(("note:", "yellow"), f" {line}"))

    def waiting(self, what: str) -> AbstractContextManager[object]:
        """Show a spinner with the label `what` during the block, unless bars are off."""
        return self.console.status(what) if self.live else nullcontext()

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """Show a progress bar during the block, unless bars are off. Yields a function that advances it by one step."""
        columns = (
            TextColumn("[dim]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.live) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)

    @contextmanager
    def answer(self, tokenizer: Any) -> Iterator[Callable[[Step], None]]:
        """Yield a function that prints the answer step by step. An incomplete word or character is held back."""
        tokens: list[int] = []
        shown = ""

        def show(step: Step) -> None:
            nonlocal shown
            tokens.extend(step.tokens)
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if text.startswith(shown) and not text.endswith("\ufffd"):
                stream.add(text[len(shown) :])
                shown = text

        self.console.print()
        stream = Stream(self.console)
        try:
            yield show
        finally:
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            stream.add(text[len(shown) :] + "\n\n", last=True)

    def summary(self, summary: dict[str, Any], folder: Path) -> None:
        """Print the table and the verdict of a run, and where its results are."""
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in rows(summary):
            table.add_row(styled((name, "dim")), value)
        self.console.print(table)
        verdict = summary["verdict"]
        self.console.print(styled("\n", coloured(verdict), f" {meaning(verdict)}"), soft_wrap=True)
        self.written(folder)

    def checked(self, found: Mapping[str, Any], label: str = "") -> None:
        """Print the verdict of `check=…`. found: the row of a sample, or the summary of a run; label: the job's."""
        whose = f"{found['sample']} {label}".strip() + " " if "sample" in found else ""
        self.console.print(
            styled((f"check: {whose}", "dim"), coloured(found["hf_check"]), " by Hugging Face's own model, loaded separately")
        )

    def written(self, folder: Path) -> None:
        """Print where the results are."""
        self.console.print(styled((f"written to {folder}", "dim")))

    def job(self, name: str, done: int, total: int, shard: str | None) -> None:
        """Print the heading of a job: its name and how many samples are done."""
        before, part = f", {done} of them done" if done else "", f" (shard {shard})" if shard else ""
        self.console.print(styled((name, "bold"), f"{part}: {total} samples{before}"))

    def sample(self, label: str, count: str, row: Mapping[str, Any], left: str) -> None:
        """Print one line for a finished sample. label: the job's; count: such as "3/10"; left: see `left`."""
        label = f"{label} " if label else ""
        self.console.print(styled((count, "dim"), f" {row['sample']} ", (label, "dim"), *outcome(row), (left, "dim")))

    def jobs(self, jobs: Sequence[tuple[str, Mapping[str, Any]]], common: str, folder: Path | None, go_on: str) -> None:
        """Print the table of a sweep and the reasons for its failures.

        Args:
            jobs: Label and summary of each job.
            common: Overrides that all jobs share.
            folder: The sweep's folder. None: do not print one.
            go_on: Overrides that resume the sweep; empty if it is complete.
        """
        lines, reasons = list[tuple[str | Text, ...]](), []
        failed = [{"done": "-", "verdicts": styled(("failed", "bold red"))}.get(head, "") for head in COLUMNS[1:]]
        for label, found in jobs:
            name = label or found.get("dataset") or "job"  # a lone job shares all its words, so its label is empty
            lines.append((name, *(totals(found) if "samples" in found else failed)))
            told = [(f"{name}: {sample}", reason) for sample, reason in found.get("reasons", {}).items()]
            told += [(name, found["reason"])] if found.get("reason") else []
            reasons += [styled((f"{what}:", "dim"), f" {why}") for what, why in told[:MOST_REASONS]]
            more = f" and {len(told) - MOST_REASONS} more"
            reasons += [styled((f"{name}:", "dim"), more)] if len(told) > MOST_REASONS else []
        self.console.print()
        self._table(lines)
        for line in reasons:
            self.console.print(line)
        if common:
            self.console.print(styled((f"all: {common}", "dim")))
        if folder is not None:
            self.written(folder)
        self.note(go_on and f"interrupted; repeat the command with {go_on} to continue")

    def _table(self, rows: Sequence[Sequence[str | Text]]) -> None:
        """Print the table of a sweep, without empty columns.

        On a narrow terminal, the name of each job gets a line of its own.
        """
        there = [at for at in range(len(COLUMNS)) if not at or any(str(row[at]) for row in rows)]
        heads, lines = [COLUMNS[at] for at in there], [[row[at] for at in there] for row in rows]
        sizes = [[self.console.measure(cell) for cell in column] for column in zip(heads, *lines, strict=True)]
        names, *widths = (max(size.maximum for size in column) for column in sizes)
        room = self.console.width - 2 * len(there) - sum(widths)
        if room >= max(size.minimum for size in sizes[0]):
            self.console.print(columns(heads, lines, [min(names, room), *widths]))
            return
        at = heads.index("verdicts") - 1
        widths[at] = max(widths[at] + min(room + 2, 0), 9)
        self.console.print(columns(heads[1:], [], widths))
        for name, *line in lines:
            self.console.print(styled((str(name), "bold")), columns(heads[1:], [line], widths, headed=False), sep="\n")


def columns(heads: Sequence[str], lines: Sequence[Sequence[str | Text]], widths: Sequence[int], headed: bool = True) -> Table:
    """Build a table with fixed column widths, in characters."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_header=headed)
    for head, width in zip(heads, widths, strict=True):
        made.add_column(head, justify="left" if head in LEFT else "right", width=width, overflow="fold")
    for line in lines:
        made.add_row(*line)
    return made


def outcome(row: Mapping[str, Any]) -> tuple[str | tuple[str, str], ...]:
    """Describe the outcome of a sample in a few words, as arguments for `styled`. row: its line of samples.jsonl."""
    if row["status"] != "ok":
        return (row["status"], "bold red"), f" {row['reason']}"
    parts = [f"{row['new_tokens']} tokens"]
    parts += [f"{row['reused_tokens']} of {row['prompt_tokens']} reused"] * bool(row.get("reused_tokens"))
    parts += [f"{row['kept_tokens']} of {row['video_tokens']} kept"] * (row["kept_tokens"] is not None)
    parts += [f"{row['accepted_per_round'] or 0:.2f} accepted"] * (row["accepted_per_round"] is not None)
    parts += [f"{name} {times(row[key])}" for name, key in SPEEDUPS if row[key] is not None]
    parts += [f"{name} {score:.3g}" for name, score in (row.get("scores") or {}).items() if score is not None]
    return f"{', '.join(parts)}, ", coloured(row["verdict"])


def totals(found: Mapping[str, Any]) -> Iterator[str | Text]:
    """Yield the cells of a job's line in the table, from its summary.json: one for each of COLUMNS except the name."""
    yield f"{found['ok']}/{found['samples']}"
    for _, key, shown in NUMBERS:
        yield "-" if found.get(key) is None else shown(found[key])  # older summaries lack some keys
    yield "\n".join(scored(name, total) for name, total in (found.get("scores") or {}).items())
    told = [styled(coloured(verdict, f"{count} {verdict}")) for verdict, count in found["verdicts"].items()]
    if lossy := found.get("lossy"):
        told.append(Text(f"{lossy['differ']} of {lossy['compared']} differ from the target's own"))
    told += [styled("check: ", coloured(kind, f"{count} {kind}")) for kind, count in found.get("hf_checks", {}).items()]
    yield Text(", ").join(told) if told else "-"
    yield styled((str(found["failed"]), "bold red")) if found["failed"] else ""
    yield str(found["skipped"] or "")


def scored(name: str, total: Mapping[str, Any]) -> str:
    """Format a job's score, such as `accuracy 0.625`, and the target's own score if it differs."""
    alone = total.get("baseline")
    beside = "" if alone is None or alone == total["mean"] else f" (target {alone:.3f})"
    return f"{name} {total['mean']:.3f}{beside}"


def coloured(verdict: str, text: str = "") -> tuple[str, str]:
    """Pair a text (by default the verdict) with the colour of the verdict."""
    return text or verdict, next((colour for start, colour in COLOURS.items() if verdict.startswith(start)), "bold")


def not_applied(settings: Sequence[str]) -> str:
    """Note on generation settings of the checkpoint that are not applied; empty if there are none."""
    return f"not applied, though the checkpoint's generation config sets it: {', '.join(settings)}" if settings else ""


def too_many_ties(ties: Mapping[str, int] | None) -> str:
    """Note on a job with more numeric ties than rounding explains; else empty. ties: see `metrics.TOTALS`."""
    if ties is None or ties["tied"] <= ties["normal"]:
        return ""
    found = f"numeric ties at {ties['tied']} of {ties['tokens']} tokens, rounding explains {ties['normal']}"
    return f"{found}: a pass over several rows may be wrong; compare with dtype=float32"


def spread(request: Prepared) -> str:
    """Describe how the target is split over its devices; empty for a single device."""
    places = request.places
    if places.parallel == "tensor":
        draft = f", the draft {'too' if places.draft_shared else 'on rank 0 alone'}" if request.drafter.model == "draft" else ""
        return f"every layer shared by {places.ranks} ranks{draft}"
    shares = (f"{count} layers on {device}" for count, device in zip(request.layers, places.target, strict=False))
    return ", ".join(shares)


def rows(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and value for each line of the table below the answer. summary: see `metrics.KEYS`."""
    yield "tokens", f"{summary['new_tokens']} in {summary['rounds']} rounds"
    if (accepted := summary["accepted_per_round"]) is not None:
        ahead = "" if summary["hit_rate"] is None else f", {summary['hit_rate']:.0%} of the trees drafted ahead"
        guesses = f"{accepted:.2f} accepted of {summary['drafted_per_round']:.4g} guesses"
        yield "per round", f"{guesses}, {summary['tokens_per_round']:.2f} tokens{ahead}"
        yield "accepted by depth", "  ".join(f"{d}: {share:.0%}" for d, share in enumerate(summary["acceptance_by_depth"], 1))
    if summary["kept_tokens"] is not None:
        yield "drafter saw", f"{summary['kept_tokens']} of {summary['video_tokens']} video tokens"
    yield "time to first token", seconds(summary["time_to_first_token_s"])
    first = seconds(summary["file_to_first_token_s"])
    yield "file to first token", f"{first} (reading the video {seconds(summary['times_s']['video'])})"
    if summary["drafter_start_s"]:
        yield "drafter start", f"{seconds(summary['drafter_start_s'])} (prune, its vision tower, prefill of the pruned prompt)"
    yield "decode", against(summary["decode_s"], summary["baseline_decode_s"], summary["speedup_decode"])
    yield "end to end", against(summary["end_to_end_s"], summary["baseline_end_to_end_s"], summary["speedup_end_to_end"])
    whole = ("file_to_last_token_s", "baseline_file_to_last_token_s", "speedup_file_to_last_token")
    yield "file to last token", against(*(summary[key] for key in whole))
    yield "speed", f"{two_digits(summary['tokens_per_second'])} tokens/s"
    yield "time by part", ", ".join(f"{part.replace('_', ' ')} {seconds(s)}" for part, s in summary["times_s"].items())
    yield "peak memory", size(summary["peak_memory_bytes"])


def against(ours: float, alone: float | None, speedup: float | None) -> str:
    """Format a time with a drafter and, if there is a baseline, the time of the target alone and the speed-up."""
    if alone is None or speedup is None:
        return seconds(ours)
    return f"{seconds(ours)}, the target alone {seconds(alone)}: {times(speedup)}"


def meaning(verdict: str) -> str:
    """Explain a verdict in a few words; empty if there is nothing to add."""
    if verdict.startswith("identical"):
        return "to the target's own output"
    if verdict == "sampled":
        return "by a rule that is exact in distribution; token by token there is nothing to compare"
    if verdict.startswith("numeric tie"):
        return "- two tokens the target cannot tell apart in this dtype"
    return ""


def left(done: int, more: int, since: float) -> str:
    """Format the estimated time for `more` units, given that `done` units took since `since`, a `monotonic` time.

    Empty if nothing is done yet or nothing is left.
    """
    return f", {timedelta(seconds=round((monotonic() - since) / done * more))} left" if done and more else ""
