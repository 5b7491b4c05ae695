//! Tests of the checker: valid random histories pass, planted violations are found, and on small histories it agrees with an oracle
//! that tries every order.

use super::simulate::{Size, any_order_explains, history};
use super::*;
use ogee_client::MemoryDevice;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const BIG: Size = Size { sectors: 12, ops: 300, cuts: 3, forks: 2, span: 20_000, longest: 400 };
/// Much at once.
const DENSE: Size = Size { sectors: 4, ops: 60, cuts: 2, forks: 1, span: 1_000, longest: 150 };
const SMALL: Size = Size { sectors: 2, ops: 7, cuts: 1, forks: 0, span: 60, longest: 40 };

fn kinds(history: &History) -> Vec<ViolationKind> {
    check(history).err().unwrap_or_default().into_iter().map(|v| v.kind).collect()
}

#[test]
fn histories_that_keep_the_promises_pass() {
    let (mut registers, mut cuts) = (0, 0);
    for seed in 0..400 {
        let size = if seed % 2 == 0 { BIG } else { DENSE };
        match check(&history(seed, size)) {
            Ok(checked) => (registers, cuts) = (registers + checked.registers, cuts + checked.cuts_under_load),
            Err(bad) => panic!("seed {seed}: {}", bad[0]),
        }
    }
    assert!(registers > 5_000 && cuts > 500, "the histories are too easy: {registers} registers, {cuts} cuts");
}

/// Changes one value that was read into another one of the history.
fn spoil(history: &mut History, rng: &mut StdRng) {
    let mut values: Vec<Value> = history.ops.iter().flat_map(|op| op.found.iter().map(|run| run.value)).collect();
    values.push(Value::Zero);
    let reads: Vec<usize> = (0..history.ops.len()).filter(|i| !history.ops[*i].found.is_empty()).collect();
    if reads.is_empty() {
        return;
    }
    let found = &mut history.ops[reads[rng.random_range(0..reads.len())]].found;
    let i = rng.random_range(0..found.len());
    found[i].value = values[rng.random_range(0..values.len())];
}

#[test]
fn it_agrees_with_an_oracle_that_tries_every_order() {
    let (mut good, mut bad) = (0, 0);
    for seed in 0..6_000 {
        let mut rng = StdRng::seed_from_u64(!seed);
        let mut history = history(seed, Size { cuts: usize::from(seed % 3 > 0) + usize::from(seed % 3 > 1), ..SMALL });
        if seed % 4 > 0 {
            spoil(&mut history, &mut rng);
        }
        let possible = any_order_explains(&history, 2);
        let verdict = check(&history);
        // What is fenced across layers has tests of its own; within one layer both say the same.
        assert_eq!(verdict.is_ok(), possible, "seed {seed}: {verdict:?}\n{history:#?}");
        if possible { good += 1 } else { bad += 1 }
    }
    assert!(good > 1_000 && bad > 1_000, "{good} good, {bad} bad");
}

/// Writes a history by hand, after a random one that has come to rest.
struct Script {
    history: History,
    time: u64,
    next: u64,
}

impl Script {
    fn after(seed: u64) -> Self {
        let history = history(seed, BIG);
        Self { history, time: 1_000_000, next: 5_000_000 }
    }

    fn op(&mut self, action: Action, target: Target, epoch: u64, (first, count): (u32, u32), completed: Option<u64>) -> u64 {
        let (id, invoked) = (self.next, self.time);
        self.time = completed.unwrap_or(invoked).max(invoked) + 1;
        self.next += 1;
        self.history.ops.push(Op { id, client: 7, action, target, epoch, first, count, invoked, completed, found: vec![] });
        id
    }

    fn write(&mut self, sector: u32) -> u64 {
        self.op(Action::Write, Target::Layer(1), 9, (sector, 1), Some(self.time + 5))
    }

    fn lost(&mut self, sector: u32, epoch: u64) -> u64 {
        self.op(Action::Write, Target::Layer(1), epoch, (sector, 1), None)
    }

    fn find(&mut self, target: Target, epoch: u64, sector: u32, value: Value) {
        self.op(Action::Read, target, epoch, (sector, 1), Some(self.time + 5));
        self.history.ops.last_mut().expect("just pushed").found = vec![Run { count: 1, value }];
    }

    fn finds(&mut self, sector: u32, op: u64) {
        self.find(Target::Layer(1), 9, sector, Value::Write { layer: 1, op });
    }

