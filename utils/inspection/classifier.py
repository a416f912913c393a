"""How well the words alone, without the prompt, tell chosen from rejected: a linear model, tried on unseen prompts."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..data.turns import flatten
from .scanning import Scan
from .subject import Subject

SAMPLED_PAIRS = 10_000
FEWEST_PROMPTS = 50
FOLDS = 5
WORDS = 2**17  # hashed words and pairs of words
READ = 4000  # characters of a response that are read


def measure_words(subject: Subject, scan: Scan, seed: int) -> dict[str, Any] | None:
    """The accuracy of a logistic regression on the words of both sides, cross-validated by prompt.

    Each pair is the difference of its sides' words, so the model cannot know a side by its place: 50% is chance. At
    most SAMPLED_PAIRS pairs are drawn. None where there are too few prompts.
    """
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    draw = np.random.default_rng(seed)
    size = min(SAMPLED_PAIRS, len(scan))
    sample = np.sort(draw.choice(len(scan), size, replace=False))
    groups = scan.prompt_keys[sample].astype(np.int64)
    if len(np.unique(groups)) < FEWEST_PROMPTS:
        return None
    read = HashingVectorizer(n_features=WORDS, ngram_range=(1, 2), alternate_sign=False, binary=True, norm="l2")
    sides = []
    rows = subject.pairs.select_columns(["chosen", "rejected"]).select(sample)
    for side in ("chosen", "rejected"):
        sides.append(read.transform(flatten(value)[:READ] for batch in rows.iter(1000) for value in batch[side]))
    differences = sides[0] - sides[1]
    shares = []
    for fit, tried in GroupKFold(FOLDS).split(differences, groups=groups):
        signs = np.where(draw.random(len(fit)) < 0.5, 1.0, -1.0)
        model = LogisticRegression(C=10.0, fit_intercept=False, max_iter=200, tol=1e-3)
        model.fit(differences[fit].multiply(signs[:, None]).tocsr(), signs > 0)
        margins = model.decision_function(differences[tried])
        shares.append(np.where(margins == 0, 0.5, margins > 0))
    right = np.concatenate(shares)
    return {
        "accuracy": float(right.mean()),
        "standard_error": float(right.std() / len(right) ** 0.5),
        "pairs": size,
        "prompts": len(np.unique(groups)),
        "folds": FOLDS,
    }
