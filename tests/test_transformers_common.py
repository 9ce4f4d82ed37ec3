"""transformers' common tests, which every model in transformers must pass, run on our classes.

The mixins are only in transformers' source archive, not in the package that pip installs. `make test` unpacks them
into the environment. So the installed version of transformers decides which tests exist.
"""

import sys
import tempfile
import types
import unittest
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import tiny_config
from transformers import initialization as init
from transformers.testing_utils import torch_device

from wavtokenizer_hf import WavTokenizerEncoderModel, WavTokenizerFeatureExtractor, WavTokenizerModel


if not (Path(sys.prefix) / "transformers_tests" / "test_modeling_common.py").is_file():
    pytest.skip(
        f"transformers' common tests are not in {sys.prefix}/transformers_tests; `make test` puts them there",
        allow_module_level=True,
    )
sys.path.append(sys.prefix)  # last, so that no file in the environment's root can hide a real package


def _stand_in(module_name: str, class_name: str) -> None:
    module = types.ModuleType(module_name)
    setattr(module, class_name, type(class_name, (), {}))
    sys.modules.setdefault(module_name, module)


# The source archive has the files of transformers' tests folder but not its sub-folders. test_modeling_common.py
# imports a class from each of these two (transformers 5.23.0). Empty classes suffice: the first would add tests of
# torch.export, and the second is only looked up among the bases of models that have generate().
_stand_in("transformers_tests.exporters.test_export", "ExportTesterMixin")
_stand_in("transformers_tests.generation.test_utils", "GenerationTesterMixin")

