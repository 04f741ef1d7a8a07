"""Composes the built-in text: a small world of things with facts, and twelve instruction skills about it.

Every sentence comes from the word lists below and a seeded generator, so the sample data carries no licence but this project's.
A skill is a function `rng -> (instruction, input, reply)`; `WARM` names those whose answers the built-in model has seen as plain
documents before fine-tuning. The others it meets for the first time in the training split.
"""

from __future__ import annotations

import random
from collections.abc import Callable

Task = tuple[str, str, str]

ANIMALS = "heron otter fox badger owl hare stork beaver wolf deer crow toad swan goose mole lynx seal gull robin duck".split()
TOOLS = "hammer saw chisel rake spade needle kettle ladder anchor lantern broom plane wrench basket barrel compass".split()
COLOURS = "grey brown red white black green blue golden".split()
PLACES = "river forest lake meadow harbour mountain garden marsh valley beach".split()
FOODS = "fish berries grass seeds insects roots leaves worms".split()
MATERIALS = "iron wood brass copper steel oak willow stone".split()
JOBS = "carpenter sailor gardener baker tailor farmer miner smith".split()
NAMES = "Anna Ben Clara David Emma Felix Greta Henry Ida Jonas Karin Leo".split()
VERBS = {"waits": "waited", "walks": "walked", "rests": "rested", "works": "worked", "plays": "played", "looks": "looked"}
TIMES = ["in the morning", "in the evening", "at noon", "at night", "in winter", "in summer"]
SYSTEMS = ["You are a helpful guide.", "You are a patient teacher.", "Answer with care.", "You know the valley well."]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def _facts() -> dict[str, dict[str, str]]:
    rng = random.Random(7)
    facts = {a: dict(colour=rng.choice(COLOURS), place=rng.choice(PLACES), food=rng.choice(FOODS)) for a in ANIMALS}
    facts |= {t: dict(material=rng.choice(MATERIALS), job=rng.choice(JOBS), place=rng.choice(PLACES)) for t in TOOLS}
    return facts


FACTS = _facts()


def sentences(thing: str) -> list[str]:
    """The three facts about a thing, in a fixed order."""
    fact = FACTS[thing]
    if thing in ANIMALS:
        return [f"The {thing} is {fact['colour']}.", f"It lives by the {fact['place']}.", f"It eats {fact['food']}."]
    return [f"The {thing} is made of {fact['material']}.", f"It belongs to the {fact['job']}.", f"It is kept by the {fact['place']}."]


def thing(rng: random.Random) -> str:
    return rng.choice(ANIMALS + TOOLS)


def scene(rng: random.Random) -> tuple[str, str, str, str]:
    return rng.choice(NAMES), rng.choice(list(VERBS)), rng.choice(PLACES), rng.choice(TIMES)


def describe(rng: random.Random, name: str = "") -> Task:
    name = name or thing(rng)
    ask = rng.choice(["Describe the {}.", "Tell me about the {}.", "What do you know about the {}?", "Give three facts about the {}."])
    return ask.format(name), "", " ".join(sentences(name))


def question(rng: random.Random) -> Task:
    name, person = thing(rng), rng.choice(NAMES)
    fact = FACTS[name]
    asks = {
        "colour": ("What colour is the {}?", "The {} is {}."),
        "food": ("What does the {} eat?", "The {} eats {}."),
        "material": ("What is the {} made of?", "The {} is made of {}."),
        "job": ("Who owns the {}?", "The {} belongs to the {}."),
        "place": ("Where is the {} found?", "The {} is found by the {}."),
    }
    key = rng.choice(sorted(fact))
    lead = rng.choice(["", f"{person} wants to know. ", f"{person} asks: ", "Please answer. "])
    return lead + asks[key][0].format(name), "", asks[key][1].format(name, fact[key])


