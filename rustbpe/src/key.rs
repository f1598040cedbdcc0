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
        (value.to_le_bytes(), self.len())
    }

    /// The number of bytes.
    #[inline]
    pub(crate) fn len(self) -> usize {
        (self.0[1] >> 56) as usize
    }

    /// A hash of which all bits are good.
    #[inline]
    pub(crate) fn hash(self) -> u64 {
        // No piece makes a factor zero: the constants have bytes that are not in UTF-8, and a length that is too large.
        let product = u128::from(self.0[0] ^ 0xff51_afd7_ed55_8ccd) * u128::from(self.0[1] ^ 0xffce_b9fe_1a85_ec53);
        product as u64 ^ (product >> 64) as u64
    }
}

/// Key -> value: open addressing, at most half full.
pub(crate) struct KeyMap<V> {
    slots: Vec<(Key, V)>,
    num_used: usize,
}

impl<V: Copy + Default> Default for KeyMap<V> {
    fn default() -> Self {
        KeyMap { slots: vec![Default::default(); 1 << 10], num_used: 0 }
    }
}

impl<V: Copy + Default> KeyMap<V> {
    #[inline]
    pub(crate) fn get(&self, key: Key) -> Option<V> {
        let (found, value) = self.slots[self.place(key)];
        (found == key).then_some(value)
    }

    /// Whether `key` is at the first place at which it can be.
    #[inline]
    pub(crate) fn starts_with(&self, key: Key) -> bool {
        self.slots[self.first_place(key)].0 == key
    }

    /// The value of `key`, which is there afterwards.
    #[inline]
    pub(crate) fn entry(&mut self, key: Key) -> &mut V {
        let mut place = self.place(key);
        if self.slots[place].0.is_empty() {
            if 2 * self.num_used >= self.slots.len() {
                self.grow();
                place = self.place(key);
            }
            self.slots[place].0 = key;
            self.num_used += 1;
        }
        &mut self.slots[place].1
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Key, V)> {
        self.slots.iter().copied().filter(|(key, _)| !key.is_empty())
    }

    /// The number of slots is a power of two.
    #[inline]
    fn first_place(&self, key: Key) -> usize {
        (key.hash() >> (64 - self.slots.len().trailing_zeros())) as usize
    }

    /// Where `key` is, or else the empty slot in which it would be.
    #[inline]
    fn place(&self, key: Key) -> usize {
        let mut place = self.first_place(key);
        while self.slots[place].0 != key && !self.slots[place].0.is_empty() {
            place = (place + 1) & (self.slots.len() - 1);
        }
        place
    }

    #[cold]
    fn grow(&mut self) {
        let larger = KeyMap { slots: vec![Default::default(); 2 * self.slots.len()], num_used: 0 };
        let smaller = std::mem::replace(self, larger);
        smaller.iter().for_each(|(key, value)| *self.entry(key) = value);
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

    #[test]
    fn a_map_finds_what_was_put_in() {
        let keys: Vec<Key> = (0..5000_u32).map(|i| Key::new(&i.to_le_bytes(), 0, 4).unwrap()).collect();
        let mut map = KeyMap::default();
        for (&key, value) in keys.iter().zip(0..) {
            assert_eq!(map.get(key), None);
            *map.entry(key) = value;
            *map.entry(key) += 1;
        }
        assert!(keys.iter().zip(0..).all(|(&key, value)| map.get(key) == Some(value + 1)));
        assert_eq!(map.iter().count(), keys.len());
    }
}
