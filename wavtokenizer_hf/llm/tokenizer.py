"""The codes in a tokenizer: adding their tokens, and storing which ids they have."""

from dataclasses import MISSING, asdict, fields
from typing import TYPE_CHECKING, Any

from .mapping import CodeMapping


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEY = "audio_vocabulary"  # in tokenizer_config.json


class AudioVocabulary(CodeMapping):
    """
    Range of a language model's vocabulary that holds the codes of one codebook: code c is token id `first_token_id` +
    c.

    Tokens that are added to the tokenizer later are no audio. `add_to` makes a vocabulary by adding tokens to a
    tokenizer; `from_tokenizer` reads the one that a tokenizer was saved with.

    Args:
        first_token_id: Token id of code 0.
        codebook_size: Number of codes, K.
        begin_token_id, end_token_id: Ids of the boundary tokens around a span of audio. None for a model without them.
        codebook_fingerprint: Fingerprint of the codebook of the codes. None: not checked.
        token_format: Text of a code, with `{}` for its number.
        begin_token, end_token: Text of the boundary tokens.

    Raises:
        ValueError: A range that starts below 0 or is empty; one boundary token alone, the same twice, or one inside
            the range; a `token_format` without `{}`.
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

        The tokens are never split. They are no special tokens, which `decode(..., skip_special_tokens=True)` would
        drop.

        New rows of the embeddings and of the output layer are the mean of the old rows, so the model's earlier output
        stays about as likely. Old rows do not change. Rows beyond the tokenizer's ids are used first, and a matrix
        never shrinks. With DeepSpeed ZeRO-3, call this before the model is partitioned.

        Args:
            tokenizer: Tokenizer of transformers. Save it afterwards: it stores the vocabulary.
            codebook_size: Number of codes, `codec.config.codebook_size`.
            codebook_fingerprint: Fingerprint of the codebook, `codec.codebook_fingerprint`. None: not checked.
            model: Language model with this tokenizer. None if it will be made later, with `len(tokenizer)` tokens.
            pad_to_multiple_of: Round the number of rows up to a multiple of this, which GPUs compute faster with.
            token_format: Text of a code, with `{}` for its number.
            begin_token, end_token: Text of the two boundary tokens.

        Returns:
            The new `AudioVocabulary`, which the tokenizer stores too.

        Raises:
            ValueError: the tokenizer has an audio vocabulary or such tokens already, or does not give them consecutive
                ids; the model has fewer rows than its tokenizer has ids, or its weights are not here.
        """
        from transformers import AddedToken

        if KEY in tokenizer.init_kwargs:
            raise ValueError(
                "The tokenizer has an audio vocabulary already, and can have one only. Take it with "
                "AudioVocabulary.from_tokenizer, or load the tokenizer anew, as it was without audio."
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
        num_old = max(vocabulary.values(), default=-1) + 1
        if model is not None:
            from .resizing import add_embeddings, check_embeddings

            check_embeddings(model, num_old)
        every = [*tokens, begin_token, end_token]
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in every])
        ids: Any = tokenizer.convert_tokens_to_ids(every)  # a list for a list
        first, *_, begin, end = ids
        if ids != list(range(num_old, num_old + len(every))):
            raise ValueError(
                f"The tokenizer gave the new tokens ids from {min(ids)} to {max(ids)}, expected {len(every)} "
                f"consecutive ids from {num_old}. Load it anew, for it is changed now, and describe a range that is "
                "free."
            )
        new = cls(
            first, codebook_size, begin, end, codebook_fingerprint, token_format, begin_token, end_token
        )  # fmt: skip
        new.attach(tokenizer)
        if model is not None:
            add_embeddings(model, num_old, num_old + len(every), pad_to_multiple_of)
        return new

    def attach(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """
        Store this vocabulary in a tokenizer. `save_pretrained` writes it to tokenizer_config.json.

        Raises:
            ValueError: The tokenizer has other tokens at these ids, splits them, or stores another vocabulary.
        """
        before = tokenizer.init_kwargs.get(KEY, asdict(self))
        if before != asdict(self):
            raise ValueError(f"The tokenizer remembers another audio vocabulary: {before}. Load it anew without it.")
        expected = [self.token_format.format(code) for code in range(self.codebook_size)]
        if self.has_boundary_tokens:
            expected += [self.begin_token, self.end_token]
        got = tokenizer.convert_ids_to_tokens(self.token_ids)
        for token_id, token, name in zip(self.token_ids, got, expected, strict=True):
            if token != name:
                raise ValueError(
                    f"The tokenizer has the token {token!r} at id {token_id}, expected {name!r}. Correct "
                    "first_token_id, token_format, or the boundary tokens and their ids, or take the tokenizer of "
                    "that model."
                )
        ends = [0, self.codebook_size - 1]
        if (
            tokenizer(self.codes_to_text(ends), add_special_tokens=False)["input_ids"]
            != self.codes_to_ids(ends).tolist()
        ):
            raise ValueError(
                f"The tokenizer splits {expected[0]!r}, expected one id, as of an added token. Add the tokens with "
                "AudioVocabulary.add_to."
            )
        tokenizer.init_kwargs[KEY] = asdict(self)

    @classmethod
    def from_tokenizer(cls, tokenizer: "PreTrainedTokenizerBase") -> "AudioVocabulary":
        """
        Return the vocabulary that a tokenizer stores. Raises ValueError if it stores none, or one that is damaged.
        """
        content: Any = tokenizer.init_kwargs.get(KEY)
        if content is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} remembers no audio vocabulary. Make one with "
                "AudioVocabulary.add_to, or describe what it has: AudioVocabulary(first_token_id=..., "
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
                f"The tokenizer's audio vocabulary has no field {min(missing)!r}. Load the tokenizer anew from where "
                "it was saved, or make its tokenizer_config.json whole again."
            )
        return cls(**content)

    def check_model(self, model: "PreTrainedModel", writes: bool = True) -> None:
        """
        Raise ValueError if the language model has too few embeddings for the audio or, if it `writes` audio, too few
        outputs.

        A model may read more tokens than it writes: Apertus 1.5 has outputs for text only.
        """
        from .resizing import num_tokens

        largest = max(self.token_ids)
        parts = [("embeddings", model.get_input_embeddings())]
        if writes:
            parts.append(("outputs", model.get_output_embeddings()))
        for name, module in parts:
            if module is not None and num_tokens(module) <= largest:
                raise ValueError(
                    f"The model has {name} for {num_tokens(module)} tokens, and the audio vocabulary needs "
                    f"{largest + 1}. model.resize_token_embeddings({largest + 1}) makes them, to be trained."
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
"""The layout of Apertus 1.5, as tokenizer_config.json in github.com/swiss-ai/apertus-omni-tokenizer has it."""
