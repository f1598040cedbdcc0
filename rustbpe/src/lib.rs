//! Byte-pair encoding: training, encoding and decoding, exact and parallel.
//!
//! A regular expression splits a text into pieces, a piece is a sequence of bytes, and the bytes are the first tokens,
//! 0 to 255. Training merges the adjacent pair of tokens with the largest count over all pieces into a new token, over
//! and over; encoding applies those merges to a piece in the order in which they were learned (Sennrich et al.,
//! <https://arxiv.org/abs/1508.07909>, on bytes as in GPT-2).
//!
//! Four parts, each of which can be replaced by a faster one without touching the others:
//!
//! | part             | from           | to                                    |
//! |------------------|----------------|---------------------------------------|
//! | [`Splitter`]     | a text         | its pieces                            |
//! | [`PieceCounter`] | texts          | how often each distinct piece occurs  |
//! | [`learn_merges`] | those counts   | the merges                            |
//! | [`Encoder`]      | the merges     | ids from texts, and texts from ids    |
//!
//! The result of training depends on the texts, the pattern and the vocabulary size alone: neither on the order of the
//! texts nor on the number of threads. Special tokens, normalisation and files are left to the caller.
//!
//! This file is plain Rust; the Python module is in `py.rs`, behind the feature `python`.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use regex_automata::{Anchored, Input, meta};
use rustc_hash::FxHashMap;

#[cfg(feature = "python")]
mod py;

/// The pattern used where none is given: GPT-4's.
pub const DEFAULT_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
);

/// The number of tokens that are there before any merge, one for each byte.
pub const NUM_BYTES: u32 = 256;

/// Two adjacent tokens, left and right.
pub type Pair = (u32, u32);

/// Distinct pieces with the number of times that each occurs.
pub type PieceCounts = FxHashMap<Box<str>, i64>;

/// What a caller can get wrong; the text says what to change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The split pattern is not a valid regular expression.
    Pattern { pattern: String, reason: String },
    /// The split pattern gave up on a text, for instance because it backtracks too much.
    Split { reason: String },
    /// An id that is not in the vocabulary.
    UnknownId { id: i64, vocab_size: u32 },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Pattern { pattern, reason } => write!(f, "invalid split pattern {pattern:?}: {reason}"),
            Error::Split { reason } => write!(f, "the split pattern failed on a text: {reason}"),
            Error::UnknownId { id, vocab_size } => {
                write!(f, "unknown token id {id}: ids go from 0 to {}", vocab_size - 1)
            }
        }
    }
}

impl std::error::Error for Error {}

// ---------------------------------------------------------------------------------------------------------------------
// Splitting

/// Cuts texts into the pieces within which merges happen.
#[derive(Clone)]
pub struct Splitter {
    pattern: String,
    engine: Engine,
}

#[derive(Clone)]
enum Engine {
    Gpt4(Gpt4Engine),
    Backtracking(fancy_regex::Regex),
}

impl Splitter {
    /// Compiles `pattern`, a regular expression with look-around and possessive quantifiers.
    pub fn new(pattern: &str) -> Result<Self, Error> {
        let engine = match Gpt4Engine::for_pattern(pattern) {
            Some(engine) => Engine::Gpt4(engine),
            None => Engine::Backtracking(
                fancy_regex::Regex::new(pattern)
                    .map_err(|e| Error::Pattern { pattern: pattern.to_owned(), reason: e.to_string() })?,
            ),
        };
        Ok(Splitter { pattern: pattern.to_owned(), engine })
    }

    /// The pattern as it was given.
    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    /// Calls `visit` with the successive matches in `text` that are not empty. What the pattern does not match is
    /// skipped.
    pub fn for_each_piece<'t>(&self, text: &'t str, mut visit: impl FnMut(&'t str)) -> Result<(), Error> {
        match &self.engine {
            Engine::Gpt4(engine) => engine.for_each_piece(text, visit),
            Engine::Backtracking(regex) => {
                for found in regex.find_iter(text) {
                    let piece = found.map_err(|e| Error::Split { reason: e.to_string() })?.as_str();
                    if !piece.is_empty() {
                        visit(piece);
                    }
                }
            }
        }
        Ok(())
    }
}

