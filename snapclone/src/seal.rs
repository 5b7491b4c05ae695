//! The bytes of an object: compressed if that helps, encrypted if the repository is, and opened again.
//!
//! | bytes | what |
//! | --: | --- |
//! | 4 | `OGEB` |
//! | 1 | version, 1 |
//! | 1 | flags: 1 zstd, 2 AES-256-GCM |
//! | 2 | zeros |
//! | 4 | length of the content, little-endian |
//! | 4 | length of the rest, little-endian |
//! | 32 | only if encrypted: salt |
//! | n | the content; if encrypted with 16 bytes of tag |
//!
//! Invariants: no length is believed beyond the caller's bound; an encrypted object has a key of its own (from a salt of
//! 256 random bits and its name), so that one nonce serves all; the tag covers the header and, by the key, the name.

use crate::error::RepoError;
use crate::key_file::KeyFile;
use crate::layout::Address;
use ogee_common::rng;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::digest::{Context, SHA256};

const MAGIC: [u8; 4] = *b"OGEB";
const VERSION: u8 = 1;
const ZSTD: u8 = 1;
const ENCRYPTED: u8 = 2;
const HEAD: usize = 16;
const SALT: usize = 32;
const TAG: usize = 16;
/// zstd's level: 3 is its default; 1 saves a third of the CPU and costs some per cent of size.
const LEVEL: i32 = 1;

/// How objects of a repository are sealed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sealer {
    /// The key, if the repository is encrypted.
    pub key: Option<KeyFile>,
}

impl Sealer {
    /// The address of content, which may be given in parts.
    pub(crate) fn address(&self, parts: &[&[u8]]) -> Address {
        if let Some(key) = &self.key {
            return key.address(parts);
        }
        let mut context = Context::new(&SHA256);
        for part in parts {
            context.update(part);
        }
        let mut out = Address::default();
        out.copy_from_slice(context.finish().as_ref());
        out
    }

    /// The object of this content, to be stored as `name`. Content is at most 4 GiB.
    pub(crate) fn seal(&self, name: &str, content: &[u8]) -> Vec<u8> {
        let packed = zstd::bulk::compress(content, LEVEL).ok().filter(|p| p.len() < content.len());
        let flags = if packed.is_some() { ZSTD } else { 0 } | if self.key.is_some() { ENCRYPTED } else { 0 };
        let body = packed.as_deref().unwrap_or(content);
        let extra = if self.key.is_some() { SALT + TAG } else { 0 };
        let mut out = Vec::with_capacity(HEAD + body.len() + extra);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[VERSION, flags, 0, 0]);
        let length = |n: usize| u32::try_from(n).expect("objects are bounded by OBJECT_BYTES_MAX").to_le_bytes();
        out.extend_from_slice(&length(content.len()));
        out.extend_from_slice(&length(body.len() + extra));
        let Some(key) = &self.key else {
            out.extend_from_slice(body);
            return out;
        };
        let mut salt = [0; SALT];
        for part in salt.chunks_mut(8) {
            part.copy_from_slice(&rng::nonzero_u64().to_le_bytes());
        }
        let mut body = body.to_vec();
        let tag = cipher(key, &salt, name).seal_in_place_separate_tag(nonce(), Aad::from(&out[..HEAD]), &mut body);
        let tag = tag.expect("an object is far below AES-GCM's 64 GiB");
        out.extend_from_slice(&salt);
        out.extend_from_slice(&body);
        out.extend_from_slice(tag.as_ref());
        out
    }

    /// The content of an object that was stored as `name`, at most `content_max` bytes.
    ///
    /// # Errors
    /// [`crate::RepoErrorKind::Corrupt`], saying what is wrong.
    pub(crate) fn open(&self, name: &str, object: &[u8], content_max: usize) -> Result<Vec<u8>, RepoError> {
        let bad = |why| RepoError::corrupt(name, why);
        let (head, rest) = object.split_at_checked(HEAD).ok_or_else(|| bad("it is cut short"))?;
        if head[..4] != MAGIC {
            return Err(bad("it is no object of a backup repository"));
        }
        if head[4] != VERSION || head[5] & !(ZSTD | ENCRYPTED) != 0 || head[6..8] != [0, 0] {
            return Err(bad("its header is damaged or of a newer version"));
        }
        let content_len = usize_at(head, 8);
        if rest.len() < usize_at(head, 12) {
            return Err(bad("it is cut short"));
        }
        if rest.len() > usize_at(head, 12) || content_len > content_max {
            return Err(bad("it is too long"));
        }
        let decrypted;
        let body = match (&self.key, head[5] & ENCRYPTED != 0) {
            (None, false) => rest,
            (Some(key), true) => {
                let (salt, sealed) = rest.split_at_checked(SALT).ok_or_else(|| bad("it is cut short"))?;
                let mut sealed = sealed.to_vec();
                let opened = cipher(key, salt, name).open_in_place(nonce(), Aad::from(head), &mut sealed);
                let len = opened.map_err(|_| bad("it does not decrypt: it was changed"))?.len();
                sealed.truncate(len);
                decrypted = sealed;
                &decrypted[..]
            }
            (None, true) => return Err(bad("it is encrypted, and the repository is not")),
            (Some(_), false) => return Err(bad("it is not encrypted, and the repository is")),
        };
        let content = if head[5] & ZSTD == 0 {
            body.to_vec()
        } else {
            zstd::bulk::decompress(body, content_len).map_err(|e| bad("it does not decompress").because(e))?
        };
        if content.len() == content_len { Ok(content) } else { Err(bad("its length is wrong")) }
    }
}

