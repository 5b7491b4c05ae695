//! Moves and chunkservers that are given up, by rule.

use super::super::command::{Command, Outcome};
use super::super::row::{CopysetRow, HostedRow, MoveRow, MoveState, OutReason, OutRow};
use super::{Bench, registration};
use crate::refusal::Refusal;
use ogee_common::id::{ChunkserverId, CopysetId, ReplicaId};

const COPYSET: CopysetId = CopysetId(1);
const NEW: ChunkserverId = ChunkserverId(4);

fn bench() -> Bench {
    let mut b = Bench::with_pool(2);
    b.run(Command::RegisterChunkserver(registration(4))).expect("a fourth");
    b
}

fn row(b: &Bench) -> CopysetRow {
    b.read(|tx| Ok(tx.expect(&COPYSET)?))
}

fn moving(b: &Bench) -> Option<MoveRow> {
    b.read(|tx| Ok(tx.get(&COPYSET)?))
}

fn hosted(b: &Bench, id: ChunkserverId) -> bool {
    b.read(|tx| Ok(tx.get::<HostedRow>(&(id, COPYSET))?.is_some()))
}

fn start(b: &mut Bench, removed: ReplicaId, to: ChunkserverId) -> Result<Outcome, Refusal> {
    let conf_epoch = row(b).conf_epoch;
    b.run(Command::StartMove { copyset: COPYSET, conf_epoch, removed, to })
}

#[test]
fn a_move_replaces_one_replica_by_one_with_a_new_id() {
    let mut b = bench();
    let before = row(&b);
    let lost = before.replicas[1];
    start(&mut b, lost.replica, NEW).expect("started");
    assert!(matches!(start(&mut b, before.replicas[0].replica, NEW), Err(Refusal::PlanOutdated)), "one at a time");
    let added = moving(&b).expect("a move").added;
    assert_eq!((added.chunkserver, added.created), (NEW, false));
    assert!(added.replica > before.replicas.iter().map(|r| r.replica).max().expect("three"), "never used before");
    assert_eq!(row(&b), before, "the members are the old ones until the group says otherwise");
    assert!(hosted(&b, NEW) && hosted(&b, lost.chunkserver));
    b.run(Command::ReplicasCreated { replicas: vec![(COPYSET, added.replica)] }).expect("created");
    assert!(moving(&b).expect("a move").added.created);
    let other = ReplicaId(added.replica.0 + 1);
    b.run(Command::FinishMove { copyset: COPYSET, added: other }).expect("of another move: nothing");
    assert_eq!(row(&b), before);
    for _ in 0..2 {
        b.run(Command::FinishMove { copyset: COPYSET, added: added.replica }).expect("finished, or nothing");
        let after = row(&b);
        assert_eq!(after.conf_epoch, before.conf_epoch + 1);
        let ids = |row: &CopysetRow| row.replicas.iter().map(|r| r.replica).collect::<Vec<_>>();
        assert_eq!(ids(&after), vec![before.replicas[0].replica, added.replica, before.replicas[2].replica]);
        assert_eq!(moving(&b), None);
        assert!(hosted(&b, NEW) && !hosted(&b, lost.chunkserver));
    }
}

#[test]
fn a_replica_rebuilt_in_its_place_gets_a_new_id_and_its_chunkserver_keeps_the_copyset() {
    for through in [true, false] {
        let mut b = bench();
        let before = row(&b);
        let failed = before.replicas[1];
        start(&mut b, failed.replica, failed.chunkserver).expect("started");
        let added = moving(&b).expect("a move").added;
        assert!(added.replica > before.replicas.iter().map(|r| r.replica).max().expect("three"), "never used before");
        if through {
            b.run(Command::FinishMove { copyset: COPYSET, added: added.replica }).expect("finished");
            assert_eq!(row(&b).replicas[1].replica, added.replica);
        } else {
            b.run(Command::CancelMove { copyset: COPYSET, added: added.replica }).expect("cancelled");
            b.run(Command::EndMove { copyset: COPYSET, added: added.replica }).expect("ended");
            assert_eq!(row(&b), before);
        }
        assert_eq!(moving(&b), None);
        assert!(hosted(&b, failed.chunkserver), "it has the copyset as before");
    }
}

