//! A chunkserver falls silent: it is given up, its replicas move by the word of their groups' leaders, and when it comes back
//! it is told to delete what it has. Chunkservers are played by the test.

mod cluster;

use cluster::{Client, Cluster, DEADLINE, registration};
use ogee_common::clock;
use ogee_proto::data::PROTOCOL_MAX;
use ogee_proto::mds::{self as m};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// A chunkserver of the play.
struct Player {
    id: u32,
    uuid: Vec<u8>,
    addr: String,
    /// Copysets and replicas on its disk.
    held: BTreeMap<u32, u64>,
}

#[derive(Default)]
struct Play {
    players: Vec<Player>,
    /// Members of each group as its leader would report them, and learners.
    groups: BTreeMap<u32, (BTreeSet<u64>, BTreeSet<u64>)>,
    silent: Option<u32>,
    /// Copyset and replica that its chunkserver reports as damaged as long as it has it.
    damaged: Option<(u32, u64)>,
    dropped: BTreeSet<(u32, u64)>,
    orders: Vec<m::MoveOrder>,
}

impl Play {
    /// Four chunkservers and a pool of `copysets`, all replicas made.
    async fn start(cluster: &Cluster, copysets: u32) -> (Self, Client) {
        let (_, mut c) = cluster.leader().await;
        let mut play = Self::default();
        for n in 1..=4 {
            let request = registration(n);
            let (uuid, addr) = (request.uuid.to_vec(), request.addr.clone());
            let id = c.register_chunkserver(request).await.expect("register").into_inner().id;
            play.players.push(Player { id, uuid, addr, held: BTreeMap::new() });
        }
        let pool = m::CreatePoolRequest { name: "default".into(), replicas: 3, copysets };
        c.create_pool(pool).await.expect("pool");
        let all = 3 * copysets as usize;
        let held = async |p: &Self, _: &mut Client| p.players.iter().map(|x| x.held.len()).sum::<usize>() == all;
        play.until("all replicas", &mut c, held).await;
        (play, c)
    }

    /// The first player that is there and has the copyset leads it.
    fn leader(&self, copyset: u32) -> u32 {
        let here = self.players.iter().filter(|p| Some(p.id) != self.silent);
        here.filter(|p| p.held.contains_key(&copyset)).map(|p| p.id).min().expect("a host")
    }

    fn failed_of(&self, player: &Player) -> Vec<m::FailedReplica> {
        let here = self.damaged.iter().filter(|(copyset, replica)| player.held.get(copyset) == Some(replica));
        here.map(|(copyset, replica)| m::FailedReplica { copyset: *copyset, replica: *replica, why: "rot".into() }).collect()
    }

    async fn round(&mut self, c: &mut Client) {
        for at in 0..self.players.len() {
            let player = &self.players[at];
            if Some(player.id) == self.silent {
                continue;
            }
            let report = |(copyset, replica): (&u32, &u64)| {
                let (leader, known) = (self.leader(*copyset), self.groups.get(copyset).cloned().unwrap_or_default());
                let (voters, learners) = if leader == player.id { known } else { Default::default() };
                let (copyset, replica) = (*copyset, *replica);
                let (voters, learners) = (voters.into_iter().collect(), learners.into_iter().collect());
                m::CopysetReport { copyset, replica, leader, term: 1, applied: 5, conf_epoch: 0, voters, learners }
            };
            let request = m::HeartbeatRequest {
                chunkserver: player.id,
                uuid: player.uuid.clone().into(),
                addr: player.addr.clone(),
                capacity_bytes: 1 << 40,
                free_bytes: 1 << 39,
                copysets: player.held.iter().map(report).collect(),
                held: player.held.iter().map(|(c, r)| m::HeldReplica { copyset: *c, replica: *r }).collect(),
                failed: self.failed_of(player),
                protocol: PROTOCOL_MAX.into(),
                ..m::HeartbeatRequest::default()
            };
            let reply = c.heartbeat(request).await.expect("an answer").into_inner();
            self.obey(at, reply);
        }
    }

    fn obey(&mut self, at: usize, reply: m::HeartbeatReply) {
        let player = &mut self.players[at];
        for copyset in reply.host {
            for mine in copyset.replicas.iter().filter(|r| r.chunkserver == player.id) {
                if reply.create.contains(&mine.replica) {
                    player.held.insert(copyset.id, mine.replica);
                    let all = copyset.replicas.iter().map(|r| r.replica).collect();
                    self.groups.entry(copyset.id).or_insert((all, BTreeSet::new()));
                }
            }
        }
        // An old replica goes first: then the order to make the new one is obeyed at the next heartbeat.
        let dropped = |j: &m::Join| reply.drop.iter().any(|d| d.copyset == j.copyset);
        for join in reply.join.iter().filter(|j| j.create && !dropped(j)) {
            assert!(player.held.insert(join.copyset, join.replica).is_none(), "two replicas of a copyset on one disk");
        }
        for order in &reply.moves {
            // One step of the change per order, as a real leader does it.
            let (voters, learners) = self.groups.get_mut(&order.copyset).expect("a group");
            let added = order.added.as_ref().expect("who").replica;
            if learners.remove(&added) {
                voters.remove(&order.removed);
                voters.insert(added);
            } else if !voters.contains(&added) {
                learners.insert(added);
            }
        }
        self.orders.extend(reply.moves);
        for gone in reply.drop {
            assert_eq!(player.held.remove(&gone.copyset), Some(gone.replica));
            self.dropped.insert((gone.copyset, gone.replica));
        }
    }

