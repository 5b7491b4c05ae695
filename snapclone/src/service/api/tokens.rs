//! [`Tokens`]: who may use the API. A file with one token in a line: `name read-write TOKEN` or `name read-only TOKEN`; `#` begins a comment.
//!
//! Invariants: only digests of tokens stay in memory; a token is compared with all of them in a time that does not depend on how much of
//! it is right; the file is of no use to others than its owner and its group, else it is refused. It is read when an instance starts.

use ogee_common::limits::API_TOKENS_MAX;
use ogee_common::name::check_name;
use ring::digest::{SHA256, digest};
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Characters of a token, at least: as many as 16 random bytes have in hexadecimal.
const TOKEN_BYTES_MIN: usize = 32;
/// Characters of a token, at most.
const TOKEN_BYTES_MAX: usize = 512;
/// Bytes of a tokens file, at most.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What a token allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::service) enum Rights {
    /// Everything.
    ReadWrite,
    /// GET and HEAD.
    ReadOnly,
}

struct Token {
    name: String,
    rights: Rights,
    digest: [u8; 32],
}

/// The tokens of a file.
pub(in crate::service) struct Tokens(Vec<Token>);

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|t| &t.name)).finish()
    }
}

/// A tokens file that is of no use.
#[derive(Debug, thiserror::Error)]
pub enum TokensError {
    /// It cannot be read.
    #[error("read the tokens file")]
    Read(#[source] std::io::Error),
    /// Others than its owner and group could read or change it.
    #[error("the tokens file has mode {0:04o}; others must not read it: chmod 0640")]
    Mode(u32),
    /// It is too long, or no text.
    #[error("the tokens file is no text of at most 1 MiB")]
    NoText,
    /// A line that is no token.
    #[error("line {0} of the tokens file: write NAME read-write|read-only TOKEN, the token with {TOKEN_BYTES_MIN} to {TOKEN_BYTES_MAX} visible characters")]
    Line(usize),
    /// A name or token that is there twice.
    #[error("line {0} of the tokens file: the name or the token is there twice")]
    Twice(usize),
    /// None or too many.
    #[error("the tokens file has {0} tokens; 1 to {API_TOKENS_MAX} are possible")]
    Count(usize),
}

fn digest_of(token: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, token).as_ref());
    out
}

/// Whether two digests are equal, looking at all bytes of both.
fn are_equal(a: &[u8; 32], b: &[u8; 32]) -> bool {
    let differing = a.iter().zip(b).fold(0u8, |all, (a, b)| std::hint::black_box(all | (a ^ b)));
    differing == 0
}

impl Tokens {
    /// Reads a file.
    ///
    /// # Errors
    /// [`TokensError`].
    pub(in crate::service) fn load(path: &Path) -> Result<Self, TokensError> {
        let metadata = std::fs::metadata(path).map_err(TokensError::Read)?;
        let mode = metadata.mode() & 0o7777;
        if mode & 0o007 != 0 {
            return Err(TokensError::Mode(mode));
        }
        if metadata.len() > FILE_BYTES_MAX {
            return Err(TokensError::NoText);
        }
        let text = std::fs::read(path).map_err(TokensError::Read)?;
        Self::parse(std::str::from_utf8(&text).map_err(|_| TokensError::NoText)?)
    }

    fn parse(text: &str) -> Result<Self, TokensError> {
        let mut tokens: Vec<Token> = vec![];
        for (i, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default();
            let words: Vec<&str> = line.split_whitespace().collect();
            let (name, rights, token) = match words[..] {
                [] => continue,
                [name, "read-write", token] => (name, Rights::ReadWrite, token),
                [name, "read-only", token] => (name, Rights::ReadOnly, token),
                _ => return Err(TokensError::Line(i + 1)),
            };
            let fits = (TOKEN_BYTES_MIN..=TOKEN_BYTES_MAX).contains(&token.len()) && token.bytes().all(|b| b.is_ascii_graphic());
            if !fits || check_name(name).is_err() {
                return Err(TokensError::Line(i + 1));
            }
            let digest = digest_of(token.as_bytes());
            if tokens.iter().any(|t| t.name == name || t.digest == digest) {
                return Err(TokensError::Twice(i + 1));
            }
            tokens.push(Token { name: name.to_owned(), rights, digest });
        }
        if tokens.is_empty() || tokens.len() > API_TOKENS_MAX {
            return Err(TokensError::Count(tokens.len()));
        }
        Ok(Self(tokens))
    }

    /// Whose token it is, and what it allows; `None`: it is unknown.
    pub(in crate::service) fn find(&self, token: &[u8]) -> Option<(&str, Rights)> {
        let given = digest_of(token);
        let mut found = None;
        for known in &self.0 {
            if are_equal(&known.digest, &given) {
                found = Some((known.name.as_str(), known.rights));
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const A: &str = "0123456789abcdef0123456789abcdef";
    const B: &str = "0123456789abcdef0123456789abcdee";

    #[test]
    fn tokens_are_told_apart_by_their_last_character() {
        let tokens = Tokens::parse(&format!("# who\nops read-write {A}\n\nmonitor read-only {B} # scraper\n")).expect("tokens");
        assert_eq!(tokens.find(A.as_bytes()), Some(("ops", Rights::ReadWrite)));
        assert_eq!(tokens.find(B.as_bytes()), Some(("monitor", Rights::ReadOnly)));
        assert_eq!(tokens.find(b""), None);
        assert_eq!(tokens.find(&A.as_bytes()[..31]), None);
        assert!(!format!("{tokens:?}").contains("0123"), "tokens are not printed");
    }

    #[test]
    fn files_that_are_of_no_use_are_refused() {
        let parse = |text: &str| Tokens::parse(text).expect_err("refused");
        assert!(matches!(parse("# none\n"), TokensError::Count(0)));
        assert!(matches!(parse("ops read-write short"), TokensError::Line(1)));
        assert!(matches!(parse(&format!("\nops admin {A}")), TokensError::Line(2)));
        assert!(matches!(parse(&format!("ops read-only {A}\nops read-only {B}")), TokensError::Twice(2)));
        assert!(matches!(parse(&format!("ops read-only {A}\nb read-only {A}")), TokensError::Twice(2)));
        assert!(matches!(Tokens::load(Path::new("/nowhere/tokens")), Err(TokensError::Read(_))));
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tokens");
        std::fs::write(&path, format!("ops read-write {A}\n")).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("set");
        assert!(matches!(Tokens::load(&path), Err(TokensError::Mode(0o644))));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("set");
        assert!(Tokens::load(&path).is_ok());
    }
}