/// The patterns of GPT-4's kind, which differ in the number of digits in a piece, without backtracking.
///
/// A backtracking engine is slow on them, and gives up on a run of a million spaces. Yet only their `\s+(?!\S)` is
/// beyond a plain automaton: no other alternative ends in white space that is no line break, so the automaton looks for
/// `\s+` in its place and the last character of such a piece is given back where more text follows. The possessive
/// quantifiers can be plain ones: what comes after them never matches what they would have to give back.
#[derive(Clone)]
struct Gpt4Engine {
    regex: meta::Regex,
}

impl Gpt4Engine {
    /// The engine that splits as `pattern` does. None: the pattern is of another kind.
    fn for_pattern(pattern: &str) -> Option<Self> {
        let digits = pattern
            .strip_prefix(r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,")?
            .strip_suffix(r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")?;
        if !matches!(digits.as_bytes(), [b'1'..=b'9']) {
            return None;
        }
        let head = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,";
        let tail = r"}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+";
        let automaton = format!("{head}{digits}{tail}");
        Some(Gpt4Engine { regex: meta::Regex::new(&automaton).expect("a valid regular expression") })
    }

    /// As [`Splitter::for_each_piece`]; every character is in a piece.
    fn for_each_piece<'t>(&self, text: &'t str, mut visit: impl FnMut(&'t str)) {
        let mut start = 0;
        while start < text.len() {
            let rest = Input::new(text).range(start..).anchored(Anchored::Yes);
            let mut end = self.regex.search_half(&rest).expect("an alternative for every character").offset();
            let last = text[start..end].chars().next_back().expect("no alternative is empty");
            let is_gap = last.is_whitespace() && last != '\r' && last != '\n';
            if is_gap && end < text.len() && end - start > last.len_utf8() {
                end -= last.len_utf8();
            }
            visit(&text[start..end]);
            start = end;
        }
    }
}

/// The number of threads that this process may use.
pub fn available_threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

// ---------------------------------------------------------------------------------------------------------------------
// Counting pieces

/// Counts the pieces of a stream of texts. Every thread keeps a table of its own until the end.
pub struct PieceCounter {
    workers: Vec<CountWorker>,
}

struct CountWorker {
    splitter: Splitter,
    counts: PieceCounts,
}

impl PieceCounter {
    /// A counter without texts that works with `num_threads` threads.
    pub fn new(splitter: &Splitter, num_threads: usize) -> Self {
        // A clone per thread: the threads would wait for each other on the scratch memory of one regular expression.
        let worker = || CountWorker { splitter: splitter.clone(), counts: PieceCounts::default() };
        PieceCounter { workers: (0..num_threads.max(1)).map(|_| worker()).collect() }
    }

    /// Adds the pieces of `texts`. After an error the counts are those of a part of the texts.
    pub fn add<S: AsRef<str> + Sync>(&mut self, texts: &[S]) -> Result<(), Error> {
        let next_text = AtomicUsize::new(0);
        thread::scope(|scope| {
            let spawn = |worker| scope.spawn(|| CountWorker::take_texts(worker, texts, &next_text));
            let threads: Vec<_> = self.workers.iter_mut().map(spawn).collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("a counting thread panicked"))
        })
    }

    /// The counts over all texts.
    pub fn finish(self) -> PieceCounts {
        let mut tables = self.workers.into_iter().map(|worker| worker.counts);
        let mut total = tables.next().unwrap_or_default();
        for (piece, count) in tables.flatten() {
            *total.entry(piece).or_default() += count;
        }
        total
    }
}

impl CountWorker {
    fn take_texts<S: AsRef<str>>(&mut self, texts: &[S], next_text: &AtomicUsize) -> Result<(), Error> {
        while let Some(text) = texts.get(next_text.fetch_add(1, Ordering::Relaxed)) {
            // Looked up before it is inserted: nearly every piece is there already and needs no copy.
            self.splitter.for_each_piece(text.as_ref(), |piece| match self.counts.get_mut(piece) {
                Some(count) => *count += 1,
                None => {
                    self.counts.insert(piece.into(), 1);
                }
            })?;
        }
        Ok(())
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Learning merges

/// Learns the merges of a vocabulary of `vocab_size` tokens; merge n makes the token `256 + n`.
///
/// Each merge takes the pair with the largest count (a pair counts once for every place at which it stands, overlapping
/// ones included, times the count of the piece; of equal counts the smaller pair wins) and replaces it from left to
/// right in every piece. There are fewer merges than asked for when no pair is left.
///
/// `progress` is called before each merge and at the end with the merges done and the merges wanted; its error ends the
/// work and is returned. Panics if `vocab_size` is below 256 or if there are 2^32 pieces or more.
///
/// ```
/// # use rustbpe::*;
/// let counts = PieceCounts::from_iter([("ab".into(), 3), ("abc".into(), 2), ("bc".into(), 3)]);
/// let merges = learn_merges(&counts, 300, |_, _| Ok::<_, ()>(())).unwrap();
/// // (a, b) and (b, c) both count 5, and (a, b) is the smaller; (256, c) is then left with the 2 of "abc".
/// assert_eq!(merges, [(97, 98), (98, 99), (256, 99)]);
/// ```
pub fn learn_merges<E>(
    counts: &PieceCounts,
    vocab_size: u32,
    mut progress: impl FnMut(usize, usize) -> Result<(), E>,
) -> Result<Vec<Pair>, E> {
    assert!(vocab_size >= NUM_BYTES, "vocab_size {vocab_size} is below {NUM_BYTES}");
    let wanted = (vocab_size - NUM_BYTES) as usize;
    let mut merges = Vec::new();
    if wanted > 0 {
        let mut learner = Learner::new(counts);
        while merges.len() < wanted {
            progress(merges.len(), wanted)?;
            let Some(pair) = learner.pop_most_frequent() else { break };
            learner.merge(pair, NUM_BYTES + merges.len() as u32);
            merges.push(pair);
        }
    }
    progress(merges.len(), wanted)?;
    Ok(merges)
}

/// A distinct piece: its tokens are `tokens[start..start + len]` of the learner, and it occurs `count` times.
struct Word {
    start: usize,
    len: usize,
    count: i64,
}

/// What is known of a pair: its count, and the words that it is in, or was once, ascending and each named once.
#[derive(Default)]
struct PairStats {
    count: i64,
    words: Vec<u32>,
}

/// The pairs that stand somewhere, and those of them that are not in the learner's queue yet.
#[derive(Default)]
struct PairTable {
    stats: FxHashMap<Pair, PairStats>,
    created: Vec<Pair>,
}

impl PairTable {
    /// Counts a place in `word` at which `pair` stands from now on.
    fn gain(&mut self, pair: Pair, word: u32, count: i64) {
        let stats = self.stats.entry(pair).or_insert_with(|| {
            self.created.push(pair);
            PairStats::default()
        });
        stats.count += count;
        if stats.words.last() != Some(&word) {
            stats.words.push(word);
        }
    }

    /// Uncounts a place at which `pair` stood. Its words stay: one too many costs a look, finding one costs a search.
    fn lose(&mut self, pair: Pair, count: i64) {
        // The pair that is being merged is gone from the table, but overlaps itself in "aaa".
        if let Some(stats) = self.stats.get_mut(&pair) {
            stats.count -= count;
        }
    }
}

/// The state between two merges.
///
/// The queue holds every pair of the table once, with a count that is right or too large: only the merge that creates a
/// pair can raise its count. A pair whose queued count is out of date goes back with the right one when its turn comes.
struct Learner {
    tokens: Vec<u32>,
    words: Vec<Word>,
    pairs: PairTable,
    queue: BinaryHeap<(i64, Reverse<Pair>)>,
}

impl Learner {
    fn new(counts: &PieceCounts) -> Self {
        let mut tokens = Vec::with_capacity(counts.keys().map(|piece| piece.len()).sum());
        let mut words = Vec::with_capacity(counts.len());
        let mut pairs = PairTable::default();
        for (piece, &count) in counts {
            let index = u32::try_from(words.len()).expect("fewer than 2^32 distinct pieces");
            words.push(Word { start: tokens.len(), len: piece.len(), count });
            tokens.extend(piece.bytes().map(u32::from));
            for pair in piece.as_bytes().windows(2) {
                pairs.gain((pair[0].into(), pair[1].into()), index, count);
            }
        }
        let mut learner = Learner { tokens, words, pairs, queue: BinaryHeap::new() };
        learner.queue_created();
        learner
    }

    fn queue_created(&mut self) {
        for pair in self.pairs.created.drain(..) {
            self.queue.push((self.pairs.stats[&pair].count, Reverse(pair)));
        }
    }

    /// Takes the pair with the largest count, of equal ones the smallest, from the queue. None: no pair is left.
    fn pop_most_frequent(&mut self) -> Option<Pair> {
        while let Some((queued_count, Reverse(pair))) = self.queue.pop() {
            let count = self.pairs.stats[&pair].count;
            if count == 0 {
                self.pairs.stats.remove(&pair);
            } else if count == queued_count {
                return Some(pair);
            } else {
                self.queue.push((count, Reverse(pair)));
            }
        }
        None
    }

    /// Replaces `pair`, which has just left the queue, by `new_id` everywhere.
    fn merge(&mut self, pair: Pair, new_id: u32) {
        let stats = self.pairs.stats.remove(&pair).expect("a pair from the queue is in the table");
        for word in stats.words {
            self.merge_in_word(word, pair, new_id);
        }
        self.queue_created();
    }

    /// Replaces `pair` by `new_id` in one word, from left to right, in place.
    fn merge_in_word(&mut self, index: u32, pair: Pair, new_id: u32) {
        let word = &mut self.words[index as usize];
        let tokens = &mut self.tokens[word.start..word.start + word.len];
        let (mut read, mut write) = (0, 0);
        while read < tokens.len() {
            if tokens[read] != pair.0 || tokens.get(read + 1) != Some(&pair.1) {
                tokens[write] = tokens[read];
                read += 1;
            } else {
                // tokens[..write] is rewritten already, tokens[read..] is not: `before` may be new_id itself.
                if let Some(&before) = tokens[..write].last() {
                    self.pairs.lose((before, pair.0), word.count);
                    self.pairs.gain((before, new_id), index, word.count);
                }
                if let Some(&after) = tokens.get(read + 2) {
                    self.pairs.lose((pair.1, after), word.count);
                    self.pairs.gain((new_id, after), index, word.count);
                }
                tokens[write] = new_id;
                read += 2;
            }
            write += 1;
        }
        word.len = write;
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Encoding and decoding

/// A trained vocabulary: ids from texts, and texts from ids.
pub struct Encoder {
    splitter: Splitter,
    /// The pair that makes the token 256 + n.
    merges: Vec<Pair>,
    merged_ids: FxHashMap<Pair, u32>,
    /// The bytes of every token.
    tokens: Vec<Box<[u8]>>,
    token_ids: FxHashMap<Box<[u8]>, u32>,
}

impl Encoder {
    /// The vocabulary of the 256 bytes and of `merges`, each of which may use the tokens before it.
    pub fn new(splitter: Splitter, merges: Vec<Pair>) -> Self {
        let mut tokens: Vec<Box<[u8]>> = (0..=u8::MAX).map(|byte| Box::from([byte])).collect();
        for &(left, right) in &merges {
            tokens.push([&*tokens[left as usize], &*tokens[right as usize]].concat().into());
        }
        let merged_ids = merges.iter().copied().zip(NUM_BYTES..).collect();
        let token_ids = tokens.iter().cloned().zip(0..).collect();
        Encoder { splitter, merges, merged_ids, tokens, token_ids }
    }

    /// The number of tokens.
    pub fn vocab_size(&self) -> u32 {
        NUM_BYTES + self.merges.len() as u32
    }

    /// The pattern that splits texts.
    pub fn pattern(&self) -> &str {
        self.splitter.pattern()
    }

    /// The bytes of every token, in the order of the ids.
    pub fn tokens(&self) -> &[Box<[u8]>] {
        &self.tokens
    }

    /// The ids of `text`.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encode_split_by(&self.splitter, text)
    }

    /// [`Encoder::encode`] for each of `texts`, in their order, on at most `num_threads` threads.
    pub fn encode_batch<S: AsRef<str> + Sync>(&self, texts: &[S], num_threads: usize) -> Result<Vec<Vec<u32>>, Error> {
        let next_text = AtomicUsize::new(0);
        let encode_some = || {
            let splitter = self.splitter.clone(); // a clone per thread, as in PieceCounter
            let mut encoded = Vec::new();
            loop {
                let index = next_text.fetch_add(1, Ordering::Relaxed);
                let Some(text) = texts.get(index) else { return Ok(encoded) };
                encoded.push((index, self.encode_split_by(&splitter, text.as_ref())?));
            }
        };
        let mut ids_of_texts = vec![Vec::new(); texts.len()];
        thread::scope(|scope| {
            let threads: Vec<_> = (0..num_threads.min(texts.len())).map(|_| scope.spawn(encode_some)).collect();
            for thread in threads {
                for (index, ids) in thread.join().expect("an encoding thread panicked")? {
                    ids_of_texts[index] = ids;
                }
            }
            Ok(ids_of_texts)
        })
    }

    /// The bytes that `ids` stand for. They need not be UTF-8: a token can end within a character.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        for &id in ids {
            let token = self.tokens.get(id as usize);
            bytes.extend_from_slice(token.ok_or(Error::UnknownId { id: id.into(), vocab_size: self.vocab_size() })?);
        }
        Ok(bytes)
    }

    fn encode_split_by(&self, splitter: &Splitter, text: &str) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::new();
        // The bytes of a token are always encoded as that token: of the merges that apply to them, those that made it
        // come first.
        splitter.for_each_piece(text, |piece| match self.token_ids.get(piece.as_bytes()) {
            Some(&id) => ids.push(id),
            None => self.merge_bytes(piece.as_bytes(), &mut ids),
        })?;
        Ok(ids)
    }

