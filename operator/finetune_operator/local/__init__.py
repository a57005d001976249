"""The same machine as a cluster of its own: objects in memory (`cluster`), RayJobs as processes (`kubelet`).

`finetune run` works on it with the same passes as the operator in a real cluster; controller tests do too.
"""

from __future__ import annotations

from finetune_operator.local.cluster import LocalCluster

__all__ = ["LocalCluster"]
