"""The commands for jobs that run elsewhere: in a Kubernetes cluster or on a Ray cluster.

`commands` holds names, options and help and imports nothing that takes time; `verbs` does what they say, over
`finetune_client.Client`; `tables` and `page` are how it is shown to people.
"""
