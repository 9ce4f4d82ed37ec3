"""`wavtokenizer export`: write token folders as training files for language models."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from ..progress import shown_progress
from .arguments import Commands, add_command, print_facts


if TYPE_CHECKING:
    from ..export.formats import Format
    from ..export.run import ExportResult
    from ..export.sequences import Sequences
    from ..export.token_folder import TokenFolder


FORMATS = ("megatron", "webdataset", "jsonl", "lhotse")
KINDS = ("audio", "text-to-audio", "audio-to-text", "both", "interleaved")
_MEGATRON_OPTIONS = (
    "tokenizer", "vocabulary", "sequences", "text_column", "prompt", "response", "max_length", "pack", "pad_token_id",
    "loss_mask", "ids_type",
)  # fmt: skip


def add(commands: Commands) -> None:
    export = add_command(
        commands,
        "export",
        _export,
        "Runs are resumable: after a crash, run the same command again. The files do not depend on the number of "
        "processes, and no model is needed. Needs the extra `bulk`, and `lhotse` for that format.",
        example="tokens/ --format webdataset -o shards/",
    )
    export.add_argument("tokens", metavar="TOKENS", help="folder that `wavtokenizer tokenize` wrote")
    export.add_argument("--format", required=True, choices=FORMATS, help="format of the files")
    export.add_argument("-o", "--output", required=True, help="folder for the files (created if missing)")
    export.add_argument(
        "--num-processes", type=int, default=1, metavar="N", help="number of worker processes (default: 1)"
    )
    export.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="fail: stop at the first row that cannot be exported (default). skip: list such rows in skipped.jsonl",
    )
    export.add_argument(
        "--dry-run", action="store_true", help="print the size of the export and the expected time; write nothing"
    )
    export.add_argument(
        "--shard-size",
        type=float,
        metavar="MIB",
        help="approximate size of a shard in MiB (default: 256); not for megatron, which has one file",
    )
    megatron = export.add_argument_group(
        "options of megatron", "One of --tokenizer and --vocabulary is needed: they map codes to token ids."
    )
    megatron.add_argument(
        "--tokenizer", metavar="NAME", help="tokenizer saved with an AudioVocabulary: folder, or name on the Hub"
    )
    megatron.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="JSON file of an AudioVocabulary, such as vocabulary.json of an earlier export; for sequences without "
        "text",
    )
    megatron.add_argument(
        "--sequences",
        choices=KINDS,
        help="content of a sequence. audio: codes of one clip (default). text-to-audio, audio-to-text: text and codes "
        "of one clip, in this order. both: one sequence of each. interleaved: all clips of a source_id in the order "
        "of clip_num, each with its text before it",
    )
    megatron.add_argument("--text-column", metavar="NAME", help="column of the text (default: text, if it exists)")
    megatron.add_argument(
        "--prompt",
        metavar="TEMPLATE",
        help="custom template, see llm.Template: the part without loss. {audio} and {NAME} stand for the codes and "
        "for the text in column NAME",
    )
    megatron.add_argument(
        "--response", metavar="TEMPLATE", help="custom template: the part with loss, such as '{audio}</s>'"
    )
    megatron.add_argument(
        "--max-length", type=int, metavar="N", help="longest sequence, in ids; a longer row cannot be exported"
    )
    megatron.add_argument(
        "--pack",
        type=int,
        metavar="LENGTH",
        help="pack whole sequences to exactly this length, with padding at the end",
    )
    megatron.add_argument(
        "--pad-token-id", type=int, metavar="ID", help="id of the padding of --pack (default: that of the tokenizer)"
    )
    megatron.add_argument("--loss-mask", action="store_true", default=None, help="also write loss_mask.bin and .idx")
    megatron.add_argument(
        "--ids-type",
        choices=("uint16", "int32"),
        help="type of the ids (default: the smaller type that holds the vocabulary)",
    )


def _export(arguments: argparse.Namespace) -> int:
    from ..export.run import estimate, export_tokens
    from ..export.token_folder import TokenFolder

    folder = TokenFolder(arguments.tokens)
    format = _format(arguments, folder)
    if not folder.complete:
        print(f"{arguments.tokens} is not complete: some clips of its source have no rows yet.", file=sys.stderr)
    if arguments.dry_run:
        total, seconds = estimate(arguments.tokens, format)
        print_facts({**_facts(total, folder), "seconds_of_one_process": round(seconds, 1)}, arguments.json)
        return 0

    with shown_progress("chunks") as show:
        total = export_tokens(
            arguments.tokens, arguments.output, format, arguments.num_processes, arguments.on_error, show
        )
    print_facts({"output": arguments.output, **_facts(total, folder)}, arguments.json)
    if total.num_skipped:
        print(
            f"wavtokenizer export: {total.num_skipped} rows were skipped; skipped.jsonl has the reasons",
            file=sys.stderr,
        )
    return 1 if total.num_skipped else 0


def _facts(total: "ExportResult", folder: "TokenFolder") -> dict[str, Any]:
    return {
        "clips": total.num_clips,
        "hours": total.num_samples / folder.sampling_rate / 3600,
        "codes": total.num_codes,
        "sequences": total.num_sequences,
        "ids": total.num_ids,
        "mib": total.num_bytes / 2**20,
        "rows_skipped": total.num_skipped,
    }


def _format(arguments: argparse.Namespace, folder: "TokenFolder") -> "Format":
    from ..export import formats

    if arguments.format == "megatron":
        if arguments.shard_size is not None:
            raise ValueError("Got --shard-size for megatron, which has one file. Leave it out.")
        return formats.MegatronFormat(_sequences(arguments, folder), bool(arguments.loss_mask), arguments.ids_type)
    if given := [name for name in _MEGATRON_OPTIONS if getattr(arguments, name) is not None]:
        raise ValueError(
            f"Got --{given[0].replace('_', '-')} for {arguments.format}, which holds codes, not token ids. Leave it "
            "out."
        )
    kind = {"webdataset": formats.WebDatasetFormat, "jsonl": formats.JsonlFormat, "lhotse": formats.LhotseFormat}
    size = {} if arguments.shard_size is None else {"shard_size": int(arguments.shard_size * 2**20)}
    return kind[arguments.format](**size)


def _sequences(arguments: argparse.Namespace, folder: "TokenFolder") -> "Sequences":
    from ..export.sequences import Sequences, load_vocabulary
    from ..llm import AudioVocabulary, Template

    if (arguments.tokenizer is None) == (arguments.vocabulary is None):
        raise ValueError("Megatron files need the ids of a language model. Give one of --tokenizer and --vocabulary.")
    tokenizer = None
    if arguments.tokenizer is not None:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        except (OSError, ValueError) as error:
            raise ValueError(f"Cannot load the tokenizer {arguments.tokenizer!r}: {error}") from error
        vocabulary = AudioVocabulary.from_tokenizer(tokenizer)
    else:
        vocabulary = load_vocabulary(arguments.vocabulary)
    template = None
    if arguments.prompt is not None or arguments.response is not None:
        template = Template(arguments.prompt or "", arguments.response or "")
    text_column = arguments.text_column or ("text" if "text" in folder.column_names else None)
    kind = arguments.sequences or "audio"
    if text_column is None and kind not in ("audio", "interleaved"):
        text_column = "text"  # `Sequences` reports that it is missing
    pad_token_id = arguments.pad_token_id
    if arguments.pack is not None and pad_token_id is None:
        pad_token_id = getattr(tokenizer, "pad_token_id", None)
    return Sequences(
        kind, vocabulary, tokenizer, text_column, template, arguments.max_length, arguments.pack, pad_token_id
    )
