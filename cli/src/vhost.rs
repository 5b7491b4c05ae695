//! `ogee vhost-blk`: serves a volume to one virtual machine over a vhost-user socket, in the foreground.
//!
//! Life: claim the socket, open the volume, bind the socket, say `ready`, serve front ends one after another, and on SIGINT or SIGTERM
//! stop, drain, detach and end with 0. A second signal ends it at once; nothing acknowledged is lost then either.
//! With `--incoming` the volume is not opened but looked up, and attached when a guest starts. With `--upgrade` it takes over from a daemon that serves the
//! socket (`take_over.rs`). When another one takes over from it, it ends with 0 and gives nothing back.

use crate::claim::Claim;
use crate::connect::Context;
use crate::error::{CliError, ErrorKind};
use crate::logging;
use crate::null_device::NullDevice;
use crate::open::{close_incoming, close_volume, look_up, look_up_incoming, open_same};
use crate::output::Output;
use crate::signals::StopSignals;
use crate::socket_access::{socket_group, socket_mode};
use crate::take_over::{self, is_handed_over};
use crate::volume_metrics;
use clap::Args;
use ogee_client::{BlockDevice, DeviceInfo, IncomingEnd, IncomingVolume, OpenMode, Volume};
use ogee_common::id::VolumeId;
use ogee_common::limits::{BOOT_PROFILE_RECORD_BYTES, PAGE_BYTES};
use ogee_common::name::VolumeRef;
use ogee_common::size::{ByteLen, parse_bytes};
use ogee_metrics::MetricsServer;
use ogee_snapclone::BootProfile;
use ogee_vhost_blk::{
    HandOverTerms, LIBVIRT_MEMORY_BACKING, LibvirtDisk, QUEUE_SIZE_DEFAULT, QemuOptions, QemuReconnect, ServeEnd, ServeError,
    StopHandle, VhostBlkConfig, VhostBlkServer, qemu_args,
};
use serde::Serialize;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::oneshot;

/// Guest memory in the QEMU arguments that are printed, MiB; to be changed together with `-m`.
const EXAMPLE_MEMORY_MIB: u32 = 1024;

/// Arguments of `ogee vhost-blk`.
#[derive(Debug, Clone, Args)]
pub(crate) struct VhostBlkArgs {
    /// The volume, or with --read-only also a snapshot
    #[arg(value_name = "VOLUME[@SNAPSHOT]", value_parser = VolumeRef::parse, required_unless_present = "null")]
    volume: Option<VolumeRef>,
    /// Serve a device of this size that answers everything at once and keeps nothing, for measurements; needs no cluster
    #[arg(long, value_name = "SIZE", value_parser = null_size, conflicts_with_all = ["volume", "steal", "read_only"])]
    null: Option<u64>,
    /// The UNIX socket to serve; at most 107 bytes
    #[arg(long, value_name = "PATH")]
    socket: PathBuf,
    /// Permissions of the socket, octal; by default as the umask has it
    #[arg(long, value_name = "MODE", value_parser = socket_mode)]
    socket_mode: Option<u32>,
    /// Group of the socket, a local name or a number: the one that QEMU runs in
    #[arg(long, value_name = "GROUP", value_parser = socket_group)]
    socket_group: Option<u32>,
    /// Queues offered, best as many as the guest has CPUs
    #[arg(long, default_value_t = ogee_vhost_blk::NUM_QUEUES_DEFAULT)]
    queues: u16,
    /// Refuse writes; any number of daemons may serve a volume or a snapshot so
    #[arg(long)]
    read_only: bool,
    /// What the guest sees as the disk's serial, at most 20 characters; by default ogee and the volume's number
    #[arg(long, value_name = "TEXT", value_parser = serial, conflicts_with = "null")]
    serial: Option<String>,
    /// Take the volume from the client that has it attached
    #[arg(long, conflicts_with = "read_only")]
    steal: bool,
    /// Be the destination of a live migration: attach the volume when the guest starts here, taking it from the source
    #[arg(long, conflicts_with_all = ["null", "read_only", "steal", "metrics"])]
    incoming: bool,
    /// Take over from the daemon that serves the socket, without a reconnection of the guest; if there is none, start as ever
    #[arg(long)]
    upgrade: bool,
    /// Fail an IO that takes longer, in seconds; by default the guest waits for ever
    #[arg(long, value_name = "SECONDS")]
    io_timeout: Option<u64>,
    /// Write here, when it ends, which pages were read first: for ogee backup profile record
    #[arg(long, value_name = "FILE", conflicts_with_all = ["null", "incoming", "upgrade"])]
    record_profile: Option<PathBuf>,
    /// Answer GET /metrics here, for Prometheus: what the volume did; by default nowhere
    #[arg(long, value_name = "ADDR", conflicts_with = "null")]
    metrics: Option<SocketAddr>,
}

