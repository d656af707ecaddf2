"""The four kinds of strategy, and what each is given. A plugin needs this file and `types.py`.

A strategy is a frozen dataclass of plain values: its fields are its Hydra config, its repr is its log line. What
changes during a request lives in the session and the cache, made per request.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from specvlm.cache import CachePool, KVCache
from specvlm.segments import apportion
from specvlm.types import DraftTree, KeepSet, TokenGrid, Verdict, VideoPrompt

if TYPE_CHECKING:
    from specvlm.data.video import Clip
    from specvlm.engine import Engine
    from specvlm.models.video_lm import VideoLM

SIGNALS: dict[str, str] = {
    "verifier_attention": "(N,) the target's attention from the text after the video, mean over layers, heads and rows",
    "verifier_attention_per_layer": "(L, N) the same, mean over heads and rows",
    "verifier_attention_per_kv_head": "(L, J, N) the same for each KV head of this process, mean over its query heads and rows",
    "verifier_attention_last_row": "(L, N) the target's attention of the last prompt row, mean over heads",
    "draft_attention_last_row": "(L, N) the drafter's own, over the unpruned video, of its first `draft_layers` layers",
    "features": "(N, D) the target's video features as they enter its language model",
    "verifier_attention_weighted": "(L, N) as per layer, with the rows weighted by the pruner's `row_weights`",
    "vision_attention": "(N,) attention received in the last layer of the target's vision tower, inside frame or window",
    "vision_keys": "(N, D) the keys of that layer, after rotation where it has one, mean over heads; 0 for a newline token",
    "text_similarity": "(2, N) mean cosine to the text after the video, of states entering layer 0 and behind `state_layer`",
    "hidden": "(N, D) the target's hidden states of the video tokens behind `state_layer` layers",
    "hidden_text": "(T, D) the same of the text after the video",
    "key_norm": "(N,) L1 norm of the video tokens' keys in the last of these layers, all KV heads together",
    "key_norm_text": "(T,) the same of the text after the video",
    "motion": "(N,) pixels that a cell moved since the frame before, against the whole frame, by the file's vectors",
    "packet_bytes": "(N,) compressed bytes of the frames that the token's frame stands for",
    "intra": "(N,) share of these frames that refer to no other; 0 where the file tells nothing",
}
STATE_SIGNALS = frozenset({"text_similarity", "hidden", "hidden_text", "key_norm", "key_norm_text"})
CODEC_SIGNALS = frozenset({"motion", "packet_bytes", "intra"})


def token_signals() -> list[str]:
    """Signals of one number a video token, (N,): what a pruner may take as saliency, whatever its `state_layer`."""
    return [name for name in SIGNALS if _axes(name) == ["N"] and name not in STATE_SIGNALS]


def _axes(name: str) -> list[str]:
    """The letters of a signal's shape, from its line in SIGNALS."""
    return [axis.strip() for axis in SIGNALS[name].partition("(")[2].partition(")")[0].split(",") if axis.strip()]


class Strategy:
    """Base of all kinds. `name` is the registered name and the file name; `kind` is the Hydra group."""

    kind: ClassVar[str]
    name: ClassVar[str]


