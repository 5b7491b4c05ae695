//! Arguments of `ogee bench`, in the words of fio where fio has one.

use super::plan::{Mix, Order, Verb};
use super::procs::Process;
use crate::error::{CliError, ErrorKind};
use clap::{Args, ValueEnum};
use ogee_common::limits::{IO_BYTES_MAX, SECTOR_BYTES};
use ogee_common::name::VolumeRef;
use ogee_common::size::{ByteLen, parse_bytes};
use std::path::PathBuf;
use std::time::Duration;

/// IOs in flight of all jobs together; each costs a buffer.
const IN_FLIGHT_MAX: usize = 65_536;
/// Bytes of all buffers together.
const BUFFER_BYTES_MAX: u64 = 4 << 30;

/// Examples of the help.
pub(crate) const EXAMPLES: &str = "\
Examples:
  ogee volume create b1 --size 16G && ogee bench b1 --rw randwrite --iodepth 32 --size 4G --prefill
  ogee bench b1 --rw randread --bs 4k --iodepth 1 --runtime 30 --json
  ogee bench b1 b2 b3 b4 --rw randrw --rwmixread 70 --iodepth 16 --numjobs 2
  ogee bench b1 --rw write --bs 1M --iodepth 16
  ogee bench b1 --rw randwrite --iodepth 32 --size 1G --verify --runtime 60
  ogee bench --vhost-socket /run/ogee/vm1.sock --num-queues 4 --numjobs 4 --rw randread --iodepth 32
  ogee bench --nbd-socket /run/ogee/nbd.sock --nbd-export vm1 --rw randread --bs 128k --iodepth 16

The volumes' content is overwritten by every load but reads. CPU, memory and bytes written are those of the daemons of
a dev cluster (--dir or ./ogee-dev); for any other cluster name its processes on this machine, and where they show
their metrics: --pids cs-1=4711@127.0.0.1:9100,mds-1=4712. Flushes are told by the chunkservers' metrics.
The report is printed even if IOs failed or data was wrong; the exit code is 1 then.";

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Load {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Random reads.
    Randread,
    /// Random writes.
    Randwrite,
    /// Sequential reads and writes, mixed.
    Rw,
    /// Random reads and writes, mixed.
    Randrw,
    /// Sequential discards.
    Trim,
    /// Random discards.
    Randtrim,
}

impl Load {
    /// As on the command line.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Randread => "randread",
            Self::Randwrite => "randwrite",
            Self::Rw => "rw",
            Self::Randrw => "randrw",
            Self::Trim => "trim",
            Self::Randtrim => "randtrim",
        }
    }

    const fn order(self) -> Order {
        match self {
            Self::Read | Self::Write | Self::Rw | Self::Trim => Order::Sequential,
            Self::Randread | Self::Randwrite | Self::Randrw | Self::Randtrim => Order::Random,
        }
    }

    const fn change(self) -> Verb {
        match self {
            Self::Trim | Self::Randtrim => Verb::Discard,
            _ => Verb::Write,
        }
    }

    /// Whether nothing is changed.
    #[must_use]
    pub(crate) const fn only_reads(self) -> bool {
        matches!(self, Self::Read | Self::Randread)
    }
}

/// Arguments of `ogee bench`.
#[derive(Debug, Clone, Args)]
pub(crate) struct BenchArgs {
    /// The volumes; for loads that only read also snapshots
    #[arg(value_name = "VOLUME[@SNAPSHOT]", value_parser = VolumeRef::parse, required_unless_present_any = ["vhost_socket", "nbd_socket"])]
    pub(crate) volumes: Vec<VolumeRef>,
    /// Load a vhost-user-blk device at this socket instead, of this or another program; needs no cluster
    #[arg(long, value_name = "PATH", conflicts_with_all = ["volumes", "nbd_socket"])]
    pub(crate) vhost_socket: Option<PathBuf>,
    /// Load an NBD export at this UNIX socket instead, of this or another program, over one connection for each job; needs no cluster
    #[arg(long, value_name = "PATH", conflicts_with = "volumes")]
    pub(crate) nbd_socket: Option<PathBuf>,
    /// Name of that export; by default the server's own choice
    #[arg(long, value_name = "NAME", requires = "nbd_socket", default_value = "", hide_default_value = true)]
    pub(crate) nbd_export: String,
    /// Queues of the device; each job has one
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    num_queues: Option<u16>,
    /// What is done
    #[arg(long, value_enum, default_value = "randread")]
    pub(crate) rw: Load,
    /// Reads among 100 IOs of rw and randrw
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub(crate) rwmixread: u32,
    /// Bytes of an IO
    #[arg(long, value_name = "BYTES", default_value = "4k", value_parser = parse_bytes)]
    pub(crate) bs: u64,
    /// IOs in flight of each job
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) iodepth: u32,
    /// Jobs of each volume, each with connections of its own; sequential jobs share the working set among them
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) numjobs: u32,
    /// Threads that the jobs are spread over
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) threads: u16,
    /// Seconds that are measured
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    runtime: u32,
    /// Seconds of load before that, not measured
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    ramp: u32,
    /// Bytes of each volume that are used; by default all from --offset on
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) size: Option<u64>,
    /// First byte that is used
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = parse_bytes)]
    pub(crate) offset: u64,
    /// Flush after so many writes of a job; 0: never (every write is durable by itself)
    #[arg(long, value_name = "WRITES", default_value_t = 0)]
    fsync: u32,
    /// Order of random IO; the same seed gives the same order
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// Write what can be recognised, and check it whenever it is read, and all of it at the end
    #[arg(long)]
    pub(crate) verify: bool,
    /// Write the whole working set once before
    #[arg(long)]
    pub(crate) prefill: bool,
    /// An IO that takes longer has failed, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    io_timeout: u32,
    /// Processes whose CPU, memory and written bytes are reported, with the address of their metrics; chunkservers are
    /// those whose names begin with cs
    #[arg(long, value_name = "NAME=PID[@ADDR]", value_delimiter = ',', value_parser = Process::parse)]
    pub(crate) pids: Vec<Process>,
}