impl VhostBlkArgs {
    /// What is served, for people.
    fn subject(&self) -> String {
        self.volume.as_ref().map_or_else(|| "a null device".to_owned(), ToString::to_string)
    }

    /// What a daemon must serve, and how, that takes over from this one.
    pub(crate) fn terms(&self) -> String {
        let subject = self.volume.as_ref().map_or_else(|| format!("null {}", self.null_bytes()), ToString::to_string);
        let mode = if self.read_only { "read-only" } else { "read-write" };
        let incoming = if self.incoming { " incoming" } else { "" };
        let serial = self.serial.as_ref().map_or(String::new(), |serial| format!(" serial {serial}"));
        format!("{subject} {mode}{incoming}{serial}")
    }

    pub(crate) fn config(&self) -> VhostBlkConfig {
        VhostBlkConfig {
            num_queues: self.queues,
            socket_mode: self.socket_mode,
            socket_group: self.socket_group,
            ..VhostBlkConfig::new(&self.socket)
        }
    }

    pub(crate) fn volume(&self) -> Option<&VolumeRef> {
        self.volume.as_ref()
    }

    pub(crate) fn null_bytes(&self) -> u64 {
        self.null.unwrap_or_default()
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(crate) fn serial(&self) -> Option<&str> {
        self.serial.as_deref()
    }

    pub(crate) fn is_incoming(&self) -> bool {
        self.incoming
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.read_only
    }

    pub(crate) fn io_timeout(&self) -> Option<Duration> {
        self.io_timeout.map(Duration::from_secs)
    }

    pub(crate) fn metrics(&self) -> Option<SocketAddr> {
        self.metrics
    }

    /// The volume with the serial that was asked for.
    pub(crate) fn with_serial(&self, volume: Volume) -> Volume {
        match &self.serial {
            Some(serial) => volume.with_serial(serial),
            None => volume,
        }
    }
}

/// A serial as virtio-blk has it: 1 to 20 printable ASCII characters.
///
/// # Errors
/// A sentence that says what is understood.
pub(crate) fn serial(text: &str) -> Result<String, String> {
    let is_serial = (1..=ogee_vhost_blk::ID_BYTES).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
    if is_serial { Ok(text.to_owned()) } else { Err("a serial has 1 to 20 printable ASCII characters, no spaces".to_owned()) }
}

/// The size of a null device: whole pages.
fn null_size(text: &str) -> Result<u64, String> {
    match parse_bytes(text) {
        Ok(bytes) if bytes > 0 && bytes % u64::from(PAGE_BYTES) == 0 => Ok(bytes),
        Ok(_) => Err(format!("a null device has a multiple of {PAGE_BYTES} bytes")),
        Err(error) => Err(error.to_string()),
    }
}

#[derive(Debug, Serialize)]
struct Ready<'a> {
    ready: bool,
    socket: &'a Path,
    volume: String,
    size_bytes: u64,
    read_only: bool,
    qemu_args: Vec<String>,
    /// None if XML cannot hold the socket's path.
    libvirt_xml: Option<String>,
    /// Where `/metrics` is.
    #[serde(skip_serializing_if = "Option::is_none")]
    metrics: Option<SocketAddr>,
}

