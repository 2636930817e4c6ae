"""How stop strings are found in text that comes in pieces."""

from hypothesis import given
from hypothesis import strategies as st

from host.answers import StopSearch

TEXTS = st.text("ab", max_size=12)


@given(st.lists(TEXTS, max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=4))
def test_text_ends_before_the_first_stop_string(texts, stops):
    """That is the one that is complete first; of those that are, the one that begins first."""
    whole = "".join(texts)
    ends = [whole.find(stop) + len(stop) for stop in stops if stop in whole]
    search, found = StopSearch(stops), ""
    for text in texts:
        if not search.is_found:
            found += search.push(text)
    assert search.is_found == bool(ends)
    if not ends:
        assert found + search.flush() == whole
        return
    assert whole.startswith(found) and search.flush() == ""
    assert any(whole[len(found) :].startswith(stop) for stop in stops)
    assert not any(stop in found for stop in stops)


@given(st.text("ab", max_size=30), st.text("ab", min_size=1, max_size=4))
def test_no_more_is_held_back_than_may_begin_a_stop_string(text, stop):
    search, n_passed = StopSearch([stop]), 0
    for n, character in enumerate(text, 1):
        n_passed += len(search.push(character))
        if search.is_found:
            return
        assert n - n_passed < len(stop)
        assert stop.startswith(text[n_passed:n])
