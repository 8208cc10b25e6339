"""Tokenisers built from a GGUF file's own vocabulary, and the streaming detokeniser.

Two kinds of vocabulary occur (`tokenizer.ggml.model`):

- `gpt2`: byte-level BPE. Text is split by a regular expression that `tokenizer.ggml.pre` names, its UTF-8 bytes are
  written as printable characters, and the file's merges are applied in order.
- `llama`: SentencePiece BPE (https://github.com/google/sentencepiece). Of all adjacent pairs that form a piece, the one
  whose piece has the best score is joined first; characters outside the vocabulary fall back to byte tokens. The file
  has no merges: they follow from the scores.

Which tokens text can turn into
- Normal and byte tokens: always. Padding (UNUSED, `[PAD123]`): never.
- Control tokens (`<|im_end|>`, `<s>`, …): only with `parse_special`, so that what a user types cannot end a turn or
  begin one. Files are careless here, hence a token counts as control if its type is CONTROL or UNKNOWN, if its text is
  `<|…|>`, if it is USER_DEFINED and `</s>` or the like, or if the file names it as begin or end of text.
- Other USER_DEFINED tokens (Qwen's `<tool_call>`): always, as in the models' own tokenisers; none of them ends a turn.

Text is never normalised: `decode(encode(text)) == text` for every text that the vocabulary can express. In two rare
cases this gives other ids than the models' own tokenisers: Qwen's brings text into NFC first, and SentencePiece ones
take U+2581, their sign for a space, in a text for a space (here it becomes byte tokens).
"""

from __future__ import annotations

import codecs
import operator
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from gguf.constants import TokenType
from tokenizers import models, pre_tokenizers

from orcd_jax.errors import GGUFError, RequestError
from orcd_jax.gguf_reader import GGUFFile

# Far above any real vocabulary; they bound the time that a hostile one can take.
MAX_SPECIAL_TOKENS = 1 << 13
MAX_PIECE_CHARACTERS = 1 << 22

