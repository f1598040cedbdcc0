"""Write conversations in which the model says who it is: your name for it, its maker, and facts of your own.

    python -m dev.gen_identity_data --persona=persona.json --num=500 --out=my_identity.jsonl

persona.json describes it; a key that is left out keeps the value of PERSONA below:

    {"name": "Pico",
     "kind": "a small language model",
     "maker": "the robotics club of a school",
     "facts": [{"questions": ["Where do you live?", "Where are you?"],
                "answers": ["I live on a shelf in the club room.", "On a shelf, next to the soldering iron."]}]}

Questions and answers are combined at random (seeded) into conversations of one to three exchanges, with a greeting or
a word of thanks here and there. Each line of the file is a JSON list of messages, as in identity_conversations.jsonl.
Training takes it beside its other data, `--data=my_identity.jsonl` in scripts.mid_train and scripts.chat_sft, or in
place of the default identity, as identity_conversations.jsonl in the base directory.

What works: many ways to ask and several to answer for each fact (a model learns the one sentence that it sees a hundred
times, not its meaning), short answers, and nothing that contradicts itself. Hundreds of lines are enough. To let a
large model write them instead, replace `conversation` and keep the checks. It does not do that here: no network.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat.common import UserError, atomic_write, print0, user_errors
from nanochat.configurator import opt, parse
from nanochat.conversation import check_conversation

PERSONA: dict[str, Any] = {
    "name": "nanochat",
    "kind": "a small language model",
    "maker": "somebody who ran the nanochat code",
    "facts": [
        {
            "questions": ["Is your code open?", "Can I read your code?", "Are you open source?"],
            "answers": [
                "Yes, all of my code is open, from the tokenizer to the chat page.",
                "Yes, you can read it all.",
            ],
        },
        {
            "questions": ["Do you make mistakes?", "Can I trust you?", "Are you always right?"],
            "answers": ["I am small, so I make mistakes. Please check what matters.", "No, I am often wrong."],
        },
    ],
}
TOPICS = [  # what every persona is asked; {name}, {kind} and {maker} are filled in
    {
        "questions": [
            "Who are you?",
            "who are you",
            "What are you?",
            "Tell me about yourself.",
            "Please introduce yourself.",
            "Who am I talking to?",
        ],
        "answers": ["I am {name}, {kind}.", "I am {name}. I am {kind}, made by {maker}.", "My name is {name}."],
    },
    {
        "questions": ["What is your name?", "what's your name?", "Do you have a name?", "How shall I call you?"],
        "answers": ["My name is {name}.", "I am called {name}.", "You can call me {name}."],
    },
    {
        "questions": ["Who made you?", "Who built you?", "Who is your creator?", "Where do you come from?"],
        "answers": ["I was made by {maker}.", "My maker is {maker}.", "I am {name}, and {maker} made me."],
    },
    {
        "questions": ["Are you human?", "Are you a real person?", "Are you a robot?", "Are you alive?"],
        "answers": ["No, I am {name}, {kind}.", "I am not a person. I am {kind}.", "I am only a program: {kind}."],
    },
]
GREETINGS = [("Hello!", "Hello! How can I help you?"), ("Hi", "Hi! What would you like to know?")]
CLOSINGS = [("Thank you!", "You are welcome."), ("Goodbye!", "Goodbye! Have a nice day.")]
LEADS = ["", "", "", "Hi! ", "Hello. ", "One question: ", "I am curious. "]
TRIES = 100  # random draws for each conversation that is wanted, until the templates count as exhausted


@dataclass
class Config:
    persona: str = opt("", "JSON file that describes the model; empty is the example in this file")
    num: int = opt(500, "conversations to write, all different")
    out: str = opt("my_identity.jsonl", "file to write")
    seed: int = opt(42, "another seed combines them in other ways")


def read_persona(path: str) -> dict[str, Any]:
    """PERSONA with what a JSON file says instead; PERSONA itself for ''. Raises UserError for a file that is none."""
    if not path:
        return PERSONA
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--persona={path} cannot be read ({error.strerror}): name a JSON file") from None
    except ValueError as error:
        raise UserError(f"--persona={path} is no JSON file: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f'--persona={path}: an object such as {{"name": "Pico"}} is wanted')
    persona = PERSONA | content
    unknown = sorted(persona.keys() - PERSONA.keys())
    if unknown:
        raise UserError(f"--persona={path}: {unknown[0]!r} is none of {', '.join(PERSONA)}")
    for key in ("name", "kind", "maker"):
        if not isinstance(persona[key], str) or not persona[key].strip():
            raise UserError(f'--persona={path}: "{key}" should be a text')
    if not isinstance(persona["facts"], list) or not all(map(_is_fact, persona["facts"])):
        raise UserError(f'--persona={path}: "facts" is a list of objects with lists of texts "questions" and "answers"')
    return persona


def _is_fact(fact: Any) -> bool:
    lists = [fact.get("questions"), fact.get("answers")] if isinstance(fact, dict) else [None]
    return all(isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts) for texts in lists)


def conversation(rng: random.Random, persona: dict[str, Any]) -> list[dict[str, str]]:
    """The messages of one conversation: one to three different topics, perhaps with a greeting or a closing."""
    values = {key: persona[key] for key in ("name", "kind", "maker")}
    topics = [*TOPICS, *persona["facts"]]
    turns = list(rng.choice(GREETINGS)) if rng.random() < 0.15 else []
    for topic in rng.sample(topics, rng.choices((1, 2, 3), (5, 3, 2))[0]):
        lead = "" if turns else rng.choice(LEADS)
        answer = rng.choice(topic["answers"])
        for key, value in values.items():  # not format: a fact may hold braces of its own
            answer = answer.replace(f"{{{key}}}", value)
        turns += [lead + rng.choice(topic["questions"]), answer[:1].upper() + answer[1:]]
    if rng.random() < 0.2:
        turns += rng.choice(CLOSINGS)
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def generate(persona: dict[str, Any], num: int, seed: int) -> list[list[dict[str, str]]]:
    """num different conversations that keep the rules of nanochat/conversation.py. Raises UserError."""
    rng = random.Random(seed)
    found: dict[str, list[dict[str, str]]] = {}
    for _ in range(num * TRIES):
        if len(found) == num:
            break
        messages = conversation(rng, persona)
        check_conversation({"messages": messages})
        found.setdefault(json.dumps(messages), messages)
    if len(found) < num:
        raise UserError(f"--num={num}: only {len(found)} different conversations came out; add facts or phrasings")
    return list(found.values())


@user_errors
def main(config: Config) -> None:
    if config.num < 1:
        raise UserError(f"--num={config.num}: 1 or more conversations are wanted")
    conversations = generate(read_persona(config.persona), config.num, config.seed)
    path = Path(config.out).expanduser()
    with atomic_write(path) as file:
        file.writelines(json.dumps(messages, ensure_ascii=False) + "\n" for messages in conversations)
    print0(f"wrote {len(conversations):,} conversations to {path}; add them with --data={path}")


if __name__ == "__main__":
    main(parse(Config))