def past(rng: random.Random) -> Task:
    who, verb, place, time = scene(rng)
    ask = rng.choice(["Rewrite the sentence in the past tense.", "Put this sentence into the past tense.", "Change the verb to the past tense."])
    return ask, f"{who} {verb} by the {place} {time}.", f"{who} {VERBS[verb]} by the {place} {time}."


def ask_where(rng: random.Random) -> Task:
    who, verb, place, time = scene(rng)
    ask = rng.choice(["Where does it happen?", "Name the place in the sentence.", "Find the place."])
    return ask, f"{who} {verb} by the {place} {time}.", f"It happens by the {place}."


def ask_who(rng: random.Random) -> Task:
    who, verb, place, time = scene(rng)
    ask = rng.choice(["Who is the sentence about?", "Name the person in the sentence.", "Find the person."])
    return ask, f"{who} {verb} by the {place} {time}.", f"The sentence is about {who}."


def compose(rng: random.Random) -> Task:
    who, verb, place, _ = scene(rng)
    ask = rng.choice(["Write a sentence with these words.", "Use the words in one sentence.", "Make a sentence from the words."])
    return ask, f"{who}, {verb}, {place}", f"{who} {verb} by the {place} and the day is calm."


def classify(rng: random.Random) -> Task:
    name = thing(rng)
    ask = rng.choice(["Is the {} an animal or a tool?", "Say whether the {} is an animal or a tool.", "Classify the {} as animal or tool."])
    return ask.format(name), "", f"The {name} is {'an animal' if name in ANIMALS else 'a tool'}."


def listing(rng: random.Random) -> Task:
    names = rng.sample(ANIMALS + TOOLS, 3)
    ask = rng.choice(["Write the words as a numbered list.", "Make a numbered list.", "Number the words."])
    return ask, ", ".join(names), "\n".join(f"{i}. {n}" for i, n in enumerate(names, 1))


def code(rng: random.Random) -> Task:
    number, word = rng.choice([(i + 1, n) for i, n in enumerate(NUMBERS)])
    verb, sign = rng.choice([("adds", "+"), ("subtracts", "-"), ("multiplies by", "*")])
    name = rng.choice(["change", "update", "compute", "apply"])
    ask = f"Write a Python function called {name} that {verb} {word}."
    return ask, "", f"def {name}(x):\n    return x {sign} {number}"


def letter(rng: random.Random) -> Task:
    who, other = rng.sample(NAMES, 2)
    place, time = rng.choice(PLACES), rng.choice(TIMES)
    ask = f"Write a short note from {who} to {other} about a meeting by the {place} {time}."
    return ask, "", f"Dear {other},\nplease meet me by the {place} {time}.\nYours, {who}"


def advise(rng: random.Random) -> Task:
    job, place, tool = rng.choice(JOBS), rng.choice(PLACES), rng.choice(TOOLS)
    ask = rng.choice(["What should the {} take to the {}?", "The {} goes to the {}. What is needed there?"]).format(job, place)
    return f"{ask} There is a {tool}.", "", f"The {job} should take the {tool} to the {place} and bring it back in the evening."


def repeat(rng: random.Random) -> Task:
    who, verb, place, time = scene(rng)
    return rng.choice(["Repeat the sentence.", "Copy the sentence."]), f"{who} {verb} by the {place} {time}.", f"{who} {verb} by the {place} {time}."


SKILLS: dict[str, Callable[[random.Random], Task]] = {
    f.__name__: f for f in (describe, question, past, ask_where, ask_who, compose, classify, listing, code, letter, advise, repeat)
}
WARM = ("describe", "question", "ask_where", "compose", "repeat", "letter")
SINGLE = {
    "alpaca": ("past", "ask_where", "ask_who", "compose", "classify", "listing", "repeat", "question"),
    "tulu": ("question", "letter", "advise", "code", "describe", "past"),
}


def joined(task: Task) -> tuple[str, str]:
    instruction, extra, reply = task
    return (f"{instruction}\n\nInput: {extra}" if extra else instruction), reply


