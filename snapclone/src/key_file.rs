//! The key of an encrypted repository, and the keys that are made from it.
//!
//! Invariants: the key itself is used for nothing but HMAC; each purpose has its own derived key; no key is printed.

use crate::error::{RepoError, RepoErrorKind};
use crate::layout::{Address, hex, unhex};
use ring::hmac;
use std::path::Path;

/// A key: a file with 64 hexadecimal digits (256 random bits), as `openssl rand -hex 32` makes it.
#[derive(Clone)]
pub struct KeyFile {
    addresses: hmac::Key,
    objects: hmac::Key,
    check: Address,
}

impl std::fmt::Debug for KeyFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyFile")
    }
}

impl KeyFile {
    /// Reads a key file.
    ///
    /// # Errors
    /// It cannot be read, or is not a key ([`RepoErrorKind::WrongKey`]).
    pub fn read(path: &Path) -> Result<Self, RepoError> {
        let name = path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|e| RepoError::file("read key file", name.clone(), e))?;
        let why = "it is not a key: write 64 hexadecimal digits, as from openssl rand -hex 32";
        let bytes = unhex::<32>(&text.trim().to_ascii_lowercase());
        let bytes = bytes.ok_or_else(|| RepoError::new(RepoErrorKind::WrongKey, "read key file", name, why))?;
        Ok(Self::new(&bytes))
    }

    /// From 256 random bits.
    #[must_use]
    pub fn new(bytes: &[u8; 32]) -> Self {
        let master = hmac::Key::new(hmac::HMAC_SHA256, bytes);
        let derive = |purpose: &[u8]| hmac::Key::new(hmac::HMAC_SHA256, hmac::sign(&master, purpose).as_ref());
        let check = digest(&derive(b"ogee-backup-v1 check"), &[b"key"]);
        Self { addresses: derive(b"ogee-backup-v1 address"), objects: derive(b"ogee-backup-v1 object"), check }
    }

    /// What the repository keeps to tell a wrong key from damage.
    pub(crate) fn check(&self) -> String {
        hex(&self.check)
    }

    /// The address of content.
    pub(crate) fn address(&self, parts: &[&[u8]]) -> Address {
        digest(&self.addresses, parts)
    }

    /// The AES-256 key of one object, by its salt and name.
    pub(crate) fn object_key(&self, salt: &[u8], name: &[u8]) -> Address {
        digest(&self.objects, &[salt, name])
    }
}

fn digest(key: &hmac::Key, parts: &[&[u8]]) -> Address {
    let mut context = hmac::Context::with_key(key);
    for part in parts {
        context.update(part);
    }
    let mut out = Address::default();
    out.copy_from_slice(context.sign().as_ref());
    out
}