@dataclass(frozen=True, eq=False)
class PruneContext:
    """What a pruner may look at. Signals it did not ask for are absent, and asking for one then is an error that says so.

    grids: one a video, in prompt order; their tokens lie one after the other in 0..total-1. budget: how many tokens
    may be kept. generator: on the CPU, seeded per request.
    """

    grids: tuple[TokenGrid, ...]
    budget: int
    signals: dict[str, Tensor] = field(default_factory=dict)
    generator: torch.Generator | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def total(self) -> int:
        return sum(map(len, self.grids))

    @property
    def grid(self) -> TokenGrid:
        """The grid of the only video; a pruner that handles several uses `grids` and `by_frame`."""
        if len(self.grids) != 1:
            raise ValueError(f"this pruner handles one video a prompt, this prompt has {len(self.grids)}")
        return self.grids[0]

    def signal(self, name: str) -> Tensor:
        return _signal(self.signals, name, "pruner")

    def scores(self, name: str) -> Tensor:
        """A signal to rank tokens by, in float32. Raises ValueError where it holds NaN."""
        scores_N = self.signal(name).float()
        if bool(scores_N.isnan().any()):
            raise ValueError(f"cannot rank video tokens by {name}: {int(scores_N.isnan().sum())} of {scores_N.numel()} are NaN")
        return scores_N

    @property
    def verifier_attention(self) -> Tensor:
        return self.signal("verifier_attention")

    @property
    def features(self) -> Tensor:
        return self.signal("features")

    def by_frame(self, values_N: Tensor) -> list[Tensor]:
        """Values (N, ...) as one (F, P, ...) tensor a video; a trailing newline token is left out."""
        parts = values_N.split([len(grid) for grid in self.grids])
        return [part[: g.cells].unflatten(0, (g.frames, g.per_frame)) for part, g in zip(parts, self.grids, strict=True)]

    def flatten(self, values_FP: Sequence[Tensor], newline: float = float("-inf")) -> Tensor:
        """The inverse of `by_frame` for one value a token: (N,), newline tokens get the value `newline`."""
        parts = [
            torch.cat([x.flatten(), x.new_full((grid.newline,), newline)])
            for x, grid in zip(values_FP, self.grids, strict=True)
        ]
        return torch.cat(parts)

    def each_video(self, select: Callable[[PruneContext], KeepSet]) -> KeepSet:
        """`select` for every video on its own, joined: a pruner that knows how to treat one video treats several.

        Each call gets one grid without its newline, the signals of these tokens, and a share of the budget in proportion to
        the video's tokens, 0 < budget < total; a video whose share is all of it is kept, one without a share dropped. Newline
        tokens are kept last: when the video's share holds more than its cells.
        """
        device = self.device
        shares = apportion(self.budget, torch.tensor([len(grid) for grid in self.grids])).tolist()
        kept, start = [], 0
        for grid, share in zip(self.grids, shares, strict=True):
            cells = grid.cells
            if 0 < share < cells:
                signals = {name: self._within(name, start, start + cells) for name in self.signals}
                alone = TokenGrid(grid.frames, grid.height, grid.width)
                keep = select(replace(self, grids=(alone,), budget=share, signals=signals))
            else:
                keep = KeepSet.everything(min(share, cells), device)
            kept.append((keep, start))
            if share > cells:
                kept.append((KeepSet.everything(share - cells, device), start + cells))
            start += len(grid)
        index_K = torch.cat([keep.index + begin for keep, begin in kept])
        note = next((keep.note for keep, _ in kept if keep.note), "")
        if all(keep.pool is None for keep, _ in kept):
            return KeepSet(index_K, self.total, note=note)
        owner, source, weight = [], [], []
        for keep, begin in kept:
            if keep.pool is None:
                rows, columns, values = keep.index, keep.index, torch.ones(len(keep), device=device)
            else:
                pool = keep.pool.coalesce()
                rows, columns, values = keep.index[pool.indices()[0]], pool.indices()[1], pool.values()
            owner.append(rows + begin)
            source.append(columns + begin)
            weight.append(values)
        return replace(KeepSet.merge(torch.cat(owner), torch.cat(source), torch.cat(weight), self.total), note=note)

    def _within(self, name: str, start: int, stop: int) -> Tensor:
        """The signal of tokens start..stop-1 alone; one without a token axis whole."""
        axes = _axes(name)
        return self.signals[name].narrow(axes.index("N"), start, stop - start) if "N" in axes else self.signals[name]


def _signal(signals: dict[str, Tensor], name: str, whose: str) -> Tensor:
    if name not in signals:
        there = ", ".join(sorted(signals)) or "none"
        raise ValueError(f'the signal "{name}" is not there (there is {there}): name it in the `needs` of the {whose}')
    return signals[name]


class Pruner(Strategy, ABC):
    """Picks (or merges) the video tokens the drafter sees.

    keeps_all: nothing is ever dropped; the loop then ignores the ratio and does not select.
    """

    kind = "pruner"
    keeps_all: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """Signals `select` reads, of those in `SIGNALS`. A class attribute will do."""
        return frozenset()

    @property
    def draft_layers(self) -> int:
        """How many drafter layers a signal of the drafter needs; its prefill over the unpruned video stops there."""
        return 0

    def state_layer(self, layers: int) -> int:
        """Behind how many of the target's `layers` layers the signals of `STATE_SIGNALS` are read, from 1 to all of them."""
        return 0

    def row_weights(self, text_TD: Tensor, features_ND: Tensor) -> Tensor:
        """(T,) what each token of the text after the video counts for in `verifier_attention_weighted`, before it is known.

        text_TD, features_ND: as they enter the target's first layer. None negative, not all zero; the sum does not matter.
        """
        return text_TD.new_ones(len(text_TD))

    @abstractmethod
    def select(self, ctx: PruneContext) -> KeepSet:
        """At most `ctx.budget` tokens, 1 to all of them. The loop does not ask where it is all, or none."""