impl BenchArgs {
    /// What the load consists of.
    #[must_use]
    pub(crate) fn mix(&self) -> Mix {
        let read_percent = match self.rw {
            Load::Read | Load::Randread => 100,
            Load::Rw | Load::Randrw => self.rwmixread,
            Load::Write | Load::Randwrite | Load::Trim | Load::Randtrim => 0,
        };
        Mix { order: self.rw.order(), change: self.rw.change(), read_percent, flush_every: self.fsync }
    }

    /// How long the load is measured.
    #[must_use]
    pub(crate) fn runtime(&self) -> Duration {
        Duration::from_secs(self.runtime.into())
    }

    /// How long it runs before that.
    #[must_use]
    pub(crate) fn ramp(&self) -> Duration {
        Duration::from_secs(self.ramp.into())
    }

    /// When an IO has failed.
    #[must_use]
    pub(crate) fn io_timeout(&self) -> Duration {
        Duration::from_secs(self.io_timeout.into())
    }

    /// Queues of a vhost-user-blk device.
    #[must_use]
    pub(crate) fn num_queues(&self) -> u16 {
        self.num_queues.unwrap_or(1)
    }

    /// Whether volumes are opened for reading only.
    #[must_use]
    pub(crate) const fn is_read_only(&self) -> bool {
        self.rw.only_reads() && !self.prefill
    }

    /// Checks what clap cannot.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] with the first thing wrong.
    pub(crate) fn validate(&self) -> Result<(), CliError> {
        let sector = u64::from(SECTOR_BYTES);
        let is_bad_size = self.bs == 0 || self.bs > u64::from(IO_BYTES_MAX) || !self.bs.is_multiple_of(sector);
        let jobs = self.volumes.len().max(1) * self.numjobs as usize;
        let in_flight = jobs.saturating_mul(self.iodepth as usize);
        let buffers = self.bs.saturating_mul(in_flight as u64);
        let twice = self.volumes.iter().enumerate().find(|(i, v)| self.volumes[..*i].contains(v));
        let problem = if is_bad_size {
            format!("--bs {}: a multiple of {sector} up to {} is needed", self.bs, ByteLen(IO_BYTES_MAX.into()))
        } else if !self.offset.is_multiple_of(sector) {
            format!("--offset {}: a multiple of {sector} is needed", self.offset)
        } else if in_flight > IN_FLIGHT_MAX {
            format!("{in_flight} IOs in flight; at most {IN_FLIGHT_MAX} are possible")
        } else if buffers > BUFFER_BYTES_MAX {
            let most = ByteLen(BUFFER_BYTES_MAX);
            format!("{} of buffers for all IOs in flight; at most {most} are possible", ByteLen(buffers))
        } else if let Some((_, volume)) = twice {
            format!("{volume} is named twice; for more load on it use --numjobs")
        } else if self.vhost_socket.is_none() && self.num_queues.is_some() {
            "--num-queues is for --vhost-socket".to_owned()
        } else if self.vhost_socket.is_some() && self.numjobs > self.num_queues().into() {
            format!("{} jobs on {} queues; each job needs one: --num-queues", self.numjobs, self.num_queues())
        } else if self.verify && self.mix().change == Verb::Discard {
            "--verify does not know what a discarded block holds; use a load that writes".to_owned()
        } else if self.verify && self.is_read_only() {
            "--verify of a load that only reads needs --prefill: what others wrote cannot be checked".to_owned()
        } else {
            return Ok(());
        };
        Err(CliError::new(ErrorKind::Usage, problem))
    }
}
