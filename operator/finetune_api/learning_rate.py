"""`learningRate: auto`: a peak rate from the size of the model, with the reason in a sentence.

Called by planning when the job or the source's name tells the size, by the trainers when only the model does.

The table is the peak rate that models of a size were pre-trained with: Brown et al. 2020 (arXiv 2005.14165), table 2.1.
Full tuning takes a tenth of it, so that what was learned is refined and not overwritten. LoRA takes ten times the rate
of full tuning: the optimal ratio was found to be near ten and nearly independent of the model's size (Schulman et al.
2025, "LoRA Without Regret").

DPO, KTO, ORPO, PPO and GRPO move a model that has been trained already, by how it differs from itself, and take a tenth
of that: DPO's own 1e-6 (Rafailov et al. 2023, arXiv 2305.18290) for models of some billions of parameters, which GRPO's
authors use too (Shao et al. 2024, arXiv 2402.03300).
"""

from __future__ import annotations

import math
import re
from itertools import pairwise

from finetune_api.spec import Method, Tuning

__all__ = ["auto_learning_rate", "parameters_in_name", "parse_parameters"]

_PRETRAINING_PEAK = (
    (125e6, 6.0e-4),
    (350e6, 3.0e-4),
    (760e6, 2.5e-4),
    (1.3e9, 2.0e-4),
    (2.7e9, 1.6e-4),
    (6.7e9, 1.2e-4),
    (13e9, 1.0e-4),
    (175e9, 0.6e-4),
)
_UNITS = {"M": 1_000_000, "B": 1_000_000_000, "T": 1_000_000_000_000}
_IN_NAME = re.compile(r"(?<![A-Za-z0-9.])(\d{1,6}(?:\.\d{1,6})?)([MB])(?![A-Za-z0-9])")


def auto_learning_rate(num_parameters: int, tuning: Tuning, method: Method | None = None) -> tuple[float, str]:
    """The peak learning rate for a model of `num_parameters`, rounded to two digits, and why. `method` None: sft."""
    pretraining = _interpolate(float(num_parameters))
    size = _readable(num_parameters)
    gentle = method is not None and (method.dpo or method.kto or method.orpo or method.online) is not None
    part, why = (10, f"; {method.chosen} takes a tenth of that") if gentle and method is not None else (1, "")
    if tuning.lora is not None:
        rate = _round(pretraining / part)
        return rate, f"{rate:g}: ten times the rate for full tuning of {size} parameters, as LoRA wants{why}"
    rate = _round(pretraining / 10 / part)
    of = f"a tenth of the pre-training rate of models with {size} parameters ({pretraining:.2g})"
    return rate, f"{rate:g}: {of}{why}"


def parse_parameters(text: str) -> int:
    """135M or 8B as a number."""
    return round(float(text[:-1]) * _UNITS[text[-1].upper()])


def parameters_in_name(source: str) -> int | None:
    """The size that a model's name tells (…/Qwen3-8B), None when it tells none or several."""
    last = source.rstrip("/").rsplit("/", 1)[-1]
    sizes = {parse_parameters(number + unit) for number, unit in _IN_NAME.findall(last)}
    return sizes.pop() if len(sizes) == 1 else None


def _interpolate(size: float) -> float:
    """Straight lines between the table's points on logarithmic axes; the ends beyond them."""
    table = _PRETRAINING_PEAK
    if size <= table[0][0]:
        return table[0][1]
    for (low, high_rate), (high, low_rate) in pairwise(table):
        if size <= high:
            share = math.log(size / low) / math.log(high / low)
            return math.exp(math.log(high_rate) + share * math.log(low_rate / high_rate))
    return table[-1][1]


def _round(rate: float) -> float:
    return float(f"{rate:.1e}")


def _readable(number: int) -> str:
    for unit, size in reversed(_UNITS.items()):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
