"""Texts that are nearly the same: MinHash signatures of runs of three words, compared only where bands of them agree.

The share of equal positions in two signatures estimates how many of the runs of two texts are common to both (the
Jaccard index); with HASHES positions its standard error at 0.8 is 0.045. Texts whose runs overlap by 80% meet in a
band with a probability of 99.8%.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

HASHES = 80
BANDS = 16
ROWS = HASHES // BANDS  # positions per band
ALIKE = 0.8  # share of common runs from which two texts count as nearly the same
TRIED = 4  # members of a bucket that each other member is compared with

_draw = np.random.default_rng(20240501)
_FACTORS = _draw.integers(1, 2**63, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _draw.integers(0, 2**63, HASHES, dtype=np.uint64)
_BYTES = _draw.integers(1, 2**63, 256, dtype=np.uint64)  # a random number for each byte
_PLACES = _draw.integers(1, 2**63, 64, dtype=np.uint64) | np.uint64(1)  # and for its place in the word
_RUN = _draw.integers(1, 2**63, 3, dtype=np.uint64) | np.uint64(1)
_END = b" \0 \0 "  # two words that end each text, so that a single word makes a run too

_IS_WORD = np.zeros(256, dtype=bool)
_IS_WORD[[byte for byte in range(128) if chr(byte).isalnum()]] = True
_IS_WORD[0] = True
_IS_WORD[128:] = True
_OWN_WORD = 0xE3  # first byte from which a character (CJK, kana, hangul) is a word of its own: no spaces part them


def sign_texts(texts: Sequence[str]) -> np.ndarray:
    """The signatures of texts, whatever their case and punctuation: (texts, HASHES) of uint16, zeros without a word."""
    signatures = np.zeros((len(texts), HASHES), dtype=np.uint16)
    if not texts:
        return signatures
    runs, counts = _hash_runs(texts)
    filled = np.flatnonzero(counts)
    if len(filled) == 0:
        return signatures
    starts = np.concatenate([[0], np.cumsum(counts[filled])[:-1]])
    hashed = np.empty_like(runs)
    for position in range(HASHES):
        np.multiply(runs, _FACTORS[position], out=hashed)
        np.add(hashed, _OFFSETS[position], out=hashed)
        smallest = np.minimum.reduceat(hashed, starts)
        signatures[filled, position] = (_mix(smallest) >> np.uint64(48)).astype(np.uint16)
    # All zeros are kept for texts without words.
    signatures[filled, 0] |= (~signatures[filled].any(axis=1)).astype(np.uint16)
    return signatures


def _hash_runs(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The hash of every run of three words, text after text, and how many each text has."""
    encoded = [text.lower().replace("\0", " ").encode("utf-8", "replace") for text in texts]
    content = np.frombuffer(_END.join(encoded) + _END, dtype=np.uint8)
    is_word = _IS_WORD[content]
    begins = is_word & (np.concatenate([[True], ~is_word[:-1]]) | (content >= _OWN_WORD))
    places = np.flatnonzero(is_word)
    content = content[places]
    starts = np.flatnonzero(begins[places])
    lengths = np.diff(np.append(starts, len(content)))
    inside = np.arange(len(content)) - np.repeat(starts, lengths)
    words = np.add.reduceat(_BYTES[content] * _PLACES[inside & 63], starts)
    ends = content[starts] == 0
    runs = _mix(words[:-2] * _RUN[0] + words[1:-1] * _RUN[1] + words[2:] * _RUN[2])
    real = ~ends[:-2]
    text_of_word = np.cumsum(ends)[:-2] // 2
    return runs[real], np.bincount(text_of_word[real], minlength=len(texts))


def _mix(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return values ^ (values >> np.uint64(29))


def group_alike(signatures: np.ndarray) -> np.ndarray:
    """For each text the number of the first text that it is nearly the same as, its own where there is none.

    A text like one that is like a third belongs to the third's group.
    """
    parents = np.arange(len(signatures))
    filled = np.flatnonzero(signatures.any(axis=1))
    for keys in _band_keys(signatures[filled]):
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        for step in range(1, TRIED + 1):
            same = np.flatnonzero(ordered[step:] == ordered[:-step])
            left, right = filled[order[same]], filled[order[same + step]]
            apart = _roots(parents, left) != _roots(parents, right)
            left, right = left[apart], right[apart]
            close = estimate(signatures, left, signatures, right) >= ALIKE
            _join(parents, left[close], right[close])
    return _roots(parents, np.arange(len(parents)))


def _roots(parents: np.ndarray, of: np.ndarray) -> np.ndarray:
    """The first of each text's group; shortens all ways to it, which copies in a row make as long as their number."""
    while True:
        further = parents[parents]
        if np.array_equal(further, parents):
            return parents[of]
        parents[:] = further


def _join(parents: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Joins the groups of each left and right; the smallest number stays the group's."""
    while len(left):
        one, other = _roots(parents, left), _roots(parents, right)
        low, high = np.minimum(one, other), np.maximum(one, other)
        apart = low < high
        left, right, low, high = left[apart], right[apart], low[apart], high[apart]
        np.minimum.at(parents, high, low)


def find_alike(signatures: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each text the most alike of `others` and the estimate; -1 and 0 where none is nearly the same."""
    best = np.full(len(signatures), -1)
    likeness = np.zeros(len(signatures))
    mine, theirs = (np.flatnonzero(part.any(axis=1)) for part in (signatures, others))
    if len(mine) == 0 or len(theirs) == 0:
        return best, likeness
    for keys, other_keys in zip(_band_keys(signatures[mine]), _band_keys(others[theirs]), strict=True):
        order = np.argsort(other_keys, kind="stable")
        ordered = other_keys[order]
        first = np.searchsorted(ordered, keys)
        for step in range(TRIED):
            place = np.minimum(first + step, len(ordered) - 1)
            met = ordered[place] == keys
            rows, candidates = mine[met], theirs[order[place[met]]]
            shares = estimate(signatures, rows, others, candidates)
            better = (shares >= ALIKE) & (shares > likeness[rows])
            best[rows[better]], likeness[rows[better]] = candidates[better], shares[better]
    return best, likeness


def _band_keys(signatures: np.ndarray) -> Iterator[np.ndarray]:
    for band in range(BANDS):
        keys = np.zeros(len(signatures), dtype=np.uint64)
        for position in range(band * ROWS, (band + 1) * ROWS):
            keys = _mix(keys * np.uint64(0x100000001B3) + signatures[:, position] + np.uint64(1))
        yield keys


def estimate(
    signatures: np.ndarray, rows: np.ndarray, others: np.ndarray, candidates: np.ndarray, block: int = 1 << 16
) -> np.ndarray:
    """The estimated share of common runs of each text in `rows` with its candidate."""
    shares = [
        (signatures[rows[start : start + block]] == others[candidates[start : start + block]]).mean(axis=1)
        for start in range(0, len(rows), block)
    ]
    return np.concatenate(shares) if shares else np.zeros(0)
