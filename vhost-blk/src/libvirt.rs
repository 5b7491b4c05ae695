//! What libvirt has to be told of a socket of ours: a `<disk>` element, the memory it needs, or a whole domain.
//!
//! Called by the CLI. Pure functions; nothing is run or read. Invariants: what is printed is well-formed whatever the names are (a
//! path that XML cannot hold is refused), passes libvirt's schema, and has all that the disk depends on: memory that is shared
//! with the daemon, a connection that is made again when the daemon restarts, and in a whole domain free PCI ports for disks
//! that are plugged in later. libvirt refuses cache, serial, readonly and most other settings on a vhostuser disk: they come from the daemon.

use std::fmt::Write;
use std::path::{Path, PathBuf};

/// What a domain needs besides the disk: memory that the daemon can map.
pub const LIBVIRT_MEMORY_BACKING: &str =
    "<memoryBacking>\n  <source type='memfd'/>\n  <access mode='shared'/>\n</memoryBacking>\n";
/// PCI Express ports of a whole domain. A disk takes one, the memory balloon another; the rest is for plugging in.
const ROOT_PORTS: u32 = 8;
/// Letters of a target behind `vd`: libvirt counts on to `vdzzz`.
const TARGET_LETTERS_MAX: usize = 3;

/// Why something cannot be said to libvirt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LibvirtError {
    /// The path is not UTF-8, or has a character that XML has no way to write.
    #[error("socket path {path:?}: XML cannot hold it; choose another")]
    SocketPath {
        /// The path.
        path: PathBuf,
    },
    /// A target that libvirt does not take for a virtio disk.
    #[error("{target:?}: a disk of a guest is vda, vdb and so on")]
    Target {
        /// As given.
        target: String,
    },
    /// A name that libvirt refuses.
    #[error("{name:?}: a domain's name is not empty and has no slash and no control characters")]
    DomainName {
        /// As given.
        name: String,
    },
}

/// A `<disk>` element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibvirtDisk {
    socket: String,
    queues: u16,
    target: String,
    boot_order: Option<u16>,
}

impl LibvirtDisk {
    /// A disk on `socket` with at most as many `queues` as the daemon offers; `vda`, not for booting.
    ///
    /// # Errors
    /// [`LibvirtError::SocketPath`].
    pub fn new(socket: &Path, queues: u16) -> Result<Self, LibvirtError> {
        let text = socket.to_str().filter(|text| text.chars().all(is_xml));
        let socket = text.ok_or_else(|| LibvirtError::SocketPath { path: socket.to_owned() })?.to_owned();
        Ok(Self { socket, queues, target: "vda".to_owned(), boot_order: None })
    }

    /// With another target, `vda` to `vdzzz`: unique in the domain. What the guest calls the disk is its own affair.
    ///
    /// # Errors
    /// [`LibvirtError::Target`].
    pub fn with_target(self, target: &str) -> Result<Self, LibvirtError> {
        let letters = target.strip_prefix("vd").unwrap_or_default();
        if !(1..=TARGET_LETTERS_MAX).contains(&letters.len()) || !letters.bytes().all(|b| b.is_ascii_lowercase()) {
            return Err(LibvirtError::Target { target: target.to_owned() });
        }
        Ok(Self { target: target.to_owned(), ..self })
    }

    /// With a place in the order of booting, from 1. libvirt refuses it in a domain that has `<boot dev=.../>` in its `<os>`.
    #[must_use]
    pub fn with_boot_order(self, order: u16) -> Self {
        Self { boot_order: Some(order), ..self }
    }

    /// The element, as `virsh attach-device` takes it.
    #[must_use]
    pub fn xml(&self) -> String {
        let Self { socket, queues, target, boot_order } = self;
        let boot = boot_order.map_or(String::new(), |order| format!("  <boot order='{order}'/>\n"));
        format!(
            "<disk type='vhostuser' device='disk' snapshot='no'>\n  \
               <driver name='qemu' type='raw' queues='{queues}'/>\n  \
               <source type='unix' path='{}'>\n    \
                 <reconnect enabled='yes' timeout='1'/>\n  \
               </source>\n  \
               <target dev='{target}' bus='virtio'/>\n\
             {boot}</disk>\n",
            escaped(socket)
        )
    }
}

/// Who runs the guest's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VirtType {
    /// The processor.
    Kvm,
    /// QEMU's translator: slow, works everywhere.
    Qemu,
}

/// A whole `<domain>`: an x86-64 machine with one disk and a serial console, and nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibvirtDomain {
    name: String,
    /// Memory in KiB.
    pub memory_kib: u64,
    /// CPUs.
    pub vcpus: u16,
    /// Who runs its code.
    pub virt_type: VirtType,
    /// Its disk.
    pub disk: LibvirtDisk,
}

impl LibvirtDomain {
    /// A domain of that name with 1 GiB of memory and two CPUs, under KVM.
    ///
    /// # Errors
    /// [`LibvirtError::DomainName`].
    pub fn new(name: &str, disk: LibvirtDisk) -> Result<Self, LibvirtError> {
        let bad = |c: char| c == '/' || c.is_control() || !is_xml(c);
        if name.trim().is_empty() || name.contains(bad) {
            return Err(LibvirtError::DomainName { name: name.to_owned() });
        }
        Ok(Self { name: name.to_owned(), memory_kib: 1 << 20, vcpus: 2, virt_type: VirtType::Kvm, disk })
    }

