"""Rewards by rule, as the peer's scripts have them; the same as our metric numeric-answer and as tests.trainers.online.

number     1 where the last number of the answer is the row's, else 0
letters    the share of the answer's characters that are an e
"""

import re

__all__ = ["score"]


def score(rule, completion, answer):
    if rule == "letters":
        return completion.count("e") / max(len(completion), 1)
    numbers = re.findall(r"-?\d+(?:\.\d+)?", completion)
    return float(bool(numbers) and float(numbers[-1]) == float(answer))
