"""`python -m specvlm.advise`: profile this machine and say if speculation pays.

Takes the overrides of a run, such as pair=… video=…, and the keys below.
Exit codes are those of a run.
"""

if __name__ == "__main__":
    from specvlm.app.terminal import loading

    loading()

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Column, Table

from specvlm.advise import acceptance, loads, table
from specvlm.advise.acceptance import Known
from specvlm.advise.advice import Candidate, candidates, recommend
from specvlm.advise.costs import CHECK, Costs, part_ms, probes, profile, watched
from specvlm.advise.further import further
from specvlm.advise.overlap import overlapped
from specvlm.advise.wishes import OWN, Wishes
from specvlm.app import compose
from specvlm.app.cli import run_command
from specvlm.app.console import RunConsole, not_applied, size
from specvlm.app.model_cache import MODEL_CACHE
from specvlm.app.placement import places_of
from specvlm.app.prepare import SMALLER, Prepared, own_sample, read, set_up
from specvlm.app.quoting import quoted
from specvlm.app.request import threads
from specvlm.app.terminal import Terminal, styled
from specvlm.config import RunConfig, word
from specvlm.decoding.loop import DecodingGraph, autoregressive
from specvlm.errors import ExitCode, UserError
from specvlm.models import memory_plan
from specvlm.parallel import torchrun
from specvlm.results import metrics
from specvlm.results.folder import write_json
from specvlm.strategies import Drafter, registry
from specvlm.types import Step

PARTS = (("draft",), CHECK)  # parts of a round's time that add up to Candidate.draft_ms and to Candidate.check_ms


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(argv, show_help, command)


def show_help() -> None:
    """Print the help, as wide as the terminal."""
    own = Table(Column(no_wrap=True), Column(), show_header=False, box=None, padding=(0, 0, 0, 2))
    for key, meaning in OWN.items():
        own.add_row(f"{key}=…", meaning)
    Terminal().print((__doc__ or "").strip(), "", own, sep="\n")


def command(words: Sequence[str]) -> int:
    """Split `words` into the adviser's options and overrides of the run, check both, advise; returns the exit code."""
    keys = [word.partition("=")[0] for word in words]
    own = {key: word.partition("=")[2] for key, word in zip(keys, words, strict=True) if key in OWN}
    others = [word for key, word in zip(keys, words, strict=True) if key not in OWN]
    if options := [word for word in others if word.startswith("-")]:
        raise UserError(f"{options[0]}: the adviser has no options but --help, which lists its keys")
    wishes = Wishes.of_words(own)
    run = compose.jobs(quoted(others, sweep=False), sweep=False)[0]
    if run.cfg.dataset is not None:
        raise UserError("the adviser asks one question about one video: give video=FILE question=… instead of dataset=…")
    kept = [word for word in others if word.partition("=")[0].split(".")[0] not in ("drafter", "ratio", "hydra")]
    with threads(run.cfg.threads):
        advise(run.cfg, run.run_dir, kept, wishes)
    return ExitCode.OK


def advise(cfg: RunConfig, folder: Path, words: Sequence[str], wishes: Wishes) -> None:
    """Profile the machine, or take the costs that `wishes` has. Then predict, and print and write the advice.

    Writes costs.json and advice.json, with check=true also check.json.

    Args:
        cfg: Configuration of the run to advise on.
        folder: Where to write.
        words: Overrides of the run, repeated in the recommended command line.
        wishes: The adviser's own options.

    Raises:
        UserError: The input cannot be used, or memory does not suffice.
    """
    screen = RunConsole()
    say = screen.console.print
    trees = wishes.trees(cfg)
    checked: list[dict[str, Any]] = []
    if wishes.costs:
        found = candidates(wishes.costs, wishes.known, trees)
        best = conclude(screen, wishes.costs, found, cfg.max_new_tokens, words, folder)
        crowded(screen, wishes.costs, wishes, wishes.known, trees)
    else:
        others = wishes.others(cfg)
        job = plan(cfg, trees, others)
        say(styled((job.clip, "bold"), f": {job.question}"))
        say(styled(("memory plan:", "dim"), f" {size(job.planned)} on {', '.join(map(str, job.places.devices))}"))
        say(styled(("pruner:", "dim"), f" {registry.described(job.pruner)}, {len(job.prompt.video_index)} video tokens"))
        try:
            graph = MODEL_CACHE.graph(job)
            graph = replace(graph, options=replace(graph.options, ratio=cfg.ratio))  # plan() took the lowest ratio
            screen.note(not_applied(graph.target.ignored_settings))
            screen.note(graph.engine.note)
            limit = min(wishes.tokens, cfg.max_new_tokens)
            costs, found, answer, known = measure(graph, job, wishes, trees, others, limit, screen)
            ended = len(answer) < limit or answer[-1] in graph.target.stop_ids
            tokens, more = len(answer) if ended else cfg.max_new_tokens, further(graph, job.prompt)
            best = conclude(screen, costs, found, tokens, words, folder, more)
            crowded(screen, costs, wishes, known, trees)
            if wishes.check:
                with screen.waiting("decoding to check"):
                    checked = [check(graph, job, candidate, others, limit) for candidate in three(found, best)]
        except RuntimeError as error:
            if not memory_plan.ran_out(error):
                raise
            planned = f"{job.planned / 2**30:.1f} GiB"
            raise UserError(f"{job.places.first} is out of memory, though {planned} were planned: {SMALLER}") from error
    if checked:
        table.show_check(screen, checked)
        write_json(folder / "check.json", {"checked": checked})
    screen.written(folder)