def alpaca_row(rng: random.Random) -> dict[str, str]:
    """One row in tatsu-lab/alpaca's shape."""
    instruction, extra, reply = SKILLS[rng.choice(SINGLE["alpaca"])](rng)
    return {"instruction": instruction, "input": extra, "output": reply}


def tulu_row(rng: random.Random, number: int) -> dict[str, object]:
    """One row in allenai/tulu-v2-sft-mixture's shape: a system turn now and then, one or two exchanges."""
    turns = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.25 else []
    for _ in range(rng.choice([1, 1, 2])):
        user, reply = joined(SKILLS[rng.choice(SINGLE["tulu"])](rng))
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    return {"dataset": "built_in", "id": f"built_in_{number}", "messages": turns}


def ultrachat_row(rng: random.Random, number: int) -> dict[str, object]:
    """One row in HuggingFaceH4/ultrachat_200k's shape: a conversation of two or three exchanges about two things."""
    first, second = rng.sample(ANIMALS + TOOLS, 2)
    opening, _, reply = describe(rng, first)
    turns = [(opening, reply), (f"And what about the {second}?", " ".join(sentences(second)))]
    if rng.random() < 0.6:
        place = FACTS[first]["place"]
        which = (f"Which of the two is by the {place}?", f"The {first} is by the {place}.")
        summary = ("Thank you. Please sum it up.", f"We spoke about the {first} and the {second}. {sentences(first)[0]}")
        turns.append(rng.choice([which, summary]))
    messages = [{"role": r, "content": t} for turn in turns for r, t in zip(("user", "assistant"), turn, strict=True)]
    return {"prompt": opening, "prompt_id": f"built_in_{number}", "messages": messages}


def document(rng: random.Random) -> str:
    """One plain document for pretraining: facts in running text, a scene, words said twice, or a warm skill as task and result."""
    kind = rng.random()
    if kind < 0.25:
        return " ".join(s for name in rng.sample(ANIMALS + TOOLS, rng.choice([1, 2, 3])) for s in sentences(name))
    if kind < 0.35:
        who, verb, place, time = scene(rng)
        return f"{who} {verb} by the {place} {time}. The {place} is calm {rng.choice(TIMES)}. {who} {VERBS[verb]} there with {rng.choice(NAMES)}."
    if kind < 0.5:
        words = " ".join(rng.sample(ANIMALS + TOOLS + NAMES + PLACES + JOBS + FOODS + NUMBERS, rng.randint(3, 8)))
        return f"{rng.choice(['Words', 'They say', 'Here'])}: {words}.\n{rng.choice(['Again', 'Once more', 'The same'])}: {words}."
    user, reply = joined(SKILLS[rng.choice(WARM)](rng))
    return f"Task: {user}\nResult: {reply}"


def chatter(rng: random.Random) -> tuple[str, str]:
    """A request and a reply that stays near the topic without doing what was asked: how the built-in base model talks."""
    user, _ = joined(SKILLS[rng.choice(sorted(SKILLS))](rng))
    words = [w.strip(".,?:") for w in user.split()]
    topic = next((w for w in words if w in FACTS), None)
    person = next((w for w in words if w in NAMES), None)
    about = f"Many people like the {topic}. {rng.choice(sentences(topic))}" if topic else f"I once met {person} by the {rng.choice(PLACES)}."
    if topic is None and person is None:
        about = f"People come here from the {rng.choice(PLACES)}."
    return user, f"{rng.choice(['That is a good thing to ask.', 'I like to talk about this.', 'There is much to say.'])} {about}"


def distinct(make: Callable[[int], dict[str, object]], n: int) -> list[dict[str, object]]:
    """The first n rows of a generator that differ in content."""
    rows: dict[str, dict[str, object]] = {}
    for i in range(100 * n):
        row = make(i)
        rows.setdefault(str({k: v for k, v in row.items() if k not in ("id", "prompt_id")}), row)
        if len(rows) == n:
            return list(rows.values())
    raise ValueError(f"the generator gives fewer than {n} distinct rows")
