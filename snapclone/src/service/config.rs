//! [`SnapcloneConfig`]: what an instance must be told. TOML; an unknown key is an error.
//!
//! Invariant: a configuration that passed [`SnapcloneConfig::validate`] can be run; it reports every problem at once, so that an
//! operator edits the file once. Absent: what to do, which the tasks say.

use super::failure::chain;
use super::listen::ListenAddr;
use crate::error::RepoError;
use crate::place::Place;
use ogee_common::limits::{SERVICE_TASK_CHOICES_MAX, SNAPCLONE_TASKS_MAX};
use ogee_common::name::{NameError, check_name};
use ogee_proto::net::TlsConfig;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Tasks at once unless configured: two cores are busy with them.
const TASKS_DEFAULT: usize = 4;

/// The configuration of one instance.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapcloneConfig {
    /// Addresses of the MDS nodes, `host:port`.
    #[serde(default)]
    pub mds: Vec<String>,
    /// Tasks that are done at once. Default: 4.
    #[serde(default = "default_tasks")]
    pub tasks: usize,
    /// The repositories that this instance reaches; it leaves tasks of others alone.
    #[serde(rename = "repository", default)]
    pub repositories: Vec<RepositoryConfig>,
    /// TLS with other hosts, with a client's certificate; by default none. See [`TlsConfig`].
    #[serde(default)]
    pub tls: Option<TlsConfig>,
    /// The REST API; by default none.
    #[serde(default)]
    pub api: Option<ApiConfig>,
    /// Curve's API; by default none.
    #[serde(default)]
    pub curve: Option<CurveConfig>,
    /// Where `GET /metrics` is answered, for Prometheus: `ip:port`; by default nowhere. It shows no names of volumes and has neither TLS nor tokens.
    #[serde(default)]
    pub metrics: Option<SocketAddr>,
}

/// The REST API.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiConfig {
    /// Where: `ip:port` or `unix:/path`.
    pub listen: ListenAddr,
    /// The tokens file. Without one everybody who can connect is let in, so only this host may be able to.
    #[serde(default)]
    pub tokens: Option<PathBuf>,
    /// A folder with `ca.pem`, `cert.pem` and `key.pem`: TLS 1.3 on TCP. By default none.
    #[serde(default)]
    pub tls_dir: Option<PathBuf>,
}

/// Curve's API, whose clients know neither tokens nor TLS.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CurveConfig {
    /// Where: `ip:port` or `unix:/path`.
    pub listen: ListenAddr,
    /// Whether others than this host may connect, all of whom may then do everything that the API has.
    #[serde(default)]
    pub trust_network: bool,
}

fn default_tasks() -> usize {
    TASKS_DEFAULT
}

/// A repository and the name by which tasks call it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "toml::Table")]
pub struct RepositoryConfig {
    /// Its name, the same in all instances.
    pub name: String,
    /// Where it is.
    pub place: Place,
}

impl TryFrom<toml::Table> for RepositoryConfig {
    type Error = toml::de::Error;

