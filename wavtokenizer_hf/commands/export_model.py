"""`wavtokenizer export-model`: export a model to ONNX files."""

import argparse

from ..model_names import find_torch_model
from ..progress import shown_progress
from .arguments import MODEL_HELP, REVISION_HELP, Commands, add_command, print_facts, quiet_transformers


FORMATS = ("onnx",)
DTYPES = ("float32", "float16", "int8")


def add(commands: Commands) -> None:
    export = add_command(
        commands,
        "export-model",
        _export_model,
        "Writes encoder.onnx, encoder_stream.onnx, decoder.onnx, and wavtokenizer_onnx.py, which runs them with "
        "onnxruntime. The folder appears only after its output was compared with the model's, on audio of one sample "
        "to 30 s. The encoder is always float32. Needs the extra `onnx`.",
        example="bundled -o onnx-model/",
    )
    export.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    export.add_argument("--revision", help=REVISION_HELP)
    export.add_argument("--format", choices=FORMATS, default="onnx", help="format of the files (default: onnx)")
    export.add_argument("-o", "--output", required=True, help="folder for the files; must not exist, or be empty")
    export.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="data type in which the decoder's weights are stored (default: float32); it computes in float32. float16 "
        "and int8 give smaller files and less exact audio: the SNR is measured and printed",
    )
    export.add_argument(
        "--quantize",
        choices=("int8",),
        help="compute the decoder's matrix products in 8-bit integers: faster on a CPU, less exact. The SNR is "
        "printed",
    )


def _export_model(arguments: argparse.Namespace) -> int:
    find_torch_model(arguments.model, arguments.revision)
    quiet_transformers()

    from .. import WavTokenizerModel, loading
    from ..export import export_onnx

    model = loading.load_model(WavTokenizerModel, arguments.model, arguments.revision)
    with shown_progress("steps") as show:
        report = export_onnx(
            model.float(), arguments.output, arguments.model, arguments.dtype, arguments.quantize, show
        )
    facts = {
        "output": arguments.output,
        "codebook_fingerprint": model.codebook_fingerprint,
        "codes_compared": report.num_codes,
        "near_ties": report.num_near_ties,
        "max_audio_difference": report.max_audio_difference,
        "snr_db": round(report.snr, 1),
        **{f"{name}_mib": round(size / 2**20, 1) for name, size in report.sizes.items()},
    }
    print_facts(facts, arguments.json)
    return 0
