//! Group snapshots with several scripted clients: nobody is let go before the cut is made, and a cut is made whole,
//! under every hold, or not at all.

mod cluster;

use cluster::{Client, Cluster, Fleet, GIB, allocate, attach, create, kind, now, poll, refused, snapshot_of, watch};
use ogee_common::limits::{HOLD_TIMEOUT, SNAPSHOT_GROUP_VOLUMES_MAX};
use ogee_proto::MdsErrorKind;
use ogee_proto::mds::attach_event::Event;
use ogee_proto::mds::{self as m, AttachState};
use std::time::Duration;
use tokio::task::JoinHandle;
use tonic::{Response, Status, Streaming};

/// Long enough for an event that is on its way to arrive; used only to see that none is.
const QUIET: Duration = Duration::from_millis(300);

/// An attached client that does what the test says.
struct Scripted {
    c: Client,
    path: String,
    client: u64,
    grant: m::AttachGrant,
    stream: Streaming<m::AttachEvent>,
    seq: u64,
}

async fn event(stream: &mut Streaming<m::AttachEvent>) -> Option<Event> {
    let message = tokio::time::timeout(cluster::DEADLINE, stream.message()).await.expect("an event in time");
    message.ok().flatten().and_then(|e| e.event)
}

impl Scripted {
    async fn attach(c: &Client, path: &str, client: u64) -> Self {
        let mut c = c.clone();
        let grant = c.attach_volume(attach(path, client, false)).await.expect("attach").into_inner();
        let mut stream = c.watch_attach(watch(&grant, client)).await.expect("watch").into_inner();
        let Some(Event::State(state)) = event(&mut stream).await else { panic!("no state") };
        Self { c, path: path.into(), client, grant, stream, seq: state.seq }
    }

    fn volume(&self) -> u64 {
        self.grant.volume.as_ref().expect("volume").id
    }

    async fn hold(&mut self) -> u64 {
        match event(&mut self.stream).await {
            Some(Event::Hold(token)) => token,
            other => panic!("{}: no hold but {other:?}", self.path),
        }
    }

    async fn ack(&mut self, token: u64) -> Result<Response<m::Empty>, Status> {
        self.c.ack_hold(m::AckHoldRequest { volume: self.volume(), epoch: self.grant.epoch, token }).await
    }

    /// Nothing is said to the client, which so holds on.
    async fn still_holds(&mut self) {
        let said = tokio::time::timeout(QUIET, self.stream.message()).await;
        assert!(said.is_err(), "{}: {said:?}", self.path);
    }

    /// Waits until it is let go, with a higher seq.
    async fn let_go(&mut self) {
        match event(&mut self.stream).await {
            Some(Event::State(AttachState { seq, .. })) => {
                assert!(seq > self.seq, "{}: let go with the old seq {seq}", self.path);
                self.seq = seq;
            }
            other => panic!("{}: not let go but {other:?}", self.path),
        }
    }

    async fn come_back(&mut self) {
        self.stream = self.c.watch_attach(watch(&self.grant, self.client)).await.expect("watch").into_inner();
        let Some(Event::State(state)) = event(&mut self.stream).await else { panic!("no state") };
        self.seq = state.seq;
    }
}

/// A client that holds whenever it is asked to, until its task is ended.
fn obliging(mut client: Scripted) -> JoinHandle<()> {
    tokio::spawn(async move {
        loop {
            match event(&mut client.stream).await {
                // A refusal means that the hold was given up meanwhile.
                Some(Event::Hold(token)) => drop(client.ack(token).await),
                Some(_) => {}
                None => return,
            }
        }
    })
}

fn group_of(members: &[(&str, &str)]) -> m::CreateSnapshotGroupRequest {
    let members = members.iter().map(|(path, name)| snapshot_of(path, name)).collect();
    m::CreateSnapshotGroupRequest { members }
}

/// Members, the refusal, and words of it.
type Case<'a> = (&'a [(&'a str, &'a str)], MdsErrorKind, &'a str);
type Taken = JoinHandle<Result<Response<m::SnapshotGroup>, Status>>;

