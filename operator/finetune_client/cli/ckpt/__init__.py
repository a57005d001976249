"""`finetune ckpt`: looking after checkpoints, wherever they are.

    commands   names, options and help
    verbs      what each command does: a request, its answer, and how that is shown
    places     what a person calls a place -> its URI, the rules that hold there, and the lock of the run
    asking     starts the trainers' side, follows it, and brings its answer
    tables     answers for people

The trainers' package does the work, in a process of its own without torch. `commands` imports nothing that takes time.
"""