/// A little-endian length of 4 bytes.
fn usize_at(head: &[u8], at: usize) -> usize {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&head[at..at + 4]);
    usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX)
}

/// The cipher of one object. Its key is used for one message only.
fn cipher(key: &KeyFile, salt: &[u8], name: &str) -> LessSafeKey {
    let key = UnboundKey::new(&AES_256_GCM, &key.object_key(salt, name.as_bytes()));
    LessSafeKey::new(key.expect("an AES-256 key has 32 bytes"))
}

fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sealers() -> [Sealer; 2] {
        [Sealer::default(), Sealer { key: Some(KeyFile::new(&[7; 32])) }]
    }

    proptest! {
        #[test]
        fn what_was_sealed_opens_and_any_change_is_found(
            content in proptest::collection::vec(0u8..4, 0..600), at in any::<prop::sample::Index>(), bit in 0u8..8,
        ) {
            for sealer in sealers() {
                let address = sealer.address(&[&content]);
                let object = sealer.seal("blocks/x", &content);
                prop_assert_eq!(&sealer.open("blocks/x", &object, 600).expect("opens"), &content);
                let mut changed = object.clone();
                changed[at.index(object.len())] ^= 1 << bit;
                // Without encryption some changes show in the address only.
                let is_same = sealer.open("blocks/x", &changed, 600).is_ok_and(|c| sealer.address(&[&c]) == address);
                prop_assert!(!is_same || sealer.open("blocks/x", &changed, 600).expect("opened") == content);
                prop_assert!(sealer.open("blocks/x", &object[..at.index(object.len())], 600).is_err());
            }
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for sealer in sealers() {
                let headed = [&b"OGEB\x01\x01\0\0"[..], &bytes].concat();
                let _ = (sealer.open("x", &bytes, 1 << 20), sealer.open("x", &headed, 1 << 20));
            }
        }
    }

    #[test]
    fn an_encrypted_object_opens_under_its_name_and_key_only() {
        let [plain, sealer] = sealers();
        let object = sealer.seal("a", b"content");
        assert_ne!(object, sealer.seal("a", b"content"), "every object has its own key");
        assert!(sealer.open("b", &object, 100).is_err() && plain.open("a", &object, 100).is_err());
        assert!(Sealer { key: Some(KeyFile::new(&[8; 32])) }.open("a", &object, 100).is_err());
        assert!(sealer.open("a", &plain.seal("a", b"content"), 100).is_err(), "encryption cannot be left out");
        assert!(sealer.open("a", &object, 6).is_err(), "longer than the caller expects");
        assert_ne!(plain.address(&[b"content"]), sealer.address(&[b"content"]));
        assert_eq!(plain.address(&[b"con", b"tent"]), plain.address(&[b"content"]));
    }
}