impl Ready<'_> {
    fn text(&self) -> String {
        let args = shell_words(&self.qemu_args);
        let metrics = self.metrics.map_or(String::new(), |addr| format!("\n\nmetrics: http://{addr}/metrics"));
        let (volume, size, socket) = (&self.volume, ByteLen(self.size_bytes), self.socket.display());
        let memory: String = LIBVIRT_MEMORY_BACKING.lines().map(str::trim).collect();
        let xml = self.libvirt_xml.as_ref().map_or(String::new(), |xml| {
            format!("\n\nlibvirt (the domain also needs {memory}; see ogee libvirt-xml):\n{}", xml.trim_end())
        });
        format!(
            "ready: {volume} ({size}) on {socket}\n\nQEMU (memory size as with -m {EXAMPLE_MEMORY_MIB}; \
             QEMU before 9.2: reconnect=1 in place of reconnect-ms=200):\n  {args}{xml}{metrics}"
        )
    }
}

/// Carries out `ogee vhost-blk`.
///
/// # Errors
/// The volume cannot be opened, the socket not served, or the volume not given back.
pub(crate) async fn run(context: &Context, args: VhostBlkArgs) -> Result<(), CliError> {
    let doing = format!("serve {} on {}", args.subject(), args.socket.display());
    serve(context, args).await.map_err(|e| e.within(doing))
}

async fn serve(context: &Context, args: VhostBlkArgs) -> Result<(), CliError> {
    let mut signals = StopSignals::listen()?;
    if args.upgrade
        && let Some(upgrade) = take_over::ask(&args, &mut signals).await?
    {
        return take_over::run(context, &args, upgrade, &mut signals).await;
    }
    let Some(name) = &args.volume else {
        let device = NullDevice::new(args.null_bytes());
        return serve_open(context.out, &args, &device, (None, 0, None), &mut signals).await.map(drop);
    };
    let mode = if args.read_only { OpenMode::ReadOnly } else { OpenMode::ReadWrite { steal: args.steal } };
    let claim = Claim::take(&args.socket, &name.to_string())?;
    if args.incoming {
        return serve_incoming(context, &args, name, claim, &mut signals).await;
    }
    let attach = async {
        let cluster = context.cluster_as(NonZeroU64::new(claim.client()), args.io_timeout())?;
        let found = look_up(&cluster, name).await?;
        claim.identify(&name.to_string(), VolumeId(found.id))?;
        let volume = open_same(&cluster, name, mode, VolumeId(found.id)).await?;
        Ok::<_, CliError>(args.with_serial(volume))
    };
    let volume = match attach.await {
        Ok(volume) => volume,
        Err(error) => {
            claim.not_attached();
            return Err(error);
        }
    };
    if args.record_profile.is_some() {
        volume.record(BOOT_PROFILE_RECORD_BYTES);
    }
    // Served until the front ends are gone.
    let served = match args.metrics.map(|addr| volume_metrics::serve(addr, &volume)).transpose() {
        Ok(metrics) => {
            let addr = metrics.as_ref().map(MetricsServer::addr);
            serve_open(context.out, &args, &volume, (Some(&claim), volume.attach_info().volume.0, addr), &mut signals).await
        }
        Err(error) => Err(error),
    };
    let profile = args.record_profile.as_deref().filter(|_| !is_handed_over(&served));
    let ended = end_volume(&volume, claim, served, &mut signals).await;
    if let Some(path) = profile {
        write_profile(path, &volume)?;
    }
    ended
}

fn write_profile(path: &Path, volume: &Volume) -> Result<(), CliError> {
    let doing = || format!("write {}", path.display());
    std::fs::write(path, BootProfile::new(&volume.recorded()).json()).map_err(|e| CliError::caused(ErrorKind::Failure, doing(), e))
}

