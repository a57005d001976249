"""A real API server keeps the promises that the cluster in memory keeps: the same tests, over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from finetune_operator.cluster.connection import connect
from finetune_operator.cluster.kubernetes import KubernetesCluster
from finetune_operator.cluster.protocol import Cluster
from finetune_operator.runtime.limits import TokenBucket
from tests.cluster.server import Server
from tests.operator.cluster_promises import ClusterPromises, World

pytestmark = pytest.mark.control_plane


class TestApiServer(ClusterPromises):
    """What is proved of the one holds for the other."""

    @pytest.fixture
    def world(self, server: Server, namespace: str) -> World:
        @asynccontextmanager
        async def open_cluster() -> AsyncIterator[Cluster]:
            async with connect(server.kubeconfig) as connection:
                yield KubernetesCluster(connection, TokenBucket(1000, 1000))

        return World(open_cluster, namespace)