_CONTRACTIONS = "'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_CONTRACTIONS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
_TIKTOKEN = (
    rf"(?i:{_CONTRACTIONS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (_TIKTOKEN.replace("DIGITS", "{1,3}"),)
# Each pattern is applied to the pieces that the one before it left. Sources: the models' own tokenizer.json files;
# "default" means what llama.cpp means by it, whose name it is.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "qwen2": (_TIKTOKEN.replace("DIGITS", ""),),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "gpt-2": (_GPT2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}

_END_OF_TURN = (
    "<|im_end|>", "<|endoftext|>", "<|end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>",
)  # fmt: skip
_BAR_TOKEN = re.compile(r"<\|.+\|>", re.DOTALL)
# In Phi-3's file USER_DEFINED; in Qwen's vocabulary <s> and </s> are ordinary pieces of HTML.
_OTHER_CONTROLS = ("<s>", "</s>", "<start_of_turn>", "<end_of_turn>")
_PADDING = re.compile(r"\[PAD\d+\]")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_NOTHING = re.compile(r"(?!)")
# White space as Unicode has it: Python's \s has four separators more.
_WHITE_SPACE = re.compile(r"[^\S\x1c-\x1f]*")

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = (
    int(kind)
    for kind in (TokenType.NORMAL, TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.BYTE)
)


def _byte_characters() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where it is one, else the next code point from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


class Tokenizer:
    """Text to token ids and back. Nothing changes after construction, so threads may share one.

    Attributes:
      vocab_size: entries in the file's token list, padding included.
      longest: the most characters that one token can stand for.
      known_tokens: 1 + the highest id that is a real token; ids from here on are padding and must not be sampled.
      bos_id, eos_id: the file's begin and end of text, or None.
      add_bos: whether a prompt is to begin with `bos_id`; `encode` does not add it.
      stop_ids: the ids that end a completion, `eos_id` first.
      has_space_prefix: text is encoded with a space before it, at its beginning and after control tokens.
      control_texts: the texts of the control tokens, which only `parse_special` recognises.
    """

    def __init__(self, metadata: Mapping[str, Any]):
        """Build from a GGUF file's metadata; see `from_gguf`."""
        self._model = _read_name(metadata, "tokenizer.ggml.model", ("gpt2", "llama"))
        self._texts = _read_texts(metadata)
        self.vocab_size = len(self._texts)
        self.longest = max(map(len, self._texts))
        bos, eos, eot, eom = (_read_id(metadata, name, self.vocab_size) for name in ("bos", "eos", "eot", "eom"))
        self._text_bytes: dict[int, bytes] = {}  # of tokens met so far
        self._kinds = kinds = _classify(self._texts, _read_types(metadata, self.vocab_size), {bos, eos, eot, eom})
        self.known_tokens = 1 + max((i for i, kind in enumerate(kinds) if kind != _UNUSED), default=-1)
        if self.known_tokens == 0:
            raise GGUFError("tokenizer.ggml.tokens holds nothing but padding")

        controls = _index(self._texts, kinds, _CONTROL)
        user_defined = _index(self._texts, kinds, _USER_DEFINED)
        self.control_texts = frozenset(text for text in controls if not text.isspace())
        self._controls = _any_of(self.control_texts)
        self._user_defined = _any_of(user_defined)
        self._special_ids = user_defined | controls

        if self._model == "gpt2":
            if "tokenizer.ggml.pre" in metadata:
                pre = _read_name(metadata, "tokenizer.ggml.pre", PRE_TOKENIZERS)
            else:
                warnings.warn("the file names no pre-tokeniser (tokenizer.ggml.pre); taking 'default'", stacklevel=3)
                pre = "default"
            self.has_space_prefix = False
            self.add_bos = _read_flag(metadata, "add_bos_token", pre in ("llama-bpe", "llama3", "llama-v3"))
            self._bpe, self._missing_bytes, self._characters = _byte_level_bpe(metadata, self._texts, kinds, pre)
        else:
            self.has_space_prefix = _read_flag(metadata, "add_space_prefix", True)
            self.add_bos = _read_flag(metadata, "add_bos_token", True)
            self._bpe, self._missing_bytes, self._characters = _sentencepiece_bpe(metadata, self._texts, kinds)
            bos = controls.get("<s>") if bos is None else bos
            eos = controls.get("</s>") if eos is None else eos
        self.bos_id, self.eos_id = bos, eos
        self.add_bos = self.add_bos and bos is not None

        # Phi-3's own tokeniser drops white space after most of its special tokens, and its turns may also end by
        # beginning the assistant's next one. The file says neither, so its vocabulary has to tell.
        is_phi3 = self._model == "llama" and {"<|user|>", "<|assistant|>", "<|end|>", "<|system|>"} <= controls.keys()
        keep = ("<unk>", "<s>", "<|endoftext|>")
        self._strip_after = frozenset(i for text, i in controls.items() if is_phi3 and text not in keep)
        ends = (*_END_OF_TURN, "<|assistant|>") if is_phi3 else _END_OF_TURN
        stops = [eos, eot, eom, *(controls.get(text) for text in ends)]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in stops if i is not None))

    @classmethod
    def from_gguf(cls, source: str | Path | GGUFFile) -> Tokenizer:
        """The tokeniser of a GGUF file, which may hold a vocabulary only.

        Raises:
          GGUFError: the file or its vocabulary is malformed or of a kind that is not supported; names the key.
        """
        file = source if isinstance(source, GGUFFile) else GGUFFile.open(source)
        try:
            return cls(file.metadata)
        except GGUFError as e:
            raise GGUFError(f"{file.path}: {e}") from None

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """The token ids of `text`, without begin or end of text.

        Args:
          text: any Unicode text.
          parse_special: whether control tokens written in the text become those tokens. Leave it off for text from
            users: it would let them forge turns.

        Raises:
          RequestError: `text` has a lone surrogate, or a character that the vocabulary cannot express.
        """
        self._check_text(text)
        return self.encode_spans(text, self.find_controls(text) if parse_special else [])

    def find_controls(self, text: str) -> list[tuple[int, int]]:
        """Where control tokens are written in `text`: ascending (start, end), the longest where several begin."""
        return [match.span() for match in self._controls.finditer(text)]

    def encode_spans(self, text: str, spans: Iterable[tuple[int, int]]) -> list[int]:
        """Like `encode`, but exactly the control tokens at `spans`, some of `find_controls`, become those tokens."""
        self._check_text(text)
        ids: list[int] = []
        position = 0
        for start, end in spans:
            ids += self._encode_plain(text[position:start])
            ids.append(self._special_ids[text[start:end]])
            position = end
            if ids[-1] in self._strip_after:
                position += len(_WHITE_SPACE.match(text, end)[0])  # type: ignore[index]  # it matches nothing, too
        return ids + self._encode_plain(text[position:])

    def _encode_plain(self, text: str) -> list[int]:
        """Text between control tokens. A space prefix belongs at its start, not after user-defined tokens."""
        ids: list[int] = []
        start, prefix = 0, " " if self.has_space_prefix else ""
        for match in self._user_defined.finditer(text):
            ids += self._merge(prefix, text[start : match.start()])
            ids.append(self._special_ids[match[0]])
            start, prefix = match.end(), ""
        return ids + self._merge(prefix, text[start:])

    def _merge(self, prefix: str, text: str) -> list[int]:
        return self._bpe.encode(prefix + text, add_special_tokens=False).ids if text else []

    def _check_text(self, text: str) -> None:
        if not isinstance(text, str):
            raise RequestError(f"expected a text, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise RequestError(
                f"the text has a lone surrogate, U+{ord(text[e.start]):04X}, at position {e.start}; "
                "decode it from its bytes with errors='replace'"
            ) from None
        if self._missing_bytes:
            # The library would drop such characters without a word.
            for character in set(text) - self._characters:
                if not self._missing_bytes.isdisjoint(character.encode()):
                    raise RequestError(
                        f"the text has the character U+{ord(character):04X}, for which the model's vocabulary has no "
                        "tokens; remove or replace it"
                    )

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control tokens as they are written; the inverse of `encode`. Bytes that are not valid
        UTF-8 become U+FFFD.

        Raises:
          RequestError: an id is no integer of 0 to `vocab_size` - 1.
        """
        ids = list(ids)
        data = b"".join(map(self.token_bytes, ids))
        if self.has_space_prefix and data.startswith(b" ") and self._kinds[ids[0]] in (_NORMAL, _BYTE):
            data = data[1:]
        return data.decode("utf-8", "replace")

    def token_text(self, id: int) -> str:
        """The entry of the file's token list, as it is (`Ġthe`, `▁the`, `<0x0A>`)."""
        return self._texts[self._check_id(id)]

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token stands for; not always whole characters. Control tokens: their text."""
        text = self.token_text(id)
        kind = self._kinds[id]
        if kind == _BYTE:
            return bytes.fromhex(text[3:5])
        if kind == _NORMAL and self._model == "llama":
            return text.replace("▁", " ").encode()
        if kind == _NORMAL and all(character in _BYTE_OF for character in text):
            return bytes(_BYTE_OF[character] for character in text)
        return text.encode()

    def is_text(self, id: int) -> bool:
        """Whether a token is text for a reader: neither control nor padding."""
        return self._kinds[self._check_id(id)] not in (_CONTROL, _UNUSED)

    def text_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids' text is made of; control tokens and padding have none."""
        known, pieces = self._text_bytes, []
        for id in ids:
            # Kept as they are met: a request of many rows waits for the last of them.
            piece = known.get(id) if type(id) is int else None
            if piece is None:
                piece = known[id] = self.token_bytes(id) if self.is_text(id) else b""
            pieces.append(piece)
        return b"".join(pieces)

    def _check_id(self, id: int) -> int:
        try:
            if 0 <= operator.index(id) < self.vocab_size:
                return id
        except TypeError:
            pass
        raise RequestError(f"{id!r:.80} is no token id; expected an integer of 0 to {self.vocab_size - 1}")


