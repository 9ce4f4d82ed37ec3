"""Auto classes and Hub folders, with and without this package imported.

test_native.py has the tests next to transformers' own WavTokenizer.
"""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioTokenization,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

import wavtokenizer_hf
from wavtokenizer_hf import (
    WavTokenizerConfig,
    WavTokenizerEncoderModel,
    WavTokenizerFeatureExtractor,
    WavTokenizerModel,
)


ROOT = Path(__file__).parent.parent

# config.json of the native model's published folders (75 tokens/s)
PORT_CONFIG = {
    "adanorm_num_embeddings": 4, "architectures": ["WavTokenizerModel"], "audio_channels": 1, "codebook_dim": 512,
    "codebook_size": 4096, "compress": 2, "decoder_attention_num_groups": 32, "decoder_hidden_size": 768,
    "decoder_intermediate_size": 2304, "decoder_num_layers": 12, "dilation_growth_rate": 2, "dtype": "float32",
    "hidden_size": 512, "kernel_size": 7, "last_kernel_size": 7, "model_type": "wavtokenizer", "norm_eps": 1e-06,
    "norm_type": "weight_norm", "num_filters": 32, "num_lstm_layers": 2, "num_residual_layers": 1,
    "pad_mode": "reflect", "residual_kernel_size": 3, "sampling_rate": 24000, "transformers_version": "5.9.0.dev0",
    "upsampling_ratios": [8, 5, 4, 2], "use_causal_conv": False, "use_conv_shortcut": True,
}  # fmt: skip


