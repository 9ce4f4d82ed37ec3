"""`wavtokenizer export`: tokens to the files that language models are trained from."""


def add(commands) -> None:
    pass
