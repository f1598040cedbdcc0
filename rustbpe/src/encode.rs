//! Encoding and decoding: ids from texts, and texts from ids.
//!
//! A piece that is a token is that token's id. Any other piece starts as its bytes, and of all adjacent pairs whose
//! bytes together are a token the one with the smallest id is merged, the leftmost of equal ones, until there is none:
//! what tiktoken does with the same ranks. Each thread remembers short pieces with their ids, so that nearly all of a
//! text is one look at that memory; long pieces are merged in time linear in their length.

use std::mem;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread;

use rustc_hash::FxHashMap;

use crate::key::Key;
use crate::merge::{Merging, NONE, PairTable, TokenIds, TokenTree};
use crate::{Error, NUM_BYTES, Pair, Splitter};

/// Batches are handed out to the threads by about this many bytes of text.
const BLOCK_BYTES: usize = 1 << 16;

/// Longer pieces are not merged by a look at all their pairs for each merge.
const SCAN_BYTES: usize = 96;

/// A vocabulary: ids from texts, and texts from ids. Ordinary tokens have the ids 0, 1, 2, ...; special tokens have any
/// other ids, and are decoded but never encoded: in a text, their names are text.
pub struct Encoder {
    splitter: Splitter,
    tokens: Vec<Box<[u8]>>,
    special: FxHashMap<u32, Box<[u8]>>,
    token_ids: TokenIds,
    byte_ids: [u32; NUM_BYTES as usize],
    pairs: PairTable,
    /// Made for the first long piece.
    tree: OnceLock<TokenTree>,
    /// What threads that are done leave for the next ones.
    scratch: Mutex<Vec<Scratch>>,
}

impl Encoder {
    /// The vocabulary of the 256 bytes, in their order, and of `merges`, each of which may use the tokens before it.
    pub fn from_merges(splitter: Splitter, merges: &[Pair]) -> Self {
        let mut tokens: Vec<Box<[u8]>> = (0..=u8::MAX).map(|byte| Box::from([byte])).collect();
        for &(left, right) in merges {
            tokens.push([&*tokens[left as usize], &*tokens[right as usize]].concat().into());
        }
        Encoder::new(splitter, tokens, Vec::new()).expect("all bytes are there")
    }

    /// The vocabulary of `tokens`, whose ids are their places and also their ranks, and of the special tokens. Among
    /// the tokens are all single bytes; no two tokens and no two ids are equal.
    pub fn new(splitter: Splitter, tokens: Vec<Box<[u8]>>, special: Vec<(u32, Box<[u8]>)>) -> Result<Self, Error> {
        let bad = |reason: String| Err(Error::Vocabulary { reason });
        let mut token_ids = TokenIds::default();
        for (token, id) in tokens.iter().zip(0..) {
            if token.is_empty() {
                return bad(format!("token {id} is empty"));
            }
            if let Some(other) = token_ids.insert(token, id) {
                return bad(format!("tokens {other} and {id} are equal"));
            }
        }
        let mut byte_ids = [NONE; NUM_BYTES as usize];
        for (id, byte) in byte_ids.iter_mut().zip(0..=u8::MAX) {
            match token_ids.get(&[byte]) {
                Some(found) => *id = found,
                None => return bad(format!("there is no token for the byte {byte}")),
            }
        }
        let num_special = special.len();
        let special: FxHashMap<_, _> = special.into_iter().collect();
        if special.len() < num_special || special.keys().any(|&id| (id as usize) < tokens.len()) {
            return bad("an id of a special token is taken".to_owned());
        }
        let pairs = PairTable::new(&tokens, &token_ids, &byte_ids);
        let (tree, scratch) = (OnceLock::new(), Mutex::default());
        Ok(Encoder { splitter, tokens, special, token_ids, byte_ids, pairs, tree, scratch })
    }

    /// The number of ordinary tokens.
    pub fn vocab_size(&self) -> u32 {
        self.tokens.len() as u32
    }

    /// The largest id, special tokens included.
    pub fn largest_id(&self) -> u32 {
        self.special.keys().copied().fold(self.vocab_size() - 1, u32::max)
    }

