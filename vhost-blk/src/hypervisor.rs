//! What to tell QEMU so that it uses a socket of ours; `libvirt.rs` is the same for libvirt.
//!
//! Called by the CLI. Pure functions; nothing is run or read. The guest needs memory that is shared with the daemon, and
//! reconnects by itself when the daemon restarts.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_paths_are_escaped() {
        let options =
            QemuOptions { memory_mib: 512, num_queues: 2, queue_size: 128, reconnect: QemuReconnect::Milliseconds };
        let args = qemu_args(Path::new("/tmp/a,b"), &options);
        assert_eq!(args[1], "memory-backend-memfd,id=ogee-mem,size=512M,share=on");
        assert_eq!(args[5], "socket,id=ogee-disk0,path=/tmp/a,,b,reconnect-ms=200");
        assert!(args[7].contains("num-queues=2,queue-size=128"));
        let old = qemu_args(Path::new("/s"), &QemuOptions { reconnect: QemuReconnect::Seconds, ..options });
        assert_eq!(old[5], "socket,id=ogee-disk0,path=/s,reconnect=1");
    }
}
