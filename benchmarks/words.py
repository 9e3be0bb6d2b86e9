"""Nouns and lemmas of a text: as the official scorers read them (NLTK, spaCy) where these and their
data are installed, else by a committed lemma table."""

import functools
import re
from itertools import pairwise

# Penn Treebank tokens as far as dictionary words go: "grass/sky" and "dog-house" stay one token.
BREAK = re.compile(
    r"""[\s,;:!?@#$%&*()\[\]{}<>"“”‘’«»„—`]+|--+|\.\.+|''+|'(?:s|m|d|ll|re|ve)\b""", re.IGNORECASE
)
FUNCTION_WORDS = set("a an the of in on with and or at to for by from near".split())


def split(text):
    words = (word.strip(".'") for word in BREAK.split(text))
    return [word for word in words if word]


def noun_reader(table):
    """(text -> [(lemma, is it a noun?, word)], how, for the result): by NLTK, or else by a table of
    lemmas. Without a tagger any word but a function word may be a noun."""

    def by_table(text):
        return [(table.get(word, word), word not in FUNCTION_WORDS, word) for word in split(text)]

    def by_nltk(text):
        tagged = nltk.pos_tag(nltk.word_tokenize(text))
        return [(lemma(word), tag.startswith("NN"), word) for word, tag in tagged]

    try:
        import nltk

        lemma = nltk.stem.WordNetLemmatizer().lemmatize
        by_nltk(lemma("dogs"))  # its data lack now, not in mid-file
    except (ImportError, LookupError):
        return by_table, "lemma table, no tagger"
    return by_nltk, "NLTK tagger and lemmas"


def phrase_reader(table):
    """As noun_reader, for the noun phrases that a judge lists: by spaCy, or else a word is a noun
    when it is in the table, or ends the phrase, or stands before a function word."""

    def by_table(text):
        found = []
        for word, after in pairwise([*split(text.lower()), "of"]):
            is_noun = word in table or after in FUNCTION_WORDS
            found.append((table.get(word, word), is_noun and word not in FUNCTION_WORDS, word))
        return found

    def by_spacy(text):
        return [(t.lemma_, t.tag_.startswith("NN"), t.text) for t in nlp(f"a {text}")]

    try:
        import spacy

        nlp = spacy.load("en_core_web_trf")
    except (ImportError, OSError):
        return by_table, "lemma table, no tagger"
    return by_spacy, "en_core_web_trf"


def similarity(pairs):
    """(are two words alike?, name): by the pairs given, else by spaCy, else if they are equal."""
    if pairs is not None:
        alike = {frozenset(pair[:2]) for pair in pairs}
        return lambda a, b: a == b or frozenset((a, b)) in alike, "table of pairs"
    try:
        import spacy

        nlp = functools.cache(spacy.load("en_core_web_lg"))
    except (ImportError, OSError):
        return str.__eq__, "equal words only"
    return functools.cache(lambda a, b: nlp(a).similarity(nlp(b)) > 0.8), "en_core_web_lg"
