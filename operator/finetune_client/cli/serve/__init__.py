"""`finetune serve`: a trained model behind an OpenAI-compatible endpoint, on this machine.

    commands   names, options and help
    verb       starts the server, says how to use it, and ends it
    sources    what a person calls a model -> its folder

`finetune_client.serving` holds the server's process, and the trainers' package does the work. `commands` imports
nothing that takes time.
"""
