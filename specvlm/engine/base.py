"""What an engine must do, and the eager one: passes through Hugging Face's modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from specvlm.engine.joined import run_joined
from specvlm.engine.repetition import RepetitionPenalty
from specvlm.models.kv_cache import KVCache
from specvlm.models.passes import Call, Pass, Passes, Rows, Work, driven, finished
from specvlm.strategies import Sampling, Verifier, VerifyContext
from specvlm.strategies.fence import checked_verdict, inside
from specvlm.strategies.verifiers.sampling import own_rule
from specvlm.types import DraftTree, Verdict

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Request:
    """What a request's checks need.

    Attributes:
        cache: The target's.
        sampling: The distribution that the rule claims to be exact for, as it was when the request began.
        stop_ids: Those that end this answer.
        mark: Told "capture" when a step was captured before it ran.
        video_ND: The video tokens' last hidden states, to unit length, for a verifier that reads hidden states.
        lossless: Does the verifier claim to be? Of one that does not, the loop itself decides where an answer ends
            (`strict_ends`).
    """

    target: VideoLM
    cache: KVCache
    verifier: Verifier
    sampling: Sampling
    penalty: RepetitionPenalty
    generator: torch.Generator
    stop_ids: frozenset[int]
    mark: Callable[[str], None] = lambda part: None
    video_ND: Tensor | None = None
    lossless: bool = True


class Engine:
    """The eager one, through Hugging Face's modules; and what an engine must do.

    `run` is all that an engine needs. One that captures overrides `call`, `check` and `next` as well: each is a generator,
    which yields the passes that it leaves to `run`.
    """

    name: ClassVar[str] = "eager"
    captures: ClassVar[bool] = False
    capture_s = 0.0  # seconds spent so far on compiling and capturing
    note = ""  # what its user should know

    def run(self, passes: Sequence[Pass]) -> list[Rows]:
        """The rows of each pass, all of one model: as one, where that can be."""
        return run_joined(passes[0].model, passes)

    def finish(self, work: Work[T] | T) -> T:
        """What a generator of passes comes to, run to its end with nothing beside it; a plain value as it is."""

        def run(item: Pass | Call) -> Any:
            return self.run([item])[0] if isinstance(item, Pass) else finished(self.call(item, lambda part: None), run)

        return finished(driven(work), run)

    def call(self, call: Call, mark: Callable[[str], None]) -> Passes[Sequence[Tensor]]:
        """A drafter's routine. mark: told "capture" where it was captured before it ran."""
        return (yield from call.work())

    def next(self, request: Request, token: int) -> Passes[int]:
        """A pass of the target over its last token; the token that follows."""
        cache = request.cache
        rows = yield Pass(request.target, cache, torch.tensor([token]), (0,), None, cache.length, cache.offset)
        return first_token(request, rows.logits())

    def check(self, request: Request, tree: DraftTree) -> Passes[tuple[Verdict, list[int]]]:
        """A pass of the target over a tree, the verifier's word on it, and the cache cut to what was accepted. Also the new
        tokens: accepted ones and the bonus.
        """
        cache, base = request.cache, request.cache.length
        rows = yield from self.tree_rows(request.target, tree, cache)
        logits_MV = request.penalty(rows.logits(), tree)
        tree = tree.to(logits_MV.device)
        context = VerifyContext(tree, logits_MV, request.generator)
        if not request.lossless:  # a rule that writes into what it is shown changes nothing of what decides where answers end
            context = replace(context, tree=replace(tree, tokens=tree.tokens.clone()), logits_MV=logits_MV.clone())
        if request.verifier.reads_hidden:
            context = replace(context, hidden_MD=rows.hidden_QD, video_ND=request.video_ND)
        with inside(request.verifier):
            verdict = checked_verdict(request.verifier, request.verifier.verify(context), tree, logits_MV.shape[-1])
        if not request.lossless:
            verdict = strict_ends(request, verdict, tree, logits_MV)
        verdict = broadcast_decision(request, verdict)
        cache.keep(base, verdict.path)
        return verdict, [*tree.tokens[list(verdict.path[1:])].tolist(), verdict.bonus]

    def tree_rows(self, target: VideoLM, tree: DraftTree, cache: KVCache) -> Passes[Rows]:
        """A pass of the target over every node of a tree, behind all that the cache holds."""
        return (yield tree_pass(target, tree, cache))

    def exact(self, model: VideoLM) -> bool:
        """Do a tree's rows have the bits of sequential steps, whatever the tree? Then a difference is a fault, never a tie."""
        return False

    def append(self, target: VideoLM, tokens_Q: Tensor, cache: KVCache) -> Tensor:
        """(Q, V) logits of text rows behind the cache, each of which sees those before it, by the arithmetic of this engine's
        own steps.
        """
        (rows,) = self.run([Pass(target, cache, tokens_Q, range(len(tokens_Q)), None, cache.length, cache.offset)])
        return rows.logits()

    def rescore(self, target: VideoLM, tree: DraftTree, cache: KVCache) -> Tensor:
        """(M, V) logits of a tree by the arithmetic of `check`; its rows stay behind the cache.

        Positions and mask are made anew, since a judge that shared the slips of what it judges would not see them.
        """
        (depths_M, seen_MM), base = placed(tree), cache.length
        seen_MK = torch.cat([torch.ones(len(tree), base, dtype=torch.bool), seen_MM], 1)
        positions_AM = (depths_M + base + cache.offset).expand(target.axes, -1)
        return target.head(target.forward(target.embed_tokens(tree.tokens), positions_AM, cache, seen_MK))

    def runs(self, model: VideoLM) -> str:
        """The name of the engine that a model's steps really take: one may have to fall back for one of two models."""
        return self.name