class StreamDecoder:
    """Turns generated ids into text piece by piece.

    The pieces together equal the whole: a character whose bytes are spread over tokens is held back until it is
    complete, and so is text that may yet become a stop text. The ids continue a text, so a leading space stays (but see
    `after`); control tokens yield nothing; bytes that are not valid UTF-8 become U+FFFD.

    Attributes:
      stopped: a stop text has appeared. The output ended before it; further ids are ignored.
      consumed: how many ids have been taken in, the one that completed the stop text included.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = (), after: int | None = None):
        """
        Args:
          tokenizer: whose ids will be pushed.
          after: the id that comes before them, if there is one. After a control token text begins anew: there `encode`
            puts SentencePiece's space prefix, and here it is dropped.
          stop: texts that end the output. Of several that appear, the one that is complete first counts.

        Raises:
          RequestError: a stop text is empty or no text.
        """
        self._tokenizer = tokenizer
        if not isinstance(stop, Iterable):
            raise RequestError(f"the stop texts are {stop!r:.80}; expected a text or several")
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        for text in self._stop:
            if not isinstance(text, str) or not text:
                raise RequestError(f"a stop text is {text!r:.80}; expected a text of at least one character")
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._drop_space = tokenizer.has_space_prefix and after is not None and not tokenizer.is_text(after)
        self.stopped = False
        self.consumed = 0

    def push(self, ids: Iterable[int]) -> str:
        """Take in the next ids; returns the text that is now certain, often less than a token or nothing."""
        pieces: list[str] = []
        # All at once where there is nothing to look for between them.
        for together in ([id] for id in ids) if self._stop else [list(ids)]:
            if self.stopped:
                break
            self.consumed += len(together)
            data = self._tokenizer.text_bytes(together)
            if data:
                data = data.removeprefix(b" ") if self._drop_space else data
                self._drop_space = False
                pieces.append(self._release(self._utf8.decode(data)))
        return "".join(pieces)

    def flush(self) -> str:
        """The end of the output: returns the text that was held back."""
        if self.stopped:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    """A pattern that finds any of `texts`, the longest where several begin."""
    if len(texts) > MAX_SPECIAL_TOKENS:
        raise GGUFError(
            f"tokenizer.ggml.token_type marks {len(texts)} special tokens; expected at most {MAX_SPECIAL_TOKENS}"
        )
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else _NOTHING


def _index(texts: Sequence[str], kinds: Sequence[int], kind: int) -> dict[str, int]:
    """From text to id for the tokens of one kind. Of equal texts the first counts; an empty one cannot occur."""
    index = {texts[i]: i for i in range(len(texts) - 1, -1, -1) if kinds[i] == kind}
    index.pop("", None)
    return index


def _classify(texts: Sequence[str], types: np.ndarray, ends: set[int | None]) -> list[int]:
    """The kind of each token by the rules at the top of this file."""
    kinds: list[int] = types.tolist()
    for i, text in enumerate(texts):
        kind = kinds[i]
        if text[:1] == "[" and _PADDING.fullmatch(text):
            kinds[i] = _UNUSED
        elif (
            kind == TokenType.UNKNOWN
            or (kind == _USER_DEFINED and text in _OTHER_CONTROLS)
            or (kind != _UNUSED and text[:2] == "<|" and _BAR_TOKEN.fullmatch(text))
            # A single character stays text whatever the file says, or there would be no way to write it.
            or (i in ends and len(text) > 1)
        ):
            kinds[i] = _CONTROL
    return kinds


def _byte_level_bpe(
    metadata: Mapping[str, Any], texts: Sequence[str], kinds: Sequence[int], pre: str
) -> tuple[tokenizers.Tokenizer, frozenset[int], frozenset[str]]:
    """The library's tokeniser; the bytes that it cannot express; the characters that need no bytes (none)."""
    if _BYTE in kinds:
        raise GGUFError(f"tokenizer.ggml.token_type item {kinds.index(_BYTE)} is a byte token in a 'gpt2' vocabulary")
    vocabulary = _index(texts, kinds, _NORMAL)
    pairs = list(_read_merges(metadata, texts, vocabulary))
    bpe = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=PRE_TOKENIZERS[pre] is _LLAMA3))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return bpe, frozenset(byte for character, byte in _BYTE_OF.items() if character not in vocabulary), frozenset()


