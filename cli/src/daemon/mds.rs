//! `ogee mds`.

use super::{DaemonArgs, DevDaemon, detach_if_asked};
use crate::error::{CliError, ErrorKind};
use crate::logging;
use crate::signals::StopSignals;
use ogee_mds::{MdsConfig, PeerConfig};

/// A dev cluster gives up a chunkserver that is silent for this long, as others do by default.
const REBUILD_AFTER_SECONDS: u32 = 600;

/// The line that lets an empty data directory become a member, as `dev_config` writes it.
const BOOTSTRAP: &str = "bootstrap = true";

/// The configuration of MDS `number` (from 1) of a dev cluster whose nodes listen on `all`, for its first start.
///
/// # Errors
/// When it cannot be written as TOML.
pub(crate) fn dev_config(daemon: &DevDaemon<'_>) -> Result<String, toml::ser::Error> {
    let DevDaemon { number, data, listen, metrics, mds, tls } = *daemon;
    let peers = (1u32..).zip(mds).map(|(id, addr)| PeerConfig { id, addr: *addr }).collect();
    let config = MdsConfig {
        node: number,
        cluster: "dev".to_owned(),
        data_dir: data.to_owned(),
        listen,
        bootstrap: true,
        metrics,
        rebuild_after_seconds: REBUILD_AFTER_SECONDS,
        tls: tls.cloned(),
        peers,
    };
    toml::to_string(&config)
}

/// The same configuration for every later start: a node that lost its data must not come back as if it were new.
/// `None` when it is that already.
#[must_use]
pub(crate) fn settled_config(text: &str) -> Option<String> {
    let settled = |line: &str| if line.trim() == BOOTSTRAP { "bootstrap = false".to_owned() } else { line.to_owned() };
    let new: Vec<String> = text.lines().map(settled).collect();
    let new = new.join("\n") + "\n";
    (new.trim_end() != text.trim_end()).then_some(new)
}

/// Runs an MDS until SIGINT or SIGTERM, on one current-thread runtime.
///
/// # Errors
/// The configuration is wrong ([`ErrorKind::Usage`]), or the MDS does not start or had to stop.
pub(crate) fn run(args: &DaemonArgs) -> Result<(), CliError> {
    detach_if_asked();
    let doing = || format!("mds {}", args.config.display());
    let config = MdsConfig::load(&args.config).map_err(|e| CliError::caused(ErrorKind::Usage, doing(), e))?;
    logging::start_for_daemon();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| CliError::caused(ErrorKind::Failure, "start the runtime", e))?;
    runtime.block_on(async {
        let mut signals = StopSignals::listen()?;
        let shutdown = async move { signals.wait().await };
        let done = Box::pin(ogee_mds::run(config, shutdown)).await;
        done.map_err(|e| CliError::caused(ErrorKind::Failure, doing(), e))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use ogee_proto::net::TlsConfig;
    use std::net::SocketAddr;
    use std::path::Path;

    #[test]
    fn the_dev_configuration_is_one_that_an_mds_takes() {
        let addr = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let tls = TlsConfig { dir: "/x/tls/daemon".into(), loopback: true };
        let text = dev_config(&DevDaemon { number: 2, data: Path::new("/x/mds-2/data"), listen: addr(2), metrics: Some(addr(9)), mds: &[addr(1), addr(2), addr(3)], tls: Some(&tls) }).expect("written");
        let config: MdsConfig = toml::from_str(&text).expect("read");
        config.validate().expect("valid");
        assert_eq!((config.node, config.listen, config.bootstrap), (2, addr(2), true));
        assert_eq!((config.metrics, &config.tls), (Some(addr(9)), &Some(tls)));
        assert_eq!(config.peers.iter().map(|p| (p.id, p.addr)).collect::<Vec<_>>(), vec![(1, addr(1)), (2, addr(2)), (3, addr(3))]);
        let settled = settled_config(&text).expect("a first start's configuration changes");
        let later: MdsConfig = toml::from_str(&settled).expect("read");
        assert_eq!(later, MdsConfig { bootstrap: false, ..config });
        assert_eq!(settled_config(&settled), None);
    }
}