    /// The pattern that splits texts.
    pub fn pattern(&self) -> &str {
        self.splitter.pattern()
    }

    /// The bytes of every ordinary token, in the order of the ids.
    pub fn tokens(&self) -> &[Box<[u8]>] {
        &self.tokens
    }

    /// The ids of `text`.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let mut ids = Vec::with_capacity(text.len() / 2 + 8);
        let mut scratch = self.take_scratch();
        let result = self.append_ids(&self.splitter, text, &mut scratch, &mut ids);
        self.leave_scratch(scratch);
        result.map(|()| ids)
    }

    /// [`Encoder::encode`] for each of `texts`, in their order, on at most `num_threads` threads. Before the ids of each
    /// text comes `first`, if given. The ids must fit in `T`: where they do not, the result is meaningless.
    pub fn encode_batch<T: Id, S: AsRef<str> + Sync>(
        &self,
        texts: &[S],
        first: Option<u32>,
        num_threads: usize,
    ) -> Result<Batch<T>, Error> {
        let blocks = cut_into_blocks(texts);
        let next_block = AtomicUsize::new(0);
        let encode_some = || {
            // A clone per thread: the threads would wait for each other on the scratch memory of one regular expression.
            let splitter = self.splitter.clone();
            let mut scratch = self.take_scratch();
            let mut encoded = Vec::new();
            let result = loop {
                let index = next_block.fetch_add(1, Ordering::Relaxed);
                let Some(&(start, end)) = blocks.get(index) else { break Ok(()) };
                match self.encode_block(&splitter, &texts[start..end], first, &mut scratch) {
                    Ok(block) => encoded.push((index, block)),
                    Err(error) => break Err(error),
                }
            };
            self.leave_scratch(scratch);
            result.map(|()| encoded)
        };
        let mut batch = Batch { blocks: Vec::new() };
        batch.blocks.resize_with(blocks.len(), Block::default);
        thread::scope(|scope| {
            // This thread works too.
            let others: Vec<_> = (1..num_threads.min(blocks.len())).map(|_| scope.spawn(encode_some)).collect();
            let own = encode_some();
            let results = others.into_iter().map(|thread| thread.join().expect("an encoding thread panicked"));
            for encoded in std::iter::once(own).chain(results) {
                for (index, block) in encoded? {
                    batch.blocks[index] = block;
                }
            }
            Ok(batch)
        })
    }

    /// The bytes that `ids` stand for. They need not be UTF-8: a token can end within a character.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::with_capacity(4 * ids.len());
        for &id in ids {
            match self.tokens.get(id as usize).or_else(|| self.special.get(&id)) {
                Some(token) => bytes.extend_from_slice(token),
                None => return Err(Error::UnknownId { id: id.into(), vocab_size: self.vocab_size() }),
            }
        }
        Ok(bytes)
    }

    fn take_scratch(&self) -> Scratch {
        let left = self.scratch.lock().expect("no holder of this lock panics").pop();
        left.unwrap_or_else(Scratch::new)
    }

    fn leave_scratch(&self, scratch: Scratch) {
        self.scratch.lock().expect("no holder of this lock panics").push(scratch);
    }

    fn encode_block<T: Id, S: AsRef<str>>(
        &self,
        splitter: &Splitter,
        texts: &[S],
        first: Option<u32>,
        scratch: &mut Scratch,
    ) -> Result<Block<T>, Error> {
        let mut block = Block::default();
        for text in texts {
            block.ids.extend(first.map(T::from_u32));
            self.append_ids(splitter, text.as_ref(), scratch, &mut block.ids)?;
            block.ends.push(block.ids.len());
        }
        Ok(block)
    }

    fn append_ids<T: Id>(
        &self,
        splitter: &Splitter,
        text: &str,
        scratch: &mut Scratch,
        ids: &mut Vec<T>,
    ) -> Result<(), Error> {
        let bytes = text.as_bytes();
        scratch.waiting.clear();
        splitter.for_each_piece(text, |start, end| match Key::new(bytes, start, end) {
            Some(key) => {
                scratch.waiting.push((key, start));
                if scratch.waiting.len() == WAITING_PIECES {
                    self.append_waiting(bytes, scratch, ids);
                }
            }
            None => {
                self.append_waiting(bytes, scratch, ids);
                let piece_ids = self.encode_piece(&bytes[start..end], &mut scratch.merging);
                ids.extend(piece_ids.iter().map(|&id| T::from_u32(id)));
            }
        })?;
        self.append_waiting(bytes, scratch, ids);
        Ok(())
    }

    /// Appends the ids of the pieces that wait.
    fn append_waiting<T: Id>(&self, text: &[u8], scratch: &mut Scratch, ids: &mut Vec<T>) {
        let Scratch { memory, waiting, merging } = scratch;
        // What the loop below looks at is mostly not in the processor's cache. Two quick loops before it make the
        // processor load it for all pieces at the same time, where it would else wait for each.
        let loaded = waiting.iter().fold(0, |sum: u32, &(key, _)| sum.wrapping_add(memory[place_of(key)].0[0].ids[0]));
        let unknown = waiting.iter().filter(|&&(key, _)| memory[place_of(key)].find(key).is_none());
        let num_tokens = unknown.filter(|&&(key, _)| self.token_ids.short.starts_with(key)).count();
        std::hint::black_box((loaded, num_tokens));
        for &(key, start) in &*waiting {
            let place = &mut memory[place_of(key)];
            if let Some(remembered) = place.find(key) {
                remembered.append_to(ids);
            } else {
                let piece_ids = self.encode_piece(&text[start..start + key.len()], merging);
                if let Some(remembered) = Remembered::new(key, piece_ids) {
                    place.put(remembered);
                }
                ids.extend(piece_ids.iter().map(|&id| T::from_u32(id)));
            }
        }
        waiting.clear();
    }

    /// The ids of one piece, which stay in `merging` until the next call.
    fn encode_piece<'m>(&self, piece: &[u8], merging: &'m mut Merging) -> &'m [u32] {
        merging.ids.clear();
        if let Some(id) = self.token_ids.get(piece) {
            merging.ids.push(id);
        } else if piece.len() <= SCAN_BYTES {
            merging.merge_by_scans(piece, &self.byte_ids, &self.pairs);
        } else if self.pairs.is_ordered {
            let tree = self.tree.get_or_init(|| TokenTree::new(&self.tokens, &self.token_ids, &self.byte_ids));
            merging.merge_by_search(piece, &self.byte_ids, &self.pairs, tree);
        } else {
            merging.merge_by_heap(piece, &self.byte_ids, &self.pairs);
        }
        &merging.ids
    }
}

