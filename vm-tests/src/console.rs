//! What a process says, as text that can be waited for. A thread collects the stream; the owner waits for a piece of text behind
//! what it has already taken. Everything is also written to a log file at once, so that it is there after a crash.
//!
//! Invariants: text is never lost between two waits; the end of the stream ends every wait; memory is bounded by
//! [`CONSOLE_BYTES_MAX`] (a stream that exceeds it counts as ended, and the error says so).

use crate::deadline::Deadline;
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes kept of one stream: far more than a test guest says.
pub const CONSOLE_BYTES_MAX: usize = 16 << 20;
/// Bytes shown of a stream in an error.
const TAIL_BYTES: usize = 3000;

/// The collected text of one stream.
#[derive(Debug)]
pub struct Console {
    name: String,
    shared: Arc<Shared>,
    taken: usize,
}

#[derive(Debug, Default)]
struct Shared {
    heard: Mutex<Heard>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Heard {
    bytes: Vec<u8>,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Console {
    /// Collects `stream` until it ends, also into the file `log`. `name` is for errors.
    ///
    /// # Errors
    /// When the log cannot be made.
    pub fn collect(name: &str, mut stream: impl Read + Send + 'static, log: &Path) -> Result<Self> {
        let mut log = File::create(log).with_context(|| format!("create {}", log.display()))?;
        let shared = Arc::new(Shared::default());
        let ours = Arc::clone(&shared);
        std::thread::spawn(move || {
            let mut buffer = [0; 16 << 10];
            // The thread ends with the stream: when the process that writes it is gone.
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                // A full disk must not stop the test from hearing its guest.
                drop(log.write_all(&buffer[..length]));
                let mut heard = ours.lock();
                heard.bytes.extend_from_slice(&buffer[..length]);
                ours.more.notify_all();
                if heard.bytes.len() > CONSOLE_BYTES_MAX {
                    break;
                }
            }
            ours.lock().ended = true;
            ours.more.notify_all();
        });
        Ok(Self { name: name.to_owned(), shared, taken: 0 })
    }

    /// Waits for `text` behind what was taken so far, takes everything up to its end, and gives what came before it.
    ///
    /// # Errors
    /// When the stream ends or `limit` passes first; the error shows the last that was heard.
    pub fn expect(&mut self, text: &str, limit: Duration) -> Result<String> {
        let deadline = Deadline::after(limit);
        let mut searched = self.taken;
        let mut heard = self.shared.lock();
        loop {
            if let Some(at) = find(&heard.bytes[searched..], text.as_bytes()) {
                let before = String::from_utf8_lossy(&heard.bytes[self.taken..searched + at]).into_owned();
                self.taken = searched + at + text.len();
                return Ok(before);
            }
            // The text may begin in the last bytes heard so far.
            searched = self.taken.max((heard.bytes.len() + 1).saturating_sub(text.len()));
            if heard.ended || deadline.passed() {
                let why = if heard.ended { "the stream ended".to_owned() } else { format!("nothing within {limit:?}") };
                drop(heard);
                bail!("{}: waiting for {text:?}: {why}; the last it said:\n{}", self.name, self.tail());
            }
            heard = self.shared.more.wait_timeout(heard, deadline.left()).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether `text` was ever heard, taken or not.
    #[must_use]
    pub fn has_heard(&self, text: &str) -> bool {
        find(&self.shared.lock().bytes, text.as_bytes()).is_some()
    }

    /// Everything heard so far.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().bytes).into_owned()
    }

    /// The last that was heard, at most a few thousand bytes, for an error.
    #[must_use]
    pub fn tail(&self) -> String {
        let heard = self.shared.lock();
        let from = heard.bytes.len().saturating_sub(TAIL_BYTES);
        String::from_utf8_lossy(&heard.bytes[from..]).into_owned()
    }
}

fn find(bytes: &[u8], text: &[u8]) -> Option<usize> {
    bytes.windows(text.len()).position(|window| window == text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn console() -> (Console, UnixStream, tempfile::TempDir) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let console = Console::collect("test", theirs, &dir.path().join("log")).unwrap();
        (console, ours, dir)
    }

    #[test]
    fn text_split_over_reads_is_found_once_and_in_order() {
        let (mut console, mut stream, dir) = console();
        stream.write_all(b"one MAR").unwrap();
        assert!(console.expect("MARK", Duration::from_millis(50)).is_err());
        stream.write_all(b"K two MARK").unwrap();
        assert_eq!(console.expect("MARK", Duration::from_secs(5)).unwrap(), "one ");
        assert_eq!(console.expect("MARK", Duration::from_secs(5)).unwrap(), " two ");
        assert!(console.expect("MARK", Duration::from_millis(50)).is_err());
        assert!(console.has_heard("one MARK"));
        assert_eq!(std::fs::read(dir.path().join("log")).unwrap(), b"one MARK two MARK");
    }

    #[test]
    fn the_end_of_the_stream_ends_a_wait() {
        let (mut console, mut stream, _dir) = console();
        stream.write_all(b"last words").unwrap();
        drop(stream);
        let error = console.expect("never", Duration::from_secs(60)).unwrap_err().to_string();
        assert!(error.contains("ended") && error.contains("last words"), "{error}");
    }

    #[test]
    fn a_stream_without_end_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let mut console = Console::collect("zeros", std::io::repeat(0), &dir.path().join("log")).unwrap();
        assert!(console.expect("never", Duration::from_secs(60)).unwrap_err().to_string().contains("ended"));
        assert!(console.shared.lock().bytes.len() <= CONSOLE_BYTES_MAX + (16 << 10));
    }
}
