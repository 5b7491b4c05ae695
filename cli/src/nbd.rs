//! `ogee nbd serve`: serves volumes and snapshots over NBD, in the foreground.
//!
//! Life: open every volume, listen, say `ready`, serve, and on SIGINT or SIGTERM stop, answer what is in flight, detach
//! and end with 0. A second signal ends it at once; nothing acknowledged is lost then either. Invariant: whatever was
//! opened is given back, also when a later step fails.

use crate::claim::Claim;
use crate::connect::Context;
use crate::error::{CliError, ErrorKind};
use crate::file_device::FileDevice;
use crate::logging;
use crate::nbd_map;
use crate::nbd_metrics;
use crate::nbd_tls::{NbdTlsArgs, Schemes};
use crate::open::{close_volume, open_volume};
use crate::signals::StopSignals;
use crate::socket_access::socket_mode;
use clap::{Args, Subcommand};
use crate::sdk_error::call_failed;
use ogee_client::{BlockDevice, Cluster, Moment, OpenMode, Volume};
use ogee_common::id::{LayerId, VolumeSeq};
use ogee_common::limits::{NBD_CHANGED_CONTEXTS_MAX, NBD_CONNECTIONS_DEFAULT};
use ogee_common::name::VolumeRef;
use ogee_common::size::ByteLen;
use ogee_metrics::MetricsServer;
use ogee_nbd::{Export, ListenError, ListenOn, NbdConfig, NbdServer, NbdTls, ServeError};
use ogee_proto::mds::ListSnapshotsRequest;
use ogee_proto::unix_socket::SocketError;
use serde::Serialize;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

const SERVE_EXAMPLES: &str = "\
Examples:
  ogee nbd serve vm1 --socket /run/ogee/nbd.sock
  ogee nbd serve vm1 golden@v1 --listen 127.0.0.1:10809
  ogee nbd serve team/db --listen 10.0.0.5:10809 --tls /etc/ogee/tls

An export has the name it has here: nbd://127.0.0.1:10809/golden@v1. With one volume the empty name is that one too.
Snapshots are read-only, volumes with --read-only. What changed since an earlier snapshot of the volume, as of the start, is in
the metadata context ogee:changed:SNAPSHOT, with dirty bits as in qemu:dirty-bitmap. Without --socket and --listen the sockets come from systemd (LISTEN_FDS).
Without --tls whoever can connect can read and write: then serve on a UNIX socket, on loopback or in a private network.

It prints `ready` and the addresses. SIGTERM and SIGINT end it: requests in flight are answered first.";

/// `ogee nbd`.
#[derive(Debug, Subcommand)]
pub(crate) enum NbdCommand {
    /// Serve volumes and snapshots, in the foreground
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(ServeArgs),
    /// Make a volume or snapshot a block device of this host (/dev/nbdN), and keep it one
    #[command(after_help = nbd_map::MAP_EXAMPLES)]
    Map(nbd_map::MapArgs),
    /// Flush a mapped device and detach it
    #[command(after_help = nbd_map::UNMAP_EXAMPLES)]
    Unmap(nbd_map::UnmapArgs),
    /// What is mapped on this host
    #[command(after_help = "Example:\n  ogee nbd ls --json")]
    Ls(nbd_map::DirArgs),
}

/// Arguments of `ogee nbd serve`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ServeArgs {
    /// What to export
    #[arg(required_unless_present = "file", value_name = "VOLUME[@SNAPSHOT]", value_parser = VolumeRef::parse)]
    volumes: Vec<VolumeRef>,
    /// Export this file of this host in place of volumes, for measurements: a write is durable only after a flush; needs no cluster
    #[arg(long, value_name = "PATH", hide = true, conflicts_with_all = ["volumes", "read_only", "steal", "io_timeout"])]
    file: Option<PathBuf>,
    /// A UNIX socket to serve; at most 107 bytes
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Permissions of the UNIX socket, octal; by default as the umask has it
    #[arg(long, value_name = "MODE", value_parser = socket_mode, requires = "socket")]
    socket_mode: Option<u32>,
    /// A TCP address to serve, ip:port; port 0 picks a free one
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Take the volumes from the clients that have them attached
    #[arg(long, conflicts_with = "read_only")]
    steal: bool,
    /// Fail an IO that takes longer, in seconds; by default the client waits for ever
    #[arg(long, value_name = "SECONDS")]
    io_timeout: Option<u64>,
    /// Threads, each with its own connections to the cluster; by default as many as CPUs, at most 4
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Connections at the same time; more are refused
    #[arg(long, value_name = "N", default_value_t = NBD_CONNECTIONS_DEFAULT)]
    connections: usize,
    #[command(flatten)]
    tls: NbdTlsArgs,
    /// Answer GET /metrics here, for Prometheus; by default nowhere
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,
}