    fn cut(&mut self, lasts: u64) -> u64 {
        self.op(Action::Cut, Target::Layer(1), 0, (0, 0), Some(self.time + lasts))
    }

    fn shows(&mut self, cut: u64, sector: u32, op: u64) {
        self.find(Target::Cut(cut), 0, sector, Value::Write { layer: 1, op });
    }

    /// The kind that is found; the text must name the operation.
    fn found(&self, op: u64) -> ViolationKind {
        let bad = check(&self.history).expect_err("a violation was planted");
        assert_eq!(bad.len(), 1, "{bad:?}");
        assert!(bad[0].text.contains(&format!("#{op}")), "{}", bad[0]);
        bad[0].kind
    }
}

/// Plants one violation after each of many random histories; the script says which operation must be named.
fn planted(kind: ViolationKind, plant: impl Fn(&mut Script) -> u64) {
    for seed in 0..25 {
        let mut script = Script::after(seed);
        let op = plant(&mut script);
        assert_eq!(script.found(op), kind, "seed {seed}");
    }
}

#[test]
fn stale_lost_and_resurrected_writes_are_found() {
    planted(ViolationKind::NotLinearizable, |s| {
        let (old, new) = (s.write(3), s.write(3));
        s.finds(3, old);
        new
    });
    planted(ViolationKind::NotLinearizable, |s| {
        let lost = s.write(3);
        s.find(Target::Layer(1), 9, 3, Value::Zero);
        lost
    });
    planted(ViolationKind::NotLinearizable, |s| {
        let (old, new) = (s.write(3), s.write(3));
        s.finds(3, new);
        s.finds(3, old);
        old
    });
    // An unknown write that was seen may not go away.
    planted(ViolationKind::NotLinearizable, |s| {
        let (old, unknown) = (s.write(3), s.lost(3, 9));
        s.finds(3, unknown);
        s.finds(3, old);
        unknown
    });
    // One discard, seen twice with a write between.
    planted(ViolationKind::NotLinearizable, |s| {
        s.write(3);
        s.op(Action::Zero, Target::Layer(1), 9, (3, 1), None);
        s.find(Target::Layer(1), 9, 3, Value::Zero);
        let write = s.write(3);
        s.find(Target::Layer(1), 9, 3, Value::Zero);
        write
    });
}

#[test]
fn an_unknown_write_may_land_until_it_is_fenced() {
    let plant = |s: &mut Script, epoch: u64| {
        let (old, unknown) = (s.write(3), s.lost(3, 9));
        s.find(Target::Layer(1), epoch, 3, Value::Write { layer: 1, op: old });
        s.find(Target::Layer(1), epoch, 3, Value::Write { layer: 1, op: unknown });
        unknown
    };
    let mut script = Script::after(1);
    plant(&mut script, 9);
    assert_eq!(kinds(&script.history), []);
    planted(ViolationKind::NotLinearizable, |s| plant(s, 10));
    // The same with a discard.
    for (epoch, count) in [(9, 0), (10, 1)] {
        let mut s = Script::after(1);
        let old = s.write(3);
        s.op(Action::Zero, Target::Layer(1), 9, (3, 1), None);
        s.find(Target::Layer(1), epoch, 3, Value::Write { layer: 1, op: old });
        s.find(Target::Layer(1), epoch, 3, Value::Zero);
        assert_eq!(kinds(&s.history).len(), count);
    }
}

#[test]
fn concurrent_writes_land_in_either_order_but_in_one() {
    for swapped in [false, true] {
        let mut s = Script::after(2);
        let (a, b) = (s.write(3), s.write(3));
        let both = (s.history.ops[s.history.ops.len() - 2].invoked, s.time);
        for op in s.history.ops.iter_mut().rev().take(2) {
            (op.invoked, op.completed) = (both.0, Some(both.1));
        }
        s.time += 10;
        s.finds(3, if swapped { a } else { b });
        assert_eq!(kinds(&s.history), []);
        s.finds(3, if swapped { b } else { a });
        assert_eq!(kinds(&s.history), [ViolationKind::NotLinearizable]);
    }
}

