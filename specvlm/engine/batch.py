"""Steps of several requests on a GPU in one captured pass (continuous batching).

A pass is captured per number of rows and of requests, both rounded up, and serves any requests: the addresses of their
caches are inputs. A request's rows are bit-identical to those of a pass of its own (see `kernels/path_decoding.py`), so
its answer does not depend on the other requests.

Shape suffixes: B requests, Q rows of the pass, P slots of the longest path, M tree nodes, V vocabulary.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from specvlm.engine import ops
from specvlm.engine.contexts import (
    SLOTS,
    UNIT,
    Contexts,
    Layout,
    Shape,
    addresses,
    blocks_for,
    capturing,
    early_of,
    frame_of,
    layout_of,
    rounded,
    segments_for,
)
from specvlm.engine.decisions import answer, decision, follow, pass_for
from specvlm.engine.lean import JOINED, LeanText, Places
from specvlm.engine.program import Keeper, Program
from specvlm.engine.steps import Check, Scored, grouped
from specvlm.errors import line
from specvlm.models.memory_plan import ran_out
from specvlm.models.passes import Pass, Rows

if TYPE_CHECKING:
    from specvlm.models.video_lm import VideoLM

log = logging.getLogger(__name__)
LAYOUTS = 64  # maximum number of layouts kept; shapes recur every round


class Uncaptured(Exception):
    """A program cannot be captured."""


def why_not_joined(lean: LeanText) -> str | None:
    """Say why passes of several requests cannot run as one; None if they can."""
    if lean.ops is ops:
        return "it runs without Triton kernels"
    if lean.text.embed_tokens.weight.data_ptr() % UNIT:
        return f"its embeddings do not begin at a multiple of {UNIT} bytes"
    return "it runs on several devices" if len(lean.stages) > 1 or lean.ranks.size > 1 else None


def bytes_for(model: VideoLM, slots: int, dtype: torch.dtype) -> int:
    """Estimate the bytes that a model's joined passes hold on a GPU: attention in parts, and logits of five programs.

    Args:
        model: The model, which may be a skeleton.
        slots: Slots of the longest cache.
        dtype: Dtype of the logits.
    """
    heads = int(model.hf.config.get_text_config().num_attention_heads)
    parts = (
        segments_for(rounded(slots, SLOTS), early=early_of(model.kv_heads))
        * heads
        * (model.head_dim + 1)
        * torch.float32.itemsize
    )
    return JOINED * (parts + 5 * model.vocabulary * dtype.itemsize)


class Batch:
    """Runs passes and checks of several requests of one model.

    Args:
        lean: The model's lean pass, which `why_not_joined` accepts.
        engine: Keeps the programs; may be a weak reference.

    Attributes:
        lock: Held by a thread while it runs a pass and reads the results, since threads share the programs' buffers.
    """

    def __init__(self, lean: LeanText, engine: Keeper) -> None:
        self.lean, self.engine, self.lock = lean, engine, RLock()
        self.anchor, self.device = lean.text.embed_tokens.weight, lean.stages[0].device
        self.kv_heads = lean.layers[0].qkv[1].outputs // lean.width
        self.group = lean.heads // self.kv_heads
        self._layouts: OrderedDict[Hashable, tuple[Layout, object]] = OrderedDict()
        self._frames: dict[tuple[Shape, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
        self._failed = set[Hashable]()
        self._told = set[str]()
        self._held: WeakKeyDictionary[Program, Layout] = WeakKeyDictionary()  # the layout in a program's buffers

    def check(self, checks: Sequence[Check]) -> None:
        """Check the trees of several requests, and set their answers. A check that fails gets none: run it alone."""
        with self.lock:
            groups = grouped(checks, lambda one: len(one.tree), self.lean.most)
            decided = [pair for group in groups for pair in self._decided(group)]
            if not decided:
                return
            numbers, end = torch.cat([part for _, part in decided]).tolist(), 0  # the only host read
        for read, part in decided:
            start, end = end, end + len(part)
            read(numbers[start:end])

    def _decided(self, checks: Sequence[Check]) -> list[tuple[Callable[[Sequence[int]], None], Tensor]]:
        """Run the trees of some checks as one pass. Returns (function, tensor) pairs.

        Called with the tensor's numbers, read on the host, the function sets the answers. The tensor is a copy, since
        the next pass overwrites the rows. Checks that fail are left out.
        """
        found = list[tuple[Callable[[Sequence[int]], None], Tensor]]()
        with suppress(Exception):
            passes = [*map(pass_for, checks)]
            outputs, best_Q = self._outputs(passes, True)
            if all(one.follows for one in checks):  # one argmax, computed with the pass, decides all
                count = sum(map(len, passes))
                return [(partial(follow, checks), torch.cat([best_Q[:count], outputs[-1][:count]]))]
            for one, rows in zip(checks, self.split(passes, outputs), strict=True):
                with suppress(Exception):
                    found.append((partial(answer, one), decision(one, rows)))
        return found

    def captured(self, key: tuple[Hashable, ...], build: Callable[[str], Program], what: str, kind: Hashable) -> Program | None:
        """Return the program of a key. None, with one warning, if it cannot be captured.

        Args:
            key: As for `GraphsEngine.program`.
            build: As for `GraphsEngine.program`. If it raises Uncaptured, a later call tries again.
            what: Says in the warning what happens instead.
            kind: After another error, programs of this kind are not tried again; if memory ran out, only this key.
        """
        if not self._failed.isdisjoint((key, kind)):
            return None
        try:
            return self.engine.program(key, self.lean, build)
        except Exception as error:
            if not isinstance(error, Uncaptured):
                self._failed.add(key if ran_out(error) else kind)
            if what not in self._told:
                self._told.add(what)
                log.warning("%s: %s", what, line(str(error)))
            return None

    def run(self, passes: Sequence[Pass], fixed: bool = True, copy: bool = False) -> list[Rows]:
        """Run passes of at most `LeanText.most` rows and REQUESTS requests together as one. Called with the lock.

        Args:
            passes: The passes, each on a different cache, which has room for its rows.
            fixed: Whether the tensors `depths_Q` and `seen_QT` never change, so that layouts can be reused.
            copy: Copy the results, for a caller that runs another pass before it reads them.

        Raises:
            Uncaptured: The pass cannot be captured.
        """
        outputs, _ = self._outputs(passes, fixed)
        return self.split(passes, [part.clone() for part in outputs] if copy else outputs)

    def _outputs(self, passes: Sequence[Pass], fixed: bool) -> tuple[list[Tensor], Tensor]:
        """Run passes as `run` does. Returns the input of `split` and the argmax (Q,). The next pass overwrites both."""
        shape = Shape.of(passes)
        key = ("batch", *shape)
        program = self.captured(key, partial(self._build, shape), "passes of several requests run one by one", key)
        if program is None:
            raise Uncaptured(f"a pass of {shape.rows} rows")
        layout = self.layout(shape, passes, fixed)
        # Forget what the buffers hold until all is copied: the call may fail on the way.
        tables = [None] * 6 if self._held.pop(program, None) is layout else layout.tensors()
        spare, extra = shape.requests - len(passes), shape.rows - sum(map(len, passes))
        tokens_Q = [one.tokens_Q for one in passes]
        if all(tokens.device.type == "cpu" for tokens in tokens_Q):  # of steps without a draft: one copy for all
            given: Any = [token for tokens in tokens_Q for token in tokens.tolist()] + [0] * extra
        else:
            given = torch.cat([*(tokens.to(self.device) for tokens in tokens_Q), *self._zeros(extra)])
        where = addresses([one.cache for one in passes], self.anchor, shape.requests)
        both = (self._numbers([getattr(one, name) for one in passes], spare) for name in ("base", "offset"))
        *outputs, best_Q = program(given, self._joined([where, *both]), *tables)
        self._held[program] = layout
        return [*outputs, program.inputs[0]], best_Q

    def split(self, passes: Sequence[Pass], outputs: Sequence[Tensor]) -> list[Rows]:
        """Divide the results of a joined pass among its passes: logits, hidden states and tokens."""
        (logits_QV, *hidden, tokens_Q), found, end = outputs, list[Rows](), 0
        for one in passes:
            start, end = end, end + len(one)
            rows, mine = _rows([part[start:end] for part in hidden]), slice(start, end)
            found.append(Scored(rows, self.lean.logits, self.lean.ops.top, logits_QV[mine], tokens_Q[mine]))
        return found

    def _build(self, shape: Shape, backend: str) -> Program:
        """Make the program of a shape. Its example inputs are all padding, which reads and writes no cache."""
        zeros = partial(torch.zeros, dtype=torch.int64, device=self.device)
        blocks = blocks_for(shape.rows, shape.requests, self.group)
        inputs = [
            zeros(shape.rows),
            zeros(shape.requests * 5),
            torch.full((shape.rows,), -1, dtype=torch.int32, device=self.device),
            *(zeros(shape.rows) for _ in range(3)),
            zeros(shape.rows, shape.path),
            torch.zeros(blocks, 3, dtype=torch.int32, device=self.device),
        ]
        return self.engine.capture(partial(_with_best, self.lean, self.anchor, self.kv_heads, shape.longest), inputs, backend)

    def _frame(self, shape: Shape, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the tables of `frame_of`, cached."""
        if (shape, counts) not in self._frames:
            if len(self._frames) >= LAYOUTS:
                self._frames.clear()
            self._frames[shape, counts] = frame_of(shape, counts, self.group, self.device)
        return self._frames[shape, counts]

    def _numbers(self, values: Sequence[int | Tensor], spare: int) -> Tensor | list[int]:
        """Join one number per request and `spare` zeros: to a list if all are integers, else to a tensor on the device.

        values: Integers, or (1,) tensors on the device.
        """
        if all(isinstance(value, int) for value in values):
            return [*map(int, values), *[0] * spare]
        each = [value if isinstance(value, Tensor) else torch.tensor([value], device=self.device) for value in values]
        return torch.cat([*each, *self._zeros(spare)])

    def _joined(self, parts: Sequence[Tensor | list[int]]) -> Tensor | list[int]:
        """Join lists of integers to a list, which a program copies without blocking; with a tensor, to a tensor."""
        if all(isinstance(part, list) for part in parts):
            return [number for part in parts for number in part]
        return torch.cat([part if isinstance(part, Tensor) else torch.tensor(part, device=self.device) for part in parts])

    def _zeros(self, count: int) -> list[Tensor]:
        """Return padding to concatenate: a list with a tensor of `count` zeros, or an empty list if `count` is 0."""
        return [torch.zeros(count, dtype=torch.int64, device=self.device)] if count else []

    def layout(self, shape: Shape, passes: Sequence[Pass], fixed: bool) -> Layout:
        """Make the layout of passes. If `fixed`, reuse one made for equal shapes and the same depths and masks."""
        key = (shape, *((len(one), one.at, _key(one.depths_Q), _key(one.seen_QT)) for one in passes))
        if fixed and key in self._layouts:
            self._layouts.move_to_end(key)
            return self._layouts[key][0]
        layout = layout_of(shape, passes, self._frame(shape, tuple(map(len, passes))))
        if fixed and not capturing(self.device):  # hold the tensors too, so that no others get their ids
            self._layouts[key] = layout, [(one.depths_Q, one.seen_QT) for one in passes]
            if len(self._layouts) > LAYOUTS:
                self._layouts.popitem(last=False)
        return layout


