//! `ogee mds`.

use super::{DaemonArgs, detach_if_asked};
use crate::error::{CliError, ErrorKind};
use crate::logging;
use crate::signals::StopSignals;
use ogee_mds::{MdsConfig, PeerConfig};
use std::net::SocketAddr;
use std::path::Path;

/// The line that lets an empty data directory become a member, as `dev_config` writes it.
const BOOTSTRAP: &str = "bootstrap = true";

/// The configuration of MDS `number` (from 1) of a dev cluster whose nodes listen on `all`, for its first start.
///
/// # Errors
/// When it cannot be written as TOML.
pub(crate) fn dev_config(
    number: u32, data: &Path, listen: SocketAddr, metrics: Option<SocketAddr>, all: &[SocketAddr],
) -> Result<String, toml::ser::Error> {
    let peers = (1u32..).zip(all).map(|(id, addr)| PeerConfig { id, addr: *addr }).collect();
    let config = MdsConfig {
        node: number,
        cluster: "dev".to_owned(),
        data_dir: data.to_owned(),
        listen,
        bootstrap: true,
        metrics,
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

    #[test]
    fn the_dev_configuration_is_one_that_an_mds_takes() {
        let addr = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let text = dev_config(2, Path::new("/x/mds-2/data"), addr(2), Some(addr(9)), &[addr(1), addr(2), addr(3)]).expect("written");
        let config: MdsConfig = toml::from_str(&text).expect("read");
        config.validate().expect("valid");
        assert_eq!((config.node, config.listen, config.bootstrap), (2, addr(2), true));
        assert_eq!(config.metrics, Some(addr(9)));
        assert_eq!(config.peers.iter().map(|p| (p.id, p.addr)).collect::<Vec<_>>(), vec![(1, addr(1)), (2, addr(2)), (3, addr(3))]);
        let settled = settled_config(&text).expect("a first start's configuration changes");
        let later: MdsConfig = toml::from_str(&settled).expect("read");
        assert_eq!(later, MdsConfig { bootstrap: false, ..config });
        assert_eq!(settled_config(&settled), None);
    }
}
