"""The engine interface, and the eager engine, which runs Hugging Face's modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from specvlm.engine.joined import run_joined
from specvlm.engine.repetition import RepetitionPenalty
from specvlm.models.kv_cache import KVCache
from specvlm.models.passes import Call, Jobs, Pass, Rows, Work, driven
from specvlm.models.pauses import Pauses, finished
from specvlm.strategies import Sampling, Verifier, VerifyContext
from specvlm.strategies.fence import checked_verdict, inside
from specvlm.strategies.verifiers.coupled import own_rule
from specvlm.types import DraftTree, Features, Verdict, VideoPrompt

if TYPE_CHECKING:
    from specvlm.models.attention import AttentionCollector
    from specvlm.models.video_lm import VideoLM

T = TypeVar("T")
Inputs = tuple[Tensor | Features, Tensor]  # embeddings and positions of a prompt


@dataclass(frozen=True, eq=False)
class Request:
    """The parts of a request that a step of the target needs: a tree's check, or one token without drafting.

    Attributes:
        target: Target model.
        cache: The target's KV cache.
        verifier: Acceptance rule.
        sampling: The verifier's `sampling`, read once, before the first step.
        penalty: Repetition penalty, which knows the tokens so far.
        generator: Source of the request's random numbers.
        stop_ids: Token ids that end the answer.
        mark: Called with "capture" when a step was captured before it ran, to time the capture separately.
        video_ND: (N, D) last hidden states of the video tokens, scaled to unit length, for a verifier that reads hidden
            states.
        lossless: Whether the verifier claims to be lossless. If not, `strict_ends` decides where the answer ends.
        seed: Seed of the noise of a coupled rule.
        start: Slot of the answer's first token in the target's cache.
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
    seed: int = 0
    start: int = 0

    def key(self, slot: int) -> tuple[int, int]:
        """Return the key of a coupled rule's noise for a slot's token: seed, and index of the token in the answer."""
        return self.seed % 2**63, slot - self.start

    def key_2(self, slot: int, device: torch.device) -> Tensor | None:
        """Return `key` as a (2,) int64 tensor on a device; None unless the rule is coupled."""
        return torch.tensor(self.key(slot), device=device) if self.sampling.coupled else None


@dataclass(eq=False)
class Submitted:
    """A tree's check that was submitted to an engine.

    Attributes:
        request: Request whose tree it is.
        tree: The tree, on the target's device.
    """

    request: Request
    tree: DraftTree

    @property
    def done(self) -> bool:
        """Whether there is nothing to wait for: the answer is there, or the check only starts with `Engine.answer`."""
        return True


