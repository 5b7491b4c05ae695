//! [`MdsConfig`]: what one MDS node must be told. TOML; an unknown key is an error.
//!
//! Invariant: a configuration that passed [`MdsConfig::validate`] can be run; it reports every problem at once, so that
//! an operator edits the file once. Absent: times of Raft, which have one tested set of values.

use ogee_common::name::{NameError, check_name};
use ogee_proto::net::TlsConfig;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Most nodes of one MDS: five survive two losses.
const NODES_MAX: usize = 5;

/// Less than this is a pause of a busy machine.
const REBUILD_AFTER_SECONDS_MIN: u32 = 3;

/// The configuration of one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MdsConfig {
    /// Number of this node, from 1; fixed for the life of its data directory.
    pub node: u32,
    /// Name of the cluster, the same on all nodes: nodes of other clusters are refused.
    pub cluster: String,
    /// Directory of this node's data, an absolute path. Made if missing.
    pub data_dir: PathBuf,
    /// Where this node listens, for gRPC and for the other nodes' Raft: `ip:port`.
    pub listen: SocketAddr,
    /// Allows an empty data directory to become a member. Set it for a node's first start only: a node that lost its
    /// data must not come back under its old number, because it has forgotten what it promised. Default: false.
    #[serde(default)]
    pub bootstrap: bool,
    /// Where `GET /metrics` is answered, for Prometheus: `ip:port`; by default nowhere. It shows no names of volumes and
    /// asks for no password.
    #[serde(default)]
    pub metrics: Option<SocketAddr>,
    /// A chunkserver that is silent for so many seconds is given up: its replicas are rebuilt on others. Default: 600, at
    /// least 3. A planned restart should be over in less.
    #[serde(default = "default_rebuild_after_seconds")]
    pub rebuild_after_seconds: u32,
    /// TLS with other hosts, for gRPC and for Raft; by default none. See [`TlsConfig`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsConfig>,
    /// All nodes, this one included, the same on all of them. Empty: this node is alone.
    #[serde(default)]
    pub peers: Vec<PeerConfig>,
}

fn default_rebuild_after_seconds() -> u32 {
    600
}

/// A node of the MDS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// Its number.
    pub id: u32,
    /// Where clients, chunkservers and the other nodes reach it.
    pub addr: SocketAddr,
}

/// Why a configuration is of no use.
#[derive(Debug)]
pub enum ConfigError {
    /// The file cannot be read.
    Read(std::io::ErrorKind),
    /// Not TOML, a missing or unknown key, or a value of the wrong kind.
    Syntax(Box<toml::de::Error>),
    /// Keys with values that cannot be.
    Invalid(Vec<ConfigProblem>),
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read(kind) => write!(f, "cannot be read: {kind}"),
            Self::Syntax(e) => f.write_str(&e.to_string().trim().replace('\n', " ")),
            Self::Invalid(problems) => {
                let all: Vec<String> = problems.iter().map(ToString::to_string).collect();
                f.write_str(&all.join("; "))
            }
        }
    }
}

impl std::error::Error for ConfigError {}

/// One wrong value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigProblem {
    /// Node numbers start at 1.
    #[error("node: 0 is not a number of a node")]
    NodeZero,
    /// The cluster's name is malformed.
    #[error("cluster: {0}")]
    Cluster(NameError),
    /// A relative path.
    #[error("data_dir = {0:?}: give an absolute path")]
    RelativeDataDir(PathBuf),
    /// A relative path.
    #[error("tls.dir = {0:?}: give an absolute path")]
    RelativeTlsDir(PathBuf),
    /// Port 0, or a wildcard without peers that say how to reach this node.
    #[error("listen = {0}: give the address and port that others connect to")]
    Listen(SocketAddr),
    /// A moment's silence would move everything.
    #[error("rebuild_after_seconds = {0}: at least {REBUILD_AFTER_SECONDS_MIN}")]
    RebuildAfter(u32),
    /// The number of nodes gives no better majority than one less, or is too large.
    #[error("peers: {0} nodes; 1, 3 or 5 are possible")]
    PeerCount(usize),
    /// A number is used twice, or is 0.
    #[error("peers: number {0} is 0 or used twice")]
    PeerId(u32),
    /// This node is not among the peers.
    #[error("peers: node {0} is missing")]
    OwnMissing(u32),
    /// An address is used twice or nobody can connect to it.
    #[error("peers: address {0} is used twice or is none that others can connect to")]
    PeerAddr(SocketAddr),
}

fn is_reachable(addr: SocketAddr) -> bool {
    addr.port() != 0 && !addr.ip().is_unspecified()
}

impl MdsConfig {
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

