//! `ogee status`, `ogee cluster` and `ogee pool`: what the cluster consists of and how it is.

mod moves;

use crate::connect::Context;
use crate::error::CliError;
use crate::names;
use crate::output::{Table, counted};
use crate::sdk_error::call_failed;
use clap::{Args, Subcommand};
use ogee_common::limits::REPLICAS_DEFAULT;
use ogee_common::size::ByteLen;
use ogee_proto::mds as m;
use serde::Serialize;

/// The commands of `ogee cluster`.
#[derive(Debug, Clone, Copy, Subcommand)]
pub(crate) enum ClusterCommand {
    /// The cluster at a glance (the same as: ogee status)
    Status,
    /// Chunkservers: state, place, space
    #[command(after_help = "Example:\n  ogee cluster chunkservers --json")]
    Chunkservers,
    /// Copysets: replicas and leaders, as last reported
    Copysets,
    /// Pools (the same as: ogee pool ls)
    Pools,
    /// Give a chunkserver up: its replicas are rebuilt on others, and it gets no new ones
    #[command(after_help = "Examples:\n  ogee cluster out 4          # its disk is dead: rebuild now, do not wait\n  \
        ogee cluster out 4          # it is well: drain it before it is taken away\n\n\
        The replicas are copied from the others of their copysets. See: ogee cluster moves --watch")]
    Out(ChunkserverArg),
    /// Take a chunkserver back that was given up
    In(ChunkserverArg),
    /// Forget a chunkserver that was given up and has no replicas any more
    #[command(after_help = "Example:\n  ogee cluster rm 4")]
    Rm(ChunkserverArg),
    /// Replicas that are being rebuilt
    #[command(after_help = "Examples:\n  ogee cluster moves\n  ogee cluster moves --watch   # until all is done, with ETA")]
    Moves(MovesArgs),
}

/// A chunkserver.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct ChunkserverArg {
    /// Its id, as in: ogee cluster chunkservers
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    id: u32,
}

/// Arguments of `cluster moves`.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct MovesArgs {
    /// Stay until nothing is left to move
    #[arg(long)]
    watch: bool,
}

/// The commands of `ogee pool`.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum PoolCommand {
    /// Make a pool of the chunkservers that named it in their configuration
    #[command(after_help = "Example:\n  ogee pool create default --replicas 3 --copysets 16")]
    Create(PoolCreateArgs),
    /// List the pools
    Ls,
}

/// Arguments of `pool create`.
#[derive(Debug, Clone, Args)]
pub(crate) struct PoolCreateArgs {
    /// The pool
    #[arg(value_parser = names::plain)]
    name: String,
    /// Replicas of each chunk, each in a zone of its own
    #[arg(long, default_value_t = REPLICAS_DEFAULT)]
    replicas: u32,
    /// Copysets; 0 lets the MDS choose
    #[arg(long, default_value_t = 0)]
    copysets: u32,
}

#[derive(Debug, Clone, Serialize)]
struct MdsView {
    id: u32,
    addr: String,
    leader: bool,
}

/// The cluster at a glance, as programs see it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct StatusView {
    cluster: String,
    mds: Vec<MdsView>,
    term: u64,
    applied: u64,
    volumes: u32,
    copysets: u32,
    copysets_with_leader: u32,
    chunkservers: u32,
    chunkservers_up: u32,
    tasks: u32,
    copysets_degraded: u32,
    moves: u32,
    moves_waiting: u32,
}

impl From<m::ClusterStatusReply> for StatusView {
    fn from(s: m::ClusterStatusReply) -> Self {
        let mds = s.mds.into_iter().map(|p| MdsView { id: p.id, addr: p.addr, leader: p.leader }).collect();
        Self {
            cluster: s.cluster.iter().map(|b| format!("{b:02x}")).collect(),
            mds,
            term: s.term,
            applied: s.applied,
            volumes: s.volumes,
            copysets: s.copysets,
            copysets_with_leader: s.copysets_with_leader,
            chunkservers: s.chunkservers,
            chunkservers_up: s.chunkservers_up,
            tasks: s.tasks,
            copysets_degraded: s.copysets_degraded,
            moves: s.moves,
            moves_waiting: s.moves_waiting,
        }
    }
}

impl StatusView {
    /// Copysets that lack a replica, and what is done about it.
    fn degraded(&self) -> String {
        if self.copysets_degraded == 0 && self.moves + self.moves_waiting == 0 {
            return "none".to_owned();
        }
        format!(
            "{} of {} copysets; {} replicas being rebuilt, {} waiting (ogee cluster moves)",
            self.copysets_degraded, self.copysets, self.moves, self.moves_waiting
        )
    }

