//! Merging: the tokens of one piece from its bytes.
//!
//! Of all adjacent pairs whose bytes together are a token, the one that makes the token with the smallest id is merged,
//! the leftmost of equal ones, until there is none. There are three ways to do that, with one result.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;

use crate::key::{Key, KeyMap};
use crate::{NUM_BYTES, Pair};

/// No token.
pub(crate) const NONE: u32 = u32::MAX;

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

/// Where two bytes are in a table of all of them.
#[inline]
fn place_of_two(left: u8, right: u8) -> usize {
    usize::from(left) << 8 | usize::from(right)
}

/// (left, right) -> the token that they make.
pub(crate) struct PairTable {
    /// The pairs of single bytes, by byte.
    of_bytes: Vec<u32>,
    of_tokens: FxHashMap<Pair, u32>,
    /// The pair that makes each token; for a byte, twice that byte. Only where the tokens are ordered.
    parts: Vec<Pair>,
    /// Whether the bytes come first, and each other token is made by one pair only, of tokens with smaller ids.
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
            parts: tokens.iter().map(|token| (token[0].into(), token[0].into())).collect(),
            is_ordered: true,
        };
        if byte_ids.iter().any(|&id| id >= NUM_BYTES) {
            return Self::with_all_cuts(tokens, token_ids);
        }
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
            self.of_bytes[place_of_two(left_byte, right_byte)] = id;
        }
        self.of_tokens.insert((left.1, right.1), id);
    }

    #[inline]
    fn of_bytes(&self, left: u8, right: u8) -> u32 {
        self.of_bytes[place_of_two(left, right)]
    }

    #[inline]
    fn get(&self, left: u32, right: u32) -> u32 {
        self.of_tokens.get(&(left, right)).copied().unwrap_or(NONE)
    }

    /// Whether merging the bytes of both tokens, which are ordered, leaves these two, so that no merge ever joins what
    /// is left of their border with what is right of it. Goes back in time: takes apart the token that was made last,
    /// until only the two bytes at the border are left, and looks at the two that stood there each time.
    #[inline]
    fn stay_apart(&self, mut left: u32, mut right: u32) -> bool {
        let mut end = NONE; // tokens from here on are made when one of the two that stand at the border is gone
        loop {
            if left.max(right) < NUM_BYTES {
                return self.of_bytes(self.parts[left as usize].1 as u8, self.parts[right as usize].0 as u8) >= end;
            }
            if self.get(left, right) < end {
                return false;
            }
            // Of equal merges the left one comes first. So one at the border comes before an equal one to the right.
            if left > right {
                end = left;
                left = self.parts[left as usize].1;
            } else {
                end = right + 1;
                right = self.parts[right as usize].0;
            }
        }
    }
}

/// The tokens by their first bytes: a tree whose nodes stand for the first bytes of some tokens.
pub(crate) struct TokenTree {
    /// The node for each two bytes, or NONE. The node of the bytes of a token has its id; other nodes follow.
    of_two_bytes: Vec<u32>,
    /// (node, byte) -> the node for one byte more.
    children: FxHashMap<(u32, u8), u32>,
    /// The length of each token, and the longest other token with which it begins, or NONE.
    lengths: Vec<(u32, u32)>,
}

impl TokenTree {
    pub(crate) fn new(tokens: &[Box<[u8]>], token_ids: &TokenIds, byte_ids: &[u32; 256]) -> Self {
        let (of_two_bytes, lengths) = (vec![NONE; 1 << 16], Vec::with_capacity(tokens.len()));
        let mut tree = TokenTree { of_two_bytes, children: FxHashMap::default(), lengths };
        let mut next_node = tokens.len() as u32;
        for token in tokens {
            let (mut node, mut shorter) = (byte_ids[usize::from(token[0])], NONE);
            for end in 2..=token.len() {
                if (node as usize) < tokens.len() {
                    shorter = node;
                }
                node = *tree.children.entry((node, token[end - 1])).or_insert_with(|| {
                    token_ids.get(&token[..end]).unwrap_or_else(|| {
                        next_node += 1;
                        next_node - 1
                    })
                });
                if end == 2 {
                    tree.of_two_bytes[place_of_two(token[0], token[1])] = node;
                }
            }
            tree.lengths.push((token.len() as u32, shorter));
        }
        tree
    }