impl ServeArgs {
    /// What is exported, for people.
    fn subject(&self) -> String {
        let volumes = || self.volumes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        self.file.as_ref().map_or_else(volumes, |path| path.display().to_string())
    }

    fn places(&self) -> Vec<ListenOn> {
        let unix = self.socket.clone().map(|path| ListenOn::Unix { path, mode: self.socket_mode });
        let places: Vec<_> = unix.into_iter().chain(self.listen.map(ListenOn::Tcp)).collect();
        if places.is_empty() { vec![ListenOn::Inherited] } else { places }
    }

    /// The claim on the UNIX socket: whoever serves the same there after we were killed attaches as the same client, at once.
    fn claim(&self) -> Result<Option<Claim>, CliError> {
        let names: Vec<String> = self.volumes.iter().map(ToString::to_string).collect();
        self.socket.as_ref().map(|socket| Claim::take(socket, &names.join(" "))).transpose()
    }

    fn mode(&self, volume: &VolumeRef) -> OpenMode {
        if self.read_only || volume.snapshot.is_some() {
            OpenMode::ReadOnly
        } else {
            OpenMode::ReadWrite { steal: self.steal }
        }
    }
}

#[derive(Debug, Serialize)]
struct ReadyExport {
    name: String,
    size_bytes: u64,
    read_only: bool,
    /// Where clients find it, one for each place.
    uris: Vec<String>,
    /// Contexts for what changed since snapshots.
    contexts: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Ready {
    ready: bool,
    socket: Option<PathBuf>,
    /// TCP addresses with their ports.
    listen: Vec<SocketAddr>,
    exports: Vec<ReadyExport>,
    /// Where `/metrics` is.
    #[serde(skip_serializing_if = "Option::is_none")]
    metrics: Option<SocketAddr>,
}

impl Ready {
    fn text(&self) -> String {
        let line = |export: &ReadyExport| {
            let (name, size) = (&export.name, ByteLen(export.size_bytes));
            let mode = if export.read_only { ", read-only" } else { "" };
            format!("ready: {name} ({size}{mode}) on {}", export.uris.join(" and "))
        };
        let metrics = self.metrics.map(|addr| format!("metrics: http://{addr}/metrics"));
        self.exports.iter().map(line).chain(metrics).collect::<Vec<_>>().join("\n")
    }
}

/// The URI of an export (NBD's doc/uri.md). Names need no quoting in a path; a socket's path may.
fn uris(name: &str, schemes: Schemes, socket: Option<&Path>, listen: &[SocketAddr]) -> Vec<String> {
    let unix = socket.map(|path| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
        let bytes = std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()).iter();
        let quoted = |byte: &u8| if plain(*byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") };
        format!("{}:///{name}?socket={}", schemes.unix, bytes.map(quoted).collect::<String>())
    });
    let tcp = listen.iter().map(|addr| format!("{}://{addr}/{name}", schemes.tcp));
    unix.into_iter().chain(tcp).collect()
}

/// Carries out `ogee nbd`.
///
/// # Errors
/// A volume cannot be opened or not be given back, or a socket not served; a device not attached or detached.
pub(crate) async fn run(context: &Context, command: NbdCommand) -> Result<(), CliError> {
    let args = match command {
        NbdCommand::Serve(args) => args,
        NbdCommand::Map(args) => return nbd_map::map(context, args).await,
        NbdCommand::Unmap(args) => return nbd_map::unmap(context, &args).await,
        NbdCommand::Ls(args) => return nbd_map::ls(context, &args),
    };
    let doing = format!("serve {} over NBD", args.subject());
    serve(context, &args).await.map_err(|e| e.within(doing))
}

