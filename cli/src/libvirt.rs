//! `ogee libvirt-xml`: what libvirt has to be told to use a volume that `ogee vhost-blk` serves.
//!
//! It only prints: no cluster is asked, no socket is looked at, so it also works before the volume or its daemon exists. What the
//! elements look like is known to `ogee-vhost-blk` alone; here are arguments, defaults and the three ways to print.

use crate::connect::Context;
use crate::error::{CliError, ErrorKind};
use clap::{Args, ValueEnum};
use ogee_common::limits::VHOST_QUEUES_MAX;
use ogee_common::name::VolumeRef;
use ogee_common::size::parse_bytes;
use ogee_vhost_blk::{
    LIBVIRT_MEMORY_BACKING, LibvirtDisk, LibvirtDomain, LibvirtError, NUM_QUEUES_DEFAULT, SOCKET_PATH_BYTES_MAX, VirtType,
};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Where the systemd unit puts its sockets.
const SOCKET_FOLDER: &str = "/run/ogee";
/// Least memory of a domain: less does not load a kernel.
const MEMORY_MIN: u64 = 32 << 20;

pub(crate) const EXAMPLES: &str = "\
Examples:
  ogee libvirt-xml vm1                                    # what to add to a domain, and where
  ogee libvirt-xml vm1 --domain --memory 4G --vcpus 4 >vm1.xml && virsh define vm1.xml
  ogee libvirt-xml data1 --device --target vdb >data1.xml && virsh attach-device vm1 data1.xml --live --config
  ogee libvirt-xml team/db --socket /run/ogee/team-db.sock

Nothing is served by this: `ogee vhost-blk` does that, on the same socket (docs/libvirt.md has a systemd unit).";

/// Arguments of `ogee libvirt-xml`.
#[derive(Debug, Clone, Args)]
pub(crate) struct LibvirtXmlArgs {
    /// The volume, or a snapshot that is served with --read-only
    #[arg(value_name = "VOLUME[@SNAPSHOT]", value_parser = VolumeRef::parse)]
    volume: VolumeRef,
    /// The socket of its `ogee vhost-blk` [default: /run/ogee/VOLUME.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Queues, best as many as the guest has CPUs; at most those that the daemon offers
    #[arg(long, value_name = "N", default_value_t = NUM_QUEUES_DEFAULT, value_parser = clap::value_parser!(u16).range(1..=i64::from(VHOST_QUEUES_MAX)))]
    queues: u16,
    /// Its place in the order of booting, from 1; with --domain it is 1. Not for a domain that has <boot dev=.../> in its <os>
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    boot: Option<u16>,
    /// Its name in the domain: vda, vdb ...
    #[arg(long, value_name = "NAME", default_value = "vda")]
    target: String,
    /// Print the disk element alone, for virsh attach-device and detach-device
    #[arg(long, conflicts_with = "domain")]
    device: bool,
    /// Print a whole domain with this disk, for virsh define
    #[arg(long)]
    domain: bool,
    /// The domain's name [default: the volume's, with - in place of / and @]
    #[arg(long, value_name = "NAME", requires = "domain")]
    name: Option<String>,
    /// The domain's memory
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = memory, requires = "domain")]
    memory: u64,
    /// The domain's CPUs
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=4096), requires = "domain")]
    vcpus: u16,
    /// Who runs the domain's code
    #[arg(long, value_name = "TYPE", value_enum, default_value_t = Virt::Kvm, requires = "domain")]
    virt_type: Virt,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Virt {
    /// The processor
    Kvm,
    /// QEMU's translator: slow, works everywhere
    Qemu,
}

/// Memory in bytes, whole KiB.
fn memory(text: &str) -> Result<u64, String> {
    match parse_bytes(text) {
        Ok(bytes) if bytes >= MEMORY_MIN && bytes.is_multiple_of(1024) => Ok(bytes),
        Ok(_) => Err("a guest has whole KiB of memory, and at least 32 MiB".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[derive(Debug, Serialize)]
struct Printed {
    volume: String,
    socket: PathBuf,
    memory_backing_xml: &'static str,
    disk_xml: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    domain_xml: Option<String>,
    #[serde(skip)]
    device_alone: bool,
}

impl Printed {
    fn text(&self) -> String {
        match (&self.domain_xml, self.device_alone) {
            (Some(domain), _) => domain.clone(),
            (None, true) => self.disk_xml.clone(),
            // No name may get into a comment: `--` would end it.
            (None, false) => format!(
                "<!-- into <domain>: memory that the daemon can map -->\n{}<!-- into <devices> -->\n{}",
                self.memory_backing_xml, self.disk_xml
            ),
        }
    }
}

/// Carries out `ogee libvirt-xml`.
///
/// # Errors
/// Something that libvirt cannot be told ([`ErrorKind::Usage`]), or standard output cannot be written.
pub(crate) fn run(context: &Context, args: &LibvirtXmlArgs) -> Result<(), CliError> {
    let socket = match &args.socket {
        // libvirt has another working directory.
        Some(path) => std::path::absolute(path).map_err(|e| CliError::file("find", path, e))?,
        None => default_socket(&args.volume)?,
    };
    let len = socket.as_os_str().len();
    if len > SOCKET_PATH_BYTES_MAX {
        let text = format!("{}: {len} bytes, a socket path has at most {SOCKET_PATH_BYTES_MAX}", socket.display());
        return Err(CliError::new(ErrorKind::Usage, text));
    }
    let disk = disk(args, &socket).map_err(refused)?;
    let printed = Printed {
        volume: args.volume.to_string(),
        memory_backing_xml: LIBVIRT_MEMORY_BACKING,
        disk_xml: disk.xml(),
        domain_xml: args.domain.then(|| domain(args, disk)).transpose().map_err(refused)?,
        socket,
        device_alone: args.device,
    };
    context.out.result(&printed, Printed::text)
}

/// The unit's socket. Names in folders have none, because two of them could come to the same file name.
fn default_socket(volume: &VolumeRef) -> Result<PathBuf, CliError> {
    let name = volume.to_string();
    if name.contains('/') {
        let text = format!("{name} lies in a folder: say with --socket where it is served");
        return Err(CliError::new(ErrorKind::Usage, text));
    }
    Ok(Path::new(SOCKET_FOLDER).join(format!("{name}.sock")))
}

fn disk(args: &LibvirtXmlArgs, socket: &Path) -> Result<LibvirtDisk, LibvirtError> {
    let disk = LibvirtDisk::new(socket, args.queues)?.with_target(&args.target)?;
    Ok(match args.boot.or(args.domain.then_some(1)) {
        Some(order) => disk.with_boot_order(order),
        None => disk,
    })
}

fn domain(args: &LibvirtXmlArgs, disk: LibvirtDisk) -> Result<String, LibvirtError> {
    let name = args.name.clone().unwrap_or_else(|| args.volume.to_string().replace(['/', '@'], "-"));
    let mut domain = LibvirtDomain::new(&name, disk)?;
    domain.memory_kib = args.memory / 1024;
    domain.vcpus = args.vcpus;
    domain.virt_type = match args.virt_type {
        Virt::Kvm => VirtType::Kvm,
        Virt::Qemu => VirtType::Qemu,
    };
    Ok(domain.xml())
}

fn refused(error: LibvirtError) -> CliError {
    CliError::caused(ErrorKind::Usage, "libvirt XML", error)
}
