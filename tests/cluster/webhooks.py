"""Webhooks of a program that runs beside the API server instead of inside the cluster."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.client import Client

__all__ = ["answers", "documents_of", "registered"]

_ADMISSION = "/apis/admissionregistration.k8s.io/v1"


@contextmanager
def registered(
    client: Client, configurations: Iterable[dict[str, Any]], at: Callable[[str], dict[str, Any]]
) -> Iterator[list[str]]:
    """Webhook configurations for the length of a block: left behind, they would refuse what nobody judges any more.

    `at` is given the path of a webhook and returns its clientConfig. Yields where the configurations are.
    """
    paths = []
    try:
        for configuration in configurations:
            for webhook in configuration["webhooks"]:
                webhook["clientConfig"] = at(webhook["clientConfig"]["service"]["path"])
            path = f"{_ADMISSION}/{configuration['kind'].lower()}s/{configuration['metadata']['name']}"
            paths.append(path)
            client.apply(path, configuration)
        yield paths
    finally:
        for path in paths:
            client.delete(path)


def documents_of(file: Path) -> list[dict[str, Any]]:
    """What a YAML file holds, read by PyYAML's C loader: some schemas have a megabyte."""
    text = file.read_text(encoding="utf-8")
    return [document for document in yaml.load_all(text, Loader=yaml.CSafeLoader) if document]


def answers(url: str) -> bool:
    """Whether a health endpoint says that all is well."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
