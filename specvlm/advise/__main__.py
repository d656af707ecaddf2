"""`python -m specvlm.advise`: profile this machine, say if speculation pays.

Takes the overrides of a run, such as pair=… video=…, and the keys below.
Exit codes are those of a run.
"""

if __name__ == "__main__":
    from specvlm.app.terminal import loading

    loading()

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any, Self

from rich.table import Column, Table

from specvlm.advise import acceptance, table
from specvlm.advise.acceptance import Known
from specvlm.advise.advice import Candidate, candidates, recommend
from specvlm.advise.costs import CHECK, Costs, part_ms, probes, profile, watched
from specvlm.advise.further import further
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
from specvlm.errors import ExitCode, UserError, did_you_mean
from specvlm.models import memory_plan
from specvlm.parallel import torchrun
from specvlm.results import metrics
from specvlm.results.folder import write_json
from specvlm.strategies import Drafter, registry
from specvlm.types import Step, Within

OWN = {
    "acceptance": "guesses accepted per round of the paper's tree, as 3.5, or by ratio, as 0:4.8,0.9:4; or folders of earlier "
    "runs; left out: measured on the video",
    "drafters": "the drafters to consider, such as tree,dynamic_tree (all that are installed)",
    "tokens": "most new tokens per decode (128)",
    "check": "true: decode with the recommended configuration and two others, and compare with the prediction (false)",
    "costs": "the costs.json of an earlier profile, instead of a new profile; needs acceptance=",
}
TREES = ("tree", "self")  # fixed shapes: predicted from a few measured trees; other drafters are measured as they are
RATIOS, RATIOS_OF_SELF = (0.0, 0.5, 0.75, 0.9, 1.0), (0.9,)  # to predict for tree, and for self
CHAINS = tuple(f"chain:{depth}" for depth in range(2, 9))
SHAPES = ("paper", *CHAINS, "2x1x1x1x1x1", "2x2x1x1x1", "4x1x1x1x1", "4x2x1x1", "4x2x2x1", "8x1x1x1", "4x4x1")
PARTS = (("draft",), CHECK)  # of a round's time, that make up Candidate.draft_ms and Candidate.check_ms
TOKENS = Within(8, 131_072)  # bounds of tokens=…


