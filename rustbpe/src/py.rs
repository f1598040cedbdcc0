//! The Python module `rustbpe`: the class `Tokenizer` over the plain Rust of `lib.rs`.
//!
//! Texts are read where Python keeps them, without a copy. The GIL is held while texts are taken from the iterator and
//! given up while they are counted, merged and encoded; signals are looked at in between, so that Ctrl-C works.

use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyIterator, PyString};

use crate::{
    DEFAULT_PATTERN, Encoder, Error, NUM_BYTES, PieceCounter, PieceCounts, Splitter, available_threads, learn_merges,
};

/// Texts are counted once this many bytes of them are there, even if fewer than `buffer_size`: it bounds the time
/// between two looks at the signals and the texts that are kept alive.
const CHUNK_BYTES: usize = 16 << 20;

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
    encoder: RwLock<Arc<Encoder>>,
}

impl Tokenizer {
    fn encoder(&self) -> Arc<Encoder> {
        self.encoder.read().expect("no holder of this lock panics").clone()
    }
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        let encoder = Encoder::new(Splitter::new(DEFAULT_PATTERN)?, Vec::new());
        Ok(Tokenizer { encoder: RwLock::new(Arc::new(encoder)) })
    }

    /// Learns a vocabulary of vocab_size tokens, the 256 bytes included, from an iterable of str.
    ///
    /// The result replaces that of an earlier training; an error leaves it as it was. It depends on the texts, the
    /// vocabulary size and the pattern alone. There are fewer tokens than asked for if the texts do not hold enough
    /// different pairs.
    ///
    /// buffer_size is the number of texts that are taken from the iterator at a time. pattern is the regular expression
    /// that splits texts into pieces; None is GPT-4's.
    ///
    /// progress, if given, is called as progress(phase, done, total) at most ten times a second and at the end of each
    /// phase: "count" in bytes of UTF-8 (total is None until the iterator ends), then "merge" in merges. An exception
    /// that it raises ends the training, as does one of the iterator.
    ///
    /// Raises ValueError for a vocab_size below 256 or beyond 32 bits, a buffer_size below 1 or a pattern that does not
    /// compile or gives up on a text, and TypeError for an item that is not a str.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, *, progress=None))]
    fn train_from_iterator(
        &self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: i64,
        buffer_size: i64,
        pattern: Option<&str>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let vocab_size = u32::try_from(vocab_size).ok().filter(|&size| size >= NUM_BYTES).ok_or_else(|| {
            PyValueError::new_err(format!(
                "vocab_size must be from {NUM_BYTES}, one token a byte, to {}, not {vocab_size}",
                u32::MAX
            ))
        })?;
        let buffer_size = usize::try_from(buffer_size)
            .ok()
            .filter(|&size| size > 0)
            .ok_or_else(|| PyValueError::new_err(format!("buffer_size must be at least 1, not {buffer_size}")))?;
        let splitter = Splitter::new(pattern.unwrap_or(DEFAULT_PATTERN))?;
        let mut progress = Progress::new(progress);

        let counts = count_pieces(&iterator.try_iter()?, buffer_size, &splitter, &mut progress)?;
        let merges = py.detach(|| {
            learn_merges(&counts, vocab_size, |done, wanted| progress.report_detached("merge", done, wanted))
        })?;
        progress.report_end(py, "merge", merges.len(), (vocab_size - NUM_BYTES) as usize)?;

        let encoder = py.detach(|| {
            drop(counts); // large: not with the GIL
            Encoder::new(splitter, merges)
        });
        *self.encoder.write().expect("no holder of this lock panics") = Arc::new(encoder);
        Ok(())
    }

    /// The regular expression that splits texts into pieces.
    fn get_pattern(&self) -> String {
        self.encoder().pattern().to_owned()
    }

    /// All tokens as (bytes, id), ordered by id: what tiktoken.Encoding takes as mergeable_ranks once it is a dict.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        self.encoder().tokens().iter().zip(0..).map(|(token, id)| (PyBytes::new(py, token), id)).collect()
    }

    /// The number of tokens.
    #[getter]
    fn vocab_size(&self) -> u32 {
        self.encoder().vocab_size()
    }

    /// The ids of a text. What looks like a special token is text like any other.
    fn encode(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        let encoder = self.encoder();
        Ok(py.detach(|| encoder.encode(text))?)
    }

    /// [encode(text) for text in texts], on all processors.
    fn batch_encode(&self, py: Python<'_>, texts: Vec<PyBackedStr>) -> PyResult<Vec<Vec<u32>>> {
        let encoder = self.encoder();
        Ok(py.detach(|| encoder.encode_batch(&texts, available_threads()))?)
    }

    /// The text of a sequence of ids; bytes that are no UTF-8, as where a character is cut, become U+FFFD.
    ///
    /// Raises ValueError for an id that is not in the vocabulary.
    fn decode(&self, py: Python<'_>, ids: Vec<i64>) -> PyResult<String> {
        let encoder = self.encoder();
        let decode = || {
            let vocab_size = encoder.vocab_size();
            let checked = |id| u32::try_from(id).map_err(|_| Error::UnknownId { id, vocab_size });
            let ids = ids.into_iter().map(checked).collect::<Result<Vec<_>, _>>()?;
            Ok::<_, Error>(String::from_utf8_lossy(&encoder.decode(&ids)?).into_owned())
        };
        Ok(py.detach(decode)?)
    }
}

/// Counts the pieces of all texts of `texts`, taking up to `buffer_size` of them at a time.
fn count_pieces(
    texts: &Bound<'_, PyIterator>,
    buffer_size: usize,
    splitter: &Splitter,
    progress: &mut Progress,
) -> PyResult<PieceCounts> {
    let py = texts.py();
    let mut counter = PieceCounter::new(splitter, available_threads());
    let mut bytes_done = 0;
    loop {
        let chunk = next_chunk(texts, buffer_size)?;
        if chunk.is_empty() {
            break;
        }
        py.detach(|| counter.add(&chunk))?;
        bytes_done += chunk.iter().map(|text| text.len()).sum::<usize>();
        progress.report(py, "count", bytes_done, None)?;
    }
    let counts = py.detach(|| counter.finish());
    progress.report_end(py, "count", bytes_done, bytes_done)?;
    Ok(counts)
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
