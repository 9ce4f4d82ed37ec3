"""Add the tokens of the codes to a tokenizer, and store their ids in it."""

from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING, Any

from .mapping import CodeMapping


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEY = "audio_vocabulary"  # in tokenizer_config.json


class AudioVocabulary(CodeMapping):
    """
    Range of a language model's token ids for the codes of one codebook: code c is token id `first_token_id` + c.

    `add_to` adds such a range to a tokenizer. `from_tokenizer` reads the range that a tokenizer was saved with. The
    range is fixed: tokens that are added to the tokenizer later are not audio.

    Args:
        first_token_id: Token id of code 0.
        codebook_size: Number of codes, K.
        begin_token_id, end_token_id: Ids of the boundary tokens around a span of audio. None for a model without them.
        codebook_fingerprint: Fingerprint of the codebook. None: not checked.
        token_format: Text of a code, with `{}` for its number.
        begin_token, end_token: Text of the boundary tokens.

    Raises:
        ValueError: The range starts below 0 or is empty. Only one boundary token is given, both are the same, or one
            lies inside the range. `token_format` does not contain exactly one `{}`.
    """

    @classmethod
    def add_to(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        codebook_size: int,
        codebook_fingerprint: str | None = None,
        model: "PreTrainedModel | None" = None,
        pad_to_multiple_of: int | None = None,
        token_format: str = CodeMapping.token_format,
        begin_token: str = CodeMapping.begin_token,
        end_token: str = CodeMapping.end_token,
    ) -> "AudioVocabulary":
        """
        Add the codes and two boundary tokens to a tokenizer, and rows for them to a model. Both are changed in place.

        The tokenizer never splits these tokens. They are not special tokens, since `decode(...,
        skip_special_tokens=True)` drops special tokens.

        New rows of the embeddings and of the output layer are the mean of the existing rows, so the probabilities of
        existing tokens change little. Existing rows do not change. Spare rows beyond the tokenizer's ids are used
        first, and a matrix never shrinks. With DeepSpeed ZeRO-3, call this before the model is partitioned.

        Args:
            tokenizer: Tokenizer of transformers. Save it afterwards, since it stores the vocabulary.
            codebook_size: Number of codes, `codec.config.codebook_size`.
            codebook_fingerprint: Fingerprint of the codebook, `codec.codebook_fingerprint`. None: not checked.
            model: Language model with this tokenizer. None if it is created later, with `len(tokenizer)` tokens.
            pad_to_multiple_of: Round the number of rows up to a multiple of this, which is faster on GPUs.
            token_format: Text of a code, with `{}` for its number.
            begin_token, end_token: Text of the two boundary tokens.

        Returns:
            The new `AudioVocabulary`, which the tokenizer stores too.

        Raises:
            ValueError: The tokenizer has an audio vocabulary or such tokens already, or does not give them consecutive
                ids. The model has fewer rows than its tokenizer has ids, or its embeddings are not in memory.
        """
        from transformers import AddedToken

        if KEY in tokenizer.init_kwargs:
            raise ValueError(
                "The tokenizer has an audio vocabulary already, and can have one only. Read it with "
                "AudioVocabulary.from_tokenizer, or load the tokenizer again, from files without audio tokens."
            )
        tokens = [token_format.format(code) for code in range(codebook_size)]
        vocabulary = tokenizer.get_vocab()
        known = [token for token in (*tokens, begin_token, end_token) if token in vocabulary]
        if known:
            raise ValueError(
                f"The tokenizer has the token {known[0]!r} (id {vocabulary[known[0]]}) already. If these are the "
                "codes, describe them: AudioVocabulary(first_token_id=..., codebook_size=...).attach(tokenizer). If "
                "not, choose another token_format, begin_token or end_token."
            )
        first_new_id = max(vocabulary.values(), default=-1) + 1
        if model is not None:
            from .resizing import add_embeddings, check_embeddings

            check_embeddings(model, first_new_id)
        new_tokens = [*tokens, begin_token, end_token]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new_tokens])
        ids: Any = tokenizer.convert_tokens_to_ids(new_tokens)  # a list, since new_tokens is a list
        first, *_, begin, end = ids
        if ids != list(range(first_new_id, first_new_id + len(new_tokens))):
            raise ValueError(
                f"The tokenizer gave the new tokens ids from {min(ids)} to {max(ids)}, expected {len(new_tokens)} "
                f"consecutive ids from {first_new_id}. This tokenizer object is changed now: load it again, and "
                "describe a range of free ids."
            )
        added = cls(
            first, codebook_size, begin, end, codebook_fingerprint, token_format, begin_token, end_token
        )  # fmt: skip
        added.attach(tokenizer)
        if model is not None:
            add_embeddings(model, first_new_id, first_new_id + len(new_tokens), pad_to_multiple_of)
        return added

    def attach(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """
        Store this vocabulary in a tokenizer. `save_pretrained` writes it to tokenizer_config.json.

        Raises:
            ValueError: The tokenizer has other tokens at these ids, splits them, or stores another vocabulary.
        """
        stored = tokenizer.init_kwargs.get(KEY, asdict(self))
        if stored != asdict(self):
            raise ValueError(f"The tokenizer remembers another audio vocabulary: {stored}. Load it again without it.")
        expected = [self.token_format.format(code) for code in range(self.codebook_size)]
        if self.has_boundary_tokens:
            expected += [self.begin_token, self.end_token]
        found = tokenizer.convert_ids_to_tokens(self.token_ids)
        for token_id, token, expected_token in zip(self.token_ids, found, expected, strict=True):
            if token != expected_token:
                raise ValueError(
                    f"The tokenizer has the token {token!r} at id {token_id}, expected {expected_token!r}. Correct "
                    "first_token_id, token_format, or the boundary tokens and their ids, or load the tokenizer of "
                    "that model."
                )
        first_and_last = [0, self.codebook_size - 1]
        if (
            tokenizer(self.codes_to_text(first_and_last), add_special_tokens=False)["input_ids"]
            != self.codes_to_ids(first_and_last).tolist()
        ):
            raise ValueError(
                f"The tokenizer splits {expected[0]!r}, expected a single id, as for an added token. Add the tokens "
                "with AudioVocabulary.add_to."
            )
        tokenizer.init_kwargs[KEY] = asdict(self)

    @classmethod
    def from_tokenizer(cls, tokenizer: "PreTrainedTokenizerBase") -> "AudioVocabulary":
        """
        Return the vocabulary that a tokenizer stores. Raises ValueError if it stores none, or a damaged one.
        """
        content: Any = tokenizer.init_kwargs.get(KEY)
        if content is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} remembers no audio vocabulary. Add one with "
                "AudioVocabulary.add_to, or describe its audio tokens: AudioVocabulary(first_token_id=..., "
                "codebook_size=...)."
            )
        unknown = set(content) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(
                f"The tokenizer's audio vocabulary has the unknown field {min(unknown)!r}. Update wavtokenizer_hf."
            )
        missing = {field.name for field in fields(cls) if field.default is MISSING} - set(content)
        if missing:
            raise ValueError(
                f"The tokenizer's audio vocabulary has no field {min(missing)!r}. Load the tokenizer again from where "
                "it was saved, or restore its tokenizer_config.json."
            )
        return cls(**content)

    def check_model(self, model: "PreTrainedModel", writes: bool = True) -> None:
        """
        Raise ValueError if the language model has too few embeddings for the audio tokens.

        With `writes`, also raise it for too few outputs. Some models read audio but write text only: Apertus 1.5 has
        outputs for text tokens only.
        """
        from .resizing import num_tokens

        num_needed = max(self.token_ids) + 1
        modules = [("embeddings", model.get_input_embeddings())]
        if writes:
            modules.append(("outputs", model.get_output_embeddings()))
        for name, module in modules:
            if module is not None and num_tokens(module) < num_needed:
                raise ValueError(
                    f"The model has {name} for {num_tokens(module)} tokens, and the audio vocabulary needs "
                    f"{num_needed}. model.resize_token_embeddings({num_needed}) makes them, to be trained."
                )


APERTUS_1_5 = AudioVocabulary(
    first_token_id=262344,
    codebook_size=4096,
    begin_token_id=131080,
    end_token_id=131081,
    token_format="<|audio token {}|>",
    begin_token="<|audio_start|>",
    end_token="<|audio_end|>",
)
"""The audio vocabulary of Apertus 1.5, from tokenizer_config.json of github.com/swiss-ai/apertus-omni-tokenizer."""
