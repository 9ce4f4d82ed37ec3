"""Command line of `wavtokenizer convert`, `wavtokenizer checkpoints` and `python -m conversion.convert`."""

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from ..progress import shown_progress
from .published import PublishedCheckpoint, find, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `convert`."""
    add = parser.add_argument
    parser.epilog = (
        "No code in a checkpoint is executed. A folder appears only after it was compared with the checkpoint bit for "
        "bit. Exit codes: 0 success, 1 some checkpoints of --all failed, 2 the arguments or the checkpoint cannot be "
        "used."
    )
    add(
        "files",
        nargs="*",
        metavar="FILE",
        help="Lightning .ckpt of the reference implementation, or a state dict (.ckpt, .pt, .bin, .safetensors). "
        "Several files: parts of one checkpoint",
    )
    add(
        "--checkpoint",
        metavar="NAME",
        help="published checkpoint to download, or the one that FILE contains (see `wavtokenizer checkpoints`). It is "
        "verified against the known facts of that checkpoint. If only its rate is known, report and card say so",
    )
    add(
        "--all",
        action="store_true",
        help="convert every published checkpoint that is still on the Hub, each to its own folder in DIR",
    )
    add(
        "-o",
        "--output",
        metavar="DIR",
        required=True,
        help="folder for the converted model; it must not exist, or it must be empty",
    )
    add("--revision", help="branch, tag or commit of the checkpoint's repository on the Hub")
    add(
        "--config",
        metavar="YAML",
        help="YAML file that FILE was trained with. The shape is inferred from the tensors and compared with it. "
        "Its sampling rate replaces 24000 Hz",
    )
    add("--average", action="store_true", help="average the FILEs; they must be checkpoints of one training run")
    add(
        "--with-discriminators",
        action="store_true",
        help="write the discriminators to a second file, for fine-tuning",
    )
    add(
        "--push-to-hub",
        metavar="NAME",
        help="upload the folder to this Hub repository; with --all, NAME is the user or organization",
    )
    add(
        "--private",
        action="store_true",
        help="create the repository as private; an existing public repository is refused",
    )
    add("--create-pr", action="store_true", help="upload the files as a pull request")


def run(arguments: argparse.Namespace) -> tuple[list[dict], int]:
    """
    Run `convert` with the arguments of `add_arguments`.

    Returns:
        One dictionary per checkpoint, and the exit code: 0, or 1 if some checkpoints of `--all` failed. A dictionary
        has `checkpoint` if the name is known. It also has `output` and `codebook_fingerprint`, and `url` after an
        upload; or it has `error`; or it has the reason in `skipped`.

    Raises:
        ValueError: The arguments contradict each other, or the checkpoint cannot be converted.
        OSError: A file cannot be read, downloaded, written or uploaded.
    """
    from .push import check_logged_in

    _check_arguments(arguments)
    if arguments.push_to_hub is not None:
        check_logged_in()
    if not arguments.all:
        published = None if arguments.checkpoint is None else find(arguments.checkpoint)
        return [_convert(arguments, published, Path(arguments.output), arguments.push_to_hub)], 0
    results = []
    for name, published in table().items():
        if published.repository is None:
            results.append({"checkpoint": name, "skipped": "no longer on the Hub"})
            print(
                f"{name}: skipped: no longer on the Hub. `wavtokenizer convert FILE --checkpoint {name}` converts a "
                "copy that you have.",
                file=sys.stderr,
            )
            continue
        hub_name = None if arguments.push_to_hub is None else f"{arguments.push_to_hub}/wavtokenizer-{name}"
        try:
            results.append(_convert(arguments, published, Path(arguments.output, f"wavtokenizer-{name}"), hub_name))
        except (ValueError, OSError) as error:
            results.append({"checkpoint": name, "error": " ".join(str(error).split())})
            print(f"{name}: failed: {results[-1]['error']}", file=sys.stderr)
    return results, int(any("error" in result for result in results))


def _check_arguments(arguments: argparse.Namespace) -> None:
    if bool(arguments.files or arguments.checkpoint) == arguments.all:
        raise ValueError(
            "Got no checkpoint, or --all beside one. Give FILE, --checkpoint NAME or both, or --all alone."
        )
    if arguments.average and (len(arguments.files) < 2 or arguments.checkpoint):
        raise ValueError(
            "Got --average, expected several FILEs and no --checkpoint: the mean of checkpoints is none of them."
        )
    if arguments.files and arguments.revision is not None:
        raise ValueError("Got --revision for a file on this machine. Leave it out.")
    if arguments.all and (arguments.config is not None or arguments.revision is not None):
        raise ValueError("Got --config or --revision with --all. They belong to one checkpoint.")
    if arguments.push_to_hub is None and (arguments.private or arguments.create_pr):
        raise ValueError("Got --private or --create-pr without --push-to-hub NAME. Name the repository.")


def _convert(
    arguments: argparse.Namespace, published: PublishedCheckpoint | None, output: Path, hub_name: str | None
) -> dict:
    from .. import WavTokenizerConfig
    from .download import download
    from .from_original import convert
    from .push import push

    files = arguments.files if published is None else arguments.files or download(published, arguments.revision)
    with shown_progress("steps") as on_progress:
        folder = convert(
            files,
            output,
            arguments.config,
            arguments.with_discriminators,
            arguments.average,
            published,
            # so that running the same command again finishes the rest
            keep_existing=published is not None or hub_name is not None,
            on_progress=on_progress,
        )
    result: dict[str, str | None] = {} if published is None else {"checkpoint": published.name}
    result["output"] = str(folder)
    result["codebook_fingerprint"] = WavTokenizerConfig.from_pretrained(folder).codebook_fingerprint
    if hub_name is not None:
        result["url"] = push(folder, hub_name, arguments.private, arguments.create_pr)
        print(f"pushed to: {result['url']}")
    return result


def checkpoints_table(as_json: bool = False) -> str:
    """Return the published checkpoints as a table, or as JSON with one object per line."""
    if as_json:
        return "\n".join(json.dumps(asdict(published)) for published in table().values())
    rows = [("name", "codes/s", "trained on", "corpus", "repository", "file")]
    for published in table().values():
        repository = published.repository or "(no longer on the Hub)"
        rows.append(
            (published.name, str(published.frame_rate), published.domain, published.corpus, repository, published.file)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(argv: list[str] | None = None) -> int:
    """Run `python -m conversion.convert`. Return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert",
        description="Convert a checkpoint of the reference implementation to a folder that transformers loads.",
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))[1]
    except (ValueError, OSError) as error:
        with contextlib.suppress(BrokenPipeError):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
