"""What each recipe trains on and is evaluated on: "speedrun" (real data) and "pocket" (nanochat/pocket.py).

Every function takes the recipe's name, which find_recipe tells from what lies in the base directory. Nothing is read
or fetched before the tasks are used. A file of conversations of one's own is added by its path (`data`).
"""

import difflib
from collections.abc import Callable

from nanochat.common import UserError, get_base_dir
from nanochat.dataset import data_folder, read_source
from tasks.arc import ARC
from tasks.common import Task, TaskMixture, check_choice
from tasks.customjson import CustomJSON, IdentityConversations
from tasks.documents import Documents
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.pocket import PocketChat, PocketMath, PocketMC, PocketQA, PocketSums
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee

RECIPES = ("speedrun", "pocket")

# Sizes of the pocket mixtures, in examples. Tasks that are not named here are taken whole.
POCKET_MID_DOCUMENTS = 4000
POCKET_MID_SUMS = 1500
POCKET_MID_SPELLING = 2000
POCKET_MID_SPELLING_BEE = 3000
POCKET_SFT_DOCUMENTS = 1500  # what is not repeated is forgotten at the rates of finetuning, and asked for by PocketQA
POCKET_SFT_CHAT = 2000
POCKET_SFT_SUMS = 500
POCKET_SFT_SPELLING = 300
POCKET_SFT_SPELLING_BEE = 1000


def find_recipe() -> str:
    """'pocket' where the base directory holds the pocket world's text, or task data of it only; else 'speedrun'."""
    source = read_source(data_folder())
    if source is not None:
        return "pocket" if source["source"] == "pocket" else "speedrun"
    names = [path.name for path in (get_base_dir() / "task_data").glob("*--*")]
    return "pocket" if names and all(name.startswith("pocket--") for name in names) else "speedrun"


def _mixture(tasks: list[Task], data: str) -> TaskMixture:
    """The tasks, and the conversations of the user's own files: paths joined by commas, '' for none."""
    return TaskMixture([*tasks, *(CustomJSON(path.strip()) for path in data.split(",") if path.strip())])


# ---------------------------------------------------------------------------------------------------------------------
# To train on


def mid_train_mixture(recipe: str, data: str = "") -> TaskMixture:
    """What midtraining trains on. data: JSONL files of one's own to add, joined by commas."""
    if _is_pocket(recipe):
        tasks = [
            PocketChat("train"),
            PocketQA("train"),
            PocketMC("train"),
            PocketMath("train"),
            PocketSums(POCKET_MID_SUMS),
            IdentityConversations(),
            IdentityConversations(),
            SimpleSpelling("train", POCKET_MID_SPELLING),
            SpellingBee("train", POCKET_MID_SPELLING_BEE, languages="english"),
            Documents(POCKET_MID_DOCUMENTS),
        ]
    else:
        tasks = [
            SmolTalk("train"),  # 460K conversations
            MMLU("auxiliary_train", "train"),  # 100K multiple choice questions
            GSM8K("main", "train"),  # 8K word problems
            IdentityConversations(),  # 1K
            IdentityConversations(),  # twice, as there are few
            SimpleSpelling("train", 200_000),
            SpellingBee("train", 80_000),
        ]
    return _mixture(tasks, data)


def mid_val_mixture(recipe: str) -> TaskMixture:
    """What midtraining's validation loss is measured on."""
    if _is_pocket(recipe):
        return TaskMixture([PocketChat("test"), PocketQA("test"), PocketMC("test"), PocketMath("test")])
    return TaskMixture([SmolTalk("test"), MMLU("all", "test", stop=5200), GSM8K("main", "test", stop=420)])


def sft_mixture(recipe: str, data: str = "") -> TaskMixture:
    """What supervised finetuning trains on. data: JSONL files of one's own to add, joined by commas."""
    if _is_pocket(recipe):
        tasks = [
            PocketChat("train", stop=POCKET_SFT_CHAT),
            PocketQA("train"),
            PocketMC("train"),
            PocketMath("train"),
            PocketSums(POCKET_SFT_SUMS),
            IdentityConversations(),
            SimpleSpelling("train", POCKET_SFT_SPELLING),
            SpellingBee("train", POCKET_SFT_SPELLING_BEE, languages="english"),
            Documents(POCKET_SFT_DOCUMENTS),
        ]
    else:
        tasks = [
            ARC("ARC-Easy", "train"),  # 2.3K
            ARC("ARC-Challenge", "train"),  # 1.1K
            GSM8K("main", "train"),  # 8K
            SmolTalk("train", stop=10_000),
            IdentityConversations(),  # 1K
            SimpleSpelling("train", 300),
            SpellingBee("train", 300),
        ]
    return _mixture(tasks, data)


def sft_val_mixture(recipe: str) -> TaskMixture:
    """What supervised finetuning's validation loss is measured on."""
    return mid_val_mixture(recipe) if _is_pocket(recipe) else TaskMixture([SmolTalk("test")])


def rl_task(recipe: str, split: str) -> Task:
    """What reinforcement learning trains on (split 'train') and measures itself on ('test')."""
    if _is_pocket(recipe):
        return PocketMath("practice" if split == "train" else split)
    return GSM8K("main", split)


def _is_pocket(recipe: str) -> bool:
    return check_choice("the recipe", recipe, RECIPES) == "pocket"


# ---------------------------------------------------------------------------------------------------------------------
# To evaluate on

# recipe -> name -> what makes the task's test split. ChatCORE is over all tasks of a recipe.
EVAL_TASKS: dict[str, dict[str, Callable[[], Task]]] = {
    "speedrun": {
        "ARC-Easy": lambda: ARC("ARC-Easy", "test"),
        "ARC-Challenge": lambda: ARC("ARC-Challenge", "test"),
        "MMLU": lambda: MMLU("all", "test"),
        "GSM8K": lambda: GSM8K("main", "test"),
        "HumanEval": lambda: HumanEval(),
        "SpellingBee": lambda: SpellingBee("test"),
    },
    "pocket": {
        "PocketQA": lambda: PocketQA("test"),
        "PocketMC": lambda: PocketMC("test"),
        "PocketMath": lambda: PocketMath("test"),
        "SpellingBee": lambda: SpellingBee("test", languages="english"),
    },
}
SFT_METRICS = {"speedrun": ("MMLU", "ARC-Easy"), "pocket": ("PocketMC",)}  # categorical, so quick to measure


def make_eval_task(name: str, recipe: str = "") -> Task:
    """The test split of a task by its name in EVAL_TASKS, whatever the case of its letters.

    A name that both recipes have means the given recipe's task (default: find_recipe()). Raises UserError naming the
    nearest name for one that neither has.
    """
    recipe = check_choice("the recipe", recipe or find_recipe(), RECIPES)
    makers = EVAL_TASKS["speedrun"] | EVAL_TASKS["pocket"] | EVAL_TASKS[recipe]
    found = {known.lower(): known for known in makers}
    if name.lower() not in found:
        near = found[difflib.get_close_matches(name.lower(), found, n=1, cutoff=0)[0]]
        raise UserError(f"there is no task {name!r}; did you mean {near}? There are: {', '.join(makers)}")
    return makers[found[name.lower()]]()
