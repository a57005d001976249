"""How good are answers, compared with the data's own: exact match, BLEU and token F1. Called by evaluation.

Pure functions on strings. Fractions are 0 to 1; BLEU is 0 to 100, as it is reported everywhere.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import sacrebleu

__all__ = ["answer_metrics", "corpus_bleu", "exact_match", "token_f1"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, reference: str) -> bool:
    """Whether the two are the same text, white space at the ends aside."""
    return answer.strip() == reference.strip()


def normalized_tokens(text: str) -> list[str]:
    """Words as SQuAD compares them (Rajpurkar et al. 2016, arXiv 1606.05250): lower case, no ASCII punctuation, no
    articles, split at white space."""
    return _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the words that both have, each counted as often as it occurs in
    both. Two texts without words agree: 1; one without words: 0."""
    answer_words, reference_words = (
        normalized_tokens(answer),
        normalized_tokens(reference),
    )
    if not answer_words or not reference_words:
        return float(answer_words == reference_words)
    num_shared = (Counter(answer_words) & Counter(reference_words)).total()
    return 2 * num_shared / (len(answer_words) + len(reference_words))


def corpus_bleu(answers: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of the whole set with sacrebleu's defaults (13a tokens, 4-grams, exponential smoothing), 0 to 100."""
    return sacrebleu.corpus_bleu(list(answers), [list(references)]).score


def answer_metrics(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The means over all answers, by metric name. `answers` and `references` have the same length, at least 1."""
    pairs = list(zip(answers, references, strict=True))
    return {
        "eval_exact_match": sum(exact_match(*pair) for pair in pairs) / len(pairs),
        "eval_bleu": corpus_bleu(answers, references),
        "eval_f1": sum(token_f1(*pair) for pair in pairs) / len(pairs),
    }
