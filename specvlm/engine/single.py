"""Check one request's tree with captured programs: start it, then wait for it.

Shape suffixes: M tree nodes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from specvlm.engine.checking import Paths, check_of, move_of, pass_of, shape_of
from specvlm.engine.decisions import verdict_of
from specvlm.engine.lean import LeanText
from specvlm.engine.program import Keeper, Program
from specvlm.engine.steps import Check
from specvlm.models.kv_cache import KVCache
from specvlm.strategies.fence import inside
from specvlm.types import DraftTree, Verdict


def start(engine: Keeper, lean: LeanText, check: Check) -> Tensor:
    """Start the check of one request's tree. Returns (M + 2,) integers on the device, for `decide`."""
    request, tree, numbers = check.request, check.tree, check.numbers
    target, cache, verifier, penalty = request.target, request.cache, request.verifier, request.penalty
    device, count, base = target.head_device, len(tree), cache.length
    # Inputs that this verifier, tree or model does not need are empty.
    seen = penalty.seen_V if penalty.factor != 1 else torch.empty(0, dtype=torch.bool, device=device)
    dice = 0 if numbers is None else len(numbers)
    q = tree.q if tree.q is not None and dice else None
    state, earlier = (base, cache.offset), range(len(lean.stages) - 1)
    sampled = request.sampling.temperature > 0
    spent, x = engine.capture_s, tree.tokens
    shape = shape_of(tree, verifier)
    for number in earlier:
        (x,) = _stage_pass(engine, number, lean, tree, cache)(state, x)

    def build(backend: str) -> Program:
        inputs = [
            torch.tensor([cache.capacity - count, 0, 0, 0], device=device),
            torch.zeros(count, dtype=torch.int64, device=device),
            torch.zeros_like(seen),
            torch.full((dice,), 0.5, dtype=torch.float64, device=device),
            torch.empty(0, device=device) if q is None else torch.zeros_like(q, device=device),
            torch.empty(0, device=device) if x is tree.tokens else torch.zeros_like(x, device=device),
            *(table.to(device) for table in shape),
        ]
        paths = Paths.of(tree, device)
        fn = partial(check_of, lean, verifier, sampled, tree.parents, tree.varies, cache, penalty.factor, paths)
        return engine.capture(fn, inputs, backend, paths)

    rule = (type(verifier), repr(verifier), sampled)
    key = ("check", lean, count if shape else tree.parents, rule, penalty.factor, None if q is None else q.shape)
    again = shape or not tree.varies  # else the shape will not recur: do not capture it
    with inside(verifier):  # capturing runs its rule
        program = engine.program(key, cache, build) if again else build("direct")
    moves = [_stage_move(engine, number, lean, tree, cache) for number in earlier if count > 1]
    if engine.capture_s > spent:
        request.mark("capture")
    (outcome,) = program(
        (*state, *request.key(base + 1)), tree.tokens, seen, numbers, q, None if x is tree.tokens else x, *shape
    )
    for move in moves:
        move((base, 0), outcome[:1])
    return outcome


def decide(check: Check, numbers: list[int]) -> tuple[Verdict, list[int]]:
    """Return the answer of a check, and cut the cache to the accepted path. numbers: result of `start`, on the host."""
    last, bonus, *tokens = numbers
    verdict = verdict_of(check, last, bonus)
    check.request.cache.length += len(verdict.path)
    return verdict, [*(tokens[node] for node in verdict.path[1:]), bonus]


def _stage_pass(engine: Keeper, number: int, lean: LeanText, tree: DraftTree, cache: KVCache) -> Program:
    """Return the program that runs a tree through a pipeline stage other than the last."""
    device, count = lean.stages[number].device, len(tree)

    def build(backend: str) -> Program:
        state, rows = torch.tensor([cache.capacity - count, 0], device=device), torch.zeros(count, dtype=torch.int64)
        if number:
            rows = torch.zeros(count, lean.hidden, dtype=lean.dtype)
        paths = Paths.of(tree, device)
        return engine.capture(partial(pass_of, lean, number, cache, paths), [state, rows.to(device)], backend, paths)

    return engine.program((f"through {number}", lean, tree.parents), cache, build)


def _stage_move(engine: Keeper, number: int, lean: LeanText, tree: DraftTree, cache: KVCache) -> Program:
    """Return the program that compacts a stage's cache after the verdict, for stages other than the last."""
    device = lean.stages[number].device

    def build(backend: str) -> Program:
        state = torch.tensor([cache.capacity - len(tree), 0], device=device)
        last, paths = torch.zeros(1, dtype=torch.int64, device=device), Paths.of(tree, device)
        return engine.capture(partial(move_of, cache.stores[number], paths), [state, last], backend, paths)

    return engine.program((f"follow {number}", lean, tree.parents), cache, build)
