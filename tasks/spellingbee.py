"""Spelling: SimpleSpelling spells a word, SpellingBee counts how often a letter is in one.

Models see tokens, not letters: they have to learn how each token is spelled, and SimpleSpelling is practice in that.
SpellingBee then counts in two ways, by hand and with the calculator:

    user: How many r are in strawberry?
    assistant: The word strawberry is spelled s-t-r-a-w-b-e-r-r-y.
               Counting r: s-t-r1-a-w-b-e-r2-r3-y
               That makes 3. With Python: [python 'strawberry'.count('r')][python_output 3]
               #### 3

The format is made to be learned by a small model. Every letter is the same token ("-r") in both lines, so the second
line is a copy of the first; a count stands only behind a hit, where the letter itself calls for it, and is one more
than the last count, which is near. About three tokens a letter: the answer to a long word fits in 256 tokens. The last
line copies the calculator's output, which is right whenever the call is, so there are two ways to a right answer.

Words whose spelling is tested (is_test_word, one in eight) are in no training example.
"""

import functools
import random
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.pocket_words import is_test_word
from tasks.common import Conversation, Task, as_conversation, check_choice
from tasks.gsm8k import is_same_answer
from tasks.hub import WORDS, find_file

NUM_TEST = 256
ANY_LETTER_SHARE = 0.1  # of the questions: about any letter of the alphabet, which mostly is not in the word

ENGLISH = (
    "How many {letter} are in {word}?",
    "How many {letter} are there in {word}?",
    "How many {letter}s are in {word}?",
    "How many times does {letter} occur in {word}?",
    "How many times does the letter {letter} appear in the word {word}?",
    "How many times is {letter} in {word}?",
    "How often is {letter} in {word}?",
    "How often does the letter {letter} come up in {word}?",
    "In the word {word}, how many {letter} are there?",
    "What is the number of {letter} in {word}?",
    "Count the letter {letter} in {word}.",
    "Count the {letter}s in the word {word}.",
    "Please count how many {letter} there are in {word}.",
    "Tell me how many {letter} the word {word} has.",
    "Do you know how many {letter} are in {word}?",
    "Find out how often {letter} is in {word}.",
    "{word}: how many {letter}?",
)
OTHER_LANGUAGES = (
    "¿Cuántas {letter} hay en {word}?",
    "¿Cuántas veces aparece la letra {letter} en la palabra {word}?",
    "Cuenta las {letter} de {word}.",
    "Combien de {letter} y a-t-il dans {word} ?",
    "Combien de fois la lettre {letter} apparaît-elle dans le mot {word} ?",
    "Compte les {letter} dans {word}.",
    "Wie viele {letter} sind in {word}?",
    "Wie oft kommt der Buchstabe {letter} in dem Wort {word} vor?",
    "Zähle die {letter} in {word}.",
    "Quante {letter} ci sono in {word}?",
    "Quante volte compare la lettera {letter} nella parola {word}?",
    "Quantas letras {letter} há em {word}?",
    "Quantas vezes a letra {letter} aparece na palavra {word}?",
    "Hoeveel {letter} zitten er in {word}?",
    "Hoe vaak komt de letter {letter} voor in het woord {word}?",
    "Сколько букв {letter} в слове {word}?",
    "Сколько раз буква {letter} встречается в слове {word}?",
    "{word} 里有几个 {letter}？",
    "单词 {word} 中字母 {letter} 出现了多少次？",
    "{word} に {letter} はいくつありますか？",
    "{word} という単語に {letter} は何回出てきますか？",
    "단어 {word}에는 글자 {letter}이(가) 몇 개 있나요?",
    "{word}에서 {letter}은(는) 몇 번 나오나요?",
)
SPELLING = (
    "Spell the word {word}.",
    "Spell {word}.",
    "How do you spell {word}?",
    "How is {word} spelled?",
    "How do I spell the word {word}?",
    "What are the letters of {word}?",
    "Please spell {word} for me.",
    "Can you spell the word {word}?",
)