async fn serve(context: &Context, args: &ServeArgs) -> Result<(), CliError> {
    let mut signals = StopSignals::listen()?;
    let tls = args.tls.load()?;
    if let Some(path) = &args.file {
        let export = file_export(path)?;
        return serve_open(context, args, vec![export], (tls, &[]), &mut signals).await;
    }
    let claim = args.claim()?;
    let client = claim.as_ref().and_then(|claim| NonZeroU64::new(claim.client()));
    let cluster = context.cluster_as(client, args.io_timeout.map(Duration::from_secs))?;
    let mut volumes = vec![];
    let opened = open_all(&cluster, args, &mut volumes).await;
    let was_opened = opened.is_ok();
    let served = match opened {
        Ok(()) => match exports(&cluster, &volumes).await {
            Ok(exports) => serve_open(context, args, exports, (tls, &volumes), &mut signals).await,
            Err(error) => Err(error),
        },
        Err(error) => Err(error),
    };
    let closed = tokio::select! {
        closed = close_all(&volumes) => closed,
        () = signals.wait() => Err(CliError::new(ErrorKind::Failure, "second signal: the volumes stay attached")),
    };
    match claim {
        Some(claim) if !was_opened => claim.not_attached(),
        Some(claim) if closed.is_ok() => claim.given_back(),
        _ => {}
    }
    served?;
    closed
}

async fn open_all(cluster: &Cluster, args: &ServeArgs, volumes: &mut Vec<Volume>) -> Result<(), CliError> {
    for (i, name) in args.volumes.iter().enumerate() {
        // Opened again, a volume would be taken from ourselves.
        if args.volumes[..i].contains(name) {
            return Err(CliError::new(ErrorKind::Usage, format!("{name} is named twice")));
        }
    }
    for name in &args.volumes {
        volumes.push(open_volume(cluster, name, args.mode(name)).await?);
    }
    Ok(())
}

/// Gives back all, whatever happens to each; the first error counts.
async fn close_all(volumes: &[Volume]) -> Result<(), CliError> {
    let mut result = Ok(());
    for volume in volumes {
        result = result.and(close_volume(volume).await);
    }
    result
}

/// The snapshots of a volume that what is served can be told from, the newest first, each with its context's name.
async fn changed_since(cluster: &Cluster, volume: &Volume) -> Result<Vec<(String, Moment)>, CliError> {
    let path = volume.attach_info().name.path.to_string();
    let list = cluster.mds().list_snapshots(ListSnapshotsRequest { path: path.clone() }).await;
    let mut list = list.map_err(|e| call_failed(&format!("list snapshots of {path}"), &e))?.snapshots;
    list.sort_by_key(|snapshot| std::cmp::Reverse((snapshot.layer, snapshot.seq)));
    let served = volume.attach_info().name.snapshot.as_deref();
    let moments = list.iter().filter(|s| s.ready && Some(s.name.as_str()) != served).map(|snapshot| {
        let moment = Moment { layer: LayerId(snapshot.layer), seq: VolumeSeq(snapshot.seq) };
        (format!("ogee:changed:{}", snapshot.name), moment)
    });
    Ok(moments.filter(|(_, moment)| volume.can_compare(*moment)).take(NBD_CHANGED_CONTEXTS_MAX).collect())
}

async fn exports(cluster: &Cluster, volumes: &[Volume]) -> Result<Vec<Export<Volume>>, CliError> {
    let mut exports = vec![];
    for volume in volumes {
        exports.push(Export {
            name: volume.attach_info().name.to_string(),
            description: format!("Ogee {} {}", volume.attach_info().name, volume.info().serial),
            device: volume.clone(),
            changed_since: changed_since(cluster, volume).await?,
        });
    }
    Ok(exports)
}

fn file_export(path: &Path) -> Result<Export<FileDevice>, CliError> {
    let device = FileDevice::open(path).map_err(|e| CliError::file("open", path, e))?;
    Ok(Export { name: "file".to_owned(), description: "A file, for measurements".to_owned(), device, changed_since: vec![] })
}

