"""A vLLM server that goes wrong: `vllm_canned.py HOW IN OUT SHARED`. It speaks the language of `vllm_server`, knows no
model, and is what the trainer's end of the pipe is tried against.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

READY = {"version": "canned", "gives_memory_back": True}
ANSWER = {"ids": [5, 6], "log_probs": [-1.0, -2.0], "ended": False}


def answer(how: str, num: int) -> dict[str, Any]:
    """To a request of `num` answers."""
    match how:
        case "dies":
            sys.exit(3)
        case "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "is silent" | "writes for ever":
            time.sleep(600)
        case "refuses":
            return {"error": "RuntimeError: no"}
        case "answers too few":
            return {"answers": [ANSWER] * (num - 1)}
        case "leaves out log-probabilities":
            return {"answers": [ANSWER | {"log_probs": [-1.0]}] * num}
        case "writes too much":
            return {"answers": [ANSWER | {"ids": [5] * 99, "log_probs": [-1.0] * 99}] * num}
        case "writes nothing":
            return {"answers": [ANSWER | {"ids": [], "log_probs": []}] * num}
    return {"answers": [ANSWER] * num}


def main(how: str, asked: int, answers: int) -> None:
    with os.fdopen(asked) as lines, os.fdopen(answers, "w", buffering=1) as out:
        lines.readline()
        if how == "does not start":
            out.write(json.dumps({"error": "ValueError: no such model"}) + "\n")
            return
        out.write(json.dumps(READY) + "\n")
        for line in lines:
            order = json.loads(line)
            if order["do"] != "generate":
                out.write("{}\n")
                continue
            out.write('{"done": 1}\n')
            out.write(json.dumps(answer(how, len(order["prompts"]))) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
