"""The prototype of chains for models with recurrent layers: answers are those of `generate`, and states come back."""

from __future__ import annotations

import pytest
import torch
from covering import sampled
from transformers import Qwen3_5Config

from experiments.recurrent.__main__ import compared, prompt_of
from experiments.recurrent.chain import Reader, decode
from experiments.recurrent.models import NAMES, pair
from experiments.recurrent.state import Saved, published, row_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("name", "replay"), sampled(NAMES, ("now", "later")))
def test_chains_give_what_generate_gives(name, replay):
    found = compared(name, 3, replay)
    assert found["equal"] == found["tried"] == 3
    assert 0.3 < found["accepted"] < 3.9, "some guesses are accepted, and some are not"


@pytest.mark.slow
@pytest.mark.parametrize("guesses", [1, 7])
def test_chains_of_any_length_give_the_same_answer(guesses):
    target, draft = pair("qwen3_5")
    want = target.generate(torch.tensor([prompt_of(1)]), max_new_tokens=20, do_sample=False)[0, len(prompt_of(1)) :].tolist()
    for replay in ("now", "later"):
        assert decode(target, draft, prompt_of(1), 20, guesses, replay).tokens == want


def logits_behind(name: str, restored: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a prompt and three more tokens, go back to the prompt, and read on; and read on at once. Returns both logits."""
    hf = pair(name)[0]
    with torch.inference_mode():
        one, other = Reader(hf), Reader(hf)
        for reader in (one, other):
            reader.read(prompt_of(2))
        saved = one.save() if restored else Saved(one.length, {})
        for _ in range(2):  # a copy is good for more than one time
            one.read([5, 6, 7])
            one.restore(saved)
        return one.read([9]), other.read([9])


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_cache_goes_on_as_if_nothing_had_been_read(name):
    assert torch.equal(*logits_behind(name, restored=True))


@pytest.mark.parametrize("name", NAMES)
def test_without_a_restored_state_rejected_guesses_stay_in_it(name):
    """The reason why such models are refused: rows of KV alone are cut back."""
    ours, theirs = logits_behind(name, restored=False)
    assert (ours - theirs).abs().max() > 1e-3


def test_a_states_bytes_are_those_that_the_configuration_says():
    hf = pair("qwen3_5")[0]
    reader = Reader(hf)
    with torch.inference_mode():
        reader.read(prompt_of(0))
    assert (reader.save().nbytes, row_bytes(reader.cache)) == published(hf.config, itemsize=4)
    state, row = published(Qwen3_5Config())
    assert state > 1000 * row
