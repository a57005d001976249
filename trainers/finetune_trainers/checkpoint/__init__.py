"""Checkpoints: verified bytes, or nothing.

    layout            what everything in a run's folder is called                                   pure
    slices            who holds which elements of a tensor, and which bytes to read for others      pure
    documents         canonical JSON with a version and a digest                                    pure
    manifest          what a checkpoint is made of, as models                                       pure
    assembly          whether intent and receipts make a checkpoint                                 pure
    safetensors_file  the header of a file that is written as a stream                              pure
    shards            the bytes of one rank's files: header, slices, digests                        pure
    retention         which checkpoints stay                                                        pure
    storage/          the only code that touches a disk or an object store
    fence             which attempt may publish
    staging           memory that a trainer shares with its writer
    writer_protocol   what the two tell each other                                                  pure
    flushes           the trainer's side: copies, and listens
    writer            the process that writes, beyond its trainer's death if need be
    orphans           a new attempt waits for the writers of an earlier one
    write             one rank's shards, auxiliary files and receipt
    pins              a person's word that a checkpoint stays
    listing           the folders of a run, as one listing has them
    commit            receipts of all ranks -> MANIFEST.json
    verify            is every byte what the manifest says
    find              the newest checkpoint that is whole
    reading           slices for any rank of any world size, verified as they are read
    sweep             deleting what retention does not keep, and what dead attempts left
    exports/          written for others: Hugging Face, PEFT, torch DCP, DeepSpeed
    imports/          checkpoints of torch DCP and DeepSpeed made checkpoints of ours
    identity          whether a checkpoint is one of this very training                              pure
    folders           a folder that checkpoints share, as blobs
    admin/            what a person does with checkpoints by hand: the verbs of `finetune ckpt`
    engine_state      the only code that knows where torch and DeepSpeed keep the state of a training

A checkpoint exists when its MANIFEST.json exists. That file is written last and never over another one, so a crash
at any moment leaves either no checkpoint or a whole one. Nothing here is pickled, and no rank needs another
one to write its part. `finetune_trainers.saving` uses all this in a running training.
"""
