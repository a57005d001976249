"""What a person does with checkpoints by hand: the verbs of `finetune ckpt`, each a function from a storage to a report
(`finetune_api.checkpoints`).

    choosing    `newest`, `200` or `0000000200-e00001` -> a checkpoint that is there
    activity    whether a run seems to be at work
    looking     ls, inspect
    verifying   verify
    comparing   diff, of what checkpoints say and of their values
    costs       plan: what each process would read to go on
    exporting   export
    importing   import
    upkeep      gc
    mending     repair
    pinning     pin, unpin

`python -m finetune_trainers.checkpoint.admin` calls them. Nothing here imports torch, but for formats of torch's and
DeepSpeed's; numpy only where values are compared.
"""