fn take(c: &Client, members: &[(&str, &str)]) -> Taken {
    let (mut c, request) = (c.clone(), group_of(members));
    tokio::spawn(async move { c.create_snapshot_group(request).await })
}

async fn names(c: &Client, path: &str) -> Vec<(String, u64, bool)> {
    let list = c.clone().list_snapshots(m::ListSnapshotsRequest { path: path.into() }).await.expect("list");
    list.into_inner().snapshots.into_iter().map(|s| (s.name, s.group, s.ready)).collect()
}

async fn started(count: u32) -> (Cluster, Fleet, Client) {
    let cluster = Cluster::start(count);
    let fleet = Fleet::start(&cluster, 4).await;
    let (_, mut c) = cluster.leader().await;
    for path in ["a", "b", "c"] {
        c.create_volume(create(path, 4 * GIB)).await.expect("create");
    }
    (cluster, fleet, c)
}

#[tokio::test]
async fn nobody_is_let_go_before_all_hold() {
    let (_cluster, _fleet, c) = started(1).await;
    let (mut a, mut b) = (Scripted::attach(&c, "a", 1).await, Scripted::attach(&c, "b", 2).await);
    let taken = take(&c, &[("b", "s"), ("a", "s"), ("c", "other")]);
    let (of_a, of_b) = (a.hold().await, b.hold().await);
    a.ack(of_a).await.expect("ack");
    a.still_holds().await;
    assert!(names(&c, "a").await.is_empty(), "nothing is committed before the last client holds");
    b.ack(of_b).await.expect("ack");
    a.let_go().await;
    b.let_go().await;
    let group = taken.await.expect("task").expect("group").into_inner();
    let made: Vec<_> = group.snapshots.iter().map(|s| (&s.volume_path[..], &s.name[..], &s.hold[..], s.ready)).collect();
    assert_eq!(made, [("b", "s", "held", true), ("a", "s", "held", true), ("c", "other", "detached", true)]);
    assert!(group.group != 0);
    for (path, name) in [("a", "s"), ("b", "s"), ("c", "other")] {
        assert_eq!(names(&c, path).await, [(name.to_owned(), group.group, true)]);
    }
    c.clone().create_snapshot(snapshot_of("c", "alone")).await.expect("snapshot");
    assert_eq!(names(&c, "c").await[1], ("alone".to_owned(), 0, true));
}

#[tokio::test]
async fn what_is_asked_for_is_checked_and_nothing_is_made_in_part() {
    let (_cluster, _fleet, mut c) = started(1).await;
    c.create_snapshot(snapshot_of("b", "taken")).await.expect("snapshot");
    let mut a = Scripted::attach(&c, "a", 1).await;
    let cases: [Case<'_>; 6] = [
        (&[], MdsErrorKind::InvalidArgument, "at least one volume"),
        (&[("a", "s"), ("/a", "t")], MdsErrorKind::InvalidArgument, "\"a\" is named twice"),
        (&[("a", "s"), ("nothing", "s")], MdsErrorKind::NotFound, "\"nothing\""),
        (&[("a", "s"), ("b", ".s")], MdsErrorKind::InvalidArgument, "dot"),
        (&[("a", "s"), ("b//", "s")], MdsErrorKind::InvalidArgument, "path"),
        (&[("c", "s"), ("b", "taken")], MdsErrorKind::AlreadyExists, "\"b\" has a snapshot \"taken\""),
    ];
    for (members, expected, text) in cases {
        let (why, said) = refused(c.create_snapshot_group(group_of(members)).await);
        assert!(why == expected && said.contains(text), "{members:?}: {why:?} {said}");
    }
    let many: Vec<String> = (0..=SNAPSHOT_GROUP_VOLUMES_MAX).map(|n| format!("v{n}")).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|path| (&path[..], "s")).collect();
    let (why, said) = refused(c.create_snapshot_group(group_of(&many)).await);
    assert!(why == MdsErrorKind::Limit && said.contains("64 volumes"), "{said}");
    // Refused after the hold: the client is let go, with the seq it had.
    let taken = take(&c, &[("a", "s"), ("b", "taken")]);
    let token = a.hold().await;
    a.ack(token).await.expect("ack");
    assert!(matches!(event(&mut a.stream).await, Some(Event::State(AttachState { seq: 1, .. }))));
    let (why, _) = refused(taken.await.expect("task"));
    assert_eq!(why, MdsErrorKind::AlreadyExists);
    assert!(names(&c, "a").await.is_empty() && names(&c, "c").await.is_empty());
}

