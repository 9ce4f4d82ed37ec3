"""Run `wavtokenizer convert` from the root of the repository: `python -m conversion.convert`."""

if __name__ == "__main__":
    import sys

    from wavtokenizer_hf.conversion.command import main

    sys.exit(main())