    /// As lines for people.
    #[must_use]
    pub(crate) fn text(&self) -> String {
        let mds = |p: &MdsView| format!("{}{}", p.addr, if p.leader { " (leader)" } else { "" });
        let lines = [
            ("cluster", self.cluster.clone()),
            ("mds", self.mds.iter().map(mds).collect::<Vec<_>>().join(", ")),
            ("chunkservers", format!("{} of {} up", self.chunkservers_up, self.chunkservers)),
            ("copysets", format!("{} of {} with a leader", self.copysets_with_leader, self.copysets)),
            ("degraded", self.degraded()),
            ("volumes", self.volumes.to_string()),
            ("tasks", self.tasks.to_string()),
        ];
        lines.map(|(name, value)| format!("{name:<13} {value}")).join("\n")
    }
}

#[derive(Debug, Serialize)]
struct ChunkserverView {
    id: u32,
    addr: String,
    state: String,
    pool: String,
    zone: String,
    host: String,
    capacity_bytes: u64,
    free_bytes: u64,
    copysets: u32,
    leaders: u32,
    silent_ms: u64,
    disk_error: String,
    /// `silent` or `asked` when it is given up, else empty.
    out: String,
}

impl From<m::Chunkserver> for ChunkserverView {
    fn from(c: m::Chunkserver) -> Self {
        Self {
            id: c.id,
            addr: c.addr,
            state: c.state,
            pool: c.pool,
            zone: c.zone,
            host: c.host,
            capacity_bytes: c.capacity_bytes,
            free_bytes: c.free_bytes,
            copysets: c.copysets,
            leaders: c.leaders,
            silent_ms: c.silent_ms,
            disk_error: c.disk_error,
            out: c.out,
        }
    }
}

#[derive(Debug, Serialize)]
struct ReplicaView {
    replica: u64,
    chunkserver: u32,
    addr: String,
}

#[derive(Debug, Serialize)]
struct CopysetView {
    id: u32,
    pool: u32,
    /// Chunkserver that leads, as last reported; 0 when unknown.
    leader: u32,
    term: u64,
    replicas: Vec<ReplicaView>,
}

impl From<m::Copyset> for CopysetView {
    fn from(c: m::Copyset) -> Self {
        let replica = |r: m::Replica| ReplicaView { replica: r.replica, chunkserver: r.chunkserver, addr: r.addr };
        let replicas = c.replicas.into_iter().map(replica).collect();
        Self { id: c.id, pool: c.pool, leader: c.leader, term: c.term, replicas }
    }
}

#[derive(Debug, Serialize)]
struct PoolView {
    id: u32,
    name: String,
    replicas: u32,
    copysets: u32,
    chunkservers: u32,
    zones: u32,
}

impl From<m::Pool> for PoolView {
    fn from(p: m::Pool) -> Self {
        Self {
            id: p.id,
            name: p.name,
            replicas: p.replicas,
            copysets: p.copysets,
            chunkservers: p.chunkservers,
            zones: p.zones,
        }
    }
}

/// Carries out a command of `ogee cluster`.
///
/// # Errors
/// The MDS does not answer.
pub(crate) async fn run(context: &Context, command: ClusterCommand) -> Result<(), CliError> {
    match command {
        ClusterCommand::Status => status(context).await,
        ClusterCommand::Chunkservers => chunkservers(context).await,
        ClusterCommand::Copysets => copysets(context).await,
        ClusterCommand::Pools => run_pool(context, PoolCommand::Ls).await,
        ClusterCommand::Out(ChunkserverArg { id }) => set_out(context, id, true).await,
        ClusterCommand::In(ChunkserverArg { id }) => set_out(context, id, false).await,
        ClusterCommand::Rm(ChunkserverArg { id }) => remove(context, id).await,
        ClusterCommand::Moves(args) => moves::run(context, args.watch).await,
    }
}

/// Carries out `ogee status`.
///
/// # Errors
/// The MDS does not answer.
pub(crate) async fn status(context: &Context) -> Result<(), CliError> {
    let reply = context.mds()?.cluster_status().await.map_err(|e| call_failed("cluster status", &e))?;
    context.out.result(&StatusView::from(reply), StatusView::text)
}

