"""`wavtokenizer tokenize`: encode a corpus to Parquet files."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from ..bulk.options import TokenizeOptions
from ..find_files import describe_passed_over
from ..model_names import find_torch_model
from ..progress import shown_progress
from .arguments import (
    MODEL_HELP,
    REVISION_HELP,
    Commands,
    UsageError,
    add_channel,
    add_command,
    add_peak,
    print_facts,
    quiet_transformers,
)


def add(commands: Commands) -> None:
    tokenize = add_command(
        commands,
        "tokenize",
        _tokenize,
        "After a crash, or when clips were added to SOURCE, run the same command again. A clip that cannot be read is "
        "listed in failures.jsonl with the reason. The rows do not depend on the number of processes or on the "
        "batches. Needs the extra `bulk`.",
        example="corpus/ -m bundled -o tokens/",
    )
    tokenize.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="folder of audio files, tar shards or Parquet files, or a glob of them in quotes; list of paths (.txt, "
        "or .csv or .jsonl with further columns); dataset on disk, or its name on the Hub",
    )
    tokenize.add_argument("-m", "--model", help=MODEL_HELP)
    tokenize.add_argument("--revision", help=REVISION_HELP)
    tokenize.add_argument(
        "-o", "--output", help="folder for the Parquet files (created if missing; resumes an earlier run)"
    )
    tokenize.add_argument(
        "--column",
        metavar="NAME",
        help="column of the audio, or of the paths in a list (default: audio, and in lists also path or file_name)",
    )
    tokenize.add_argument("--dataset-config", metavar="NAME", help="configuration of a dataset on the Hub")
    tokenize.add_argument(
        "--dataset-revision", metavar="REVISION", help="branch, tag or commit of a dataset on the Hub (default: main)"
    )
    tokenize.add_argument("--split", metavar="NAME", help="split of a dataset (default: train)")
    tokenize.add_argument(
        "--device", help="device of the models: cpu, cuda, cuda:1 (default: one GPU per process, or the CPU)"
    )
    tokenize.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="number of worker processes (default: one per GPU; on CPU, one per two cores; 2 with Ray)",
    )
    tokenize.add_argument(
        "--num-readers",
        type=int,
        metavar="N",
        help="threads per process that read and resample audio ahead (default: its share of the cores)",
    )
    tokenize.add_argument(
        "--batch-seconds",
        type=float,
        default=120,
        metavar="SECONDS",
        help="seconds of audio per batch, padding included (default: 120). Memory grows with it",
    )
    tokenize.add_argument(
        "--part-size",
        type=int,
        metavar="N",
        help="clips per Parquet file (default: up to 2000). A crash costs at most one unfinished file per process",
    )
    tokenize.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="encode only shard I of N, from 0 (default: 0/1, all clips). All shards may write to one OUTPUT at once",
    )
    tokenize.add_argument(
        "--on-error",
        choices=("record", "fail"),
        default="record",
        help="record: list clips that fail and continue (default). fail: stop at the first one",
    )
    add_channel(tokenize)
    add_peak(tokenize)
    tokenize.add_argument(
        "--max-clip-seconds",
        type=float,
        default=21600,
        metavar="SECONDS",
        help="longest clip; longer ones fail (default: 21600, 6 hours)",
    )
    tokenize.add_argument(
        "--tar-names",
        choices=("ending", "webdataset"),
        default="ending",
        help="where names in tar shards are split. ending: before the extension of the audio file (default). "
        "webdataset: at the first dot, as WebDataset does",
    )
    tokenize.add_argument("--retry-failed", action="store_true", help="try clips again that failed in earlier runs")
    tokenize.add_argument(
        "--refresh",
        action="store_true",
        help="encode clips again if the size or time of their file changed. Without this option they are only counted",
    )
    tokenize.add_argument(
        "--verify",
        metavar="OUTPUT",
        help="only check the OUTPUT of an earlier run (checksums, schema, codes, totals); takes no other argument. "
        "Problems are printed one per line, with exit code 1",
    )
    tokenize.add_argument(
        "--engine",
        choices=("processes", "ray"),
        default="processes",
        help="processes: run on this machine (default). ray: run on a Ray cluster",
    )
    tokenize.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="address of a Ray cluster, or auto (default: start Ray on this machine)",
    )
    tokenize.add_argument(
        "--dry-run",
        action="store_true",
        help="print the number of clips, hours, tokens, sizes and the expected time, estimated from a sample of the "
        "clips; write nothing",
    )
    tokenize.add_argument(
        "--push-to-hub", metavar="NAME", help="upload OUTPUT to this dataset on the Hub after the last clip"
    )
    tokenize.add_argument(
        "--license",
        metavar="NAME",
        help="licence for the dataset card, by its name on the Hub, such as cc-by-4.0 (default: that of the source's "
        "card)",
    )
    tokenize.add_argument(
        "--language",
        nargs="+",
        metavar="CODE",
        help="language codes for the dataset card, such as en (default: those of the source's card)",
    )


def _tokenize(arguments: argparse.Namespace) -> int:
    if arguments.verify is not None:
        return _verify(arguments)
    if arguments.model is None:
        raise UsageError("Got no --model. Name one; -m bundled is the small model of this package.")
    if arguments.source is None or (arguments.output is None and not arguments.dry_run):
        raise UsageError("Got no SOURCE or no --output. Both are needed, or --verify OUTPUT alone.")
    options = _options(arguments)
    find_torch_model(arguments.model, arguments.revision)
    quiet_transformers()
    if arguments.dry_run:
        from ..bulk.dry_run import estimate

        with shown_progress("clips") as show:
            facts = estimate(arguments.source, arguments.model, options, show)
        print_facts(facts, arguments.json)
        return 0

    from ..bulk import tokenize

    result = tokenize(arguments.source, arguments.model, arguments.output, options, progress=True)
    facts = {
        "output": arguments.output,
        "clips": result.total.num_clips,
        "clips_done_now": result.done_now.num_clips,
        "clips_failed": len(result.failures),
        "clips_with_warnings": result.total.num_warned,
        "clips_changed": len(result.changed),
        "clips_without_source": len(result.without_source),
        "files_passed_over": len(result.passed_over),
        "silent": len(result.silent),
        "hours": result.total.num_samples / result.sampling_rate / 3600,
        "tokens": result.total.num_codes,
        "hours_per_hour": result.done_now.num_samples / result.sampling_rate / result.seconds,
    }
    print_facts(facts, arguments.json)
    for clip, failure in list(result.failures.items())[:10]:
        print(f"{clip}: failed: {failure.kind}: {failure.reason}", file=sys.stderr)
    if result.failures:
        print(
            f"wavtokenizer tokenize: {len(result.failures)} clips failed; all of them are in "
            f"{Path(arguments.output, 'failures.jsonl')}",
            file=sys.stderr,
        )
    if result.changed:
        action = "encoded again" if arguments.refresh else "their rows are kept; --refresh encodes them again"
        print(
            f"wavtokenizer tokenize: clips whose file changed: {_summarize_ids(result.changed)}, {action}",
            file=sys.stderr,
        )
    if result.without_source:
        print(
            f"wavtokenizer tokenize: clips that are no longer in the source: {_summarize_ids(result.without_source)}",
            file=sys.stderr,
        )
    if result.passed_over:
        print(f"wavtokenizer tokenize: {describe_passed_over(result.passed_over)}", file=sys.stderr)
    print(
        f"wavtokenizer tokenize: {result.total.num_clips} clips have rows ({result.total.num_warned} of them with "
        f"warnings), {len(result.failures)} have a reason, {len(result.silent)} silent",
        file=sys.stderr,
    )
    return 1 if result.failures or result.silent else 0


def _options(arguments: argparse.Namespace) -> TokenizeOptions:
    index, slash, number = arguments.shard.partition("/")
    if not (slash and index.isdecimal() and number.isdecimal()):
        raise UsageError(f"Got --shard {arguments.shard}, expected I/N, for example 0/8.")
    names = {field.name for field in fields(TokenizeOptions)} - {"shard"}
    return TokenizeOptions(shard=(int(index), int(number)), **{name: getattr(arguments, name) for name in names})


def _verify(arguments: argparse.Namespace) -> int:
    if any(value is not None for value in (arguments.source, arguments.model, arguments.output)):
        raise UsageError("Got SOURCE, --model or --output with --verify OUTPUT, which takes no other argument.")

    from ..bulk import verify

    result = verify(arguments.verify)
    facts = {
        "output": arguments.verify,
        "files": result.num_files,
        "clips": result.total.num_clips,
        "clips_failed": result.total.num_failures,
        "tokens": result.total.num_codes,
        "problems": len(result.problems),
    }
    print_facts(facts, arguments.json)
    for problem in result.problems:
        print(problem, file=sys.stderr)
    return 1 if result.problems else 0


def _summarize_ids(ids: list[str]) -> str:
    """Return the number of ids, and the first one."""
    return f"{len(ids)} ({ids[0]}{', …' if len(ids) > 1 else ''})"