@dataclass(frozen=True)
class Wishes:
    """The adviser's own options (OWN), checked.

    known: Acceptance by drafter and ratio; empty: measure it. costs: of an earlier profile; None: measure them.
    """

    drafters: tuple[str, ...]
    known: Known = field(default_factory=dict)
    tokens: int = 128
    check: bool = False
    costs: Costs | None = None

    @classmethod
    def of_words(cls, own: dict[str, str]) -> Self:
        """Parse and check the options. Raises UserError if one is wrong or they conflict. own: values by key of OWN."""
        every = list(registry.collect()["drafter"])
        names = [name.strip() for name in own.get("drafters", ",".join(every)).split(",")]
        if unknown := [name for name in names if name not in every]:
            hint = did_you_mean(unknown[0], every)
            raise UserError(f"drafters={unknown[0]}: expected some of {', '.join(every)}.{hint}")
        tokens, check = own.get("tokens", "128"), own.get("check", "false")
        if not (re.fullmatch("[0-9]{1,9}", tokens) and int(tokens) in TOKENS):
            raise UserError(f"tokens={tokens}: expected a whole number from {TOKENS.low}, {TOKENS.most}")
        if check not in ("true", "false"):
            raise UserError(f"check={check}: expected true or false")
        known = acceptance.of_words(own["acceptance"]) if "acceptance" in own else {}
        if known and not (names := [name for name in names if any(name == of for of, _ in known)]):
            raise UserError(f"acceptance={own['acceptance']} does not cover drafters={own['drafters']}")
        costs = Costs.read(Path(own["costs"])) if "costs" in own else None
        if costs and (not known or check == "true"):
            raise UserError("costs= loads no model: it needs acceptance=, and cannot be combined with check=true")
        if costs:
            names = [name for name in names if any(name == start.drafter for start in costs.starts)]
            if not names:
                raise UserError(f"costs={own['costs']} has no drafter that acceptance={own['acceptance']} covers")
        return cls(tuple(names), known, int(tokens), check == "true", costs)

    def trees(self, cfg: RunConfig) -> dict[str, tuple[tuple[str, ...], tuple[float, ...]]]:
        """Shapes and ratios to predict, for each wished drafter of TREES. Those of `tree` include the run's own."""
        ratios = sorted({*RATIOS, float(cfg.ratio)})
        if self.known:  # ratio 1: do not assume that a drafter without video guesses as well
            ratios = [ratio for ratio in ratios if ratio < 1 or any(at == 1 for _, at in self.known)]
        if registry.build("pruner", cfg.pruner).keeps_all:
            ratios = [0.0]
        own = getattr(cfg.drafter, "shape", None)
        every = {
            "tree": (tuple(dict.fromkeys([*SHAPES, own or SHAPES[0]])), tuple(ratios)),
            "self": (CHAINS[:4], RATIOS_OF_SELF if len(ratios) > 1 else (0.0,)),
        }
        return {name: every[name] for name in self.drafters if name in TREES}

    def others(self, cfg: RunConfig) -> list[Drafter]:
        """Build the wished drafters that are not in TREES: the run's own as configured, others with their defaults."""
        names = [name for name in self.drafters if name not in TREES]
        return [registry.build("drafter", cfg.drafter if cfg.drafter.name == name else name) for name in names]


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
    """Split `words` into the adviser's and the run's, check both, and advise; returns the exit code."""
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
    """Profile, predict, print, and write costs.json and advice.json (with check=true also check.json) into `folder`.

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
            costs, found, answer = measure(graph, job, wishes.known, trees, others, limit, screen)
            ended = len(answer) < limit or answer[-1] in graph.target.stop_ids
            tokens, more = len(answer) if ended else cfg.max_new_tokens, further(graph, job.prompt)
            best = conclude(screen, costs, found, tokens, words, folder, more)
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
    """Read the input and plan memory for the candidate that needs most of it.

    That is one with a draft model, if there is one, at the lowest ratio. Raises UserError if it does not fit, or for
    tensor parallelism.
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
    known: Known,
    trees: dict[str, tuple[tuple[str, ...], tuple[float, ...]]],
    others: Sequence[Drafter],
    limit: int,
    screen: RunConsole,
) -> tuple[Costs, list[Candidate], tuple[int, ...]]:
    """Measure costs, and acceptance unless it is known.

    trees: shapes and ratios to predict, by drafter; others: drafters to measure as they are.

    Returns the costs, all candidates, and the target's answer of up to `limit` tokens.
    """
    ratios = {name: every for name, (_, every) in trees.items()}
    total = 2 + sum(len(probes(every, name)) for name, every in ratios.items()) + len(others)
    screen.console.print(styled(("profile:", "dim"), f" {total} short decodes"))
    with screen.progress("profile", total) as advance:
        seen = profile(graph, job.prompt, lambda: alone(graph, job, limit), ratios, limit, advance)
        known = known or {
            (name, ratio): acceptance.of_answer(using(graph, shaped(name)), job.prompt, keep, seen.answer)
            for (name, ratio), keep in seen.kept.items()
        }
        found = candidates(seen.costs, known, trees)
        for drafter in others:
            found.append(measured_candidate(graph, job, drafter, limit, seen.costs.alone_first_s))
            advance()
    return seen.costs, found, seen.answer


def alone(graph: DecodingGraph, job: Prepared, limit: int) -> Iterator[Step]:
    """Decode with the target alone, at most `limit` tokens."""
    options = graph.options.asked(limit)
    return autoregressive(graph.target, job.prompt, options, graph.verifier, graph.caches, graph.engine)


def shaped(name: str, shape: str = "") -> Drafter:
    """Build a drafter of TREES by name, with the given tree shape; empty: its default shape."""
    return registry.build("drafter", {"name": name} | ({"shape": shape} if shape else {}))


def using(graph: DecodingGraph, drafter: Drafter, ratio: float | None = None) -> DecodingGraph:
    """Copy a graph with another drafter and, if given, another ratio. The copies share models, caches and engine."""
    options = graph.options if ratio is None else replace(graph.options, ratio=ratio)
    return replace(graph, drafter=drafter, options=options)


def measured_candidate(graph: DecodingGraph, job: Prepared, drafter: Drafter, limit: int, first_s: float) -> Candidate:
    """Measure a drafter that has no fixed tree shape, at the ratio of the run.

    first_s: seconds to the first token of the target alone, which a drafter without a model does not change.
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
    """Choose up to three candidates to check: `best` or else the fastest tree, the median tree, and the slowest."""
    trees = sorted((c for c in found if c.shape), key=lambda c: c.token_ms) or list(found)
    return list(dict.fromkeys([best or trees[0], trees[len(trees) // 2], trees[-1]]))


def check(graph: DecodingGraph, job: Prepared, candidate: Candidate, others: Sequence[Drafter], limit: int) -> dict[str, Any]:
    """Decode with a candidate twice and compare its prediction with the measurement.

    Measured are the lower of the two median times per round and the acceptance of the second decode. Returns
    [predicted, measured] of each figure, and the relative `error` of the time per token.
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