/// Carries out a command of `ogee pool`.
///
/// # Errors
/// What the MDS refused, with the pool's name.
pub(crate) async fn run_pool(context: &Context, command: PoolCommand) -> Result<(), CliError> {
    let mds = context.mds()?;
    match command {
        PoolCommand::Create(args) => {
            let name = args.name;
            let request =
                m::CreatePoolRequest { name: name.clone(), replicas: args.replicas, copysets: args.copysets };
            let reply = mds.create_pool(request).await;
            let pool = reply.map_err(|e| call_failed(&format!("create pool {name}"), &e))?;
            let text = |p: &PoolView| format!("created pool {name} with {} copysets", p.copysets);
            context.out.result(&PoolView::from(pool), text)
        }
        PoolCommand::Ls => {
            let reply = mds.list_pools().await.map_err(|e| call_failed("list pools", &e))?;
            let pools: Vec<PoolView> = reply.pools.into_iter().map(PoolView::from).collect();
            context.out.result(&pools, |pools| {
                let mut table = Table::new(&["NAME", "REPLICAS", "COPYSETS", "CHUNKSERVERS", "ZONES"]);
                for p in pools {
                    table.row([
                        p.name.clone(),
                        p.replicas.to_string(),
                        p.copysets.to_string(),
                        p.chunkservers.to_string(),
                        p.zones.to_string(),
                    ]);
                }
                format!("{table}{}", counted(pools.len(), "pool"))
            })
        }
    }
}

async fn chunkservers(context: &Context) -> Result<(), CliError> {
    let reply = context.mds()?.list_chunkservers().await.map_err(|e| call_failed("list chunkservers", &e))?;
    let list: Vec<ChunkserverView> = reply.chunkservers.into_iter().map(ChunkserverView::from).collect();
    context.out.result(&list, |list| {
        let mut table =
            Table::new(&["ID", "ADDRESS", "STATE", "POOL", "ZONE", "FREE", "CAPACITY", "COPYSETS", "LEADS", "ERROR"]);
        for c in list {
            table.row([
                c.id.to_string(),
                c.addr.clone(),
                if c.out.is_empty() { c.state.clone() } else { format!("{}, out ({})", c.state, c.out) },
                c.pool.clone(),
                c.zone.clone(),
                ByteLen(c.free_bytes).to_string(),
                ByteLen(c.capacity_bytes).to_string(),
                c.copysets.to_string(),
                c.leaders.to_string(),
                c.disk_error.clone(),
            ]);
        }
        format!("{table}{}", counted(list.len(), "chunkserver"))
    })
}

#[derive(Debug, Serialize)]
struct OutView {
    chunkserver: u32,
    out: bool,
}

async fn set_out(context: &Context, id: u32, out: bool) -> Result<(), CliError> {
    let doing = || format!("chunkserver {id}");
    context.mds()?.set_out(m::SetOutRequest { chunkserver: id, out }).await.map_err(|e| call_failed(&doing(), &e))?;
    context.out.result(&OutView { chunkserver: id, out }, |_| {
        if out {
            format!("chunkserver {id} is given up; its replicas are rebuilt elsewhere: ogee cluster moves --watch")
        } else {
            format!("chunkserver {id} is in use again")
        }
    })
}

#[derive(Debug, Serialize)]
struct RemovedView {
    removed: u32,
}

async fn remove(context: &Context, id: u32) -> Result<(), CliError> {
    let removed = context.mds()?.remove_chunkserver(m::RemoveChunkserverRequest { chunkserver: id }).await;
    removed.map_err(|e| call_failed(&format!("remove chunkserver {id}"), &e))?;
    context.out.result(&RemovedView { removed: id }, |_| format!("chunkserver {id} is forgotten"))
}

async fn copysets(context: &Context) -> Result<(), CliError> {
    let reply = context.mds()?.list_copysets().await.map_err(|e| call_failed("list copysets", &e))?;
    let list: Vec<CopysetView> = reply.copysets.into_iter().map(CopysetView::from).collect();
    context.out.result(&list, |list| {
        let mut table = Table::new(&["ID", "LEADER", "TERM", "CHUNKSERVERS"]);
        for c in list {
            let replicas: Vec<String> = c.replicas.iter().map(|r| r.chunkserver.to_string()).collect();
            let leader = if c.leader == 0 { "-".to_owned() } else { c.leader.to_string() };
            table.row([c.id.to_string(), leader, c.term.to_string(), replicas.join(" ")]);
        }
        format!("{table}{}", counted(list.len(), "copyset"))
    })
}