class Engine:
    """Eager engine, which runs Hugging Face's modules; base class of the others.

    A subclass needs to override `run` only. One that captures graphs also overrides `call`, `check` and `next`, and may
    override `submit` and `answer`. These are generators: they yield the passes that they do not run themselves, for
    `run` to serve.
    """

    name: ClassVar[str] = "eager"
    captures: ClassVar[bool] = False
    capture_s = 0.0  # seconds spent so far on compiling and capturing
    note = ""  # message for the user; may be empty

    def run(self, passes: Sequence[Any]) -> list[Any]:
        """Run passes of one model, as one batch if possible. Returns the rows of each.

        An engine may yield steps of its own instead of passes. `run` then receives these steps.
        """
        return run_joined(passes[0].model, passes)

    def finish(self, work: Work[T] | T) -> T:
        """Run a generator of passes to its end and return its result. A plain value is returned unchanged."""

        def run(item: Any) -> Any:
            return finished(self.call(item, lambda part: None), run) if isinstance(item, Call) else self.run([item])[0]

        return finished(driven(work), run)

    def call(self, call: Call, mark: Callable[[str], None]) -> Jobs[Sequence[Tensor]]:
        """Run a drafter's routine and return its tensors. mark: called with "capture" if it was captured first."""
        return (yield from call.work())

    def prefill(
        self, target: VideoLM, prompt: VideoPrompt, inputs: Inputs, cache: KVCache, collector: AttentionCollector | None = None
    ) -> Tensor:
        """Do what `prefilling` does, without a pause."""
        return finished(self.prefilling(target, prompt, inputs, cache, collector))

    def prefilling(
        self,
        target: VideoLM,
        prompt: VideoPrompt,
        inputs: Inputs,
        cache: KVCache,
        collector: AttentionCollector | None = None,
        refill: Callable[[], None] | None = None,
    ) -> Pauses[Tensor]:
        """Fill a cache of the target with a prompt. Returns the next token's logits, (1, V).

        Args:
            target: The target.
            prompt: The prompt.
            inputs: Embeddings and positions of the prompt's tokens whose rows the cache does not hold yet.
            cache: The cache.
            collector: As in `VideoLM.prefilling`.
            refill: Used by an exact engine: writes the known rows after the video, once signals have been collected.
        """
        hidden_D = yield from target.prefilling(*inputs, cache, prompt.cut, collector, joints=prompt.joints)
        return target.head(hidden_D[None])

    def next(self, request: Request, token: int) -> Jobs[int]:
        """Decode one token without drafting: run the target over `token`, the last one, and return the next one."""
        cache = request.cache
        rows = yield Pass(request.target, cache, torch.tensor([token]), (0,), None, cache.length, cache.offset)
        return first_token(request, rows.logits())

    def check(self, request: Request, tree: DraftTree) -> Jobs[tuple[Verdict, list[int]]]:
        """Run the target over a tree, verify it, and cut the cache to the accepted path.

        Returns:
            The verdict, and the new tokens: the accepted ones, then the bonus.
        """
        cache, base = request.cache, request.cache.length
        rows = yield from self.tree_rows(request.target, tree, cache)
        logits_MV = request.penalty(rows.logits(), tree)
        tree = tree.to(logits_MV.device)
        context = VerifyContext(tree, logits_MV, request.generator, key_2=request.key_2(base + 1, logits_MV.device))
        if not request.lossless:  # pass copies: a rule that writes to them cannot affect `strict_ends`
            context = replace(context, tree=replace(tree, tokens=tree.tokens.clone()), logits_MV=logits_MV.clone())
        if request.verifier.reads_hidden:
            context = replace(context, hidden_MD=rows.hidden_QD, video_ND=request.video_ND)
        with inside(request.verifier):
            verdict = checked_verdict(request.verifier, request.verifier.verify(context), tree, logits_MV.shape[-1])
        if not request.lossless:
            verdict = strict_ends(request, verdict, tree, logits_MV, base + 1)
        verdict = broadcast_decision(request, verdict)
        cache.keep(base, verdict.path)
        tokens = tree.tokens.tolist()  # on the host, choosing nodes takes less than an index of a tensor
        return verdict, [*(tokens[node] for node in verdict.path[1:]), verdict.bonus]

    def submit(self, request: Request, tree: DraftTree) -> Jobs[Submitted]:
        """Start a tree's check without waiting for it, if the engine can; `answer` waits for it.

        This engine cannot: the check starts with `answer`.
        """
        yield from ()
        return Submitted(request, tree)

    def answer(self, submitted: Submitted) -> Jobs[tuple[Verdict, list[int]]]:
        """Wait for a check that was submitted. Returns what `check` does."""
        return (yield from self.check(submitted.request, submitted.tree))

    def tree_rows(self, target: VideoLM, tree: DraftTree, cache: KVCache) -> Jobs[Rows]:
        """Run the target over every node of a tree, after the cached tokens."""
        return (yield tree_pass(target, tree, cache))

    def exact(self, model: VideoLM) -> bool:
        """Whether tree passes are bit-identical to sequential steps. If so, no difference in the output is a tie."""
        return False

    def append(self, target: VideoLM, tokens_Q: Tensor, cache: KVCache) -> Tensor:
        """Run text tokens causally after the cached ones, with the same arithmetic as this engine's steps.

        Args:
            target: Target model.
            tokens_Q: (Q,) token ids.
            cache: The target's KV cache; the rows are appended to it.

        Returns:
            (Q, V) logits.
        """
        (rows,) = self.run([Pass(target, cache, tokens_Q, range(len(tokens_Q)), None, cache.length, cache.offset)])
        return rows.logits()

    def rescore(self, target: VideoLM, tree: DraftTree, cache: KVCache) -> Tensor:
        """Compute a tree's (M, V) logits again, with the same arithmetic as `check`. The rows stay in the cache.

        Positions and mask are rebuilt from the parents alone, so that a bug in `DraftTree` shows as a difference.
        """
        (depths_M, seen_MM), base = placed(tree), cache.length
        seen_MK = torch.cat([torch.ones(len(tree), base, dtype=torch.bool), seen_MM], 1)
        positions_AM = (depths_M + base + cache.offset).expand(target.axes, -1)
        return target.head(target.forward(target.embed_tokens(tree.tokens), positions_AM, cache, seen_MK))

    def runs(self, model: VideoLM) -> str:
        """Return the name of the engine that really runs this model: some models fall back to eager."""
        return self.name


