//! The scanner splits every text as the regular expression does: `cargo fuzz run split`, in the folder `rustbpe`.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rustbpe::{DEFAULT_PATTERN, Splitter};

static BOTH: LazyLock<Vec<(Splitter, fancy_regex::Regex)>> = LazyLock::new(|| {
    let patterns = (1..=3).map(|digits| DEFAULT_PATTERN.replace("{1,3}", &format!("{{1,{digits}}}")));
    patterns.map(|p| (Splitter::new(&p).unwrap(), fancy_regex::Regex::new(&p).unwrap())).collect()
});

fuzz_target!(|text: &str| {
    for (splitter, regex) in BOTH.iter() {
        let mut found = regex.find_iter(text).map(|piece| piece.unwrap()).map(|piece| (piece.start(), piece.end()));
        splitter.for_each_piece(text, |start, end| assert_eq!(found.next(), Some((start, end)))).unwrap();
        assert_eq!(found.next(), None);
    }
});
