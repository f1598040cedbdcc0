//! The Python module `rustbpe`: the class `Tokenizer` over the plain Rust of the other modules.
//!
//! Texts are read where Python keeps them, without a copy. The GIL is held while texts are taken from an iterator and
//! results are turned into Python's objects, and given up while texts are counted, merged and encoded; signals are
//! looked at in between, so that Ctrl-C works.

use std::path::PathBuf;
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict, PyInt, PyIterator, PyList, PyString, PyType};

use crate::{
    DEFAULT_PATTERN, Encoder, Error, Id, NUM_BYTES, PieceCounter, PieceCounts, Splitter, available_threads,
    learn_merges, read_tokenizer_json,
};

/// Texts are counted once this many bytes of them are there, even if fewer than `buffer_size`: it bounds the time
/// between two looks at the signals and the texts that are kept alive.
const CHUNK_BYTES: usize = 8 << 20;

/// The shortest time between two looks at the signals and two calls of the progress callback.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        PyValueError::new_err(error.to_string())
    }
}

/// A byte-pair encoding: train it on texts, then encode and decode. A new one has the 256 bytes as its tokens.
///
/// All methods may be called from several threads; those that work on text let other threads run meanwhile.
#[pyclass(frozen, module = "rustbpe")]
struct Tokenizer {
    /// Replaced as a whole by a training that succeeds; who reads it keeps the one that they started with.
    vocabulary: RwLock<Arc<Vocabulary>>,
}

struct Vocabulary {
    encoder: Encoder,
    /// The ids as Python's integers: a list of ids takes them from here, which is quicker than to make them anew.
    ints: PyOnceLock<Vec<Py<PyInt>>>,
}

impl Tokenizer {
    fn of(encoder: Encoder) -> Self {
        Tokenizer { vocabulary: RwLock::new(Arc::new(Vocabulary { encoder, ints: PyOnceLock::new() })) }
    }

    fn vocabulary(&self) -> Arc<Vocabulary> {
        self.vocabulary.read().expect("no holder of this lock panics").clone()
    }
}

