"""Prompts of many kinds, to collect what a target writes after each of them (`own-text`).

Drafts guess well where they were trained on what the target writes, so the prompts cover what a server is asked:
novels to continue, chats to answer, questions and instructions (templates filled from word lists, as no such text is
among the training data), and structured or repeating text.
"""
import itertools
import json
import os
import random
import re

from . import data
from . import tokenizer as tok

CHARACTERS = 300       # of a passage
CHAT_CHARACTERS = 900  # of a conversation: whole turns, the last ones that fit
SHARES = {"novel": 0.35, "chat": 0.25, "question": 0.25, "structured": 0.15}

# Words, the questions made of them by kind (the eight of MT-Bench, none of its questions), and lines of structured
# text. {word} is drawn anew for every line, {word2} and {word3} apart from it, [word] once for the whole prompt.
with open(os.path.join(os.path.dirname(__file__), "prompts.json"), encoding="utf-8") as file:
    table = json.load(file)
    WORDS, QUESTIONS, STRUCTURED = (table[name] for name in ("words", "questions", "structured"))


def passages(path, rng):
    """Beginnings of paragraphs, drawn from all over the file."""
    documents = data.read_documents(path)
    while True:
        document = rng.choice(documents)
        start = document.find("\n", rng.randrange(len(document))) + 1
        passage = document[start:start + CHARACTERS]
        if len(passage) == CHARACTERS:
            yield passage.rsplit(" ", 1)[0]


def asked(messages):
    """A conversation as the chat template renders it for an answer."""
    return tok.render_chat(messages) + "<|assistant|>"


def chats(path, rng):
    """Conversations of a JSONL file up to one of the user's turns."""
    rows = data.read_messages(path)
    while True:
        messages = rng.choice(rows)
        ends = [i + 1 for i, message in enumerate(messages) if message["role"] == "user"]
        messages = messages[:rng.choice(ends)]
        while len(messages) > 2 and sum(len(m["content"]) for m in messages) > CHAT_CHARACTERS:
            messages = messages[2:]
        yield asked(messages)


def fill(template, rng):
    words = {name: rng.choice(choices) for name, choices in WORDS.items()}
    again = {name + suffix: rng.choice(choices) for suffix in "23" for name, choices in WORDS.items()}
    return template.format(**words, **again, n=rng.randint(2, 12), m=rng.randint(2, 30), k=rng.randint(10, 99))


def fill_once(template, rng):
    return re.sub(r"\[(\w+)\]", lambda match: rng.choice(WORDS[match[1]]), template)


def questions(rng):
    """One kind after the other; now and then as plain text, as those ask who do not use the chat endpoint."""
    for kind in itertools.cycle(QUESTIONS):
        question = fill(rng.choice(QUESTIONS[kind]), rng)
        yield question + "\n" if rng.random() < 0.1 else asked([{"role": "user", "content": question}])


def structured(path, rng):
    """Lists, tables, code, refrains, and passages that are copied and break off inside the copy."""
    for passage in passages(path, rng):
        if rng.random() < 0.25:
            yield passage + "\n\n" + passage[:rng.randint(20, 120)].rsplit(" ", 1)[0]
            continue
        line = fill_once(rng.choice(STRUCTURED), rng)
        lines = "".join(fill(line, rng) for _ in range(rng.randint(3, 6)))
        yield lines.rstrip("\n") + rng.choice(("\n", "")) if lines.endswith("\n") else lines.rstrip()


def mixed(novels, chat=None, kinds=tuple(SHARES), seed=0):
    """Endless (kind, prompt), the kinds by their shares. Without a file of chats there are none."""
    rng = random.Random(seed)
    sources = {"novel": lambda: passages(novels, rng), "chat": lambda: chats(chat, rng),
               "question": lambda: questions(rng), "structured": lambda: structured(novels, rng)}
    kinds = [kind for kind in kinds if kind != "chat" or chat]
    streams = {kind: sources[kind]() for kind in kinds}
    while True:
        kind = rng.choices(kinds, [SHARES[kind] for kind in kinds])[0]
        yield kind, next(streams[kind])
