"""The tokens of BERT without upper case: words split into the longest pieces of a vocabulary.

Wu et al., Google's Neural Machine Translation System (2016), https://arxiv.org/abs/1609.08144,
section 4.1; the text is cleaned as in Devlin et al., BERT (2019),
https://arxiv.org/abs/1810.04805: control characters dropped, accents stripped, lower case,
punctuation and Chinese characters words of their own.
"""

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAD, UNKNOWN, FIRST, LAST = "[PAD]", "[UNK]", "[CLS]", "[SEP]"

_MAX_CHARACTERS = 100  # a longer word is unknown
_CHINESE = (  # blocks of ideographs: no spaces stand between such words
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


@dataclass(frozen=True)
class WordPiece:
    """A vocabulary: piece -> id; pieces inside a word begin with "##".

    >>> words = [PAD, UNKNOWN, FIRST, LAST, "play", "##ing", "caf", "##e", "!"]
    >>> tokenizer = WordPiece({word: index for index, word in enumerate(words)})
    >>> tokenizer.encode("Playing, Café!")
    [2, 4, 5, 1, 6, 7, 8, 3]
    """

    vocabulary: Mapping[str, int]

    def __post_init__(self):
        missing = [piece for piece in (PAD, UNKNOWN, FIRST, LAST) if piece not in self.vocabulary]
        if missing:
            raise ValueError(f"the vocabulary lacks {missing}")

    def encode(self, text: str, *, max_length: int = 128) -> list[int]:
        """Ids of a text, [CLS] first and [SEP] last, cut to `max_length` with both.

        Names of special tokens inside the text are words like any other.

        Raises:
          ValueError: `max_length` is less than 2.
        """
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}")
        pieces = [piece for word in split_words(text) for piece in self._pieces(word)]
        pieces = [FIRST, *pieces[: max_length - 2], LAST]
        return [self.vocabulary[piece] for piece in pieces]

    def _pieces(self, word: str) -> list[str]:
        """The longest piece that begins the word, then of what remains; else [UNK] for it all."""
        pieces, start = [], 0
        if len(word) > _MAX_CHARACTERS:
            return [UNKNOWN]
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            found = next((e for e in ends if prefix + word[start:e] in self.vocabulary), None)
            if found is None:
                return [UNKNOWN]
            pieces.append(prefix + word[start:found])
            start = found
        return pieces


def split_words(text: str) -> Iterator[str]:
    """Yields the words of a text, lower case and without accents; punctuation is one each.

    >>> list(split_words("Zoë's  U2-sign"))
    ['zoe', "'", 's', 'u2', '-', 'sign']
    """
    spaced = "".join(_clean(character) for character in text)
    plain = "".join(c for c in unicodedata.normalize("NFD", spaced) if _category(c) != "Mn")
    lower = "".join(character.lower() for character in plain)  # one by one: no final sigma
    for chunk in lower.split():
        word = ""
        for character in chunk:
            if not _is_punctuation(character):
                word += character
                continue
            if word:
                yield word
            yield character
            word = ""
        if word:
            yield word


def load(path: Path) -> WordPiece:
    """Reads the vocabulary of a `tokenizer.json` with a WordPiece model.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is corrupt, or of another kind of tokenizer.
    """
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        if model["type"] != "WordPiece":
            raise ValueError(f"its model is {model['type']}")
        return WordPiece({str(piece): int(index) for piece, index in model["vocab"].items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no WordPiece tokenizer.json ({error})") from error


def pad(ids: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids, int32 [B, length], 0 behind the end; and the mask, int32 [B, length], 1 where they are.

    Raises:
      ValueError: one is longer than `length`.

    >>> pad([[2, 3], [2, 4, 3]], 3)[1].tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    longest = max(map(len, ids), default=0)
    if longest > length:
        raise ValueError(f"length must be at least {longest}, the longest of the ids, got {length}")
    tokens, mask = np.zeros((2, len(ids), length), np.int32)
    for row, sentence in enumerate(ids):
        tokens[row, : len(sentence)] = sentence
        mask[row, : len(sentence)] = 1
    return tokens, mask


def _category(character: str) -> str:
    return unicodedata.category(character)


def _clean(character: str) -> str:
    if character in "\t\n\r":
        return " "
    if character == "\ufffd" or _category(character) in ("Cc", "Cf", "Co", "Cs"):
        return ""
    if character.isspace():
        return " "
    code = ord(character)
    return f" {character} " if any(low <= code <= high for low, high in _CHINESE) else character


def _is_punctuation(character: str) -> bool:
    # Of ASCII also the symbols, such as $ and ^.
    is_ascii_symbol = character.isascii() and character.isprintable() and not character.isalnum()
    return (is_ascii_symbol and character != " ") or _category(character).startswith("P")
