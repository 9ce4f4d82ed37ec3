"""Generate sentences of a simple grammar. Held-out sentences use words that occur in training sentences."""

import random


OPENINGS = [
    "today",
    "at night",
    "in the morning",
    "every summer",
    "now and then",
    "at last",
    "some say",
    "we know that",
]
ADJECTIVES = [
    "old",
    "small",
    "yellow",
    "quiet",
    "hungry",
    "clever",
    "heavy",
    "young",
    "gentle",
    "famous",
    "lonely",
    "happy",
]
NOUNS = [
    "dog", "baker", "river", "teacher", "sailor", "garden", "window", "engine", "mountain", "children",
    "doctor", "piano", "letter", "kitchen", "farmer", "bridge", "market", "forest", "painter", "storm",
]  # fmt: skip
VERBS = ["follows", "watches", "finds", "remembers", "carries", "paints", "hears", "opens", "leaves", "loves"]
ENDINGS = ["again", "without a sound", "near the water", "before breakfast", "with both hands", "for a long time"]


def sentence(generator: random.Random) -> str:
    """Return a sentence of lowercase letters and spaces, such as "today the old baker follows a river again"."""
    words = [f"the {generator.choice(ADJECTIVES)} {generator.choice(NOUNS)} {generator.choice(VERBS)}"]
    words.append(f"{generator.choice(['the', 'a'])} {generator.choice(NOUNS)}")
    if generator.random() < 0.5:
        words.insert(0, generator.choice(OPENINGS))
    if generator.random() < 0.5:
        words.append(generator.choice(ENDINGS))
    return " ".join(words)


def sentences(count: int, seed: int) -> list[str]:
    """Return `count` different sentences. The same seed gives the same sentences."""
    generator, unique_sentences = random.Random(seed), {}
    while len(unique_sentences) < count:
        unique_sentences[sentence(generator)] = None
    return list(unique_sentences)