/// Gives a volume back that was served, unless another daemon goes on with it.
///
/// # Errors
/// What ended the serving, or the volume cannot be given back.
pub(crate) async fn end_volume(
    volume: &Volume,
    claim: Claim,
    served: Result<ServeEnd, CliError>,
    signals: &mut StopSignals,
) -> Result<(), CliError> {
    if is_handed_over(&served) {
        return Ok(());
    }
    let closed = tokio::select! {
        closed = close_volume(volume) => closed,
        () = signals.wait() => Err(CliError::new(ErrorKind::Failure, "second signal: the volume stays attached")),
    };
    if closed.is_ok() {
        claim.given_back();
    }
    served?;
    closed
}

/// Serves a volume that its guest brings along.
async fn serve_incoming(
    context: &Context, args: &VhostBlkArgs, name: &VolumeRef, claim: Claim, signals: &mut StopSignals,
) -> Result<(), CliError> {
    let look_up = async {
        let cluster = context.cluster_as(NonZeroU64::new(claim.client()), args.io_timeout())?;
        look_up_incoming(&cluster, name, args.serial.as_deref()).await
    };
    let volume = match look_up.await {
        Ok(volume) => volume,
        Err(error) => {
            claim.not_attached();
            return Err(error);
        }
    };
    let served = serve_open(context.out, args, &volume, (Some(&claim), volume.id().0, None), signals).await;
    end_incoming(&volume, name, claim, served, signals).await
}

/// As [`end_volume`], for a volume that its guest brings along.
///
/// # Errors
/// The same.
pub(crate) async fn end_incoming(
    volume: &IncomingVolume,
    name: &VolumeRef,
    claim: Claim,
    served: Result<ServeEnd, CliError>,
    signals: &mut StopSignals,
) -> Result<(), CliError> {
    if is_handed_over(&served) {
        return Ok(());
    }
    let closed = tokio::select! {
        closed = close_incoming(volume, name) => closed,
        () = signals.wait() => Err(CliError::new(ErrorKind::Failure, "second signal: the volume stays attached")),
    };
    match &closed {
        Ok(IncomingEnd::GivenBack) => claim.given_back(),
        Ok(IncomingEnd::NeverAttached) => claim.not_attached(),
        // The next daemon on this socket follows as the same client.
        Ok(IncomingEnd::Kept | IncomingEnd::Unknown) | Err(_) => {}
    }
    served?;
    closed.map(drop)
}

/// Binds the socket and serves a device on it.
async fn serve_open<D: BlockDevice>(
    out: Output,
    args: &VhostBlkArgs,
    device: &D,
    (claim, volume, metrics): (Option<&Claim>, u64, Option<SocketAddr>),
    signals: &mut StopSignals,
) -> Result<ServeEnd, CliError> {
    let stop = StopHandle::new().map_err(serve_failed)?;
    let mut server = VhostBlkServer::bind(device.clone(), args.config(), stop.clone()).map_err(serve_failed)?;
    let file = claim.map(Claim::file).transpose()?;
    let terms = HandOverTerms { subject: args.terms(), client: claim.map_or(0, Claim::client), volume, claim: file };
    if let Err(error) = server.allow_upgrade(terms) {
        logging::start_for_daemon();
        tracing::warn!(target: "controlpath", error = serve_failed(error).chain(), "this daemon can be restarted, but not upgraded under its guest");
    }
    serve_until_end(out, args, &device.info(), server, (stop, metrics), signals).await
}

