"""What `test_models` runs in a process of its own: load a model under ZeRO-3, and say what is true of it.

python -m tests.trainers.zero3_loading FOLDER    (FOLDER holds plan.json and model.json)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from finetune_api.plan import RunPlan
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.engine_deepspeed import engine_config, join_group
from finetune_trainers.models import load_model
from finetune_trainers.prepared import PreparedModel


def main(folder: Path) -> None:
    plan = RunPlan.model_validate_json((folder / "plan.json").read_text())
    prepared = PreparedModel.model_validate_json((folder / "model.json").read_text())
    join_group(SingleProcessContext(plan, folder))
    import deepspeed

    model = load_model(prepared, plan, torch.device("cpu"), engine_config(plan))
    parameters = dict(model.named_parameters())
    report = {
        "partitioned": all(hasattr(p, "ds_id") for p in parameters.values()),
        "empty_outside_gather": all(p.numel() == 0 for p in parameters.values()),
    }
    whole = AutoModelForCausalLM
    del model.finetune_zero3  # the reference is loaded whole
    reference = whole.from_pretrained(prepared.folder).eval()
    ids = torch.arange(3, 20)[None]
    with deepspeed.zero.GatheredParameters(list(parameters.values())), torch.no_grad():
        expected = dict(reference.named_parameters())
        report["same_values"] = all(torch.equal(p, expected[name]) for name, p in parameters.items())
        report["same_logits"] = torch.allclose(model.eval()(ids).logits, reference(ids).logits, atol=1e-5)
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
