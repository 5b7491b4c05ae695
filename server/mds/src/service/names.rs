//! What calls say, checked: paths, names, ids, lengths. Pure. Everything behind this file may rely on it.

use super::status::CallError;
use ogee_common::limits::{NAME_BYTES_MAX, OWNER_BYTES_MAX, PAGE_BYTES, SECTOR_BYTES, SNAPSHOT_GROUP_VOLUMES_MAX};
use ogee_common::name::{NameError, VolumePath, check_name};
use ogee_common::qos::{LimitChanges, LimitKind, LimitProblem};
use ogee_proto::mds;
use std::collections::BTreeSet;
use std::net::SocketAddr;

/// gRPC metadata by which a client names a request, 32 hex digits, so that a repetition gets the first one's answer.
pub(crate) const REQUEST_METADATA: &str = "ogee-request";

/// A volume path, without leading slash.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn path(what: &'static str, text: &str) -> Result<String, CallError> {
    let path = VolumePath::parse(text).map_err(|source| CallError::Name { what, source })?;
    Ok(path.as_str().to_owned())
}

/// A folder's path; empty for the root.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn folder(text: &str) -> Result<String, CallError> {
    let text = text.trim_end_matches('/');
    if text.is_empty() { Ok(String::new()) } else { path("directory", text) }
}

/// One name.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn name(what: &'static str, text: &str) -> Result<String, CallError> {
    check_name(text).map_err(|source| CallError::Name { what, source })?;
    Ok(text.to_owned())
}

/// A snapshot's name; those that begin with a dot are the MDS's own.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn snapshot(text: &str) -> Result<String, CallError> {
    if text.starts_with('.') {
        return Err(CallError::Argument { what: "snapshot name", wanted: "it must not begin with a dot" });
    }
    name("snapshot name", text)
}

/// The volumes of a group snapshot and the snapshots' names, in the order of the request.
///
/// # Errors
/// `InvalidArgument`, also when there is none or one occurs twice; `Limit`.
pub(crate) fn group(members: &[mds::CreateSnapshotRequest]) -> Result<Vec<(String, String)>, CallError> {
    if members.is_empty() {
        return Err(CallError::Argument { what: "group", wanted: "at least one volume" });
    }
    if members.len() > SNAPSHOT_GROUP_VOLUMES_MAX {
        return Err(CallError::TooMany { what: "volumes", max: SNAPSHOT_GROUP_VOLUMES_MAX });
    }
    let mut seen = BTreeSet::new();
    let mut list = vec![];
    for member in members {
        let (path, name) = (path("path", &member.path)?, snapshot(&member.name)?);
        if !seen.insert(path.clone()) {
            return Err(CallError::Twice { path });
        }
        list.push((path, name));
    }
    Ok(list)
}

/// An owner; may be empty.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn owner(text: &str) -> Result<String, CallError> {
    if text.is_empty() {
        return Ok(String::new());
    }
    if text.len() > OWNER_BYTES_MAX {
        return Err(CallError::Name { what: "owner", source: NameError::TooLong });
    }
    name("owner", text)
}

/// New limits of a volume.
///
/// # Errors
/// `InvalidArgument`, naming the kind.
pub(crate) fn limit_changes(message: Option<&mds::VolumeLimits>) -> Result<LimitChanges, CallError> {
    let changes = ogee_proto::limit_changes(message);
    let wrong = |(kind, problem): (LimitKind, LimitProblem)| CallError::Argument { what: kind.as_str(), wanted: problem.wanted() };
    changes.check().map_err(wrong)?;
    Ok(changes)
}

/// The logical sector of a new volume; 0 is the usual one.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn sector_bytes(bytes: u32) -> Result<u32, CallError> {
    match bytes {
        0 => Ok(SECTOR_BYTES),
        SECTOR_BYTES | PAGE_BYTES => Ok(bytes),
        _ => Err(CallError::Argument { what: "sector size", wanted: "512 or 4096 bytes" }),
    }
}

/// Text for people, at most as long as a name.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn description(text: &str) -> Result<String, CallError> {
    if text.len() > NAME_BYTES_MAX || text.chars().any(char::is_control) {
        let wanted = "at most 255 bytes without control characters";
        return Err(CallError::Argument { what: "description", wanted });
    }
    Ok(text.to_owned())
}

/// A data address.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn addr(text: &str) -> Result<String, CallError> {
    match text.parse::<SocketAddr>() {
        Ok(addr) if addr.port() != 0 && !addr.ip().is_unspecified() => Ok(text.to_owned()),
        _ => Err(CallError::Argument { what: "addr", wanted: "ip:port that others can connect to" }),
    }
}

/// 16 bytes.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn uuid(what: &'static str, bytes: &[u8]) -> Result<[u8; 16], CallError> {
    bytes.try_into().map_err(|_| CallError::Argument { what, wanted: "16 bytes" })
}

/// An id, which is never 0.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn id<T: PartialEq + Default>(what: &'static str, id: T) -> Result<T, CallError> {
    if id == T::default() { Err(CallError::Argument { what, wanted: "not 0" }) } else { Ok(id) }
}

/// The request id of a call, if its client gave one.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn request<T>(call: &tonic::Request<T>) -> Result<Option<[u8; 16]>, CallError> {
    let Some(value) = call.metadata().get(REQUEST_METADATA) else { return Ok(None) };
    let bad = || CallError::Argument { what: REQUEST_METADATA, wanted: "32 hex digits" };
    let text = value.to_str().map_err(|_| bad())?;
    if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(bad());
    }
    let number = u128::from_str_radix(text, 16).map_err(|_| bad())?;
    Ok(Some(number.to_be_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_names_pass() {
        assert_eq!(path("path", "/a/b").expect("path"), "a/b");
        assert_eq!(folder("/").expect("root"), "");
        assert_eq!(folder("a/b/").expect("folder"), "a/b");
        assert_eq!(owner("").expect("owner"), "");
        assert!(addr("[::1]:80").is_ok());
        assert_eq!((sector_bytes(0).expect("usual"), sector_bytes(4096).expect("large")), (512, 4096));
        let mut call = tonic::Request::new(());
        assert_eq!(request(&call).expect("none"), None);
        call.metadata_mut().insert(REQUEST_METADATA, "000102030405060708090a0b0c0d0e0f".parse().expect("value"));
        assert_eq!(request(&call).expect("id").map(|r| r[15]), Some(15));
    }

    #[test]
    fn bad_names_are_refused() {
        assert!(path("path", "a//b").is_err());
        assert!(folder("a/../b").is_err());
        assert!(snapshot(".clone-1").is_err());
        assert!(matches!(group(&[]), Err(CallError::Argument { .. })));
        assert!(owner(&"x".repeat(256)).is_err());
        assert!(description(&"x".repeat(256)).is_err());
        assert!(description("a\nb").is_err());
        assert!(addr("0.0.0.0:1").is_err() && addr("host:1").is_err() && addr("1.2.3.4:0").is_err());
        assert!(uuid("uuid", &[0; 15]).is_err());
        assert!(id("volume", 0u64).is_err());
        assert!(sector_bytes(1024).is_err() && sector_bytes(8192).is_err());
        let slow = mds::RateLimit { rate: 1, ..Default::default() };
        let limits = mds::VolumeLimits { write_bytes: Some(slow), ..Default::default() };
        assert!(matches!(limit_changes(Some(&limits)), Err(CallError::Argument { what: "write_bytes", .. })));
        let mut call = tonic::Request::new(());
        call.metadata_mut().insert(REQUEST_METADATA, "+0010203".parse().expect("value"));
        assert!(request(&call).is_err());
    }
}