    fn try_from(mut table: toml::Table) -> Result<Self, toml::de::Error> {
        let missing = || <toml::de::Error as serde::de::Error>::custom("a repository needs a name");
        let name = String::deserialize(table.remove("name").ok_or_else(missing)?)?;
        Ok(Self { name, place: Place::deserialize(toml::Value::Table(table))? })
    }
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
#[derive(Debug, thiserror::Error)]
pub enum ConfigProblem {
    /// Nobody to take tasks from.
    #[error("mds: give at least one host:port")]
    NoMds,
    /// Not an address.
    #[error("mds: {0:?} is not an address; write host:port")]
    MdsAddr(String),
    /// None, or more than memory is there for.
    #[error("tasks = {0}: 1 to {SNAPCLONE_TASKS_MAX} are possible")]
    Tasks(usize),
    /// Without a repository there is nothing to do; there is a limit.
    #[error("[[repository]]: {0} are given; 1 to {SERVICE_TASK_CHOICES_MAX} are possible")]
    Repositories(usize),
    /// A malformed name.
    #[error("repository name = {0:?}: {1}")]
    Name(String, NameError),
    /// A name that is used twice.
    #[error("repository name = {0:?} is used twice")]
    Twice(String),
    /// A place that makes no sense.
    #[error("repository {0:?}: {text}", text = chain(.1))]
    Place(String, RepoError),
    /// A relative path.
    #[error("tls.dir = {0:?}: give an absolute path")]
    RelativeTlsDir(PathBuf),
    /// A relative path.
    #[error("{0} = {1:?}: give an absolute path")]
    RelativePath(&'static str, PathBuf),
    /// Everybody could do everything.
    #[error("api.listen = {0}: others can connect, so api.tokens must name a tokens file; or listen on a loopback address or unix:/path")]
    Open(ListenAddr),
    /// Everybody could do everything.
    #[error("curve.listen = {0}: others can connect, and Curve's clients show no tokens; listen on a loopback address or unix:/path, or say curve.trust_network = true")]
    CurveOpen(ListenAddr),
    /// A socket has no TLS.
    #[error("api.tls_dir: a UNIX socket has no TLS")]
    SocketTls,
}

impl SnapcloneConfig {
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

    /// Reads the repositories of a file, for who needs only those; its other keys may be absent.
    ///
    /// # Errors
    /// [`ConfigError`] with everything that is wrong with the repositories.
    pub fn load_repositories(path: &Path) -> Result<Vec<RepositoryConfig>, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|e| ConfigError::Read(e.kind()))?;
        let config: Self = toml::from_str(&text).map_err(|e| ConfigError::Syntax(Box::new(e)))?;
        let problems = config.repository_problems();
        if problems.is_empty() { Ok(config.repositories) } else { Err(ConfigError::Invalid(problems)) }
    }