    /// Checks everything and reports every problem.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with all problems.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut problems = vec![];
        if self.node == 0 {
            problems.push(ConfigProblem::NodeZero);
        }
        if let Err(e) = check_name(&self.cluster) {
            problems.push(ConfigProblem::Cluster(e));
        }
        if !self.data_dir.is_absolute() {
            problems.push(ConfigProblem::RelativeDataDir(self.data_dir.clone()));
        }
        if let Some(tls) = self.tls.as_ref().filter(|tls| !tls.dir.is_absolute()) {
            problems.push(ConfigProblem::RelativeTlsDir(tls.dir.clone()));
        }
        if self.rebuild_after_seconds < REBUILD_AFTER_SECONDS_MIN {
            problems.push(ConfigProblem::RebuildAfter(self.rebuild_after_seconds));
        }
        if self.listen.port() == 0 || (self.peers.is_empty() && !is_reachable(self.listen)) {
            problems.push(ConfigProblem::Listen(self.listen));
        }
        if !self.peers.is_empty() {
            self.check_peers(&mut problems);
        }
        if problems.is_empty() { Ok(()) } else { Err(ConfigError::Invalid(problems)) }
    }

    fn check_peers(&self, problems: &mut Vec<ConfigProblem>) {
        let count = self.peers.len();
        if count > NODES_MAX || count.is_multiple_of(2) {
            problems.push(ConfigProblem::PeerCount(count));
        }
        let (mut ids, mut addrs) = (BTreeSet::new(), BTreeSet::new());
        for peer in &self.peers {
            if peer.id == 0 || !ids.insert(peer.id) {
                problems.push(ConfigProblem::PeerId(peer.id));
            }
            if !is_reachable(peer.addr) || !addrs.insert(peer.addr) {
                problems.push(ConfigProblem::PeerAddr(peer.addr));
            }
        }
        if !ids.contains(&self.node) {
            problems.push(ConfigProblem::OwnMissing(self.node));
        }
    }

    /// All nodes, this one included.
    pub(crate) fn nodes(&self) -> Vec<PeerConfig> {
        if self.peers.is_empty() {
            return vec![PeerConfig { id: self.node, addr: self.listen }];
        }
        self.peers.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        node = 1
        cluster = "dev"
        data_dir = "/var/lib/ogee/mds"
        listen = "0.0.0.0:7000"

        [[peers]]
        id = 1
        addr = "127.0.0.1:7000"
    "#;

    fn parse(text: &str) -> MdsConfig {
        toml::from_str(text).expect("a configuration")
    }

    fn problems(config: &MdsConfig) -> Vec<ConfigProblem> {
        match config.validate() {
            Err(ConfigError::Invalid(problems)) => problems,
            other => panic!("no problems but {other:?}"),
        }
    }

    #[test]
    fn a_good_file_is_accepted() {
        let config = parse(GOOD);
        config.validate().expect("valid");
        assert!(!config.bootstrap);
        let listen: SocketAddr = "127.0.0.1:7000".parse().expect("address");
        let alone = MdsConfig { peers: vec![], listen, ..config };
        alone.validate().expect("valid");
        assert_eq!(alone.nodes(), vec![PeerConfig { id: 1, addr: listen }]);
    }

    #[test]
    fn files_are_read_and_checked() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("mds.toml");
        assert!(matches!(MdsConfig::load(&path), Err(ConfigError::Read(std::io::ErrorKind::NotFound))));
        std::fs::write(&path, GOOD).expect("write");
        assert_eq!(MdsConfig::load(&path).expect("load"), parse(GOOD));
        std::fs::write(&path, GOOD.replace("node = 1", "node = 0")).expect("write");
        assert!(matches!(MdsConfig::load(&path), Err(ConfigError::Invalid(_))));
        for unknown in [format!("raft = 1\n{GOOD}"), format!("{GOOD}\nzone = 1")] {
            std::fs::write(&path, unknown).expect("write");
            assert!(matches!(MdsConfig::load(&path), Err(ConfigError::Syntax(_))));
        }
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        let any: SocketAddr = "0.0.0.0:0".parse().expect("address");
        let peer = PeerConfig { id: 2, addr: any };
        let (node, data_dir) = (0, PathBuf::from("x"));
        let bad = MdsConfig {
            node,
            cluster: "a b".into(),
            data_dir: data_dir.clone(),
            listen: any,
            peers: vec![peer.clone(), peer],
            ..parse(GOOD)
        };
        let expected = [
            ConfigProblem::NodeZero,
            ConfigProblem::Cluster(NameError::BadCharacter(' ')),
            ConfigProblem::RelativeDataDir(data_dir),
            ConfigProblem::Listen(any),
            ConfigProblem::PeerCount(2),
            ConfigProblem::PeerAddr(any),
            ConfigProblem::PeerId(2),
            ConfigProblem::PeerAddr(any),
            ConfigProblem::OwnMissing(0),
        ];
        assert_eq!(problems(&bad), expected.to_vec());
        let wildcard = MdsConfig { peers: vec![], ..parse(GOOD) };
        assert_eq!(problems(&wildcard), vec![ConfigProblem::Listen(wildcard.listen)]);
    }
}
