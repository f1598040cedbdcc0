//! Training: the merges from the counts of the pieces.
//!
//! All pieces lie in one array, a cell a byte, with a separator between them. A token fills as many cells as it has
//! bytes; its id is in the first and in the last of them, so that the tokens to the left and to the right are each one
//! look away. A pair of tokens is known by the positions at which it stands, or stood once; a merge goes through them
//! and rewrites the cells in place.
//!
//! Two things keep that quick. The pairs that a merge creates all hold the new token, so arrays over their other token
//! gather their counts and positions, without hashing. And after its creation a pair's count only falls, so the queue
//! may hold counts that are too large: whether one is right is only found out when its pair comes first, from the cells
//! themselves, and a pair whose count has fallen goes back with the right one. Most pairs never come so far. Only the
//! pairs of the first tokens, which stand at very many places and fall often, have their counts kept.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::mem;

use crate::{NUM_BYTES, PieceCounts};

/// Two adjacent tokens, left and right.
pub type Pair = (u32, u32);

/// Learns the merges of a vocabulary of `vocab_size` tokens; merge n makes the token `256 + n`.
///
/// Each merge takes the pair with the largest count (a pair counts once for every place at which it stands, overlapping
/// ones included, times the count of the piece; of equal counts the smaller pair wins) and replaces it from left to
/// right in every piece. There are fewer merges than asked for when no pair is left.
///
/// `progress` is called before each merge and at the end with the merges done and the merges wanted; its error ends the
/// work and is returned. Panics if `vocab_size` is below 256 or if the distinct pieces have 2^32 bytes or more.
///
/// ```
/// # use rustbpe::*;
/// let counts = PieceCounts::from_iter([("ab", 3), ("abc", 2), ("bc", 3)]);
/// let merges = learn_merges(counts, 300, |_, _| Ok::<_, ()>(())).unwrap();
/// // (a, b) and (b, c) both count 5, and (a, b) is the smaller; (256, c) is then left with the 2 of "abc".
/// assert_eq!(merges, [(97, 98), (98, 99), (256, 99)]);
/// ```
pub fn learn_merges<E>(
    counts: PieceCounts,
    vocab_size: u32,
    mut progress: impl FnMut(usize, usize) -> Result<(), E>,
) -> Result<Vec<Pair>, E> {
    assert!(vocab_size >= NUM_BYTES, "vocab_size {vocab_size} is below {NUM_BYTES}");
    let wanted = (vocab_size - NUM_BYTES) as usize;
    let mut merges = Vec::new();
    if wanted > 0 {
        let mut learner = Learner::new(&counts);
        drop(counts);
        while merges.len() < wanted {
            progress(merges.len(), wanted)?;
            let Some(pair) = learner.merge_most_frequent() else { break };
            merges.push(pair);
        }
    }
    progress(merges.len(), wanted)?;
    Ok(merges)
}

/// A byte of a piece.
#[derive(Clone, Copy)]
struct Cell {
    /// The token that begins or ends here. In the middle of a token it is `INSIDE`, between two pieces `SEPARATOR`.
    token: u32,
    /// How often the piece occurs. It is here for the same reason for which the counts of pairs are not: it costs no
    /// look at another place.
    count: u32,
}

const SEPARATOR: u32 = u32::MAX;
const INSIDE: u32 = u32::MAX - 1;

/// The counts of pairs of tokens below this are kept.
const NUM_KEPT: usize = 512;

/// The number of bits that a count can have, and 0.
const COUNT_BITS: usize = i64::BITS as usize;

/// A pair, its count or a larger number, and where it stands or stood once: `positions[start..end]` of the learner,
/// ascending within each piece. A position is the first cell of the left token. The largest candidate is merged next.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    count: i64,
    pair: Reverse<Pair>,
    start: usize,
    end: usize,
}

/// The candidates. Only the largest ones are in order: the others wait by the number of bits of their counts, most of
/// them for ever.
#[derive(Default)]
struct Queue {
    first: BinaryHeap<Candidate>,
    /// The number of bits of the smallest counts in `first`; all that wait have fewer.
    bits: usize,
    waiting: Vec<Vec<Candidate>>,
}

impl Queue {
    /// Adds a candidate with a count of at least 1.
    fn push(&mut self, candidate: Candidate) {
        let bits = (i64::BITS - candidate.count.leading_zeros()) as usize;
        if bits >= self.bits {
            self.first.push(candidate);
        } else {
            self.waiting[bits].push(candidate);
        }
    }

