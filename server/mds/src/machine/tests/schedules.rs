//! Schedules: each due time makes one task at most, whatever leaders with whatever clocks propose how often.

use super::super::command::{Command, Envelope};
use super::super::row::{OpenServiceTaskRow, ScheduleRow, ServiceTaskRow};
use super::super::schedules::{self, ScheduleCommand};
use super::super::service_tasks::ServiceTaskCommand;
use super::Bench;
use ogee_common::id::ServiceTaskId;
use ogee_proto::MdsErrorKind as Kind;
use proptest::prelude::*;
use std::collections::BTreeSet;

const EVERY: u64 = 100;

fn at(bench: &mut Bench, now_unix_ms: u64, command: ScheduleCommand) -> Result<(), Kind> {
    let envelope = Envelope { now_unix_ms, request: None, command: Command::Schedule(command) };
    bench.apply(&envelope).map(drop).map_err(|r| r.kind())
}

fn set(bench: &mut Bench, now: u64, every_ms: u64) {
    let (name, kind, repository, arguments) = ("a".into(), "backup".into(), "main".into(), "{}".into());
    at(bench, now, ScheduleCommand::Set { name, kind, repository, arguments, every_ms }).expect("set");
}

fn due(bench: &Bench, now: u64) -> Option<u64> {
    bench.read(|tx| {
        let row: ScheduleRow = tx.expect(&"a".to_owned())?;
        schedules::due(tx, &row, now)
    })
}

fn run(bench: &mut Bench, now: u64, due_unix_ms: u64) {
    at(bench, now, ScheduleCommand::Run { name: "a".into(), due_unix_ms }).expect("run");
}

fn made(bench: &Bench) -> usize {
    bench.read(|tx| Ok(tx.scan::<ServiceTaskRow>(&(), None, 1000)?)).len()
}

/// Ends every task.
fn end_all(bench: &mut Bench) {
    for (task, OpenServiceTaskRow) in bench.read(|tx| Ok(tx.scan::<OpenServiceTaskRow>(&(), None, 1000)?)) {
        bench.run(Command::ServiceTask(ServiceTaskCommand::Cancel { task })).expect("cancelled");
    }
}

#[test]
fn the_first_task_is_made_at_the_next_due_time_and_none_while_one_is_open() {
    let mut bench = Bench::empty();
    set(&mut bench, 1050, EVERY);
    assert_eq!((due(&bench, 1099), due(&bench, 1100), due(&bench, 1199)), (None, Some(1100), Some(1100)));
    run(&mut bench, 1100, 1100);
    run(&mut bench, 1101, 1100);
    assert_eq!((made(&bench), due(&bench, 1250)), (1, None), "the task has not ended");
    run(&mut bench, 1250, 1200);
    assert_eq!(made(&bench), 1);
    end_all(&mut bench);
    assert_eq!(due(&bench, 1460), Some(1400), "of those that passed one is made up for");
    run(&mut bench, 1460, 1300);
    assert_eq!(made(&bench), 1, "that one is not due any more");
    run(&mut bench, 1460, 1400);
    assert_eq!(made(&bench), 2);
    end_all(&mut bench);
    set(&mut bench, 1470, EVERY);
    assert_eq!(due(&bench, 1499), None, "to set it again makes nothing due");
    at(&mut bench, 1500, ScheduleCommand::Delete { name: "a".into() }).expect("deleted");
    run(&mut bench, 1600, 1600);
    assert_eq!(made(&bench), 2);
    assert_eq!(at(&mut bench, 1600, ScheduleCommand::Delete { name: "a".into() }), Err(Kind::NotFound));
}

#[test]
fn a_clock_that_was_years_ahead_does_not_stop_a_schedule() {
    let mut bench = Bench::empty();
    set(&mut bench, 1000, EVERY);
    run(&mut bench, 900_000, 900_000);
    end_all(&mut bench);
    assert_eq!((made(&bench), due(&bench, 1250)), (1, Some(1200)));
    run(&mut bench, 1250, 1200);
    end_all(&mut bench);
    assert_eq!((made(&bench), due(&bench, 1299), due(&bench, 1300)), (2, None, Some(1300)));
}

proptest! {
    #[test]
    fn a_due_time_makes_one_task(steps in prop::collection::vec((0u64..80, 0u64..3, any::<bool>()), 1..60)) {
        let mut bench = Bench::empty();
        set(&mut bench, 1000, EVERY);
        let (mut now, mut seen) = (1000, BTreeSet::new());
        for (passes, behind, ends) in steps {
            now += passes;
            if ends {
                end_all(&mut bench);
            }
            let before = made(&bench);
            // A leader that is late, or one of a due time that is over.
            run(&mut bench, now, (now - now % EVERY).saturating_sub(behind * EVERY));
            let row: ScheduleRow = bench.read(|tx| tx.expect(&"a".to_owned()).map_err(Into::into));
            if made(&bench) > before {
                prop_assert_eq!(made(&bench), before + 1);
                prop_assert_eq!((row.last_due_unix_ms, behind), (now - now % EVERY, 0));
                prop_assert!(seen.insert(row.last_due_unix_ms), "a second task of one due time");
                prop_assert_eq!(row.last_task, ServiceTaskId(before as u64 + 1));
            }
        }
    }
}