impl Vocabulary {
    fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
        let make =
            || (0..self.encoder.vocab_size()).map(|id: u32| PyResult::Ok(id.into_pyobject(py)?.unbind())).collect();
        let ints = self.ints.get_or_try_init(py, make)?;
        PyList::new(py, ids.iter().map(|&id| ints[id as usize].bind(py)))
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Tokenizer::of(Encoder::from_merges(Splitter::new(DEFAULT_PATTERN)?, &[])))
    }

    /// The tokenizer of a vocabulary: mergeable_ranks gives the id of each token by its bytes, as tiktoken has it.
    ///
    /// The ids are 0, 1, 2, ... and all 256 bytes are among the tokens. special_tokens gives further ids by name: they
    /// are decoded, and never made of a text. pattern None is GPT-4's. Raises ValueError for what is no vocabulary.
    #[classmethod]
    #[pyo3(signature = (mergeable_ranks, pattern=None, special_tokens=None))]
    fn from_ranks(
        _cls: &Bound<'_, PyType>,
        py: Python<'_>,
        mergeable_ranks: &Bound<'_, PyDict>,
        pattern: Option<&str>,
        special_tokens: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let mut tokens = vec![Box::default(); mergeable_ranks.len()];
        for (token, id) in mergeable_ranks {
            let place = id.extract::<usize>().ok().and_then(|id| tokens.get_mut(id));
            let place: &mut Box<[u8]> =
                place.ok_or_else(|| PyValueError::new_err(format!("the ids are not 0, 1, 2, ...: {id}")))?;
            *place = token.extract::<&[u8]>()?.into();
        }
        let mut special = Vec::new();
        for (name, id) in special_tokens.into_iter().flatten() {
            special.push((id.extract()?, name.extract::<PyBackedStr>()?.as_bytes().into()));
        }
        let splitter = Splitter::new(pattern.unwrap_or(DEFAULT_PATTERN))?;
        Ok(Tokenizer::of(py.detach(|| Encoder::new(splitter, tokens, special))?))
    }

    /// The tokenizer of a tokenizer.json, the format of Hugging Face's tokenizers library.
    ///
    /// Its added tokens are special tokens. Raises OSError where the file cannot be read, and ValueError where it is not
    /// byte-level BPE over pieces of unchanged text.
    #[classmethod]
    fn from_file(_cls: &Bound<'_, PyType>, py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        py.detach(|| {
            let json = read_tokenizer_json(&std::fs::read_to_string(path)?)?;
            Ok(Tokenizer::of(Encoder::new(Splitter::new(&json.pattern)?, json.tokens, json.special)?))
        })
    }

    /// Learns a vocabulary of vocab_size tokens, the 256 bytes included, from an iterable of str.
    ///
    /// The result replaces that of an earlier training; an error leaves it as it was. It depends on the texts, the
    /// vocabulary size and the pattern alone. There are fewer tokens than asked for if the texts do not hold enough
    /// different pairs.
    ///
    /// buffer_size is the number of texts that are taken from the iterator at a time. pattern is the regular expression
    /// that splits texts into pieces; None is GPT-4's. num_threads None is one for each processor.
    ///
    /// progress, if given, is called as progress(phase, done, total) at most ten times a second and at the end of each
    /// phase: "count" in bytes of UTF-8 (total is None until the iterator ends), then "merge" in merges. An exception
    /// that it raises ends the training, as does one of the iterator.
    ///
    /// Raises ValueError for a vocab_size below 256 or beyond 32 bits, a buffer_size below 1 or a pattern that does not
    /// compile or gives up on a text, and TypeError for an item that is not a str.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, *, num_threads=None, progress=None))]
    #[expect(clippy::too_many_arguments)]
    fn train_from_iterator(
        &self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: i64,
        pattern: Option<&str>,
        num_threads: Option<i64>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let vocab_size = u32::try_from(vocab_size).ok().filter(|&size| size >= NUM_BYTES).ok_or_else(|| {
            PyValueError::new_err(format!(
                "vocab_size must be from {NUM_BYTES}, one token a byte, to {}, not {vocab_size}",
                u32::MAX
            ))
        })?;
        let buffer_size = at_least_one("buffer_size", buffer_size)?;
        let num_threads = num_threads.map_or(Ok(available_threads()), |number| at_least_one("num_threads", number))?;
        let splitter = Splitter::new(pattern.unwrap_or(DEFAULT_PATTERN))?;
        let mut progress = Progress::new(progress);

        let counter = PieceCounter::new(&splitter, num_threads);
        let counts = count_pieces(&iterator.try_iter()?, buffer_size, counter, &mut progress)?;
        let merges = py.detach(|| {
            learn_merges(counts, vocab_size, |done, wanted| progress.report_detached("merge", done, wanted))
        })?;
        progress.report_end(py, "merge", merges.len(), (vocab_size - NUM_BYTES) as usize)?;

        let encoder = py.detach(|| Encoder::from_merges(splitter, &merges));
        let vocabulary = Arc::new(Vocabulary { encoder, ints: PyOnceLock::new() });
        *self.vocabulary.write().expect("no holder of this lock panics") = vocabulary;
        Ok(())
    }

    /// The regular expression that splits texts into pieces.
    fn get_pattern(&self) -> String {
        self.vocabulary().encoder.pattern().to_owned()
    }

    /// All tokens as (bytes, id), ordered by id: what tiktoken.Encoding takes as mergeable_ranks once it is a dict.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        self.vocabulary().encoder.tokens().iter().zip(0..).map(|(token, id)| (PyBytes::new(py, token), id)).collect()
    }

    /// The number of tokens, special tokens aside.
    #[getter]
    fn vocab_size(&self) -> u32 {
        self.vocabulary().encoder.vocab_size()
    }

    /// The ids of a text, as a list. What looks like a special token is text like any other.
    fn encode<'py>(&self, py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyList>> {
        let vocabulary = self.vocabulary();
        let ids = py.detach(|| vocabulary.encoder.encode(text))?;
        vocabulary.list(py, &ids)
    }

    /// The same as encode: no text is anything but ordinary.
    fn encode_ordinary<'py>(&self, py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyList>> {
        self.encode(py, text)
    }

    /// [encode(text) for text in texts], on all processors.
    fn batch_encode<'py>(&self, py: Python<'py>, texts: Vec<PyBackedStr>) -> PyResult<Vec<Bound<'py, PyList>>> {
        let vocabulary = self.vocabulary();
        let batch = py.detach(|| vocabulary.encoder.encode_batch::<u32, _>(&texts, None, available_threads()))?;
        batch.rows().map(|ids| vocabulary.list(py, ids)).collect()
    }

    /// The ids of a list of texts in one array, and where each text begins in it: (ids, offsets).
    ///
    /// ids is a numpy array of uint16 if every id, bos included, is below 65,536, else of uint32; offsets is one of
    /// int64, with len(texts) + 1 entries: text i is ids[offsets[i]:offsets[i + 1]]. bos, if given, is an id that is put
    /// before each text. num_threads None is one for each processor.
    #[pyo3(signature = (texts, bos=None, num_threads=None))]
    fn encode_batch<'py>(
        &self,
        py: Python<'py>,
        texts: Vec<PyBackedStr>,
        bos: Option<u32>,
        num_threads: Option<i64>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let num_threads = num_threads.map_or(Ok(available_threads()), |number| at_least_one("num_threads", number))?;
        let vocabulary = self.vocabulary();
        let largest = vocabulary.encoder.largest_id().max(bos.unwrap_or(0));
        if largest <= u16::MAX.into() {
            flat_arrays::<u16>(py, &vocabulary.encoder, &texts, bos, num_threads, "uint16")
        } else {
            flat_arrays::<u32>(py, &vocabulary.encoder, &texts, bos, num_threads, "uint32")
        }
    }

    /// The text of a sequence of ids; bytes that are no UTF-8, as where a character is cut, become U+FFFD.
    ///
    /// Raises ValueError for an id that is not in the vocabulary.
    fn decode(&self, py: Python<'_>, ids: Vec<i64>) -> PyResult<String> {
        let vocabulary = self.vocabulary();
        Ok(py.detach(|| Ok::<_, Error>(String::from_utf8_lossy(&vocabulary.bytes_of(&ids)?).into_owned()))?)
    }

    /// The bytes of a sequence of ids. Raises ValueError for an id that is not in the vocabulary.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: Vec<i64>) -> PyResult<Bound<'py, PyBytes>> {
        let vocabulary = self.vocabulary();
        Ok(PyBytes::new(py, &py.detach(|| vocabulary.bytes_of(&ids))?))
    }
}

