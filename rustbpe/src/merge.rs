//! Merging: the tokens of one piece from its bytes.
//!
//! Of all adjacent pairs whose bytes together are a token, the one that makes the token with the smallest id is merged,
//! the leftmost of equal ones, until there is none. There are three ways to do that, with one result.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::mem;

use rustc_hash::FxHashMap;

use crate::Pair;
use crate::key::{Key, KeyMap};

/// No token.
pub(crate) const NONE: u32 = u32::MAX;

/// Longer pieces are merged by a queue instead of a look at all their pairs for each merge.
const SCAN_BYTES: usize = 96;

/// The bytes of a token -> its id.
#[derive(Default)]
pub(crate) struct TokenIds {
    pub(crate) short: KeyMap<Option<u32>>,
    long: FxHashMap<Box<[u8]>, u32>,
}

impl TokenIds {
    #[inline]
    pub(crate) fn get(&self, token: &[u8]) -> Option<u32> {
        match Key::new(token, 0, token.len()) {
            Some(key) => self.short.get(key).flatten(),
            None => self.long.get(token).copied(),
        }
    }

    /// The id that the token had before, if any.
    pub(crate) fn insert(&mut self, token: &[u8], id: u32) -> Option<u32> {
        match Key::new(token, 0, token.len()) {
            Some(key) => self.short.entry(key).replace(id),
            None => self.long.insert(token.into(), id),
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Which pairs make which token

/// (left, right) -> the token that they make.
pub(crate) struct PairTable {
    /// The pairs of single bytes, by byte.
    of_bytes: Vec<u32>,
    of_tokens: FxHashMap<Pair, u32>,
    /// The pair that makes each token; (NONE, NONE) for bytes. Only where the tokens are ordered.
    parts: Vec<Pair>,
    /// Whether each token is made by one pair only, of tokens with smaller ids.
    pub(crate) is_ordered: bool,
}

impl PairTable {
    /// In a vocabulary that was learned, merging the bytes of a token by the tokens before it leaves two parts. Where
    /// that is so for every token, no other two parts ever come to stand side by side while it can be made: a merge
    /// leaves the bytes of a later token alone or works within them, and there it does what it does in the token alone.
    /// So one pair a token is all that is needed. Where it is not so, every cut of a token into two tokens is a pair.
    pub(crate) fn new(tokens: &[Box<[u8]>], token_ids: &TokenIds, byte_ids: &[u32; 256]) -> Self {
        let mut table = PairTable {
            of_bytes: vec![NONE; 1 << 16],
            of_tokens: FxHashMap::with_capacity_and_hasher(tokens.len(), Default::default()),
            parts: vec![(NONE, NONE); tokens.len()],
            is_ordered: true,
        };
        let mut merging = Merging::default();
        for (token, id) in tokens.iter().zip(0..) {
            if token.len() > 1 {
                merging.ids.clear();
                merging.merge_by_scans(token, byte_ids, &table);
                let &[left, right] = &merging.ids[..] else {
                    return Self::with_all_cuts(tokens, token_ids);
                };
                if left >= id || right >= id {
                    return Self::with_all_cuts(tokens, token_ids);
                }
                table.add((&tokens[left as usize], left), (&tokens[right as usize], right), id);
                table.parts[id as usize] = (left, right);
            }
        }
        table
    }

    fn with_all_cuts(tokens: &[Box<[u8]>], token_ids: &TokenIds) -> Self {
        let mut table = PairTable {
            of_bytes: vec![NONE; 1 << 16],
            of_tokens: FxHashMap::default(),
            parts: Vec::new(),
            is_ordered: false,
        };
        for (token, id) in tokens.iter().zip(0..) {
            for cut in 1..token.len() {
                let (left, right) = token.split_at(cut);
                if let (Some(left_id), Some(right_id)) = (token_ids.get(left), token_ids.get(right)) {
                    table.add((left, left_id), (right, right_id), id);
                }
            }
        }
        table
    }

    fn add(&mut self, left: (&[u8], u32), right: (&[u8], u32), id: u32) {
        if let (&[left_byte], &[right_byte]) = (left.0, right.0) {
            self.of_bytes[usize::from(left_byte) << 8 | usize::from(right_byte)] = id;
        }
        self.of_tokens.insert((left.1, right.1), id);
    }

    #[inline]
    fn of_bytes(&self, left: u8, right: u8) -> u32 {
        self.of_bytes[usize::from(left) << 8 | usize::from(right)]
    }

    #[inline]
    fn get(&self, left: u32, right: u32) -> u32 {
        self.of_tokens.get(&(left, right)).copied().unwrap_or(NONE)
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Merging one piece

/// Merges the bytes of a piece; three ways with one result, which is appended to `ids`.
#[derive(Default)]
pub(crate) struct Merging {
    pub(crate) ids: Vec<u32>,
    /// merge_by_scans: what each token makes with the one after it, and the token.
    parts: Vec<(u32, u32)>,
    list: TokenList,
    buckets: Buckets,
}

impl Merging {
    /// Merges a piece in the way that suits it.
    pub(crate) fn merge(&mut self, piece: &[u8], byte_ids: &[u32; 256], pairs: &PairTable) {
        if piece.len() <= SCAN_BYTES {
            self.merge_by_scans(piece, byte_ids, pairs);
        } else if pairs.is_ordered {
            self.merge_by_buckets(piece, byte_ids, pairs);
        } else {
            self.merge_by_heap(piece, byte_ids, pairs);
        }
    }

    /// Looks through all pairs for each merge: the quickest way for a few dozen bytes.
    pub(crate) fn merge_by_scans(&mut self, piece: &[u8], byte_ids: &[u32; 256], pairs: &PairTable) {
        let parts = &mut self.parts;
        parts.clear();
        parts.extend(piece.windows(2).map(|two| (pairs.of_bytes(two[0], two[1]), byte_ids[usize::from(two[0])])));
        parts.push((NONE, byte_ids[usize::from(piece[piece.len() - 1])]));
        loop {
            let (mut at, mut smallest) = (0, NONE);
            for (i, &(made, _)) in parts.iter().enumerate() {
                if made < smallest {
                    (at, smallest) = (i, made);
                }
            }
            if smallest == NONE {
                break;
            }
            parts.remove(at + 1);
            let made = parts.get(at + 1).map_or(NONE, |&(_, after)| pairs.get(smallest, after));
            parts[at] = (made, smallest);
            if at > 0 {
                parts[at - 1].0 = pairs.get(parts[at - 1].1, smallest);
            }
        }
        self.ids.extend(parts.iter().map(|&(_, token)| token));
    }

    /// Takes the tokens to be made in the order of their ids: no merge ever makes one that comes before its own, so
    /// that a bucket of positions for each token takes the place of a queue.
    pub(crate) fn merge_by_buckets(&mut self, piece: &[u8], byte_ids: &[u32; 256], pairs: &PairTable) {
        let (list, buckets) = (&mut self.list, &mut self.buckets);
        list.fill(piece, byte_ids);
        buckets.prepare(pairs.parts.len());
        for (position, bytes) in piece.windows(2).enumerate() {
            buckets.put(pairs.of_bytes(bytes[0], bytes[1]), position);
        }
        let mut next_id = 0;
        while let Some(id) = buckets.take_first(next_id) {
            let (left, right) = pairs.parts[id as usize];
            if left == right {
                buckets.taken.sort_unstable(); // in a run of one token, merges go from left to right
            }
            for i in 0..buckets.taken.len() {
                let position = buckets.taken[i] as usize;
                // A position can be older than the tokens that are there now.
                if list.pair_at(position) != Some((left, right)) {
                    continue;
                }
                list.merge_at(position, id);
                if let Some((left, right)) = list.pair_at(position) {
                    buckets.put(pairs.get(left, right), position);
                }
                if let Some(previous) = list.previous(position) {
                    buckets.put(pairs.get(list.token(previous), id), previous);
                }
            }
            next_id = id + 1;
        }
        self.ids.extend(list.tokens());
    }

    /// Takes the merges from a queue, ordered by id and position: right for any vocabulary, and n log n.
    pub(crate) fn merge_by_heap(&mut self, piece: &[u8], byte_ids: &[u32; 256], pairs: &PairTable) {
        let list = &mut self.list;
        list.fill(piece, byte_ids);
        let first = piece.windows(2).zip(0_u32..).map(|(bytes, at)| (pairs.of_bytes(bytes[0], bytes[1]), at));
        let mut queue: BinaryHeap<_> = first.filter(|&(id, _)| id != NONE).map(Reverse).collect();
        while let Some(Reverse((id, position))) = queue.pop() {
            let place = position as usize;
            let made = |list: &TokenList, at| list.pair_at(at).map_or(NONE, |(left, right)| pairs.get(left, right));
            if made(list, place) != id {
                continue;
            }
            list.merge_at(place, id);
            for at in [Some(place), list.previous(place)].into_iter().flatten() {
                let next_id = made(list, at);
                if next_id != NONE {
                    queue.push(Reverse((next_id, at as u32)));
                }
            }
        }
        self.ids.extend(list.tokens());
    }
}

/// A doubly linked list of tokens. A token stands at the position of its first byte.
#[derive(Default)]
struct TokenList {
    links: Vec<Link>,
}

#[derive(Clone, Copy)]
struct Link {
    /// `NONE` where the token has become a part of the one before it.
    token: u32,
    /// Length in bytes: the next token stands this far to the right.
    len: u32,
    /// Length in bytes of the token before this one; 0 at the first.
    previous_len: u32,
}

impl TokenList {
    /// Panics if the piece has 2^32 bytes or more.
    fn fill(&mut self, piece: &[u8], byte_ids: &[u32; 256]) {
        assert!(u32::try_from(piece.len()).is_ok(), "a piece of 2^32 bytes or more");
        let link = |&byte: &u8| Link { token: byte_ids[usize::from(byte)], len: 1, previous_len: 1 };
        self.links.clear();
        self.links.extend(piece.iter().map(link));
        self.links[0].previous_len = 0;
    }

    #[inline]
    fn token(&self, position: usize) -> u32 {
        self.links[position].token
    }

    /// The token at `position` and the one after it. None: there is no token at `position`, or it is the last one.
    #[inline]
    fn pair_at(&self, position: usize) -> Option<Pair> {
        let link = self.links[position];
        let next = self.links.get(position + link.len as usize)?;
        (link.token != NONE).then_some((link.token, next.token))
    }

    /// The position of the token before the one at `position`.
    #[inline]
    fn previous(&self, position: usize) -> Option<usize> {
        let previous_len = self.links[position].previous_len as usize;
        (previous_len > 0).then(|| position - previous_len)
    }

    /// Makes one token, `id`, of the token at `position` and the one after it.
    #[inline]
    fn merge_at(&mut self, position: usize, id: u32) {
        let next = position + self.links[position].len as usize;
        self.links[next].token = NONE;
        let len = self.links[position].len + self.links[next].len;
        self.links[position].token = id;
        self.links[position].len = len;
        if let Some(after) = self.links.get_mut(position + len as usize) {
            after.previous_len = len;
        }
    }

    fn tokens(&self) -> impl Iterator<Item = u32> {
        self.links.iter().map(|link| link.token).filter(|&token| token != NONE)
    }
}

/// A bucket of positions for each token, and which of them hold something.
#[derive(Default)]
struct Buckets {
    /// The last entry of each bucket; all `NONE` between two pieces.
    last: Vec<u32>,
    /// A bit for each bucket.
    filled: Vec<u64>,
    /// (position, the entry before it in the same bucket)
    entries: Vec<(u32, u32)>,
    /// What was in the bucket that was taken last.
    taken: Vec<u32>,
}

impl Buckets {
    fn prepare(&mut self, num_tokens: usize) {
        self.last.resize(num_tokens, NONE);
        self.filled.resize(num_tokens.div_ceil(64), 0);
        self.entries.clear();
    }

    /// Nothing is put anywhere where the id is `NONE`.
    #[inline]
    fn put(&mut self, id: u32, position: usize) {
        if id != NONE {
            let last = &mut self.last[id as usize];
            let entry = mem::replace(last, self.entries.len() as u32);
            self.entries.push((position as u32, entry));
            self.filled[id as usize / 64] |= 1 << (id % 64);
        }
    }

    /// Empties the first bucket from `from` on that holds something into `taken`, and returns its token.
    fn take_first(&mut self, from: u32) -> Option<u32> {
        let mut word = from as usize / 64;
        let mut bits = self.filled.get(word)? & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *self.filled.get(word)?;
        }
        let id = word as u32 * 64 + bits.trailing_zeros();
        self.filled[word] &= !(1 << (id % 64));
        self.taken.clear();
        let mut entry = mem::replace(&mut self.last[id as usize], NONE);
        while entry != NONE {
            let (position, before) = self.entries[entry as usize];
            self.taken.push(position);
            entry = before;
        }
        Some(id)
    }
}
