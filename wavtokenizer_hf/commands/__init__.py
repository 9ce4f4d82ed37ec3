"""The commands of `wavtokenizer`, a module each with `add` for its arguments; arguments.py and files.py hold what they share."""
