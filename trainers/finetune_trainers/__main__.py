"""The trainers' command line.

    python -m finetune_trainers [run] --plan FILE [--workdir DIR] [--[no-]ray]  train
    python -m finetune_trainers check --plan FILE [--workdir DIR]               the model and all data, nothing trained
    python -m finetune_trainers export (--adapter DIR | --model DIR) --to DIR [--merge] [--dtype bf16]
    python -m finetune_trainers chat (--adapter DIR | --model DIR) --prompt TEXT [--compare-base] [--json]
    python -m finetune_trainers serve (--adapter DIR | --model DIR | --artifact URI) --name NAME [--host H] [--port N]

Exit code 0, 130 after a stop request, otherwise that of the failure's class (finetune_api.failures.EXIT_CODES). What
went wrong is one message on stderr; tracebacks are in the run's trainer.log.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from pydantic import ValidationError

from finetune_api.failures import EXIT_CODES, INTERRUPTED, Failure
from finetune_api.plan import RunPlan
from finetune_api.progress import Outcome, Result
from finetune_api.spec import Precision
from finetune_trainers.errors import UserError, classified
from finetune_trainers.places import cache_folder
from finetune_trainers.worker_process import LOG_FILE, log_to

QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "TQDM_DISABLE": "1",
}


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0].startswith("--") and given[0] != "--help":
        given.insert(0, "run")
    options = _parser().parse_args(given)
    os.environ.update({key: os.environ.get(key, value) for key, value in QUIET.items()})
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, from the first moment on
    with os.fdopen(os.dup(2), "w") as complaints:  # stays with the terminal when the run's output goes to its log
        try:
            return {"run": _run, "check": _check, "export": _export, "chat": _chat, "serve": _serve}[options.verb](
                options, complaints
            )
        except KeyboardInterrupt:
            return INTERRUPTED
        except Exception as error:
            failure = classified(error).to_failure()
            _complain(failure, complaints)
            return EXIT_CODES[failure.failure_class]


def _run(options: argparse.Namespace, complaints: TextIO) -> int:
    plan = _read_plan(options.plan)
    workdir: Path = (options.workdir or Path("runs") / plan.name).absolute()
    log_to(workdir / LOG_FILE, "launcher")
    from finetune_trainers.launch import run

    return _exit_code(run(plan, workdir, cache_folder(), use_ray=options.ray), complaints)


def _check(options: argparse.Namespace, complaints: TextIO) -> int:
    plan = _read_plan(options.plan)
    from finetune_trainers.launch import check

    with tempfile.TemporaryDirectory(prefix="finetune-check-") as scratch:
        return _exit_code(check(plan, options.workdir or Path(scratch), cache_folder()), complaints)


def _export(options: argparse.Namespace, complaints: TextIO) -> int:
    from finetune_trainers.exporting import export_adapter, export_model

    dtype = Precision(options.dtype) if options.dtype else None
    if options.adapter:
        artifact = export_adapter(options.adapter, options.to, options.merge, dtype)
    elif options.merge:
        raise UserError("--merge: a whole model has nothing to merge; leave it out, or name an --adapter")
    else:
        artifact = export_model(options.model, options.to, dtype)
    print(artifact.model_dump_json(by_alias=True))
    return 0


def _chat(options: argparse.Namespace, complaints: TextIO) -> int:
    from finetune_trainers.chat import answer
    from finetune_trainers.exporting import base_of_adapter

    model = options.model or base_of_adapter(options.adapter)
    [said] = answer(model, options.adapter, [options.prompt], options.compare_base, options.max_new_tokens)
    if options.json:
        print(json.dumps({"prompt": said.prompt, "tuned": said.tuned, "base": said.base}))
    else:
        print(said.tuned if said.base is None else f"--- base ---\n{said.base}\n--- tuned ---\n{said.tuned}")
    return 0


def _serve(options: argparse.Namespace, complaints: TextIO) -> int:
    from finetune_trainers.serving import ServeRequest, serve

    given = {name: getattr(options, name) for name in ServeRequest.__dataclass_fields__}
    serve(ServeRequest(**given), cache_folder())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m finetune_trainers", description="Train, check, export, chat, serve."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="train as a plan says")
    check = verbs.add_parser("check", help="look at the model and at every row, and train nothing")
    for verb in (run, check):
        verb.add_argument("--plan", type=Path, required=True, help="a RunPlan as JSON")
        verb.add_argument("--workdir", type=Path, help="folder for the run's files")
    run.add_argument(
        "--ray",
        action=argparse.BooleanOptionalAction,
        help="train in Ray's workers, or in this process; left out: in Ray's when there are several, or a cluster",
    )
    export = verbs.add_parser("export", help="write an artifact somewhere else")
    chat = verbs.add_parser("chat", help="ask a trained model")
    serve = verbs.add_parser("serve", help="let programs ask a trained model, as they ask OpenAI's")
    for verb in (export, chat, serve):
        source = verb.add_mutually_exclusive_group(required=True)
        source.add_argument("--adapter", type=Path, help="a PEFT adapter folder")
        source.add_argument("--model", type=Path, help="a model folder in Hugging Face layout")
        if verb is serve:
            source.add_argument("--artifact", help="URI of the one or the other, in a bucket say")
    export.add_argument("--to", type=Path, required=True, help="a folder that is not there yet")
    export.add_argument("--merge", action="store_true", help="merge the adapter into its base")
    export.add_argument("--dtype", choices=["bf16", "fp16", "fp32"], help="type of the weights")
    chat.add_argument("--prompt", required=True, help="what to ask")
    chat.add_argument("--compare-base", action="store_true", help="let the base model answer first")
    chat.add_argument("--max-new-tokens", type=int, default=256, help="longest answer")
    chat.add_argument("--json", action="store_true", help="one object: prompt, tuned, base")
    serve.add_argument("--name", required=True, help="what programs call the model")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at")
    serve.add_argument("--port", type=int, default=8000, help="0: whichever is free")
    serve.add_argument("--engine", choices=["auto", "transformers", "vllm"], default="auto", help="what serves")
    serve.add_argument("--base", help="folder or URI of the adapter's base, where it has moved")
    return parser


def _read_plan(path: Path) -> RunPlan:
    try:
        return RunPlan.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(f"{path}: {where}: {first['msg']}; write it with: finetune plan JOB -o json") from error


def _exit_code(outcome: Outcome, complaints: TextIO) -> int:
    if outcome.result is Result.CANCELLED:
        return INTERRUPTED
    if outcome.failure is None:
        return 0
    _complain(outcome.failure, complaints)
    return EXIT_CODES[outcome.failure.failure_class]


def _complain(failure: Failure, complaints: TextIO) -> None:
    if failure.problems:
        for problem in failure.problems:
            print(problem, file=complaints)
    else:
        print(failure.message, file=complaints)
    complaints.flush()


if __name__ == "__main__":
    sys.exit(main())
