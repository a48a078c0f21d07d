"""Multi30k, German to English, as numbers (D. Elliott et al. 2016, arXiv:1605.00459; task 1, raw sentences)."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from archopt.lab.data.folder import DataError, DataFolder, sha256
from archopt.lab.data.sets import MULTI30K

UNKNOWN, PADDING, BEGIN, END = range(4)
SPECIALS = ("<unk>", "<blank>", "<s>", "</s>")
MIN_COUNT = 3  # of a word in the training sentences of its language
MAX_WORDS = 100  # pairs with a longer side are left out

Sentences = list[list[str]]


@dataclass(frozen=True)
class Pairs:
    """Sentences, each word as its place in one vocabulary for both languages; those of one number are a pair.

    Every sentence is `<s>`, its words, `</s>`.
    """

    train_german: list[list[int]]
    train_english: list[list[int]]
    validation_german: list[list[int]]
    validation_english: list[list[int]]
    vocabulary: tuple[str, ...]


def load_multi30k(
    data: DataFolder, train_pairs: int | None = None, validation_pairs: int | None = None
) -> Pairs:
    """Multi30k, German to English: 29,000 pairs to train on, 1,014 to validate on, or the first of them.

    Words are spaCy's (its rules for a blank language), in lower case. The checksum of all that are used is
    recorded: another version may cut them in other places, and runs on those are other runs. Raises DataError
    with the one command needed where a file is missing, damaged or another, and where spaCy is missing.
    """
    cut = {language: tokenizer(language) for language in ("de", "en")}
    files = {file.name: file for file in MULTI30K.files}
    parts = {"train": train_pairs, "val": validation_pairs}
    words = {
        f"{part}.{language}": [
            cut[language](line)
            for line in lines(MULTI30K.read(data, files[f"{part}.{language}"]).tobytes())[:count]
        ]
        for part, count in parts.items()
        for language in cut
    }
    text = "\n".join(" ".join(sentence) for sentences in words.values() for sentence in sentences)
    data.checksums["multi30k/words"] = sha256(text.encode())
    train = short(words["train.de"], words["train.en"])
    validation = short(words["val.de"], words["val.en"])
    vocabulary = shared_vocabulary(*train)
    place = {word: number for number, word in enumerate(vocabulary)}
    return Pairs(
        train_german=numbered(train[0], place),
        train_english=numbered(train[1], place),
        validation_german=numbered(validation[0], place),
        validation_english=numbered(validation[1], place),
        vocabulary=vocabulary,
    )


def tokenizer(language: str) -> Callable[[str], list[str]]:
    """spaCy's cutter of sentences into words, for a blank `language`, lower case. DataError without spaCy."""
    try:
        import spacy
    except ImportError as error:
        raise DataError(
            "multi30k needs spaCy, which cuts its sentences into words: pip install 'archopt[translation]'"
        ) from error
    cut = spacy.blank(language).tokenizer
    return lambda sentence: [token.text.lower() for token in cut(sentence)]


def lines(content: bytes) -> list[str]:
    """Sentences, one a line."""
    return content.decode().removesuffix("\n").split("\n")


def short(german: Sentences, english: Sentences) -> tuple[Sentences, Sentences]:
    """The pairs of which no side has more than `MAX_WORDS` words."""
    kept = [pair for pair in zip(german, english) if max(map(len, pair)) <= MAX_WORDS]
    return [pair[0] for pair in kept], [pair[1] for pair in kept]


def frequent(sentences: Sentences) -> list[str]:
    """The words that occur `MIN_COUNT` times or more, the commonest first, equals by alphabet."""
    counts = Counter(word for sentence in sentences for word in sentence)
    found = [word for word, count in counts.items() if count >= MIN_COUNT]
    return sorted(found, key=lambda word: (-counts[word], word))


def shared_vocabulary(german: Sentences, english: Sentences) -> tuple[str, ...]:
    """Specials, the English words, then those German words that are not among them."""
    return tuple(dict.fromkeys([*SPECIALS, *frequent(english), *frequent(german)]))


def numbered(sentences: Sentences, place: dict[str, int]) -> list[list[int]]:
    """Words as their places, `<unk>` for those that have none, between `<s>` and `</s>`."""
    return [[BEGIN, *(place.get(word, UNKNOWN) for word in words), END] for words in sentences]