    /// Appends the ids of one piece: takes the earliest merge that applies, of equal ones the leftmost, until none
    /// does. A queue of merges over a linked list of tokens makes that n log n, however long the piece.
    fn merge_bytes(&self, piece: &[u8], ids: &mut Vec<u32>) {
        let mut list = TokenList::new(piece);
        let mut queue = BinaryHeap::with_capacity(piece.len());
        for position in 1..piece.len() {
            self.queue_merge(&list, position - 1, &mut queue);
        }
        while let Some(Reverse((id, position))) = queue.pop() {
            // An entry can be older than the tokens at its place.
            if list.pair_at(position) != Some(self.merges[(id - NUM_BYTES) as usize]) {
                continue;
            }
            list.merge_at(position, id);
            self.queue_merge(&list, position, &mut queue);
            if let Some(before) = list.previous(position) {
                self.queue_merge(&list, before, &mut queue);
            }
        }
        ids.extend(list.live_tokens());
    }

    fn queue_merge(&self, list: &TokenList, position: usize, queue: &mut BinaryHeap<Reverse<(u32, usize)>>) {
        let merged_id = list.pair_at(position).and_then(|pair| self.merged_ids.get(&pair));
        if let Some(&id) = merged_id {
            queue.push(Reverse((id, position)));
        }
    }
}

/// A doubly linked list of tokens. A token stands at the position of its first byte.
struct TokenList {
    links: Vec<Link>,
}

#[derive(Clone, Copy)]
struct Link {
    /// `MERGED_AWAY` where the token has become a part of the one before it.
    token: u32,
    /// Length in bytes: the next token stands this far to the right.
    len: usize,
    /// Length in bytes of the token before this one; 0 at the first.
    previous_len: usize,
}

const MERGED_AWAY: u32 = u32::MAX;

impl TokenList {
    fn new(piece: &[u8]) -> Self {
        let link = |(i, &byte): (usize, &u8)| Link { token: byte.into(), len: 1, previous_len: usize::from(i > 0) };
        TokenList { links: piece.iter().enumerate().map(link).collect() }
    }

