//! Whether all replicas of all copysets hold the same: versions, page maps, checksums and bytes, asked of each as a replica that installs a
//! Raft snapshot would. To be called when nobody writes.

use anyhow::{Context, Result, bail, ensure};
use ogee_chunkserver::copyset::fetch::{FetchRequest, FetchedRow, ListAnswer, RowsAnswer};
use ogee_chunkserver::store::key::VersionKey;
use ogee_client::Cluster;
use ogee_common::clock;
use ogee_common::id::{ChunkIndex, ConnectionGeneration, SessionId};
use ogee_common::limits::ROWS_PER_CHUNK;
use ogee_proto::data::{HelloHead, Opcode, RaftHead, Role, Status, VERSION};
use ogee_proto::link::Link;
use ogee_proto::mds::{Copyset, Replica};
use ogee_proto::net::Network;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

/// What a replica holds: its rows by version and number.
type Content = BTreeMap<(VersionKey, u8), FetchedRow>;

/// How much was compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compared {
    /// Copysets.
    pub copysets: usize,
    /// Replicas.
    pub replicas: usize,
    /// Rows of 256 pages, of one replica each.
    pub rows: usize,
}

struct Peer {
    link: Link,
    group: u64,
    replica: u64,
}

impl Peer {
    async fn connect(cluster: [u8; 16], copyset: &Copyset, replica: &Replica) -> Result<Self> {
        let hello = HelloHead {
            version_min: u16::from(VERSION),
            version_max: u16::from(VERSION),
            role: Role::Chunkserver,
            // No chunkserver has this number; that this one goes away means nothing to anybody.
            process: u32::MAX,
            target: replica.chunkserver,
            session: SessionId(1),
            generation: ConnectionGeneration(1),
            cluster,
        };
        let addr: SocketAddr = replica.addr.parse().context("a replica's address")?;
        Ok(Self { link: Link::connect(&Network::default(), addr, &hello).await?, group: u64::from(copyset.id), replica: replica.replica })
    }

    async fn fetch(&self, request: FetchRequest) -> Result<bytes::Bytes> {
        let head = RaftHead { group: self.group, target: self.replica, message: request.encode() }.encode();
        let frame = tokio::time::timeout(Duration::from_secs(20), self.link.call(Opcode::FetchPages, &head, Default::default()));
        let frame = frame.await.context("no answer of a replica")??;
        let status = Status::parse(frame.header.status);
        ensure!(status == Status::Ok, "replica {} of copyset {} answered {status:?}", self.replica, self.group);
        Ok(frame.payload())
    }

    /// Everything, and the index it is of; `None` when it changed meanwhile.
    async fn content(&self) -> Result<Option<(u64, Content)>> {
        let (mut content, mut from, mut applied) = (Content::new(), Some(ChunkIndex(0)), None);
        while let Some(begin) = from {
            let list = ListAnswer::decode(&self.fetch(FetchRequest::List { from: begin, to: ChunkIndex(u32::MAX) }).await?)?;
            if *applied.get_or_insert(list.applied) != list.applied {
                return Ok(None);
            }
            for (version, _) in list.columns.values().flat_map(|column| column.versions.iter()) {
                let mut row = 0;
                while u32::from(row) < ROWS_PER_CHUNK {
                    let request = FetchRequest::Rows { version: *version, from_index: 0, from_row: row };
                    let rows = RowsAnswer::decode(&self.fetch(request).await?)?;
                    if rows.gone || Some(rows.applied) != applied {
                        return Ok(None);
                    }
                    ensure!(rows.next_row > row, "replica {} of copyset {} does not go on", self.replica, self.group);
                    row = rows.next_row;
                    content.extend(rows.rows.into_iter().map(|r| ((*version, r.row), r)));
                }
            }
            from = list.next;
        }
        Ok(Some((applied.unwrap_or(0), content)))
    }
}

/// Compares all replicas.
///
/// # Errors
/// The first difference; a replica that does not answer; replicas that are not at the same entry after a minute.
pub async fn compare(cluster: &Cluster) -> Result<Compared> {
    let status = cluster.mds().cluster_status().await?;
    let identity: [u8; 16] = status.cluster.as_ref().try_into().context("the cluster's identity")?;
    let mut compared = Compared::default();
    for mut copyset in cluster.mds().list_copysets().await?.copysets {
        let patience = clock::now() + Duration::from_secs(60);
        let contents = loop {
            match gather(identity, &copyset).await {
                Ok(Some(contents)) => break contents,
                Ok(None) if clock::now() < patience => {}
                Ok(None) => bail!("the replicas of copyset {} do not come to the same entry", copyset.id),
                Err(_) if clock::now() < patience => {}
                Err(error) => return Err(error.context(format!("copyset {}", copyset.id))),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
            // Replicas may have moved.
            let now = cluster.mds().list_copysets().await?.copysets;
            copyset = now.into_iter().find(|c| c.id == copyset.id).context("a copyset is gone")?;
        };
        compared.copysets += 1;
        compared.replicas += contents.len();
        for (replica, content) in copyset.replicas.iter().zip(&contents) {
            compared.rows += content.len();
            differ(&contents[0], content).map_or(Ok(()), |what| {
                let (a, b) = (copyset.replicas[0].chunkserver, replica.chunkserver);
                bail!("copyset {}: chunkservers {a} and {b} differ in {what}", copyset.id)
            })?;
        }
    }
    Ok(compared)
}

/// What the replicas hold, if all are at the same entry.
async fn gather(identity: [u8; 16], copyset: &Copyset) -> Result<Option<Vec<Content>>> {
    let (mut contents, mut applied) = (vec![], None);
    for replica in &copyset.replicas {
        let Some((index, content)) = Peer::connect(identity, copyset, replica).await?.content().await? else { return Ok(None) };
        if *applied.get_or_insert(index) != index {
            return Ok(None);
        }
        contents.push(content);
    }
    Ok(Some(contents))
}

fn differ(a: &Content, b: &Content) -> Option<String> {
    let missing = |x: &Content, y: &Content| x.keys().find(|k| !y.contains_key(k)).copied();
    if let Some((version, row)) = missing(a, b).or(missing(b, a)) {
        return Some(format!("{version:?}, row {row}: only one has it"));
    }
    let other = a.iter().find(|(key, row)| b.get(key) != Some(row));
    other.map(|((version, row), mine)| {
        let theirs = &b[&(*version, *row)];
        let what = if mine.data == theirs.data { "page map or checksums" } else { "data" };
        format!("{version:?}, row {row}: {what}")
    })
}