    /// The element, as `virsh define` takes it.
    #[must_use]
    pub fn xml(&self) -> String {
        let Self { name, memory_kib, vcpus, virt_type, disk } = self;
        let (virt, cpu) = match virt_type {
            VirtType::Kvm => ("kvm", "  <cpu mode='host-passthrough'/>\n"),
            VirtType::Qemu => ("qemu", ""),
        };
        let mut ports = String::new();
        for _ in 0..ROOT_PORTS {
            ports.push_str("    <controller type='pci' model='pcie-root-port'/>\n");
        }
        format!(
            "<domain type='{virt}'>\n  \
               <name>{}</name>\n  \
               <memory unit='KiB'>{memory_kib}</memory>\n  \
               <vcpu>{vcpus}</vcpu>\n\
             {}  \
               <os>\n    \
                 <type arch='x86_64' machine='q35'>hvm</type>\n  \
               </os>\n  \
               <features>\n    \
                 <acpi/>\n    \
                 <apic/>\n  \
               </features>\n\
             {cpu}  \
               <devices>\n\
             {}    \
                 <controller type='pci' model='pcie-root'/>\n\
             {ports}    \
                 <controller type='usb' model='none'/>\n    \
                 <serial type='pty'/>\n  \
               </devices>\n\
             </domain>\n",
            escaped(name),
            indented(LIBVIRT_MEMORY_BACKING, 2),
            indented(&disk.xml(), 4),
        )
    }
}

/// Whether XML 1.0 can hold the character at all (its production `Char`).
fn is_xml(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{fffd}' | '\u{1_0000}'..)
}

/// `text` as content or between quotes of either kind. Line ends and tabs would be read as blanks between quotes.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            '\t' | '\n' | '\r' => {
                // Writing to a String cannot fail.
                let _ = write!(out, "&#{};", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out
}

fn indented(text: &str, blanks: usize) -> String {
    text.lines().map(|line| format!("{:blanks$}{line}\n", "")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn the_elements_are_as_documented() {
        let disk = LibvirtDisk::new(Path::new("/run/ogee/vm1.sock"), 4).unwrap();
        let golden = "\
<disk type='vhostuser' device='disk' snapshot='no'>
  <driver name='qemu' type='raw' queues='4'/>
  <source type='unix' path='/run/ogee/vm1.sock'>
    <reconnect enabled='yes' timeout='1'/>
  </source>
  <target dev='vda' bus='virtio'/>
</disk>
";
        assert_eq!(disk.xml(), golden);
        let second = disk.clone().with_target("vdb").unwrap().with_boot_order(2);
        let tail = "  <target dev='vdb' bus='virtio'/>\n  <boot order='2'/>\n</disk>\n";
        assert!(second.xml().ends_with(tail), "{}", second.xml());

        let mut domain = LibvirtDomain::new("vm1", disk.with_boot_order(1)).unwrap();
        let head = "\
<domain type='kvm'>
  <name>vm1</name>
  <memory unit='KiB'>1048576</memory>
  <vcpu>2</vcpu>
  <memoryBacking>
    <source type='memfd'/>
    <access mode='shared'/>
  </memoryBacking>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
  </os>
  <features>
    <acpi/>
    <apic/>
  </features>
  <cpu mode='host-passthrough'/>
  <devices>
    <disk type='vhostuser' device='disk' snapshot='no'>
      <driver name='qemu' type='raw' queues='4'/>
";
        let xml = domain.xml();
        assert!(xml.starts_with(head), "{xml}");
        assert!(xml.ends_with("    <serial type='pty'/>\n  </devices>\n</domain>\n"), "{xml}");
        assert_eq!(xml.matches("pcie-root-port").count(), 8);
        domain.virt_type = VirtType::Qemu;
        assert!(domain.xml().starts_with("<domain type='qemu'>") && !domain.xml().contains("<cpu"));
    }

    #[test]
    fn hostile_names_are_escaped_or_refused() {
        let disk = |path: &str| LibvirtDisk::new(Path::new(path), 1);
        let xml = disk("/tmp/a'b&c\"<d>\n\te--").unwrap().xml();
        assert!(xml.contains("path='/tmp/a&apos;b&amp;c&quot;&lt;d&gt;&#10;&#9;e--'>\n"), "{xml}");
        assert_eq!(xml.lines().count(), 7);
        assert!(disk("/tmp/\u{fc}\u{1f600}").unwrap().xml().contains("/tmp/\u{fc}\u{1f600}'"));
        for bad in ["/tmp/\u{1}", "/tmp/\u{1b}[2J", "/tmp/\u{ffff}"] {
            assert!(matches!(disk(bad), Err(LibvirtError::SocketPath { .. })), "{bad:?}");
        }
        let bytes = Path::new(OsStr::from_bytes(b"/tmp/\xff"));
        assert!(matches!(LibvirtDisk::new(bytes, 1), Err(LibvirtError::SocketPath { .. })));

        let good = disk("/s").unwrap();
        for bad in ["", "vd", "sda", "vdA", "vd1", "vdaaaa", "vda'/>", "xvda"] {
            assert!(matches!(good.clone().with_target(bad), Err(LibvirtError::Target { .. })), "{bad:?}");
        }
        for bad in ["", " ", "a/b", "a\nb", "a\u{0}"] {
            let refused = LibvirtDomain::new(bad, good.clone());
            assert!(matches!(refused, Err(LibvirtError::DomainName { .. })), "{bad:?}");
        }
        let domain = LibvirtDomain::new("<x>&'", good).unwrap().xml();
        assert!(domain.contains("<name>&lt;x&gt;&amp;&apos;</name>"), "{domain}");
    }
}
