"""Prompt lookup proposes the same as a full rescan, never a placeholder, and includes what was accepted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from specvlm.strategies import DraftContext, DraftSession, Sampling
from specvlm.strategies.drafters.prompt_lookup import PromptLookupDrafter
from specvlm.types import DraftTree, KeepSet, TokenGrid, Verdict, VideoPrompt

VIDEO, IMAGE = 99, 98


def start(drafter: PromptLookupDrafter, prompt: list[int], bonus: int) -> DraftSession:
    tokens = torch.tensor(prompt)
    video = (tokens == VIDEO).nonzero().flatten()
    ctx = DraftContext(
        prompt=VideoPrompt(tokens, video, (TokenGrid(1, 1, len(video)),) if len(video) else ()),
        keep=KeepSet.everything(len(video)),
        bonus=bonus,
        target=cast(Any, SimpleNamespace(video_token=VIDEO, image_token=IMAGE)),
        draft=None,
        features_ND=None,
        positions="original",
        max_new_tokens=100,
        vocabulary=100,
        sampling=Sampling(),
        generator=torch.Generator(),
    )
    return drafter.start(ctx)


def guesses(tree: DraftTree) -> list[int]:
    """Return the tokens below the root of a chain."""
    assert tree.parents == tuple(range(-1, len(tree) - 1)) and tree.q is None and tree.tokens.dtype == torch.int64
    return tree.tokens[1:].tolist()


def rescan(drafter: PromptLookupDrafter, text: list[int]) -> list[int]:
    """The definition: the longest n-gram first, at its latest earlier place, read on past the end into the guesses."""
    for size in range(drafter.max_ngram, drafter.min_ngram - 1, -1):
        gram = text[-size:]
        if len(gram) < size or VIDEO in gram:
            continue
        for after in range(len(text) - 1, size - 1, -1):
            if text[after - size : after] == gram and text[after] != VIDEO:
                longer = list(text)
                while len(longer) < after + drafter.length:
                    longer.append(longer[after + len(longer) - len(text)])
                found = longer[after : after + drafter.length]
                return found[: found.index(VIDEO)] if VIDEO in found else found
    return []


def test_longest_ngram_wins_over_a_later_shorter_one():
    session = start(PromptLookupDrafter(length=2), [1, 2, 3, 50, 51, 3, 60, 61, 7, 1, 2], 3)
    assert guesses(session.propose(None)) == [50, 51]


def test_latest_occurrence_wins():
    session = start(PromptLookupDrafter(length=2), [1, 2, 50, 51, 1, 2, 60, 61, 7, 1], 2)
    assert guesses(session.propose(None)) == [60, 61]


def test_no_match_gives_the_root_alone():
    tree = start(PromptLookupDrafter(), [1, 2, 3], 4).propose(None)
    assert tree.tokens.tolist() == [4] and tree.parents == (-1,)


def test_min_ngram_forbids_short_matches():
    prompt = [1, 2, 3, 8]
    assert guesses(start(PromptLookupDrafter(length=1), prompt, 2).propose(None)) == [3]
    assert guesses(start(PromptLookupDrafter(length=1, min_ngram=2), prompt, 2).propose(None)) == []


def test_a_loop_is_proposed_in_full():
    assert guesses(start(PromptLookupDrafter(length=6), [5, 6, 7, 5, 6], 7).propose(None)) == [5, 6, 7, 5, 6, 7]
    assert guesses(start(PromptLookupDrafter(length=4), [9, 5], 5).propose(None)) == [5, 5, 5, 5]


def test_chains_end_before_the_video():
    session = start(PromptLookupDrafter(), [1, 2, 3, VIDEO, VIDEO, 4, 5, 1], 2)
    assert guesses(session.propose(None)) == [3]


def test_ngrams_do_not_span_the_video():
    session = start(PromptLookupDrafter(min_ngram=2), [1, VIDEO, VIDEO, 2, 3, 1], 2)
    assert guesses(session.propose(None)) == []


def test_nothing_is_proposed_where_only_the_video_followed():
    assert guesses(start(PromptLookupDrafter(), [1, VIDEO, VIDEO, 4], 1).propose(None)) == []


def test_images_are_gaps_as_videos_are():
    assert guesses(start(PromptLookupDrafter(), [1, 2, IMAGE, IMAGE, 3, VIDEO, 4], 1).propose(None)) == [2]
    assert guesses(start(PromptLookupDrafter(), [1, 2, IMAGE, IMAGE, 3, VIDEO, 4], 3).propose(None)) == []


def test_a_placeholder_written_by_the_target_is_the_root_and_nothing_more():
    session = start(PromptLookupDrafter(), [1, VIDEO, 2, VIDEO, 3], VIDEO)
    tree = session.propose(None)
    assert tree.tokens.tolist() == [VIDEO]
    assert guesses(session.propose(Verdict((0,), 2))) == []


def test_a_prompt_without_video_works():
    assert guesses(start(PromptLookupDrafter(length=2), [1, 2, 3], 1).propose(None)) == [2, 3]


def test_proposals_equal_a_rescan_of_everything_over_many_rounds():
    chance = torch.Generator().manual_seed(0)
    matched = 0
    for _ in range(60):
        ngrams = sorted(torch.randint(1, 5, (2,), generator=chance).tolist())
        drafter = PromptLookupDrafter(
            max_ngram=ngrams[1], min_ngram=ngrams[0], length=int(torch.randint(1, 7, (1,), generator=chance))
        )
        prompt = torch.randint(4, (40,), generator=chance)
        prompt[torch.rand(40, generator=chance) < 0.2] = VIDEO
        prompt[10:20] = VIDEO
        text = [*prompt.tolist(), 0, 1]
        session = start(drafter, text[:-1], text[-1])
        last = None
        for _ in range(15):
            tree = session.propose(last)
            chain = guesses(tree)
            assert tree.tokens[0] == text[-1]
            assert chain == rescan(drafter, text) and VIDEO not in chain and len(tree) <= drafter.max_nodes
            matched += bool(chain)
            taken = int(torch.randint(len(tree), (1,), generator=chance))
            last = Verdict(tuple(range(taken + 1)), int(torch.randint(4, (1,), generator=chance)))
            text += [*chain[:taken], last.bonus]
    assert matched > 300


@pytest.mark.parametrize(
    "fields, message", [({"max_ngram": 0}, "got 1 and 0"), ({"min_ngram": 4}, "got 4 and 3"), ({"length": 0}, "got 0")]
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PromptLookupDrafter(**fields)
