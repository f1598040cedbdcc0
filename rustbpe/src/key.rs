//! Short pieces as two machine words.
//!
//! Nearly all pieces have at most 15 bytes. Those 15 and the length fill 16 bytes, which are compared and hashed at once
//! and lie in a table itself, where a slice would be one look in the table and another one at what it points to.

/// A piece of 1 to [`Key::MAX_LEN`] bytes. The default value is no piece: it marks the empty places of tables.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(crate) struct Key([u64; 2]);

impl Key {
    pub(crate) const MAX_LEN: usize = 15;

    /// The key of `text[start..end]`, which is not empty. None: it is too long.
    #[inline]
    pub(crate) fn new(text: &[u8], start: usize, end: usize) -> Option<Self> {
        let len = end - start;
        if len > Self::MAX_LEN {
            return None;
        }
        let bytes = match text.get(start..start + 16) {
            Some(bytes) => bytes.try_into().expect("16 bytes"),
            None => {
                let mut bytes = [0; 16];
                bytes[..len].copy_from_slice(&text[start..end]);
                bytes
            }
        };
        // What follows the piece is masked away; the length tells a piece from one with a zero byte more.
        let value = u128::from_le_bytes(bytes) & (u128::MAX >> (128 - 8 * len)) | (len as u128) << 120;
        Some(Key([value as u64, (value >> 64) as u64]))
    }

    #[inline]
    pub(crate) fn is_empty(self) -> bool {
        self == Key::default()
    }

    /// The piece: the first bytes of the array, and their number.
    pub(crate) fn bytes(self) -> ([u8; 16], usize) {
        let value = u128::from(self.0[1]) << 64 | u128::from(self.0[0]);
        (value.to_le_bytes(), (value >> 120) as usize)
    }

    /// A hash of which all bits are good.
    #[inline]
    pub(crate) fn hash(self) -> u64 {
        // No piece makes a factor zero: the constants have bytes that are not in UTF-8, and a length that is too large.
        let product = u128::from(self.0[0] ^ 0xff51_afd7_ed55_8ccd) * u128::from(self.0[1] ^ 0xffce_b9fe_1a85_ec53);
        product as u64 ^ (product >> 64) as u64
    }
}

// ---------------------------------------------------------------------------------------------------------------------

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_its_bytes_wherever_they_stand() {
        for len in 1..=Key::MAX_LEN {
            for after in [0, 1, 20] {
                let text = [vec![b'x'; 3], (0..len as u8).collect(), vec![b'y'; after]].concat();
                let key = Key::new(&text, 3, 3 + len).unwrap();
                assert_eq!(Key::new(&text[3..3 + len], 0, len).unwrap(), key);
                let (bytes, key_len) = key.bytes();
                assert_eq!(bytes[..key_len], text[3..3 + len]);
                assert!(!key.is_empty());
            }
        }
        assert_eq!(Key::new(&[0; 16], 0, 16), None);
        assert_ne!(Key::new(&[0; 16], 0, 2), Key::new(&[0; 16], 0, 3));
    }
}
