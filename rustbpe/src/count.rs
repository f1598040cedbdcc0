//! Counting: how often each distinct piece occurs in a stream of texts.

use std::hash::BuildHasher;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use rustc_hash::{FxBuildHasher, FxHashMap};

use crate::key::{Key, KeyMap};
use crate::{Error, Splitter};

/// Distinct pieces with the number of times that each occurs, in no particular order.
#[derive(Debug, Clone, Default)]
pub struct PieceCounts {
    bytes: Vec<u8>,
    /// Where each piece ends in `bytes`, and its count.
    pieces: Vec<(usize, i64)>,
}

impl PieceCounts {
    /// The number of distinct pieces.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// Whether there are no pieces.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// The number of bytes of all distinct pieces.
    pub fn num_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The pieces with their counts.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], i64)> {
        let mut start = 0;
        self.pieces.iter().map(move |&(end, count)| (&self.bytes[std::mem::replace(&mut start, end)..end], count))
    }

    /// Adds a piece that is not there yet.
    fn push(&mut self, piece: &[u8], count: i64) {
        self.bytes.extend_from_slice(piece);
        self.pieces.push((self.bytes.len(), count));
    }
}

/// The pieces must be distinct.
impl<P: AsRef<[u8]>> FromIterator<(P, i64)> for PieceCounts {
    fn from_iter<I: IntoIterator<Item = (P, i64)>>(pieces: I) -> Self {
        let mut counts = PieceCounts::default();
        pieces.into_iter().for_each(|(piece, count)| counts.push(piece.as_ref(), count));
        counts
    }
}

/// Counts the pieces of a stream of texts. Every thread keeps a table of its own until the end.
pub struct PieceCounter {
    workers: Vec<CountWorker>,
}

/// So many short pieces are found before they are counted.
const WAITING_PIECES: usize = 256;

struct CountWorker {
    splitter: Splitter,
    table: CountTable,
}

impl PieceCounter {
    /// A counter without texts that works with `num_threads` threads.
    pub fn new(splitter: &Splitter, num_threads: usize) -> Self {
        // A clone per thread: the threads would wait for each other on the scratch memory of one regular expression.
        let worker = || CountWorker { splitter: splitter.clone(), table: CountTable::default() };
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

    /// The counts over all texts. Each thread adds up a share of the pieces over all tables.
    pub fn finish(self) -> PieceCounts {
        let tables: Vec<CountTable> = self.workers.into_iter().map(|worker| worker.table).collect();
        if let [table] = &tables[..] {
            return table.to_counts();
        }
        let add_up = |share| {
            let mut total = CountTable::default();
            for table in &tables {
                table.pieces(share, tables.len()).for_each(|(piece, count)| total.add(piece, count));
            }
            total.to_counts()
        };
        let mut counts = PieceCounts::default();
        thread::scope(|scope| {
            let threads: Vec<_> = (0..tables.len()).map(|share| scope.spawn(move || add_up(share))).collect();
            for thread in threads {
                let part = thread.join().expect("a counting thread panicked");
                part.iter().for_each(|(piece, count)| counts.push(piece, count));
            }
        });
        counts
    }
}

impl CountWorker {
    fn take_texts<S: AsRef<str>>(&mut self, texts: &[S], next_text: &AtomicUsize) -> Result<(), Error> {
        // In a loop of its own the processor looks at several places of the table, which is mostly not in its cache, at
        // the same time; between the steps of the splitter it would wait for each of them.
        let mut waiting = Vec::with_capacity(WAITING_PIECES);
        while let Some(text) = texts.get(next_text.fetch_add(1, Ordering::Relaxed)) {
            let (text, table) = (text.as_ref(), &mut self.table);
            let bytes = text.as_bytes();
            self.splitter.for_each_piece(text, |start, end| match Key::new(bytes, start, end) {
                Some(key) => {
                    waiting.push(key);
                    if waiting.len() == WAITING_PIECES {
                        waiting.drain(..).for_each(|key| *table.short.entry(key) += 1);
                    }
                }
                None => table.add_long(&bytes[start..end], 1),
            })?;
        }
        waiting.into_iter().for_each(|key| *self.table.short.entry(key) += 1);
        Ok(())
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The table of one thread

/// Piece -> count.
#[derive(Default)]
struct CountTable {
    short: KeyMap<i64>,
    long: FxHashMap<Box<[u8]>, i64>,
}

/// A piece of a table.
enum Piece<'t> {
    Short(Key),
    Long(&'t [u8]),
}

impl CountTable {
    fn add(&mut self, piece: Piece, count: i64) {
        match piece {
            Piece::Short(key) => *self.short.entry(key) += count,
            Piece::Long(bytes) => self.add_long(bytes, count),
        }
    }

    /// Looked up before it is inserted: most pieces are there already and need no copy.
    fn add_long(&mut self, piece: &[u8], count: i64) {
        match self.long.get_mut(piece) {
            Some(total) => *total += count,
            None => {
                self.long.insert(piece.into(), count);
            }
        }
    }

    fn to_counts(&self) -> PieceCounts {
        let mut counts = PieceCounts::default();
        for (piece, count) in self.pieces(0, 1) {
            match piece {
                Piece::Short(key) => {
                    let (bytes, len) = key.bytes();
                    counts.push(&bytes[..len], count);
                }
                Piece::Long(bytes) => counts.push(bytes, count),
            }
        }
        counts
    }

    /// One of `num_shares` parts of the pieces, with their counts; a piece is in the same part in every table.
    fn pieces(&self, share: usize, num_shares: usize) -> impl Iterator<Item = (Piece<'_>, i64)> {
        let is_in_share = move |hash: u64| (hash as u32 as usize) % num_shares == share;
        let short = self.short.iter().filter(move |(key, _)| is_in_share(key.hash()));
        let long = self.long.iter().filter(move |(piece, _)| is_in_share(FxBuildHasher.hash_one(piece)));
        let short = short.map(|(key, count)| (Piece::Short(key), count));
        short.chain(long.map(|(piece, &count)| (Piece::Long(piece), count)))
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::DEFAULT_PATTERN;
    use crate::testing::Random;

    #[test]
    fn counts_are_those_of_the_pieces_whatever_the_number_of_threads() {
        let mut random = Random(3);
        let alphabet: Vec<char> = "abcdefé字 \n".chars().collect();
        let texts: Vec<String> = (0..400).map(|_| random.text(&alphabet, 400)).collect();
        let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
        let mut expected: BTreeMap<&[u8], i64> = BTreeMap::new();
        for text in &texts {
            let count = |start, end| *expected.entry(&text.as_bytes()[start..end]).or_default() += 1;
            splitter.for_each_piece(text, count).unwrap();
        }
        assert!(expected.len() > 1 << 12, "the tables do not grow");
        assert!(expected.keys().any(|piece| piece.len() > Key::MAX_LEN), "no long pieces");
        for (num_threads, texts_at_a_time) in [(1, 400), (3, 400), (4, 7)] {
            let mut counter = PieceCounter::new(&splitter, num_threads);
            texts.chunks(texts_at_a_time).for_each(|chunk| counter.add(chunk).unwrap());
            let counts = counter.finish();
            assert_eq!(counts.len(), expected.len());
            assert_eq!(counts.iter().collect::<BTreeMap<_, _>>(), expected);
        }
    }

    #[test]
    fn a_pattern_that_gives_up_is_an_error() {
        let splitter = Splitter::new(r"(?:a|b|ab)*?(?<!x)c").unwrap();
        assert!(matches!(PieceCounter::new(&splitter, 2).add(&["ab".repeat(200)]), Err(Error::Split { .. })));
    }
}