def _sentencepiece_bpe(
    metadata: Mapping[str, Any], texts: Sequence[str], kinds: Sequence[int]
) -> tuple[tokenizers.Tokenizer, frozenset[int], frozenset[str]]:
    """The library's tokeniser; the bytes that it cannot express; the characters that need no bytes.

    Pieces are stored with a space where the file has U+2581, so that a U+2581 in a text is like any other character
    that the vocabulary lacks. Pieces of equal score are ranked by id, where sentencepiece goes by position in the text;
    in the Llama and Phi-3 vocabularies only runs of spaces have equal scores, and there both give the same ids.
    """
    scores = _read_scores(metadata, len(texts))
    pieces = {text.replace("▁", " "): i for text, i in _index(texts, kinds, _NORMAL).items()}
    if (total := sum(map(len, pieces))) > MAX_PIECE_CHARACTERS:
        raise GGUFError(f"tokenizer.ggml.tokens has {total} characters; expected at most {MAX_PIECE_CHARACTERS}")
    byte_tokens = _index(texts, kinds, _BYTE)
    for text, i in byte_tokens.items():
        if not _BYTE_TOKEN.fullmatch(text):
            raise GGUFError(
                f"tokenizer.ggml.tokens item {i} is {_shown(text)}, a byte by its type; expected <0x00> … <0xFF>"
            )
        pieces.pop(text, None)
    pairs = [
        (piece[:n], piece[n:])
        for piece, i in sorted(pieces.items(), key=lambda item: (-scores[item[1]], item[1]))
        for n in range(1, len(piece))
        if piece[:n] in pieces and piece[n:] in pieces
    ]
    bpe = tokenizers.Tokenizer(models.BPE(pieces | byte_tokens, pairs, byte_fallback=True))
    missing = frozenset(range(256)) - {int(text[3:5], 16) for text in byte_tokens}
    return bpe, missing, frozenset(piece for piece in pieces if len(piece) == 1)


