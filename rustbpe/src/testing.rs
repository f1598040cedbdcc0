//! What the tests of several modules share.

/// Each class of the patterns of GPT-4's kind, and the characters at the edges of the Unicode classes.
pub const BOUNDARY_CHARS: &str =
    "aZséſKı字ी\u{301}'''’sdmtlvreLVRE019²Ⅷ٣    \u{85}\u{a0}\u{3000}\u{200b}\u{180e}\u{2028}\t\r\n\n\u{b}.!-_🙂\0";

/// Pseudo-random numbers, the same ones on every run (Knuth's MMIX generator).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % n
    }

    pub fn text(&mut self, alphabet: &[char], max_chars: usize) -> String {
        (0..self.below(max_chars + 1)).map(|_| alphabet[self.below(alphabet.len())]).collect()
    }

    /// A character from anywhere in Unicode.
    pub fn char(&mut self) -> char {
        loop {
            if let Some(char) = char::from_u32(self.below(0x110000) as u32) {
                return char;
            }
        }
    }
}

/// How many cases a property is tried on: RUSTBPE_CASES where that is set, for a long run, else `default`.
pub fn num_cases(default: usize) -> usize {
    std::env::var("RUSTBPE_CASES").map_or(default, |number| number.parse().expect("RUSTBPE_CASES is a number"))
}

/// `tokens` with every `pair` replaced by `id`, from left to right.
pub fn replaced(tokens: &[u32], pair: (u32, u32), id: u32) -> Vec<u32> {
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
