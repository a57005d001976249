"""`finetune data`: preference data from people, from an AI judge, and the answers that they compare.

    commands   names, options and help
    verbs      what each command does: a request, its answer, and how that is shown
    asking     starts the trainers' side, follows it, and brings its answer

The trainers' package does the work, in a process of its own. `commands` imports nothing that takes time.
"""