def tree_pass(target: VideoLM, tree: DraftTree, cache: KVCache) -> Pass:
    """Make the pass over every node of a tree, after the cached tokens."""
    return Pass(target, cache, tree.tokens, tree.depths, tree.mask, cache.length, cache.offset)


def placed(tree: DraftTree) -> tuple[Tensor, Tensor]:
    """Compute (M,) depths and the (M, M) tree mask on the host, from the parents alone."""
    rows = len(tree.parents)
    depths, seen_MM = [0] * rows, torch.eye(rows, dtype=torch.bool)
    for node, parent in enumerate(tree.parents):
        if parent >= 0:
            depths[node] = depths[parent] + 1
            seen_MM[node] |= seen_MM[parent]
    return torch.tensor(depths), seen_MM


def first_token(request: Request, logits_1V: Tensor) -> int:
    """Let the request's verifier choose the next token from the (1, V) logits of a step without drafting."""
    logits_1V = request.penalty(logits_1V)
    root, key_2 = DraftTree(torch.zeros(1, dtype=torch.int64), (-1,)), request.key_2(request.cache.length, logits_1V.device)
    coupled = {} if key_2 is None else {"key_2": key_2}
    with inside(request.verifier):
        own_V = (logits_1V if request.lossless else logits_1V.clone())[0]
        token = request.verifier.first(own_V, request.generator, **coupled)
        verdict = checked_verdict(request.verifier, Verdict((0,), token), root, logits_1V.shape[-1])
    if not request.lossless:
        verdict = strict_ends(request, verdict, root, logits_1V, request.cache.length)
    return broadcast_decision(request, verdict.bonus)


def strict_ends(request: Request, verdict: Verdict, tree: DraftTree, logits_MV: Tensor, slot: int) -> Verdict:
    """Cut a lossy rule's verdict so that the answer does not end, or continue, against the target's choice.

    After each node of the path, compare the verdict's next token with the target's own choice: its argmax, or a draw
    from its distribution when sampling. If they differ and either is a stop id, end the path there and take the
    target's choice. So whether the answer ends after a token is decided as it would be without a draft.

    slot: Slot in the target's cache of the token after the root.
    """
    path, stops = verdict.path, request.stop_ids
    if not stops:
        return verdict
    tokens = tree.tokens[list(path[1:])].tolist()
    rule = own_rule(request.sampling)  # not the verifier's `first`, which may be lossy too
    keys = (request.key_2(slot + depth, logits_MV.device) for depth in range(len(path)))
    chosen = [rule.first(row_V, request.generator, key) for row_V, key in zip(logits_MV[list(path)], keys, strict=True)]
    for at, (token, own) in enumerate(zip([*tokens, verdict.bonus], chosen, strict=True)):
        if token != own and not stops.isdisjoint((token, own)):
            return Verdict(path[: at + 1], own)
    return verdict


def broadcast_decision(request: Request, decided: T) -> T:
    """Return rank 0's decision if the target is sampled from, else this rank's own, which is the same.

    Sums over the vocabulary may round differently on two GPUs, and then the ranks' caches would diverge.
    """
    return request.target.ranks.share(lambda: decided) if request.sampling.temperature > 0 else decided