#[test]
fn foreign_misplaced_and_torn_sectors_are_found() {
    planted(ViolationKind::Foreign, |s| {
        let other = s.op(Action::Write, Target::Layer(2), 9, (3, 1), Some(s.time + 5));
        s.find(Target::Layer(1), 9, 3, Value::Write { layer: 2, op: other });
        other
    });
    planted(ViolationKind::NeverWritten, |s| {
        let other = s.write(4);
        s.find(Target::Layer(1), 9, 3, Value::Write { layer: 1, op: other });
        other
    });
    let (mut a, mut b) = ([0u8; SECTOR_BYTES], [0u8; SECTOR_BYTES]);
    fill(1, 70, 3, &mut a);
    fill(1, 71, 3, &mut b);
    assert_eq!(decode(3, &a), Value::Write { layer: 1, op: 70 });
    assert_eq!(decode(4, &a), Value::Elsewhere { layer: 1, op: 70, sector: 3 });
    assert_eq!(decode(4, &[0; SECTOR_BYTES]), Value::Zero);
    // The first eight bytes are the layer, which is the same.
    for cut in (16..SECTOR_BYTES).step_by(8) {
        let torn = [&a[..cut], &b[cut..]].concat();
        assert_eq!(decode(3, &torn), Value::Torn { op: 70 }, "torn at {cut}");
        let zeroed = [&a[..cut], &vec![0; SECTOR_BYTES - cut][..]].concat();
        assert!(matches!(decode(3, &zeroed), Value::Torn { .. }), "zeros from {cut}");
    }
    for byte in 0..SECTOR_BYTES {
        let mut flipped = a;
        flipped[byte] ^= 4;
        assert!(matches!(decode(3, &flipped), Value::Torn { .. }), "flipped at {byte}");
    }
    for value in [Value::Torn { op: 5 }, Value::Elsewhere { layer: 1, op: 5, sector: 8 }] {
        let mut s = Script::after(4);
        s.find(Target::Layer(1), 9, 3, value);
        let expected = if matches!(value, Value::Torn { .. }) { ViolationKind::Torn } else { ViolationKind::Misplaced };
        assert_eq!(kinds(&s.history), [expected]);
    }
}

#[test]
fn a_snapshot_with_a_later_write_or_without_an_earlier_one_is_found() {
    planted(ViolationKind::NotLinearizable, |s| {
        s.write(3);
        let cut = s.cut(50);
        let later = s.write(3);
        s.shows(cut, 3, later);
        later
    });
    planted(ViolationKind::NotLinearizable, |s| {
        let (old, new) = (s.write(3), s.write(3));
        let cut = s.cut(50);
        s.shows(cut, 3, old);
        new
    });
}

/// Write `a` completes before write `b` begins, both while the snapshot is taken. Returns the cut and the writes with those before.
fn two_writes_under_a_cut(s: &mut Script) -> (u64, [u64; 4]) {
    let (a0, b0) = (s.write(3), s.write(5));
    let begin = s.time;
    let cut = s.cut(1_000);
    s.time = begin + 10;
    let (a, b) = (s.write(3), s.write(5));
    s.time = begin + 2_000;
    (cut, [a0, a, b0, b])
}

#[test]
fn a_snapshot_is_one_instant_for_all_sectors() {
    for (shows_a, shows_b) in [(0, 0), (1, 0), (1, 1), (0, 1)] {
        let mut s = Script::after(6);
        let (cut, w) = two_writes_under_a_cut(&mut s);
        s.shows(cut, 3, w[shows_a]);
        s.shows(cut, 5, w[2 + shows_b]);
        let impossible = shows_a == 0 && shows_b == 1;
        assert_eq!(kinds(&s.history), if impossible { vec![ViolationKind::CutNotExact] } else { vec![] });
    }
    // The same, seen only through a clone, and with an unknown end of the snapshot.
    let mut s = Script::after(6);
    let (cut, w) = two_writes_under_a_cut(&mut s);
    s.history.ops.iter_mut().filter(|op| op.id == cut).for_each(|op| op.completed = None);
    s.history.layers.insert(77, Layer { volume: 77, sectors: 12, parent: Some(cut) });
    s.find(Target::Layer(77), 1, 3, Value::Write { layer: 1, op: w[0] });
    assert_eq!(kinds(&s.history), []);
    s.find(Target::Layer(77), 1, 5, Value::Write { layer: 1, op: w[3] });
    assert_eq!(kinds(&s.history), [ViolationKind::CutNotExact]);
}

