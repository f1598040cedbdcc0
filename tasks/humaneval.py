"""HumanEval: 164 Python functions to be written from their signature and docstring, each with tests.

A completion is right if its program passes the tests, which run in a process of their own (nanochat/execution.py).
Source: arXiv 2107.03374
"""

import re
import secrets
from typing import Any

from nanochat.execution import execute_code
from tasks.common import Conversation, TableTask, as_conversation

TIMEOUT_SECONDS = 5.0
CODE_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL | re.IGNORECASE)


def extract_program(completion: str) -> str:
    """The program in a completion: what its first code block holds, also one that was cut; else all of it."""
    match = CODE_BLOCK.search(completion)
    return match[1] if match else completion


def complete_program(prompt: str, entry_point: str, program: str) -> str:
    """A program that can run by itself: preceded by what the prompt has before the function (imports, helpers).

    Where the program does not define the function it is taken for the function's body, and the whole prompt precedes.
    """
    definition = re.compile(rf"^(async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    if not definition.search(program):
        return prompt + program
    return prompt[: definition.search(prompt).start()] + "\n" + program


class HumanEval(TableTask):
    """All problems: split test is the only one."""

    name = "HumanEval"

    def __init__(self, **bounds: Any):
        super().__init__("openai/openai_humaneval", "openai_humaneval", "test", **bounds)

    def get_example(self, index: int) -> Conversation:
        row = self.rows[index]
        answer = row["prompt"] + row["canonical_solution"]
        evaluation = {key: row[key] for key in ("prompt", "entry_point", "test")}
        return as_conversation(row["prompt"], answer, **evaluation)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completion's program passes the tests.

        The last line of the program prints a secret, and it must have been printed: a completion that ends the process
        before the tests are through has not passed them.
        """
        entry_point, secret = conversation["entry_point"], secrets.token_hex(16)
        program = complete_program(conversation["prompt"], entry_point, extract_program(completion))
        code = f"{program}\n\n{conversation['test']}\n\ncheck({entry_point})\nprint('{secret}')\n"
        result = execute_code(code, timeout_seconds=TIMEOUT_SECONDS)
        return result.success and secret in result.stdout