from transformers_tests import test_modeling_common
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_sequence_feature_extraction_common import (
    SequenceFeatureExtractionTestMixin,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """
    Use one thread: tensors of this size gain nothing from a second, and on busy cores threads wait for each other. Two
    runs at once on two cores took 20 s each with one thread and 190 s each with two.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class ModelTester:
    """The mixin's model tester: a tiny config, and a batch of noise whose second row is padded."""

    batch_size = 2
    is_training = False  # the models compute no loss

    def prepare_config_and_inputs_for_common(self):
        config = tiny_config()
        num_samples = 10 * config.hop_length + 5  # so that the last frame is not full
        padding_mask = torch.ones(self.batch_size, num_samples, dtype=torch.int32, device=torch_device)
        padding_mask[1, -40:] = 0
        # Loud, since an untrained codebook gives all audio in [-1, 1] the same code.
        noise = torch.randn(self.batch_size, 1, num_samples, generator=torch.Generator().manual_seed(0))
        input_values = (100 * noise).to(torch_device)
        return config, {"input_values": input_values, "padding_mask": padding_mask}


class CommonModelTests(ModelTesterMixin):
    test_resize_embeddings = False  # no text embeddings
    # The mixin runs one test only on models whose files carry a copyright line of 2023 or later; ours carry none.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = ModelTester()
        # Some tests cover only base models, and look them up in this table of transformers' own models. Without our
        # names they would pass without testing anything.
        ours = {"wavtokenizer": ("WavTokenizerModel", "WavTokenizerEncoderModel")}
        names = patch.object(
            test_modeling_common, "MODEL_MAPPING_NAMES", {**test_modeling_common.MODEL_MAPPING_NAMES, **ours}
        )
        names.start()
        self.addCleanup(names.stop)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        # Some tests request these of every model, even where they compare something else.
        inputs_dict = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        return {k: v for k, v in inputs_dict.items() if k not in ("output_hidden_states", "output_attentions")}

    def test_inputs_give_more_than_one_code(self):
        # Not a test of the mixin: if all codes were equal, its comparisons of outputs would prove little.
        for model_class in self.all_model_classes:
            config, inputs_dict = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(config).to(torch_device).eval()
            with torch.no_grad():
                self.assertGreater(model(**inputs_dict).audio_codes.unique().numel(), 1)

    def test_init_weights_can_init_buffers(self):
        # The mixin treats buffers as constants and expects those of the constructor. Ours are constant except for the
        # codebook, which is random. Here it is initialised with zeros, and must still be written.
        with patch.object(init, "kaiming_uniform_", lambda tensor, **kwargs: init.zeros_(tensor)):
            super().test_init_weights_can_init_buffers()

    def test_model_outputs_equivalence(self):
        # The mixin's own version subtracts the two outputs for its message even if they agree. torch refuses that for
        # a boolean mask. It also requests hidden states.
        for model_class in self.all_model_classes:
            config, inputs_dict = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(config).to(torch_device).eval()
            with torch.no_grad():
                as_tuple = model(**inputs_dict, output_latents=True, return_dict=False)
                as_dict = model(**inputs_dict, output_latents=True, return_dict=True)
            self.assertIsInstance(as_tuple, tuple)
            self.assertEqual(len(as_tuple), len(as_dict.to_tuple()))
            for from_tuple, from_dict in zip(as_tuple, as_dict.to_tuple(), strict=True):
                torch.testing.assert_close(from_tuple, from_dict, rtol=0, atol=0)

    @unittest.skip("The input is a waveform: there is no table of input embeddings to get or set.")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip("The outputs of the models have no hidden_states; output_latents returns the encoder's output.")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("The outputs of the models have neither hidden_states nor attentions.")
    def test_retain_grad_hidden_states_attentions(self):
        pass


class WavTokenizerModelTest(CommonModelTests, unittest.TestCase):
    all_model_classes = (WavTokenizerModel,)
    has_attentions = True  # one block of the backbone, so eager and sdpa are compared

    @unittest.skip("The output of the model has no attentions.")
    def test_attention_outputs(self):
        pass

    def test_an_encoders_folder_is_refused(self):
        # Two of the mixin's tests load the base model's folder into the whole model, whose other weights are then
        # random. We refuse that, since a random decoder generates noise.
        with tempfile.TemporaryDirectory() as folder:
            WavTokenizerEncoderModel(tiny_config().encoder_config).save_pretrained(folder)
            with self.assertRaisesRegex(ValueError, "holds an encoder only"):
                WavTokenizerModel.from_pretrained(folder)

    @unittest.skip("See test_an_encoders_folder_is_refused.")
    def test_base_model_prefix_loads_base_weights(self):
        pass

    @unittest.skip("See test_an_encoders_folder_is_refused.")
    def test_correct_missing_keys(self):
        pass


class WavTokenizerEncoderModelTest(CommonModelTests, unittest.TestCase):
    all_model_classes = (WavTokenizerEncoderModel,)
    has_attentions = False  # convolutions and an LSTM


# ---------------------------------------------------------------------------------------------------------------------
# Feature extractor
# ---------------------------------------------------------------------------------------------------------------------


class FeatureExtractionTester:
    """The mixin's feature extraction tester: arguments, and clips of growing length."""

    batch_size = 4
    feature_size = 1
    min_seq_length = 400
    seq_length_diff = 300
    max_seq_length = min_seq_length + (batch_size - 1) * seq_length_diff

    def prepare_feat_extract_dict(self):
        return {
            "feature_size": self.feature_size,
            "sampling_rate": 24000,
            "padding_value": 0.0,
            "hop_length": 320,
            "normalize_audio": True,
            "target_peak_dB_FS": -6.0,
        }

    def prepare_inputs_for_common(self, equal_length=False, numpify=False):
        lengths = range(self.min_seq_length, self.max_seq_length + 1, self.seq_length_diff)
        random = np.random.default_rng(0)
        clips = [random.random(self.max_seq_length if equal_length else n, dtype=np.float32) for n in lengths]
        return clips if numpify else [clip.tolist() for clip in clips]


class WavTokenizerFeatureExtractorTest(SequenceFeatureExtractionTestMixin, unittest.TestCase):
    feature_extraction_class = WavTokenizerFeatureExtractor

    def setUp(self):
        self.feat_extract_tester = FeatureExtractionTester()
