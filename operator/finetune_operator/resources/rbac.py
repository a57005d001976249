"""Who the trainers are to the API server: an account that may read and patch one ConfigMap, and nothing else."""

from __future__ import annotations

from finetune_operator import names
from finetune_operator.kinds import CONFIG_MAP, ROLE, ROLE_BINDING, SERVICE_ACCOUNT
from finetune_operator.resources.metadata import Document, Owner, child

__all__ = ["role", "role_binding", "service_account"]

_RBAC = "rbac.authorization.k8s.io"


def service_account(owner: Owner) -> Document:
    """The account of the job's pods. No pod gets its token unasked; those that report mount it (`resources.pods`)."""
    content = {"automountServiceAccountToken": False}
    return child(SERVICE_ACCOUNT, owner, names.trainer_account(owner.name), content)


def role(owner: Owner) -> Document:
    """What it may do: see and patch the job's own progress."""
    rule = {
        "apiGroups": [""],
        "resources": [CONFIG_MAP.plural],
        "resourceNames": [names.progress_config_map(owner.name)],
        "verbs": ["get", "patch"],
    }
    return child(ROLE, owner, names.trainer_account(owner.name), {"rules": [rule]})


def role_binding(owner: Owner) -> Document:
    """Gives the role to the account."""
    name = names.trainer_account(owner.name)
    subject = {"kind": SERVICE_ACCOUNT.name, "name": name, "namespace": owner.namespace}
    content = {"roleRef": {"apiGroup": _RBAC, "kind": ROLE.name, "name": name}, "subjects": [subject]}
    return child(ROLE_BINDING, owner, name, content)
