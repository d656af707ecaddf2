"""Text of growing answers: whole characters, and stop texts wherever rounds and tokens cut them."""

from __future__ import annotations

import random

import pytest
from session_pairs import FAMILIES, session

from specvlm.decoding.output import Output
from specvlm.decoding.text import BROKEN, AnswerText

TEXT = "a naïve café: 你好, 🎉🇩🇪 and 👩‍👩‍👧. ok"


def pieces_of(tokenizer, tokens, stop=()):
    text = AnswerText(tokenizer, stop)
    found = [text.put(token) for token in tokens]
    return [*found, text.end()]


def test_pieces_are_whole_characters_and_add_up(byte_tokenizer):
    tokens = byte_tokenizer(TEXT)["input_ids"]
    pieces = pieces_of(byte_tokenizer, tokens)
    assert len(tokens) == len(TEXT.encode()) and "".join(pieces) == TEXT
    assert not any(BROKEN in piece for piece in pieces)


def test_bytes_that_are_no_text_add_up_to_what_the_tokenizer_makes_of_them(byte_tokenizer):
    generator = random.Random(0)
    for _ in range(500):
        tokens = [generator.randrange(len(byte_tokenizer)) for _ in range(generator.randrange(1, 12))]
        assert "".join(pieces_of(byte_tokenizer, tokens)) == byte_tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_words_add_up_to_what_the_tokenizer_makes_of_them(family):
    words, generator = session(family).target.tokenizer, random.Random(1)
    for _ in range(300):
        tokens = [generator.randrange(len(words)) for _ in range(generator.randrange(1, 20))]
        assert "".join(pieces_of(words, tokens)) == words.decode(tokens, skip_special_tokens=True)


def test_a_character_that_breaks_off_is_replaced_at_the_end(byte_tokenizer):
    tokens = byte_tokenizer("ab🎉")["input_ids"]
    assert pieces_of(byte_tokenizer, tokens[:-1]) == ["a", "b", "", "", "", BROKEN]


@pytest.mark.parametrize("stop", ["é: 你", "🎉", ":", "k", "naïve café", "not there"])
def test_the_first_stop_text_ends_the_text_and_nothing_of_it_is_shown(byte_tokenizer, stop):
    tokens = byte_tokenizer(TEXT)["input_ids"]
    text, shown = AnswerText(byte_tokenizer, (stop, "never")), ""
    for number, token in enumerate(tokens, start=1):
        shown += text.put(token)
        assert TEXT.startswith(shown) and stop not in shown
        assert text.stopped == (stop in byte_tokenizer.decode(tokens[:number])), number
    assert shown + text.end() == TEXT.partition(stop)[0]


def test_the_earliest_of_several_stop_texts_counts(byte_tokenizer):
    tokens = byte_tokenizer("one two three")["input_ids"]
    assert "".join(pieces_of(byte_tokenizer, tokens, ("three", "two", "e t"))) == "on"


@pytest.mark.parametrize("width", [1, 2, 3, 7, 40])
def test_a_stop_text_ends_the_output_wherever_rounds_cut_it(byte_tokenizer, width):
    tokens = byte_tokenizer(TEXT)["input_ids"]
    end = TEXT.index("好") + 1
    output, kept = Output(100, frozenset(), AnswerText(byte_tokenizer, ("你好",))), []
    for start in range(0, len(tokens), width):
        kept += output.take(tokens[start : start + width]) if not output.done else ()
    assert output.done and kept == output.tokens == tokens[: len(TEXT[:end].encode())]
