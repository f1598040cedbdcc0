//! Decoding the ids of a text gives the text, and a text's ids are those of its pieces, whatever was learned:
//! `cargo fuzz run encode`, in the folder `rustbpe`. The first line is learned from, the rest is encoded.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rustbpe::{DEFAULT_PATTERN, Encoder, PieceCounter, Splitter, learn_merges};

fuzz_target!(|input: &str| {
    let (learned, text) = input.split_once('\n').unwrap_or((input, ""));
    let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
    let mut counter = PieceCounter::new(&splitter, 1);
    counter.add(&[learned, learned]).unwrap();
    let merges = learn_merges(counter.finish(), 400, |_, _| Ok::<_, ()>(())).unwrap();
    let encoder = Encoder::from_merges(splitter.clone(), &merges);
    for text in [text, learned] {
        let ids = encoder.encode(text).unwrap();
        assert_eq!(encoder.decode(&ids).unwrap(), text.as_bytes());
        // Once more from memory, and piece by piece
        assert_eq!(encoder.encode(text).unwrap(), ids);
        let mut of_pieces = Vec::new();
        let fresh = Encoder::from_merges(Splitter::new("(?s).+").unwrap(), &merges);
        splitter.for_each_piece(text, |start, end| of_pieces.extend(fresh.encode(&text[start..end]).unwrap())).unwrap();
        assert_eq!(of_pieces, ids);
    }
});
