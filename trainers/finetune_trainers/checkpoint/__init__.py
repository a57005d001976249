"""Checkpoints: verified bytes, or nothing.

    layout      what everything in a run's folder is called                                         pure
    slices      who holds which elements of a tensor, and which bytes to read for others            pure
    manifest    what a checkpoint is made of, as versioned models in canonical JSON                 pure
    shards      the bytes of one rank's file: header, slices, digests                               pure
    storage/    the only code that touches a disk or an object store
    fence       which attempt may publish
    write       one rank's shards, auxiliary files and receipt
    commit      receipts of all ranks -> MANIFEST.json
    verify      is every byte what the manifest says
    find        the newest checkpoint that is whole
    reading     slices for any rank of any world size, verified as they are read
    retention   which checkpoints stay                                                              pure
    sweep       deleting the others

A checkpoint exists when its MANIFEST.json exists. That file is written last and never over another one, so a crash
at any moment leaves either no checkpoint or a whole one. Nothing here is pickled, and no rank waits for another one
while it saves.
"""
