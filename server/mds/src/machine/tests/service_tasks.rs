//! Service tasks against a model: any mixture of creators, takers, owners that come late, cancellations. After every step the rows are those
//! of the model, and nobody but the one who took a task last has changed it.

use super::super::command::{Command, Outcome};
use super::super::row::{
    EndedServiceTaskRow, OpenServiceTaskRow, ServiceTaskKeyRow, ServiceTaskRow, ServiceTaskState as State,
};
use super::super::service_tasks::{Holder, ServiceTaskCommand as Ask, TaskEnd};
use super::Bench;
use crate::refusal::Refusal;
use ogee_common::id::ServiceTaskId;
use ogee_common::limits::{SERVICE_TASKS_KEPT_MAX, SERVICE_TASKS_OPEN_MAX};
use ogee_proto::MdsErrorKind as Kind;
use proptest::prelude::*;
use std::collections::BTreeMap;

/// What somebody does. Tasks are named by position, owners by number, fences by how far they lie behind.
#[derive(Debug, Clone)]
enum Op {
    Create { kind: u8, key: Option<u8> },
    Cancel { task: u64 },
    Take { task: u64, owner: u64, behind: u64 },
    Note { task: u64, owner: u64, behind: u64, text: u8 },
    End { task: u64, owner: u64, behind: u64, end: TaskEnd },
}

fn op() -> impl Strategy<Value = Op> {
    let (task, owner, behind) = (1u64..5, 1u64..4, prop_oneof![6 => Just(0u64), 1 => Just(1u64)]);
    let end = prop_oneof![Just(TaskEnd::Done), Just(TaskEnd::Failed), Just(TaskEnd::Cancelled), Just(TaskEnd::Released)];
    prop_oneof![
        2 => (0u8..2, prop::option::of(0u8..3)).prop_map(|(kind, key)| Op::Create { kind, key }),
        1 => task.clone().prop_map(|task| Op::Cancel { task }),
        4 => (task.clone(), owner.clone(), behind.clone()).prop_map(|(task, owner, behind)| Op::Take { task, owner, behind }),
        2 => (task.clone(), owner.clone(), behind.clone(), any::<u8>())
            .prop_map(|(task, owner, behind, text)| Op::Note { task, owner, behind, text }),
        3 => (task, owner, behind, end).prop_map(|(task, owner, behind, end)| Op::End { task, owner, behind, end }),
    ]
}

/// A task of the model. `holder` is who took it last and has not parted with it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Model {
    kind: u8,
    key: Option<u8>,
    holder: Option<u64>,
    fence: u64,
    state: State,
    note: String,
}

#[derive(Debug, Default)]
struct World {
    tasks: BTreeMap<u64, Model>,
    ended: Vec<u64>,
}

impl World {
    /// What should come of an operation: the task that it answers with, or the kind of the refusal.
    fn act(&mut self, op: &Op) -> Result<u64, Kind> {
        match *op {
            Op::Create { kind, key } => {
                let same_key = key.and_then(|key| self.tasks.iter().find(|(_, t)| t.key == Some(key)));
                if let Some((id, task)) = same_key {
                    return if task.kind == kind { Ok(*id) } else { Err(Kind::AlreadyExists) };
                }
                let id = self.tasks.len() as u64 + 1;
                let new = Model { kind, key, holder: None, fence: 0, state: State::Queued, note: String::new() };
                self.tasks.insert(id, new);
                Ok(id)
            }
            Op::Cancel { task: id } => {
                let task = self.tasks.get_mut(&id).ok_or(Kind::NotFound)?;
                if task.state.is_open() {
                    task.state = if task.fence == 0 { State::Cancelled } else { State::Cancelling };
                    if task.fence == 0 {
                        self.ended.push(id);
                    }
                }
                Ok(id)
            }
            Op::Take { task: id, owner, behind } => {
                let task = self.tasks.get_mut(&id).ok_or(Kind::NotFound)?;
                let seen = task.fence.saturating_sub(behind);
                let again = task.holder == Some(owner) && seen + 1 == task.fence;
                if !task.state.is_open() || (seen != task.fence && !again) {
                    return Err(Kind::Unavailable);
                }
                if !again {
                    (task.holder, task.fence) = (Some(owner), task.fence + 1);
                    task.state = if task.state == State::Queued { State::Running } else { task.state };
                }
                Ok(id)
            }
            Op::Note { task: id, owner, behind, text } => {
                self.held(id, owner, behind)?.note = text.to_string();
                Ok(id)
            }
            Op::End { task: id, owner, behind, end } => self.end(id, owner, behind, end),
        }
    }