    /// The token at `position` and the one after it. None: there is no token at `position`, or it is the last one.
    fn pair_at(&self, position: usize) -> Option<Pair> {
        let link = self.links[position];
        let next = self.links.get(position + link.len)?;
        (link.token != MERGED_AWAY).then_some((link.token, next.token))
    }

    /// The position of the token before the one at `position`.
    fn previous(&self, position: usize) -> Option<usize> {
        let previous_len = self.links[position].previous_len;
        (previous_len > 0).then(|| position - previous_len)
    }

    /// Makes one token, `id`, of the token at `position` and the one after it.
    fn merge_at(&mut self, position: usize, id: u32) {
        let next = position + self.links[position].len;
        self.links[next].token = MERGED_AWAY;
        let len = self.links[position].len + self.links[next].len;
        self.links[position].token = id;
        self.links[position].len = len;
        if let Some(after) = self.links.get_mut(position + len) {
            after.previous_len = len;
        }
    }

    fn live_tokens(&self) -> impl Iterator<Item = u32> {
        self.links.iter().map(|link| link.token).filter(|&token| token != MERGED_AWAY)
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Pseudo-random numbers, the same ones on every run (Knuth's MMIX generator).
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: usize) -> usize {
            self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (self.0 >> 33) as usize % n
        }

        fn text(&mut self, alphabet: &[char], max_chars: usize) -> String {
            (0..self.below(max_chars + 1)).map(|_| alphabet[self.below(alphabet.len())]).collect()
        }
    }

