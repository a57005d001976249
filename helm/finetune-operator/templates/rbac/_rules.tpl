{{- /* What the operator may do with the jobs of a namespace. A verb is here because some line of the operator uses it. */ -}}
{{- define "finetune-operator.jobRules" -}}
- apiGroups: [finetune-operator.io]
  resources: [finetunejobs]
  verbs: [get, list, watch, delete]
- apiGroups: [finetune-operator.io]
  resources: [finetunejobs/status]
  verbs: [update]
# Children block the deletion of their job; some clusters let only those say so who may set the job's finalizers.
- apiGroups: [finetune-operator.io]
  resources: [finetunejobs/finalizers]
  verbs: [update]
- apiGroups: [ray.io]
  resources: [rayjobs]
  verbs: [get, list, watch, create, delete]
# Nobody can grant what they do not have: a trainer may get and patch the ConfigMap of its own progress.
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [events]
  verbs: [create, patch]
# These are created once, and go with the job that owns them.
- apiGroups: [""]
  resources: [serviceaccounts]
  verbs: [get, create]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles, rolebindings]
  verbs: [get, create]
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, create]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, create]
{{- end -}}

{{- define "finetune-operator.runtimeRules" -}}
- apiGroups: [finetune-operator.io]
  resources: [finetuneruntimes]
  verbs: [list, watch]
{{- end -}}

{{- define "finetune-operator.subjects" -}}
- kind: ServiceAccount
  name: {{ include "finetune-operator.serviceAccountName" . }}
  namespace: {{ .Release.Namespace }}
{{- end -}}
