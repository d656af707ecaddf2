"""Checks in a pass that several requests share: the pass of each, its decision on the device, and its answer.

Shape suffixes: M tree nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from specvlm.engine.steps import Check
from specvlm.models.passes import Pass
from specvlm.strategies import VerifyContext
from specvlm.strategies.fence import checked_verdict, inside, is_ours
from specvlm.strategies.verifier import decision_of
from specvlm.types import DraftTree, Verdict, ancestor_mask

MASKS = 64  # maximum number of masks kept; trees recur every round
_NOBODY = torch.Generator()  # unused: random numbers are drawn ahead


def pass_for(check: Check) -> Pass:
    """Make the pass of a check. Raises IndexError if the tree does not fit into the cache."""
    request, tree, cache = check.request, check.tree, check.request.cache
    mask = _mask_of(tree.parents)
    return Pass(request.target, cache, tree.tokens, tree.depths, mask, cache.length, cache.offset).placed()


@lru_cache(MASKS)
def _mask_of(parents: tuple[int, ...]) -> Tensor:
    """Return our own mask of a tree. A plugin could write to `DraftTree.mask`, and layouts would keep what it wrote."""
    return ancestor_mask.__wrapped__(parents)  # type: ignore[attr-defined]


def decision(check: Check, rows: Any) -> Tensor:
    """Apply a request's penalty and rule to a check's rows.

    Returns (M + 2,) integers on the device: last accepted node, bonus token, and the tree's tokens.
    """
    request, logits_MV = check.request, rows.logits()
    if not is_ours(request.verifier):
        logits_MV = logits_MV.clone()  # other requests' rows share the memory
    # As in `check_of`, a rule without random numbers does not see `q`.
    dice, q = (torch.empty(0), None) if check.numbers is None else (check.numbers, check.tree.q)
    tree = DraftTree(rows.tokens_Q, check.tree.parents, q, check.tree.varies)
    key_2 = request.key_2(request.cache.length + 1, logits_MV.device)
    logits_MV = request.penalty(logits_MV, tree)
    context = VerifyContext(tree, logits_MV, _NOBODY, dice.to(logits_MV.device), key_2=key_2)
    with inside(request.verifier):
        decision_2 = decision_of(request.verifier, context)
    return torch.cat([decision_2, tree.tokens])


def answer(check: Check, numbers: Sequence[int]) -> None:
    """Set the answer of a check, unless that fails. numbers: result of `decision`, read on the host."""
    last, bonus, *tokens = numbers
    with suppress(Exception):
        _accept(check, verdict_of(check, last, bonus), tokens)


def verdict_of(check: Check, last: int, bonus: int) -> Verdict:
    """Convert the two integers of `Verifier.decide` to a verdict. Raises what the verifier raises, or StrategyError."""
    verifier, tree = check.request.verifier, check.tree
    with inside(verifier):
        return checked_verdict(verifier, verifier.verdict(last, bonus, tree), tree, check.model.vocabulary)


def follow(checks: Sequence[Check], numbers: Sequence[int]) -> None:
    """Set the answers of checks that follow the argmax. numbers: the argmax of all their nodes, then the tokens."""
    best, tokens, end = numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :], 0
    for check in checks:
        tree, start, end = check.tree, end, end + len(check.tree.parents)
        with suppress(Exception):
            mine = tokens[start:end]
            last, bonus = check.request.verifier.follow(tree.parents, mine, best[start:end])
            _accept(check, Verdict(tree.way_to(last), bonus), mine)


def _accept(check: Check, verdict: Verdict, tokens: Sequence[int]) -> None:
    """Set a check's answer and cut its cache to the accepted path."""
    check.request.cache.keep(check.request.cache.length, verdict.path)
    check.answer = verdict, [*(tokens[node] for node in verdict.path[1:]), verdict.bonus]