def pass_of_many(
    lean: LeanText, anchor: Tensor, kv_heads: int, longest: int, tokens_Q: Tensor, where: Tensor, base_B: Tensor,
    offset_B: Tensor, *tables: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run a joined pass as a function of device tensors, for capture. Returns logits (Q, V), and the hidden states.

    anchor, longest and kv_heads: as in `Contexts`. where: from `addresses`. tables: those of `Layout`.
    """
    layout = Layout(*tables)
    table_B4 = torch.cat([where.view(-1, 3), base_B[:, None]], 1)
    positions_Q = (base_B + offset_B).index_select(0, layout.request_Q.clamp(min=0)) + layout.depth_Q
    places = Places(Contexts(anchor, table_B4, layout, longest, kv_heads))
    hidden_QD: Any = lean.run(0, lean.enter(tokens_Q), positions_Q, places)
    parts = (hidden_QD,) if isinstance(hidden_QD, Tensor) else (hidden_QD.data, hidden_QD.scale)
    return lean.logits(hidden_QD), *parts


def _with_best(
    lean: LeanText, anchor: Tensor, kv_heads: int, longest: int, tokens_Q: Tensor, numbers: Tensor, *tables: Tensor
) -> tuple[Tensor, ...]:
    """Run a joined pass. numbers: `where`, `base_B` and `offset_B`, concatenated. Also returns the argmax (Q,)."""
    count = len(numbers) // 5
    logits_QV, *hidden = pass_of_many(
        lean, anchor, kv_heads, longest, tokens_Q, *numbers.split([3 * count, count, count]), *tables
    )
    return logits_QV, *hidden, logits_QV.argmax(-1)


def _rows(parts: Sequence[Tensor]) -> Any:
    """Return hidden states as the lean pass gives them: a tensor, or 8-bit rows (`Narrow`) made of data and scales."""
    if len(parts) == 1:
        return parts[0]
    from specvlm.engine.kernels.launch import Narrow

    return Narrow(*parts)


def _key(value: Tensor | Sequence[int] | None) -> Hashable:
    """Return a hashable key: the numbers of a sequence, but the id of a tensor, whose values are not read."""
    return id(value) if isinstance(value, Tensor) else None if value is None else tuple(value)
