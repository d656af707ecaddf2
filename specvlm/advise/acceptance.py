"""Predict how many guesses of a tree the target accepts: replay measured ranks, or assume chances.

Shape suffixes: K kept slots of the prompt, D hidden size, A rotary axes, Q tokens of the answer less one, V vocabulary.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from typing_extensions import TypedDict

from specvlm.decoding.loop import DecodingGraph
from specvlm.errors import UserError
from specvlm.parsing.bounds import parse
from specvlm.results.records import Named, Share
from specvlm.results.rows import config_of, summary_of
from specvlm.types import KeepSet, TreeShape, VideoPrompt

# The w best guesses of a drafter miss a share (1 - first) * w ** -SPREAD of the tokens, where `first` is the chance
# that the best one is right. Used only if no ranks were measured. The embedded pairs have a SPREAD of 0.3 without video
# and of 1.2 to 2 with it (three clips each), so 0.7 is cautious.
SPREAD = 0.7


@dataclass(frozen=True)
class Replay:
    """Predicts acceptance from measured ranks, by replaying the target's own answer.

    Greedy verification accepts a guess exactly if it is the answer's token, so rounds of any tree can be replayed
    without a model.

    Attributes:
        ranks: For each token of the answer after the first, its rank among the drafter's guesses given the tokens
            before; 0 is the best guess.
        source: Where the ranks come from, for the table.
    """

    ranks: tuple[int, ...]
    source: str = "measured"

    def accepted(self, shape: TreeShape) -> float:
        """Mean number of guesses accepted per round with a tree of this shape, not counting the bonus token."""
        below = [{shape.ranks[child]: child for child in children} for children in shape.children]
        taken: list[int] = []
        at = 0
        while at < len(self.ranks):
            node, depth = 0, 0
            while at + depth < len(self.ranks) and (child := below[node].get(self.ranks[at + depth])) is not None:
                node, depth = child, depth + 1
            at += depth + 1
            if at <= len(self.ranks) or not taken:  # skip the last round if the end of the answer cuts it short
                taken.append(depth)
        return sum(taken) / len(taken) if taken else 0.0


@dataclass(frozen=True)
class Chances:
    """Predicts acceptance from assumed chances, which multiply along a path (Sequoia, arXiv 2402.12374).

    Attributes:
        first: Chance that the drafter's best guess at depth 1, 2, 3 … is right if those above it are. The last value
            holds for all greater depths. Guesses of lower rank share the remaining chance, according to SPREAD.
        source: Where the chances come from, for the table.
    """

    first: tuple[float, ...]
    source: str = "assumed"

    def accepted(self, shape: TreeShape) -> float:
        """Expected number of guesses accepted per round with a tree of this shape, not counting the bonus token."""
        reach = [1.0]
        for node in range(1, len(shape)):
            first = self.first[min(shape.depths[node], len(self.first)) - 1]
            rank = shape.ranks[node]
            # Share of the best guess's misses on which the guess of this rank is right.
            chance = first if rank == 0 else (1 - first) * float(rank**-SPREAD - (rank + 1) ** -SPREAD)
            reach.append(reach[shape.parents[node]] * chance)
        return sum(reach[1:])

    @classmethod
    def of_depths(cls, shape: TreeShape, by_depth: Sequence[float], source: str) -> Self:
        """Estimate chances from a run: for a chain, one chance per depth; for any other tree, one for all depths.

        Args:
            shape: Tree shape of the run.
            by_depth: Its `acceptance_by_depth`.
            source: Where the chances come from.
        """
        if len(shape) > shape.depth + 1:
            return cls.of_mean(sum(by_depth), shape, source)
        reached = [1.0, *by_depth]
        return cls(tuple(now / before if before else 0.0 for before, now in zip(reached, by_depth, strict=False)), source)

    @classmethod
    def of_mean(cls, accepted: float, shape: TreeShape, source: str = "assumed") -> Self:
        """Find the chance, the same at all depths, at which `shape` accepts `accepted` guesses per round."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if cls((middle,)).accepted(shape) < accepted else (low, middle)
        return cls((low,), source)


class Tree(Named):
    """A drafter with a fixed tree shape, in config.yaml."""

    shape: str


