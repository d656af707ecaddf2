"""What is kept from job to job: skeletons of checkpoints and texts of chat templates."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from specvlm.app import skeletons
from specvlm.app.compose import compose
from specvlm.app.placement import places_of
from specvlm.app.prepare import set_up
from specvlm.app.skeletons import skeleton_of
from specvlm.config import model_folder
from specvlm.errors import UserError
from specvlm.models import chat
from specvlm.process.child import ChildError
from specvlm.process.memo import KeptTexts
from specvlm.strategies import registry
from specvlm.strategies.pruners.uniform import UniformPruner


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(model_folder("embedded:qwen2_5_vl/plain"), tmp_path / "plain")


@pytest.fixture
def forks(monkeypatch) -> list[int]:
    """Count what is run in children."""
    calls, real = [], chat.in_child
    monkeypatch.setattr(chat, "in_child", lambda action: calls.append(1) or real(action))
    monkeypatch.setattr(chat, "_KEPT", KeptTexts(most=4, longest=10_000))
    return calls


def test_a_skeleton_is_made_once_until_a_file_changes(folder):
    first = skeleton_of(folder, "hf", True)
    assert skeleton_of(folder, "hf", True) is first
    assert skeleton_of(folder, "reference", True) is not first and skeleton_of(folder, "hf", False) is not first
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "{# another #}")
    other = skeleton_of(folder, "hf", True)
    assert other is not first and other.tokenizer.chat_template.endswith("{# another #}")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json"):
        skeleton_of(folder, "hf", True)


def test_only_so_many_skeletons_are_kept_and_relative_folders_are_those_of_the_working_directory(folder, monkeypatch):
    places = []
    for number in range(skeletons.MOST + 1):
        place = folder.parent / str(number)
        shutil.copytree(folder, place / "model")
        monkeypatch.chdir(place)
        places.append(skeleton_of(Path("model"), "hf", True))
    assert len(set(map(id, places))) == len(places) and len(skeletons._MADE) == skeletons.MOST
    assert skeleton_of(Path("model"), "hf", True) is places[-1]


def test_jobs_of_built_in_strategies_share_a_skeleton_and_others_have_their_own(monkeypatch):
    cfg = compose([])
    target = set_up(cfg, places_of(cfg)).target
    assert set_up(cfg, places_of(cfg)).target is target

    class Other(UniformPruner):
        pass

    build = registry.build
    monkeypatch.setattr(registry, "build", lambda kind, chosen: Other() if kind == "pruner" else build(kind, chosen))
    assert set_up(cfg, places_of(cfg)).target is not target


CHAT = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what ?"}]}]


def test_a_chat_is_rendered_once_for_a_template_and_special_tokens(forks, folder):
    tokenizer = chat.tokenizer_of(folder)
    found = chat.rendered(tokenizer, [CHAT])
    assert chat.rendered(chat.tokenizer_of(folder), [CHAT]) == found and len(forks) == 1
    found.append("a caller's own")
    assert chat.rendered(tokenizer, [CHAT]) == found[:-1]
    for count, (asked, template) in enumerate((([CHAT, CHAT], None), ([CHAT], "{{ messages }}"), ([CHAT], None)), start=2):
        if count == 4:
            tokenizer.pad_token = "<|endoftext|>" if tokenizer.pad_token != "<|endoftext|>" else "?"
        chat.rendered(tokenizer, asked, template)
        assert len(forks) == count, (asked, template)


@pytest.mark.parametrize("word", chat.UNSTEADY)
def test_a_template_that_may_differ_from_call_to_call_is_rendered_each_time(word, forks, folder):
    tokenizer = chat.tokenizer_of(folder)
    for count in (1, 2):
        chat.rendered(tokenizer, [CHAT], "{# " + word + " #}x")
        assert len(forks) == count


def test_what_fails_is_not_kept_nor_what_holds_more_than_text(forks, folder):
    tokenizer = chat.tokenizer_of(folder)
    for count in (1, 2):
        with pytest.raises(UserError, match="the chat template fails"):
            chat.rendered(tokenizer, [CHAT], "{{ 1 / 0 }}")
        assert len(forks) == count
    pixels = [{"role": "user", "content": [{"type": "image", "image": object()}]}]
    for count in (3, 4):
        assert chat.rendered(tokenizer, [pixels], "x") == ["x"] and len(forks) == count


def test_texts_are_kept_up_to_a_number_and_a_length():
    made, kept = [], KeptTexts(most=2, longest=5)

    def get(key, text="x"):
        return kept.get(key, lambda: made.append(key) or text)

    assert [get(key) for key in ("a", "b", "a", "c", "b")] == ["x"] * 5 and made == ["a", "b", "c", "b"]
    for key, text in (("sixsix", "x"), ("d", "sixsix"), (None, "x")):
        assert [get(key, text), get(key, text)] == [text] * 2
    assert made[4:] == ["sixsix"] * 2 + ["d"] * 2 + [None] * 2

    def fails():
        raise ChildError("no")

    with pytest.raises(ChildError):
        kept.get("e", fails)
    assert get("e") == "x"