impl Vocabulary {
    fn bytes_of(&self, ids: &[i64]) -> Result<Vec<u8>, Error> {
        let vocab_size = self.encoder.vocab_size();
        let checked = |&id| u32::try_from(id).map_err(|_| Error::UnknownId { id, vocab_size });
        self.encoder.decode(&ids.iter().map(checked).collect::<Result<Vec<_>, _>>()?)
    }
}

fn at_least_one(name: &str, number: i64) -> PyResult<usize> {
    let number_or_none = usize::try_from(number).ok().filter(|&number| number > 0);
    number_or_none.ok_or_else(|| PyValueError::new_err(format!("{name} must be at least 1, not {number}")))
}

// ---------------------------------------------------------------------------------------------------------------------
// Arrays

/// (ids, offsets) of [`Tokenizer::encode_batch`]; `dtype` is numpy's name of `T`.
fn flat_arrays<'py, T: Id + Element>(
    py: Python<'py>,
    encoder: &Encoder,
    texts: &[PyBackedStr],
    bos: Option<u32>,
    num_threads: usize,
    dtype: &str,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    let (ids, offsets) = py.detach(|| {
        let batch = encoder.encode_batch::<T, _>(texts, bos, num_threads)?;
        let offsets: Vec<i64> = std::iter::once(0).chain(batch.ends().map(|end| end as i64)).collect();
        Ok::<_, Error>((batch.ids(), offsets))
    })?;
    Ok((new_array(py, &ids, dtype)?, new_array(py, &offsets, "int64")?))
}

/// A numpy array of `values`.
fn new_array<'py, T: Element>(py: Python<'py>, values: &[T], dtype: &str) -> PyResult<Bound<'py, PyAny>> {
    let array = py.import("numpy")?.call_method1("empty", (values.len(), dtype))?;
    PyBuffer::<T>::get(&array)?.copy_from_slice(py, values)?;
    Ok(array)
}

// ---------------------------------------------------------------------------------------------------------------------
// Training