    fn train(counts: &PieceCounts, vocab_size: u32) -> Vec<Pair> {
        learn_merges(counts, vocab_size, |_, _| Ok::<_, ()>(())).unwrap()
    }

    /// `tokens` with every `pair` replaced from left to right.
    fn replaced(tokens: &[u32], pair: Pair, id: u32) -> Vec<u32> {
        let mut result = Vec::new();
        let mut rest = tokens;
        while let [first, tail @ ..] = rest {
            if tail.first().is_some_and(|&second| (*first, second) == pair) {
                result.push(id);
                rest = &tail[1..];
            } else {
                result.push(*first);
                rest = tail;
            }
        }
        result
    }

    /// Training as the definition says it: all pairs counted anew for every merge.
    fn train_naively(counts: &PieceCounts, vocab_size: u32) -> Vec<Pair> {
        let mut words: Vec<(Vec<u32>, i64)> =
            counts.iter().map(|(piece, &count)| (piece.bytes().map(u32::from).collect(), count)).collect();
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
            for _ in 0..60 {
                let counts: PieceCounts =
                    (0..20).map(|_| (random.text(alphabet, 12).into(), 1 + random.below(4) as i64)).collect();
                assert_eq!(train(&counts, 320), train_naively(&counts, 320), "{counts:?}");
            }
        }
    }

