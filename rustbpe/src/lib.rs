//! Byte-pair encoding: training, encoding and decoding, exact and parallel.
//!
//! A regular expression splits a text into pieces, a piece is a sequence of bytes, and the bytes are the first tokens,
//! 0 to 255. Training merges the adjacent pair of tokens with the largest count over all pieces into a new token, over
//! and over; encoding applies those merges to a piece in the order in which they were learned (Sennrich et al.,
//! <https://arxiv.org/abs/1508.07909>, on bytes as in GPT-2).
//!
//! | module   | what                                                          |                         |
//! |----------|---------------------------------------------------------------|-------------------------|
//! | `split`  | a text -> its pieces                                          | [`Splitter`]            |
//! | `count`  | texts -> how often each distinct piece occurs                 | [`PieceCounter`]        |
//! | `train`  | those counts -> the merges                                    | [`learn_merges`]        |
//! | `encode` | a vocabulary: ids from texts, and texts from ids              | [`Encoder`]             |
//! | `merge`  | the tokens of one piece, for `encode`                         |                         |
//! | `json`   | a vocabulary from a `tokenizer.json`                          | [`read_tokenizer_json`] |
//! | `key`    | short pieces as two machine words, for the tables of the rest |                         |
//! | `py`     | the Python module, behind the feature `python`                |                         |
//!
//! The result of training depends on the texts, the pattern and the vocabulary size alone: neither on the order of the
//! texts nor on the number of threads. Normalisation is left to the caller.
#![cfg_attr(not(feature = "python"), forbid(unsafe_code))] // the macros of the Python bindings write some

use std::{fmt, thread};

mod count;
mod encode;
mod json;
mod key;
mod merge;
#[cfg(feature = "python")]
mod py;
mod split;
#[cfg(test)]
mod testing;
mod train;

pub use count::{PieceCounter, PieceCounts};
pub use encode::{Batch, Encoder, Id};
pub use json::{TokenizerJson, read_tokenizer_json};
pub use split::{DEFAULT_PATTERN, Splitter};
pub use train::{Pair, learn_merges};

/// The number of tokens that are there before any merge, one for each byte.
pub const NUM_BYTES: u32 = 256;

/// The number of threads that this process may use.
pub fn available_threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// What a caller can get wrong; the text says what to change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The split pattern is not a valid regular expression.
    Pattern { pattern: String, reason: String },
    /// The split pattern gave up on a text, for instance because it backtracks too much.
    Split { reason: String },
    /// The tokens are no vocabulary.
    Vocabulary { reason: String },
    /// An id that is not in the vocabulary.
    UnknownId { id: i64, vocab_size: u32 },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Pattern { pattern, reason } => write!(f, "invalid split pattern {pattern:?}: {reason}"),
            Error::Split { reason } => write!(f, "the split pattern failed on a text: {reason}"),
            Error::Vocabulary { reason } => write!(f, "not a vocabulary: {reason}"),
            Error::UnknownId { id, vocab_size } => {
                write!(f, "unknown token id {id}: ids go from 0 to {}", vocab_size - 1)
            }
        }
    }
}

impl std::error::Error for Error {}
