"""Text to token ids and back, through the checkpoint's own tokenizer; dummy checkpoints get one made on the spot."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from backend.config import DEMO, DEMO_CHECKPOINT
from backend.engine.detokenizer import TokenPieces, byte_alphabet
from backend.errors import ConfigError, InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DUMMY_PREFIX = "dummy:"
#: Files of which a checkpoint folder needs one to have a fast tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
#: Normal forms make at most so many characters of one (U+FDFA in NFKC).
_NORMALIZED_GROWTH = 18
EOS_TOKEN = "<|endoftext|>"
_SPECIAL_TOKENS = (EOS_TOKEN, "<|im_start|>", "<|im_end|>", "<|pad|>")
_SYLLABLES = ["".join(pair) for pair in itertools.product("bdfghjklmnprstvz", "aeiou")]


class Tokenizer:
    """A fast (Rust) tokenizer with the few operations that serving needs. Thread-safe."""

    def __init__(
        self, backend: tokenizers.Tokenizer, eos_token_ids: Sequence[int], chat: PreTrainedTokenizerFast | None = None
    ) -> None:
        """Wrap `backend`; `eos_token_ids` end a text, the tokenizer's own first; `chat` renders chat templates."""
        self._backend = backend
        self._chat = chat
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        #: One more than the highest token id.
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._growth = 1 if backend.normalizer is None else _NORMALIZED_GROWTH
        self._num_special = backend.num_special_tokens_to_add(False)

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, if the checkpoint names one."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @cached_property
    def pieces(self) -> TokenPieces:
        """What each token contributes to a text, for Detokenizer."""
        return TokenPieces(self._backend)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the tokens that the checkpoint puts around a text (Mixtral's <s>) unless told otherwise."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def most_tokens(self, text: str) -> int:
        """So many tokens, or fewer, `encode` will find: no token stands for less than a byte."""
        num_bytes = len(text) if text.isascii() else 4 * len(text)
        return num_bytes * self._growth + self._num_special

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @property
    def chat_template(self) -> str:
        """The checkpoint's chat template; empty if it has none."""
        return str(self._chat.chat_template or "") if self._chat is not None else ""

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages ({"role", "content"}) as a prompt that asks for the assistant's answer.

        Without `add_generation_prompt` the last message is the answer's beginning and stays open. The template writes special
        tokens itself: encode the result with add_special_tokens=False.
        """
        if self._chat is None or not self._chat.chat_template:
            raise InvalidRequestError("this checkpoint's tokenizer has no chat template: send a plain prompt")
        try:
            return self._chat.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        except Exception as error:  # a template is a program of the checkpoint's author and may raise anything
            raise InvalidRequestError(f"the checkpoint's chat template refuses these messages: {error}") from error


def load_tokenizer(checkpoint: str, vocab_size: int | None) -> Tokenizer:
    """The tokenizer of a checkpoint folder, of `demo`, or one made on the spot for `dummy:SHAPE`.

    Args:
        checkpoint: as in EngineConfig.
        vocab_size: the model's vocabulary, which bounds the tokenizer's ids; needed for a dummy.

    Raises:
        ConfigError: there is no usable tokenizer in the folder, or it belongs to another model.
    """
    if checkpoint.startswith(DUMMY_PREFIX):
        if vocab_size is None:
            raise ConfigError(f"the tokenizer of {checkpoint} needs the model's vocabulary size")
        backend = synthetic_backend(vocab_size)
        return Tokenizer(backend, [backend.token_to_id(EOS_TOKEN)])
    folder = DEMO_CHECKPOINT if checkpoint == DEMO else Path(checkpoint)
    if not folder.is_dir():
        raise ConfigError(
            f"parameter checkpoint: there is no folder {checkpoint}; give a Hugging Face checkpoint folder"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"parameter checkpoint: {checkpoint} has no tokenizer ({', '.join(TOKENIZER_FILES)}); copy the tokenizer "
            "files of the model into it"
        )
    chat = _load_fast(folder)
    tokenizer = Tokenizer(chat.backend_tokenizer, _eos_token_ids(folder, chat.eos_token_id), chat)
    try:
        _ = tokenizer.pieces
    except ConfigError as error:
        raise ConfigError(f"parameter checkpoint: {checkpoint}: {error}") from None
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"parameter checkpoint: wrong tokenizer in {checkpoint}: its ids go up to {tokenizer.vocab_size - 1}, but "
            f"the model's vocabulary has {vocab_size} tokens; copy the tokenizer files of this model into the folder"
        )
    return tokenizer


def _load_fast(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer  # here because it takes a second, which dummy checkpoints need not wait

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True, trust_remote_code=False)
    except Exception as error:  # broken files surface as whatever the parser in charge raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"parameter checkpoint: the tokenizer in {folder} cannot be read ({reason[:300]}); copy the tokenizer "
            "files of the model into the folder again"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"parameter checkpoint: the tokenizer in {folder} has no fast version; add a tokenizer.json "
            "(save_pretrained of the converted tokenizer writes it)"
        )
    return tokenizer


def _eos_token_ids(folder: Path, own: int | None) -> list[int]:
    """The tokenizer's end-of-text token and those that the model's generation settings add (chat models have two)."""
    found = [] if own is None else [own]
    for name in ("generation_config.json", "config.json"):
        try:
            named = json.loads((folder / name).read_text("utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue  # these files are optional here; the model's loader reports a broken config.json
        found += named if isinstance(named, list) else [named] if named is not None else []
    return [token for token in found if isinstance(token, int)]


def synthetic_backend(vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE without merges: ids 0 … 255 are bytes, then special tokens, then made-up words (" kato").

    Any text round-trips; a made-up word is one token, other text one token per byte.
    """
    if vocab_size < 256 + len(_SPECIAL_TOKENS):
        raise ConfigError(
            f"a dummy checkpoint needs a vocabulary of at least {256 + len(_SPECIAL_TOKENS)} tokens (bytes and special "
            f"tokens), got {vocab_size}"
        )
    characters = byte_alphabet()
    space = characters[ord(" ")]
    vocab = {token: token_id for token_id, token in enumerate((*characters, *_SPECIAL_TOKENS))}
    first = len(vocab)
    vocab.update((space + word, first + i) for i, word in enumerate(_words(vocab_size - first)))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS])
    return backend


def _words(count: int) -> Iterator[str]:
    """`count` different words, those of two syllables first, neighbours unlike each other."""
    base = len(_SYLLABLES)
    for length in itertools.count(2):
        size = base**length
        stride = int(size * 0.381966) // 10 * 10 + 1  # coprime to the size, whose prime factors are 2 and 5
        for i in range(min(count, size)):
            number = i * stride % size
            yield "".join(_SYLLABLES[number // base**place % base] for place in range(length))
        count -= size
        if count <= 0:
            return
