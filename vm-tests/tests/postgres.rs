//! PostgreSQL on a mounted volume, under pgbench, through kill -9 of each chunkserver (each leads some of the volume's copysets) and of
//! the NBD server: no transaction fails, the books balance, amcheck, page checksums and e2fsck find nothing.
//!
//! It needs root (loop device, mounts) and PostgreSQL's packages, so it is not part of the gate: `make test-postgres`.

use anyhow::{Context, Result, ensure};
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::console::Console;
use ogee_vm_tests::deadline::wait_for;
use ogee_vm_tests::nbd::{NbdServer, script};
use ogee_vm_tests::process::{kill_now, run, tied, wait_exit};
use ogee_vm_tests::{places, reaper::Reaper};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

/// For whatever must happen: a file system made and a cluster initialised on a busy machine, IO that goes on after a kill.
const PATIENCE: Duration = Duration::from_secs(300);
/// Transactions that must be committed after each fault: more than were under way.
const MORE: u64 = 40;
const CLIENTS: &str = "4";

/// Where PostgreSQL's programs are, the newest version's.
fn programs() -> Result<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for version in std::fs::read_dir("/usr/lib/postgresql").context("PostgreSQL is not installed: apt-get install postgresql")? {
        found.push(version?.path().join("bin"));
    }
    found.retain(|folder| folder.join("pg_amcheck").is_file());
    found.sort();
    found.pop().context("no pg_amcheck below /usr/lib/postgresql")
}

/// A PostgreSQL server on a volume, in namespaces of its own.
struct Postgres {
    child: Child,
    output: Console,
    input: ChildStdin,
    programs: PathBuf,
    folder: Reaper,
}

impl Postgres {
    fn start(socket: &Path, export: &str) -> Result<Self> {
        let folder = places::scratch()?;
        let mut command = tied("unshare");
        command.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc", "bash"]);
        command.arg(script("postgres-on-nbd.sh")).arg(socket).arg(export).arg(folder.path());
        let (reader, writer) = std::io::pipe()?;
        command.stdin(Stdio::piped()).stdout(writer.try_clone()?).stderr(writer);
        let mut child = command.spawn().context("start PostgreSQL's namespaces")?;
        drop(command);
        let mut output = Console::collect("PostgreSQL", reader, &places::logs()?.join("postgres.log"))?;
        let input = child.stdin.take().context("its input is a pipe")?;
        output.expect("ready to accept connections", PATIENCE)?;
        Ok(Self { child, output, input, programs: programs()?, folder })
    }

    fn client(&self, program: &str) -> Command {
        let mut command = tied(self.programs.join(program));
        command.env("PGHOST", self.folder.path().join("run")).env("PGUSER", "postgres").env("PGDATABASE", "postgres").env("LC_ALL", "C");
        command
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = self.client(program);
        command.args(arguments);
        run(command, program, PATIENCE)
    }

    fn ask(&self, query: &str) -> Result<String> {
        let said = self.run("psql", &["--no-psqlrc", "--tuples-only", "--no-align", "--command", query])?;
        Ok(said.trim().to_owned())
    }

    /// Waits until many more transactions are committed than now.
    fn goes_on(&self, bench: &mut Bench) -> Result<()> {
        let committed = || -> Result<u64> { Ok(self.ask("select count(*) from pgbench_history")?.parse()?) };
        let before = committed()?;
        wait_for("further transactions", PATIENCE, || {
            bench.is_well()?;
            Ok((committed()? >= before + MORE).then_some(()))
        })
    }

    /// Ends it, in order, and has everything checked.
    fn finish(mut self) -> Result<()> {
        writeln!(self.input, "stop")?;
        self.output.expect("ALL-CLEAN", PATIENCE)?;
        let status = wait_exit(&mut self.child, "PostgreSQL's namespaces", PATIENCE)?;
        ensure!(status.success(), "they ended with {status}");
        Ok(())
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        kill_now(&mut self.child);
    }
}

/// A pgbench that runs until it is dropped.
struct Bench {
    child: Child,
    said: tempfile::NamedTempFile,
}

impl Bench {
    fn start(postgres: &Postgres) -> Result<Self> {
        let said = tempfile::NamedTempFile::new()?;
        let mut command = postgres.client("pgbench");
        command.args(["--client", CLIENTS, "--no-vacuum", "--time", "86400"]);
        let child = command.stdin(Stdio::null()).stdout(said.reopen()?).stderr(said.reopen()?).spawn().context("start pgbench")?;
        Ok(Self { child, said })
    }

    /// No client of it has met an error.
    fn is_well(&mut self) -> Result<()> {
        let said = std::fs::read_to_string(self.said.path())?;
        let ended = self.child.try_wait()?;
        ensure!(ended.is_none() && !said.contains("abort") && !said.contains("error"), "pgbench, ended {ended:?}: {said}");
        Ok(())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        kill_now(&mut self.child);
    }
}

#[test]
fn postgresql_goes_on_through_killed_chunkservers_and_a_killed_nbd_server() -> Result<()> {
    ensure!(rustix::process::getuid().is_root(), "loop devices and mounts need root: make test-postgres");
    programs()?;
    let mut cluster = Cluster::start("postgres", 3, 1)?;
    cluster.ok(&["volume", "create", "db", "--size", "2G"])?;
    let server = NbdServer::start(&cluster, "postgres-nbd", &["db"])?;
    let postgres = Postgres::start(&cluster.folder().join("postgres-nbd.nbd"), "db")?;
    postgres.run("pgbench", &["--initialize", "--quiet", "--scale", "2"])?;
    let mut bench = Bench::start(&postgres)?;
    postgres.goes_on(&mut bench)?;

    for chunkserver in ["cs-1", "cs-2", "cs-3"] {
        cluster.kill(chunkserver)?;
        postgres.goes_on(&mut bench).with_context(|| format!("after the death of {chunkserver}"))?;
        cluster.revive()?;
        postgres.goes_on(&mut bench).with_context(|| format!("after the return of {chunkserver}"))?;
    }
    server.kill();
    let server = NbdServer::start(&cluster, "postgres-nbd", &["db", "--steal"])?;
    postgres.goes_on(&mut bench).context("after the death of the NBD server")?;
    bench.is_well()?;
    drop(bench);

    let sums = "select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from pgbench_branches), \
        (select sum(tbalance) from pgbench_tellers), (select sum(delta) from pgbench_history), (select count(*) from pgbench_history)";
    let sums = postgres.ask(sums)?;
    let books: Vec<&str> = sums.split('|').collect();
    ensure!(books.len() == 5 && books[1..4].iter().all(|sum| *sum == books[0]), "the books do not balance: {sums}");
    postgres.run("pg_amcheck", &["--install-missing", "--heapallindexed", "--parent-check"])?;
    eprintln!("{} transactions on a volume through seven faults; amcheck found nothing", books[4]);
    postgres.finish()?;
    server.stop()?;
    cluster.shut_down()
}
