//! A network of its own for each process: a network and mount namespace per member, joined by a bridge in one more namespace.
//!
//! Used by the director of the torture. Needs root, `unshare`, `nsenter` and `ip`. Invariants: a namespace lives as long as its holder, a
//! process that the kernel kills with this one, so nothing outlives the run, however it ends; a block drops packets in one direction
//! without a word, as a broken network does: the member's neighbour entry for the other points to an address that nobody has.

use crate::deadline::wait_for;
use crate::process::{kill_now, tied};
use anyhow::{Context, Result, ensure};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// The member that has the bridge; it reaches all others.
pub(super) const HUB: &str = "hub";
/// An Ethernet address that nobody has.
const NOBODY: &str = "02:00:00:00:00:01";

#[derive(Debug)]
struct Member {
    name: String,
    addr: Ipv4Addr,
    holder: Child,
}

/// The members and the bridge between them.
#[derive(Debug)]
pub(super) struct Network {
    members: Vec<Member>,
}

/// Runs a command to its end.
///
/// # Errors
/// When it cannot be started or fails; what it said is told.
pub(super) fn run(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} ended with {}: {said}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Network {
    /// Makes the bridge.
    ///
    /// # Errors
    /// When namespaces cannot be made: it needs root.
    pub(super) fn new() -> Result<Self> {
        let mut network = Self { members: vec![] };
        network.hold(HUB, Ipv4Addr::new(10, 77, 0, 254), None).context("make a network namespace (this needs root)")?;
        for arguments in ["link add br0 type bridge", "link set br0 up", "link set lo up", "addr add 10.77.0.254/24 dev br0"] {
            network.ip(HUB, arguments)?;
        }
        Ok(network)
    }

    /// Adds a member; with a disk image, that is mounted on the folder for this member alone.
    ///
    /// # Errors
    /// When namespaces, links or the mount cannot be made.
    pub(super) fn join(&mut self, name: &str, disk: Option<(&Path, &Path)>) -> Result<Ipv4Addr> {
        let number = u8::try_from(self.members.len()).context("too many members")?;
        let addr = Ipv4Addr::new(10, 77, 0, number);
        self.hold(name, addr, disk)?;
        let pid = self.member(name)?.holder.id();
        self.ip(HUB, &format!("link add v{number} type veth peer name eth0 netns {pid}"))?;
        self.ip(HUB, &format!("link set v{number} master br0 up"))?;
        for arguments in ["link set lo up".to_owned(), format!("addr add {addr}/24 dev eth0"), "link set eth0 up".to_owned()] {
            self.ip(name, &arguments)?;
        }
        Ok(addr)
    }

    /// A command that runs `program` as that member and dies with the calling thread.
    ///
    /// # Errors
    /// When there is no such member.
    pub(super) fn command(&self, member: &str, program: &Path) -> Result<Command> {
        let pid = self.member(member)?.holder.id();
        let mut command = tied("nsenter");
        command.arg(format!("--net=/proc/{pid}/ns/net")).arg(format!("--mount=/proc/{pid}/ns/mnt")).arg("--").arg(program);
        Ok(command)
    }

    /// A path of the member's as seen from here.
    ///
    /// # Errors
    /// When there is no such member.
    pub(super) fn path(&self, member: &str, path: &Path) -> Result<PathBuf> {
        let pid = self.member(member)?.holder.id();
        let inside = path.strip_prefix("/").context("an absolute path")?;
        Ok(PathBuf::from(format!("/proc/{pid}/root")).join(inside))
    }

    /// Packets from one member to another get lost.
    ///
    /// # Errors
    /// When `ip` fails.
    pub(super) fn block(&self, from: &str, to: &str) -> Result<()> {
        let addr = self.member(to)?.addr;
        self.ip(from, &format!("neigh replace {addr} lladdr {NOBODY} dev {} nud permanent", device(from)))
    }

    /// Packets arrive again. Fine if they did.
    ///
    /// # Errors
    /// When there is no such member.
    pub(super) fn open(&self, from: &str, to: &str) -> Result<()> {
        let addr = self.member(to)?.addr;
        // It fails when there is no entry, which is what is wanted.
        drop(self.ip(from, &format!("neigh del {addr} dev {}", device(from))));
        Ok(())
    }

    /// Breaks every TCP connection of a member (`ss`, as `ip` of Debian's iproute2).
    ///
    /// # Errors
    /// When there is no such member.
    pub(super) fn reset(&self, member: &str) -> Result<()> {
        run(self.command(member, Path::new("ss"))?.args(["--kill", "--tcp", "state", "established"])).map(drop)
    }

    /// Names of all members but the bridge's.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|m| m.name.as_str()).filter(|name| *name != HUB)
    }

    fn member(&self, name: &str) -> Result<&Member> {
        self.members.iter().find(|m| m.name == name).with_context(|| format!("no member {name} of the network"))
    }

    fn ip(&self, member: &str, arguments: &str) -> Result<()> {
        run(self.command(member, Path::new("ip"))?.args(arguments.split(' '))).map(drop)
    }

    /// Starts the process that holds the namespaces, and waits until they are there.
    fn hold(&mut self, name: &str, addr: Ipv4Addr, disk: Option<(&Path, &Path)>) -> Result<()> {
        let mut command = tied("unshare");
        command.args(["--net", "--mount", "sh", "-c"]);
        match disk {
            None => command.arg("echo ready; exec sleep infinity"),
            Some((image, folder)) => {
                command.arg(r#"mount -o loop "$1" "$2" && echo ready && exec sleep infinity"#).arg("sh").arg(image).arg(folder)
            }
        };
        let mut holder = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().context("start unshare")?;
        let mut said = holder.stdout.take().context("no output of unshare")?;
        self.members.push(Member { name: name.to_owned(), addr, holder });
        let mut word = [0u8; 6];
        std::io::Read::read_exact(&mut said, &mut word).with_context(|| format!("the namespaces of {name} cannot be made; are we root?"))?;
        Ok(())
    }
}

/// The member's network device.
fn device(member: &str) -> &'static str {
    if member == HUB { "br0" } else { "eth0" }
}

impl Drop for Network {
    fn drop(&mut self) {
        for member in &mut self.members {
            kill_now(&mut member.holder);
        }
    }
}

/// Waits until nothing listens or lives behind a child any more.
///
/// # Errors
/// When it takes longer than half a minute.
pub(super) fn wait_gone(pid: u32) -> Result<()> {
    wait_for(&format!("the end of process {pid}"), Duration::from_secs(30), || Ok((!crate::process::is_alive(pid)).then_some(())))
}