/// Counts the pieces of all texts of `texts`, taking up to `buffer_size` of them at a time. While threads count one
/// chunk, the next one is taken from the iterator.
fn count_pieces(
    texts: &Bound<'_, PyIterator>,
    buffer_size: usize,
    counter: PieceCounter,
    progress: &mut Progress,
) -> PyResult<PieceCounts> {
    let py = texts.py();
    let mut counting = Counting::start(counter, Vec::new());
    let mut bytes_done = 0;
    loop {
        // Whatever the iterator does, the threads are waited for: nothing of them outlives this function.
        let chunk = next_chunk(texts, buffer_size);
        let (counter, bytes) = counting.wait(py)?;
        let chunk = chunk?;
        bytes_done += bytes;
        progress.report(py, "count", bytes_done, None)?;
        if chunk.is_empty() {
            let counts = py.detach(|| counter.finish());
            progress.report_end(py, "count", bytes_done, bytes_done)?;
            return Ok(counts);
        }
        counting = Counting::start(counter, chunk);
    }
}

/// A chunk that is being counted.
struct Counting {
    thread: thread::JoinHandle<(PieceCounter, Vec<PyBackedStr>, Result<(), Error>)>,
}

impl Counting {
    fn start(mut counter: PieceCounter, chunk: Vec<PyBackedStr>) -> Self {
        let count = move || {
            let result = counter.add(&chunk);
            (counter, chunk, result)
        };
        Counting { thread: thread::spawn(count) }
    }

    /// Waits for the end, and gives the counter back with the number of bytes that were counted.
    fn wait(self, py: Python<'_>) -> PyResult<(PieceCounter, usize)> {
        let (counter, chunk, result) = py.detach(|| self.thread.join()).expect("a counting thread panicked");
        result?;
        Ok((counter, chunk.iter().map(|text| text.len()).sum()))
    }
}

/// The next texts, at most `buffer_size` and not many more than `CHUNK_BYTES`; empty at the end.
fn next_chunk(texts: &Bound<'_, PyIterator>, buffer_size: usize) -> PyResult<Vec<PyBackedStr>> {
    let mut chunk = Vec::new();
    let mut bytes = 0;
    for text in texts.clone() {
        let text = text?;
        let Ok(text) = text.cast::<PyString>() else {
            return Err(PyTypeError::new_err(format!("texts must be str, not {}", text.get_type().name()?)));
        };
        let text = PyBackedStr::try_from(text.clone())?;
        bytes += text.len();
        chunk.push(text);
        if chunk.len() >= buffer_size || bytes >= CHUNK_BYTES {
            break;
        }
    }
    Ok(chunk)
}

/// Looks at the signals and calls the progress callback, neither of them too often.
struct Progress {
    callback: Option<Py<PyAny>>,
    last_report: Instant,
}

impl Progress {
    fn new(callback: Option<Py<PyAny>>) -> Self {
        Progress { callback, last_report: Instant::now() }
    }

    fn is_due(&self) -> bool {
        self.last_report.elapsed() >= PROGRESS_INTERVAL
    }

    /// Reports if the last report is long enough ago.
    fn report(&mut self, py: Python<'_>, phase: &str, done: usize, total: Option<usize>) -> PyResult<()> {
        if self.is_due() { self.call(py, phase, done, total) } else { Ok(()) }
    }

    /// The same for a thread without the GIL: takes it only if there is something to report.
    fn report_detached(&mut self, phase: &str, done: usize, total: usize) -> PyResult<()> {
        if self.is_due() { Python::attach(|py| self.call(py, phase, done, Some(total))) } else { Ok(()) }
    }

    /// Reports the end of a phase, whenever the last report was.
    fn report_end(&mut self, py: Python<'_>, phase: &str, done: usize, total: usize) -> PyResult<()> {
        self.call(py, phase, done, Some(total))
    }

    fn call(&mut self, py: Python<'_>, phase: &str, done: usize, total: Option<usize>) -> PyResult<()> {
        py.check_signals()?;
        if let Some(callback) = &self.callback {
            callback.call1(py, (phase, done, total))?;
        }
        self.last_report = Instant::now();
        Ok(())
    }
}

/// Byte-pair encoding: exact training in parallel, encoding and decoding.
#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()
}