#[tokio::test]
async fn one_client_that_does_not_answer_is_sealed_off_while_the_others_hold() {
    let (_cluster, fleet, mut c) = started(1).await;
    let (mut a, mut b) = (Scripted::attach(&c, "a", 1).await, Scripted::attach(&c, "b", 2).await);
    c.allocate_segment(allocate(&a.grant, 0)).await.expect("allocate");
    fleet.stick(true);
    let began = now();
    let taken = take(&c, &[("a", "s"), ("b", "s")]);
    let (_, of_b) = (a.hold().await, b.hold().await);
    b.ack(of_b).await.expect("ack");
    a.let_go().await;
    assert!(began.elapsed() >= HOLD_TIMEOUT);
    b.still_holds().await;
    assert!(names(&c, "b").await.is_empty(), "not yet a snapshot");
    fleet.stick(false);
    b.let_go().await;
    let group = taken.await.expect("task").expect("group").into_inner();
    let made: Vec<_> = group.snapshots.iter().map(|s| (&s.hold[..], s.ready)).collect();
    assert_eq!(made, [("bypassed", true), ("held", true)]);
    assert!(fleet.done(a.grant.layer).contains(&m::layer_task::Kind::Seal(2)));
}

#[tokio::test]
async fn a_group_that_cannot_be_sealed_in_time_is_given_up_and_leaves_nothing() {
    let (_cluster, fleet, mut c) = started(1).await;
    let (mut a, mut b) = (Scripted::attach(&c, "a", 1).await, Scripted::attach(&c, "b", 2).await);
    c.allocate_segment(allocate(&a.grant, 0)).await.expect("allocate");
    fleet.stick(true);
    let taken = take(&c, &[("a", "s"), ("b", "s")]);
    let (_, of_b) = (a.hold().await, b.hold().await);
    b.ack(of_b).await.expect("ack");
    // Without being asked: before the client would ask another node, which lets it go too.
    b.let_go().await;
    let (why, said) = refused(taken.await.expect("task"));
    assert!(why == MdsErrorKind::Unavailable && said.contains("sealing off"), "{said}");
    fleet.stick(false);
    assert!(names(&c, "a").await.is_empty() && names(&c, "b").await.is_empty());
    // The names are free, and the next group is not disturbed by what is left to do of the first.
    let (a, b) = (obliging(a), obliging(b));
    let group = c.create_snapshot_group(group_of(&[("a", "s"), ("b", "s")])).await.expect("group").into_inner();
    assert!(group.snapshots.iter().all(|s| s.seq == 2));
    a.abort();
    b.abort();
}

#[tokio::test]
async fn two_clients_that_do_not_answer_are_named() {
    let (_cluster, _fleet, c) = started(1).await;
    let (mut a, mut b) = (Scripted::attach(&c, "a", 1).await, Scripted::attach(&c, "b", 2).await);
    let mut third = Scripted::attach(&c, "c", 3).await;
    let taken = take(&c, &[("a", "s"), ("b", "s"), ("c", "s")]);
    let token = third.hold().await;
    third.ack(token).await.expect("ack");
    let (why, said) = refused(taken.await.expect("task"));
    assert!(why == MdsErrorKind::InUse && said.contains("the clients of \"a\", \"b\" do not answer"), "{said}");
    for client in [&mut a, &mut b] {
        client.hold().await;
    }
    for client in [&mut a, &mut b, &mut third] {
        assert!(matches!(event(&mut client.stream).await, Some(Event::State(AttachState { seq: 1, .. }))));
        assert!(names(&c, &client.path).await.is_empty());
    }
}

