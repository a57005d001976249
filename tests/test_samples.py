"""Every job under manifests/samples is valid, planned, and about one idea that its first line names. What serves the
result is in a folder of its own (tests/test_serving_samples.py), and so is a Ray cluster for trying (cluster lane)."""

from __future__ import annotations

from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest

from finetune_api.manifests import load_manifests, read_documents
from finetune_api.plan import RunPlan
from finetune_api.runtime import FineTuneRuntimeSpec
from finetune_api.schema import custom_resource_definitions
from finetune_api.spec import Method, Tuning
from finetune_api.uris import Scheme, parse_uri
from finetune_operator.planning import plan_run
from finetune_operator.resources.storage import check_shared_files, loss_of_model

SAMPLES = Path(__file__).parent.parent / "manifests" / "samples"
CHAIN = SAMPLES / "rlhf-chain"
FILES = sorted(
    [
        *(file for file in SAMPLES.rglob("*.yaml") if file.parent.name not in ("serving", "interactive", CHAIN.name)),
        CHAIN,
    ]
)
"""A folder of jobs that belong together is one sample."""
MADE_LATER = SAMPLES / "quickstart" / "data"
"""make_data.py writes it."""


def plans_of(file: Path) -> list[RunPlan]:
    manifests = load_manifests(file)
    plans = []
    for loaded in manifests.jobs:
        reference = loaded.job.spec.runtime_ref
        plans.append(plan_run(loaded.job, manifests.runtimes[reference.name] if reference else None))
    return plans


def is_for_a_cluster(plan: RunPlan) -> bool:
    """Whether all that it reads is where pods reach it, and nothing in this folder or in a package of this machine."""
    sources = [plan.model.source, *(one.source for one in (*plan.data.train, *plan.data.eval))]
    return not {parse_uri(source).scheme for source in sources} & {Scheme.FILE, Scheme.PACKAGE}


def texts_of(sample: Path) -> list[str]:
    files = sorted(sample.glob("*.yaml")) if sample.is_dir() else [sample]
    return [file.read_text(encoding="utf-8") for file in files]


def test_there_are_samples() -> None:
    assert len(FILES) >= 19


@pytest.fixture(params=FILES, ids=lambda file: str(file.relative_to(SAMPLES)))
def file(request: pytest.FixtureRequest) -> Path:
    assert isinstance(request.param, Path)
    return request.param


def test_a_samples_last_job_is_named_after_its_file(file: Path) -> None:
    *before, loaded = load_manifests(file).jobs
    assert all(one.job.metadata.name.startswith(f"{file.stem}-") for one in before)
    assert loaded.job.metadata.name == (file.parent.name if file.name == "job.yaml" else file.stem)


def test_a_sample_fits_the_schema_that_the_api_server_gets(file: Path) -> None:
    schemas = {
        crd["spec"]["names"]["kind"]: crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        for crd in custom_resource_definitions().values()
    }
    for document in (document for text in texts_of(file) for document in read_documents(text, str(file))):
        jsonschema.Draft4Validator(schemas[document["kind"]]).validate(document)


def test_a_sample_has_a_plan_that_survives_json(file: Path) -> None:
    for plan in plans_of(file):
        assert RunPlan.model_validate_json(plan.model_dump_json(by_alias=True)) == plan
        batch = plan.batch
        assert batch.micro_batch_size * batch.gradient_accumulation_steps * batch.world_size == batch.global_batch_size


def test_a_sample_says_its_idea_first(file: Path) -> None:
    for text in texts_of(file):
        first, *_ = text.splitlines()
        assert first.startswith("# ")
        assert len(first) > 40


def test_local_data_of_a_sample_is_there(file: Path) -> None:
    for plan in plans_of(file):
        for source in (*plan.data.train, *plan.data.eval):
            uri = parse_uri(source.source)
            if uri.scheme is Scheme.FILE and MADE_LATER not in Path(uri.path).parents:
                assert Path(uri.path).is_file(), source.source


def test_the_operator_takes_a_sample_for_a_cluster_and_its_model_outlives_the_pods(file: Path) -> None:
    for plan in filter(is_for_a_cluster, plans_of(file)):
        check_shared_files(plan)
        assert loss_of_model(plan) is None


def test_there_are_samples_for_a_cluster() -> None:
    found = {plan.name for file in FILES for plan in plans_of(file) if is_for_a_cluster(plan)}
    assert found >= {"bucket", "checkpoints", "elastic", "full-zero3", "queue", "retries", "rlhf-chain", "vllm"}


def test_samples_can_be_applied_together() -> None:
    """A runtime is the whole cluster's: of two with one name the last one applied would be that of both samples."""
    specs: dict[str, FineTuneRuntimeSpec] = {}
    for file in FILES:
        for name, runtime in load_manifests(file).runtimes.items():
            assert specs.setdefault(name, runtime.spec) == runtime.spec, name


def test_the_chain_has_its_data_and_models_where_the_pods_of_a_cluster_reach_them() -> None:
    for plan in plans_of(CHAIN):
        assert parse_uri(plan.model.source).scheme in (Scheme.HF, Scheme.JOB), "the image has no package with a model"
        for source in (*plan.data.train, *plan.data.eval):
            uri = parse_uri(source.source)
            assert (uri.scheme, uri.authority) == (Scheme.PVC, "finetune")
            assert (SAMPLES / uri.path).is_file(), "its first lines tell to copy the samples' data there"


def test_the_minimal_sample_has_ten_lines() -> None:
    assert len((SAMPLES / "minimal.yaml").read_text(encoding="utf-8").splitlines()) == 10


def test_every_method_every_way_of_tuning_and_every_tracker_has_a_sample() -> None:
    used: set[str] = set()
    for file in FILES:
        for loaded in load_manifests(file).jobs:
            spec = loaded.job.spec
            used |= spec.method.model_fields_set | spec.tuning.model_fields_set | spec.tracking.model_fields_set
    assert used >= {*Method.model_fields, *Tuning.model_fields, "tensorboard", "wandb", "mlflow"}