def tree_pass(target: VideoLM, tree: DraftTree, cache: KVCache) -> Pass:
    """Every node of a tree, behind all that the cache holds."""
    return Pass(target, cache, tree.tokens, tree.depths, tree.mask, cache.length, cache.offset)


def placed(tree: DraftTree) -> tuple[Tensor, Tensor]:
    """(M,) depths and (M, M) which nodes a node sees, on the host: worked out anew, with no word of `DraftTree`'s own."""
    rows = len(tree.parents)
    depths, seen_MM = [0] * rows, torch.eye(rows, dtype=torch.bool)
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            depths[node] = depths[parent] + 1
            seen_MM[node] |= seen_MM[parent]
    return torch.tensor(depths), seen_MM


def first_token(request: Request, logits_1V: Tensor) -> int:
    """The next token where nothing was guessed, by the request's rule."""
    logits_1V = request.penalty(logits_1V)
    root = DraftTree(torch.zeros(1, dtype=torch.int64), (-1,))
    with inside(request.verifier):
        token = request.verifier.first((logits_1V if request.lossless else logits_1V.clone())[0], request.generator)
        verdict = checked_verdict(request.verifier, Verdict((0,), token), root, logits_1V.shape[-1])
    if not request.lossless:
        verdict = strict_ends(request, verdict, root, logits_1V)
    return broadcast_decision(request, verdict.bonus)


def strict_ends(request: Request, verdict: Verdict, tree: DraftTree, logits_MV: Tensor) -> Verdict:
    """A lossy rule's verdict, cut so that no guess ends or lengthens the answer.

    Below each node of its path the target's own choice is its argmax, or a draw from its distribution where the rule samples.
    Where either that choice or the token that the verdict has there is a stop id, and they differ, the path ends and the choice
    is the next token. So whether an answer ends below its last token is decided as if nothing had been guessed.
    """
    path, stops = verdict.path, request.stop_ids
    if not stops:
        return verdict
    tokens, rule = tree.tokens[list(path[1:])].tolist(), own_rule(request.sampling)  # not theirs: its `first` may be lossy, too
    chosen = [rule.first(logits_V, request.generator) for logits_V in logits_MV[list(path)]]
    for at, (token, own) in enumerate(zip([*tokens, verdict.bonus], chosen, strict=True)):
        if token != own and not stops.isdisjoint((token, own)):
            return Verdict(path[: at + 1], own)
    return verdict


def broadcast_decision(request: Request, decided: T) -> T:
    """What a rule decided, where ranks share the target: the first one's word, if it samples. Sums over a vocabulary need not
    round alike on two GPUs, and then the ranks' caches would part.
    """
    return request.target.ranks.share(lambda: decided) if request.sampling.temperature > 0 else decided