class TreeRun(TypedDict):
    """The keys of config.yaml that `of_run` reads."""

    drafter: Tree
    pruner: Named
    ratio: Share


class Accepted(TypedDict):
    """The key of summary.json that `of_run` reads."""

    acceptance_by_depth: list[Share]


Known = dict[tuple[str, float], Replay | Chances]  # by (drafter, ratio); drafter is tree or self


def of_words(text: str) -> Known:
    """Parse the value of `acceptance=…`.

    It has the guesses accepted per round of the tree shape `paper`, as one number (`3.5`, at ratio 0.9) or by ratio
    (`0:4.8,0.9:4.0`), or it names the folders of earlier runs.

    Raises UserError for anything else, or if a run cannot be used.
    """
    known: Known = {}
    for word in filter(None, (w.strip() for w in text.split(","))):
        if os.path.isfile(os.path.join(word, "summary.json")):
            known |= of_run(Path(word))
            continue
        ratio, _, accepted = word.rpartition(":")
        paper = TreeShape.parse("paper")
        try:
            at, mean = float(ratio or 0.9), float(accepted)
        except ValueError:
            raise UserError(
                f"acceptance={word}: expected a number such as 3.5, numbers by ratio such as 0:4.8,0.9:4, or folders of runs, "
                "with a summary.json in them"
            ) from None
        if not (0 <= at <= 1 and 0 <= mean <= paper.depth):
            raise UserError(
                f"acceptance={word}: expected 0 to {paper.depth} accepted per round of the paper's tree, at ratios from 0 to 1"
            )
        known["tree", at] = Chances.of_mean(mean, paper)
    if not known:
        raise UserError("acceptance= has no value: give a number such as 3.5 or the folder of a run")
    return known


def of_run(folder: Path) -> Known:
    """Read the acceptance of an earlier run from its config.yaml and summary.json.

    Raises UserError if a file is damaged, or the run had no fixed tree shape or no complete round.
    """
    config: TreeRun = parse(TreeRun, config_of(folder), f"acceptance={folder}, which must be a run of a tree drafter")
    found: Accepted = parse(Accepted, summary_of(folder), f"acceptance={folder}")
    try:
        shape = TreeShape.parse(config["drafter"]["shape"])
    except ValueError as error:
        raise UserError(f"acceptance={folder}: {error}") from None
    by_depth, ratio = found["acceptance_by_depth"], 0.0 if config["pruner"]["name"] == "none" else config["ratio"]
    if not by_depth:
        raise UserError(f"acceptance={folder}: that run had no complete round; use a run with a longer answer")
    name = "self" if config["drafter"]["name"] == "self" else "tree"
    return {(name, ratio): Chances.of_depths(shape, by_depth, f"of {folder.name or folder}")}


@torch.inference_mode()
def of_answer(graph: DecodingGraph, prompt: VideoPrompt, keep: KeepSet, answer: Sequence[int]) -> Replay:
    """Rank each token of the target's own answer among the guesses of the model that drafts.

    Costs a prefill of the pruned prompt and one pass over the answer. A token that only the target knows gets the
    largest rank, as if it were never guessed.
    """
    model = graph.target if graph.drafter.model == "target" else graph.draft
    assert model is not None
    embeds_KD, positions_AK = model.pruned(prompt, model.features(prompt, keep), keep, graph.options.positions)
    with graph.caches.lease() as lease:
        cache = lease.take("draft", model, len(embeds_KD) + len(answer))
        model.prefill(embeds_KD, positions_AK, cache)
        logits_QV = graph.engine.append(model, torch.tensor(answer[:-1]), cache)[:, : graph.vocabulary]
    wanted_Q = torch.tensor(answer[1:], device=logits_QV.device)
    own_Q1 = logits_QV.gather(1, wanted_Q.clamp(max=graph.vocabulary - 1)[:, None])
    rank_Q = (logits_QV > own_Q1).sum(1).masked_fill(wanted_Q >= graph.vocabulary, graph.vocabulary)
    return Replay(tuple(rank_Q.tolist()), "as if greedy" if graph.sampling.temperature > 0 else "measured")
