"""Print the adviser's tables: predictions, and predicted against measured."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from specvlm.advise.advice import Candidate, alone_s
from specvlm.advise.costs import MISFIT, Costs
from specvlm.advise.loads import Load
from specvlm.app.console import RunConsole, seconds
from specvlm.app.terminal import styled

FASTEST = 8  # candidates shown, besides the fastest of each drafter and ratio


def show(screen: RunConsole, costs: Costs, found: Sequence[Candidate], tokens: int) -> None:
    """Print the target alone, then the fastest candidates and the fastest of each drafter and ratio, by ms per token.

    tokens: length of the answer for the end-to-end times.
    """
    ranked = sorted(found, key=lambda c: c.token_ms)
    firsts = {(c.drafter, c.ratio): c for c in reversed(ranked)}.values()
    alone = alone_s(costs, tokens)
    rows = [("the target alone", "", "", "", "", "", f"{costs.alone_ms:.2f}", "", seconds(alone), "")]
    for c in (c for number, c in enumerate(ranked) if number < FASTEST or c in firsts):
        took = c.end_to_end_s(tokens)
        name = " ".join(filter(None, (c.drafter, c.shape, *c.changes)))
        what = name, "" if c.ratio is None else f"{c.ratio:g}", f"{c.accepted:.2f}", c.source
        times = f"{c.draft_ms:.2f}", f"{c.check_ms:.2f}", f"{c.token_ms:.2f}", f"{costs.alone_ms / c.token_ms:.2f} x"
        rows.append((*what, *times, seconds(took), f"{alone / took:.2f} x"))
    screen.console.print(styled("\n", ("predicted; draft and check are ms per round", "dim")))
    names = ("drafter", "ratio", "accepted", "", "draft", "check", "ms per token", "", f"{tokens} tokens", "")
    _print(screen, names, rows)
    misfit = f"the fit misses the measured rounds by {costs.misfit():.0%} at worst"
    busy = costs.misfit() > MISFIT
    told = (f"{misfit}: was the machine busy? Profile again", "yellow") if busy else (misfit, "dim")
    screen.console.print(styled(told, "\n"))


def show_loads(screen: RunConsole, found: Sequence[Load]) -> None:
    """Print the predicted times of concurrent requests."""
    alone = {load.requests: load.token_ms for load in found if load.ratio is None}
    rows = []
    for load in found:
        first = load.ratio is None
        what = str(load.requests) if first else "", "the target alone" if first else f"tree {load.shape}"
        times = f"{load.token_ms:.2f}", f"{load.tokens_per_s:.0f}"
        gain = "" if first else f"{alone[load.requests] / load.token_ms:.2f} x"
        rows.append((*what, "" if load.ratio is None else f"{load.ratio:g}", *times, gain))
    screen.console.print(styled("\n", ("predicted for requests at once; the best tree of each ratio", "dim")))
    _print(screen, ("requests", "drafter", "ratio", "ms per token", "tokens per s", ""), rows)


def show_check(screen: RunConsole, checked: Sequence[dict[str, Any]]) -> None:
    """Print predicted and measured times and acceptance. checked: a result of the adviser's `check` per candidate."""
    names = ("predicted / measured", "ms per round", "accepted", "ms per token", "error")
    rows = [
        (
            row["candidate"],
            *("{:.2f} / {:.2f}".format(*row[key]) for key in ("round_ms", "accepted", "token_ms")),
            f"{row['error']:+.1%}",
        )
        for row in checked
    ]
    worst = max(abs(row["error"]) for row in checked)
    screen.console.print()
    _print(screen, names, rows)
    verdict = "within 10 %" if worst <= 0.1 else "not within 10 %"
    screen.console.print(f"predicted against measured: {verdict} (at worst {worst:.1%})")


def _print(screen: RunConsole, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in names:
        table.add_column(name, justify="left" if name in ("", names[0]) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    screen.console.print(table)