@dataclass(frozen=True)
class Sampling:
    """How the target's next token is drawn. Temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def probabilities(self, logits: Tensor) -> Tensor:
        """(..., V) logits to probabilities, in float32 or better: temperature, top-k, top-p, in Hugging Face's order."""
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} gives no distribution to sample from (0 is greedy)")
        scores = (logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits) / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(self.top_k).values[..., -1:], float("-inf"))
        if self.top_p < 1.0:
            ascending, order = scores.sort(dim=-1)
            # A token goes when it and everything below it weigh at most 1 - top_p; the best one always stays.
            drop = ascending.softmax(-1).cumsum(-1) <= 1.0 - self.top_p
            drop[..., -1:].fill_(False)
            scores = scores.masked_fill(drop.scatter(-1, order, drop), float("-inf"))
        return scores.softmax(-1)


@dataclass(frozen=True, eq=False)
class DraftContext:
    """What a drafter starts from. bonus: the first output token, already decided by the target's prefill.

    draft is None for a drafter whose `model` is not "draft". features_ND: the target's video features, which a
    drafter that *is* the target shares. vocabulary: ids below it are known to both models. engine: how passes run; None is
    the eager one. signals: those that the drafter `needs`. cache: the target's own, to be read and never written: all of the
    output so far but its last token. mark: told "draft_prefill" before a step is captured while the drafter starts, and
    "capture" behind it.
    """

    prompt: VideoPrompt
    keep: KeepSet
    bonus: int
    target: VideoLM
    draft: VideoLM | None
    features_ND: Tensor | None
    positions: str
    max_new_tokens: int
    vocabulary: int
    sampling: Sampling
    generator: torch.Generator
    caches: CachePool = field(default_factory=CachePool)
    engine: Engine | None = None
    signals: dict[str, Tensor] = field(default_factory=dict)
    cache: KVCache | None = None
    mark: Callable[[str], None] = lambda part: None

    def signal(self, name: str) -> Tensor:
        return _signal(self.signals, name, "drafter")


class DraftSession(ABC):
    """The drafter's side of one request."""

    @abstractmethod
    def propose(self, last: Verdict | None) -> DraftTree:
        """Guesses below the last accepted token, which is node 0: `last.bonus`, and `ctx.bonus` in the first round.

        last: what became of the previous tree, whose nodes `last.path` were accepted; None in the first round.
        """


class Drafter(Strategy, ABC):
    """How guesses are made. `model`: whose weights draft, "draft", "target" or None."""

    kind = "drafter"
    model: ClassVar[str | None] = "draft"

    @property
    @abstractmethod
    def max_nodes(self) -> int:
        """Most nodes of a tree, root included: the target's cache keeps room for them."""

    tells: ClassVar[bool] = False  # do its sessions hand the first rank's tree to ranks that have no draft?

    @property
    def max_rows(self) -> int:
        """Most rows that a round writes to the drafter's own cache: a tree that is grown and cut back needs more than it has
        nodes.
        """
        return self.max_nodes

    @property
    def needs(self) -> frozenset[str]:
        """Signals of the target that a session reads, of those in `SIGNALS`. A class attribute will do."""
        return frozenset()

    def sees(self, prompt: VideoPrompt) -> int | None:
        """How many video tokens it sees by a choice of its own, made without the pruner; None: those that the pruner leaves."""
        return None

    @abstractmethod
    def start(self, ctx: DraftContext) -> DraftSession: ...


@dataclass(frozen=True, eq=False)
class VerifyContext:
    """logits_MV: the target's, one row a tree node, sliced to the shared vocabulary never (it is the target's own).

    dice: uniform numbers drawn ahead, on the device, for a captured step; None: they are drawn when asked for. tables: what
    `Verifier.tables` gave for this tree, on the device, in a step captured for every tree of its size; None: in others.
    hidden_MD, video_ND: the target's last hidden states of the nodes, and of the video tokens, these to unit length, for a
    rule that `reads_hidden`; None: for others, and where there is no video or nothing was guessed.
    """

    tree: DraftTree
    logits_MV: Tensor
    generator: torch.Generator
    dice: Tensor | None = None
    tables: tuple[Tensor, ...] | None = None
    hidden_MD: Tensor | None = None
    video_ND: Tensor | None = None

    def numbers(self, count: int) -> Tensor:
        """(count,) uniform in [0, 1), float64, on the device of the logits."""
        if self.dice is not None:
            if len(self.dice) != count:
                raise ValueError(f"the verifier asks for {count} random numbers, and its `dice` announced {len(self.dice)}")
            return self.dice
        return uniform(count, self.generator).to(self.logits_MV.device)


