//! Who a data directory belongs to: the file `identity`, written once before anything else.
//!
//! ```text
//! offset size field
//! 0      8    magic "OGEEMDS1" (its last byte is the version)
//! 8      4    node number, u32 little-endian
//! 12     2    bytes of the cluster's name, u16 little-endian
//! 14     n    name, UTF-8
//! 14+n   4    CRC32C of everything before
//! ```
//!
//! Invariants: a directory is only ever used by the node and cluster it was made for; one without identity becomes a
//! member only when the operator says that the node is new, because a node that lost its log has forgotten its votes.

use crate::config::MdsConfig;
use crate::error::{MdsError, MdsErrorStage};
use ogee_common::checksum::crc32c;
use ogee_disk::DataDir;

const NAME: &str = "identity";
const MAGIC: &[u8; 8] = b"OGEEMDS1";
/// Longest file: the fields and a name of 255 bytes.
const BYTES_MAX: u64 = 512;

/// Why an identity file is of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the identity file is damaged")]
struct Damaged;

/// The identity of a data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Identity {
    node: u32,
    cluster: String,
}

impl Identity {
    fn encode(&self) -> Vec<u8> {
        let len = u16::try_from(self.cluster.len()).expect("a name has at most 255 bytes");
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&self.node.to_le_bytes());
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(self.cluster.as_bytes());
        let crc = crc32c(&bytes);
        bytes.extend_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, Damaged> {
        let (body, crc) = bytes.split_last_chunk().ok_or(Damaged)?;
        if u32::from_le_bytes(*crc) != crc32c(body) {
            return Err(Damaged);
        }
        let rest = body.strip_prefix(MAGIC).ok_or(Damaged)?;
        let (node, rest) = rest.split_first_chunk().ok_or(Damaged)?;
        let (len, name) = rest.split_first_chunk().ok_or(Damaged)?;
        if usize::from(u16::from_le_bytes(*len)) != name.len() {
            return Err(Damaged);
        }
        let cluster = str::from_utf8(name).map_err(|_| Damaged)?.to_owned();
        Ok(Self { node: u32::from_le_bytes(*node), cluster })
    }
}

/// Makes sure that a directory belongs to the configured node. Blocks for two flushes when it is new.
///
/// # Errors
/// `NoIdentity` for a new directory without `bootstrap`, `OtherIdentity`; `Failed` when it cannot be read or written.
pub(crate) fn claim(dir: &DataDir, config: &MdsConfig) -> Result<(), MdsError> {
    let wanted = Identity { node: config.node, cluster: config.cluster.clone() };
    let bytes = dir.read_small(NAME, BYTES_MAX).map_err(MdsError::at(MdsErrorStage::Identity))?;
    match bytes {
        Some(bytes) => {
            let found = Identity::decode(&bytes).map_err(MdsError::at(MdsErrorStage::Identity))?;
            if found == wanted {
                return Ok(());
            }
            Err(MdsError::OtherIdentity { dir: dir.path(""), node: found.node, cluster: found.cluster })
        }
        None if !config.bootstrap => Err(MdsError::NoIdentity(dir.path(""))),
        None => dir.write_small(NAME, &wanted.encode()).map_err(MdsError::at(MdsErrorStage::Identity)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn identities_round_trip_and_damage_is_found(node: u32, cluster in "[a-z0-9.-]{1,255}", at: usize, flip in 1u8..) {
            let identity = Identity { node, cluster };
            let mut bytes = identity.encode();
            prop_assert!(bytes.len() as u64 <= BYTES_MAX);
            prop_assert_eq!(Identity::decode(&bytes), Ok(identity));
            let at = at % bytes.len();
            bytes[at] ^= flip;
            prop_assert_eq!(Identity::decode(&bytes), Err(Damaged));
            prop_assert_eq!(Identity::decode(&bytes[..at]), Err(Damaged));
        }
    }

    #[test]
    fn the_format_is_fixed() {
        let bytes = Identity { node: 3, cluster: "dev".into() }.encode();
        assert_eq!(bytes[..17], *b"OGEEMDS1\x03\0\0\0\x03\0dev");
        assert_eq!(bytes.len(), 21);
    }

    #[test]
    fn a_directory_keeps_its_node() {
        let temp = tempfile::tempdir().expect("temp dir");
        let dir = DataDir::open(temp.path()).expect("open");
        let config = |node, bootstrap| MdsConfig {
            rebuild_after_seconds: 600,
            tls: None,
            node,
            cluster: "dev".into(),
            data_dir: temp.path().to_owned(),
            listen: "127.0.0.1:1".parse().expect("address"),
            bootstrap,
            metrics: None,
            peers: vec![],
        };
        assert!(matches!(claim(&dir, &config(1, false)), Err(MdsError::NoIdentity(_))));
        claim(&dir, &config(1, true)).expect("a new node");
        claim(&dir, &config(1, false)).expect("the same node");
        assert!(matches!(claim(&dir, &config(2, true)), Err(MdsError::OtherIdentity { node: 1, .. })));
        dir.write_small(NAME, b"OGEEMDS2").expect("write");
        assert!(matches!(claim(&dir, &config(1, true)), Err(MdsError::Failed { .. })));
    }
}
