//! `ogee chunkserver`.

use super::{DaemonArgs, DevDaemon, allow_many_files, detach_if_asked};
use crate::error::{CliError, ErrorKind};
use crate::logging;
use crate::signals::StopSignals;
use ogee_chunkserver::ChunkserverConfig;

/// Memory for page metadata of a dev chunkserver: enough for 64 GiB of data, and several run on one machine.
const METADATA_CACHE_MIB: u32 = 64;

/// Of each chunkserver of a dev cluster, as of others by default.
const REBUILD_MIB_PER_SECOND: u32 = 128;

/// As in the configuration's default: a week.
const SCRUB_INTERVAL_HOURS: u32 = 168;
/// As in the configuration's default: a day.
const COMPARE_INTERVAL_HOURS: u32 = 24;
/// As in the configuration's default.
const SCRUB_MIB_PER_SECOND: u32 = 32;
/// As in the configuration's default.
const FLATTEN_MIB_PER_SECOND: u32 = 32;

/// The configuration of chunkserver `number` of a dev cluster: every one is a zone of its own.
///
/// # Errors
/// When it cannot be written as TOML.
pub(crate) fn dev_config(daemon: &DevDaemon<'_>) -> Result<String, toml::ser::Error> {
    let DevDaemon { number, data, listen, metrics, mds, tls } = *daemon;
    let config = ChunkserverConfig {
        data_dir: data.to_owned(),
        listen,
        mds: mds.to_vec(),
        pool: "default".to_owned(),
        zone: format!("zone-{number}"),
        host: format!("dev-{number}"),
        capacity_bytes: None,
        reserve_bytes: None,
        metadata_cache_mib: METADATA_CACHE_MIB,
        rebuild_mib_per_second: REBUILD_MIB_PER_SECOND,
        scrub_interval_hours: SCRUB_INTERVAL_HOURS,
        compare_interval_hours: COMPARE_INTERVAL_HOURS,
        scrub_mib_per_second: SCRUB_MIB_PER_SECOND,
        flatten_mib_per_second: FLATTEN_MIB_PER_SECOND,
        metrics,
        tls: tls.cloned(),
    };
    toml::to_string(&config)
}

/// Runs a chunkserver until SIGINT or SIGTERM, on one current-thread runtime (a request stays on its thread).
///
/// # Errors
/// The configuration is wrong ([`ErrorKind::Usage`]), or the chunkserver does not start or had to stop.
pub(crate) fn run(args: &DaemonArgs) -> Result<(), CliError> {
    detach_if_asked();
    allow_many_files();
    let doing = || format!("chunkserver {}", args.config.display());
    let config = ChunkserverConfig::load(&args.config).map_err(|e| CliError::caused(ErrorKind::Usage, doing(), e))?;
    logging::start_for_daemon();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| CliError::caused(ErrorKind::Failure, "start the runtime", e))?;
    runtime.block_on(async {
        let mut signals = StopSignals::listen()?;
        let shutdown = async move { signals.wait().await };
        let done = Box::pin(ogee_chunkserver::run(config, shutdown)).await;
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
    fn the_dev_configuration_is_one_that_a_chunkserver_takes() {
        let addr = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let tls = TlsConfig { dir: "/x/tls/daemon".into(), loopback: true };
        let text = dev_config(&DevDaemon { number: 2, data: Path::new("/x/cs-2/data"), listen: addr(2), metrics: Some(addr(9)), mds: &[addr(1)], tls: Some(&tls) }).expect("written");
        let config: ChunkserverConfig = toml::from_str(&text).expect("read");
        config.validate().expect("valid");
        assert_eq!((config.zone.as_str(), config.pool.as_str()), ("zone-2", "default"));
        assert_eq!((config.listen, config.mds), (addr(2), vec![addr(1)]));
        assert_eq!((config.metrics, &config.tls), (Some(addr(9)), &Some(tls)));
    }
}