    fn pop(&mut self) -> Option<Candidate> {
        while self.first.is_empty() && self.bits > 0 {
            self.bits -= 1;
            self.first = mem::take(&mut self.waiting[self.bits]).into();
        }
        self.first.pop()
    }
}

/// What the merge under way has found on one side of the new token.
#[derive(Clone, Copy, Default)]
struct Neighbour {
    count: i64,
    num_places: usize,
}

/// The neighbours on one side, by token, and which tokens they are.
#[derive(Default)]
struct Side {
    of_token: Vec<Neighbour>,
    tokens: Vec<u32>,
    /// (neighbour, position of the pair), in the order in which they were found.
    found: Vec<(u32, u32)>,
}

impl Side {
    fn add(&mut self, token: u32, position: usize, count: i64) {
        let neighbour = &mut self.of_token[token as usize];
        if neighbour.num_places == 0 {
            self.tokens.push(token);
        }
        neighbour.count += count;
        neighbour.num_places += 1;
        self.found.push((token, position as u32));
    }

    /// Makes a candidate of each neighbour's pair with the new token (`gained`), with its positions, uncounts the pair
    /// that it had before (`lost`), and forgets the neighbours.
    fn drain_into(
        &mut self,
        positions: &mut Vec<u32>,
        queue: &mut Queue,
        kept: &mut KeptCounts,
        gained: impl Fn(u32) -> Pair,
        lost: impl Fn(u32) -> Pair,
    ) {
        let mut end = positions.len();
        positions.resize(end + self.found.len(), 0);
        for &token in &self.tokens {
            let neighbour = &mut self.of_token[token as usize];
            let start = end;
            end += neighbour.num_places;
            queue.push(Candidate { count: neighbour.count, pair: Reverse(gained(token)), start, end });
            kept.add(gained(token), neighbour.count);
            kept.add(lost(token), -neighbour.count);
            neighbour.num_places = start; // from here on, where its next position goes
        }
        for (token, position) in self.found.drain(..) {
            let place = &mut self.of_token[token as usize].num_places;
            positions[*place] = position;
            *place += 1;
        }
        for token in self.tokens.drain(..) {
            self.of_token[token as usize] = Neighbour::default();
        }
    }
}

/// The counts of the pairs of the first tokens.
struct KeptCounts(Vec<i64>);

impl KeptCounts {
    /// None: the count of this pair is not kept.
    fn of(&mut self, pair: Pair) -> Option<&mut i64> {
        let (left, right) = (pair.0 as usize, pair.1 as usize);
        (left.max(right) < NUM_KEPT).then(|| &mut self.0[left * NUM_KEPT + right])
    }

    fn add(&mut self, pair: Pair, count: i64) {
        if let Some(kept) = self.of(pair) {
            *kept += count;
        }
    }
}

/// The state between two merges.
struct Learner {
    cells: Vec<Cell>,
    /// The number of bytes of each token.
    token_len: Vec<u32>,
    positions: Vec<u32>,
    queue: Queue,
    kept: KeptCounts,
    /// The pair that is being looked at: the positions at which it still stands, with the counts of their pieces.
    live: Vec<(u32, u32)>,
    left: Side,
    right: Side,
}

impl Learner {
    fn new(counts: &PieceCounts) -> Self {
        let mut learner = Learner {
            cells: Vec::with_capacity(counts.num_bytes() + counts.len() + 1),
            token_len: vec![1; NUM_BYTES as usize],
            positions: Vec::new(),
            queue: Queue {
                bits: COUNT_BITS,
                waiting: (0..COUNT_BITS).map(|_| Vec::new()).collect(),
                ..Queue::default()
            },
            kept: KeptCounts(vec![0; NUM_KEPT * NUM_KEPT]),
            live: Vec::new(),
            left: Side::default(),
            right: Side::default(),
        };
        learner.cells.push(Cell { token: SEPARATOR, count: 0 });
        for (bytes, mut rest) in counts.iter().filter(|(bytes, _)| bytes.len() > 1) {
            // A piece whose count has more than 32 bits is there several times.
            while rest > 0 {
                let count = u32::try_from(rest).unwrap_or(u32::MAX);
                rest -= i64::from(count);
                learner.cells.extend(bytes.iter().map(|&byte| Cell { token: byte.into(), count }));
                learner.cells.push(Cell { token: SEPARATOR, count });
            }
        }
        assert!(u32::try_from(learner.cells.len()).is_ok(), "the distinct pieces have 2^32 bytes or more");
        learner.find_pairs_of_bytes();
        learner
    }

