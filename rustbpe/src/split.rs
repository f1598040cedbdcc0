//! Splitting: a text into the pieces within which merges happen.
//!
//! The patterns of GPT-4's kind, which differ in the number of digits in a piece, are matched by a scanner written for
//! them: one look at a table for an ASCII character, no backtracking, and so no text on which it is slow or gives up.
//! Any other pattern is run by the `fancy-regex` crate, which is also what the scanner is tested against.

use std::sync::LazyLock;

use regex_syntax::hir::{Class as HirClass, HirKind};

use crate::Error;

/// The pattern used where none is given: GPT-4's.
pub const DEFAULT_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
);

/// Cuts texts into pieces.
#[derive(Clone)]
pub struct Splitter {
    pattern: String,
    engine: Engine,
}

#[derive(Clone)]
enum Engine {
    Scanner(Scanner),
    Backtracking(fancy_regex::Regex),
}

impl Splitter {
    /// Compiles `pattern`, a regular expression with look-around and possessive quantifiers.
    pub fn new(pattern: &str) -> Result<Self, Error> {
        let engine = match Scanner::for_pattern(pattern) {
            Some(scanner) => Engine::Scanner(scanner),
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

    /// Whether the pattern is one that the scanner knows.
    pub fn is_scanner(&self) -> bool {
        matches!(self.engine, Engine::Scanner(_))
    }

    /// Calls `visit` with the start and the end, in bytes, of each successive match in `text` that is not empty. What
    /// the pattern does not match is skipped.
    ///
    /// ```
    /// let mut pieces = Vec::new();
    /// let splitter = rustbpe::Splitter::new(rustbpe::DEFAULT_PATTERN).unwrap();
    /// let text = "It's 1234  o'clock.\n";
    /// splitter.for_each_piece(text, |start, end| pieces.push(&text[start..end])).unwrap();
    /// assert_eq!(pieces, ["It", "'s", " ", "123", "4", " ", " o", "'clock", ".\n"]);
    /// ```
    #[inline]
    pub fn for_each_piece(&self, text: &str, mut visit: impl FnMut(usize, usize)) -> Result<(), Error> {
        match &self.engine {
            Engine::Scanner(scanner) => {
                let bytes = text.as_bytes();
                let mut start = 0;
                while start < bytes.len() {
                    let end = scanner.piece_end(bytes, start);
                    visit(start, end);
                    start = end;
                }
            }
            Engine::Backtracking(regex) => {
                for found in regex.find_iter(text) {
                    let found = found.map_err(|e| Error::Split { reason: e.to_string() })?;
                    if found.start() < found.end() {
                        visit(found.start(), found.end());
                    }
                }
            }
        }
        Ok(())
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The scanner

/// What a character is to the patterns of GPT-4's kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\r` or `\n`
    Newline,
    /// `\s` but `\r` and `\n`
    Blank,
    /// All else, combining marks included.
    Other,
    /// Not a character: the end of the text.
    End,
}

/// Matches `'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,D}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+`.
///
/// At every character some alternative matches, so the pieces are the whole text.
#[derive(Clone)]
struct Scanner {
    max_digits: usize,
    classes: &'static Classes,
}

impl Scanner {
    /// The scanner that splits as `pattern` does. None: the pattern is of another kind.
    fn for_pattern(pattern: &str) -> Option<Self> {
        let digits = pattern
            .strip_prefix(r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,")?
            .strip_suffix(r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")?;
        let &[digit @ b'1'..=b'9'] = digits.as_bytes() else { return None };
        Some(Scanner { max_digits: (digit - b'0').into(), classes: &CLASSES })
    }

    /// Where the piece that begins at `start` ends. `text` is UTF-8 and `start` the place of a character in it.
    #[inline]
    fn piece_end(&self, text: &[u8], start: usize) -> usize {
        let (class, next) = self.class_at(text, start);
        match class {
            Class::Letter => self.letters_end(text, next),
            Class::Number => self.numbers_end(text, next),
            Class::Newline => self.gap_end(text, start),
            Class::Blank | Class::Other => {
                if let Some(end) = contraction_end(text, start) {
                    return end;
                }
                let (following, after) = self.class_at(text, next);
                if following == Class::Letter {
                    self.letters_end(text, after)
                } else if class == Class::Other {
                    self.others_end(text, next)
                } else if following == Class::Other && text[start] == b' ' {
                    self.others_end(text, after)
                } else {
                    self.gap_end(text, start)
                }
            }
            Class::End => start,
        }
    }

    /// Skips `\p{L}*`.
    #[inline]
    fn letters_end(&self, text: &[u8], mut at: usize) -> usize {
        loop {
            while let Some(bytes) = text.get(at..at + 8) {
                let num_letters = leading_ascii_letters(bytes.try_into().expect("8 bytes"));
                at += num_letters;
                if num_letters < 8 {
                    break;
                }
            }
            while at < text.len() && text[at].is_ascii_alphabetic() {
                at += 1;
            }
            if at == text.len() || text[at].is_ascii() {
                return at;
            }
            let (class, next) = self.class_at(text, at);
            if class != Class::Letter {
                return at;
            }
            at = next;
        }
    }

    /// Skips the rest of `\p{N}{1,D}`, whose first character is there.
    fn numbers_end(&self, text: &[u8], mut at: usize) -> usize {
        for _ in 1..self.max_digits {
            let (class, next) = self.class_at(text, at);
            if class != Class::Number {
                break;
            }
            at = next;
        }
        at
    }

    /// Skips `[^\s\p{L}\p{N}]*[\r\n]*`.
    fn others_end(&self, text: &[u8], mut at: usize) -> usize {
        while let (Class::Other, next) = self.class_at(text, at) {
            at = next;
        }
        while text.get(at).is_some_and(|byte| matches!(byte, b'\r' | b'\n')) {
            at += 1;
        }
        at
    }

    /// Matches `\s*[\r\n]|\s+(?!\S)|\s+`: white space up to its last line break; without one, all of it where the text
    /// ends, else all but its last character, unless that is all there is.
    fn gap_end(&self, text: &[u8], start: usize) -> usize {
        let (mut at, mut last, mut after_newline) = (start, start, None);
        loop {
            let (class, next) = self.class_at(text, at);
            match class {
                Class::Newline => after_newline = Some(next),
                Class::Blank => {}
                _ => break,
            }
            (last, at) = (at, next);
        }
        match after_newline {
            Some(end) => end,
            None if at == text.len() || last == start => at,
            None => last,
        }
    }

    /// The class of the character at `at`, and where the next one is.
    #[inline]
    fn class_at(&self, text: &[u8], at: usize) -> (Class, usize) {
        match text.get(at) {
            None => (Class::End, at),
            Some(&byte) if byte.is_ascii() => (ASCII_CLASSES[usize::from(byte)], at + 1),
            Some(_) => self.class_of_long_char(text, at),
        }
    }

    fn class_of_long_char(&self, text: &[u8], at: usize) -> (Class, usize) {
        let bits = |offset: usize, mask: u8| u32::from(text[at + offset] & mask);
        let (code, len) = match text[at] {
            ..0xe0 => (bits(0, 0x1f) << 6 | bits(1, 0x3f), 2),
            0xe0..0xf0 => (bits(0, 0x0f) << 12 | bits(1, 0x3f) << 6 | bits(2, 0x3f), 3),
            0xf0.. => (bits(0, 0x07) << 18 | bits(1, 0x3f) << 12 | bits(2, 0x3f) << 6 | bits(3, 0x3f), 4),
        };
        (self.classes.of(code), at + len)
    }
}

/// How many of eight bytes are ASCII letters before the first that is not, without a branch for each: where a word ends
/// cannot be foreseen. A sum sets the highest bit of each byte that is at least a, or above z.
#[inline]
fn leading_ascii_letters(bytes: [u8; 8]) -> usize {
    let all = |byte: u8| u64::from_le_bytes([byte; 8]);
    let text = u64::from_le_bytes(bytes);
    let lower = (text & all(0x7f)) | all(b'a' - b'A');
    let letters = (lower + all(0x80 - b'a')) & !(lower + all(0x7f - b'z')) & !text;
    ((!letters & all(0x80)).trailing_zeros() / 8) as usize
}

/// The end of `'(?i:[sdmt]|ll|ve|re)` at `start`. Among them is U+017F, the long s: it is an s but for its case.
#[inline]
fn contraction_end(text: &[u8], start: usize) -> Option<usize> {
    if text[start] != b'\'' {
        return None;
    }
    let at = |i: usize| text.get(start + i).map_or(0, u8::to_ascii_lowercase);
    match (at(1), at(2)) {
        (b's' | b'd' | b'm' | b't', _) => Some(start + 2),
        (b'l', b'l') | (b'v' | b'r', b'e') | (0xc5, 0xbf) => Some(start + 3),
        _ => None,
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The classes of characters

const ASCII_CLASSES: [Class; 128] = {
    let mut classes = [Class::Other; 128];
    let mut byte = 0;
    while byte < 128 {
        classes[byte] = match byte as u8 {
            b'a'..=b'z' | b'A'..=b'Z' => Class::Letter,
            b'0'..=b'9' => Class::Number,
            b'\r' | b'\n' => Class::Newline,
            b' ' | b'\t' | 0x0b | 0x0c => Class::Blank,
            _ => Class::Other,
        };
        byte += 1;
    }
    classes
};

/// The classes of all code points, in pages of 256, equal pages kept once.
struct Classes {
    page_of: Vec<u8>,
    pages: Vec<[Class; 256]>,
}

/// Made from the tables of the regular expressions, so that scanner and fallback know the same version of Unicode.
static CLASSES: LazyLock<Classes> = LazyLock::new(|| {
    let mut flat = vec![Class::Other; 0x110000];
    for (pattern, class) in
        [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Blank), (r"[\r\n]", Class::Newline)]
    {
        let hir = regex_syntax::parse(pattern).expect("a valid class");
        let HirKind::Class(HirClass::Unicode(ranges)) = hir.kind() else { unreachable!("{pattern} is a class") };
        for range in ranges.iter() {
            flat[range.start() as usize..=range.end() as usize].fill(class);
        }
    }
    let mut classes = Classes { page_of: Vec::new(), pages: Vec::new() };
    for page in flat.chunks_exact(256) {
        let page: [Class; 256] = page.try_into().expect("256 code points");
        let index = classes.pages.iter().position(|known| *known == page).unwrap_or_else(|| {
            classes.pages.push(page);
            classes.pages.len() - 1
        });
        classes.page_of.push(index.try_into().expect("most pages are alike"));
    }
    classes
});

impl Classes {
    #[inline]
    fn of(&self, code: u32) -> Class {
        self.pages[usize::from(self.page_of[(code >> 8) as usize])][(code & 0xff) as usize]
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BOUNDARY_CHARS, Random, num_cases};

    fn pieces<'t>(splitter: &Splitter, text: &'t str) -> Vec<&'t str> {
        let mut pieces = Vec::new();
        splitter.for_each_piece(text, |start, end| pieces.push(&text[start..end])).unwrap();
        pieces
    }

    fn with_digits(digits: usize) -> String {
        DEFAULT_PATTERN.replace("{1,3}", &format!("{{1,{digits}}}"))
    }

    #[test]
    fn the_scanner_splits_like_the_regular_expression() {
        let alphabet: Vec<char> = BOUNDARY_CHARS.chars().collect();
        let cases = num_cases(4_000);
        for digits in 1..=3 {
            let pattern = with_digits(digits);
            let scanner = Splitter::new(&pattern).unwrap();
            assert!(scanner.is_scanner());
            let oracle = fancy_regex::Regex::new(&pattern).unwrap();
            let mut random = Random(digits as u64);
            for _ in 0..cases {
                let text: String = (0..random.below(20))
                    .map(|_| if random.below(8) > 0 { alphabet[random.below(alphabet.len())] } else { random.char() })
                    .collect();
                let expected: Vec<&str> = oracle.find_iter(&text).map(|found| found.unwrap().as_str()).collect();
                assert_eq!(pieces(&scanner, &text), expected, "{text:?}");
            }
        }
        println!("{} texts split alike", 3 * cases);
    }

    #[test]
    fn every_character_has_the_class_of_the_regular_expressions() {
        let class = |pattern| fancy_regex::Regex::new(pattern).unwrap();
        let (letter, number, space) = (class(r"^\p{L}"), class(r"^\p{N}"), class(r"^\s"));
        for char in '\0'..=char::MAX {
            let mut buffer = [0; 4];
            let text = char.encode_utf8(&mut buffer);
            let expected = if letter.is_match(text).unwrap() {
                Class::Letter
            } else if number.is_match(text).unwrap() {
                Class::Number
            } else if space.is_match(text).unwrap() {
                if matches!(char, '\r' | '\n') { Class::Newline } else { Class::Blank }
            } else {
                Class::Other
            };
            let scanner = Scanner { max_digits: 1, classes: &CLASSES };
            assert_eq!(scanner.class_at(text.as_bytes(), 0), (expected, text.len()), "{char:?}");
        }
    }

    #[test]
    fn other_patterns_go_to_the_backtracking_engine() {
        for pattern in [r"\w+", r"(?=a)|\w+", &with_digits(0), &with_digits(30)] {
            assert!(!Splitter::new(pattern).unwrap().is_scanner());
        }
        let splitter = Splitter::new(r"(?=a)|b(?!c)").unwrap();
        assert_eq!(pieces(&splitter, "abbc"), ["b"]); // no empty piece at "a"
    }

    #[test]
    fn a_bad_pattern_and_one_that_gives_up_are_errors() {
        assert!(matches!(Splitter::new("(a"), Err(Error::Pattern { .. })));
        let splitter = Splitter::new(r"(?:a|b|ab)*?(?<!x)c").unwrap();
        assert!(matches!(splitter.for_each_piece(&"ab".repeat(200), |_, _| ()), Err(Error::Split { .. })));
    }
}