#[tokio::test]
async fn a_client_that_comes_back_during_the_hold_starts_the_group_again() {
    let (_cluster, _fleet, c) = started(1).await;
    let (mut a, mut b) = (Scripted::attach(&c, "a", 1).await, Scripted::attach(&c, "b", 2).await);
    let taken = take(&c, &[("a", "s"), ("b", "s")]);
    let (of_a, of_b) = (a.hold().await, b.hold().await);
    a.ack(of_a).await.expect("ack");
    // Its new stream lets it go with the old seq: what was acknowledged counts no more.
    a.come_back().await;
    assert_eq!(a.seq, 1);
    b.ack(of_b).await.expect("ack");
    a.let_go().await;
    b.let_go().await;
    for client in [&mut a, &mut b] {
        let token = client.hold().await;
        client.ack(token).await.expect("ack");
    }
    let group = taken.await.expect("task").expect("group").into_inner();
    assert!(group.snapshots.iter().all(|s| s.seq == 2), "{group:?}");
    // The first try left nothing but seals, for its seq may be known to nobody.
    poll("the snapshots to be ready", || async {
        (names(&c, "a").await == [("s".to_owned(), group.group, true)]
            && names(&c, "b").await == [("s".to_owned(), group.group, true)])
        .then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_attach_or_detach_during_the_hold_starts_the_group_again() {
    let (_cluster, _fleet, mut c) = started(1).await;
    let (mut a, mut b) = (Scripted::attach(&c, "a", 1).await, Scripted::attach(&c, "b", 2).await);
    let taken = take(&c, &[("a", "s"), ("b", "s"), ("c", "s")]);
    let (of_a, of_b) = (a.hold().await, b.hold().await);
    let detach = m::DetachVolumeRequest { volume: b.volume(), epoch: b.grant.epoch, unclean: false };
    c.detach_volume(detach).await.expect("detach");
    assert_eq!(refused(b.ack(of_b).await).0, MdsErrorKind::NotFound, "its hold is over");
    let mut third = Scripted::attach(&c, "c", 3).await;
    a.ack(of_a).await.expect("ack");
    assert!(matches!(event(&mut a.stream).await, Some(Event::State(_))), "let go: the volumes changed");
    for client in [&mut a, &mut third] {
        let token = client.hold().await;
        client.ack(token).await.expect("ack");
    }
    let group = taken.await.expect("task").expect("group").into_inner();
    let holds: Vec<_> = group.snapshots.iter().map(|s| &s.hold[..]).collect();
    assert_eq!(holds, ["held", "detached", "held"]);
}

#[tokio::test]
async fn a_volume_that_is_deleted_during_the_hold_is_named() {
    let (_cluster, _fleet, mut c) = started(1).await;
    let mut a = Scripted::attach(&c, "a", 1).await;
    let taken = take(&c, &[("a", "s"), ("c", "s")]);
    let token = a.hold().await;
    c.delete_volume(m::DeleteVolumeRequest { path: "c".into(), owner: String::new() }).await.expect("delete");
    a.ack(token).await.expect("ack");
    assert!(matches!(event(&mut a.stream).await, Some(Event::State(AttachState { seq: 1, .. }))));
    let (why, said) = refused(taken.await.expect("task"));
    assert!(why == MdsErrorKind::NotFound && said.contains("no volume \"c\""), "{said}");
    assert!(names(&c, "a").await.is_empty());
}

#[tokio::test]
async fn groups_in_every_order_singles_and_rollbacks_end() {
    let (_cluster, _fleet, mut c) = started(1).await;
    c.create_snapshot(snapshot_of("c", "base")).await.expect("snapshot");
    let clients = [obliging(Scripted::attach(&c, "a", 1).await), obliging(Scripted::attach(&c, "b", 2).await)];
    let mut calls = vec![];
    for n in 0..8 {
        for order in [["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"]] {
            let name = format!("g{n}{}", order[0]);
            calls.push(take(&c, &order.map(|path| (path, &name[..]))));
        }
        let (mut single, mut back) = (c.clone(), c.clone());
        calls.push(tokio::spawn(async move {
            single.create_snapshot(snapshot_of("b", &format!("single{n}"))).await.expect("snapshot");
            let rollback = m::RollbackVolumeRequest { path: "c".into(), snapshot: "base".into(), detach: true };
            back.rollback_volume(rollback).await.expect("rollback");
            Ok(Response::new(m::SnapshotGroup::default()))
        }));
    }
    for call in calls {
        let done = tokio::time::timeout(cluster::DEADLINE, call).await.expect("no deadlock").expect("task");
        assert!(done.expect("group").into_inner().snapshots.iter().all(|s| s.ready));
    }
    assert_eq!(names(&c, "a").await.len(), 24);
    assert_eq!(names(&c, "b").await.len(), 32);
    clients.iter().for_each(JoinHandle::abort);
}

#[tokio::test]
async fn a_repeated_request_makes_no_second_group() {
    let (_cluster, _fleet, mut c) = started(1).await;
    let request = group_of(&[("a", "s"), ("b", "s")]);
    let (mut other, same) = (c.clone(), request.clone());
    let (one, two) = tokio::join!(c.create_snapshot_group(request), other.create_snapshot_group(same));
    let (made, refusal) = if one.is_ok() { (one, two) } else { (two, one) };
    let group = made.expect("one of them").into_inner().group;
    assert_eq!(refused(refusal).0, MdsErrorKind::AlreadyExists);
    assert_eq!(names(&c, "b").await, [("s".to_owned(), group, true)]);
}

#[tokio::test]
async fn a_leader_that_dies_during_the_hold_leaves_all_or_nothing() {
    let (mut cluster, _fleet, _) = started(3).await;
    for (round, acknowledged) in [(0, false), (1, true), (2, true)] {
        let name = format!("s{round}");
        let (leader, c) = cluster.leader().await;
        let steal = |path: &str, client| m::AttachVolumeRequest { steal: true, ..attach(path, client, true) };
        let mut clients = vec![];
        for (path, client) in [("a", 1), ("b", 2)] {
            let mut c = c.clone();
            c.attach_volume(steal(path, client)).await.expect("attach");
            clients.push(Scripted::attach(&c, path, client).await);
        }
        let taken = take(&c, &[("a", &name), ("b", &name)]);
        for client in &mut clients {
            let token = client.hold().await;
            if acknowledged {
                client.ack(token).await.expect("ack");
            }
        }
        // With every acknowledgement given, the commit and the confirmation are on their way.
        cluster.nodes[leader].kill();
        let answer = taken.await.expect("task");
        let (_, c) = cluster.leader().await;
        for client in &mut clients {
            client.c = c.clone();
            client.come_back().await;
        }
        let clients: Vec<_> = clients.into_iter().map(obliging).collect();
        // As the SDK does: again, until there is an answer.
        let again = poll("the group", || {
            let (mut c, request) = (c.clone(), group_of(&[("a", &name), ("b", &name)]));
            async move {
                match c.create_snapshot_group(request).await {
                    Ok(_) => Some(true),
                    Err(e) if kind(&e) == Some(MdsErrorKind::AlreadyExists) => Some(false),
                    Err(_) => None,
                }
            }
        })
        .await;
        let of = |list: Vec<(String, u64, bool)>| list.into_iter().find(|(n, _, _)| *n == name).map(|(_, group, _)| group);
        let (a, b) = (of(names(&c, "a").await), of(names(&c, "b").await));
        assert!(a.is_some() && a == b, "one group: {a:?} {b:?}");
        assert!(answer.is_err() || !again, "what was answered was made once");
        clients.iter().for_each(JoinHandle::abort);
        cluster.restart(leader);
    }
}