    fn find_pairs_of_bytes(&mut self) {
        const N: usize = NUM_BYTES as usize;
        let mut found = vec![Neighbour::default(); N * N];
        let pair_at = |cells: &[Cell]| {
            let (left, right) = (cells[0].token, cells[1].token);
            (left != SEPARATOR && right != SEPARATOR).then_some(left as usize * N + right as usize)
        };
        for cells in self.cells.windows(2) {
            if let Some(pair) = pair_at(cells) {
                found[pair].count += i64::from(cells[0].count);
                found[pair].num_places += 1;
            }
        }
        let mut next_place = vec![0; N * N];
        let mut end = 0;
        for (pair, &Neighbour { count, num_places }) in found.iter().enumerate() {
            next_place[pair] = end;
            end += num_places;
            if num_places > 0 {
                let pair = Reverse(((pair / N) as u32, (pair % N) as u32));
                self.queue.push(Candidate { count, pair, start: end - num_places, end });
                self.kept.add(pair.0, count);
            }
        }
        self.positions = vec![0; end];
        for (position, cells) in self.cells.windows(2).enumerate() {
            if let Some(pair) = pair_at(cells) {
                self.positions[next_place[pair]] = position as u32;
                next_place[pair] += 1;
            }
        }
    }

    /// Replaces the pair with the largest count, of equal ones the smallest, by a new token. None: no pair is left.
    fn merge_most_frequent(&mut self) -> Option<Pair> {
        loop {
            let mut candidate = self.queue.pop()?;
            if let Some(&mut count) = self.kept.of(candidate.pair.0).filter(|count| **count != candidate.count) {
                if count > 0 {
                    self.queue.push(Candidate { count, ..candidate });
                }
                continue;
            }
            let count = self.find_live(&candidate);
            if count == candidate.count {
                self.merge(candidate.pair.0);
                return Some(candidate.pair.0);
            }
            if count > 0 {
                candidate.count = count;
                candidate.end = candidate.start + self.live.len();
                for (position, live) in self.positions[candidate.start..].iter_mut().zip(&self.live) {
                    *position = live.0;
                }
                self.queue.push(candidate);
            }
        }
    }

    /// Finds the positions at which a pair stands, and returns its count.
    fn find_live(&mut self, candidate: &Candidate) -> i64 {
        let Reverse((left, right)) = candidate.pair;
        let left_len = self.token_len[left as usize] as usize;
        self.live.clear();
        self.live.resize(candidate.end - candidate.start, (0, 0));
        // The cells are mostly not in the processor's cache: in a loop without branches it looks at many of them at the
        // same time.
        let (mut num_live, mut count) = (0, 0);
        for &position in &self.positions[candidate.start..candidate.end] {
            let cell = self.cells[position as usize];
            let is_live = (cell.token == left) & (self.cells[position as usize + left_len].token == right);
            self.live[num_live] = (position, cell.count);
            num_live += usize::from(is_live);
            count += i64::from(cell.count) * i64::from(is_live);
        }
        self.live.truncate(num_live);
        count
    }

