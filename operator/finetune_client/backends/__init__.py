"""Where jobs run, one module each; `client` chooses one and imports no other."""
