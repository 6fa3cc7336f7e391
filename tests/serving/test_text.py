"""Text that comes in pieces is the text that comes at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slablm.serving.text import Decoder, StopWords
from tests.conftest import byte_tokenizer

TOKENIZER = byte_tokenizer()


@given(st.text(), st.text())
def test_pieces_add_up_and_end_at_characters(prompt, text):
    """Each character of another alphabet is several tokens here."""
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    decoder = Decoder(TOKENIZER, TOKENIZER(prompt)["input_ids"])
    pieces = [decoder.feed(token) for token in ids]
    assert "".join([*pieces, decoder.finish()]) == text
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


def test_half_a_character_at_the_end_is_shown_as_such():
    decoder = Decoder(TOKENIZER, [])
    first = TOKENIZER("é", add_special_tokens=False)["input_ids"][0]
    assert decoder.feed(first) == ""
    assert decoder.finish() == "\ufffd"


@given(st.lists(st.text("ab")), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_a_text_ends_in_front_of_its_first_stop_word(pieces, words):
    text = "".join(pieces)
    stop = StopWords(words)
    shown = "".join(map(stop.feed, pieces)) + stop.finish()
    ends = [text.find(word) for word in words if word in text]
    # A long word may be found while the beginning of an earlier one's end is still to come: never shown too much.
    assert text.startswith(shown)
    assert not any(word in shown for word in words)
    assert stop.found == bool(ends)
    if not ends:
        assert shown == text


def test_nothing_that_is_no_beginning_of_a_stop_word_is_held_back():
    stop = StopWords(["END"])
    assert [stop.feed(piece) for piece in ("on", "e E", "N", "o E", "ND", "more")] == ["on", "e ", "", "ENo ", "", ""]


@pytest.mark.parametrize("words", [(), ("tt",)])
def test_a_text_without_stop_words_passes(words):
    stop = StopWords(words)
    assert stop.feed("text") + stop.finish() == "text"