    #[test]
    fn equal_counts_go_to_the_smaller_pair() {
        let counts = PieceCounts::from_iter([("zy".into(), 2), ("ab".into(), 2), ("aa".into(), 2)]);
        assert_eq!(train(&counts, 259), [(97, 97), (97, 98), (122, 121)]);
    }

    #[test]
    fn overlapping_pairs_count_each_and_merge_from_the_left() {
        // (a, a) stands at three places of "aaaa" and outweighs the two of (b, c); then (256, 256) is left there.
        let counts = PieceCounts::from_iter([("aaaa".into(), 1), ("bc".into(), 2)]);
        assert_eq!(train(&counts, 300), [(97, 97), (98, 99), (256, 256)]);
        let counts = PieceCounts::from_iter([("aaa".into(), 1)]);
        assert_eq!(train(&counts, 300), [(97, 97), (256, 97)]);
    }

    #[test]
    fn counts_go_beyond_32_bits() {
        let counts =
            PieceCounts::from_iter([("ab".into(), 3_000_000_000), ("cb".into(), 2), ("db".into(), 5_000_000_000)]);
        assert_eq!(train(&counts, 300), [(100, 98), (97, 98), (99, 98)]);
    }

    #[test]
    fn learning_reports_every_merge_and_stops_on_an_error() {
        let counts = PieceCounts::from_iter([("abcd".into(), 1)]);
        let mut reports = Vec::new();
        let result = learn_merges(&counts, 266, |done, wanted| {
            reports.push((done, wanted));
            if done == 2 { Err("stop") } else { Ok(()) }
        });
        assert_eq!(result, Err("stop"));
        assert_eq!(reports, [(0, 10), (1, 10), (2, 10)]);
    }

    #[test]
    fn nothing_is_learned_from_nothing() {
        assert_eq!(train(&PieceCounts::default(), 1000), []);
        assert_eq!(train(&PieceCounts::from_iter([("".into(), 3), ("a".into(), 9)]), 1000), []);
    }

