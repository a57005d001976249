"""From the job's data sources to the batches that a worker trains on.

    sources ─▶ readers ─▶ formats ─▶ template ─▶ tokenize ─▶ packing ─▶ cache      (driver, once: prepare)
                                                                          │
                                                       order ─▶ batches ◀─┘        (every worker)

Nothing is imported here: the launcher asks for `prepare`, the workers for `order` and `batches`, and the code
that checks models for `template`, each without paying for the others.
"""
