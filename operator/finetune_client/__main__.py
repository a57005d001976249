"""`python -m finetune_client` is the `finetune` command, where no script of that name is on the PATH: in our images."""

from finetune_client.cli import main

main()