def _shown(value: Any) -> str:
    """A value of the file for an error message: short, and on one line."""
    if isinstance(value, (list, np.ndarray)):
        return f"an array of {len(value)} items"
    return repr(value[:80] if isinstance(value, str) else value)


def _read_name(metadata: Mapping[str, Any], key: str, supported: Iterable[str]) -> str:
    value = metadata.get(key)
    if not isinstance(value, str) or value not in supported:
        raise GGUFError(f"{key} is {_shown(value)}; supported are {', '.join(map(repr, supported))}")
    return value


def _read_texts(metadata: Mapping[str, Any]) -> list[str]:
    texts = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(texts, list) or not texts:
        raise GGUFError("tokenizer.ggml.tokens is missing or no list of texts; the file has no usable vocabulary")
    return texts


def _read_array(metadata: Mapping[str, Any], key: str, size: int, kinds: str) -> np.ndarray | None:
    """A number array of `size` items whose NumPy dtype kind is in `kinds`; None where the key is absent."""
    array = metadata.get(key)
    if array is None:
        return None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds or array.size != size:
        found = f"{array.size} items of {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise GGUFError(f"{key} has {found}; expected {size} numbers, as many as tokenizer.ggml.tokens")
    return array


def _read_types(metadata: Mapping[str, Any], size: int) -> np.ndarray:
    types = _read_array(metadata, "tokenizer.ggml.token_type", size, "iu")
    if types is None:
        return np.full(size, _NORMAL)
    bad = np.flatnonzero((types < 1) | (types > 6))
    if bad.size:
        raise GGUFError(f"tokenizer.ggml.token_type item {bad[0]} is {types[bad[0]]}; expected 1 to 6")
    return types


def _read_scores(metadata: Mapping[str, Any], size: int) -> list[float]:
    scores = _read_array(metadata, "tokenizer.ggml.scores", size, "f")
    if scores is None:
        raise GGUFError("tokenizer.ggml.scores is missing; a 'llama' vocabulary needs them")
    bad = np.flatnonzero(np.isnan(scores))
    if bad.size:
        raise GGUFError(f"tokenizer.ggml.scores item {bad[0]} is not a number")
    return scores.tolist()


def _read_merges(
    metadata: Mapping[str, Any], texts: Sequence[str], vocabulary: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise GGUFError("tokenizer.ggml.merges is missing or no list of texts; a 'gpt2' vocabulary needs them")
    known = set(texts)  # merges that make a control token are left out, others have to be right
    for number, merge in enumerate(dict.fromkeys(merges)):
        left, _, right = merge.partition(" ")
        if left in vocabulary and right in vocabulary and left + right in vocabulary:
            yield left, right
        elif not {left, right, left + right} <= known:
            raise GGUFError(
                f"tokenizer.ggml.merges item {number} is {_shown(merge)}; expected two of tokenizer.ggml.tokens, "
                "with one space between them, that form a third"
            )


def _read_id(metadata: Mapping[str, Any], name: str, size: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < size):
        raise GGUFError(f"{key} is {_shown(value)}; expected an id of 0 to {size - 1}")
    return value


def _read_flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise GGUFError(f"tokenizer.ggml.{name} is {_shown(value)}; expected true or false")
    return value