@pytest.fixture
def saved(tiny_model, tmp_path):
    """Return a folder with a tiny model and its feature extractor, written by save_pretrained."""
    tiny_model.save_pretrained(tmp_path / "saved")
    WavTokenizerFeatureExtractor(hop_length=16).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def run_without_the_package(code: str, tmp_path: Path, **names) -> str:
    """Run code in a process where `import wavtokenizer_hf` raises. Return its output."""
    blocked = "import sys\nsys.modules['wavtokenizer_hf'] = None\n"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    process = subprocess.run(
        [sys.executable, "-c", blocked + textwrap.dedent(code), json.dumps({k: str(v) for k, v in names.items()})],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_auto_classes_return_our_classes_when_the_package_is_imported(saved):
    assert type(AutoConfig.from_pretrained(saved)) is WavTokenizerConfig
    assert type(AutoModel.from_pretrained(saved)) is WavTokenizerModel
    assert type(AutoModelForAudioTokenization.from_pretrained(saved)) is WavTokenizerModel
    assert type(AutoFeatureExtractor.from_pretrained(saved)) is WavTokenizerFeatureExtractor


def test_text_pipelines_and_tokenizers_are_refused_with_an_alternative(saved):
    for load in (
        lambda: pipeline("feature-extraction", model=str(saved)),
        lambda: AutoTokenizer.from_pretrained(saved),
    ):
        with pytest.raises(
            ValueError, match=r"has no text tokenizer.* use AutoFeatureExtractor, AutoModel and model.encode"
        ):
            load()


def test_auto_processor_returns_the_feature_extractor(saved, tmp_path):
    """
    AutoProcessor tries a tokenizer first and continues after its error. Without the package it uses the folder's
    class.
    """
    assert type(AutoProcessor.from_pretrained(saved)) is WavTokenizerFeatureExtractor
    printed = run_without_the_package(
        """
        import json
        from transformers import AutoProcessor
        processor = AutoProcessor.from_pretrained(json.loads(sys.argv[1])["saved"], trust_remote_code=True)
        print(type(processor).__module__.split(".")[0], type(processor).__name__, processor.hop_length)
        """,
        tmp_path,
        saved=saved,
    )
    assert printed.split() == ["transformers_modules", "WavTokenizerFeatureExtractor", "16"]


def test_every_auto_map_value_is_a_string(saved):
    config = json.loads((saved / "config.json").read_text())["auto_map"]
    extractor = json.loads((saved / "preprocessor_config.json").read_text())["auto_map"]
    model = "modeling_wavtokenizer.WavTokenizerModel"
    assert config == {
        "AutoConfig": "configuration_wavtokenizer.WavTokenizerConfig",
        "AutoModel": model,
        "AutoModelForAudioTokenization": model,
    }
    assert extractor == {"AutoFeatureExtractor": "feature_extraction_wavtokenizer.WavTokenizerFeatureExtractor"}


def test_an_encoder_folder_does_not_load_as_a_whole_model(tiny_model, tmp_path):
    tiny_model.encoder_model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModel"] == "modeling_wavtokenizer.WavTokenizerEncoderModel"
    assert "AutoModelForAudioTokenization" not in auto_map


def test_remote_code_gives_the_same_codes_also_after_saving_again(saved, tiny_model, tmp_path):
    audio = torch.randn(1, 1, 400)
    expected = tiny_model(audio)
    np.save(tmp_path / "audio.npy", audio.numpy())
    tiny_model.encoder_model.save_pretrained(tmp_path / "encoder")
    run_without_the_package(
        """
        import json, numpy as np, torch
        from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization
        names = json.loads(sys.argv[1])
        audio = np.load(names["audio"])
        folder = names["saved"]
        encoder = AutoModel.from_pretrained(names["encoder"], trust_remote_code=True).eval()
        assert type(encoder).__module__.startswith("transformers_modules"), type(encoder)
        assert type(encoder.config).__name__ == "WavTokenizerEncoderConfig", type(encoder.config)
        np.save(names["encoder"] + "/codes.npy", encoder.encode(torch.from_numpy(audio)).audio_codes)
        for times in ("first", "second"):  # load remotely, save, load what was saved, save that
            config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
            model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
            extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
            other = AutoModelForAudioTokenization.from_pretrained(folder, trust_remote_code=True)
            assert type(model).__module__.startswith("transformers_modules"), type(model)
            assert type(other).__name__ == "WavTokenizerModel" and type(config).__name__ == "WavTokenizerConfig"
            with torch.no_grad():
                output = model(**extractor(audio[0, 0], sampling_rate=24000, return_tensors="pt"))
            folder = names["again"] + times
            model.save_pretrained(folder)
            extractor.save_pretrained(folder)
            np.savez(folder + "/output.npz", codes=output.audio_codes, audio=output.audio_values)
        """,
        tmp_path,
        audio=tmp_path / "audio.npy",
        saved=saved,
        encoder=tmp_path / "encoder",
        again=tmp_path / "again_",
    )
    np.testing.assert_array_equal(np.load(tmp_path / "encoder" / "codes.npy"), expected.audio_codes.numpy())
    for times in ("first", "second"):
        output = np.load(tmp_path / f"again_{times}" / "output.npz")
        np.testing.assert_array_equal(output["codes"], expected.audio_codes.numpy())
        np.testing.assert_array_equal(output["audio"], expected.audio_values.detach().numpy())
        for file, keys in (("config.json", 3), ("preprocessor_config.json", 1)):
            auto_map = json.loads((tmp_path / f"again_{times}" / file).read_text())["auto_map"]
            assert len(auto_map) == keys and all(isinstance(value, str) for value in auto_map.values())
    assert len(expected.audio_codes.unique()) > 5
    again = AutoModel.from_pretrained(tmp_path / "again_second")  # and back in a process with the package
    assert torch.equal(again.encode(audio).audio_codes, expected.audio_codes)


def test_code_files_are_copied_unchanged(saved):
    for name in ("configuration", "modeling", "feature_extraction"):
        file = f"{name}_wavtokenizer.py"
        assert (saved / file).read_bytes() == (ROOT / "wavtokenizer_hf" / file).read_bytes()


def test_the_package_imports_twice_and_next_to_a_future_auto_class(saved):
    """
    AutoAudioProcessor is planned to replace AutoFeatureExtractor. Here a stub records what is registered with it.
    """
    code = """
        import sys, importlib, transformers
        registered = []
        class AutoAudioProcessor:
            def register(*arguments, exist_ok=False):
                registered.append((*arguments, exist_ok))
        transformers.AutoAudioProcessor = AutoAudioProcessor
        import wavtokenizer_hf
        importlib.reload(wavtokenizer_hf)
        expected = (wavtokenizer_hf.WavTokenizerConfig, wavtokenizer_hf.WavTokenizerFeatureExtractor, True)
        assert registered.count(expected) == 2, registered
        config = transformers.AutoConfig.for_model("wavtokenizer")
        assert type(config) is wavtokenizer_hf.WavTokenizerConfig, type(config)
        extractor = transformers.AutoFeatureExtractor.from_pretrained(sys.argv[1])
        assert type(extractor) is wavtokenizer_hf.WavTokenizerFeatureExtractor, type(extractor)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(saved)], check=True, cwd=ROOT)


def test_a_folder_of_the_transformers_port_loads_without_missing_or_unexpected_keys(folders, models, tmp_path):
    """
    The test builds the port's config.json, and derives its tensor names from the reference names as its converter
    does.
    """
    from build_checkpoint import state_dict
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in state_dict(75).items():
        if ".encodec.decoder." in name or name == "head.istft.window":
            continue
        for reference_part, port_part in (
            ("feature_extractor.encodec.encoder.model.", "encoder_model.encoder.layers."),
            ("feature_extractor.encodec.quantizer.vq.layers.0._codebook.", "encoder_model.quantizer.codebook."),
            (".conv.conv.weight_g", ".conv.parametrizations.weight.original0"),
            (".conv.conv.weight_v", ".conv.parametrizations.weight.original1"),
            (".conv.conv.bias", ".conv.bias"),
            ("head.out.", "head.linear."),
        ):
            name = name.replace(reference_part, port_part)
        tensors[name] = tensor
    (tmp_path / "config.json").write_text(json.dumps(PORT_CONFIG))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    audio = 0.1 * torch.randn(1, 1, 4000)
    assert torch.equal(model.encode(audio).audio_codes, models(75).encode(audio).audio_codes)

    # the port reads our folders: the same fields and the same tensor names
    ours = json.loads((folders(75) / "config.json").read_text())
    assert {key: ours[key] for key in PORT_CONFIG if key != "transformers_version"} == {
        key: value for key, value in PORT_CONFIG.items() if key != "transformers_version"
    }
    assert load_file(folders(75) / "model.safetensors").keys() == tensors.keys()


def test_every_loaded_tensor_equals_the_one_in_the_file(saved):
    model, info = WavTokenizerModel.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values()), info
    file = load_file(saved / "model.safetensors")
    assert file.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, file[name]), name


@pytest.mark.parametrize("device", ["cuda:99", "xpu:99"])
def test_a_missing_default_device_is_named_with_a_remedy(saved, device):
    torch.set_default_device(device)
    try:
        for load in (WavTokenizerModel.from_pretrained, AutoModel.from_pretrained):
            with pytest.raises(
                ValueError, match=rf"'{device}' as torch's default device.*set_default_device\('cpu'\)"
            ):
                load(saved)
        assert WavTokenizerModel.from_pretrained(saved, device_map="cpu").device.type == "cpu"
    finally:
        torch.set_default_device(None)


def test_audio_after_loading_equals_that_of_the_model_in_memory(saved, tiny_model):
    codes = torch.randint(0, 64, (1, 1, 30))
    loaded = WavTokenizerModel.from_pretrained(saved).eval()
    assert torch.equal(loaded.decode(codes).audio_values, tiny_model.decode(codes).audio_values)


@pytest.mark.parametrize("model_class", [WavTokenizerModel, WavTokenizerEncoderModel])
def test_every_model_input_is_a_parameter_of_forward(model_class):
    names = WavTokenizerFeatureExtractor.model_input_names
    assert set(names) <= set(inspect.signature(model_class.forward).parameters)
    assert model_class.main_input_name == names[0]


def test_public_names():
    assert set(wavtokenizer_hf.__all__) == {
        "DecoderState",
        "EncoderState",
        "WavTokenizerConfig",
        "WavTokenizerDecoderOutput",
        "WavTokenizerEncoderConfig",
        "WavTokenizerEncoderModel",
        "WavTokenizerEncoderOutput",
        "WavTokenizerFeatureExtractor",
        "WavTokenizerModel",
        "WavTokenizerOutput",
        "bundled_model",
        "upgrade",
    }