/// The type of ids in an array.
pub trait Id: Copy + Send {
    /// The id, whose upper bits are lost if it does not fit.
    fn from_u32(id: u32) -> Self;
}

impl Id for u16 {
    #[inline]
    fn from_u32(id: u32) -> Self {
        id as u16
    }
}

impl Id for u32 {
    #[inline]
    fn from_u32(id: u32) -> Self {
        id
    }
}

/// The ids of many texts, one text after the other, in blocks.
pub struct Batch<T> {
    blocks: Vec<Block<T>>,
}

/// The ids of some texts, and where each text ends in them.
struct Block<T> {
    ids: Vec<T>,
    ends: Vec<usize>,
}

impl<T> Default for Block<T> {
    fn default() -> Self {
        Block { ids: Vec::new(), ends: Vec::new() }
    }
}

impl<T: Id> Batch<T> {
    /// All ids.
    pub fn ids(&self) -> Vec<T> {
        let mut ids = Vec::with_capacity(self.blocks.iter().map(|block| block.ids.len()).sum());
        self.blocks.iter().for_each(|block| ids.extend_from_slice(&block.ids));
        ids
    }

    /// Where each text ends among all ids.
    pub fn ends(&self) -> impl Iterator<Item = usize> {
        let mut start = 0;
        self.blocks.iter().flat_map(move |block| {
            let block_start = start;
            start += block.ids.len();
            block.ends.iter().map(move |end| block_start + end)
        })
    }