def uniform(count: int, generator: torch.Generator) -> Tensor:
    """(count,) random numbers in [0, 1), float64, drawn where the generator lives."""
    return torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)


class Verifier(Strategy, ABC):
    """The rule that accepts guesses: a pure function of its context.

    Write `decide`, on the device alone, and the rule runs inside a captured step; or `verify`, free to read on the host.
    """

    kind = "verifier"
    lossless: ClassVar[bool] = True
    reads_hidden: ClassVar[bool] = False  # of rules that write `verify`; (N, D) more are kept for a request

    @property
    def sampling(self) -> Sampling:
        """The distribution that this rule is exact for; drafters that sample draw from theirs warped alike."""
        return Sampling()

    @property
    def on_device(self) -> bool:
        return type(self).verify is Verifier.verify

    def dice(self, nodes: int) -> int:
        """How many uniform numbers `decide` asks of `ctx.numbers` for a tree of so many nodes."""
        return 0

    def tables(self, parents: tuple[int, ...]) -> tuple[Tensor, ...] | None:
        """All that `decide` reads of a tree's shape, as tensors on the host whose sizes and types go by the number of nodes
        alone.

        Given these in `ctx.tables`, `decide` must not look at `ctx.tree.parents`: one captured step then checks every tree of a
        size, as drafters need whose trees vary. None: it goes by `parents`, and trees that vary are checked uncaptured.
        """
        return None

    def decide(self, ctx: VerifyContext) -> Tensor:
        """(2,) integers on the device: the last accepted node, and the target's own next token (-1: there is none).

        What it does may depend on the shape of the tree, never on the value of a tensor. Tensors made from that shape must be
        kept (functools.cache), unless `tree.varies`: a captured step knows their addresses alone.
        """
        raise NotImplementedError(f"verifier {self.name} has neither `decide` nor `verify`")

    def verify(self, ctx: VerifyContext) -> Verdict:
        last, bonus = self.decide(ctx).tolist()
        return self.verdict(last, bonus, ctx.tree)

    def verdict(self, last: int, bonus: int, tree: DraftTree) -> Verdict:
        """What `decide` gave, on the host. Raises ValueError where the logits gave no next token."""
        if bonus < 0:
            raise ValueError("the target's logits hold NaN or +inf: there is no distribution to draw from")
        return Verdict(tree.way_to(last), bonus)

    def first(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """The next token where nothing was guessed: after the prefill, and in `autoregressive`. A tree of the root alone."""
        root = DraftTree(torch.zeros(1, dtype=torch.int64, device=logits_V.device), (-1,))
        return self.verify(VerifyContext(root, logits_V[None], generator)).bonus


@dataclass(frozen=True, eq=False)
class Sample:
    """One video and what is asked about it.

    id: names it in its data set, today and in a year. video: a file, or a function that makes a clip of every frame there is;
    neither is opened or called before it is the sample's turn. start, end: the part of it that is meant, in seconds; None: to
    its end. question: as the model is asked, options and all. answer: the right one, if one is known, and `options` those to
    choose from, as `answer` has them. meta: what rows may be grouped by, such as category or duration; plain JSON.
    """

    id: str
    video: Path | Callable[[], Clip]
    question: str
    answer: str | None = None
    options: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    start: float = 0.0
    end: float | None = None


class Dataset(Strategy, ABC):
    """Samples in a fixed order, the same on every machine. `split` and `version` are recorded with every result."""

    kind = "dataset"

    @property
    def split(self) -> str:
        """Which part of the data set this is, by its publishers' name for it. A class attribute or a field will do."""
        return ""

    @property
    def version(self) -> str:
        """Which edition of it: a date, a commit, a checksum. A class attribute or a field will do."""
        return ""

    @abstractmethod
    def samples(self) -> Sequence[Sample]:
        """Every sample. Cheap: reads lists, opens no video. Raises UserError where the list cannot be read, saying what to
        fetch and where to put it.
        """