/// Says `ready` and runs a server until its end.
///
/// # Errors
/// The server failed, or a second signal came.
pub(crate) async fn serve_until_end<D: BlockDevice>(
    out: Output,
    args: &VhostBlkArgs,
    info: &DeviceInfo,
    server: VhostBlkServer<D>,
    (stop, metrics): (StopHandle, Option<SocketAddr>),
    signals: &mut StopSignals,
) -> Result<ServeEnd, CliError> {
    say_ready(out, args, info, metrics)?;
    // From here on a person reads the log; before, an error is one line.
    logging::start_for_daemon();
    let (finished, mut running) = oneshot::channel();
    let thread = std::thread::Builder::new().name("vhost-blk".to_owned()).spawn(move || {
        // The receiver is gone only after a second signal; then nobody wants to know.
        let _ = finished.send(server.run());
    });
    let thread = thread.map_err(|e| CliError::caused(ErrorKind::Failure, "start the server's thread", e))?;
    let ended = tokio::select! {
        ended = &mut running => ended,
        () = signals.wait() => {
            stop.stop();
            tokio::select! {
                ended = &mut running => ended,
                () = signals.wait() => {
                    return Err(CliError::new(ErrorKind::Failure, "second signal: IO in flight is left unanswered"));
                }
            }
        }
    };
    let joined = thread.join();
    match (ended, joined) {
        (Ok(outcome), Ok(())) => outcome.map_err(serve_failed),
        _ => Err(CliError::new(ErrorKind::Failure, "the server's thread panicked; see its log")),
    }
}

fn say_ready(
    out: Output, args: &VhostBlkArgs, info: &DeviceInfo, metrics: Option<SocketAddr>,
) -> Result<(), CliError> {
    // A guest finds the socket from its own working directory.
    let socket = std::path::absolute(&args.socket).unwrap_or_else(|_| args.socket.clone());
    let options = QemuOptions {
        memory_mib: EXAMPLE_MEMORY_MIB,
        num_queues: args.queues,
        queue_size: QUEUE_SIZE_DEFAULT,
        reconnect: QemuReconnect::Milliseconds,
    };
    let ready = Ready {
        ready: true,
        socket: &socket,
        volume: args.subject(),
        size_bytes: info.size_bytes,
        read_only: info.read_only,
        qemu_args: qemu_args(&socket, &options),
        libvirt_xml: LibvirtDisk::new(&socket, args.queues).ok().map(|disk| disk.xml()),
        metrics,
    };
    out.result(&ready, Ready::text)
}

/// Why a volume's socket is not served.
pub(crate) fn serve_failed(error: ServeError) -> CliError {
    use ogee_vhost_blk::SocketError;
    let kind = match &error {
        ServeError::NumQueues { .. } | ServeError::QueueSize { .. } => ErrorKind::Usage,
        ServeError::Socket(SocketError::PathTooLong { .. } | SocketError::NotASocket { .. }) => ErrorKind::Usage,
        ServeError::Socket(SocketError::NoDirectory { .. }) => ErrorKind::NotFound,
        ServeError::Socket(SocketError::InUse { .. }) => ErrorKind::Conflict,
        _ => ErrorKind::Failure,
    };
    CliError::caused(kind, "vhost-user socket", error)
}

/// The words in one line that a shell reads back as the same words.
fn shell_words(words: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=,./:@+%".contains(c);
    let quoted = |w: &String| if w.chars().all(plain) { w.clone() } else { format!("'{}'", w.replace('\'', r"'\''")) };
    words.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_are_what_a_guest_can_read() {
        assert_eq!(serial("SN-0123456789abcdefX"), Ok("SN-0123456789abcdefX".to_owned()));
        for bad in ["", "0123456789abcdefghijk", "a b", "\u{e9}", "a\nb"] {
            assert!(serial(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn words_survive_a_shell() {
        let words = ["-device".to_owned(), "path=/a b/it's,reconnect=1".to_owned(), "$(x)".to_owned()];
        let script = format!("printf '%s\\n' {}", shell_words(&words));
        let out = std::process::Command::new("sh").args(["-c", &script]).output().expect("a shell");
        assert_eq!(String::from_utf8_lossy(&out.stdout).lines().collect::<Vec<_>>(), words);
    }
}