    /// The ids of each text.
    pub fn rows(&self) -> impl Iterator<Item = &[T]> {
        self.blocks.iter().flat_map(|block| {
            let mut start = 0;
            block.ends.iter().map(move |&end| &block.ids[mem::replace(&mut start, end)..end])
        })
    }
}

/// Ranges of texts of about `BLOCK_BYTES` bytes each.
fn cut_into_blocks<S: AsRef<str>>(texts: &[S]) -> Vec<(usize, usize)> {
    let mut blocks = Vec::new();
    let (mut start, mut num_bytes) = (0, 0);
    for (i, text) in texts.iter().enumerate() {
        num_bytes += text.as_ref().len();
        if num_bytes >= BLOCK_BYTES || i + 1 == texts.len() {
            blocks.push((start, i + 1));
            (start, num_bytes) = (i + 1, 0);
        }
    }
    blocks
}

// ---------------------------------------------------------------------------------------------------------------------
// The memory of a thread

/// What a thread works with; all of it can be used again for any text.
struct Scratch {
    /// Pieces, by their hashes.
    memory: Vec<Place>,
    /// Short pieces, and where they start in the text.
    waiting: Vec<(Key, usize)>,
    merging: Merging,
}

/// So many short pieces are found before their ids are looked up.
const WAITING_PIECES: usize = 64;

const MEMORY_BITS: u32 = 16;

impl Scratch {
    fn new() -> Self {
        let nothing = Remembered { key: Key::default(), ids: [NONE; 4] };
        let place = Place([nothing.clone(), nothing]);
        Scratch { memory: vec![place; 1 << MEMORY_BITS], waiting: Vec::new(), merging: Merging::default() }
    }
}

/// The place in the memory where a piece would be.
#[inline]
fn place_of(key: Key) -> usize {
    (key.hash() >> (64 - MEMORY_BITS)) as usize
}

/// Two pieces, the newer one first: what the processor's cache loads at once.
#[derive(Clone)]
#[repr(align(64))]
struct Place([Remembered; 2]);

impl Place {
    #[inline]
    fn find(&self, key: Key) -> Option<&Remembered> {
        self.0.iter().find(|remembered| remembered.key == key)
    }

    fn put(&mut self, remembered: Remembered) {
        self.0.swap(0, 1);
        self.0[0] = remembered;
    }
}

/// A piece and its ids, at least one, with `NONE` after the last.
#[derive(Clone)]
struct Remembered {
    key: Key,
    ids: [u32; 4],
}

impl Remembered {
    /// None: there are too many ids.
    fn new(key: Key, ids: &[u32]) -> Option<Self> {
        let mut remembered = Remembered { key, ids: [NONE; 4] };
        remembered.ids.get_mut(..ids.len())?.copy_from_slice(ids);
        Some(remembered)
    }

