//! Training: the merges from the counts of the pieces.
//!
//! All pieces lie in one array, a cell a byte, with a separator between them. A token fills as many cells as it has
//! bytes; its id is in the first and in the last of them, so that the tokens to the left and to the right are each one
//! look away. A pair of tokens is known by the positions at which it stands, or stood once; a merge goes through them
//! and rewrites the cells in place.
//!
//! Two things keep that quick. The pairs that a merge creates all hold the new token, so their counts are gathered in
//! an array over their other token, and so is what the pairs lose that the merge breaks up: the table of all pairs is
//! asked once for each pair and not for each place. And after its creation a pair's count only falls, so the queue may
//! hold counts that are too large: a pair that comes out with an old count goes back with the right one.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::hash_map::Entry;

use rustc_hash::FxHashMap;

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
            let Some((pair, places)) = learner.pop_most_frequent() else { break };
            learner.merge(pair, places);
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
    piece: u32,
}

const SEPARATOR: u32 = u32::MAX;
const INSIDE: u32 = u32::MAX - 1;

/// Where a pair stands, or stood once: `positions[start..end]` of the learner, ascending within each piece. A position
/// is the first cell of the left token.
#[derive(Clone, Copy)]
struct Places {
    start: usize,
    end: usize,
}

struct PairStats {
    count: i64,
    places: Places,
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
}

/// The state between two merges. The queue holds every pair of `pairs` once, with a count that is right or too large.
struct Learner {
    cells: Vec<Cell>,
    /// The count of each piece.
    counts: Vec<i64>,
    /// The number of bytes of each token.
    token_len: Vec<u32>,
    positions: Vec<u32>,
    pairs: FxHashMap<Pair, PairStats>,
    queue: BinaryHeap<(i64, Reverse<Pair>)>,
    left: Side,
    right: Side,
}

impl Learner {
    fn new(counts: &PieceCounts) -> Self {
        let num_cells = counts.num_bytes() + counts.len() + 1;
        assert!(u32::try_from(num_cells).is_ok(), "the distinct pieces have 2^32 bytes or more");
        let mut learner = Learner {
            cells: Vec::with_capacity(num_cells),
            counts: Vec::with_capacity(counts.len()),
            token_len: vec![1; NUM_BYTES as usize],
            positions: Vec::new(),
            pairs: FxHashMap::default(),
            queue: BinaryHeap::new(),
            left: Side::default(),
            right: Side::default(),
        };
        learner.cells.push(Cell { token: SEPARATOR, piece: 0 });
        for (bytes, count) in counts.iter().filter(|(bytes, _)| bytes.len() > 1) {
            let piece = learner.counts.len() as u32;
            learner.counts.push(count);
            learner.cells.extend(bytes.iter().map(|&byte| Cell { token: byte.into(), piece }));
            learner.cells.push(Cell { token: SEPARATOR, piece });
        }
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
                found[pair].count += self.counts[cells[0].piece as usize];
                found[pair].num_places += 1;
            }
        }
        let mut next_place = vec![0; N * N];
        let mut end = 0;
        for (pair, &Neighbour { count, num_places }) in found.iter().enumerate() {
            next_place[pair] = end;
            end += num_places;
            if num_places > 0 {
                let places = Places { start: end - num_places, end };
                self.add_pair(((pair / N) as u32, (pair % N) as u32), count, places);
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

    fn add_pair(&mut self, pair: Pair, count: i64, places: Places) {
        self.pairs.insert(pair, PairStats { count, places });
        self.queue.push((count, Reverse(pair)));
    }

    /// Takes the pair with the largest count, of equal ones the smallest, from queue and table. None: no pair is left.
    fn pop_most_frequent(&mut self) -> Option<(Pair, Places)> {
        while let Some((queued_count, Reverse(pair))) = self.queue.pop() {
            let Entry::Occupied(entry) = self.pairs.entry(pair) else { continue };
            let count = entry.get().count;
            if count == queued_count {
                return Some((pair, entry.remove().places));
            }
            self.queue.push((count, Reverse(pair)));
        }
        None
    }

    /// Replaces `pair` by the next token wherever it stands among `places`.
    fn merge(&mut self, pair: Pair, places: Places) {
        let new_token = self.token_len.len() as u32;
        let left_len = self.token_len[pair.0 as usize] as usize;
        let len = left_len + self.token_len[pair.1 as usize] as usize;
        self.token_len.push(len as u32);
        self.left.of_token.resize(self.token_len.len(), Neighbour::default());
        self.right.of_token.resize(self.token_len.len(), Neighbour::default());

        for place in places.start..places.end {
            let first = self.positions[place] as usize;
            let (middle, after) = (first + left_len, first + len);
            if self.cells[first].token != pair.0 || self.cells[middle].token != pair.1 {
                continue;
            }
            let count = self.counts[self.cells[first].piece as usize];
            // To the left everything is merged already, to the right nothing is.
            let left = self.cells[first - 1].token;
            if left != SEPARATOR {
                self.left.add(left, first - self.token_len[left as usize] as usize, count);
            }
            let right = self.cells[after].token;
            if right != SEPARATOR {
                self.right.add(right, first, count);
            }
            self.cells[middle - 1].token = INSIDE;
            self.cells[middle].token = INSIDE;
            self.cells[first].token = new_token;
            self.cells[after - 1].token = new_token;
        }
        self.update_pairs(pair, new_token);
    }

    /// Adds the pairs that a merge has created, and takes away what it has taken from others.
    fn update_pairs(&mut self, pair: Pair, new_token: u32) {
        // Where the pair stands twice in a row, the new token came to stand before pair.0 until that was merged too.
        let undone = self.left.of_token[new_token as usize].count;
        for i in 0..self.left.tokens.len() {
            let token = self.left.tokens[i];
            let Neighbour { count, .. } = self.left.of_token[token as usize];
            self.lose((token, pair.0), count);
            let places = Self::allocate(&mut self.positions, &mut self.left.of_token[token as usize]);
            self.add_pair((token, new_token), count, places);
        }
        for i in 0..self.right.tokens.len() {
            let token = self.right.tokens[i];
            let Neighbour { count, .. } = self.right.of_token[token as usize];
            self.lose((pair.1, token), count);
            let places = Self::allocate(&mut self.positions, &mut self.right.of_token[token as usize]);
            let count = if token == pair.0 { count - undone } else { count };
            if count > 0 {
                self.add_pair((new_token, token), count, places);
            }
        }
        for side in [&mut self.left, &mut self.right] {
            for &(token, position) in &side.found {
                let next_place = &mut side.of_token[token as usize].num_places;
                self.positions[*next_place] = position;
                *next_place += 1;
            }
            for token in side.tokens.drain(..) {
                side.of_token[token as usize] = Neighbour::default();
            }
            side.found.clear();
        }
    }

    /// Makes room for the places of a neighbour, whose `num_places` becomes the index of the first of them.
    fn allocate(positions: &mut Vec<u32>, neighbour: &mut Neighbour) -> Places {
        let start = positions.len();
        let end = start + neighbour.num_places;
        positions.resize(end, 0);
        neighbour.num_places = start;
        Places { start, end }
    }

    /// Uncounts places at which `pair` stood. The pair that is being merged is gone from the table already, and so is
    /// one that the same merge has made and broken up again.
    fn lose(&mut self, pair: Pair, count: i64) {
        if let Entry::Occupied(mut entry) = self.pairs.entry(pair) {
            entry.get_mut().count -= count;
            if entry.get().count == 0 {
                entry.remove();
            }
        }
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