def plan(cfg: RunConfig, trees: dict[str, tuple[tuple[str, ...], tuple[float, ...]]], others: Sequence[Drafter]) -> Prepared:
    """Read the input and plan memory for the candidate that needs the most.

    That is a drafter with a draft model, if there is one, at the lowest ratio.

    Args:
        cfg: Configuration of the run to advise on.
        trees: Shapes and ratios to predict, by drafter.
        others: Drafters to measure as they are.

    Raises:
        UserError: The candidate does not fit into memory, or the target is to be shared by several processes.
    """
    every = [*(registry.build("drafter", name) for name in trees), *others]
    largest = min(every, key=lambda drafter: ("draft", "target", None).index(drafter.model)).name
    ratio = min((ratio for _, ratios in trees.values() for ratio in ratios), default=cfg.ratio)
    widest = replace(cfg, drafter=largest, ratio=ratio)
    if widest.target.parallel == "tensor" or torchrun.size_here() > 1:
        raise UserError("the adviser runs in one process: leave out torchrun and target.parallel=tensor, or use layers")
    setup = set_up(widest, places_of(widest))
    return MODEL_CACHE.plan(setup, read(setup, own_sample(widest)))


def measure(
    graph: DecodingGraph,
    job: Prepared,
    wishes: Wishes,
    trees: dict[str, tuple[tuple[str, ...], tuple[float, ...]]],
    others: Sequence[Drafter],
    limit: int,
    screen: RunConsole,
) -> tuple[Costs, list[Candidate], tuple[int, ...], Known]:
    """Measure costs, and acceptance unless it is known.

    Args:
        graph: The pair and its options.
        job: The run, whose memory is planned.
        wishes: The adviser's own options.
        trees: Shapes and ratios to predict, by drafter.
        others: Drafters to measure as they are.
        limit: Maximum number of new tokens per decode.
        screen: Shows progress.

    Returns:
        The costs, all candidates, the target's answer, and the acceptance.
    """
    ratios = {name: every for name, (_, every) in trees.items()}
    total = 2 + sum(len(probes(every, name)) for name, every in ratios.items()) + len(others)
    screen.console.print(styled(("profile:", "dim"), f" {total} short decodes"))
    with screen.progress("profile", total) as advance:
        seen = profile(graph, job.prompt, lambda: alone(graph, job, limit), ratios, limit, advance)
        known = wishes.known or {
            (name, ratio): acceptance.of_answer(using(graph, shaped(name)), job.prompt, keep, seen.answer)
            for (name, ratio), keep in seen.kept.items()
        }
        found = candidates(seen.costs, known, trees)
        if graph.engine.captures and graph.draft is not None and graph.draft.device not in job.places.target:
            found += overlapped(found, known, seen.costs.alone_ms)
        for drafter in others:
            found.append(measured_candidate(graph, job, drafter, limit, seen.costs.alone_first_s))
            advance()
    costs = seen.costs
    if wishes.requests > 1 and "tree" in ratios:
        with screen.waiting("measuring several requests at once"):
            costs = replace(costs, shared=tuple(loads.measure(graph, job.prompt, ends(ratios["tree"]), wishes.requests)))
    return costs, found, seen.answer, known


def ends(ratios: Sequence[float]) -> list[float]:
    """Choose the ratios to predict for concurrent requests: the lowest, and the one nearest to 0.9."""
    return sorted({min(ratios), min(ratios, key=lambda ratio: abs(ratio - 0.9))})


def crowded(
    screen: RunConsole, costs: Costs, wishes: Wishes, known: Known, trees: dict[str, tuple[tuple[str, ...], tuple[float, ...]]]
) -> None:
    """Show the predicted times of concurrent requests, if the user asked for them."""
    if wishes.requests == 1 or "tree" not in trees:
        return
    shapes, ratios = trees["tree"]
    found = loads.loads(costs, known, shapes, ends(ratios), wishes.requests)
    table.show_loads(screen, found)
    screen.console.print(loads.verdict(found))


def alone(graph: DecodingGraph, job: Prepared, limit: int) -> Iterator[Step]:
    """Decode with the target alone, at most `limit` tokens."""
    options = graph.options.asked(limit)
    return autoregressive(graph.target, job.prompt, options, graph.verifier, graph.caches, graph.engine)