    #[inline]
    fn append_to<T: Id>(&self, ids: &mut Vec<T>) {
        ids.push(T::from_u32(self.ids[0]));
        for &id in &self.ids[1..] {
            if id == NONE {
                break;
            }
            ids.push(T::from_u32(id));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, num_cases, replaced};
    use crate::{DEFAULT_PATTERN, PieceCounts, learn_merges};

    fn whole_text() -> Splitter {
        Splitter::new("(?s).+").unwrap()
    }

    fn bytes() -> Vec<Box<[u8]>> {
        (0..=u8::MAX).map(|byte| Box::from([byte])).collect()
    }

    /// Random merges, learned from random texts.
    fn random_merges(random: &mut Random, alphabet: &[char]) -> Vec<Pair> {
        let counts: PieceCounts = (0..20).map(|_| (random.text(alphabet, 10), 1)).collect();
        learn_merges(counts, 320, |_, _| Ok::<_, ()>(())).unwrap()
    }

    /// The definition: the smallest token that two adjacent parts make, leftmost first.
    fn encode_naively(piece: &[u8], tokens: &[Box<[u8]>]) -> Vec<u32> {
        let id_of = |part: &[u8]| tokens.iter().position(|token| **token == *part);
        if let Some(id) = id_of(piece) {
            return vec![id as u32];
        }
        let mut parts: Vec<&[u8]> = piece.chunks(1).collect();
        let mut ends: Vec<usize> = (1..=piece.len()).collect();
        loop {
            let made = |i: &usize| id_of(&piece[ends[*i] - parts[*i].len()..ends[*i + 1]]);
            let Some((_, i)) = (0..parts.len() - 1).filter_map(|i| Some((made(&i)?, i))).min() else { break };
            parts[i] = &piece[ends[i] - parts[i].len()..ends[i + 1]];
            parts.remove(i + 1);
            ends.remove(i);
        }
        parts.into_iter().map(|part| id_of(part).unwrap() as u32).collect()
    }

    #[test]
    fn encoding_applies_the_merges_in_their_order() {
        let mut random = Random(4);
        let alphabet = ['a', 'b', 'c', 'é'];
        for _ in 0..num_cases(60) {
            let merges = random_merges(&mut random, &alphabet);
            let encoder = Encoder::from_merges(whole_text(), &merges);
            assert!(encoder.pairs.is_ordered);
            let texts: Vec<String> = (0..20).map(|i| random.text(&alphabet, if i < 15 { 40 } else { 300 })).collect();
            let batch = encoder.encode_batch::<u16, _>(&texts, Some(999), 3).unwrap();
            for (text, row) in texts.iter().zip(batch.rows()) {
                let bytes = text.bytes().map(u32::from).collect();
                let expected = merges
                    .iter()
                    .zip(NUM_BYTES..)
                    .fold(bytes, |tokens: Vec<u32>, (&pair, id)| replaced(&tokens, pair, id));
                assert_eq!(encoder.encode(text).unwrap(), expected);
                assert!(row.iter().map(|&id| u32::from(id)).eq([999].into_iter().chain(expected.iter().copied())));
                assert_eq!(encoder.decode(&expected).unwrap(), text.as_bytes());
            }
            for (token, id) in encoder.tokens().iter().zip(0..) {
                if let Ok(text) = std::str::from_utf8(token) {
                    assert_eq!(encoder.encode(text).unwrap(), [id]);
                }
            }
        }
    }

    #[test]
    fn any_order_of_tokens_is_a_vocabulary() {
        let mut random = Random(5);
        let alphabet = ['a', 'b', 'c'];
        let mut num_unordered = 0;
        for _ in 0..num_cases(60) {
            let mut tokens = bytes();
            let mut distinct: Vec<String> =
                (0..30).map(|_| random.text(&alphabet, 6)).filter(|t| t.len() > 1).collect();
            distinct.sort();
            distinct.dedup();
            while !distinct.is_empty() {
                let token = distinct.swap_remove(random.below(distinct.len()));
                tokens.insert(random.below(tokens.len() + 1), token.into_bytes().into());
            }
            let encoder = Encoder::new(whole_text(), tokens.clone(), Vec::new()).unwrap();
            num_unordered += usize::from(!encoder.pairs.is_ordered);
            for len in [3, 5, 10, 30, 200] {
                let text = random.text(&alphabet, len) + "a";
                assert_eq!(encoder.encode(&text).unwrap(), encode_naively(text.as_bytes(), &tokens), "{text}");
            }
        }
        assert!(num_unordered > 0);
    }

    #[test]
    fn the_three_ways_of_merging_agree_on_pieces_of_any_length() {
        let mut random = Random(6);
        let alphabet = ['a', 'b', 'c', ' '];
        for _ in 0..num_cases(100) {
            let merges = random_merges(&mut random, &alphabet);
            let encoder = Encoder::from_merges(whole_text(), &merges);
            for text in [random.text(&alphabet, 400) + "a", "a".repeat(1 + random.below(300))] {
                let (piece, byte_ids, pairs) = (text.as_bytes(), &encoder.byte_ids, &encoder.pairs);
                let tree = TokenTree::new(&encoder.tokens, &encoder.token_ids, byte_ids);
                let [mut scans, mut search, mut heap] = [(); 3].map(|()| Merging::default());
                scans.merge_by_scans(piece, byte_ids, pairs);
                search.merge_by_search(piece, byte_ids, pairs, &tree);
                heap.merge_by_heap(piece, byte_ids, pairs);
                assert_eq!(scans.ids, search.ids, "{text}");
                assert_eq!(scans.ids, heap.ids, "{text}");
            }
        }
    }

    #[test]
    fn remembered_pieces_change_no_result() {
        let mut random = Random(7);
        let alphabet: Vec<char> = "abcdefghij  ".chars().collect();
        let merges = random_merges(&mut random, &alphabet);
        let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
        let encoder = Encoder::from_merges(splitter.clone(), &merges);
        for _ in 0..200 {
            let text = random.text(&alphabet, 2000); // more pieces than there is memory for
            let fresh = Encoder::from_merges(splitter.clone(), &merges);
            assert_eq!(encoder.encode(&text).unwrap(), fresh.encode(&text).unwrap());
        }
    }

    #[test]
    fn a_batch_is_its_texts_whatever_their_sizes() {
        let encoder = Encoder::from_merges(Splitter::new(DEFAULT_PATTERN).unwrap(), &[(97, 98), (256, 32)]);
        let texts: Vec<String> = [0, 3, BLOCK_BYTES, 1, 0, 5 * BLOCK_BYTES, 7].map(|n| "ab ".repeat(n / 3)).into();
        for num_texts in 0..=texts.len() {
            let batch = encoder.encode_batch::<u32, _>(&texts[..num_texts], None, 4).unwrap();
            let expected: Vec<Vec<u32>> = texts[..num_texts].iter().map(|text| encoder.encode(text).unwrap()).collect();
            assert_eq!(batch.rows().collect::<Vec<_>>(), expected);
            assert_eq!(batch.ids(), expected.concat());
            let lengths: Vec<usize> = expected.iter().map(Vec::len).collect();
            let ends: Vec<usize> = (1..=num_texts).map(|n| lengths[..n].iter().sum()).collect();
            assert_eq!(batch.ends().collect::<Vec<_>>(), ends);
        }
    }

    #[test]
    fn special_tokens_are_decoded_and_never_encoded() {
        let special = vec![(300, b"<|bos|>"[..].into())];
        let encoder = Encoder::new(Splitter::new(DEFAULT_PATTERN).unwrap(), bytes(), special).unwrap();
        assert_eq!(encoder.decode(&[300, 65]).unwrap(), b"<|bos|>A");
        assert_eq!(encoder.encode("<|bos|>").unwrap(), b"<|bos|>".map(u32::from));
        assert_eq!(encoder.vocab_size(), 256);
    }

    #[test]
    fn decoding_refuses_unknown_ids() {
        let encoder = Encoder::from_merges(Splitter::new(DEFAULT_PATTERN).unwrap(), &[(97, 98)]);
        assert_eq!(encoder.decode(&[256, 0xc3]).unwrap(), b"ab\xc3");
        let error = encoder.decode(&[257]).unwrap_err();
        assert_eq!(error.to_string(), "unknown token id 257: ids go from 0 to 256");
    }

    #[test]
    fn what_is_no_vocabulary_is_refused() {
        let reason =
            |tokens: Vec<Box<[u8]>>, special: Vec<(u32, Box<[u8]>)>| match Encoder::new(whole_text(), tokens, special)
                .map(|_| ())
            {
                Err(Error::Vocabulary { reason }) => reason,
                other => panic!("{other:?}"),
            };
        assert_eq!(reason(bytes()[1..].to_vec(), vec![]), "there is no token for the byte 0");
        assert_eq!(reason([bytes(), vec![b"a"[..].into()]].concat(), vec![]), "tokens 97 and 256 are equal");
        assert_eq!(reason([bytes(), vec![b""[..].into()]].concat(), vec![]), "token 256 is empty");
        assert_eq!(reason(bytes(), vec![(255, b"x"[..].into())]), "an id of a special token is taken");
    }
}