    fn len(&self, token: u32) -> usize {
        self.lengths[token as usize].0 as usize
    }

    /// The longest token that is shorter than `token` and begins it, or NONE.
    fn shorter(&self, token: u32) -> u32 {
        self.lengths[token as usize].1
    }

    /// The longest token with which `text` begins, and how many bytes were looked at. `text` is not empty.
    #[inline]
    fn longest(&self, text: &[u8], byte_ids: &[u32; 256]) -> (u32, usize) {
        let mut longest = byte_ids[usize::from(text[0])];
        let Some(&second) = text.get(1) else { return (longest, 1) };
        let (mut node, mut rest) = (self.of_two_bytes[place_of_two(text[0], second)], text[2..].iter());
        while node != NONE {
            if (node as usize) < self.lengths.len() {
                longest = node;
            }
            node = rest.next().and_then(|&byte| self.children.get(&(node, byte))).copied().unwrap_or(NONE);
        }
        (longest, text.len() - rest.len())
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Merging one piece

/// Merges the bytes of a piece; three ways with one result, which is left in `ids`, empty before.
#[derive(Default)]
pub(crate) struct Merging {
    pub(crate) ids: Vec<u32>,
    /// merge_by_scans: what each token makes with the one after it, and the token.
    parts: Vec<(u32, u32)>,
    list: TokenList,
}

impl Merging {
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

    /// Finds the tokens from left to right instead of merging. Where the tokens are ordered, the result is the only
    /// sequence of tokens for the piece in which each two neighbours stay apart:
    ///
    /// - Merges happen in the order of their ids, and equal ones from left to right. Up to the first merge across a
    ///   border of a given sequence, all that happens in two neighbours is what happens in the two alone.
    /// - So if that merge were across the border of two that stay apart, it would be one in the two alone, which there
    ///   is not. With no merge across any border, each token is left as what its own bytes make: itself.
    /// - And in the result no merge was across any border, so that each two neighbours stay apart.
    ///
    /// It holds for any first bytes of the piece alike: at most one sequence leads to a position. So one that is given
    /// up is never met again, whichever tokens are tried, and the time is linear in the length, for tokens of bounded
    /// length. The longest token comes first: it is nearly always the right one.
    pub(crate) fn merge_by_search(&mut self, piece: &[u8], byte_ids: &[u32; 256], pairs: &PairTable, tree: &TokenTree) {
        let ids = &mut self.ids;
        // In a run of one character two questions come again and again: which token is the longest, and which the right
        // one. What was seen to answer the first is kept unless it ends with the piece: more might have changed it.
        let (mut seen, mut longest): (&[u8], u32) = (&[], NONE);
        let mut known = ((NONE, NONE), NONE);
        let mut start = 0;
        while start < piece.len() {
            let rest = &piece[start..];
            if seen.is_empty() || !rest.starts_with(seen) {
                let (found, num_seen) = tree.longest(rest, byte_ids);
                (seen, longest) = (if num_seen < rest.len() { &rest[..num_seen] } else { &[] }, found);
            }
            let mut token = longest;
            loop {
                let last = ids.last().copied().unwrap_or(NONE);
                let question = (last, token);
                if question == known.0 {
                    token = known.1;
                }
                while token != NONE && last != NONE && !pairs.stay_apart(last, token) {
                    token = tree.shorter(token);
                }
                known = (question, token);
                if token != NONE {
                    break;
                }
                ids.pop();
                start -= tree.len(last);
                token = tree.shorter(last);
            }
            ids.push(token);
            start += tree.len(token);
        }
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