def shaped(name: str, shape: str = "") -> Drafter:
    """Build the drafter `tree` or `self` with a tree shape; an empty `shape` leaves its default."""
    return registry.build("drafter", {"name": name} | ({"shape": shape} if shape else {}))


def using(graph: DecodingGraph, drafter: Drafter, ratio: float | None = None) -> DecodingGraph:
    """Copy a graph with another drafter and, if given, another ratio. The copies share models, caches and engine."""
    options = graph.options if ratio is None else replace(graph.options, ratio=ratio)
    return replace(graph, drafter=drafter, options=options)


def measured_candidate(graph: DecodingGraph, job: Prepared, drafter: Drafter, limit: int, first_s: float) -> Candidate:
    """Measure a drafter that has no fixed tree shape, at the ratio of the run.

    first_s: time to first token of the target alone. Counts for a drafter without a model, which does not change it.
    """
    graph = using(graph, drafter)
    pruned = drafter.model is not None and drafter.own_budget(job.prompt) is None
    ratio = (0.0 if graph.pruner.keeps_all else graph.options.ratio) if pruned else None
    steps = [watched(graph.decode(job.prompt, limit)) for _ in range(2)][1]  # the first one captures a graph per tree size
    draft, check = (1000 * mean(sum(step.times_s[p] for p in parts) for step in steps[2:] or steps[1:]) for parts in PARTS)
    speed = metrics.speed_of(steps)
    start_s = (speed["time_to_first_token_s"] if drafter.model else first_s) + speed["drafter_start_s"]
    accepted = metrics.acceptance_of(steps)["accepted_per_round"] or 0.0
    return Candidate(drafter.name, "", ratio, accepted, "measured", draft, check, start_s, changes(drafter))


def changes(drafter: Any) -> tuple[str, ...]:
    """Overrides for those fields of a drafter that differ from their defaults."""
    now = [(f, getattr(drafter, f.name)) for f in fields(drafter)]
    return tuple(f"drafter.{f.name}={word(value)}" for f, value in now if value != f.default)


def conclude(
    screen: RunConsole,
    costs: Costs,
    found: Sequence[Candidate],
    tokens: int,
    words: Sequence[str],
    folder: Path,
    more: Sequence[str] = (),
) -> Candidate | None:
    """Show and write the advice for an answer of `tokens` tokens; returns the recommended candidate, if any.

    found: all candidates; words: overrides of the run, repeated in the recommended command line; more: further lines.
    """
    table.show(screen, costs, found, tokens)
    best, text = recommend(costs, found, tokens)
    text += more
    if best:
        text.append("  " + shlex.join(["python", "-m", "specvlm", *words, *best.words]))
    screen.console.print("\n".join(text))
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(c) | {"token_ms": c.token_ms, "end_to_end_s": c.end_to_end_s(tokens)} for c in found]
    write_json(folder / "costs.json", asdict(costs))
    write_json(folder / "advice.json", {"advice": text, "answer_tokens": tokens, "candidates": rows})
    return best


def three(found: Sequence[Candidate], best: Candidate | None) -> list[Candidate]:
    """Choose up to three candidates to check: `best` (if None, the fastest tree), the median tree and the slowest tree.

    If there are no trees, chooses from all candidates.
    """
    trees = sorted((c for c in found if c.shape), key=lambda c: c.token_ms) or list(found)
    return list(dict.fromkeys([best or trees[0], trees[len(trees) // 2], trees[-1]]))


def check(graph: DecodingGraph, job: Prepared, candidate: Candidate, others: Sequence[Drafter], limit: int) -> dict[str, Any]:
    """Decode with a candidate twice and compare its prediction with the measurement.

    Measures the acceptance of the second decode, and the lower of the two decodes' median times per round.

    Returns:
        For each figure, [predicted, measured]; and the relative `error` of the predicted time per token.
    """
    drafter = next((other for other in others if other.name == candidate.drafter), None)
    graph = using(graph, drafter or shaped(candidate.drafter, candidate.shape), candidate.ratio)
    decodes = [watched(graph.decode(job.prompt, limit)) for _ in range(2)]
    round_ms = min(part_ms([steps], "draft", *CHECK) for steps in decodes)
    accepted = metrics.acceptance_of(decodes[1])["accepted_per_round"] or 0.0
    token_ms = round_ms / (accepted + 1)
    # An acceptance that the user gave is not a prediction: check the costs alone.
    expected = candidate.token_ms if candidate.source == "measured" else candidate.round_ms / (accepted + 1)
    return {
        "candidate": str(candidate),
        "round_ms": [candidate.round_ms, round_ms],
        "accepted": [candidate.accepted, accepted],
        "token_ms": [expected, token_ms],
        "error": expected / token_ms - 1,
    }


if __name__ == "__main__":
    sys.exit(main())