    fn held(&mut self, id: u64, owner: u64, behind: u64) -> Result<&mut Model, Kind> {
        let task = self.tasks.get_mut(&id).ok_or(Kind::NotFound)?;
        let is_held = task.state.is_open() && task.holder == Some(owner) && task.fence.saturating_sub(behind) == task.fence;
        if is_held { Ok(task) } else { Err(Kind::Fenced) }
    }

    fn end(&mut self, id: u64, owner: u64, behind: u64, end: TaskEnd) -> Result<u64, Kind> {
        let state = match end {
            TaskEnd::Done => State::Done,
            TaskEnd::Failed => State::Failed,
            TaskEnd::Cancelled => State::Cancelled,
            TaskEnd::Released => State::Queued,
        };
        if let Some(task) = self.tasks.get(&id)
            && !task.state.is_open()
            && (task.state, task.holder) == (state, Some(owner))
            && task.fence.saturating_sub(behind) == task.fence
        {
            return Ok(id);
        }
        let task = self.held(id, owner, behind)?;
        match end {
            TaskEnd::Cancelled if task.state != State::Cancelling => return Err(Kind::InvalidArgument),
            TaskEnd::Released => {
                task.holder = None;
                task.state = if task.state == State::Running { State::Queued } else { task.state };
            }
            _ => {
                task.state = state;
                self.ended.push(id);
            }
        }
        Ok(id)
    }

    /// The command of an operation as whoever does it would send it.
    fn command(&self, op: &Op) -> Ask {
        let fence = |id: &u64, behind: &u64| self.tasks.get(id).map_or(0, |t| t.fence).saturating_sub(*behind);
        match op {
            Op::Create { kind, key } => Ask::Create {
                kind: format!("kind-{kind}"),
                repository: "r".into(),
                arguments: "{}".into(),
                key: key.map(|k| [k; 16]),
            },
            Op::Cancel { task } => Ask::Cancel { task: ServiceTaskId(*task) },
            Op::Take { task, owner, behind } => {
                Ask::Take { task: ServiceTaskId(*task), owner: *owner, fence: fence(task, behind) }
            }
            Op::Note { task, owner, behind, text } => {
                let holder = Holder { task: ServiceTaskId(*task), owner: *owner, fence: fence(task, behind) };
                Ask::Note { holder, note: text.to_string(), done: 0, total: 0 }
            }
            Op::End { task, owner, behind, end } => {
                let holder = Holder { task: ServiceTaskId(*task), owner: *owner, fence: fence(task, behind) };
                Ask::End { holder, end: *end, result: "because".into() }
            }
        }
    }

    fn check(&self, bench: &Bench) {
        let rows = bench.read(|tx| Ok(tx.scan::<ServiceTaskRow>(&(), None, 100)?));
        let found: BTreeMap<u64, Model> = rows
            .iter()
            .map(|(id, row)| {
                let holder = (row.owner != 0).then_some(row.owner);
                let (kind, key) = (row.kind.as_bytes()[5] - b'0', row.key.map(|k| k[0]));
                (id.0, Model { kind, key, holder, fence: row.fence, state: row.state, note: row.note.clone() })
            })
            .collect();
        assert_eq!(found, self.tasks);
        let open = bench.read(|tx| Ok(tx.scan::<OpenServiceTaskRow>(&(), None, 100)?));
        let open: Vec<u64> = open.into_iter().map(|(id, _)| id.0).collect();
        assert_eq!(open, self.tasks.iter().filter(|(_, t)| t.state.is_open()).map(|(id, _)| *id).collect::<Vec<_>>());
        let ended = bench.read(|tx| Ok(tx.scan::<EndedServiceTaskRow>(&(), None, 100)?));
        assert_eq!(ended.into_iter().map(|(_, row)| row.0.0).collect::<Vec<_>>(), self.ended);
    }
}

