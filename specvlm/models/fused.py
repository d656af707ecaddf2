"""Run modules of Hugging Face in a fused form while a pass runs: norms with residual adds, rotary positions, gated MLPs.

Between their matrix products, the modules of a vision tower or a language model read and write each row a dozen times; the
kernels of `fused_kernels.py` do so once. This is the one place that says which form runs. On a GPU in 16 bits it is the
fused one, for target and draft, in every pass through these modules: an answer's arithmetic is the same with and without a
draft. In float32 and on a CPU, Hugging Face's own code runs, and so it does where its modules are called outside of a
pass: `check=hf` has a copy of the model, since another thread's pass would otherwise lend it the fused forms.

Whether a form computes what its module does is tried when a model is wrapped, on a few random rows. A module whose result
differs, or that raises an error, stays as it is.

Why not `torch.compile`: it takes tens of seconds at each start, again for other numbers of rows, and chooses an order of
summation that may depend on the number of rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import chain
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from specvlm.models.fused_forms import Form, Forward, first, form_of
from specvlm.models.layer_kinds import language_model
from specvlm.models.padding import pays

ROWS = 9  # of a trial
NEAR = 2**-7  # most relative difference in norm between the two forms of a module: a step of bfloat16


class Fused(AbstractContextManager[None]):
    """Modules that run in their fused form inside a `with` block, which several threads may be in."""

    def __init__(self, forwards: Sequence[tuple[nn.Module, Forward]]) -> None:
        self.forwards = tuple(forwards)
        self._lock, self._inside = Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                for module, forward in self.forwards:
                    vars(module)["forward"] = forward

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for module, _forward in self.forwards:
                    del vars(module)["forward"]


class Forms:
    """The forms in which a model's modules run.

    Args:
        hf: The Hugging Face model, with its weights in place.
        axes: Number of rotary axes of the language model.
        ops: Module with the operations, `fused_kernels`. None leaves all modules as they are.
    """

    def __init__(self, hf: Any = None, axes: int = 1, ops: Any = None) -> None:
        self._parts: dict[nn.Module, Fused] = {}
        if ops is None:
            return
        text = language_model(hf)
        inside = {*text.modules()}
        outside = [module for module in hf.model.modules() if module not in inside]
        with torch.inference_mode():
            try:
                angles = _angles(text, axes)
            except Exception:  # sections of rotary positions that are not those of its heads: no layer of it can be tried
                return
            for part in (*text.layers, text.norm):
                self._keep(part, _tried([*part.modules()], angles, ops))
            self._keep(hf.model, _tried(outside, angles, ops))

    def _keep(self, module: nn.Module, forwards: Sequence[tuple[nn.Module, Forward]]) -> None:
        if forwards:
            self._parts[module] = Fused(forwards)

    def of(self, module: nn.Module) -> AbstractContextManager[None]:
        """Return a context manager for a call of a decoder layer or the last norm, or of what is not in the language model.

        module: The layer or norm; `hf.model` for the rest.
        """
        return self._parts.get(module) or nullcontext()

    @property
    def forwards(self) -> dict[nn.Module, Forward]:
        """The fused form of each module that has one."""
        return {module: forward for part in self._parts.values() for module, forward in part.forwards}

    @property
    def counts(self) -> Counter[str]:
        """Number of modules that have a fused form, by the name of their class."""
        return Counter(type(module).__name__ for module in self.forwards)


HUGGING_FACE = Forms()  # leaves every module as it is


def forms_of(hf: Any, axes: int, dtype: torch.dtype, device: torch.device) -> Forms:
    """Choose the forms of a model: fused on a GPU in 16 bits, if the kernels run there; else Hugging Face's own."""
    if not pays(dtype, device):
        return HUGGING_FACE
    try:
        from specvlm.models import fused_kernels

        row_1K = torch.zeros(1, 16, dtype=dtype, device=device)
        fused_kernels.norm(row_1K, row_1K[0], 1e-6)
    except Exception:  # no Triton, no compiler for it, or a GPU that it does not know
        return HUGGING_FACE
    return Forms(hf, axes, fused_kernels)


def _tried(modules: Sequence[nn.Module], angles: Sequence[Tensor], ops: Any) -> list[tuple[nn.Module, Forward]]:
    """Return the modules whose fused form computes what they do, each with that form.

    modules: Each stands before its parts. So the last comes first, and a form is tried with those of its parts.
    """
    found: list[tuple[nn.Module, Forward]] = []
    for module in reversed(modules):
        if "forward" in vars(module):  # a hook of accelerate's
            continue
        with suppress(Exception):  # a module of another kind, whose parts only have the same names
            form = form_of(module, ops)
            if form is not None and _same(module, form, angles, Fused(found)):
                found.append((module, form.forward))
    return found


def _same(module: nn.Module, form: Form, angles: Sequence[Tensor], parts: Fused) -> bool:
    """Whether a module's fused form, with those of its parts, computes what the module does. Raises what either raises."""
    device = next(chain(module.parameters(), module.buffers())).device  # quantised layers have no parameters
    rows = _random(ROWS, form.width).to(device, angles[0].dtype)
    given: dict[str, Any] = {}
    if form.place == "text":
        rows, given = rows[None], {"position_embeddings": tuple(angle.to(device) for angle in angles)}
        given |= {"attention_mask": None, "past_key_values": None}
    elif form.place == "vision":
        turns = _random(ROWS, form.head // 2).to(device).repeat(1, 2)
        given = {"cu_seqlens": torch.tensor([0, ROWS], dtype=torch.int32), "position_embeddings": (turns.cos(), turns.sin())}
    want = first(module(rows, **given))
    with parts:
        ours = first(form.forward(rows, **given))
    same = ours.shape == want.shape and ours.dtype == want.dtype
    return same and bool((ours.double() - want.double()).norm() <= NEAR * want.double().norm())


def _angles(text: Any, axes: int) -> Sequence[Tensor]:
    """Make a trial's cosines and sines as a pass does, of other positions on each axis."""
    steps_A1Q = torch.arange(ROWS) * torch.arange(1, axes + 1)[:, None, None]
    positions = (steps_A1Q if axes > 1 else steps_A1Q[0]).to(text.embed_tokens.weight.device)
    return tuple(text.rotary_emb(text.embed_tokens(torch.zeros_like(positions)[:1].flatten(0, -2)), positions))


def _random(*shape: int) -> Tensor:
    """Make random numbers, without a change of torch's own generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