@functools.cache
def read_words(path: Path) -> dict[str, list[str]]:
    """Split -> words of a word list, one a line: 'test' has those of is_test_word, 'train' all others."""
    words = path.read_text(encoding="utf-8").split()
    split = {"train": [w for w in words if not is_test_word(w)], "test": [w for w in words if is_test_word(w)]}
    if not all(split.values()):
        raise UserError(f"{path} holds {len(words)} words, too few to train and test on: delete it to have it fetched")
    return split


def spelled(word: str) -> str:
    """'maze' -> 'm-a-z-e'."""
    return "-".join(word)


def counted(word: str, letter: str) -> str:
    """'maze', 'z' -> 'm-a-z1-e': the running count stands behind every hit."""
    count, pieces = 0, []
    for character in word:
        count += character == letter
        pieces.append(f"{character}{count}" if character == letter else character)
    return "-".join(pieces)


class WordTask(Task):
    """Examples that are made of the word list: example i of a split is the same every time. Subclasses have make.

    size: the number of examples. The seeds are texts that name the split, so those of train and test differ.
    """

    def __init__(self, split: str, size: int, **bounds: Any):
        super().__init__(**bounds)
        check_choice(f"{type(self).__name__}'s split", split, ("train", "test"))
        if size < 1:
            raise UserError(f"{type(self).__name__}: size={size}, and 1 or more examples are wanted")
        self.split, self.size = split, size
        self.name = f"{type(self).__name__} {split}"

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int) -> Conversation:
        rng = random.Random(f"{self.name}/{index}")
        return self.make(rng, rng.choice(read_words(find_file(WORDS))[self.split]))

    def describe_example(self, index: int) -> str:
        return f"{self.name}, example {index}"

    def make(self, rng: random.Random, word: str) -> Conversation:
        """An example about a word."""
        raise NotImplementedError


class SimpleSpelling(WordTask):
    """Spell a word."""

    def make(self, rng: random.Random, word: str) -> Conversation:
        question = _vary(rng, rng.choice(SPELLING).format(word=_quoted(rng, word)))
        return as_conversation(question, f"The word {word} is spelled {spelled(word)}.", spelling=spelled(word))

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return f" {conversation['spelling']}." in f" {completion}."


class SpellingBee(WordTask):
    """Count a letter in a word. languages: 'english', or 'all' for half of the questions in ten others."""

    def __init__(self, split: str, size: int = NUM_TEST, languages: str = "all", **bounds: Any):
        super().__init__(split, size, **bounds)
        self.languages = check_choice("SpellingBee's languages", languages, ("english", "all"))

    def make(self, rng: random.Random, word: str) -> Conversation:
        is_any = rng.random() < ANY_LETTER_SHARE
        letter = rng.choice("abcdefghijklmnopqrstuvwxyz" if is_any else word)
        templates = OTHER_LANGUAGES if self.languages == "all" and rng.random() < 0.5 else ENGLISH
        quote = rng.choice(("", "", "'", '"'))
        question = rng.choice(templates).format(word=f"{quote}{word}{quote}", letter=f"{quote}{letter}{quote}")
        count = word.count(letter)
        by_hand = (
            f"The word {word} is spelled {spelled(word)}.\nCounting {letter}: {counted(word, letter)}\n"
            f"That makes {count}. With Python: "
        )
        parts = [
            {"type": "text", "text": by_hand},
            {"type": "python", "text": f"'{word}'.count('{letter}')"},
            {"type": "python_output", "text": str(count)},
            {"type": "text", "text": f"\n#### {count}"},
        ]
        return as_conversation(_vary(rng, question), parts)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return is_same_answer(conversation, completion)


def _quoted(rng: random.Random, text: str) -> str:
    quote = rng.choice(("", "", "'", '"'))
    return f"{quote}{text}{quote}"


def _vary(rng: random.Random, question: str) -> str:
    """A question as some people type it: one in five in small letters, one in five without its last mark."""
    if rng.random() < 0.2:
        question = question.lower()
    return question.rstrip("?.？ ") if rng.random() < 0.2 else question
