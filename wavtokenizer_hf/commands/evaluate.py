"""`wavtokenizer evaluate`: measure the quality of reconstructions."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic_files import refuse_inputs
from ..audio_errors import check_channel
from ..find_files import SUFFIXES
from ..model_names import find_model
from .arguments import Commands, add_channel, add_command, add_model, load_model
from .files import find_sources
from .token_folders import DecodedTokens


if TYPE_CHECKING:
    from ..evaluation import Model
    from ..evaluation.run import System


def add(commands: Commands) -> None:
    evaluate = add_command(
        commands,
        "evaluate",
        _evaluate,
        "Encodes and decodes each file with MODEL and compares the result with the file. Prints means with 95 % "
        "intervals. With --compare or --decoded it also prints the differences, paired by file. Files that cannot be "
        "read and metrics that cannot be computed are listed with the reason and left out of the means. Needs the "
        "extra `evaluation`.",
        example="-m bundled --audio clips/ -o report/",
    )
    evaluate.add_argument(
        "--audio", nargs="+", required=True, metavar="INPUT", help="audio files, or folders to search for them"
    )
    add_model(evaluate, required=False)
    add_channel(evaluate)
    evaluate.add_argument("--compare", metavar="MODEL", help="second model, measured on the same files")
    evaluate.add_argument(
        "--tokens",
        metavar="FOLDER",
        help="token folder that `wavtokenizer tokenize` made of INPUT: measure its tokens, decoded by MODEL, instead "
        "of encoding again",
    )
    evaluate.add_argument(
        "--decoded",
        metavar="FOLDER",
        help="output of any other codec: folder of audio files with the names and subfolders of INPUT, in any format",
    )
    evaluate.add_argument(
        "-o",
        "--output",
        metavar="FOLDER",
        help="folder for report.json, files.csv, metrics.png, codebook.png, and worst.md with the ten worst clips to "
        "hear",
    )
    evaluate.add_argument(
        "--preset",
        default="quick",
        metavar="NAME",
        help="set of metrics: quick (default), paper (the table of the paper: utmos, pesq_wb, stoi, voicing_f1), or "
        "full",
    )
    evaluate.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="compute only these metrics: pesq_wb, stoi, estoi, si_sdr, mel_distance, stft_distance, mcd, visqol, "
        "f0_error, voicing_f1, dnsmos, speaker_similarity, word_error_rate, utmos. One that cannot run here is an "
        "error",
    )
    evaluate.add_argument(
        "--crepe",
        default="full",
        metavar="SIZE",
        help="size of CREPE, the pitch tracker of f0_error and voicing_f1: full (default, as in the paper) or tiny "
        "(about fifty times as fast on a CPU)",
    )
    evaluate.add_argument(
        "--asr",
        metavar="MODEL",
        help="speech recognizer of word_error_rate: name or folder for transformers' pipeline (default: pocketsphinx, "
        "for English)",
    )
    evaluate.add_argument(
        "--utmos",
        metavar="FILE",
        help="TorchScript file of UTMOS, which takes float32 audio (1, samples) at 16 kHz and returns one number. "
        "Without it UTMOS is reported as not run",
    )
    evaluate.add_argument(
        "--num-workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="worker processes for the metrics (default: one per core; 0: none). Results do not depend on it",
    )


def _model(arguments: argparse.Namespace) -> "Model":
    from ..evaluation import Model
    from ..loading import load_feature_extractor, target_peak

    model = load_model(arguments, allow_exported=False)
    extractor = load_feature_extractor(arguments.model, arguments.revision, model.config)
    return Model(arguments.model, model, target_peak(extractor))


def _evaluate(arguments: argparse.Namespace) -> int:
    if arguments.num_workers < 0:
        raise ValueError(f"Got --num-workers {arguments.num_workers}, expected 0 or more.")
    check_channel(arguments.channel)
    references = find_sources(arguments.audio, SUFFIXES)
    for name, revision in ((arguments.model, arguments.revision), (arguments.compare, None)):
        if name is not None:
            find_model(name, revision)

    from ..evaluation import DecodedFolder, evaluate
    from ..evaluation.report import REPORT_FILES

    if arguments.output is not None:
        inputs = [file for file, _ in references]
        inputs += Path(arguments.decoded).rglob("*") if arguments.decoded is not None else []
        outputs = [Path(arguments.output, name) for name in REPORT_FILES]
        refuse_inputs([*outputs, *Path(arguments.output, "worst").glob("*.wav")], inputs)
    models = [
        _model(argparse.Namespace(**{**vars(arguments), "model": name, "revision": revision}))
        for name, revision in ((arguments.model, arguments.revision), (arguments.compare, None))
        if name is not None
    ]
    systems: list[System] = [*models]
    if arguments.tokens is not None:
        if arguments.model is None:
            raise ValueError(f"Got the tokens {arguments.tokens} and no model to decode them. Give --model.")
        systems[0] = DecodedTokens(arguments.tokens, models[0].model)
    if arguments.decoded is not None:
        systems.append(DecodedFolder(arguments.decoded))
    if not systems:
        raise ValueError("Got nothing to measure. Give --model, --decoded, or both.")
    if arguments.output is not None:  # fails before the work if the folder cannot be created
        Path(arguments.output).mkdir(parents=True, exist_ok=True)
    report = evaluate(
        references,
        systems,
        metrics=arguments.metrics,
        utmos_weights=arguments.utmos,
        num_workers=min(arguments.num_workers, len(references)),
        progress=True,
        channel=arguments.channel,
        crepe=arguments.crepe,
        asr=arguments.asr,
        preset=arguments.preset,
    )
    written = [] if arguments.output is None else report.save(arguments.output)
    if arguments.json:
        print(json.dumps(report.to_dict(), allow_nan=False))
    else:
        print(report.table())
        print(*(f"wrote {path}" for path in written), sep="\n", end="\n" if written else "")
    for failure in report.failures:
        names = ", ".join(failure["metrics"])
        print(f"{failure['file']}: {failure['system']}: {names}: {failure['reason']}", file=sys.stderr)
    return 1 if report.failures else 0
