//! Configuration of a chunkserver: a TOML file. Unknown keys are errors; [`ChunkserverConfig::validate`] reports
//! everything that is wrong at once.

use ogee_common::name::check_name;
use ogee_proto::net::TlsConfig;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// One chunkserver: one process, one data directory, best one disk.
///
/// ```toml
/// data_dir = "/var/lib/ogee/cs-1"
/// listen = "10.0.0.11:7100"
/// mds = ["10.0.0.1:7000", "10.0.0.2:7000", "10.0.0.3:7000"]
/// zone = "rack-1"
/// host = "node-11"
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkserverConfig {
    /// Where everything is kept. Empty at the first start.
    pub data_dir: PathBuf,
    /// Address of the data protocol, for clients and other chunkservers. Not a wildcard: it is what others connect to.
    pub listen: SocketAddr,
    /// gRPC addresses of the MDS nodes.
    pub mds: Vec<SocketAddr>,
    /// Pool that the disk joins.
    #[serde(default = "default_pool")]
    pub pool: String,
    /// Fault domain: no two replicas of a copyset share a zone.
    pub zone: String,
    /// Host name, for people.
    pub host: String,
    /// Bytes of the disk to use; default: what the file system has.
    #[serde(default)]
    pub capacity_bytes: Option<u64>,
    /// Bytes that stay free: below them writes that need new space are refused (default 1 GiB, or 5 % if less).
    #[serde(default)]
    pub reserve_bytes: Option<u64>,
    /// Megabytes of page metadata kept in memory (default 256; a written TiB has 1 GiB of it).
    #[serde(default = "default_metadata_cache_mib")]
    pub metadata_cache_mib: u32,
    /// Where `GET /metrics` is answered, for Prometheus: `ip:port`; by default nowhere. It shows no names of volumes and
    /// asks for no password.
    #[serde(default)]
    pub metrics: Option<SocketAddr>,
    /// Megabytes per second that replicas on this disk fetch from others while they are rebuilt (default 128); 0: no limit.
    #[serde(default = "default_rebuild_mib_per_second")]
    pub rebuild_mib_per_second: u32,
    /// Hours from the begin of one scrub of all data on this disk to the next (default 168, a week); 0: only when ordered.
    #[serde(default = "default_scrub_interval_hours")]
    pub scrub_interval_hours: u32,
    /// Hours from the begin of one comparison of this disk's records with those of the other replicas to the next (default 24); 0: only with a scrub.
    #[serde(default = "default_compare_interval_hours")]
    pub compare_interval_hours: u32,
    /// Megabytes per second that a scrub reads (default 32); 0: no limit.
    #[serde(default = "default_scrub_mib_per_second")]
    pub scrub_mib_per_second: u32,
    /// Megabytes per second that the copysets led here copy from parents into clones that are flattened (default 32); 0: no limit.
    #[serde(default = "default_flatten_mib_per_second")]
    pub flatten_mib_per_second: u32,
    /// TLS with other hosts, for both planes; by default none. See [`TlsConfig`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsConfig>,
}

fn default_pool() -> String {
    "default".to_owned()
}

fn default_rebuild_mib_per_second() -> u32 {
    u32::try_from(ogee_common::limits::INSTALL_BYTES_PER_SECOND >> 20).unwrap_or(u32::MAX)
}

fn default_scrub_interval_hours() -> u32 {
    7 * 24
}

fn default_compare_interval_hours() -> u32 {
    24
}

fn default_scrub_mib_per_second() -> u32 {
    32
}

fn default_flatten_mib_per_second() -> u32 {
    32
}

fn default_metadata_cache_mib() -> u32 {
    256
}

/// What is wrong with a configuration, all at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConfigError {
    /// The file cannot be read.
    Read(std::io::ErrorKind),
    /// Not TOML, or unknown or missing keys; the text names line and key.
    Syntax(Box<toml::de::Error>),
    /// Keys with values that cannot be.
    Invalid(Vec<ConfigProblem>),
}