    async fn until(&mut self, what: &str, c: &mut Client, done: impl AsyncFn(&Self, &mut Client) -> bool) {
        let patience = clock::now() + DEADLINE;
        while !done(self, c).await {
            assert!(clock::now() < patience, "waited in vain for {what}");
            self.round(c).await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

async fn out(c: &mut Client, id: u32) -> String {
    let list = c.list_chunkservers(m::Empty {}).await.expect("list").into_inner().chunkservers;
    list.into_iter().find(|s| s.id == id).expect("known").out
}

async fn hosts(c: &mut Client) -> BTreeMap<u32, BTreeSet<u32>> {
    let list = c.list_copysets(m::Empty {}).await.expect("list").into_inner().copysets;
    list.into_iter().map(|c| (c.id, c.replicas.iter().map(|r| r.chunkserver).collect())).collect()
}

#[tokio::test]
async fn a_silent_chunkserver_is_given_up_and_told_to_delete_when_it_is_back() {
    let cluster = Cluster::start(1);
    let (mut play, mut c) = Play::start(&cluster, 8).await;

    let victim = play.players[1].id;
    let old: BTreeSet<(u32, u64)> = play.players[1].held.iter().map(|(c, r)| (*c, *r)).collect();
    play.silent = Some(victim);
    play.until("the silent one to be given up", &mut c, async |_, c| out(c, victim).await == "silent").await;
    play.until("its replicas to move", &mut c, async |_, c| hosts(c).await.values().all(|on| !on.contains(&victim))).await;
    for (copyset, on) in hosts(&mut c).await {
        assert_eq!(on.len(), 3, "copyset {copyset} on {on:?}");
    }
    let moves = c.list_moves(m::Empty {}).await.expect("list").into_inner();
    assert_eq!((moves.moves.len(), moves.waiting), (0, 0));
    assert!(play.orders.iter().all(|o| !o.cancel && old.contains(&(o.copyset, o.removed))), "{:?}", play.orders);
    assert!(play.dropped.is_empty(), "somebody lost a replica: {:?}", play.dropped);
    let status = c.cluster_status(m::Empty {}).await.expect("status").into_inner();
    assert_eq!((status.copysets_degraded, status.moves, status.moves_waiting), (0, 0, 0));

    play.silent = None;
    play.until("its replicas to be deleted", &mut c, async |p, _| p.dropped.len() == old.len()).await;
    assert_eq!(play.dropped, old);
    play.until("it to be taken back", &mut c, async |_, c| out(c, victim).await.is_empty()).await;
}

#[tokio::test]
async fn who_is_given_up_by_a_person_stays_so_and_is_forgotten_when_empty() {
    let cluster = Cluster::start(1);
    let (mut play, mut c) = Play::start(&cluster, 4).await;
    let victim = play.players[2].id;
    let remove = m::RemoveChunkserverRequest { chunkserver: victim };
    assert!(cluster::refused(c.remove_chunkserver(remove).await).1.contains("give it up first"));
    c.set_out(m::SetOutRequest { chunkserver: victim, out: true }).await.expect("out");
    // It is there all the time, leads its groups, and hands everything over.
    play.until("it to be drained", &mut c, async |p, _| p.players[2].held.is_empty()).await;
    assert_eq!(out(&mut c, victim).await, "asked");
    c.remove_chunkserver(remove).await.expect("forgotten");
    assert!(hosts(&mut c).await.values().all(|on| on.len() == 3 && !on.contains(&victim)));
}

#[tokio::test]
async fn a_damaged_replica_is_deleted_and_rebuilt_in_its_place() {
    let cluster = Cluster::start(1);
    let (mut play, mut c) = Play::start(&cluster, 4).await;
    let before = hosts(&mut c).await;
    let (copyset, replica) = play.players[1].held.iter().map(|(c, r)| (*c, *r)).next_back().expect("a replica");
    play.damaged = Some((copyset, replica));
    play.until("the damaged one to go", &mut c, async |p, _| p.dropped.contains(&(copyset, replica))).await;
    play.until("the new one to vote", &mut c, async |p, c| {
        let new = p.players[1].held.get(&copyset).copied();
        let list = c.list_copysets(m::Empty {}).await.expect("list").into_inner().copysets;
        let row = list.into_iter().find(|r| r.id == copyset).expect("known");
        new.is_some_and(|new| new != replica && row.replicas.iter().any(|r| r.replica == new && r.chunkserver == p.players[1].id))
    })
    .await;
    let settled = async |_: &Play, c: &mut Client| c.cluster_status(m::Empty {}).await.expect("status").into_inner().copysets_degraded == 0;
    play.until("nothing to be left", &mut c, settled).await;
    assert_eq!(hosts(&mut c).await, before, "everything is where it was");
    assert_eq!(play.dropped, BTreeSet::from([(copyset, replica)]));
}
