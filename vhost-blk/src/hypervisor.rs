//! What to tell a hypervisor so that it uses a socket of ours: QEMU arguments and a libvirt disk element.
//!
//! Called by the CLI. Pure functions; nothing is run or read. Both need guest memory that is shared with the daemon, and
//! both reconnect by themselves when the daemon restarts. libvirt refuses cache, serial, readonly and most other
//! settings on a vhostuser disk: they come from the daemon.

use std::path::Path;

/// How a QEMU wants to be told to reconnect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QemuReconnect {
    /// `reconnect-ms=200`: QEMU 9.2 and later, the only way from 11 on.
    Milliseconds,
    /// `reconnect=1`: up to QEMU 10.
    Seconds,
}

/// What the arguments depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QemuOptions {
    /// Guest memory in MiB; the same as QEMU's `-m`.
    pub memory_mib: u32,
    /// Queues, usually the number of vCPUs; at most what the daemon offers.
    pub num_queues: u16,
    /// Ring entries, as the daemon is configured.
    pub queue_size: u16,
    /// The way to reconnect.
    pub reconnect: QemuReconnect,
}

/// The arguments to add to a QEMU command line: shared memory, the socket and a bootable disk.
#[must_use]
pub fn qemu_args(socket: &Path, options: &QemuOptions) -> Vec<String> {
    let QemuOptions { memory_mib, num_queues, queue_size, reconnect } = options;
    // QEMU reads ",," as a comma inside of a value.
    let socket = socket.display().to_string().replace(',', ",,");
    let reconnect = match reconnect {
        QemuReconnect::Milliseconds => "reconnect-ms=200",
        QemuReconnect::Seconds => "reconnect=1",
    };
    [
        "-object".to_owned(),
        format!("memory-backend-memfd,id=ogee-mem,size={memory_mib}M,share=on"),
        "-machine".to_owned(),
        "memory-backend=ogee-mem".to_owned(),
        "-chardev".to_owned(),
        format!("socket,id=ogee-disk0,path={socket},{reconnect}"),
        "-device".to_owned(),
        format!(
            "vhost-user-blk-pci,chardev=ogee-disk0,num-queues={num_queues},queue-size={queue_size},disable-legacy=on,\
             bootindex=0"
        ),
    ]
    .into()
}

/// The `<disk>` element of a libvirt domain. The domain also needs
/// `<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>`.
#[must_use]
pub fn libvirt_disk_xml(socket: &Path, queues: u16) -> String {
    let socket = xml_escape(&socket.display().to_string());
    format!(
        "<disk type='vhostuser' device='disk' snapshot='no'>\n  \
           <driver name='qemu' type='raw' queues='{queues}'/>\n  \
           <source type='unix' path='{socket}'>\n    \
             <reconnect enabled='yes' timeout='1'/>\n  \
           </source>\n  \
           <target dev='vda' bus='virtio'/>\n\
         </disk>\n"
    )
}

fn xml_escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_and_quotes_in_paths_are_escaped() {
        let options =
            QemuOptions { memory_mib: 512, num_queues: 2, queue_size: 128, reconnect: QemuReconnect::Milliseconds };
        let args = qemu_args(Path::new("/tmp/a,b"), &options);
        assert_eq!(args[1], "memory-backend-memfd,id=ogee-mem,size=512M,share=on");
        assert_eq!(args[5], "socket,id=ogee-disk0,path=/tmp/a,,b,reconnect-ms=200");
        assert!(args[7].contains("num-queues=2,queue-size=128"));
        let old = qemu_args(Path::new("/s"), &QemuOptions { reconnect: QemuReconnect::Seconds, ..options });
        assert_eq!(old[5], "socket,id=ogee-disk0,path=/s,reconnect=1");
        let xml = libvirt_disk_xml(Path::new("/tmp/a'b&c"), 4);
        assert!(xml.contains("path='/tmp/a&apos;b&amp;c'"), "{xml}");
        assert!(xml.contains("queues='4'"));
    }
}