    #[test]
    fn the_automaton_splits_like_the_backtracking_engine() {
        // Each class of the pattern, and the characters at the edges of the Unicode classes.
        let alphabet: Vec<char> =
            "aZséſKı字ी\u{301}'’sdmtlvreLVRE019²Ⅷ٣ \u{85}\u{a0}\u{3000}\u{200b}\u{180e}\t\r\n.!-_🙂\0"
                .chars()
                .collect();
        let mut random = Random(2);
        for digits in 1..=3 {
            let pattern = DEFAULT_PATTERN.replace("{1,3}", &format!("{{1,{digits}}}"));
            let automaton = Gpt4Engine::for_pattern(&pattern).expect("a pattern of this kind");
            let oracle = fancy_regex::Regex::new(&pattern).unwrap();
            for _ in 0..5000 {
                let text = random.text(&alphabet, 16);
                let expected: Vec<&str> = oracle.find_iter(&text).map(|found| found.unwrap().as_str()).collect();
                let mut pieces = Vec::new();
                automaton.for_each_piece(&text, |piece| pieces.push(piece));
                assert_eq!(pieces, expected, "{text:?}");
            }
        }
    }

    #[test]
    fn other_patterns_go_to_the_backtracking_engine() {
        for pattern in [r"\w+", r"(?=a)|\w+", &DEFAULT_PATTERN.replace("{1,3}", "{1,30}")] {
            assert!(Gpt4Engine::for_pattern(pattern).is_none());
        }
        let mut pieces = Vec::new();
        Splitter::new(r"(?=a)|b(?!c)").unwrap().for_each_piece("abbc", |piece| pieces.push(piece)).unwrap();
        assert_eq!(pieces, ["b"]); // no empty piece at "a"
    }

    #[test]
    fn a_bad_pattern_and_one_that_gives_up_are_errors() {
        assert!(matches!(Splitter::new("(a"), Err(Error::Pattern { .. })));
        let splitter = Splitter::new(r"(?:a|b|ab)*?(?<!x)c").unwrap();
        let texts = ["ab".repeat(200)];
        assert!(matches!(PieceCounter::new(&splitter, 2).add(&texts), Err(Error::Split { .. })));
    }

    #[test]
    fn counts_do_not_depend_on_the_threads() {
        let mut random = Random(3);
        let alphabet: Vec<char> = "ab \n".chars().collect();
        let texts: Vec<String> = (0..200).map(|_| random.text(&alphabet, 50)).collect();
        let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
        let count = |num_threads, texts_at_a_time| {
            let mut counter = PieceCounter::new(&splitter, num_threads);
            texts.chunks(texts_at_a_time).for_each(|chunk| counter.add(chunk).unwrap());
            counter.finish()
        };
        let expected = count(1, 200);
        assert_eq!(
            expected.iter().map(|(piece, &count)| piece.len() as i64 * count).sum::<i64>(),
            texts.concat().len() as i64
        );
        assert_eq!(count(3, 200), expected);
        assert_eq!(count(4, 7), expected);
    }

    #[test]
    fn encoding_applies_the_merges_in_their_order() {
        let mut random = Random(4);
        let alphabet = ['a', 'b', 'c', 'é'];
        for _ in 0..30 {
            let counts: PieceCounts = (0..20).map(|_| (random.text(&alphabet, 10).into(), 1)).collect();
            let merges = train(&counts, 300);
            let encoder = Encoder::new(Splitter::new("(?s).+").unwrap(), merges.clone());
            let texts: Vec<String> = (0..20).map(|_| random.text(&alphabet, 40)).collect();
            let batch = encoder.encode_batch(&texts, 3).unwrap();
            for (text, ids) in texts.iter().zip(batch) {
                let bytes = text.bytes().map(u32::from).collect();
                let expected = merges
                    .iter()
                    .zip(NUM_BYTES..)
                    .fold(bytes, |tokens: Vec<u32>, (&pair, id)| replaced(&tokens, pair, id));
                assert_eq!(encoder.encode(text).unwrap(), expected);
                assert_eq!(ids, expected);
                assert_eq!(encoder.decode(&ids).unwrap(), text.as_bytes());
            }
            for (token, id) in
                encoder.tokens().iter().zip(0..).filter_map(|(t, id)| Some((std::str::from_utf8(t).ok()?, id)))
            {
                assert_eq!(encoder.encode(token).unwrap(), [id]);
            }
        }
    }

    #[test]
    fn decoding_refuses_unknown_ids() {
        let encoder = Encoder::new(Splitter::new(DEFAULT_PATTERN).unwrap(), vec![(97, 98)]);
        assert_eq!(encoder.decode(&[256, 0xc3]).unwrap(), b"ab\xc3");
        let error = encoder.decode(&[257]).unwrap_err();
        assert_eq!(error.to_string(), "unknown token id 257: ids go from 0 to 256");
    }
}