#[test]
fn a_cancelled_move_ends_as_the_group_decides() {
    for through in [false, true] {
        let mut b = bench();
        let before = row(&b);
        start(&mut b, before.replicas[1].replica, NEW).expect("started");
        let added = moving(&b).expect("a move").added.replica;
        b.run(Command::EndMove { copyset: COPYSET, added }).expect("nothing: it was not cancelled");
        assert!(moving(&b).is_some());
        b.run(Command::CancelMove { copyset: COPYSET, added }).expect("cancelled");
        assert_eq!(moving(&b).expect("a move").state, MoveState::Cancelling);
        let end = if through { Command::FinishMove { copyset: COPYSET, added } } else { Command::EndMove { copyset: COPYSET, added } };
        b.run(end).expect("ended");
        assert_eq!(moving(&b), None);
        assert_eq!((row(&b) == before, hosted(&b, NEW)), (!through, through));
    }
}

#[test]
fn a_move_that_does_not_fit_is_refused() {
    let mut b = bench();
    let replicas = row(&b).replicas;
    let lost = replicas[1].replica;
    let outdated = |result| assert!(matches!(result, Err(Refusal::PlanOutdated)), "{result:?}");
    outdated(start(&mut b, ReplicaId(999), NEW));
    outdated(start(&mut b, lost, replicas[0].chunkserver));
    outdated(b.run(Command::StartMove { copyset: COPYSET, conf_epoch: 9, removed: lost, to: NEW }));
    outdated(b.run(Command::StartMove { copyset: CopysetId(77), conf_epoch: 1, removed: lost, to: NEW }));
    assert!(matches!(start(&mut b, lost, ChunkserverId(9)), Err(Refusal::NoSuchChunkserver(_))));
    let same_zone = super::super::command::Registration { zone: registration(1).zone, ..registration(5) };
    b.run(Command::RegisterChunkserver(same_zone)).expect("a fifth");
    outdated(start(&mut b, lost, ChunkserverId(5)));
    start(&mut b, replicas[0].replica, ChunkserverId(5)).expect("instead of the one in its zone it may");
    b.run(Command::SetOut { chunkserver: NEW, reason: Some(OutReason::Asked) }).expect("out");
    let other = b.run(Command::StartMove { copyset: CopysetId(2), conf_epoch: 1, removed: ReplicaId(5), to: NEW });
    outdated(other);
}

#[test]
fn what_a_person_gave_up_stays_so_and_what_is_empty_can_be_forgotten() {
    let mut b = bench();
    let out = |b: &Bench, id| b.read(|tx| Ok(tx.get::<OutRow>(&id)?.map(|o| o.reason)));
    let set = |b: &mut Bench, chunkserver, reason| b.run(Command::SetOut { chunkserver, reason });
    set(&mut b, NEW, Some(OutReason::Asked)).expect("out");
    set(&mut b, NEW, Some(OutReason::Silent)).expect("out");
    assert_eq!(out(&b, NEW), Some(OutReason::Asked));
    set(&mut b, NEW, None).expect("in");
    assert_eq!(out(&b, NEW), None);
    assert!(matches!(set(&mut b, ChunkserverId(9), None), Err(Refusal::NoSuchChunkserver(_))));
    let remove = |b: &mut Bench, chunkserver| b.run(Command::RemoveChunkserver { chunkserver });
    assert!(matches!(remove(&mut b, NEW), Err(Refusal::ChunkserverInUse { copysets: 0, .. })), "it is in");
    set(&mut b, ChunkserverId(1), Some(OutReason::Silent)).expect("out");
    assert!(matches!(remove(&mut b, ChunkserverId(1)), Err(Refusal::ChunkserverInUse { copysets: 2, .. })));
    set(&mut b, NEW, Some(OutReason::Silent)).expect("out");
    remove(&mut b, NEW).expect("forgotten");
    assert!(matches!(remove(&mut b, NEW), Err(Refusal::NoSuchChunkserver(_))));
    // The same disk is the same chunkserver.
    let again = super::super::command::Registration { id: NEW, ..registration(4) };
    assert!(matches!(b.run(Command::RegisterChunkserver(again)), Ok(Outcome::Registered { id: NEW, .. })));
}
