"""Measure how well the tokenizer compresses: bytes of text per token, the more the better.

    python -m scripts.tok_eval

The texts are five of different kinds, written for this purpose, and the first row group of the training and of the
validation data. GPT-2's and GPT-4's encodings are measured beside it where tiktoken has them on disk already; nothing
is downloaded. On every text the round trip is checked: decoding gives the text again.
"""

from dataclasses import dataclass

from nanochat.common import UserError, print0, user_errors
from nanochat.configurator import parse
from nanochat.dataset import read_row_group, row_groups, split_files
from nanochat.report import format_value, get_report
from nanochat.tokenizer import RustBPETokenizer, Tokenizer, get_tokenizer

PEERS = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}  # name -> tiktoken's name

NEWS = """\
LAUREL, Maryland, Oct. 11, 2022 - A spacecraft the size of a vending machine has changed the course of an \
asteroid, the first time that people have moved a body of the solar system on purpose. NASA said on Tuesday that \
its DART probe, which flew into Dimorphos on Sept. 26 at about 14,000 miles per hour, shortened the little \
moon's orbit around its larger companion, Didymos, by 32 minutes: from 11 hours and 55 minutes to 11 hours and \
23 minutes. A change of 73 seconds would have counted as success.

Neither asteroid was ever a threat. The pair was chosen because telescopes on the ground could time the orbit by \
the small dips in brightness as one passes in front of the other, some 7 million miles away. Much of the effect \
is recoil: the impact threw out a tail of dust thousands of miles long, and the rock that flew off gave the moon \
a larger kick than the probe itself.

An Italian cubesat, released 15 days before the crash, photographed the plume. Europe's Hera mission, which is \
to look at the scar from close by, is planned for launch in 2024."""

KOREAN = """\
한글은 누가, 언제, 왜 만들었는지가 알려진 드문 문자이다. 조선의 네 번째 임금 세종은 1443년에 새 문자를 만들고 \
1446년에 《훈민정음》이라는 책으로 널리 알렸다. 그 서문에서 임금은 나라의 말이 중국과 달라 한자로는 서로 통하지 \
않으니, 글을 모르는 백성이 하고 싶은 말이 있어도 그 뜻을 펴지 못하는 이가 많다고 하였다. 그래서 스물여덟 글자를 \
새로 만들었으니, 사람마다 쉽게 익혀 날마다 쓰는 데 편하게 하고자 할 따름이라고 적었다.

글자의 모양에는 까닭이 있다. 'ㄱ'은 혀뿌리가 목구멍을 막는 모양을, 'ㄴ'은 혀끝이 윗잇몸에 닿는 모양을, 'ㅁ'은 \
입의 모양을 본떴다. 소리가 세지면 획을 더하여 'ㅋ', 'ㄷ', 'ㅂ'처럼 새 글자를 만들었다. 모음은 하늘(ㆍ)과 \
땅(ㅡ)과 사람(ㅣ)을 본뜬 세 글자를 어울러 만들었다. 오늘날에는 스물네 글자를 쓰며, 자음과 모음을 모아 한 음절을 \
네모나게 적는다. 현대 한글로 적을 수 있는 음절은 모두 11,172개이고, 유니코드에도 그 수만큼의 글자가 들어 있다.

만든 원리를 풀이한 책인 해례본은 오랫동안 보이지 않다가 1940년에 경상북도 안동에서 발견되었다. '한글'이라는 \
이름은 20세기 초에 국어학자 주시경과 그 동료들이 쓰기 시작한 것으로 알려져 있다. 그보다 앞서 1896년에 창간된 \
《독립신문》은 한글만으로, 낱말 사이를 띄어서 찍었다. 해례본은 1997년에 유네스코 세계기록유산에 올랐다. \
한국에서는 10월 9일을 한글날로 기념하고, 유네스코는 해마다 문맹을 없애는 데 힘쓴 사람과 단체에 세종대왕의 이름을 \
딴 상을 준다."""

CODE = '''\
import heapq
from collections.abc import Hashable

Graph = dict[Hashable, dict[Hashable, float]]


def shortest_path(graph: Graph, source: Hashable, target: Hashable) -> tuple[float, list[Hashable]]:
    """Dijkstra's algorithm: the length of the shortest path, and the nodes on it.

    graph[a][b] is the length of the edge from a to b and must not be negative.

    >>> shortest_path({"a": {"b": 7, "c": 2}, "c": {"b": 3}}, "a", "b")
    (5, ['a', 'c', 'b'])
    """
    queue = [(0, 0, source, None)]  # (distance, ticket, node, node before it)
    before = {}
    ticket = 0  # breaks ties, so that nodes are never compared
    while queue:
        distance, _, node, previous = heapq.heappop(queue)
        if node in before:
            continue  # reached by a shorter path already
        before[node] = previous
        if node == target:
            path = [node]
            while before[path[-1]] is not None:
                path.append(before[path[-1]])
            return distance, path[::-1]
        for neighbour, length in graph.get(node, {}).items():
            if neighbour not in before:
                ticket += 1
                heapq.heappush(queue, (distance + length, ticket, neighbour, node))
    raise ValueError(f"there is no path from {source!r} to {target!r}")


if __name__ == "__main__":
    print(shortest_path({0: {1: 4, 2: 1}, 2: {1: 2, 3: 5}, 1: {3: 1}}, 0, 3))
'''