/// Serves until a signal; `volumes` are those whose figures `/metrics` has.
async fn serve_open<D: BlockDevice>(
    context: &Context, args: &ServeArgs, exports: Vec<Export<D>>, (tls, volumes): (Option<NbdTls>, &[Volume]), signals: &mut StopSignals,
) -> Result<(), CliError> {
    let mut config = NbdConfig::new(args.places());
    config.connections_max = args.connections;
    config.threads = args.threads.unwrap_or(config.threads);
    config.tls = tls;
    let server = NbdServer::bind(exports.clone(), config).map_err(serve_failed)?;
    let metrics = args.metrics.map(|addr| nbd_metrics::serve(addr, server.stats(), volumes)).transpose()?;
    let at = metrics.as_ref().map(MetricsServer::addr);
    say_ready(context, args, &exports, (&server.tcp_addrs(), at))?;
    drop(exports);
    // From here on a person reads the log; before, an error is one line.
    logging::start_for_daemon();
    args.tls.warn_of_open_addresses(&server.tcp_addrs());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = server.run(async {
        // An error: nobody waits for the server any more.
        let _ = stopped.await;
    });
    let mut running = std::pin::pin!(running);
    tokio::select! {
        ended = &mut running => return ended.map_err(serve_failed),
        () = signals.wait() => {}
    }
    let _ = stop.send(());
    tokio::select! {
        ended = &mut running => ended.map_err(serve_failed),
        () = signals.wait() => {
            Err(CliError::new(ErrorKind::Failure, "second signal: requests in flight are left unanswered"))
        }
    }
}

fn say_ready<D: BlockDevice>(
    context: &Context,
    args: &ServeArgs,
    exports: &[Export<D>],
    (listen, metrics): (&[SocketAddr], Option<SocketAddr>),
) -> Result<(), CliError> {
    // A client finds the socket from its own working directory.
    let socket = args.socket.as_ref().map(|path| std::path::absolute(path).unwrap_or_else(|_| path.clone()));
    let export = |export: &Export<D>| {
        let (name, info) = (export.name.clone(), export.device.info());
        let uris = uris(&name, args.tls.schemes(), socket.as_deref(), listen);
        let contexts = export.changed_since.iter().map(|(name, _)| name.clone()).collect();
        ReadyExport { name, size_bytes: info.size_bytes, read_only: info.read_only, uris, contexts }
    };
    let exports = exports.iter().map(export).collect();
    let ready = Ready { ready: true, socket: socket.clone(), listen: listen.to_vec(), exports, metrics };
    context.out.result(&ready, Ready::text)
}

fn serve_failed(error: ServeError) -> CliError {
    let kind = match &error {
        ServeError::ExportCount { .. }
        | ServeError::ExportTwice { .. }
        | ServeError::ExportName { .. }
        | ServeError::Threads { .. }
        | ServeError::Connections { .. }
        | ServeError::Listen(
            ListenError::NothingInherited
            | ListenError::NotAListener { .. }
            | ListenError::Socket(SocketError::PathTooLong { .. } | SocketError::NotASocket { .. }),
        ) => ErrorKind::Usage,
        ServeError::Listen(ListenError::Socket(SocketError::NoDirectory { .. })) => ErrorKind::NotFound,
        ServeError::Listen(ListenError::Socket(SocketError::InUse { .. })) => ErrorKind::Conflict,
        ServeError::Listen(ListenError::Tcp { source, .. }) if source.kind() == std::io::ErrorKind::AddrInUse => {
            ErrorKind::Conflict
        }
        ServeError::Contexts { .. } | ServeError::Listen(_) | ServeError::Thread(_) | ServeError::NotDrained { .. } => ErrorKind::Failure,
    };
    let advice = "give --socket PATH or --listen ADDR, or start from a systemd socket unit";
    let is_nowhere = matches!(error, ServeError::Listen(ListenError::NothingInherited));
    let error = CliError::caused(kind, "NBD server", error);
    if is_nowhere { CliError::new(kind, format!("{}; {advice}", error.chain())) } else { error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_what_clients_take() {
        let listen = ["127.0.0.1:10809".parse().unwrap(), "[::1]:1".parse().unwrap()];
        let clear = Schemes { unix: "nbd+unix", tcp: "nbd" };
        assert_eq!(
            uris("team/db@v1", clear, Some(Path::new("/run/o&gee/s")), &listen),
            ["nbd+unix:///team/db@v1?socket=/run/o%26gee/s", "nbd://127.0.0.1:10809/team/db@v1", "nbd://[::1]:1/team/db@v1"]
        );
    }
}
