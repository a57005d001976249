"""What the tests can build from Go modules: programs, and files that come with a program.

A table for tests.cluster.build, which knows how. Each folder of `wrappers/` is a Go module that names main
packages in tools.go and pins everything they are made of in go.mod and go.sum. To add a program: its main package
as a blank import in a wrapper's tools.go, `go mod tidy` there, and a row here.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FILES", "ON_DEMAND", "PROGRAMS", "ModuleFiles", "Program"]

_KUBERNETES = "1.34.4"


@dataclass(frozen=True)
class Program:
    """One program: which wrapper pins it, its main package, and flags for the linker."""

    name: str
    wrapper: str
    package: str
    linker_flags: str = ""


@dataclass(frozen=True)
class ModuleFiles:
    """Folders or files of one module, such as a program's CRDs, at the version that the wrapper pins."""

    name: str
    wrapper: str
    module: str
    paths: tuple[str, ...]


def _kubernetes(name: str, wrapper: str = "kubernetes") -> Program:
    """A program of Kubernetes; built from modules it does not know its version unless the linker tells it."""
    major, minor, _ = _KUBERNETES.split(".")
    stamp = {"gitVersion": f"v{_KUBERNETES}", "gitMajor": major, "gitMinor": minor}
    flags = " ".join(f"-X k8s.io/component-base/version.{key}={value}" for key, value in stamp.items())
    return Program(name, wrapper, f"k8s.io/kubernetes/cmd/{name}", flags)


PROGRAMS = {
    program.name: program
    for program in (
        Program("etcd", "etcd", "go.etcd.io/etcd/server/v3"),
        _kubernetes("kube-apiserver"),
        _kubernetes("kube-controller-manager"),
        _kubernetes("kube-scheduler"),
        _kubernetes("kubectl"),
        _kubernetes("kubelet", wrapper="node"),
        _kubernetes("kube-proxy", wrapper="node"),
        Program("coredns", "coredns", "github.com/coredns/coredns"),
        Program("kuberay", "kuberay", "github.com/ray-project/kuberay/ray-operator"),
        Program("helm", "helm", "helm.sh/helm/v4/cmd/helm"),
        Program("kwok", "kwok", "sigs.k8s.io/kwok/cmd/kwok"),
        Program("kueue", "kueue", "sigs.k8s.io/kueue/cmd/kueue"),
        Program("kube-network-policies", "netpol", "sigs.k8s.io/kube-network-policies/cmd"),
        Program("versitygw", "versitygw", "github.com/versity/versitygw/cmd/versitygw"),
        Program("kubeflow-trainer", "trainer", "github.com/kubeflow/trainer/v2/cmd/trainer-controller-manager"),
    )
}

FILES = {
    files.name: files
    for files in (
        ModuleFiles(
            "kuberay-manifests",
            "kuberay",
            "github.com/ray-project/kuberay/ray-operator",
            ("config/crd/bases", "config/rbac"),
        ),
        ModuleFiles(
            "kuberay-deployment",
            "kuberay",
            "github.com/ray-project/kuberay/ray-operator",
            ("config/crd", "config/rbac", "config/manager"),
        ),
        ModuleFiles("kwok-stages", "kwok", "sigs.k8s.io/kwok", ("kustomize/stage",)),
        ModuleFiles(
            "kueue-manifests",
            "kueue",
            "sigs.k8s.io/kueue",
            ("config/components/crd", "config/components/webhook", "config/components/rbac"),
        ),
        ModuleFiles(
            "kubeflow-trainer-manifests",
            "trainer",
            "github.com/kubeflow/trainer/v2",
            ("manifests/base",),
        ),
        ModuleFiles("jobset-manifests", "trainer", "sigs.k8s.io/jobset", ("config/components/crd/bases",)),
    )
}
"""They are copied out of Go's module cache, which anybody may clean."""

ON_DEMAND = frozenset(
    {
        *("jobset-manifests", "kubeflow-trainer", "kubeflow-trainer-manifests"),
        *("coredns", "kube-network-policies", "kube-proxy", "kubelet", "kuberay-deployment"),
    }
)
"""Not built unless asked for by name: only a benchmark needs the first, and only a cluster with nodes the others."""
