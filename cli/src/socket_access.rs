//! Who may connect to a UNIX socket of ours, as the command line says it: permission bits and a group.
//!
//! Parsers for clap, used by `vhost-blk` and `nbd serve`. A group is a number or a name of the local files: names that only a
//! directory service knows are not asked for, because the groups that hypervisors run in are local ones.

use std::io::ErrorKind;

/// Where local groups are; the second on systems whose `/etc` has only what was added.
const GROUP_FILES: [&str; 2] = ["/etc/group", "/usr/lib/group"];

/// Nine permission bits in octal.
///
/// # Errors
/// A sentence that says what is understood.
pub(crate) fn socket_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("write permissions in octal, for example 660".to_owned()),
    }
}

/// The id of a group.
///
/// # Errors
/// A sentence: no such group, or its file cannot be read.
pub(crate) fn socket_group(text: &str) -> Result<u32, String> {
    if text.bytes().all(|b| b.is_ascii_digit()) {
        // The last id is the kernel's word for "leave it".
        return text.parse().ok().filter(|id| *id != u32::MAX).ok_or_else(|| format!("{text} is no group id"));
    }
    for file in GROUP_FILES {
        match std::fs::read(file) {
            Ok(groups) => {
                if let Some(id) = id_in(&String::from_utf8_lossy(&groups), text) {
                    return Ok(id);
                }
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(format!("read {file}: {error}")),
        }
    }
    Err(format!("there is no group {text:?} in {}", GROUP_FILES[0]))
}

/// Looks in the lines of group(5): name, password, id, members.
fn id_in(groups: &str, name: &str) -> Option<u32> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal() {
        assert_eq!(socket_mode("660"), Ok(0o660));
        for bad in ["8", "rw", "1777", ""] {
            assert!(socket_mode(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn groups_are_names_or_numbers() {
        let groups = "root:x:0:\nlibvirt-qemu:x:64055:ogee\nbroken\nodd:x:y:\n\nkvm:x:104:a,b\n";
        assert_eq!(id_in(groups, "libvirt-qemu"), Some(64_055));
        assert_eq!(id_in(groups, "kvm"), Some(104));
        for missing in ["broken", "odd", "libvirt", "ogee", ""] {
            assert_eq!(id_in(groups, missing), None, "{missing}");
        }
        assert_eq!(socket_group("0"), Ok(0));
        assert_eq!(socket_group("64055"), Ok(64_055));
        assert_eq!(socket_group("root"), Ok(0));
        for bad in ["", "4294967295", "99999999999", "no such group"] {
            assert!(socket_group(bad).is_err(), "{bad:?}");
        }
    }
}
