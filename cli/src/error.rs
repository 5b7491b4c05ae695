//! What the command says when it cannot do what it was asked: one line on standard error and an exit code.
//!
//! A [`CliError`] has a kind (which decides the exit code and is the word programs read with `--json`), what was being
//! done, and what lay below. The top prints the chain once: `ogee: import a.raw: open a.raw: No such file or directory`.
//! Deliberately absent: retries. The SDK retries; what arrives here is final.

use std::error::Error;
use std::fmt::{self, Write as _};

/// Not `Sync`: errors of the vhost-user crates are not.
type Source = Box<dyn Error + Send>;

/// What a script can act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ErrorKind {
    /// Anything without a code of its own: a file that cannot be read, damaged data, a bug.
    Failure,
    /// The command line, a name, a size or an input format is wrong.
    Usage,
    /// A volume, snapshot, pool or file that was named does not exist.
    NotFound,
    /// It exists already, is attached, is in use, or belongs to another owner.
    Conflict,
    /// No answer from the cluster, or it has no leader, within the time.
    Unavailable,
    /// A limit, or no space left.
    NoSpace,
}

impl ErrorKind {
    /// The exit code; also in the table of `ogee --help`.
    #[must_use]
    pub(crate) const fn exit_code(self) -> u8 {
        match self {
            Self::Failure => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Conflict => 4,
            Self::Unavailable => 5,
            Self::NoSpace => 6,
        }
    }

    /// The kind of an exit code of this program; anything else is [`ErrorKind::Failure`].
    #[must_use]
    pub(crate) const fn of_exit_code(code: Option<i32>) -> Self {
        match code {
            Some(2) => Self::Usage,
            Some(3) => Self::NotFound,
            Some(4) => Self::Conflict,
            Some(5) => Self::Unavailable,
            Some(6) => Self::NoSpace,
            _ => Self::Failure,
        }
    }

    /// The word in JSON errors.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Failure => "failure",
            Self::Usage => "usage",
            Self::NotFound => "not-found",
            Self::Conflict => "conflict",
            Self::Unavailable => "unavailable",
            Self::NoSpace => "no-space",
        }
    }
}

/// A command that failed.
#[derive(Debug)]
pub(crate) struct CliError {
    kind: ErrorKind,
    reason: Option<&'static str>,
    context: String,
    source: Option<Source>,
}

impl CliError {
    /// An error that starts here: `context` says what is wrong and what to do.
    pub(crate) fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, reason: None, context: context.into(), source: None }
    }

    /// An error of something below, with what was being done.
    pub(crate) fn caused(kind: ErrorKind, context: impl Into<String>, source: impl Error + Send + 'static) -> Self {
        Self { kind, reason: None, context: context.into(), source: Some(Box::new(source)) }
    }

    /// A failed file operation: `verb` and the path. A missing file is [`ErrorKind::NotFound`].
    pub(crate) fn file(verb: &str, path: &std::path::Path, source: std::io::Error) -> Self {
        let kind = match source.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            std::io::ErrorKind::AlreadyExists => ErrorKind::Conflict,
            std::io::ErrorKind::StorageFull => ErrorKind::NoSpace,
            _ => ErrorKind::Failure,
        };
        Self::caused(kind, format!("{verb} {}", path.display()), source)
    }

    /// Puts what was being done before the error; the kind stays.
    #[must_use]
    pub(crate) fn within(self, context: impl Into<String>) -> Self {
        Self { kind: self.kind, reason: self.reason, context: context.into(), source: Some(Box::new(self)) }
    }

    /// Adds the MDS's own word for it, which is finer than the kind; programs see it as `reason`.
    #[must_use]
    pub(crate) const fn with_reason(mut self, reason: &'static str) -> Self {
        self.reason = Some(reason);
        self
    }

    /// Adds what a person can do.
    #[must_use]
    pub(crate) fn with_advice(mut self, advice: &str) -> Self {
        // Writing to a String cannot fail.
        let _ = write!(self.context, "; {advice}");
        self
    }

    /// What a script can act on.
    #[must_use]
    pub(crate) const fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The whole chain in one line, outermost first.
    #[must_use]
    pub(crate) fn chain(&self) -> String {
        let mut line = one_line(&self.context);
        let mut next = self.source();
        while let Some(cause) = next {
            let text = one_line(&cause.to_string());
            // Some libraries print their source themselves; it is not said twice.
            if !line.ends_with(&text) {
                // Writing to a String cannot fail.
                let _ = write!(line, ": {text}");
            }
            next = cause.source();
        }
        line
    }

    /// What is printed on standard error: one line for people, or one JSON object.
    #[must_use]
    pub(crate) fn render(&self, json: bool) -> String {
        if !json {
            return format!("ogee: {}", self.chain());
        }
        let mut error = serde_json::json!({
            "kind": self.kind.as_str(), "exit_code": self.kind.exit_code(), "message": self.chain(),
        });
        if let Some(reason) = self.reason {
            error["reason"] = reason.into();
        }
        serde_json::json!({"error": error}).to_string()
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl fmt::Display for CliError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl Error for CliError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|s| s as &(dyn Error + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_is_printed_once_and_in_one_line() {
        let io = std::io::Error::new(std::io::ErrorKind::NotFound, "No such\nfile");
        let error = CliError::file("open", std::path::Path::new("a.raw"), io).within("import a.raw to golden");
        assert_eq!(error.render(false), "ogee: import a.raw to golden: open a.raw: No such file");
        assert_eq!(error.kind().exit_code(), 3);
        let json: serde_json::Value = serde_json::from_str(&error.render(true)).expect("one JSON object");
        assert_eq!(json["error"]["kind"], "not-found");
        assert_eq!(json["error"]["exit_code"], 3);
    }

    #[test]
    fn every_kind_has_its_own_code_and_word() {
        use ErrorKind::{Conflict, Failure, NoSpace, NotFound, Unavailable, Usage};
        let all = [Failure, Usage, NotFound, Conflict, Unavailable, NoSpace];
        let codes: std::collections::BTreeSet<u8> = all.iter().map(|k| k.exit_code()).collect();
        let words: std::collections::BTreeSet<&str> = all.iter().map(|k| k.as_str()).collect();
        assert_eq!(codes.into_iter().collect::<Vec<_>>(), (1..=6).collect::<Vec<_>>());
        assert_eq!(words.len(), all.len());
        assert!(all.iter().all(|k| ErrorKind::of_exit_code(Some(i32::from(k.exit_code()))) == *k));
    }
}