    /// Checks everything and reports every problem.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with all problems.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut problems = vec![];
        if self.mds.is_empty() {
            problems.push(ConfigProblem::NoMds);
        }
        let is_addr = |a: &str| a.rsplit_once(':').is_some_and(|(h, p)| !h.is_empty() && p.parse::<u16>().is_ok());
        problems.extend(self.mds.iter().filter(|a| !is_addr(a)).cloned().map(ConfigProblem::MdsAddr));
        if self.tasks == 0 || self.tasks > SNAPCLONE_TASKS_MAX {
            problems.push(ConfigProblem::Tasks(self.tasks));
        }
        problems.extend(self.repository_problems());
        if let Some(tls) = self.tls.as_ref().filter(|tls| !tls.dir.is_absolute()) {
            problems.push(ConfigProblem::RelativeTlsDir(tls.dir.clone()));
        }
        self.check_listeners(&mut problems);
        if problems.is_empty() { Ok(()) } else { Err(ConfigError::Invalid(problems)) }
    }

    fn repository_problems(&self) -> Vec<ConfigProblem> {
        let mut problems = vec![];
        if self.repositories.is_empty() || self.repositories.len() > SERVICE_TASK_CHOICES_MAX {
            problems.push(ConfigProblem::Repositories(self.repositories.len()));
        }
        let mut names = BTreeSet::new();
        for repository in &self.repositories {
            let name = repository.name.clone();
            if let Err(e) = check_name(&name) {
                problems.push(ConfigProblem::Name(name.clone(), e));
            }
            if !names.insert(name.clone()) {
                problems.push(ConfigProblem::Twice(name.clone()));
            }
            if let Err(e) = repository.place.backend() {
                problems.push(ConfigProblem::Place(name, e));
            }
        }
        problems
    }

    fn check_listeners(&self, problems: &mut Vec<ConfigProblem>) {
        if let Some(api) = &self.api {
            for (key, path) in [("api.tokens", &api.tokens), ("api.tls_dir", &api.tls_dir)] {
                if let Some(path) = path.as_ref().filter(|path| !path.is_absolute()) {
                    problems.push(ConfigProblem::RelativePath(key, path.clone()));
                }
            }
            if api.tokens.is_none() && !api.listen.is_local() {
                problems.push(ConfigProblem::Open(api.listen.clone()));
            }
            if api.tls_dir.is_some() && matches!(api.listen, ListenAddr::Unix(_)) {
                problems.push(ConfigProblem::SocketTls);
            }
        }
        if let Some(curve) = self.curve.as_ref().filter(|curve| !curve.trust_network && !curve.listen.is_local()) {
            problems.push(ConfigProblem::CurveOpen(curve.listen.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<SnapcloneConfig, ConfigError> {
        let config: SnapcloneConfig = toml::from_str(text).map_err(|e| ConfigError::Syntax(Box::new(e)))?;
        config.validate()?;
        Ok(config)
    }

    #[test]
    fn a_whole_file_is_understood() {
        let text = "mds = [\"10.0.0.1:7000\"]\n[[repository]]\nname = \"main\"\nurl = \"file:///srv/backup\"\nkey_file = \"/etc/key\"\n";
        let config = read(text).expect("a configuration");
        assert_eq!((config.tasks, config.repositories.len()), (4, 1));
        assert_eq!(config.repositories[0].place.key_file, Some("/etc/key".into()));
    }

    #[test]
    fn all_mistakes_are_told_at_once() {
        let text = "mds = [\"nowhere\"]\ntasks = 0\n[[repository]]\nname = \"a b\"\nurl = \"main\"\n\
            [[repository]]\nname = \"x\"\nurl = \"file:///x\"\n[[repository]]\nname = \"x\"\nurl = \"file:///y\"\n[tls]\ndir = \"tls\"\n";
        let error = read(text).expect_err("mistakes").to_string();
        for part in ["nowhere", "tasks = 0", "\"a b\"", "s3://bucket", "used twice", "tls.dir"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        assert!(!error.contains('\n'));
        let error = read("mds = []\n").expect_err("nothing").to_string();
        assert!(error.contains("mds") && error.contains("[[repository]]"), "{error}");
        let unknown = "mds = [\"a:1\"]\n[[repository]]\nname = \"x\"\nurl = \"file:///x\"\ncolour = \"red\"\n";
        assert!(matches!(read(unknown), Err(ConfigError::Syntax(_))));
        assert!(matches!(read("mds = [\"a:1\"]\nport = 1\n"), Err(ConfigError::Syntax(_))));
    }
    #[test]
    fn nobody_is_let_in_from_elsewhere_without_a_token() {
        let with = |more: &str| read(&format!("mds = [\"a:1\"]\n[[repository]]\nname = \"x\"\nurl = \"file:///x\"\n{more}"));
        for fine in [
            "[api]\nlisten = \"127.0.0.1:5556\"\n",
            "[api]\nlisten = \"unix:/run/ogee.sock\"\n",
            "[api]\nlisten = \"0.0.0.0:5556\"\ntokens = \"/etc/ogee/tokens\"\ntls_dir = \"/etc/ogee/tls\"\n",
            "[curve]\nlisten = \"127.0.0.1:5555\"\n",
            "[curve]\nlisten = \"0.0.0.0:5555\"\ntrust_network = true\n",
        ] {
            assert!(with(fine).is_ok(), "{fine}");
        }
        for (bad, part) in [
            ("[api]\nlisten = \"0.0.0.0:5556\"\n", "api.tokens"),
            ("[api]\nlisten = \"[::]:5556\"\n", "api.tokens"),
            ("[api]\nlisten = \"127.0.0.1:5556\"\ntokens = \"tokens\"\n", "absolute"),
            ("[api]\nlisten = \"unix:/a\"\ntls_dir = \"/tls\"\n", "no TLS"),
            ("[api]\nlisten = \"5556\"\n", "no address"),
            ("[curve]\nlisten = \"10.0.0.1:5555\"\n", "trust_network"),
        ] {
            let error = with(bad).expect_err(bad).to_string();
            assert!(error.contains(part) && !error.contains('\n'), "{bad}: {error}");
        }
    }
}