/// One wrong value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigProblem {
    /// A wildcard or port 0.
    #[error("listen = \"{0}\": give the address and port that others connect to, not 0.0.0.0, [::] or port 0")]
    Listen(SocketAddr),
    /// No MDS.
    #[error("mds is empty: name at least one MDS address")]
    NoMds,
    /// A name with characters that are not allowed.
    #[error("{key}: {why}")]
    Name {
        /// The key.
        key: &'static str,
        /// What is wrong.
        why: ogee_common::name::NameError,
    },
    /// A relative path.
    #[error("data_dir = {0:?}: give an absolute path")]
    RelativeDataDir(PathBuf),
    /// A relative path.
    #[error("tls.dir = {0:?}: give an absolute path")]
    RelativeTlsDir(PathBuf),
    /// Less than the cache can work with.
    #[error("metadata_cache_mib = {0}: at least 8")]
    CacheTooSmall(u32),
}

impl std::fmt::Display for ConfigError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Read(kind) => write!(f, "cannot be read: {kind}"),
            Self::Syntax(e) => write!(f, "{}", e.to_string().trim().replace('\n', " ")),
            Self::Invalid(problems) => {
                let all: Vec<String> = problems.iter().map(ToString::to_string).collect();
                f.write_str(&all.join("; "))
            }
        }
    }
}

impl std::error::Error for ConfigError {}

impl ChunkserverConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`ConfigError`] with everything that is wrong.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|e| ConfigError::Read(e.kind()))?;
        let config: Self = toml::from_str(&text).map_err(|e| ConfigError::Syntax(Box::new(e)))?;
        config.validate()?;
        Ok(config)
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with all problems.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut problems = vec![];
        if self.listen.ip().is_unspecified() || self.listen.port() == 0 {
            problems.push(ConfigProblem::Listen(self.listen));
        }
        if self.mds.is_empty() {
            problems.push(ConfigProblem::NoMds);
        }
        for (key, value) in [("pool", &self.pool), ("zone", &self.zone), ("host", &self.host)] {
            if let Err(why) = check_name(value) {
                problems.push(ConfigProblem::Name { key, why });
            }
        }
        if !self.data_dir.is_absolute() {
            problems.push(ConfigProblem::RelativeDataDir(self.data_dir.clone()));
        }
        if let Some(tls) = self.tls.as_ref().filter(|tls| !tls.dir.is_absolute()) {
            problems.push(ConfigProblem::RelativeTlsDir(tls.dir.clone()));
        }
        if self.metadata_cache_mib < 8 {
            problems.push(ConfigProblem::CacheTooSmall(self.metadata_cache_mib));
        }
        if problems.is_empty() { Ok(()) } else { Err(ConfigError::Invalid(problems)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        data_dir = "/var/lib/ogee/cs-1"
        listen = "10.0.0.11:7100"
        mds = ["10.0.0.1:7000"]
        zone = "rack-1"
        host = "node-11"
    "#;

    #[test]
    fn a_minimal_file_is_enough() {
        let config: ChunkserverConfig = toml::from_str(GOOD).expect("the example is valid");
        assert_eq!(config.pool, "default");
        assert_eq!(config.validate(), Ok(()));
    }

    #[test]
    fn unknown_keys_are_refused() {
        let text = format!("{GOOD}\nzoen = 1");
        let error = toml::from_str::<ChunkserverConfig>(&text).expect_err("a typo must not pass");
        assert!(error.to_string().contains("zoen"), "{error}");
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let mut config: ChunkserverConfig = toml::from_str(GOOD).expect("valid");
        config.listen = "0.0.0.0:0".parse().expect("an address");
        config.mds.clear();
        config.zone = "a b".to_owned();
        config.data_dir = "x".into();
        config.metadata_cache_mib = 1;
        let Err(ConfigError::Invalid(problems)) = config.validate() else { panic!("must be refused") };
        assert_eq!(problems.len(), 5, "{problems:?}");
    }
}