fn run(bench: &mut Bench, ask: Ask) -> Result<(ServiceTaskId, ServiceTaskRow), Refusal> {
    match bench.run(Command::ServiceTask(ask))? {
        Outcome::ServiceTask(task) => Ok(*task),
        other => panic!("{other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn tasks_are_those_of_the_model(ops in prop::collection::vec(op(), 1..60)) {
        let (mut bench, mut world) = (Bench::empty(), World::default());
        for op in &ops {
            if matches!(op, Op::Create { .. }) && world.tasks.len() >= 4 {
                continue;
            }
            let ask = world.command(op);
            let found = run(&mut bench, ask).map(|(id, _)| id.0).map_err(|r| r.kind());
            prop_assert_eq!(found, world.act(op), "{:?}", op);
            world.check(&bench);
        }
    }
}

fn create(bench: &mut Bench, key: Option<[u8; 16]>) -> Result<ServiceTaskId, Refusal> {
    let (kind, repository, arguments) = ("backup".into(), "r".into(), "{}".into());
    Ok(run(bench, Ask::Create { kind, repository, arguments, key })?.0)
}

fn key(n: usize) -> [u8; 16] {
    (n as u128 + 1).to_be_bytes()
}

#[test]
fn open_tasks_are_bounded_and_old_ones_are_forgotten_with_their_keys() {
    let mut bench = Bench::empty();
    let mut tasks = vec![];
    for n in 0..SERVICE_TASKS_OPEN_MAX {
        tasks.push(create(&mut bench, Some(key(n))).expect("created"));
    }
    assert_eq!(create(&mut bench, None).expect_err("too many").kind(), Kind::Limit);
    assert_eq!(create(&mut bench, Some(key(3))).expect("the same again"), tasks[3]);
    for task in &tasks {
        run(&mut bench, Ask::Cancel { task: *task }).expect("cancelled");
    }
    let count = |bench: &Bench| bench.read(|tx| Ok(tx.scan::<ServiceTaskRow>(&(), None, usize::MAX)?)).len();
    assert_eq!(count(&bench), SERVICE_TASKS_KEPT_MAX.min(SERVICE_TASKS_OPEN_MAX));
    for n in 0..3 {
        let task = create(&mut bench, Some(key(SERVICE_TASKS_OPEN_MAX + n))).expect("created");
        run(&mut bench, Ask::Cancel { task }).expect("cancelled");
    }
    assert_eq!(count(&bench), SERVICE_TASKS_KEPT_MAX);
    let gone = SERVICE_TASKS_OPEN_MAX + 3 - SERVICE_TASKS_KEPT_MAX;
    let keys = bench.read(|tx| Ok(tx.scan::<ServiceTaskKeyRow>(&(), None, usize::MAX)?)).len();
    assert_eq!(keys, SERVICE_TASKS_KEPT_MAX);
    assert_eq!(run(&mut bench, Ask::Cancel { task: tasks[gone - 1] }).expect_err("forgotten").kind(), Kind::NotFound);
    assert!(run(&mut bench, Ask::Cancel { task: tasks[gone] }).is_ok());
    let again = create(&mut bench, Some(key(0))).expect("a key that is forgotten makes a new one");
    assert!(again > tasks[SERVICE_TASKS_OPEN_MAX - 1]);
}

#[test]
fn times_are_those_of_the_first_take_and_of_the_end() {
    let mut bench = Bench::empty();
    let task = create(&mut bench, None).expect("created");
    let (_, row) = run(&mut bench, Ask::Take { task, owner: 7, fence: 0 }).expect("taken");
    let started = row.started_unix_ms;
    assert!(started > row.created_unix_ms && row.ended_unix_ms == 0);
    let (_, row) = run(&mut bench, Ask::Take { task, owner: 8, fence: 1 }).expect("taken over");
    assert_eq!((row.started_unix_ms, row.fence, row.state), (started, 2, State::Running));
    let holder = Holder { task, owner: 8, fence: 2 };
    let (_, row) = run(&mut bench, Ask::End { holder, end: TaskEnd::Failed, result: "full".into() }).expect("ended");
    assert!(row.ended_unix_ms > started);
    assert_eq!((row.state, row.result.as_str()), (State::Failed, "full"));
}
