//! Reading the `tokenizer.json` of Hugging Face's tokenizers library: byte-level BPE over pieces of unchanged text.

use rustc_hash::FxHashMap;
use serde_json::Value;

use crate::Error;

/// What a `tokenizer.json` says: what [`crate::Encoder::new`] takes.
#[derive(Debug, PartialEq, Eq)]
pub struct TokenizerJson {
    /// The pattern that splits texts.
    pub pattern: String,
    /// The bytes of each token, by id.
    pub tokens: Vec<Box<[u8]>>,
    /// The special tokens.
    pub special: Vec<(u32, Box<[u8]>)>,
}

/// Reads the text of a `tokenizer.json`. An error says what is missing, or what makes it another kind of tokenizer.
pub fn read_tokenizer_json(text: &str) -> Result<TokenizerJson, Error> {
    let json: Value = serde_json::from_str(text).map_err(|e| bad(format!("no JSON: {e}")))?;
    let model = &json["model"];
    let steps = json["pre_tokenizer"]["pretokenizers"].as_array().map_or(&[][..], Vec::as_slice);
    let [split, byte_level] = steps else { return Err(bad("its pre_tokenizer is not Split and ByteLevel")) };
    let is_as_wanted = model["type"] == "BPE"
        && (split["type"] == "Split" && split["behavior"] == "Isolated" && split["invert"] == false)
        && (byte_level["type"] == "ByteLevel" && byte_level["use_regex"] == false)
        && byte_level["add_prefix_space"] == false
        && json["normalizer"].is_null();
    if !is_as_wanted {
        return Err(bad("it is not byte-level BPE over pieces of unchanged text"));
    }
    let pattern =
        split["pattern"]["Regex"].as_str().ok_or_else(|| bad("its split pattern is no regular expression"))?;

    let byte_of_char = byte_of_char();
    let bytes_of = |name: &str| -> Result<Box<[u8]>, Error> {
        let bytes = name.chars().map(|char| byte_of_char.get(&char).copied()).collect::<Option<Vec<u8>>>();
        Ok(bytes.ok_or_else(|| bad(format!("the token {name:?} is not written in the characters of bytes")))?.into())
    };
    let vocab = model["vocab"].as_object().ok_or_else(|| bad("it has no vocab"))?;
    let mut tokens: Vec<Option<Box<[u8]>>> = vec![None; vocab.len()];
    for (name, id) in vocab {
        let place = id.as_u64().and_then(|id| tokens.get_mut(usize::try_from(id).ok()?));
        *place.ok_or_else(|| bad("the ids are not 0, 1, 2, ..."))? = Some(bytes_of(name)?);
    }
    let tokens = tokens.into_iter().collect::<Option<Vec<_>>>().ok_or_else(|| bad("the ids are not 0, 1, 2, ..."))?;
    check_merges(&model["merges"], vocab)?;

    let mut special = Vec::new();
    for token in json["added_tokens"].as_array().map_or(&[][..], Vec::as_slice) {
        let id = token["id"].as_u64().and_then(|id| u32::try_from(id).ok());
        let (Some(id), Some(name)) = (id, token["content"].as_str()) else {
            return Err(bad("an added token has no id or no content"));
        };
        special.push((id, name.as_bytes().into()));
    }
    Ok(TokenizerJson { pattern: pattern.to_owned(), tokens, special })
}

fn bad(reason: impl Into<String>) -> Error {
    Error::Vocabulary { reason: reason.into() }
}

/// The library merges in the order of the list, this crate in that of the ids: they must be the same.
fn check_merges(merges: &Value, vocab: &serde_json::Map<String, Value>) -> Result<(), Error> {
    let merges = merges.as_array().ok_or_else(|| bad("it has no merges"))?;
    let mut last_id = None;
    for merge in merges {
        let (left, right) = match merge {
            Value::String(pair) => pair.split_once(' ').unwrap_or_default(),
            pair => (pair[0].as_str().unwrap_or_default(), pair[1].as_str().unwrap_or_default()),
        };
        let id = vocab.get(&format!("{left}{right}")).and_then(Value::as_u64);
        if id.is_none() || id <= last_id {
            return Err(bad("its merges are not in the order of the ids"));
        }
        last_id = id;
    }
    let num_made = vocab.keys().filter(|name| name.chars().nth(1).is_some()).count();
    if num_made == merges.len() { Ok(()) } else { Err(bad("some of its tokens have no merge")) }
}

/// The characters that stand for bytes: the byte itself where that is printable, else the next one from 256 on.
fn byte_of_char() -> FxHashMap<char, u8> {
    let mut next = 256;
    let char_of = |byte: u8| match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => (char::from(byte), byte),
        _ => {
            next += 1;
            (char::from_u32(next - 1).expect("the first characters after Latin-1"), byte)
        }
    };
    (0..=u8::MAX).map(char_of).collect()
}

// ---------------------------------------------------------------------------------------------------------------------

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A file with the bytes and three merges, the last of which writes its pair as older files do.
    fn file() -> Value {
        let mut vocab: serde_json::Map<String, Value> =
            byte_of_char().into_iter().map(|(char, byte)| (char.to_string(), byte.into())).collect();
        for (name, id) in [("Ġa", 256), ("Ġab", 257), ("Ã©", 258)] {
            vocab.insert(name.into(), id.into());
        }
        json!({
            "added_tokens": [{"id": 259, "content": "<|bos|>"}],
            "normalizer": null,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": "\\s+"}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false},
            ]},
            "model": {"type": "BPE", "vocab": vocab, "merges": [["Ġ", "a"], ["Ġa", "b"], "Ã ©"]},
        })
    }

    #[test]
    fn a_file_gives_pattern_tokens_and_special_tokens() {
        let read = read_tokenizer_json(&file().to_string()).unwrap();
        assert_eq!(read.pattern, r"\s+");
        assert_eq!(read.special, [(259, b"<|bos|>"[..].into())]);
        assert!(read.tokens[..256].iter().zip(0..=u8::MAX).all(|(token, byte)| **token == [byte]));
        assert_eq!(read.tokens[256..], [b" a"[..].into(), b" ab"[..].into(), "é".as_bytes().into()]);
    }

    #[test]
    fn other_kinds_of_files_are_refused() {
        let mut cases = Vec::new();
        for (path, value) in [
            ("/model/type", json!("Unigram")),
            ("/normalizer", json!({"type": "NFC"})),
            ("/pre_tokenizer", json!(null)),
            ("/pre_tokenizer/pretokenizers/0/behavior", json!("Removed")),
            ("/pre_tokenizer/pretokenizers/0/pattern", json!({"String": " "})),
            ("/pre_tokenizer/pretokenizers/1/use_regex", json!(true)),
            ("/model/vocab", json!([])),
            ("/model/vocab/Ġab", json!(900)),
            ("/model/vocab/Ġab", json!(256)),
            ("/model/merges", json!([["Ġa", "b"], ["Ġ", "a"], ["Ã", "©"]])),
            ("/model/merges", json!([["Ġ", "a"], ["Ġa", "b"]])),
            ("/model/merges/0", json!(["Ġ", "z"])),
            ("/added_tokens/0", json!({"content": "<|bos|>"})),
        ] {
            let mut changed = file();
            *changed.pointer_mut(path).unwrap() = value;
            cases.push(changed.to_string());
        }
        cases.extend(["".to_owned(), "[]".to_owned(), "{".to_owned()]);
        for case in cases {
            assert!(matches!(read_tokenizer_json(&case), Err(Error::Vocabulary { .. })), "{case}");
        }
    }
}
