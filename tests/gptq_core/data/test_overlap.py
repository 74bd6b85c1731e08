import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_core.data.overlap import overlap

rows = st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=4)


@given(rows, rows, st.integers(1, 7))
def test_against_a_slow_count(judged, seen, ngram):
    def grams(windows):
        return [tuple(window[i : i + ngram]) for window in windows for i in range(len(window) - ngram + 1)]

    known, own = set(grams(seen)), grams(judged)
    expected = sum(gram in known for gram in own) / len(own) if own else 0.0
    assert overlap(torch.tensor(judged), torch.tensor(seen), ngram) == expected


def test_the_same_text_in_other_windows_is_found_and_another_is_not():
    text = torch.randint(0, 50_000, (4096,), generator=torch.Generator().manual_seed(0))
    assert overlap(text[:2048].view(8, 256), text[100:2148].view(16, 128)) > 0.7
    assert overlap(text[:2048].view(8, 256), text[2048:].view(8, 256)) == 0