#[test]
fn a_fork_that_changes_or_differs_from_its_snapshot_is_found() {
    let forked = |s: &mut Script| {
        let (a, b) = (s.write(3), s.write(3));
        let cut = s.cut(10);
        s.history.layers.insert(77, Layer { volume: 1, sectors: 12, parent: Some(cut) });
        (a, b, cut)
    };
    let mut s = Script::after(8);
    let (a, b, cut) = forked(&mut s);
    s.shows(cut, 3, b);
    s.find(Target::Layer(77), 10, 3, Value::Write { layer: 1, op: b });
    assert_eq!(kinds(&s.history), []);
    s.find(Target::Layer(77), 10, 3, Value::Write { layer: 1, op: a });
    assert_eq!(kinds(&s.history), [ViolationKind::CutChanged]);
    // Zeros where the snapshot has data: nothing of the fork explains them.
    let mut s = Script::after(8);
    let (_, b, cut) = forked(&mut s);
    s.find(Target::Layer(77), 10, 3, Value::Zero);
    s.shows(cut, 3, b);
    assert!(!kinds(&s.history).is_empty());
    // A write to the old layer, after the rolled back volume was used by its next holder.
    let mut s = Script::after(8);
    let (_, b, _) = forked(&mut s);
    s.find(Target::Layer(77), 10, 3, Value::Write { layer: 1, op: b });
    s.write(3);
    assert_eq!(kinds(&s.history), [ViolationKind::FencedSuccess]);
}

#[test]
fn events_survive_their_log_and_contradictions_are_refused() {
    let history = history(3, DENSE);
    let mut events: Vec<Event> = history.layers.iter().map(|(id, layer)| Event::Layer { id: *id, layer: *layer }).collect();
    for op in &history.ops {
        events.push(Event::Invoke(Op { completed: None, found: vec![], ..op.clone() }));
        if let Some(time) = op.completed {
            events.push(Event::Complete { op: op.id, time, outcome: Outcome::Ok(op.found.clone()) });
        }
    }
    let found = [Value::Zero, Value::Elsewhere { layer: 1, op: 2, sector: 3 }, Value::Torn { op: 9 }];
    let outcome = Outcome::Ok(found.map(|value| Run { count: 2, value }).to_vec());
    let odd = [Event::Complete { op: 1, time: 2, outcome }, Event::Complete { op: 1, time: 2, outcome: Outcome::Void }];
    let text: String = events.iter().chain(&odd).map(log::line).collect();
    let mut parsed = parse(&format!("{text}C 12 1")).expect("what was written, and half a line");
    assert_eq!(parsed.split_off(events.len()), odd);
    assert_eq!(parsed, events);
    let again = History::new(parsed).expect("consistent");
    assert_eq!((again.ops, again.layers), (history.ops, history.layers));
    for bad in ["C 1 2 ok 1:w3\n", "C 1 2 ok 1:x\n", "I 1 2 3 w q 1 2 3 4\n", "hello\n", "C 1 2 ok 4:\n", "L 1 2\n"] {
        assert!(parse(bad).is_err(), "{bad}");
    }
    let twice = [odd[0].clone(), odd[0].clone()];
    assert!(History::new(twice).is_err() && History::new([odd[0].clone()]).is_err());
}

#[tokio::test]
async fn a_recorded_device_is_explained_and_a_changed_byte_is_not() {
    let recorder = Recorder::in_memory(4);
    recorder.layer(1, Layer { volume: 1, sectors: 2048, parent: None }).expect("kept");
    let device = MemoryDevice::new(1 << 20);
    let disk = Recorded { device: device.clone(), recorder: recorder.clone(), target: Target::Layer(1), epoch: 1 };
    let io = async {
        disk.write(3, 9).await??;
        disk.write_zeroes(5, 2).await??;
        disk.discard(7, 1).await??;
        disk.read(0, 64).await??;
        anyhow::ensure!(disk.write(4096, 1).await?.is_err(), "beyond the end");
        anyhow::Ok(())
    };
    io.await.expect("a device in memory works");
    let checked = check(&History::new(recorder.events()).expect("consistent")).expect("explained");
    assert_eq!((checked.operations, checked.registers), (4, 64));
    let data = ogee_client::BlockDevice::read(&device, 3 * 512, 512).await.expect("read").to_vec();
    let spoiled: Vec<u8> = data.iter().enumerate().map(|(i, b)| if i == 100 { b ^ 1 } else { *b }).collect();
    ogee_client::BlockDevice::write(&device, 3 * 512, bytes::Bytes::from(spoiled)).await.expect("written");
    disk.read(0, 8).await.expect("recorded").expect("read");
    assert_eq!(kinds(&History::new(recorder.events()).expect("consistent")), [ViolationKind::Torn]);
}