MATHEMATICS = r"""\section*{Two ways to add up}

\textbf{Theorem 1.} For every integer $n \ge 1$, the sum of the first $n$ odd numbers is $n^2$:
\[ \sum_{k=1}^{n} (2k - 1) = 1 + 3 + 5 + \cdots + (2n - 1) = n^2. \]
\textit{Proof.} By induction. For $n = 1$ both sides are $1$. If the formula holds for $n$, then adding the next odd
number gives $n^2 + (2n + 1) = (n + 1)^2$, which is the formula for $n + 1$. \hfill $\blacksquare$

\textbf{Theorem 2.} The harmonic series diverges, yet the series of reciprocal squares converges, and (Euler, 1734)
\[ \sum_{k=1}^{\infty} \frac{1}{k} = \infty, \qquad \sum_{k=1}^{\infty} \frac{1}{k^2} = \frac{\pi^2}{6}
   \approx 1.644934. \]
\textit{Proof of the first half.} Group the terms: $\frac{1}{3} + \frac{1}{4} > \frac{1}{2}$, next
$\frac{1}{5} + \cdots + \frac{1}{8} > \frac{1}{2}$, and in general the $2^m$ terms from $2^m + 1$ to $2^{m+1}$ add up to
at least $2^m \cdot 2^{-(m+1)} = \frac{1}{2}$. So the partial sums exceed every bound. \textit{That the second series
converges} follows from $\frac{1}{k^2} < \frac{1}{k(k-1)} = \frac{1}{k-1} - \frac{1}{k}$ for $k \ge 2$: the right-hand
sides telescope, and all partial sums stay below $2$. \hfill $\blacksquare$"""

SCIENCE = """\
In February 1977 the submersible Alvin dived to 2,500 metres near the Galápagos Islands to look for hot springs \
on the sea floor. The geologists on board found them, and around them something that nobody had expected: dense \
crowds of clams, mussels, crabs and tube worms, in a darkness where no plant can grow. The giant tube worm, \
Riftia pachyptila, can be two metres long and has neither mouth nor gut. Its red plume is full of a haemoglobin \
that carries oxygen and hydrogen sulfide (H2S) at the same time, and an organ inside the body is packed with \
bacteria. They oxidise the sulfide and use the energy to fix carbon dioxide into sugars: CO2 + 4 H2S + O2 -> \
CH2O + 4 S + 3 H2O is the usual short form. The worm lives on what they make.

This is chemosynthesis, the counterpart of photosynthesis. Two years later the first "black smokers" were seen \
on the East Pacific Rise: chimneys of metal sulfides that pour out water of up to about 380 °C, which does not \
boil because the pressure at that depth is some 250 times that of the air. The ecosystem is not wholly free of \
the Sun, for the oxygen in the reaction comes from photosynthesis far above; but microbes that need only \
hydrogen and carbon dioxide, and make methane from them, live at vents as well. Some biologists think that life \
began in such a place."""

TEXTS = {"news": NEWS, "Korean": KOREAN, "code": CODE, "mathematics": MATHEMATICS, "science": SCIENCE}


@dataclass
class Config:
    """There is nothing to set."""


def split_documents() -> dict[str, list[str]]:
    """{"train": ..., "val": ...}: the documents of the first row group of each; nothing where there are no shards."""
    try:
        groups = {split: row_groups(split_files(split))[0] for split in ("train", "val")}
    except UserError as error:
        print0(f"train and val documents are left out: {error}")
        return {}
    return {split: read_row_group(group.path, group.index) for split, group in groups.items()}


def load_tokenizers() -> dict[str, Tokenizer]:
    """Name -> tokenizer: ours, and the peers that are on disk."""
    tokenizers: dict[str, Tokenizer] = {"ours": get_tokenizer()}
    for name, encoding in PEERS.items():
        try:
            tokenizers[name] = RustBPETokenizer.from_pretrained(encoding)
        except UserError as error:
            print0(f"{name} is left out: {error}")
    return tokenizers


def bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Bytes of UTF-8 per token over some texts, to three places.

    Raises AssertionError where a text does not survive the round trip.
    """
    num_bytes = num_tokens = 0
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, f"the round trip changes {text[:100]!r}"
        num_bytes += len(text.encode("utf-8"))
        num_tokens += len(ids)
    return round(num_bytes / max(num_tokens, 1), 3)


def print_table(rows: list[list[str | int | float]]) -> None:
    """Print rows, the header first, in columns set to the right but for the first one."""
    cells = [[format_value(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for first, *others in cells:
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print0("   ".join([first.ljust(widths[0]), *padded]))


@user_errors
def main(config: Config) -> None:
    # Setup
    tokenizers = load_tokenizers()
    samples = {name: [text] for name, text in TEXTS.items()} | split_documents()

    # Measure
    names = [f"{name}, {tokenizer.get_vocab_size():,} tokens" for name, tokenizer in tokenizers.items()]
    rows: list[list[str | int | float]] = [["bytes per token", "bytes", *names]]
    for sample, texts in samples.items():
        num_bytes = sum(len(text.encode("utf-8")) for text in texts)
        rows.append([sample, num_bytes, *(bytes_per_token(tokenizer, texts) for tokenizer in tokenizers.values())])

    # Finish
    print_table(rows)
    get_report().log("tokenizer", [rows])


if __name__ == "__main__":
    main(parse(Config))