    /// Replaces `pair` by the next token at the live positions, and adds the pairs that this creates.
    fn merge(&mut self, pair: Pair) {
        let new_token = self.token_len.len() as u32;
        let left_len = self.token_len[pair.0 as usize] as usize;
        let len = left_len + self.token_len[pair.1 as usize] as usize;
        self.token_len.push(len as u32);
        self.left.of_token.resize(self.token_len.len(), Neighbour::default());
        self.right.of_token.resize(self.token_len.len(), Neighbour::default());

        let cells = &mut self.cells;
        for &(position, count) in &self.live {
            let first = position as usize;
            let (middle, after, count) = (first + left_len, first + len, i64::from(count));
            if cells[first].token != pair.0 || cells[middle].token != pair.1 {
                continue; // in a run of one token, the pair before has just been merged with a part of this one
            }
            // To the left everything is merged already, to the right nothing is.
            let left = cells[first - 1].token;
            if left != SEPARATOR {
                self.left.add(left, first - self.token_len[left as usize] as usize, count);
            }
            let right = cells[after].token;
            if right != SEPARATOR {
                self.right.add(right, first, count);
            }
            cells[middle - 1].token = INSIDE;
            cells[middle].token = INSIDE;
            cells[first].token = new_token;
            cells[after - 1].token = new_token;
        }

        let Learner { positions, queue, kept, .. } = self;
        self.left.drain_into(positions, queue, kept, |token| (token, new_token), |token| (token, pair.0));
        self.right.drain_into(positions, queue, kept, |token| (new_token, token), |token| (pair.1, token));
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::testing::{Random, num_cases, replaced};

    fn train(counts: &PieceCounts, vocab_size: u32) -> Vec<Pair> {
        learn_merges(counts.clone(), vocab_size, |_, _| Ok::<_, ()>(())).unwrap()
    }

    /// Training as the definition says it: all pairs counted anew for every merge.
    fn train_naively(counts: &PieceCounts, vocab_size: u32) -> Vec<Pair> {
        let mut words: Vec<(Vec<u32>, i64)> =
            counts.iter().map(|(piece, count)| (piece.iter().map(|&byte| byte.into()).collect(), count)).collect();
        let mut merges = Vec::new();
        for id in NUM_BYTES..vocab_size {
            let mut pairs: BTreeMap<Pair, i64> = BTreeMap::new();
            for (tokens, count) in &words {
                for pair in tokens.windows(2) {
                    *pairs.entry((pair[0], pair[1])).or_default() += count;
                }
            }
            let Some((&best, _)) = pairs.iter().max_by_key(|&(&pair, &count)| (count, Reverse(pair))) else { break };
            for (tokens, _) in &mut words {
                *tokens = replaced(tokens, best, id);
            }
            merges.push(best);
        }
        merges
    }

    #[test]
    fn merges_are_those_of_the_definition() {
        let mut random = Random(1);
        for alphabet in [&['a', 'b'][..], &['a', 'b', 'c', 'd', 'é'], &['x', '字', '🙂']] {
            for _ in 0..num_cases(100) {
                let counts: PieceCounts =
                    (0..20).map(|_| (random.text(alphabet, 12), 1 + random.below(4) as i64)).collect();
                assert_eq!(train(&counts, 320), train_naively(&counts, 320), "{counts:?}");
            }
        }
    }

    #[test]
    fn long_runs_merge_as_the_definition_says() {
        for text in ["a".repeat(301), "ab".repeat(150), "aab".repeat(100), "abcabcab".repeat(40)] {
            let counts = PieceCounts::from_iter([(text.as_str(), 1), (&text[1..], 2)]);
            assert_eq!(train(&counts, 300), train_naively(&counts, 300), "{text}");
        }
    }

    #[test]
    fn equal_counts_go_to_the_smaller_pair() {
        let counts = PieceCounts::from_iter([("zy", 2), ("ab", 2), ("aa", 2)]);
        assert_eq!(train(&counts, 259), [(97, 97), (97, 98), (122, 121)]);
    }

    #[test]
    fn overlapping_pairs_count_each_and_merge_from_the_left() {
        // (a, a) stands at three places of "aaaa" and outweighs the two of (b, c); then (256, 256) is left there.
        let counts = PieceCounts::from_iter([("aaaa", 1), ("bc", 2)]);
        assert_eq!(train(&counts, 300), [(97, 97), (98, 99), (256, 256)]);
        let counts = PieceCounts::from_iter([("aaa", 1)]);
        assert_eq!(train(&counts, 300), [(97, 97), (256, 97)]);
    }

    #[test]
    fn counts_go_beyond_32_bits() {
        let counts = PieceCounts::from_iter([("ab", 3_000_000_000), ("cb", 2), ("db", 5_000_000_000)]);
        assert_eq!(train(&counts, 300), [(100, 98), (97, 98), (99, 98)]);
    }

    #[test]
    fn learning_reports_every_merge_and_stops_on_an_error() {
        let counts = PieceCounts::from_iter([("abcd", 1)]);
        let mut reports = Vec::new();
        let result = learn_merges(counts, 266, |done, wanted| {
            reports.push((done, wanted));
            if done == 2 { Err("stop") } else { Ok(()) }
        });
        assert_eq!(result, Err("stop"));
        assert_eq!(reports, [(0, 10), (1, 10), (2, 10)]);
    }

    #[test]
    fn nothing_is_learned_from_nothing() {
        assert_eq!(train(&PieceCounts::default(), 1000), []);
        assert_eq!(train(&PieceCounts::from_iter([("", 3), ("a", 9)]), 1000), []);
    }
}
