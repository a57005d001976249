"""The only code under `checkpoint` that touches a disk or an object store.

protocol    what a storage is, in a dozen verbs
errors      what can go wrong with one
disk        the system calls that a POSIX storage needs, so that a test can fail each of them
posix       a folder: a disk, a PersistentVolumeClaim, NFS
objects     a bucket: S3 and what speaks like it, GCS
multiparts  uploads to a bucket that were never completed
resilient   any storage, with retries
overlay     any storage, with changes that are remembered and never made
opening     a URI -> a storage that is ready to use
"""
